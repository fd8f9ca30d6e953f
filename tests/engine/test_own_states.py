"""Whose states of the optimizer a rank writes and reads. On several ranks: ``helpers/own_states.py``."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.engine import own_states  # noqa: E402


def test_only_values_of_the_rank_itself_are_written(process_groups, monkeypatch):
    """Between parameters, and behind the last, there may be padding."""
    places = {"a": range(0, 300), "b": range(320, 900)}
    values = {name: torch.arange(float(place.start), place.stop) for name, place in places.items()}
    whole = torch.full((990,), -1.0)
    own_states.fill(whole, places, values, 1000, dist.group.WORLD, torch.device("cpu"))
    want = [float(i) if any(i in place for place in places.values()) else -1.0 for i in range(990)]
    assert whole.tolist() == want


def test_a_rank_reads_what_it_has_values_of_in_each_buffer():
    """16-bit and fp32 weights have a buffer each, and a buffer has several buckets."""

    def bucket(**starts):
        return {"param_map": {name: {"param": range(start, 9)} for name, start in starts.items()}}

    buffers = [SimpleNamespace(param_index_map=dict.fromkeys(names)) for names in ("abcd", "ef")]
    ranges = [{"bfloat16": [bucket(b=3), bucket(d=0)]}, {"float32": [bucket(e=0)]}]
    optimizer = SimpleNamespace(buffers=buffers, gbuf_ranges=ranges)
    assert own_states._begun(optimizer) == {1: False, 3: True, 4: True}
