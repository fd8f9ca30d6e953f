"""The window beside a mixer in vLLM: its layer, and its keys and values among a linear block's states.

A request's places (``kernels/window_cache.py``) are the last of the states that the block caches. A window beside MLA
has its places among the states of a linear block near it (``mixers/window.py:holders``). On a GPU one Triton kernel
attends for a decoded token (``kernels/window_decode.py``). Torch code attends for prompts.

Legend: T tokens of all requests, H this rank's query heads, G its key heads, K head dim, Y = 2 K, P = K / 2.
"""

import os
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_dtype_size

from hylo_megatron.config.positions import window_rows
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.rope import Angles, turn
from hylo_megatron.kernels.window_cache import ChunkPlan, TokenPlan
from hylo_megatron.kernels.window_decode import TokenKernel, kernel_fault
from hylo_megatron.mixers.serving import stages
from hylo_megatron.mixers.vllm_operators import register, split_at
from hylo_megatron.mixers.window import key_heads, places_of

logger = init_logger("vllm.hylo_megatron")
OP = "hylo_window"
# The variable that chooses what attends for decoded tokens, "triton" or "torch". Where the variable is unset, Triton's
# kernel does on a GPU if it equals the reference.
DECODES = "HYLO_SERVE_WINDOW"


class HyLoWindow(nn.Module):
    """The base model's attention over the last tokens and the first ones; ``gate_proj`` gives each head a factor."""

    def __init__(self, config, vllm_config, mixer: str, holder: str, place: int):
        """``mixer``: name of the mixer beside the window. ``holder``: of the linear block that has its ``place``."""
        super().__init__()
        ranks, quant, prefix = get_tensor_model_parallel_world_size(), vllm_config.quant_config, f"{mixer}.window"
        self.places = places(vllm_config)
        self.layer, self.place, self.window, self.dim = holder, place, config.window, config.head_dim
        heads, groups, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.heads, self.groups = heads // ranks, self.places[1]
        self.qkv_proj = QKVParallelLinear(
            hidden,
            self.dim,
            heads,
            groups,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * self.dim, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        # A row a head is fewer than 8-bit kernels take.
        self.gate_proj = ColumnParallelLinear(hidden, heads, bias=False, prefix=f"{prefix}.gate_proj")
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.base_qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.dim, eps=config.rms_norm_eps) for _ in range(2))
        self.tokens = tokens_of(self.heads, self.groups, self.dim, self.window, vllm_config.model_config.dtype)
        split_at(OP, vllm_config)

    def forward(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        at = angles.window
        q, k, v = self.qkv_proj(hidden_TD)[0].unflatten(-1, (-1, self.dim)).split([self.heads, *[self.groups] * 2], 1)
        q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        kv_TGY = torch.cat([turn(k, at.cos, at.sin), v], -1)
        near, far = turn(q, at.cos, at.sin), turn(q, at.far_cos, at.far_sin)
        out_THK = torch.zeros_like(near)
        getattr(torch.ops.vllm, OP)(near, far, kv_TGY, at.positions, out_THK, self.layer, self.place)
        gate_TH = 2 * self.gate_proj(hidden_TD)[0].float().sigmoid().to(out_THK.dtype)
        return self.o_proj((out_THK * gate_TH.unsqueeze(-1)).flatten(1))[0]

    def plans(self, at_T: Tensor, batch: "Batch", dtype: torch.dtype, owner: tuple[str, int]) -> "Plans":
        kinds, parts, first = dict(shared=self.heads // self.groups, dtype=dtype), [], len(batch.token_slots)
        if first:
            parts.append((slice(first), self.tokens.of(at_T[:first], batch.token_slots, self.window, **kinds)))
        if batch.chunk_tokens:
            here = slice(first, first + batch.chunk_tokens)
            plan = ChunkPlan.of(at_T[here], batch.chunk_starts, batch.chunk_slots, self.window, **kinds)
            parts.append((here, plan))
        return Plans(owner=owner, parts=parts)

    def measure(self, near: Tensor, far: Tensor, kv: Tensor) -> None:
        """Take the memory that a prompt of all tokens takes, where vLLM measures its memory."""
        zero, tokens = torch.zeros(1, dtype=torch.int64, device=kv.device), len(kv)
        batch = Batch(zero[:0], tokens, torch.tensor([0, tokens], device=kv.device), zero)
        plans = self.plans(torch.arange(tokens, device=kv.device), batch, near.dtype, (self.layer, self.place))
        plans.attend(near, far, kv, kv.new_zeros(1, *self.places[1:]), torch.empty_like(near))


class Positions(NamedTuple):
    """Positions of tokens, and cosines and sines ``[T, 1, P]`` there and where queries meet the sinks."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    far_cos: Tensor
    far_sin: Tensor


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Plans of one pass for the windows of a cache group, made for the first of them, their ``owner``."""

    owner: tuple[str, int]
    parts: list[tuple[slice, TokenPlan | TokenKernel | ChunkPlan]]

    def attend(self, near: Tensor, far: Tensor, kv: Tensor, cache: Tensor, out: Tensor) -> None:
        """Fill ``out`` for all tokens that are no padding."""
        for tokens, plan in self.parts:
            given = near[tokens], far[tokens], kv[tokens], cache
            if isinstance(plan, TokenKernel):
                plan.fill(*given, out[tokens])
            else:
                out[tokens] = plan.attend(*given)


class Batch(NamedTuple):
    """The slots of a pass, out of vLLM's metadata: those of requests with one token, then those of chunks."""

    token_slots: Tensor
    chunk_tokens: int
    chunk_starts: Tensor | None = None
    chunk_slots: Tensor | None = None

    @classmethod
    def of(cls, metadata) -> "Batch":
        if hasattr(metadata, "state_indices_tensor_d"):  # Mamba-2
            tokens = metadata.state_indices_tensor_d
            tokens = tokens if tokens.dim() == 1 else tokens[:, 0]
            if not metadata.num_prefills:
                return cls(tokens, 0)
            chunks = metadata.query_start_loc_p, metadata.state_indices_tensor_p
            return cls(tokens[: metadata.num_decodes], metadata.num_prefill_tokens, *chunks)
        slots, first, chunks = metadata.non_spec_state_indices_tensor, metadata.num_decodes, metadata.num_prefills
        if not chunks:
            return cls(slots[: metadata.num_actual_tokens], 0)  # with the padding of a CUDA graph
        starts = metadata.non_spec_query_start_loc[first : first + chunks + 1] - metadata.num_decode_tokens
        return cls(slots[:first], metadata.num_prefill_tokens, starts, slots[first : first + chunks])


def tokens_of(heads: int, groups: int, dim: int, window: dict, dtype: torch.dtype) -> type[TokenPlan | TokenKernel]:
    """Return what attends for decoded tokens. Raises ``HyLoError`` if a kernel that was asked for is wrong."""
    asked, on_gpu = os.environ.get(DECODES), current_platform.is_cuda_alike()
    if asked not in (None, "triton", "torch"):
        raise HyLoError(f"{DECODES} is {asked!r}: expected triton or torch, or leave it unset")
    if asked == "torch" or not (asked or on_gpu):
        return TokenPlan
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    fault = kernel_fault(heads, groups, dim, window["size"], window["sinks"], dtype, device)
    if fault and asked:
        raise HyLoError(f"{DECODES} is triton: {fault}; leave it unset for torch code")
    if fault:
        logger.warning_once("HyLo: torch code attends within the windows of decoded tokens: %s.", fault)
        return TokenPlan
    logger.info_once("HyLo: one Triton kernel attends within the window of decoded tokens.")
    return TokenKernel


def places(vllm_config) -> tuple[int, int, int, int]:
    """Return the shape of a request's places in a linear block on one rank: windows, key heads, rows, values."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    windows = places_of(config.mixers, config.window, stages(vllm_config))
    return windows, key_heads(config.num_key_value_heads, ranks), window_rows(config.window), 2 * config.head_dim


def add_window(mixer: nn.Module, window: HyLoWindow) -> None:
    """Put a window beside a mixer. A linear block's window also says how large the block's states are."""
    mixer.has_window, mixer.window = True, window


class WithWindow:
    """Part of a linear block of vLLM that may have a window, whose places are the last of the block's states."""

    has_window = False

    def get_kv_cache_spec(self, vllm_config):
        spec = super().get_kv_cache_spec(vllm_config)
        if not self.has_window:
            return spec
        shapes, dtypes = (*spec.shapes, self.window.places), (*spec.dtypes, spec.dtypes[0])
        # Mamba-2 of vLLM 0.32 copies its own two states, and no places, at a prompt's last boundary inside a pass.
        inside = {"num_prefill_checkpoint_blocks": 0, "prefill_checkpoint_alignment": None}
        return replace(spec, shapes=shapes, dtypes=dtypes, **{k: v for k, v in inside.items() if hasattr(spec, k)})

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Find the states in raw pages. vLLM 0.26 makes states of the specification itself."""
        super().bind_kv_cache(kv_cache)
        if self.has_window:
            kinds = tuple(self.get_state_dtype())
            before = zip(self.get_state_shape(), kinds, strict=True)
            first = sum(prod(shape) * get_dtype_size(dtype) for shape, dtype in before)
            size = prod(self.window.places) * get_dtype_size(kinds[0])
            pages = kv_cache.squeeze(dim=(1, 2))[:, first : first + size]
            self.kv_cache = (*self.kv_cache, pages.view(kinds[0]).view(-1, *self.window.places))


def _run(near: Tensor, far: Tensor, kv: Tensor, positions: Tensor, out: Tensor, layer: str, place: int) -> None:
    context = get_forward_context()
    block, metadata = context.no_compile_layers[layer], context.attn_metadata
    metadata = None if metadata is None else metadata.get(layer)
    if metadata is None:
        block.window.measure(near, far, kv)
        return
    plans = getattr(metadata, "hylo_window", None)
    if plans is None or plans.owner == (layer, place):  # a CUDA graph's capture may serve several passes with it
        plans = block.window.plans(positions, Batch.of(metadata), near.dtype, (layer, place))
        metadata.hylo_window = plans
    plans.attend(near, far, kv, block.kv_cache[-1][:, place], out)


register(OP, _run, "out")
