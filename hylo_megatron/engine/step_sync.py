"""A training step in which the host does not wait for the GPU.

megatron-core reads numbers from the GPU several times a step: the gradient's norm (once for each parameter, where
neither TransformerEngine nor Apex is installed), a flag and two statistics that it reduces over groups of ranks, and
the scale of the loss. Each time the GPU runs out of work, and the hundreds of small launches of the optimizer's step
then reach it one by one. These replacements keep the numbers on the GPU, or on the host where they are known there.
"""

import torch
from torch import Tensor

from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.patch import around, entries

_ONE = torch.ones(())  # on the host, where reading it waits for nothing


@around
def norm_on_device(norm, run, chunk_size, noop_flag, tensor_lists, per_tensor, *args):
    """Return the norm over all tensors in a tensor of one element: megatron's ``l2_norm_impl``."""
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


@around
def total_on_device(total, run, grads_for_norm, norm_type=2, grad_stats_parallel_group=None):
    """Return what ``get_grad_norm_fp32`` of megatron does, on the device.

    The result is in fp64, as megatron's number of Python is, so the factor that clips the gradient has the same bits:
    on each rank, also on one whose gradients all count elsewhere.
    """
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else list(grads_for_norm)
    if norm_type != 2 or not all(type(grad) is Tensor for grad in grads):  # also no DTensor
        return total(grads_for_norm, norm_type, grad_stats_parallel_group)
    grads = grads or [torch.zeros(1, device=torch.cuda.current_device())]
    norm, _ = norm_on_device(None, None)(0, None, [grads], False)
    square = norm**2
    torch.distributed.all_reduce(square, group=grad_stats_parallel_group)
    return square.double().sqrt()


@around
def scale_on_device(missing, run, chunk_size, noop_flag, tensor_lists, factor: Tensor):
    """Multiply by a factor that is a tensor of one element: megatron's ``multi_tensor_scale_tensor_impl``.

    A factor that is not below 1, or not a number, leaves the gradient as it is, like megatron's own comparison.
    """
    sources, targets = tensor_lists
    if sources is not targets:
        torch._foreach_copy_(targets, sources)
    if targets:
        factor = factor.view(())
        torch._foreach_mul_(targets, torch.where(factor < 1, factor, torch.ones_like(factor)).float())


def alike(group) -> bool:
    """Return whether all ranks of a model-parallel group have the same flag, norm and learning rate.

    Those of one pipeline stage have: each holds a part of every layer, and the norm is a sum over all of them.
    megatron asks because a stage may have nothing to train.
    """
    from megatron.core import parallel_state

    return bool(group) and (group.size() == 1 or parallel_state.get_pipeline_model_parallel_world_size() == 1)


@around
def and_of_alike(reduce, run, input, group=None):
    """Ask all ranks of a group, as megatron's function does. Ranks that are alike are not asked."""
    return input is True if alike(group) else reduce(input, group)


@around
def maximum_of_alike(reduce, run, stat, group=None):
    """Return the maximum over a group of ranks as megatron does. Of ranks that are alike a tensor stays a tensor."""
    if not alike(group):
        return reduce(stat, group)
    if isinstance(stat, Tensor):
        return stat.detach().view(()).float()
    return None if stat is None else torch.tensor(stat, dtype=torch.float32).item()


@around
def scale_on_host(scale, run, self):
    """Return the loss scale as ``get_loss_scale`` does, on the host where the loss is not scaled."""
    return scale(self) if getattr(self, "grad_scaler", None) else _ONE


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
    (f"{_OPTIMIZER}:get_grad_norm_fp32", total_on_device, "(grads_for_norm, norm_type, grad_stats_parallel_group)",
     "reads the norm of the gradient from the GPU (megatron/core/optimizer/clip_grads.py:138)"),
    (f"{_CLIP}:multi_tensor_scale_tensor_impl", scale_on_device, "NoneType or builtin",
     "is missing without TransformerEngine; clips by a norm that is on the GPU (clip_grads.py:187)"),
    needed=lambda: reads_each_norm(),
) + entries(
    "training", "megatron-core",
    (f"{_LOOP}:logical_and_across_model_parallel_group", and_of_alike, "(input, group)",
     "copies a flag to the GPU and back, also where ranks cannot differ (training/utils/common_utils.py:293)"),
    (f"{_LOOP}:reduce_max_stat_across_model_parallel_group", maximum_of_alike, "(stat, group)",
     "copies a number to the GPU and back, also where ranks cannot differ (training/utils/common_utils.py:265)"),
    *((f"{_OPTIMIZER}:{name}.get_loss_scale", scale_on_host, "(self)",
       "the loop reads the scale of the loss from the GPU in each step (megatron/training/training.py:3974)")
      for name in ("MixedPrecisionOptimizer", "FP32Optimizer")),
    needed=lambda: on_gpu(),
)  # fmt: skip
