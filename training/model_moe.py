"""A DeepSeek-V3 decoder written for fast training on small machines: latent attention, routed experts, one MTP layer.

`checkpoint()` gives the parameters the names of DeepSeek's own checkpoints, which transformers' `DeepseekV3ForCausalLM`
loads unchanged; the layer after the last is the multi-token prediction layer, which shares the embedding and the head.
Within, the experts of a layer are two stacked tensors. Architecture: DeepSeek-V3 technical report, arXiv 2412.19437.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import RMSNorm, rotary_table


def rotate_pairs(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x0, x1), (x2, x3)...; the firsts then the seconds come back, as transformers lays them out."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class LatentAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.nope, self.rope, self.value = (
            config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"])
        self.rank = config["kv_lora_rank"]
        self.q_a_proj = nn.Linear(hidden, config["q_lora_rank"], bias=False)
        self.q_a_layernorm = RMSNorm(config["q_lora_rank"], epsilon)
        self.q_b_proj = nn.Linear(config["q_lora_rank"], self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, epsilon)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor,
                picked: torch.Tensor | None = None) -> torch.Tensor:
        """picked: flat positions whose output is wanted, which are then the rows of the result; all without it."""
        batch, length, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, length, self.heads, self.nope + self.rope).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        kv = kv.view(batch, length, self.heads, self.nope + self.value).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        half = self.rope // 2
        q_rope = rotate_pairs(q_rope, cosine[:, :half], sine[:, :half])
        k_rope = rotate_pairs(k_rope, cosine[:, :half], sine[:, :half]).unsqueeze(1).expand(-1, self.heads, -1, -1)
        q, k = torch.cat([q_nope, q_rope], dim=-1), torch.cat([k_nope, k_rope], dim=-1)
        if length <= 384 or q.device.type == "cpu":
            hidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
            scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + hidden
            y = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, self.heads * self.value)
        return self.o_proj(y if picked is None else y.flatten(0, 1).index_select(0, picked))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router: sigmoid scores, the best groups by their two best experts, the best experts of those groups."""

    def __init__(self, config: dict):
        super().__init__()
        self.experts, self.groups = config["n_routed_experts"], config["n_group"]
        self.kept_groups, self.kept = config["topk_group"], config["num_experts_per_tok"]
        self.scale = config["routed_scaling_factor"]
        self.weight = nn.Parameter(torch.empty(self.experts, config["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [count, hidden]; returns weights and expert numbers, both [count, kept]."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        grouped = choice.view(-1, self.groups, self.experts // self.groups)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1).indices
        allowed = torch.zeros(len(x), self.groups, dtype=torch.bool, device=x.device).scatter_(1, best, True)
        choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = choice.topk(self.kept, dim=-1).indices
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, chosen


class RoutedProducts(torch.autograd.Function):
    """The weighted sum of the chosen experts' feed-forward blocks, its gradients written out.

    Rows are sorted by expert, so that each expert multiplies one slice; what is done element by element is done for all
    experts at once. x: [count, hidden]; weights: [count, kept]; gate_up: [experts, 2 x inner, hidden]; down: [experts,
    hidden, inner]; order: the flat (row, choice) pairs sorted by expert; counts: pairs of each expert.
    """

    @staticmethod
    def forward(ctx, x, weights, gate_up, down, order, counts):
        kept, inner = weights.shape[1], down.shape[2]
        rows = order // kept
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        taken = x.index_select(0, rows)
        both = taken.new_empty(len(order), 2 * inner)
        done = torch.empty_like(taken)
        bounds, at = [], 0
        for expert, count in enumerate(counts):
            if count:
                bounds.append((expert, at, at + count))
            at += count
        for expert, first, end in bounds:
            torch.mm(taken[first:end], gate_up[expert].t(), out=both[first:end])
        gate, up = both[:, :inner], both[:, inner:]
        sigmoid = gate.sigmoid()
        active = gate * sigmoid * up
        share = weights.flatten().index_select(0, order).unsqueeze(1)
        scaled = active * share
        for expert, first, end in bounds:
            torch.mm(scaled[first:end], down[expert].t(), out=done[first:end])
        ctx.save_for_backward(taken, both, sigmoid, active, scaled, share, gate_up, down, rows, back)
        ctx.bounds, ctx.kept = bounds, kept
        return done.index_select(0, back).view(len(x), kept, -1).sum(1)

    @staticmethod
    def backward(ctx, gradient):
        taken, both, sigmoid, active, scaled, share, gate_up, down, rows, back = ctx.saved_tensors
        inner = down.shape[2]
        wanted = gradient.index_select(0, rows)
        of_scaled = torch.empty_like(scaled)
        of_down, of_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        for expert, first, end in ctx.bounds:
            torch.mm(wanted[first:end], down[expert], out=of_scaled[first:end])
            torch.mm(wanted[first:end].t(), scaled[first:end], out=of_down[expert])
        of_weights = (of_scaled * active).sum(1).index_select(0, back).view(-1, ctx.kept)
        of_active = of_scaled.mul_(share)
        gate, up = both[:, :inner], both[:, inner:]
        of_both = torch.empty_like(both)
        silu = gate * sigmoid
        torch.mul(of_active, silu, out=of_both[:, inner:])
        torch.mul(of_active.mul_(up), sigmoid + silu * (1 - sigmoid), out=of_both[:, :inner])
        of_taken = torch.empty_like(taken)
        for expert, first, end in ctx.bounds:
            torch.mm(of_both[first:end], gate_up[expert], out=of_taken[first:end])
            torch.mm(of_both[first:end].t(), taken[first:end], out=of_gate_up[expert])
        of_x = of_taken.index_select(0, back).view(-1, ctx.kept, taken.shape[1]).sum(1)
        return of_x, of_weights, of_gate_up, of_down, None, None


class Experts(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
        self.gate = Gate(config)
        self.gate_up = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, inner))
        self.shared_experts = MLP(hidden, inner * config["n_shared_experts"])
        self.register_buffer("loads", torch.zeros(count), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.down))
        self.loads += counts
        routed = RoutedProducts.apply(flat, weights.to(x.dtype), self.gate_up.to(x.dtype), self.down.to(x.dtype), order,
                                      counts.tolist())
        return (self.shared_experts(flat) + routed).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: dict, dense: bool):
        super().__init__()
        self.self_attn = LatentAttention(config)
        self.mlp = MLP(config["hidden_size"], config["intermediate_size"]) if dense else Experts(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor,
                picked: torch.Tensor | None = None) -> torch.Tensor:
        y = self.self_attn(self.input_layernorm(x), cosine, sine, picked)
        x = y + (x if picked is None else x.flatten(0, 1).index_select(0, picked))
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedHead(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class PredictionLayer(Layer):
    """The MTP layer: from the last hidden state and the next token, the hidden state that predicts the one after."""

    def __init__(self, config: dict):
        super().__init__(config, dense=False)
        hidden = config["hidden_size"]
        self.enorm = RMSNorm(hidden, config["rms_norm_eps"])
        self.hnorm = RMSNorm(hidden, config["rms_norm_eps"])
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = SharedHead(config)


class Decoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.depth = config["num_hidden_layers"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        layers = [Layer(config, dense=index < config["first_k_dense_replace"]) for index in range(self.depth)]
        self.layers = nn.ModuleList(layers + [PredictionLayer(config)])
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        cosine, sine = rotary_table(
            config["max_position_embeddings"], config["qk_rope_head_dim"], config["rope_parameters"]["rope_theta"])
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype, picked: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden states, of all positions or, as rows, of those flat positions that are `picked`."""
        length = tokens.shape[1]
        x = self.embed_tokens(tokens).to(dtype)
        cosine, sine = self.cosine[:length].to(dtype), self.sine[:length].to(dtype)
        for layer in self.layers[: self.depth - 1]:
            x = layer(x, cosine, sine)
        return self.norm(self.layers[self.depth - 1](x, cosine, sine, picked))

    def ahead(self, tokens: torch.Tensor, hidden: torch.Tensor, picked: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden states of the MTP layer: at position p of `tokens[:, :-1]`, which has seen token p + 1 as well.

        hidden: what `forward` gave, of all positions; picked: flat positions of the shorter text.
        """
        length = tokens.shape[1] - 1
        layer: PredictionLayer = self.layers[self.depth]
        next_token = self.embed_tokens(tokens[:, 1:]).to(hidden.dtype)
        y = layer.eh_proj(torch.cat([layer.enorm(next_token), layer.hnorm(hidden[:, :-1])], dim=-1))
        y = layer(y, self.cosine[:length].to(hidden.dtype), self.sine[:length].to(hidden.dtype), picked)
        return layer.shared_head.norm(y)


class DeepSeekV3(nn.Module):
    """DeepSeek-V3 for causal language modelling with an MTP loss; the head is tied to the embedding."""

    MTP_WEIGHT = 0.3

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 0.02 if "embed" in name else 1.0 / math.sqrt(parameter.shape[-1])
            if name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down")):
                deviation *= 1.0 / math.sqrt(2 * config["num_hidden_layers"])
            nn.init.normal_(parameter, std=deviation)

    def routed(self) -> list[Experts]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Experts)]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)).float()

    def early(self, picked: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the MTP layer predicts the targets of `picked`: flat positions of the shorter text, and which have one.

        The target of position p is token p + 1; the MTP state at p - 1, which has seen token p, predicts it too.
        """
        row, column = picked // length, picked % length
        keep = column > 0
        return (row * (length - 1) + column - 1)[keep], keep

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor,
                dtype: torch.dtype, teacher=None, teacher_share: float = 0.0, ahead: bool = True) -> torch.Tensor:
        """As `Qwen3.forward`, plus, where `ahead`, the loss of the MTP layer on the same targets, each seen one token earlier.

        teacher: logits of another model at `picked`; `teacher_share` of the loss is then the divergence from it.
        """
        hidden = self.model(tokens, dtype, None if ahead else picked)
        here = hidden.flatten(0, 1).index_select(0, picked) if ahead else hidden
        loss = mixed_loss(self.head(here), targets, weights, teacher, teacher_share)
        if ahead:
            where, keep = self.early(picked, tokens.shape[1])
            logits = self.head(self.model.ahead(tokens, hidden, where))
            loss = loss + self.MTP_WEIGHT * mixed_loss(
                logits, targets[keep], weights[keep], None if teacher is None else teacher[keep], teacher_share)
        return loss

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(tokens, torch.float32))

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The weights by the names of DeepSeek's checkpoints, every expert's matrices apart."""
        found = {}
        for name, value in self.state_dict().items():
            if name.endswith("mlp.gate_up"):
                for expert, pair in enumerate(value):
                    gate, up = pair.chunk(2)
                    found[name.replace("gate_up", f"experts.{expert}.gate_proj.weight")] = gate
                    found[name.replace("gate_up", f"experts.{expert}.up_proj.weight")] = up
            elif name.endswith("mlp.down"):
                for expert, matrix in enumerate(value):
                    found[name.replace("mlp.down", f"mlp.experts.{expert}.down_proj.weight")] = matrix
            else:
                found[name] = value
        return found

    def load_checkpoint(self, found: dict[str, torch.Tensor]) -> None:
        """The reverse of `checkpoint`."""
        state = {}
        for name in self.state_dict():
            experts = range(self.config["n_routed_experts"])
            if name.endswith("mlp.gate_up"):
                start = name.removesuffix("gate_up")
                state[name] = torch.stack([torch.cat([
                    found[f"{start}experts.{expert}.gate_proj.weight"], found[f"{start}experts.{expert}.up_proj.weight"]])
                    for expert in experts])
            elif name.endswith("mlp.down"):
                start = name.removesuffix("down")
                state[name] = torch.stack([found[f"{start}experts.{expert}.down_proj.weight"] for expert in experts])
            else:
                state[name] = found[name]
        self.load_state_dict(state)

    def take_loads(self) -> torch.Tensor:
        """How many tokens each expert of each routed layer got since the last call: [layers, experts]."""
        loads = torch.stack([layer.loads for layer in self.routed()])
        for layer in self.routed():
            layer.loads.zero_()
        return loads

    @torch.no_grad()
    def balance(self, loads: torch.Tensor, speed: float) -> None:
        """Raises the bias of experts with less than half the mean load by `speed`, lowers that of those with over twice.

        Between the two loads may differ as the text does: no domain is as frequent as another.
        """
        for layer, load in zip(self.routed(), loads):
            mean = load.mean()
            layer.gate.e_score_correction_bias += speed * ((load < mean / 2).float() - (load > 2 * mean).float())


def mixed_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, teacher: torch.Tensor | None,
               share: float) -> torch.Tensor:
    """The weighted sum of cross-entropies, `share` of it against the teacher's distribution instead of the text's."""
    ours = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(ours, targets, reduction="none")
    if teacher is not None and share > 0:
        theirs = F.log_softmax(teacher, dim=-1)
        loss = loss * (1 - share) + share * (theirs.exp() * (theirs - ours)).sum(-1)
    return (loss * weights).sum()


def build(config: dict) -> nn.Module:
    """The model that `config["model_type"]` names."""
    from model import Qwen3

    return {"qwen3": Qwen3, "deepseek_v3": DeepSeekV3}[config["model_type"]](config)
