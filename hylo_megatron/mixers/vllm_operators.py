"""Operators that read vLLM's metadata of a pass. Compiled models are split there, and breakable CUDA graphs break."""

from collections.abc import Callable

from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.utils.torch_utils import direct_register_custom_op


def register(name: str, run: Callable[..., None], filled: str) -> None:
    """Register ``run``, which fills its argument ``filled`` and returns nothing, as ``torch.ops.vllm.<name>``.

    Without the break, graphs of VLLM_USE_BREAKABLE_CUDAGRAPH would replay what ``run`` did while they were captured.
    """

    def fake(*_) -> None:
        """Tell the compiler that nothing is returned."""

    direct_register_custom_op(name, eager_break_during_capture(run), mutates_args=[filled], fake_impl=fake)


def split_at(name: str, vllm_config) -> None:
    """Let vLLM split the compiled model at the operator."""
    splits = vllm_config.compilation_config.splitting_ops
    if splits is not None and f"vllm::{name}" not in splits:
        splits.append(f"vllm::{name}")
