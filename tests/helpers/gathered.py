"""The states of an optimizer that a checkpoint gathers from all ranks, by this project and by megatron-core."""

from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch.utils._pytree import tree_flatten_with_path

from hylo_megatron.engine import distributed_optimizer, gathered_states


def check(optimizer, model) -> None:
    """What a checkpoint has of the optimizer is what it has with megatron-core's gather, wherever pieces end."""
    with mock.patch.object(gathered_states, "PIECE", 1000):
        for part in optimizer.chained_optimizers:
            _check_gather(part)
            _check_owners(part, model.sharded_state_dict())


def _check_gather(part) -> None:
    gather = type(part).get_parameter_state_dp_zero
    want, got = (tree_flatten_with_path(each(part, False, False, True)) for each in (gather.__wrapped__, gather))
    assert got[1] == want[1]
    for (path, here), (_, there) in zip(got[0], want[0], strict=True):
        assert torch.equal(torch.as_tensor(here), torch.as_tensor(there)), path


def _check_owners(part, model_states: dict) -> None:
    """Each state is on one rank, with the number of the main replica."""

    def states() -> dict:
        found = part.sharded_param_state_fully_reshardable(model_states, False, {})
        apply_factories(found)
        return found

    own = states()
    with mock.patch.object(
        distributed_optimizer, "of_own_parameters", lambda sharded, *arguments: sharded(*arguments)
    ):
        everything = states()
    group = part.data_parallel_group
    owners = [None] * group.size()
    dist.all_gather_object(owners, set(own), group)
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(everything)
    assert group.size() == 1 or max(map(len, owners)) < len(everything)
    for index, state in own.items():
        here, there = (tree_flatten_with_path(each, lambda x: hasattr(x, "replica_id"))[0]
                       for each in (state, everything[index]))  # fmt: skip
        for (path, got), (_, want) in zip(here, there, strict=True):
            assert torch.equal(got.data, want.data), path
            assert got.key == want.key and got.global_offset == want.global_offset
            assert is_main_replica(got.replica_id) == is_main_replica((*want.replica_id[:-1], 0))
