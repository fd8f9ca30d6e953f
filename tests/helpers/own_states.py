"""The states of an optimizer that a checkpoint gathers from all ranks, by this project and by megatron-core."""

from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch.utils._pytree import tree_flatten_with_path

from hylo_megatron.engine import distributed_optimizer, own_states


def check(optimizer, model) -> None:
    """What all ranks write of the optimizer is what megatron-core's gather brings, wherever pieces end."""
    with mock.patch.object(own_states, "PIECE", 1000):
        for part in optimizer.chained_optimizers:
            _check_written(part, model.sharded_state_dict())
            _check_read(part, model.sharded_state_dict())


def _states(part, model_states: dict, is_loading: bool) -> tuple[dict, dict]:
    """Return the states that this rank writes or reads, and those of megatron-core."""

    def states() -> dict:
        found = part.sharded_param_state_fully_reshardable(model_states, is_loading, {})
        apply_factories(found)
        return found

    own, cls = states(), type(part)
    with (
        mock.patch.object(cls, "get_parameter_state_dp_zero", cls.get_parameter_state_dp_zero.__wrapped__),
        mock.patch.object(
            distributed_optimizer, "of_own_parameters", lambda sharded, *args, **kw: sharded(*args, **kw)
        ),
    ):
        return own, states()


def _parts(state: dict) -> list:
    return tree_flatten_with_path(state, lambda part: hasattr(part, "replica_id"))[0]


def _numbers(states: dict, group) -> list[dict]:
    """Return the replica numbers of the states of each rank in ``group``."""
    found = [None] * group.size()
    mine = {index: [part.replica_id for _, part in _parts(state)] for index, state in states.items()}
    dist.all_gather_object(found, mine, group)
    return found


def _check_written(part, model_states: dict) -> None:
    """Each state is on one rank, with the number of the main replica."""
    own, everything = _states(part, model_states, False)
    ranks = _numbers(own, part.data_parallel_group)
    assert sum(map(len, ranks)) == len(set().union(*ranks)) == len(everything)
    assert len(ranks) == 1 or max(map(len, ranks)) < len(everything)
    for index, state in own.items():
        for (path, got), (_, want) in zip(_parts(state), _parts(everything[index]), strict=True):
            assert torch.equal(got.data, want.data), path
            assert got.key == want.key and got.global_offset == want.global_offset
            assert is_main_replica(got.replica_id) == is_main_replica((*want.replica_id[:-1], 0))


def _check_read(part, model_states: dict) -> None:
    """Each rank reads the states of which it has values; one of those that read a state has the main replica."""
    own, everything = _states(part, model_states, True)
    group = part.data_parallel_group
    if group.size() == 1:
        return
    here = {id(param) for by_dtype in part.gbuf_ranges for buckets in by_dtype.values()
            for bucket in buckets for param in bucket["param_map"]}  # fmt: skip
    params = [param for buffer in part.buffers for param in buffer.param_index_map]
    assert set(own) == {number for number, param in enumerate(params) if id(param) in here} != set(everything)
    ranks, before = _numbers(own, group), _numbers(everything, group)
    for index in everything:
        readers = [rank[index] for rank in ranks if index in rank]
        mains = [list(map(is_main_replica, numbers)) for numbers in readers]
        wanted = list(map(is_main_replica, before[0][index]))
        assert sorted(mains, reverse=True) == [wanted] + [[False] * len(wanted)] * (len(readers) - 1), index
