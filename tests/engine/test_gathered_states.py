"""What a checkpoint keeps of the optimizer's states that all ranks gather. On two ranks: ``helpers/gathered.py``."""

import pytest
import torch
import torch.distributed as dist

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.engine import gathered_states  # noqa: E402


@pytest.mark.parametrize("kept", [range(130, 777), range(100, 200), range(950, 2000), range(0), range(-50, 30)])
def test_only_what_is_kept_is_written(kept, process_groups, monkeypatch):
    """Also where it begins or ends inside a piece, and where the shard ends in padding."""
    monkeypatch.setattr(gathered_states, "PIECE", 100)
    whole, shard = torch.full((990,), -1.0), torch.arange(1000.0)
    gathered_states.gather_into(whole, shard, dist.group.WORLD, torch.device("cpu"), kept)
    want = torch.tensor([place if place in kept else -1.0 for place in range(990)])
    assert torch.equal(whole, want)
