"""A training step in which the host seldom waits for the GPU: once, where megatron-core clips the gradient.

megatron-core reads numbers from the GPU several times a step: the gradient's norm (once for each parameter, where
neither TransformerEngine nor Apex is installed), a flag and two statistics that it reduces over groups of ranks, and
the scale of the loss. Each time the GPU runs out of work, and the hundreds of small launches of the optimizer's step
then reach it one by one. These replacements keep the numbers on the GPU, or on the host where they are known there.
One wait is left: ``clip_grads.py:138`` reads the norm.
"""

import torch
from torch import Tensor

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import entries

_ONE = torch.ones(())  # on the host, where reading it waits for nothing


def norm_on_device(norm, run):
    """Return megatron's ``l2_norm_impl``: the norm over all tensors, in a tensor of one element."""

    def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
        norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
        return torch.linalg.vector_norm(torch.stack(norms)).view(1), None

    return l2_norm


def and_of_one(reduce, run):
    """Return megatron's function that asks all ranks of a group, which is not called for a group of one rank."""
    return lambda input, group=None: input is True if group and group.size() == 1 else reduce(input, group)


def maximum_of_one(reduce, run):
    """Return megatron's maximum over a group of ranks. In a group of one rank a tensor stays a tensor."""

    def reduced(stat, group=None):
        if not group or group.size() > 1:
            return reduce(stat, group)
        if isinstance(stat, Tensor):
            return stat.detach().view(()).float()
        return None if stat is None else torch.tensor(stat, dtype=torch.float32).item()

    return reduced


def scale_on_host(scale, run):
    """Return ``get_loss_scale`` with a number on the host where the loss is not scaled."""
    return lambda self: scale(self) if getattr(self, "grad_scaler", None) else _ONE


def on_gpu() -> bool:
    return not without_cuda()


def reads_each_norm() -> bool:
    """Return whether megatron-core found neither TransformerEngine nor Apex, whose kernels it prefers."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    return on_gpu() and clip_grads.l2_norm_impl is local_multi_tensor_l2_norm


_CLIP, _LOOP = "megatron.core.optimizer.clip_grads", "megatron.training.training"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
PATCHES = entries(
    "training", "megatron-core",
    (f"{_CLIP}:l2_norm_impl", norm_on_device, "(chunk_size, noop_flag, tensor_lists, per_tensor, *args) or builtin",
     "reads the norm of each parameter from the GPU: hundreds of waits a step (megatron/core/utils.py:1331)"),
    needed=lambda: reads_each_norm(),
) + entries(
    "training", "megatron-core",
    (f"{_LOOP}:logical_and_across_model_parallel_group", and_of_one, "(input, group)",
     "copies a flag to the GPU and back, also for a group of one rank (training/utils/common_utils.py:293)"),
    (f"{_LOOP}:reduce_max_stat_across_model_parallel_group", maximum_of_one, "(stat, group)",
     "copies a number to the GPU and back, also for a group of one rank (training/utils/common_utils.py:265)"),
    *((f"{_OPTIMIZER}:{name}.get_loss_scale", scale_on_host, "(self)",
       "the loop reads the scale of the loss from the GPU in each step (megatron/training/training.py:3974)")
      for name in ("MixedPrecisionOptimizer", "FP32Optimizer")),
    needed=lambda: on_gpu(),
)  # fmt: skip
