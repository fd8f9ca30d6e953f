"""The base model, one layer at a time: weights and activations of each attention layer on calibration text.

This is plain torch on any device. Only one layer's weights are in memory, so an 8B model fits a small machine.
Legend: B batch, S sequence, D model, H query heads, G key-value heads, K head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.checkpoint.folder import CheckpointReader
from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import Window
from hylo_megatron.convert.tables import mappings
from hylo_megatron.kernels.norm import rms_norm
from hylo_megatron.kernels.rope import cos_and_sin, rope_frequencies, turn
from hylo_megatron.kernels.window import far_positions, sequence_attention

VOCABULARY_ROWS = 16384


@dataclass
class AttentionLayer:
    """One attention layer and its activations. ``layer[name]``: a weight in fp32, or None where there is none."""

    index: int
    weights: dict[str, Tensor]
    inputs_BSD: Tensor  # after the input norm
    heads_BSHK: Tensor  # before the output projection
    output_BSD: Tensor
    update_norm: float  # mean over tokens of |layer output - layer input|, attention and MLP together

    def __getitem__(self, name: str) -> Tensor | None:
        return self.weights.get(name)

    @property
    def fitted_rows(self) -> int:
        """How many rows of the calibration text are fitted; errors are measured on the others."""
        return max(1, len(self.inputs_BSD) * 3 // 4)

    def first(self, rows: int) -> "AttentionLayer":
        """Return the layer with the activations of its first ``rows`` rows of text."""
        names = ("inputs_BSD", "heads_BSHK", "output_BSD")
        return replace(self, **{name: getattr(self, name)[:rows] for name in names})


class BaseModel:
    """A converted checkpoint under Hugging Face names."""

    def __init__(self, checkpoint, device: torch.device):
        self.arch, self.reader, self.device = Architecture.load(checkpoint), CheckpointReader(checkpoint), device
        self.by_key = {key: (mapping, i) for mapping in mappings(self.arch) for i, key in enumerate(mapping.hf)}
        self.frequencies, self.scaling = rope_frequencies(
            self.arch.rope_parameters, self.arch.head_dim, self.arch.max_position_embeddings
        )

    def stored(self, key: str) -> Tensor:
        """Return a tensor in the checkpoint's dtype, on the CPU."""
        mapping, index = self.by_key[key]
        return mapping.to_hf([self.reader[name] for name in mapping.megatron])[index]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor in fp32 on this model's device."""
        return self.stored(key).to(self.device, torch.float32)

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer}."
        return {key.removeprefix(prefix): self.tensor(key) for key in self.by_key if key.startswith(prefix)}

    def attention(self, x_BSD: Tensor, w: dict[str, Tensor], window: Window | None = None) -> Tensor:
        """Return the heads' outputs ``[B, S, H, K]``, of complete attention or within a window."""
        a = self.arch

        def project(name, heads):
            out = F.linear(x_BSD, w[f"self_attn.{name}_proj.weight"], w.get(f"self_attn.{name}_proj.bias"))
            return out.unflatten(-1, (heads, a.head_dim))

        q = project("q", a.num_attention_heads)
        k, v = project("k", a.num_key_value_heads), project("v", a.num_key_value_heads)
        if a.qk_norm:
            q = rms_norm(q, w["self_attn.q_norm.weight"], a.rms_norm_eps)
            k = rms_norm(k, w["self_attn.k_norm.weight"], a.rms_norm_eps)
        positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        near, k = self._turned(q, positions), self._turned(k, positions)
        if window:
            return sequence_attention(near, self._turned(q, far_positions(positions, window)), k, v, window)
        out = F.scaled_dot_product_attention(
            near.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _turned(self, x_BSHK: Tensor, positions_S: Tensor) -> Tensor:
        cos_SP, sin_SP = cos_and_sin(positions_S, self.frequencies.to(x_BSHK.device), self.scaling)
        return turn(x_BSHK, cos_SP[:, None], sin_SP[:, None])

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return F.embedding(tokens_BS.cpu(), self.stored("model.embed_tokens.weight")).to(self.device, torch.float32)

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Return logits in fp32; only a part of the head is in fp32 at a time."""
        head = self.stored("model.embed_tokens.weight" if self.arch.tie_word_embeddings else "lm_head.weight")
        normed = rms_norm(x_BSD, self.tensor("model.norm.weight"), self.arch.rms_norm_eps)
        return torch.cat([F.linear(normed, rows.to(normed)) for rows in head.split(VOCABULARY_ROWS)], -1)

    def layer(self, index: int, x_BSD: Tensor) -> tuple[AttentionLayer, Tensor]:
        """Return layer ``index`` with its activations, and its output."""
        w, eps = self.layer_weights(index), self.arch.rms_norm_eps
        normed = rms_norm(x_BSD, w["input_layernorm.weight"], eps)
        heads = torch.cat([self.attention(row[None], w) for row in normed])
        output = F.linear(heads.flatten(2), w["self_attn.o_proj.weight"])
        after = x_BSD + output
        h = rms_norm(after, w["post_attention_layernorm.weight"], eps)
        gate, up = F.linear(h, w["mlp.gate_proj.weight"]), F.linear(h, w["mlp.up_proj.weight"])
        after = after + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])
        update = (after - x_BSD).norm(dim=-1).mean().item()
        return AttentionLayer(index, w, normed, heads, output, update), after

    @torch.no_grad()
    def layers(self, tokens_BS: Tensor | None) -> Iterator[AttentionLayer]:
        """Run the model on ``tokens_BS`` and yield each attention layer; without tokens, with weights only."""
        empty = torch.empty(0)
        x_BSD = None if tokens_BS is None else self.embed(tokens_BS)
        for index in range(self.arch.num_layers):
            if x_BSD is None:
                yield AttentionLayer(index, self.layer_weights(index), empty, empty, empty, 0.0)
                continue
            layer, x_BSD = self.layer(index, x_BSD)
            yield layer
