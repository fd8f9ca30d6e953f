"""Kimi Delta Attention's kernels on a GPU against the torch references in fp32, and their time beside GDN's.

``PYTHONPATH=.:tests python tests/programs/kda_gpu.py`` prints a line for each case and fails above ``TOLERANCE``.
Cases: gradients of whole sequences with states in and out, as state passing needs them; V = 2 K as state passing has
it; one token from a state; both norms; the start-up check of the native geometries.
"""

import json
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from hylo_megatron.config import geometry_preset
from hylo_megatron.kernels import ops
from hylo_megatron.kernels.choose import TORCH
from hylo_megatron.kernels.self_test import TOLERANCE, self_test

SHAPES = [(18, 64), (36, 128), (4, 96)]  # heads, head dim: native SmolLM2-135M's and Llama-3.2-3B's, and another
FUSED = ops("cuda")


def inputs(length: int, heads: int, dim: int, width: int, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """q, k, raw decay, v, beta, A_log, dt_bias, state."""
    torch.manual_seed(0)
    q, k, raw = (torch.randn(2, length, heads, dim, device="cuda").to(dtype) for _ in range(3))
    v, beta = (
        torch.randn(2, length, heads, width, device="cuda").to(dtype),
        torch.rand(2, length, heads, device="cuda"),
    )
    decay = [torch.linspace(-1, 1, heads, device="cuda"), torch.linspace(-6, 2, heads * dim, device="cuda")]
    return [q, k, raw, v, beta.to(dtype), *decay, torch.randn(2, heads, dim, width, device="cuda") * 0.1]


def whole(kernels, q, k, raw, v, beta, rate, bias, state):
    return kernels.chunk_kda(q, k, v, g=raw, beta=beta, A_log=rate, dt_bias=bias, initial_state=state,
                             output_final_state=True, use_qk_l2norm_in_kernel=True)  # fmt: skip


def step(kernels, q, k, raw, v, beta, rate, bias, state):
    return kernels.step_kda(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g=raw, beta=beta, A_log=rate,
                            dt_bias=bias, initial_state=state, output_final_state=True)  # fmt: skip


def norm(kernels, x, gate, weight):
    return (kernels.gated_rms_norm(x, gate, weight, 1e-5, activation="sigmoid"),)


def errors(run, given: list[torch.Tensor], gradients: bool = True) -> list[float]:
    """Relative errors of outputs and gradients."""
    found = []
    for kernels, wide in ((FUSED, False), (TORCH, True)):
        leaves = [x.float() if wide else x.clone() for x in given]
        leaves = [x.requires_grad_(gradients) for x in leaves]
        outs = run(kernels, *leaves)
        torch.manual_seed(1)
        mixed = sum((out.float() * torch.randn(out.shape, device="cuda")).sum() for out in outs)
        found.append([*outs, *(torch.autograd.grad(mixed, leaves) if gradients else ())])
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(*found, strict=True)]


def seconds(run, *given) -> float:
    """Forward and backward, the best of five."""
    best = float("inf")
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(*given).float().sum().backward()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def timing(heads: int, dim: int, length: int = 8192) -> dict[str, float]:
    """Milliseconds of one sequence, beside Gated DeltaNet's with half the key heads."""
    q, k, raw, v, beta, rate, bias, _ = (x[:1].contiguous() if x.dim() > 2 else x
                                         for x in inputs(length, heads, dim, dim))  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, raw, v, beta, rate, bias)]

    def kda(q, k, raw, v, beta, rate, bias):
        decay = dict(g=raw, A_log=rate, dt_bias=bias)
        return FUSED.chunk_kda(q, k, v, beta=beta, use_qk_l2norm_in_kernel=True, **decay)[0]

    def gdn(q, k, raw, v, beta, rate, bias):
        q, k, decay = q[:, :, ::2].contiguous(), k[:, :, ::2].contiguous(), F.logsigmoid(raw[..., 0].float())
        return FUSED.chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return {name: 1e3 * seconds(run, *leaves) for name, run in (("kda", kda), ("gdn", gdn))}


def main() -> None:
    print(torch.cuda.get_device_name(), FUSED.name, flush=True)
    cases = {}
    for heads, dim in SHAPES:
        for name, length, width in (("whole", 1000, dim), ("wide", 512, 2 * dim)):
            cases[f"{name} {heads}x{dim}"] = errors(whole, inputs(length, heads, dim, width))
        cases[f"step {heads}x{dim}"] = errors(step, inputs(1, heads, dim, dim), gradients=False)
        x, gate, *_ = inputs(300, heads, dim, dim)
        weight = torch.rand(dim, device="cuda").bfloat16()
        cases[f"norm {heads}x{dim}"] = errors(norm, [x, gate, weight])
        with torch.no_grad():
            cases[f"norm, inference {heads}x{dim}"] = errors(norm, [x, gate, weight], gradients=False)
    for name, found in cases.items():
        print(f"{name}: {max(found):.1e} of {', '.join(f'{e:.1e}' for e in found)}", flush=True)
    for base in ((576, 9, 64), (3072, 24, 128)):
        arch = SimpleNamespace(geometry=geometry_preset("native", *base), hidden_size=base[0], plan=("kda",))
        print(self_test(arch), flush=True)
    print(json.dumps({f"{heads}x{dim}": timing(heads, dim) for heads, dim in SHAPES}), flush=True)
    wrong = {name: found for name, found in cases.items() if not all(e < TOLERANCE for e in found)}
    assert not wrong, wrong


if __name__ == "__main__":
    main()
