"""The schedule of layer-wise distillation on a pipeline: who waits for whom, replayed from what a run did."""

import json

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from programs import parity  # noqa: E402
from programs import teacher_trace as trace  # noqa: E402

COST = {"teach": 1, "learn": 3, "forward": 2, "backward": 2, "step": 0}  # a forward pass is one unit


def source(stages: int, stage: int, kind: str, number: int) -> list[tuple]:
    """Events of other stages that have to be over before this one starts."""
    if kind == "step":  # the norm of all gradients
        return [(other, kind, number) for other in range(stages)]
    neighbour = {"teach": stage - 1, "forward": stage - 1, "backward": stage + 1}.get(kind, -1)
    return [(neighbour, kind, number)] if 0 <= neighbour < stages else []


def waits(orders: list[list]) -> list[list[int]]:
    """By stage and step, for how long it waited, if every stage did its events in this order."""
    stages, clock, over = len(orders), [0] * len(orders), {}
    place, waited = [0] * stages, [[0] for _ in range(stages)]
    while any(place[s] < len(orders[s]) for s in range(stages)):
        moved = False
        for s in range(stages):
            if place[s] == len(orders[s]):
                continue
            kind, number = orders[s][place[s]]
            needed = source(stages, s, kind, number)
            if kind == "step":  # everyone has to have arrived
                arrived = [
                    clock[o]
                    for o in range(stages)
                    if place[o] < len(orders[o]) and orders[o][place[o]] == [kind, number]
                ]
                ready = max(arrived) if len(arrived) == stages else over.get(("step", number))
                if ready is None:
                    continue
                over["step", number] = ready
            elif all(event in over for event in needed):
                ready = max([clock[s], *(over[event] for event in needed)])
            else:
                continue
            waited[s][-1] += ready - clock[s]
            clock[s] = ready + COST[kind]
            over[s, kind, number] = clock[s]
            place[s], moved = place[s] + 1, True
            if kind == "step":
                waited[s].append(0)
        assert moved, "a deadlock"
    return [stage[:-1] for stage in waited]


def one_forward_one_backward(stages: int, micro_batches: int, steps: int) -> list[list]:
    """The engine's order of the same work: a forward pass of teacher and student, a backward pass."""
    orders = []
    for stage in range(stages):
        ahead, order = min(stages - stage - 1, micro_batches), []
        for step in range(steps):
            numbers = range(step * micro_batches, (step + 1) * micro_batches)
            order += [["forward", n] for n in numbers[:ahead]]
            for i in range(micro_batches - ahead):
                order += [["forward", numbers[ahead + i]], ["backward", numbers[i]]]
            order += [["backward", n] for n in numbers[micro_batches - ahead :]]
            order.append(["step", step])
        orders.append(order)
    return orders


@pytest.mark.parametrize("stages", [2, pytest.param(4, marks=pytest.mark.parallel)])
def test_no_stage_waits_after_the_pipeline_has_filled(stages, tmp_path):
    helpers.write_pair(tmp_path, "gdn")
    run = helpers.torchrun(trace.__file__, tmp_path, stages, processes=stages)
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = json.loads(run.stdout.strip().splitlines()[-1])
    assert [rank["stage"] for rank in ranks] == list(range(stages))
    for stage, rank in enumerate(ranks):  # nothing is ever sent back
        assert rank["receivers"] == ([stage + 1] if stage < stages - 1 else [])
        assert sum(kind == "learn" for kind, _ in rank["events"]) == trace.STEPS * parity.ROWS
    ours = waits([rank["events"] for rank in ranks])
    engine = waits(one_forward_one_backward(stages, parity.ROWS, trace.STEPS))
    print(f"WAITS {stages} stages: {ours}, 1F1B {engine}")
    assert max(sum(stage[1:]) for stage in ours) == 0
    assert max(stage[0] for stage in ours) == (stages - 1) * COST["teach"]  # of the whole run
    assert min(min(stage) for stage in engine) == (stages - 1) * (COST["forward"] + COST["backward"])  # of each step
