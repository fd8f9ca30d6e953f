"""The states of an optimizer that a checkpoint gathers from all ranks, by this project and by megatron-core."""

from unittest import mock

import torch
from torch.utils._pytree import tree_flatten_with_path

from hylo_megatron.engine import gathered_states


def check(optimizer) -> None:
    """A checkpoint's states, gathered in pieces that end anywhere in a shard, are those of megatron-core's gather."""
    for part in optimizer.chained_optimizers:
        gather = type(part).get_parameter_state_dp_zero
        with mock.patch.object(gathered_states, "PIECE", 1000):
            want, got = (
                tree_flatten_with_path(each(part, False, False, True)) for each in (gather.__wrapped__, gather)
            )
        assert got[1] == want[1]
        for (path, here), (_, there) in zip(got[0], want[0], strict=True):
            assert torch.equal(torch.as_tensor(here), torch.as_tensor(there)), path
