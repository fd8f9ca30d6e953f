"""The rate of matrix products of a device, which utilisation is a share of."""

from __future__ import annotations

import time

import torch

from hylo_megatron.planner.flops import RATES


def measured_rate(device: torch.device) -> float:
    """Measure FLOP/s of one large bf16 product; on a CPU the product is small."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 512
    a, times = torch.randn(n, n, device=device, dtype=torch.bfloat16), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    del a
    if on_gpu:
        torch.cuda.empty_cache()
    return 2 * n**3 / min(times)


def product_rate(device: torch.device) -> float:
    """Return the rate of a GPU: that of a card that ``RATES`` names, otherwise measured."""
    return RATES.get(torch.cuda.get_device_name(device)) or measured_rate(device)
