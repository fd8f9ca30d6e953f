"""Linear blocks that pass states between ranks compute what one process does."""

import json

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from programs import states  # noqa: E402

LIMITS = {states.torch.float64: 1e-10, states.torch.float32: 1e-6, states.torch.bfloat16: 1e-2}
# what must be wrong once an exchange is left out, and what right
WRONG = {"states": "output", "halo": "output", "d_states": "input", "d_halo": "input"}


@pytest.fixture(scope="module", params=[2, 4])
def errors(request) -> dict:
    run = helpers.torchrun(states.__file__, processes=request.param)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", [case for case in states.CASES if not case.drop], ids=lambda case: case.name)
def test_shared_sequences_are_exact(case, errors):
    shared, alone = errors[case.name]["shared"], errors[case.name]["alone"]
    worst = max(shared, key=shared.get)
    print(f"STATES {case.name}: {shared[worst]:.1e} ({worst}), alone {max(alone.values()):.1e}")
    limit = LIMITS[case.dtype]
    assert not {name for name, error in shared.items() if not error < max(limit, 3 * alone[name])}
    assert max(alone.values()) < max(5 * limit, 1e-7)  # the engine's own Mamba-2 rounds its decay to fp32


@pytest.mark.parametrize("case", [case for case in states.CASES if case.drop], ids=lambda case: case.name)
def test_every_exchange_is_needed(case, errors):
    shared = errors[case.name]["shared"]
    assert shared[WRONG[case.drop]] > 0.1
    if case.drop.startswith("d_"):
        assert shared["output"] < 1e-10
