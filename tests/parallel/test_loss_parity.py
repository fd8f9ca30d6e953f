"""Tests that losses beside the KL are the same on every layout as in one process, and equal to plain references."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import gradients  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.kl import reference_hidden_distance, reference_loss  # noqa: E402
from programs import parity  # noqa: E402

from hylo_megatron.distill.head import TokenWeights  # noqa: E402
from hylo_megatron.distill.losses import JSD, KL  # noqa: E402

LAYOUTS = {name: sizes for name, sizes in parity.LAYOUTS[2].items() if name in ("TP2", "TP2 SP", "PP2", "CP2")}
CASES = [(layout, loss) for layout in LAYOUTS for loss in parity.LOSSES if (layout, loss) != ("PP2", "hidden")]
# MLPs in blocks (the teacher's, and those of the recomputed sub-layers of the student), recurrences in segments
PARTS = dict(mlp_block=24, recompute=5, recurrence_block=32)
BLOCKS = {f"{name} blocks": LAYOUTS[name] | PARTS for name in ("TP2", "TP2 SP")}
BLOCKS["CP2 blocks"] = LAYOUTS["CP2"] | PARTS | dict(recurrence_block=8)  # of the 16 positions of a chunk
BLOCKS["CP2 a2a blocks"] = LAYOUTS["CP2"] | PARTS | dict(linear_cp="a2a")
LAYOUTS |= BLOCKS
CASES += [(layout, "jsd") for layout in BLOCKS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp("pair"), "gdn")


def cell(pair, layout: str, loss: str, **sizes) -> parity.Cell:
    name = f"{layout}-{loss}".replace(" ", "_")
    return parity.Cell(name, *map(str, pair), "distill", "all", loss=loss, dtype="fp64", **sizes)


def fp8(pair, layout: str) -> parity.Cell:
    """Return a cell whose teacher multiplies in FP8, which knows no fp64."""
    return replace(cell(pair, layout, "fp8", **LAYOUTS.get(layout, {})), loss="", dtype="fp32", teacher_fp8=True)


@pytest.fixture(scope="module")
def work(pair, tmp_path_factory):
    """All cases, run by two processes."""
    folder = tmp_path_factory.mktemp("work")
    cells = [cell(pair, layout, loss, **LAYOUTS[layout]) for layout, loss in CASES]
    cells += [fp8(pair, layout) for layout in ("TP2", "TP2 SP")]
    (folder / "cells-two.json").write_text(json.dumps([asdict(each) for each in cells]))
    done = helpers.torchrun(parity.__file__, folder, "two")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(pair, work):
    return {loss: parity.run_cell(cell(pair, "alone", loss), work / f"alone-{loss}.jsonl") for loss in parity.LOSSES}


@pytest.mark.parametrize("layout, loss", CASES)
def test_layout_equals_one_process(layout, loss, alone, work):
    want = alone[loss]
    (line,) = helpers.read_log(work / f"{layout}-{loss}.jsonl".replace(" ", "_"))
    (expected,) = helpers.read_log(work / f"alone-{loss}.jsonl")
    parts = parity.LOSSES[loss].parts
    assert all(expected[part] > 0 for part in parts) and [part for part in parts if part not in line] == []
    assert [line[part] for part in parts] == pytest.approx([expected[part] for part in parts], rel=1e-6)
    got = torch.load(work / f"{layout}-{loss}.pt".replace(" ", "_"))
    for key, gap in gradients.gaps(got["gradients"], want["gradients"]).items():
        assert gap <= (1e-6 if key.endswith((".A_log", ".dt_bias")) else 1e-9), (key, gap)


@pytest.mark.parametrize("layout", ["TP2", "TP2 SP"])
def test_an_fp8_teacher_on_two_ranks_is_that_of_one(layout, pair, work):
    """Each rank scales the rows that it has: the roundings differ, the divergence hardly."""
    kinds = {"whole": replace(fp8(pair, "alone"), teacher_fp8=False), "fp8": fp8(pair, "alone")}
    found = {"ranks": helpers.read_log(work / f"{layout}-fp8.jsonl".replace(" ", "_"))[0]["kl"]}
    for name, each in kinds.items():
        parity.run_cell(each, work / f"fp8-{layout}-{name}.jsonl")
        found[name] = helpers.read_log(work / f"fp8-{layout}-{name}.jsonl")[0]["kl"]
    assert found["ranks"] == pytest.approx(found["fp8"], rel=2e-3)
    assert found["fp8"] != found["whole"] and found["fp8"] == pytest.approx(found["whole"], rel=2e-2)


@pytest.mark.parametrize("wide", [JSD(beta=0.2, ce_weight=0.3, hidden_weight=3.0, hidden_layers_weight=0.5, chunk=9),
                                  KL(hidden_weight=3.0, teacher_length=11)], ids=["jsd", "taught"])  # fmt: skip
def test_the_model_equals_plain_references(wide, pair):
    model = parity.distill_model(*pair, "distill", "all", wide)
    x = helpers.token_batch(2, 16)
    got = model(*x.values())
    states = {"student": [], "teacher": []}
    for name in states:
        stack = getattr(model, name).decoder
        for module in (*stack.layers[1::2], stack.final_norm):
            keep = states[name].append
            module.register_forward_hook(
                lambda _, args, out, keep=keep: keep(out[0] if isinstance(out, tuple) else out)
            )
    logits = [
        getattr(model, n)(x["tokens"], x["position_ids"], None)[..., : helpers.ODD_VOCAB].float() for n in states
    ]
    kl_weight, ce_weight = wide.token_weights(x["position_ids"], x["loss_mask"], x["answer_weight"])
    weights = TokenWeights(labels_T=x["labels"].flatten(), mask_T=x["loss_mask"].flatten(), kl_T=kl_weight.flatten(),
                           ce_T=ce_weight.flatten())  # fmt: skip
    want = list(reference_loss(*(value.flatten(0, 1) for value in logits), weights, wide))
    mask = x["loss_mask"].T * (torch.arange(16) < (wide.teacher_length or 16))[:, None]
    *layers, last = zip(*states.values(), strict=True)
    distances = {"hidden": reference_hidden_distance(*last, mask),
                 "hidden layers": sum(reference_hidden_distance(*each, mask) for each in layers)}  # fmt: skip
    for name, value in wide.distances.items():
        want[0] = want[0] + value * distances[name]
        want.append(distances[name])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(got[0], parameters.values(), retain_graph=True)
    for name, gradient, expected in zip(
        parameters, found, torch.autograd.grad(want[0], parameters.values()), strict=True
    ):
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max(), name
