"""The optimizer's states in a checkpoint: each data-parallel rank writes and reads those of its own parameters.

megatron-core 0.19.2 gathers a bucket of states at once on every GPU. Without overlapped gradient reduction a bucket is
the whole model: for 3B parameters 14 GiB beside weights and optimizer, which a training that fills its GPU has not. In
the host's memory every rank then has the states of all parameters, twice for a while, of which it writes a part; and
when it loads, it reads all of them. Here a rank writes the states of parameters whose first value is in its share.
Only of parameters that go on in another share, values are sent. It reads the states of which it has values.
"""

from collections import ChainMap
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from hylo_megatron.engine.patch import around, entries

PIECE = 2**27  # values that are sent at a time: 512 MiB on the GPU


def _send(part: Tensor, own: Tensor | None, source: int, kept: bool, group: dist.ProcessGroup, device) -> None:
    """Send the values ``own`` of rank ``source`` to the ranks of ``group``, and keep them in ``part`` if asked to."""
    for begin in range(0, len(part), PIECE):
        piece = part[begin : begin + PIECE]
        sent = torch.empty(len(piece), device=device) if own is None else own[begin : begin + PIECE].to(device).float()
        dist.broadcast(sent, dist.get_global_rank(group, source), group)
        if kept:
            piece.copy_(sent)


def fill(whole: Tensor, places: dict, values: dict, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Write the values of parameters that begin in this rank's share into ``whole``, and no others.

    ``places`` has each parameter's range in ``whole``, of which each rank's share is ``size`` values; ``values`` has
    those of this rank. ``whole`` is in the host's memory, of which an empty tensor takes none before it is written.
    """
    here = group.rank()
    for param, place in places.items():
        ranks = range(place.start // size, (place.stop - 1) // size + 1)
        for rank in ranks:
            part = whole[max(place.start, rank * size) : min(place.stop, (rank + 1) * size)]
            own = values[param] if rank == here else None
            if rank > ranks.start:
                _send(part, own, rank, here == ranks.start, group, device)
            elif own is not None:
                part.copy_(own)


@around
@torch.no_grad()
def own_states(gather, run, self, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
    """As ``gather`` with NCCL to all ranks, but each rank has the states of parameters that begin in its share only.

    The places of parameters are without gaps between buckets.
    """
    if use_gloo_comm or empty_data or not return_on_all_ranks:
        return gather(self, use_gloo_comm, empty_data, return_on_all_ranks)
    group, state = self.data_parallel_group, {"buckets_coalesced": True}
    keys = ("param", *self.optimizer_state_keys)
    for place, (buffer, by_dtype) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
        ((dtype, bucket_ranges),) = by_dtype.items()
        found, offset = {key: torch.empty(buffer.numel_unpadded) for key in keys}, 0
        for number, (bucket, ranges) in enumerate(zip(buffer.buckets, bucket_ranges, strict=True)):
            places = {param: range(start - offset, end - offset)
                      for param, (start, end, of) in buffer.param_index_map.items() if of == number}  # fmt: skip
            states = {param: self._get_main_param_and_optimizer_states(param) for param in ranges["param_map"]}
            size, device = bucket.grad_data.numel() // group.size(), bucket.grad_data.device
            for key in keys:
                whole = found[key][offset : offset + bucket.numel_unpadded]
                values = {param: each[key].detach() for param, each in states.items()}
                fill(whole, places, values, size, group, device)
            offset += bucket.numel_unpadded
        state[place] = {dtype: {**found, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _begun(optimizer) -> dict[int, bool]:
    """Return the numbers of the parameters of which this rank has values, and whether it has their first value."""
    places = []
    for buffer, by_dtype in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        ((_, buckets),) = by_dtype.items()
        here = ChainMap(*(bucket["param_map"] for bucket in buckets))
        places += [here.get(param) for param in buffer.param_index_map]
    return {number: place["param"].start == 0 for number, place in enumerate(places) if place}


def of_own_parameters(sharded, self, model_sharded_state_dict, is_loading=False, metadata=None) -> dict:
    """As ``sharded``, but a rank has the states that it writes or, when it loads, those of which it has values."""
    arguments, group = (self, model_sharded_state_dict, is_loading, metadata), self.data_parallel_group
    states = sharded(*arguments)
    if group.size() == 1 or metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
        return states
    # All ranks have a replica of a state, and the first rank's is the main replica. Now it is that of the rank in
    # whose share the parameter begins.
    numbers = [{index: next(iter(state.values())).replica_id for index, state in states.items()}]
    dist.broadcast_object_list(numbers, dist.get_global_rank(group, 0), group)
    return {
        index: {key: replace(each, replica_id=numbers[0][index]) if begins else each
                for key, each in states[index].items()}
        for index, begins in _begun(self).items()
        if begins or is_loading
    }  # fmt: skip


PATCHES = entries(
    "megatron", "megatron-core",
    ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero", own_states,
     "(self, use_gloo_comm, empty_data, return_on_all_ranks)",
     "gathers the states of a whole model on each GPU, where training has left no room"
     " (megatron/core/optimizer/distrib_optimizer.py:1376)"),
)  # fmt: skip
