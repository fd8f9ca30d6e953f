"""Gradients of all ranks, put together and compared."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel

from hylo_megatron.distill.model import DistillModel


def gather(wrapped: DistributedDataParallel) -> None:
    """Undoes the distributed optimizer's reduce-scatter."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.clone().chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(shards))


def whole(model: DistillModel) -> tuple[dict, float]:
    """Gradients put together from all ranks under checkpoint names, and by how much replicas differ at most."""
    kept = {parameter: parameter.data for parameter in model.student.parameters()}
    for parameter in kept:
        parameter.data = parameter.main_grad if parameter.requires_grad else torch.full_like(parameter, torch.nan)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = model.sharded_state_dict(metadata=metadata)
    apply_factories(sharded)
    shards, queue = [], list(sharded.values())
    while queue:
        item = queue.pop()
        if isinstance(item, ShardedTensor):
            place = tuple(slice(o, o + n) for o, n in zip(item.global_offset, item.local_shape, strict=True))
            data = item.data.reshape(item.local_shape).cpu().double()
            shards.append((item.key, tuple(item.global_shape), place, data))
        elif isinstance(item, dict | list):
            queue += item.values() if isinstance(item, dict) else item
    for parameter, data in kept.items():
        parameter.data = data
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, shards)
    found, spread = {}, 0.0
    for key, shape, place, data in (shard for rank in everyone for shard in rank):
        if data.isnan().all():  # frozen
            continue
        target = found.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
        seen = target[place]
        if not seen.isnan().any():
            spread = max(spread, ((seen - data).abs().max() / data.abs().max().clamp_min(1e-30)).item())
        target[place] = data
    return found, spread


def gaps(got: dict, want: dict) -> dict[str, float]:
    """Largest difference of each parameter's gradient, relative to its largest entry."""
    assert got.keys() == want.keys()
    assert any(gradient.any() for gradient in want.values())
    found = {}
    for key, gradient in want.items():
        here, padding = got[key].split([len(gradient), len(got[key]) - len(gradient)])
        assert not padding.any(), key
        found[key] = ((here - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30)).item()
    return found
