"""First weights with structure, so that training need not discover how to copy.

What a small transformer learns last is to look something up in its prompt: that takes a head that moves each token's
content one place on and, a layer later, a head that compares it with the token at hand (an induction head; Olsson et
al., 2022). Here both are written into the first weights, as starts that training is free to change, in the spirit of
mimetic initialisation (Trockman and Kolter, 2023). Spellings go into them too: the forms of a word, with and without a
space or a capital, begin with the same content. A model with a third group of heads also begins with the lookup that
lettered options need: what is said is found among the options, and the letter before it is brought back. Of the corpus'
sentences and facts nothing goes in.

Layout of the residual stream: dimensions for content, for the form of a token, a few that are the same for every token
(from them, heads that look at a fixed distance make their queries), and free ones.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

FORM, CONSTANT, PREVIOUS = 16, 4, 64
LETTERS = "ABCD"


def layout(hidden: int) -> tuple[slice, slice, slice, slice]:
    content = hidden * 5 // 8
    at = [content, content + FORM, content + FORM + CONSTANT]
    return slice(0, content), slice(at[0], at[1]), slice(at[1], at[2]), slice(at[2], at[2] + PREVIOUS)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random rows of unit length at right angles to each other: [rows, columns], rows <= columns."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T


def embedding(table: torch.Tensor, tokenizer: Tokenizer, generator: torch.Generator) -> None:
    """Fills the embedding [entries, hidden]: root mean square about 1, forms of a word alike."""
    content, form, constant, _ = layout(table.shape[1])
    table.normal_(std=0.1, generator=generator)
    base: dict[str, torch.Tensor] = {}
    forms = {(space, capital): torch.randn(FORM, generator=generator) for space in (0, 1) for capital in (0, 1)}
    other = torch.randn(FORM, generator=generator)
    words = sorted((number, text) for text, number in tokenizer.get_vocab().items())
    for number, text in words:
        bare = text.removeprefix("\u0120")
        isword = bare.isalpha() and bare.isascii()
        key = bare.lower() if isword else text
        if key not in base:
            base[key] = 1.2 * torch.randn(content.stop, generator=generator)
        table[number, content] = base[key] + 0.15 * torch.randn(content.stop, generator=generator)
        kind = forms[int(text != bare), int(bare[:1].isupper())] if isword else other
        table[number, form] = 1.3 * kind + 0.5 * torch.randn(FORM, generator=generator)
    table[:, constant] = 1.0


def letters(table: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Directions that tell the letters of options, in both forms, from all other entries: [letters, hidden].

    A ridge regression over the embedding, in which the few letters weigh as much as the many others.
    """
    wanted = torch.zeros(len(table), len(LETTERS))
    weights = torch.ones(len(table), 1)
    for index, letter in enumerate(LETTERS):
        for form in (letter, "\u0120" + letter):
            wanted[tokenizer.token_to_id(form), index] = 1
            weights[tokenizer.token_to_id(form)] = 30
    x = torch.nn.functional.rms_norm(table, table.shape[1:]) * weights
    return torch.linalg.solve(x.T @ x + 3 * torch.eye(table.shape[1]), x.T @ (wanted * weights)).T


@torch.no_grad()
def initialise(model: torch.nn.Module, tokenizer: Tokenizer, seed: int) -> None:
    """Writes the structure over a model that `reset` has filled."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    hidden, dim = config["hidden_size"], config["head_dim"]
    theta = config["rope_parameters"]["rope_theta"]
    content, _, constant, previous = layout(hidden)
    embedding(model.model.embed_tokens.weight, tokenizer, generator)
    model.model.norm.weight.fill_(0.07)
    half = dim // 2
    speeds = theta ** (-torch.arange(half).float() / half)

    # Layer 0: heads 0 and 1 look one and two places back, whatever stands there; head 0 writes the content it finds
    # there into dimensions of its own.
    attention = model.model.layers[0].self_attn
    fast = torch.zeros(half)
    fast[:4] = torch.tensor([3.0, 2.5, 2.0, 1.5])
    key = torch.cat([fast, torch.zeros(half)])
    attention.k_proj.weight[:dim] *= 0.1
    attention.k_proj.weight[:dim, constant] = key[:, None] / CONSTANT * 2
    for head, distance in ((0, 1), (1, 2)):
        query = torch.cat([fast * torch.cos(-speeds * distance), fast * torch.sin(-speeds * distance)])
        rows = slice(head * dim, (head + 1) * dim)
        attention.q_proj.weight[rows] *= 0.1
        attention.q_proj.weight[rows, constant] = query[:, None] / CONSTANT * 2
    if attention.groups > 2:
        # The third group looks two and four places back, past ") " and one or two pieces, and notes the letter there.
        group, codes = slice(2 * dim, 3 * dim), slice(previous.stop, previous.stop + len(LETTERS))
        repeat = attention.heads // attention.groups
        attention.k_proj.weight[group] *= 0.1
        attention.k_proj.weight[group, constant] = key[:, None] / CONSTANT * 2
        attention.v_proj.weight[group] *= 0.1
        found = letters(model.model.embed_tokens.weight, tokenizer)
        attention.v_proj.weight[group][: len(LETTERS)] = found
        for head, distance in ((2 * repeat, 2), (2 * repeat + 1, 4)):
            query = torch.cat([fast * torch.cos(-speeds * distance), fast * torch.sin(-speeds * distance)])
            rows = slice(head * dim, (head + 1) * dim)
            attention.q_proj.weight[rows] *= 0.1
            attention.q_proj.weight[rows, constant] = query[:, None] / CONSTANT * 2
            attention.o_proj.weight[:, rows] *= 0.1
            attention.o_proj.weight[codes, rows][:, : len(LETTERS)] += 4 * torch.eye(len(LETTERS))
    attention.q_norm.weight.fill_(1.8)
    attention.k_norm.weight.fill_(1.8)
    moved = orthonormal(PREVIOUS, content.stop, generator)
    attention.v_proj.weight[:dim] *= 0.1
    attention.v_proj.weight[:dim, content] = moved
    attention.o_proj.weight[:, :dim] *= 0.1
    attention.o_proj.weight[previous, :dim] += torch.eye(PREVIOUS, dim)

    # Layer 1: the first head of every group compares the token at hand with what stood before each token, in the
    # slowly turning dimensions, and copies the content of the token that it finds.
    attention = model.model.layers[1].self_attn
    slow = [i for i in range(half) if speeds[i] < 0.006]
    places = torch.tensor(slow + [half + i for i in slow])
    groups, repeat = attention.groups, attention.heads // attention.groups
    copied = orthonormal(min(2 * dim, content.stop), content.stop, generator)
    if groups > 2:
        # Its third group finds the token at hand elsewhere, not where it stands, and writes the letter that was noted.
        mix = orthonormal(len(places), content.stop, generator)
        away = torch.zeros(dim)
        away[:6] = 5.0 / 6 ** 0.5
        rows, queries = slice(2 * dim, 3 * dim), slice(2 * repeat * dim, (2 * repeat + 1) * dim)
        attention.k_proj.weight[rows] *= 0.1
        attention.q_proj.weight[queries] *= 0.1
        attention.k_proj.weight[rows, content][places] = mix
        attention.q_proj.weight[queries, content][places] = mix
        attention.k_proj.weight[rows, constant] += away[:, None] / CONSTANT
        attention.q_proj.weight[queries, constant] -= away[:, None] / CONSTANT
        attention.v_proj.weight[rows] *= 0.1
        attention.v_proj.weight[rows, codes][: len(LETTERS)] = torch.eye(len(LETTERS)) / 4
        attention.o_proj.weight[:, queries] *= 0.1
        for index, letter in enumerate(LETTERS):
            table = model.model.embed_tokens.weight
            direction = table[tokenizer.token_to_id(letter)] + table[tokenizer.token_to_id("\u0120" + letter)]
            attention.o_proj.weight[:, queries.start + index] = 10 * direction / direction.norm()
    for group in range(min(groups, 2)):
        mix = orthonormal(len(places), PREVIOUS, generator) if len(places) <= PREVIOUS else \
            orthonormal(PREVIOUS, len(places), generator).T
        rows = slice(group * dim, (group + 1) * dim)
        head = group * repeat
        queries = slice(head * dim, (head + 1) * dim)
        attention.k_proj.weight[rows] *= 0.1
        attention.q_proj.weight[queries] *= 0.1
        k, q = torch.zeros(dim, hidden), torch.zeros(dim, hidden)
        k[places[:, None], torch.arange(previous.start, previous.stop)[None]] = mix
        q[places, content] = mix @ moved
        attention.k_proj.weight[rows] += k
        attention.q_proj.weight[queries] += q
        part = copied[rows]
        attention.v_proj.weight[rows] *= 0.1
        attention.v_proj.weight[rows, content][: len(part)] += part
        attention.o_proj.weight[content, queries] *= 0.1
        attention.o_proj.weight[content, queries][:, : len(part)] += 1.5 * part.T
    attention.q_norm.weight.fill_(1.8)
    attention.k_norm.weight.fill_(1.8)
