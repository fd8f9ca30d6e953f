"""The choice between ``window_cache.TokenPlan`` and one Triton kernel, which attend alike for decoded tokens.

Legend: R requests, H query heads, G key heads, K head dim, Y = 2 K, C places, M places of a cache's slots.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hylo_megatron import packages
from hylo_megatron.kernels.window_cache import TokenPlan

TOLERANCE = 0.02  # ‖kernel - reference‖ / ‖reference‖, as in self_test.py


@dataclass(frozen=True, kw_only=True)
class TokenKernel:
    """A ``TokenPlan`` without tensors of its own. Slots below 1 are padding, whose output stays as it is."""

    at_R: Tensor
    slot_R: Tensor
    window: dict

    @classmethod
    def of(cls, at_R: Tensor, slot_R: Tensor, window: dict, **_) -> "TokenKernel":
        return cls(at_R=at_R, slot_R=slot_R, window=window)

    def fill(self, q_RHK: Tensor, far_RHK: Tensor, kv_RGY: Tensor, cache_MGCY: Tensor, out_RHK: Tensor) -> None:
        from hylo_megatron.kernels.triton_window import decode

        decode(q_RHK, far_RHK, kv_RGY, cache_MGCY, self.at_R, self.slot_R, self.window, out_RHK)

    def attend(self, q_RHK: Tensor, far_RHK: Tensor, kv_RGY: Tensor, cache_MGCY: Tensor) -> Tensor:
        out_RHK = torch.zeros_like(q_RHK)
        self.fill(q_RHK, far_RHK, kv_RGY, cache_MGCY, out_RHK)
        return out_RHK


@functools.lru_cache
@torch.no_grad()
def kernel_fault(
    heads: int, groups: int, dim: int, size: int, sinks: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Return why the kernel must not decode windows of these sizes on ``device``, and nothing if it may.

    The kernel decodes requests of different lengths, from slots that are NaN wherever a request has no token, and
    two slots of padding. Its outputs are compared with those of ``TokenPlan`` in fp32, and its cache bit by bit.
    """
    if not packages.has("triton"):
        return "triton is not installed"

    def random(*shape: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)

    positions = [0, sinks, size // 2, size + sinks - 1, size + sinks, 3 * size + sinks + 1]
    requests, padding = len(positions), 2
    at = torch.tensor(positions + [5] * padding, device=device)
    slots = torch.tensor([*range(1, requests + 1), 0, -1], dtype=torch.int32, device=device)
    window, kinds = {"size": size, "sinks": sinks}, dict(shared=heads // groups, dtype=torch.float32)
    plan = TokenPlan.of(at, slots, window, **kinds)
    cache = torch.full((requests + 1, groups, size + sinks, 2 * dim), torch.nan, device=device, dtype=dtype)
    group = torch.arange(groups, device=device)[:, None]
    filled = random(len(at), groups, plan.row_RC.shape[1], 2 * dim)
    cache[plan.slot_R[:, None, None], group, plan.row_RC[:, None]] = filled
    near, kv = random(len(at), heads, dim), random(len(at), groups, 2 * dim)
    far = near.roll(1, 0)
    wanted = cache.to(torch.float32, copy=True)
    want = plan.attend(near.float(), far.float(), kv.float(), wanted)
    try:
        got = TokenKernel.of(at, slots, window).attend(near, far, kv, cache)
        written = cache[1:].float().nan_to_num()
    except Exception as error:  # noqa: BLE001
        line = (str(error).strip() or "no message").splitlines()[0]
        return f"Triton's kernel does not run here ({type(error).__name__}: {line})"
    if got[requests:].any():
        return "Triton's kernel writes to tokens that are padding"
    if not torch.equal(written, wanted[1:].nan_to_num()):
        return "Triton's kernel writes other keys and values into the cache than the reference"
    error = ((got[:requests].float() - want[:requests]).norm() / want[:requests].norm()).item()
    if not error < TOLERANCE:  # nan counts as wrong
        return f"Triton's kernel disagrees with the reference (relative error {error:.2g}, allowed {TOLERANCE})"
    return ""
