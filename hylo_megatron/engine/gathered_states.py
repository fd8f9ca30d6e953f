"""The optimizer's states of all data-parallel ranks, gathered piece by piece for a checkpoint.

megatron-core 0.19.2 gathers a bucket of states at once on every GPU. Without overlapped gradient reduction a bucket is
the whole model: for 3B parameters 14 GiB beside weights and optimizer, which a training that fills its GPU has not. In
the host's memory every rank then has the states of all parameters, twice for a while, of which it writes a part.
Here each rank keeps the states of some parameters, and writes these.
"""

from dataclasses import replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from hylo_megatron.engine.patch import around, entries

PIECE = 2**27  # values of all ranks that one gather brings: 512 MiB, of which two are there at a time


def _own_shard(optimizer, params: dict, key: str, size: int) -> Tensor:
    """Return the rank's values of one state, ``size`` of them, in the order of the gradient buffer."""
    shard = torch.zeros(size)
    for param, ranges in params.items():
        span = ranges["gbuf_local"]
        shard[span.start : span.end].copy_(optimizer._get_main_param_and_optimizer_states(param)[key].detach())
    return shard


def gather_into(whole: Tensor, shard: Tensor, group: dist.ProcessGroup, device: torch.device, kept: range) -> None:
    """Write the shards of all ranks, one after another, into ``whole``; what it has no room for is padding.

    Only the values ``kept`` of ``whole`` are written. ``whole`` and ``shard`` are in the host's memory, of which an
    empty tensor takes none before it is written.
    """
    ranks, size = group.size(), shard.numel()
    step = max(PIECE // ranks, 1)
    for begin in range(0, size, step):
        part = shard[begin : begin + step].to(device)
        parts = torch.empty(ranks * len(part), device=device)
        dist.all_gather_into_tensor(parts, part, group)
        for rank, arrived in enumerate(parts.split(len(part))):
            start = rank * size + begin
            first, last = max(start, kept.start), min(start + len(part), kept.stop, len(whole))
            if first < last:
                whole[first:last].copy_(arrived[first - start : last - start])


@around
@torch.no_grad()
def gather_in_pieces(gather, run, self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
    """As ``gather`` with NCCL to all ranks, but for what ``of_own_parameters`` does not keep."""
    if use_gloo_comm or empty_data or not return_on_all_ranks:
        return gather(self, use_gloo_comm, empty_data, return_on_all_ranks)
    group, state = self.data_parallel_group, {"buckets_coalesced": True}
    keys = ("param", *self.optimizer_state_keys)
    everything = [range(buffer.numel_unpadded) for buffer in self.buffers]
    kept = getattr(self, "_hylo_kept", None) or everything
    for place, (buffer, by_dtype) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
        ((dtype, bucket_ranges),) = by_dtype.items()
        state[place] = {dtype: {key: torch.empty(buffer.numel_unpadded) for key in keys}}
        offset = 0
        for bucket, ranges in zip(buffer.buckets, bucket_ranges, strict=True):
            size = bucket.grad_data.numel() // group.size()
            here = range(kept[place].start - offset, kept[place].stop - offset)
            for key in keys:
                whole = state[place][dtype][key][offset : offset + bucket.numel_unpadded]
                shard = _own_shard(self, ranges["param_map"], key, size)
                gather_into(whole, shard, group, bucket.grad_data.device, here)
            offset += bucket.numel_unpadded
        state[place][dtype]["numel_unpadded"] = buffer.numel_unpadded
    return state


def _owned(buffer, group: dist.ProcessGroup) -> list[bool]:
    """Return which parameters begin in this rank's share of the buffer, in the buffer's order."""
    share = -(-buffer.numel_unpadded // group.size())
    return [start // share == group.rank() for start, _, _ in buffer.param_index_map.values()]


def _span(buffer, owned: list[bool]) -> range:
    """Return the values of owned parameters, which lie side by side."""
    places = [place for place, own in zip(buffer.param_index_map.values(), owned, strict=True) if own]
    return range(min(start for start, _, _ in places), max(end for _, end, _ in places)) if places else range(0)


def of_own_parameters(sharded, self, model_sharded_state_dict, is_loading=False, metadata=None) -> dict:
    """As ``sharded``, but each rank has the states of some parameters, which it will write, and no others.

    The places of parameters are without gaps between buckets.
    """
    arguments, group = (self, model_sharded_state_dict, is_loading, metadata), self.data_parallel_group
    if is_loading or group.size() == 1 or metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
        return sharded(*arguments)
    owned = [_owned(buffer, group) for buffer in self.buffers]
    self._hylo_kept = [_span(*each) for each in zip(self.buffers, owned, strict=True)]
    try:
        states = sharded(*arguments)
    finally:
        del self._hylo_kept
    # All ranks have a replica of a state. The first rank's is the main replica, which is written: now the owner's is.
    numbers = [{index: next(iter(state.values())).replica_id for index, state in states.items()}]
    dist.broadcast_object_list(numbers, dist.get_global_rank(group, 0), group)
    mine = [index for index, own in enumerate(chain.from_iterable(owned)) if own]
    return {
        index: {key: replace(each, replica_id=numbers[0][index]) for key, each in states[index].items()}
        for index in mine
    }


PATCHES = entries(
    "megatron", "megatron-core",
    ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero", gather_in_pieces,
     "(self, use_gloo_comm, empty_data, return_on_all_ranks)",
     "gathers the states of a whole model on each GPU, where training has left no room"
     " (megatron/core/optimizer/distrib_optimizer.py:1376)"),
)  # fmt: skip
