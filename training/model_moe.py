"""A DeepSeek-V3 decoder written for fast training on small machines: latent attention, routed experts, one MTP layer.

The parameters carry the names of DeepSeek's own checkpoints, so `state_dict()` loads into transformers'
`DeepseekV3ForCausalLM` unchanged; the layer after the last is the multi-token prediction layer, which shares the
embedding and the head. Architecture: DeepSeek-V3 technical report, arXiv 2412.19437.
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

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
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
        hidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + hidden
        y = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype), v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, self.heads * self.value))


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


class Experts(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(hidden, inner) for _ in range(config["n_routed_experts"]))
        self.shared_experts = MLP(hidden, inner * config["n_shared_experts"])
        self.register_buffer("loads", torch.zeros(config["n_routed_experts"]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat)
        weights = weights.to(x.dtype).flatten()
        # Tokens in the order of their experts, so that every expert sees one slice.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        self.loads += counts
        rows = order // chosen.shape[1]
        parts = flat.index_select(0, rows).split(counts.tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
        done = done * weights.index_select(0, order).unsqueeze(1)
        return (self.shared_experts(flat) + torch.zeros_like(flat).index_add(0, rows, done.to(flat.dtype))).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: dict, dense: bool):
        super().__init__()
        self.self_attn = LatentAttention(config)
        self.mlp = MLP(config["hidden_size"], config["intermediate_size"]) if dense else Experts(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
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

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states that predict the next token, and those that predict the one after it (shorter by one)."""
        length = tokens.shape[1]
        embedded = self.embed_tokens(tokens).to(dtype)
        x, cosine, sine = embedded, self.cosine[:length].to(dtype), self.sine[:length].to(dtype)
        for layer in self.layers[: self.depth]:
            x = layer(x, cosine, sine)
        x = self.norm(x)
        after: PredictionLayer = self.layers[self.depth]
        y = after.eh_proj(torch.cat([after.enorm(embedded[:, 1:]), after.hnorm(x[:, :-1])], dim=-1))
        y = after.shared_head.norm(after(y, cosine[:-1], sine[:-1]))
        return x, y


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
            deviation = 0.02 if "embed" in name else 1.0 / math.sqrt(parameter.shape[1])
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation *= 1.0 / math.sqrt(2 * config["num_hidden_layers"])
            nn.init.normal_(parameter, std=deviation)

    def routed(self) -> list[Experts]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, Experts)]

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, picked: torch.Tensor,
                dtype: torch.dtype) -> torch.Tensor:
        """As `Qwen3.forward`, plus the loss of the MTP layer on the same targets, each seen one token earlier."""
        batch, length = tokens.shape
        hidden, early = self.model(tokens, dtype)
        head = self.model.embed_tokens.weight.to(dtype)
        logits = F.linear(hidden.flatten(0, 1).index_select(0, picked), head).float()
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        # The target of position p is token p + 1; the MTP state at p - 1, which has seen token p, predicts it too.
        row, column = picked // length, picked % length
        keep = column > 0
        logits = F.linear(early.flatten(0, 1).index_select(0, (row * (length - 1) + column - 1)[keep]), head).float()
        return loss + self.MTP_WEIGHT * (
            F.cross_entropy(logits, targets[keep], reduction="none") * weights[keep]).sum()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, torch.float32)[0] @ self.model.embed_tokens.weight.T

    def take_loads(self) -> torch.Tensor:
        """How many tokens each expert of each routed layer got since the last call: [layers, experts]."""
        loads = torch.stack([layer.loads for layer in self.routed()])
        for layer in self.routed():
            layer.loads.zero_()
        return loads

    @torch.no_grad()
    def balance(self, loads: torch.Tensor, speed: float) -> None:
        """Raises the bias of experts with less than the mean load by `speed`, lowers that of the others."""
        for layer, load in zip(self.routed(), loads):
            layer.gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def build(config: dict) -> nn.Module:
    """The model that `config["model_type"]` names."""
    from model import Qwen3

    return {"qwen3": Qwen3, "deepseek_v3": DeepSeekV3}[config["model_type"]](config)
