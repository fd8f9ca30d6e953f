"""fla's one kernel in tilelang, compiled by a process of its own while a training starts.

On Hopper fla computes gradients of the gated delta rule by a kernel that tilelang compiles on one core, for 20 s on a
new machine. This process does so while the training imports Megatron and Triton compiles, and leaves the kernel in
tilelang's cache folder, where the training finds it. Without this process the training compiles the kernel itself.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable

from hylo_megatron.config import Architecture
from hylo_megatron.engine import compile_ahead
from hylo_megatron.packages import has
from hylo_megatron.parent import bind_child


class Compiled(Exception):
    """The kernel is in the cache folder."""


def compile_beside(arch: Architecture, flags: list[str]) -> None:
    """Start the process for a training of the student ``arch`` with ``flags``. One rank of a machine does."""
    from hylo_megatron.engine.cpu import without_cuda

    wanted = compile_ahead.wanted() and "gdn" in arch.plan and has("tilelang") and has("flash-linear-attention")
    if not wanted or without_cuda() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    nowhere = subprocess.DEVNULL
    subprocess.Popen([sys.executable, "-W", "ignore", "-m", __name__, *flags], stdin=nowhere, stdout=nowhere,
                     stderr=nowhere, preexec_fn=functools.partial(bind_child, os.getpid()))  # fmt: skip


def compile_kernel(arch: Architecture, at, backward: Callable) -> None:
    """Compile the kernel for the blocks of a rank, whose sizes are ``at``, a ``RankShape``.

    ``backward``: fla's ``chunk_bwd_dqkwg_tilelang``. It chooses the kernel by shapes, and gets tensors without data.
    """
    import torch

    g, dtype = arch.geometry.gdn, torch.bfloat16
    keys, values = g.num_key_heads // at.split, g.num_value_heads // at.split
    wide = g.value_head_dim + at.states * g.key_head_dim
    chunk = 64  # tokens of one chunk of fla's; the kernel takes any number of them
    empty = functools.partial(torch.empty, device="meta")
    q, k = (empty(at.rows, chunk, keys, g.key_head_dim, dtype=dtype) for _ in "qk")
    v, d_out, w = (empty(at.rows, chunk, values, dim, dtype=dtype) for dim in (wide, wide, g.key_head_dim))
    state, d_state = (empty(at.rows, 1, values, g.key_head_dim, wide, dtype=dtype) for _ in range(2))
    decay = empty(at.rows, chunk, values, dtype=torch.float32)
    backward(q, k, v, d_out, state, d_state, w=w, g=decay, scale=1.0, chunk_size=chunk)


def main() -> None:
    from fla.ops.common.backends.tilelang import CommonTileLangBackend

    backend = CommonTileLangBackend()
    if not (backend.is_available() and backend.is_enabled()):
        return
    from fla.ops.common.backends.tilelang import chunk_bwd

    from hylo_megatron.distill.arguments import student_architecture
    from hylo_megatron.distill.command_line import layout_of
    from hylo_megatron.distill.first_flags import first_flags
    from hylo_megatron.kernels.self_test import RankShape

    known, build = first_flags(sys.argv[1:]), chunk_bwd._build_chunk_bwd_dqkwg_kernel

    def build_alone(*args, **kwargs):
        build(*args, **kwargs)
        raise Compiled  # what fla would do next needs data

    chunk_bwd._build_chunk_bwd_dqkwg_kernel = build_alone
    arch = student_architecture(known)
    try:
        compile_kernel(arch, RankShape.of(arch, *layout_of(known)), chunk_bwd.chunk_bwd_dqkwg_tilelang)
    except Compiled:
        return


if __name__ == "__main__":
    main()
