"""The optimizer's states of all data-parallel ranks, gathered piece by piece for a checkpoint.

megatron-core 0.19.2 gathers a bucket of states at once on every GPU. Without overlapped gradient reduction a bucket is
the whole model: for 3B parameters 14 GiB beside weights and optimizer, which a training that fills its GPU has not. In
the host's memory it then copies what has arrived twice before it is in its place.
"""

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


def gather_into(whole: Tensor, shard: Tensor, group: dist.ProcessGroup, device: torch.device, piece: int) -> None:
    """Write the shards of all ranks into ``whole``, one after another; what it has no room for is padding.

    ``piece``: values of all ranks in one message. ``whole`` and ``shard`` are in the host's memory.
    """
    ranks, size = group.size(), shard.numel()
    step = max(piece // ranks, 1)
    for begin in range(0, size, step):
        end = min(begin + step, size)
        part = shard[begin:end].to(device)
        parts = torch.empty(ranks * len(part), device=device)
        dist.all_gather_into_tensor(parts, part, group)
        for rank, arrived in enumerate(parts.split(len(part))):
            place = whole[rank * size + begin : rank * size + end]
            place.copy_(arrived[: len(place)])


@around
@torch.no_grad()
def gather_in_pieces(gather, run, self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
    """As ``gather`` with NCCL to all ranks; everything else is left to it."""
    if use_gloo_comm or empty_data or not return_on_all_ranks:
        return gather(self, use_gloo_comm, empty_data, return_on_all_ranks)
    group, state = self.data_parallel_group, {"buckets_coalesced": True}
    keys = ("param", *self.optimizer_state_keys)
    for place, (buffer, by_dtype) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
        ((dtype, bucket_ranges),) = by_dtype.items()
        state[place] = {dtype: {key: torch.zeros(buffer.numel_unpadded) for key in keys}}
        offset = 0
        for bucket, ranges in zip(buffer.buckets, bucket_ranges, strict=True):
            size = bucket.grad_data.numel() // group.size()
            for key in keys:
                whole = state[place][dtype][key][offset : offset + bucket.numel_unpadded]
                shard = _own_shard(self, ranges["param_map"], key, size)
                gather_into(whole, shard, group, bucket.grad_data.device, PIECE)
            offset += bucket.numel_unpadded
        state[place][dtype]["numel_unpadded"] = buffer.numel_unpadded
    return state


PATCHES = entries(
    "megatron", "megatron-core",
    ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero", gather_in_pieces,
     "(self, use_gloo_comm, empty_data, return_on_all_ranks)",
     "gathers the states of a whole model on each GPU, where training has left no room"
     " (megatron/core/optimizer/distrib_optimizer.py:1376)"),
)  # fmt: skip
