"""Windows whose sequences ranks share compute what one process does, and refuse what they cannot do."""

import json
from types import SimpleNamespace

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from programs import window_ranks  # noqa: E402

from hylo_megatron.config.layout import check_layout  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.mixers.megatron_linear import LinearMixer  # noqa: E402
from hylo_megatron.parallel.halo import Reach, plan  # noqa: E402

LIMITS = {window_ranks.torch.float64: 1e-13, window_ranks.torch.float32: 2e-6, window_ranks.torch.bfloat16: 1e-2}
WRONG = {"halo": ("fetched", "output"), "gradient": ("gradient", "linear_qkv.weight")}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.parallel)])
def test_shared_windows_are_exact(ranks):
    """Every case in fp64 unless named; without what is exchanged, or without its gradient, they are wrong."""
    run = helpers.torchrun(window_ranks.__file__, processes=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    errors = {
        line.pop("case"): line for line in map(json.loads, filter(lambda x: x[0] == "{", run.stdout.splitlines()))
    }
    assert list(errors) == [case.name for case in window_ranks.CASES]
    for case in window_ranks.CASES:
        found = errors[case.name]
        print(f"WINDOW {ranks} {case.name}: {max(found.values()):.1e}")
        if case.drop:
            assert min(found[name] for name in WRONG[case.drop]) > 0.1
        else:
            assert max(found.values()) < LIMITS[case.dtype], case.name
    dropped = errors["no gradient of the halo"]
    assert dropped["fetched"] == 0 and dropped["output"] < 1e-13


@pytest.mark.parametrize("before, first", [(255, 4), (9000, 64), (0, 0)])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_a_rank_sends_is_what_others_receive(ranks, before, first):
    reach = Reach(ranks=ranks, length=2048, before=before, first=first)
    plans = [plan(reach, rank) for rank in range(ranks)]
    for rank, made in enumerate(plans):
        assert made.sent == [other.received[rank] for other in plans]
        assert made.sent == [sum(p.length for p in other.incoming if p.owner == rank) for other in plans]
        assert all(0 <= tokens.start < tokens.stop <= 2048 for tokens in made.outgoing)
    if before == 255:  # a rank's neighbours get its chunks' last tokens, everyone the first of the sequence
        away = sum(made.sent[other] for rank, made in enumerate(plans) for other in range(ranks) if other != rank)
        assert away == (ranks - 1) * (2 * before + first)


def test_layouts_of_windows():
    """Context parallelism is accepted; megatron-core's packed sequences are refused as on one rank."""
    arch = tiny.hybrid("gdn", window=tiny.WINDOW)
    for linear_cp in ("auto", "states", "a2a"):
        check_layout(arch, cp=2, linear_cp=linear_cp)
    mixer = SimpleNamespace(window=object(), mix=lambda *_, **__: (None, None))
    with pytest.raises(HyLoError, match="packed sequences: a window reads one sequence a row; use --window off"):
        LinearMixer.forward(mixer, None, packed_seq_params=object())
