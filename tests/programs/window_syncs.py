"""The plans of a window on a GPU that only seems to be there, where whatever waits for a value of a tensor fails.

A process of its own: on a machine without a GPU, ``engine/cpu.py`` makes on the CPU what asks for a GPU.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hylo_megatron.kernels.window_cache import ChunkPlan, TokenPlan


def main() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        q, kv = torch.empty(3, 6, 8), torch.empty(3, 2, 16)
        at, slots, cache = torch.arange(3), torch.arange(3), torch.empty(6, 2, 5, 16)
        window, kinds = {"size": 4, "sinks": 1}, dict(shared=3, dtype=q.dtype)
        plans = TokenPlan.of(at, slots, window, **kinds), ChunkPlan.of(at, slots, slots[:2], window, **kinds)
        assert all(plan.attend(q, q, kv, cache).device.type == "cuda" for plan in plans)


if __name__ == "__main__":
    main()
