"""Turns a trained dense model into the first weights of a mixture of experts with latent attention.

What the dense model has learnt in hours need not be learnt again. Its embedding, norms and first feed-forward block are
taken over. Every attention block becomes latent attention: ranks as large as the hidden size carry the old projections
unchanged, the quickly turning pairs of the old key groups become the one rotated key that all heads share (the first
principal component of the groups), the slowly turning ones become the part without rotation, and the norms of queries
and keys, which latent attention lacks, go into the matrices by least squares. Every other feed-forward block is cut
into experts (MoEfication, Zhang et al., 2022; sparse upcycling, Komatsuzaki et al., 2023): the neurons used most become
the shared expert, each group of experts gets those that one domain of the corpus uses most, divided by what fires
together, and the router starts as a linear classifier of domains. The MTP layer starts with heads that find the last
token elsewhere in the text and copy what followed it.

`fit_loss` then trains every attention block to do what the dense model's does to the dense model's own activations,
which teaches far more per token than the next token alone. The experts need none of that: cut as they are, they come within
two percent of the block they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import chat
import corpus
from initialise import orthonormal
from model import rotate

# Which group of experts a skill's text starts in.
DOMAINS = [
    {"story", "unknown", "table", "tell_story", "fact", "yes_no", "small_talk", "refusal", "units", "dates"},
    {"extraction", "tool_call", "tool_result", "key_drill"},
    {"addition", "subtraction", "multiplication", "word_problem", "comparison", "sum_drill"},
]  # and everything else: lists and choices


def domain(skill: str) -> int:
    return next((index for index, skills in enumerate(DOMAINS) if skill in skills), len(DOMAINS))


@torch.no_grad()
def teacher_states(teacher: torch.nn.Module, tokens: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
    """Of every dense layer what goes in and what attention adds, and the last states of all."""
    decoder = teacher.model
    length = tokens.shape[1]
    x = decoder.embed_tokens(tokens)
    cosine, sine = decoder.cosine[:length], decoder.sine[:length]
    found = []
    for layer in decoder.layers:
        moved = layer.self_attn(layer.input_layernorm(x), cosine, sine)
        found.append((x, moved))
        x = x + moved
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return found, decoder.norm(x)


def fit_loss(model: torch.nn.Module, teacher: torch.nn.Module, tokens: torch.Tensor) -> tuple:
    """How far every attention block of the model is from the teacher's, given the teacher's activations.

    Returns the squared errors relative to what is to be met, [layers], and the teacher's last hidden states.
    """
    found, last = teacher_states(teacher, tokens)
    length = tokens.shape[1]
    cosine, sine = model.model.cosine[:length], model.model.sine[:length]
    real = (tokens != model.config["pad_token_id"]).unsqueeze(-1)
    errors = []
    for layer, (x, moved) in zip(model.model.layers, found):
        ours = layer.self_attn(layer.input_layernorm(x), cosine, sine)
        errors.append(((ours - moved) * real).square().sum() / (moved * real).square().sum())
    return torch.stack(errors), last


def sample(tokenizer: Tokenizer, count: int, longest: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Conversations as tokens, one tensor [1, length] each, and the domain of every token."""
    texts, labels = [], []
    for index in range(count):
        conversation = corpus.training_conversation(index, many_turns=0.15)
        ids = tokenizer.encode(corpus.text_of(conversation), add_special_tokens=False).ids[:longest]
        texts.append(torch.tensor([ids]))
        labels += [domain(conversation["skill"])] * len(ids)
    return texts, torch.tensor(labels)


def least_squares(x: torch.Tensor, y: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The matrix [outputs, inputs] that maps rows of x nearest to rows of y."""
    square = x.T @ x
    square += ridge * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square, x.T @ y).T


def convert_attention(new, old, norm: torch.Tensor, x: torch.Tensor, theta: float, generator: torch.Generator) -> None:
    """new, old: the attention blocks; norm: the weights of the norm before; x: [count, hidden], the normalised input
    without those weights."""
    hidden, dim = x.shape[1], old.head_dim
    heads, groups = old.heads, old.groups
    half, pairs = dim // 2, new.rope // 2
    after = lambda projection, scale, count: scale(F.linear(x * norm, projection.weight).view(-1, count, dim)).flatten(1)
    q = least_squares(x, after(old.q_proj, old.q_norm, heads)).view(heads, dim, hidden)
    k = least_squares(x, after(old.k_proj, old.k_norm, groups)).view(groups, dim, hidden)
    q = q * ((new.nope + new.rope) / dim) ** 0.5
    # Pairs that the rotated key of MLA takes: those of its own frequencies, down to where rotation hardly matters.
    turning = [pair for pair in range(min(pairs, half)) if theta ** (-pair / half) > 0.006]
    still = [pair for pair in range(half) if pair not in turning]
    still = still[: new.nope // 2]
    q_new = 0.02 * torch.randn(heads, new.nope + new.rope, hidden, generator=generator)
    k_new = 0.02 * torch.randn(heads, new.nope, hidden, generator=generator)
    shared = 0.02 * torch.randn(new.rope, hidden, generator=generator)
    for at, pair in enumerate(still):
        for part, row in ((0, pair), (1, half + pair)):
            q_new[:, 2 * at + part] = q[:, row]
            k_new[:, 2 * at + part] = k[torch.arange(heads) // (heads // groups), row]
    for pair in turning:
        rows = torch.complex(k[:, pair], k[:, half + pair])  # [groups, hidden]
        asked = torch.complex(q[:, pair], q[:, half + pair])  # [heads, hidden]
        values = torch.complex(x @ rows.real.T, x @ rows.imag.T)
        strength = torch.stack([(x @ asked.real.T).square() + (x @ asked.imag.T).square()], 0).mean((0, 1)).sqrt()
        strength = strength.view(groups, -1).mean(1)
        moment = (values * strength).mH @ (values * strength) / len(x)
        direction = torch.linalg.eigh(moment.conj())[1][:, -1]  # a group's key is about its factor times the shared one
        common = ((direction.conj() * strength).unsqueeze(1) * rows).sum(0)
        factor = direction / strength.clamp(min=1e-6)
        scale = float(rows.abs().mean() / common.abs().mean())
        common, factor = common * scale, factor / scale
        shared[2 * pair], shared[2 * pair + 1] = common.real, common.imag
        turned = asked * factor.conj().repeat_interleave(heads // groups).unsqueeze(1)
        q_new[:, new.nope + 2 * pair], q_new[:, new.nope + 2 * pair + 1] = turned.real, turned.imag
    new.q_a_proj.weight.copy_(torch.eye(hidden)[: len(new.q_a_proj.weight)])
    new.q_b_proj.weight.copy_(q_new.flatten(0, 1))
    new.kv_a_proj_with_mqa.weight.copy_(torch.cat([torch.eye(hidden)[: new.rank], shared]))
    v = (old.v_proj.weight * norm).view(groups, dim, hidden).repeat_interleave(heads // groups, 0)
    new.kv_b_proj.weight.copy_(torch.cat([k_new, v], 1).flatten(0, 1))
    new.o_proj.weight.copy_(old.o_proj.weight)


def divide(features: torch.Tensor, parts: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [count, dimensions] in `parts` equal parts of like direction: the part of each. Balanced k-means."""
    size = len(features) // parts
    features = F.normalize(features, dim=1)
    centres = features[torch.randperm(len(features), generator=generator)[:parts]]
    for _ in range(10):
        likeness = features @ centres.T
        part = torch.full((len(features),), -1)
        room = [size] * parts
        for flat in likeness.flatten().argsort(descending=True).tolist():
            row, centre = divmod(flat, parts)
            if part[row] < 0 and room[centre]:
                part[row] = centre
                room[centre] -= 1
        centres = F.normalize(torch.stack([features[part == index].mean(0) for index in range(parts)]), dim=1)
    return part


def classifier(x: torch.Tensor, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Logistic regression without a bias: [count, inputs]. Rare labels weigh as much as frequent ones."""
    weight = torch.zeros(count, x.shape[1], requires_grad=True)
    share = 1 / torch.bincount(labels, minlength=count).clamp(min=1).float()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    with torch.enable_grad():
        for _ in range(150):
            optimizer.zero_grad()
            (F.cross_entropy(x @ weight.T, labels, weight=share) + 1e-3 * weight.square().sum()).backward()
            optimizer.step()
    return weight.detach()


def convert_block(new, old, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> None:
    """Cuts a dense feed-forward block into experts. x: [count, hidden], its input; labels: [count], the domains."""
    gate, up, down = old.gate_proj.weight, old.up_proj.weight, old.down_proj.weight
    strength = (F.silu(x @ gate.T) * (x @ up.T)).abs() * down.norm(dim=0)
    inner = new.down.shape[2]
    common = strength.square().sum(0).topk(len(new.shared_experts.gate_proj.weight)).indices
    new.shared_experts.gate_proj.weight.copy_(gate[common])
    new.shared_experts.up_proj.weight.copy_(up[common])
    new.shared_experts.down_proj.weight.copy_(down[:, common])
    groups, per_group = new.gate.groups, new.gate.experts // new.gate.groups
    sorts = classifier(x, labels, groups)
    logits = x @ sorts.T
    sorts = (sorts - sorts.mean(0)) / (logits - logits.mean(1, keepdim=True)).std()
    for group in range(groups):
        rows = labels == group
        used = strength[rows].square().sum(0)
        used[common] = 0
        kept = used.topk(per_group * inner).indices
        some = strength[rows][::max(1, int(rows.sum()) // 2000)][:, kept]
        part = divide(some.T, per_group, generator)
        energy = torch.stack([strength[rows][:, kept[part == index]].square().sum(1) for index in range(per_group)], 1)
        wanted = (energy + 1e-4 * energy.mean()).log()
        wanted = (wanted - wanted.mean()) / wanted.std()
        finer = least_squares(x[rows], 0.3 * wanted, 1e-2)
        for index in range(per_group):
            expert, neurons = group * per_group + index, kept[part == index]
            new.gate_up[expert] = torch.cat([gate[neurons], up[neurons]])
            new.down[expert] = down[:, neurons] * (new.gate.kept / new.gate.scale)
            new.gate.weight[expert] = sorts[group] + finer[index]


def start_prediction(layer, last: torch.nn.Module, norm: torch.nn.Module, states: torch.Tensor, embedded: torch.Tensor,
                     generator: torch.Generator) -> None:
    """The MTP layer: experts of the last layer, and heads that look the next token up in the text.

    states: [count, hidden], the model's last hidden states; embedded: [count, hidden], the tokens there.
    """
    hidden = states.shape[1]
    layer.load_state_dict({name: value for name, value in last.state_dict().items() if "mlp" in name}, strict=False)
    layer.shared_head.norm.weight.copy_(norm.weight)
    normalised = lambda x: F.rms_norm(x, (hidden,), eps=1e-6)
    # What stands at the place of a hidden state, as far as a linear map can tell.
    recalled = least_squares(normalised(states), normalised(embedded), 1e-3)
    eye = torch.eye(hidden)
    layer.eh_proj.weight.copy_(torch.cat([0.8 * eye, 0.6 * eye], 1))
    attention = layer.self_attn
    nope, rope, value = attention.nope, attention.rope, attention.value
    # The layer's input is 0.8 next + 0.6 state. Queries must see `next` alone and keys what the state recalls of its own
    # token; both are told apart by least squares on the mixture.
    ahead, here = normalised(embedded[1:]), normalised(states[:-1])
    mixed = normalised(0.8 * ahead + 0.6 * here)
    see_next = least_squares(mixed, ahead, 1e-3)
    see_here = least_squares(mixed, here @ recalled.T, 1e-3)
    attention.q_a_proj.weight.copy_(eye[: len(attention.q_a_proj.weight)])
    attention.kv_a_proj_with_mqa.weight[: attention.rank] = eye[: attention.rank]
    q = attention.q_b_proj.weight.view(attention.heads, nope + rope, hidden)
    kv = attention.kv_b_proj.weight.view(attention.heads, nope + value, hidden)
    for head in range(attention.heads // 2):
        mix = orthonormal(nope, hidden, generator)
        q[head] *= 0.1
        kv[head] *= 0.1
        q[head, :nope] += 1.6 * mix @ see_next
        kv[head, :nope] += 1.6 * mix @ see_here
        copied = orthonormal(value, hidden, generator)
        kv[head, nope:] += copied @ see_next
        rows = slice(head * value, (head + 1) * value)
        attention.o_proj.weight[:, rows] *= 0.1
        attention.o_proj.weight[:, rows] += 1.2 * copied.T


@torch.no_grad()
def upcycle(model: torch.nn.Module, teacher: torch.nn.Module, tokenizer: Tokenizer, seed: int, count: int = 300) -> None:
    """Fills the model from the dense teacher; `count` conversations are looked at."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = sample(tokenizer, count, 512)
    theta = teacher.config["rope_parameters"]["rope_theta"]
    states = [teacher_states(teacher, tokens) for tokens in texts]
    ours, theirs = model.model, teacher.model
    ours.embed_tokens.weight.copy_(theirs.embed_tokens.weight)
    ours.norm.weight.copy_(theirs.norm.weight)
    for index, old in enumerate(theirs.layers):
        new = ours.layers[index]
        before = torch.cat([found[index][0][0] for found, _ in states])
        between = before + torch.cat([found[index][1][0] for found, _ in states])
        convert_attention(new.self_attn, old.self_attn, old.input_layernorm.weight,
                          F.rms_norm(before, before.shape[1:], eps=1e-6), theta, generator)
        new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
        if hasattr(new.mlp, "gate"):
            convert_block(new.mlp, old.mlp, old.post_attention_layernorm(between), labels, generator)
        else:
            new.mlp.load_state_dict(old.mlp.state_dict())
    last = torch.cat([states_last[0] for _, states_last in states])
    embedded = torch.cat([ours.embed_tokens(tokens)[0] for tokens in texts])
    start_prediction(ours.layers[ours.depth], ours.layers[ours.depth - 1], ours.norm, last, embedded, generator)
