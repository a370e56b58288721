"""A Qwen3 decoder written for fast training on small machines.

The parameters carry the names that Hugging Face transformers gives them, so that `state_dict()` is a
checkpoint that `Qwen3ForCausalLM` loads unchanged. `export.py` checks that both give the same logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return F.rms_norm(y, (y.shape[-1],), self.weight, self.epsilon).to(x.dtype)


def rotary_table(length: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of shape [length, head_dim], in the half-split layout that Qwen uses."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(length).float(), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: dict):
        super().__init__()
        self.heads = config["num_attention_heads"]
        self.groups = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        hidden = config["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor,
                picked: torch.Tensor | None = None) -> torch.Tensor:
        """picked: flat positions whose output is wanted, which are then the rows of the result; all without it."""
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.groups, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        repeat = self.heads // self.groups
        if repeat > 1:
            k = k.repeat_interleave(repeat, dim=1)
            v = v.repeat_interleave(repeat, dim=1)
        if length <= 384 and q.device.type == "cpu":
            # For short texts plain products are faster on a processor than the fused kernel, above all backwards.
            hidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
            scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(2, 3)) + hidden
            y = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim)
        return self.o_proj(y if picked is None else y.flatten(0, 1).index_select(0, picked))


class MLP(nn.Module):
    """The SwiGLU feed-forward block."""

    def __init__(self, config: dict):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor,
                picked: torch.Tensor | None = None) -> torch.Tensor:
        y = self.self_attn(self.input_layernorm(x), cosine, sine, picked)
        x = y + (x if picked is None else x.flatten(0, 1).index_select(0, picked))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        cosine, sine = rotary_table(
            config["max_position_embeddings"], config["head_dim"], config["rope_parameters"]["rope_theta"]
        )
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype, picked: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden states, of all positions or, as rows, of those flat positions that are `picked`."""
        length = tokens.shape[1]
        x = self.embed_tokens(tokens).to(dtype)
        cosine, sine = self.cosine[:length].to(dtype), self.sine[:length].to(dtype)
        for layer in self.layers[:-1]:
            x = layer(x, cosine, sine)
        x = self.layers[-1](x, cosine, sine, picked)  # keys and values of all, the rest only where it is asked for
        return self.norm(x)


class Qwen3(nn.Module):
    """Qwen3 for causal language modelling, with the output head tied to the embedding."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.reset()

    def reset(self) -> None:
        """Draws fresh weights: small normals, and residual outputs scaled down by depth."""
        depth = self.config["num_hidden_layers"]
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            deviation = 0.02 if "embed" in name else 1.0 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation *= 1.0 / math.sqrt(2 * depth)
            nn.init.normal_(parameter, std=deviation)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The weighted sum of cross-entropies at the `picked` flat positions of `tokens`.

        tokens: [batch, length]; picked, targets and weights: [count], flat positions, the next tokens there
        and their weights in the loss. Logits are only computed where the loss looks.
        """
        hidden = self.model(tokens, dtype, picked)
        logits = F.linear(hidden, self.model.embed_tokens.weight.to(dtype)).float()
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Float32 logits of every position, for checks."""
        return self.model(tokens, torch.float32) @ self.model.embed_tokens.weight.T

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The weights by the names that transformers gives them."""
        return self.state_dict()

    def load_checkpoint(self, found: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(found)

    def take_loads(self) -> None:
        """There are no experts to count."""
        return None
