"""Every lever of docs/recipe.md in toy recipes: the list is complete, and the recipes run from convert to card.

The runs are those of ``make recipe-test``; ``make test`` runs the checks of the declarations only.
"""

import dataclasses
import functools
import json
import re
import shutil
from dataclasses import dataclass, replace

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.levers import KILLED, SPOILED, control, every_lever, lever_names, recipes, unused  # noqa: E402
from helpers.paths import ROOT  # noqa: E402
from helpers.recipes import write_inputs  # noqa: E402

from hylo_megatron.config import Plan, geometry_preset, positions  # noqa: E402
from hylo_megatron.config.decisions import INITIAL_STATES  # noqa: E402
from hylo_megatron.config.stages import stage_kind  # noqa: E402
from hylo_megatron.distill import command_line  # noqa: E402
from hylo_megatron.distill.losses import LOSSES  # noqa: E402
from hylo_megatron.distill.spikes import ACTIONS  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.evaluate import log_scale  # noqa: E402
from hylo_megatron.recipes.stage import Recipe, Stage, _lever  # noqa: E402
from hylo_megatron.run import datasets, on_policy, recipe_run  # noqa: E402
from hylo_megatron.run.launch import Processes  # noqa: E402
from hylo_megatron.run.sampled import write_sampled  # noqa: E402
from hylo_megatron.run.source import Source  # noqa: E402

# ---- declarations ----


def test_every_lever_is_used():
    assert not unused(recipes())
    stages = [stage for recipe in recipes() for stage in recipe.stages]
    assert {stage.loss for stage in stages} >= {name for name, loss in LOSSES.items() if not loss.layerwise}
    assert {stage.initial_states for stage in stages} == set(INITIAL_STATES)
    assert {stage.on_spike for stage in stages} == set(ACTIONS)
    kinds = {name for stage in stages for name, _ in datasets.mix_of(stage)}
    assert kinds == {*datasets.NAMES, datasets.ON_POLICY}


def test_a_lever_that_no_recipe_uses_is_found():
    recipe = every_lever()
    less = replace(recipe, linear_rope=False, window=None, stages=recipe.stages[:3])
    assert unused([less]) == {
        "linear_rope", "window", "control", "log_scale", "jsd_beta", "teacher_length", "ce_beyond", "answer_weight"
    }  # fmt: skip

    @dataclass(frozen=True, kw_only=True)
    class Later(Stage):
        colour: int = _lever("--hylo-colour", 0)

    def later(recipe: Recipe) -> Recipe:
        values = [{each.name: getattr(s, each.name) for each in dataclasses.fields(s)} for s in recipe.stages]
        return replace(recipe, stages=tuple(Later(**each) for each in values))

    assert unused(map(later, recipes())) == {"colour"}


def test_the_page_has_every_lever():
    """The third column of the table names the fields."""
    rows = [
        line.split("|") for line in (ROOT / "docs" / "recipe.md").read_text().splitlines() if line.startswith("| ")
    ]
    named = {word for row in rows if len(row) == 8 for word in re.findall(r"`(\w+)\b", row[2])}
    marked = {*lever_names(Stage), *lever_names(Recipe)}
    assert marked <= named
    fields = {each.name for kind in (Stage, Recipe) for each in dataclasses.fields(kind)}
    assert named & fields <= marked, "a field of the table without the mark of a lever"


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_the_recipes_are_ones_that_the_trainer_takes(recipe):
    for stage in recipe.stages:
        known = command_line.user_flags([*stage.flags(), *["--hylo-control"] * recipe.control])
        command_line.check_stage(known)
        own = {name.removeprefix("hylo_") for name in known.given} & set(lever_names(Stage))
        assert own >= {name for name in stage.levers() if name in ("loss", "jsd_beta", "ce_from", "on_spike")}
        assert not stage.mix or sum(share for _, share in stage.mix) == pytest.approx(1)
    assert Plan.parse(recipe.layers, recipe.plan, recipe.linear).name == "3MLA2GDN"
    rows = [geometry_preset(name, 64, 4, 16).mla for name in ("native", recipe.geometry)]
    cache = [layers * (row.kv_lora_rank + row.qk_rope_head_dim) for layers, row in zip((2, 3), rows, strict=True)]
    assert cache[0] == cache[1]  # other split, same cache
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


# ---- runs ----


class Trainings:
    """Starts the trainings of a run; their losses are spoiled and their processes killed as asked for each stage."""

    def __init__(self, spoiled: dict, killed: dict):
        self.spoiled, self.killed, self.arguments = spoiled, dict(killed), {}

    def __call__(self, arguments: list[str], processes: Processes, log):
        self.arguments[log.stem] = arguments
        variables = {}
        if log.stem in self.spoiled:
            variables["HYLO_TEST_SPOIL"] = json.dumps(self.spoiled[log.stem])
        if log.stem in self.killed:
            variables["HYLO_TEST_KILL_AT"] = str(self.killed.pop(log.stem))
        return helpers.Forked(arguments, log, **variables)


def events(folder) -> list[tuple]:
    return [(line["iteration"], line["event"]) for line in helpers.read_log(folder / "events.jsonl")]


def steps(folder) -> list[tuple]:
    lines = helpers.read_log(folder / "train_log.jsonl")
    return [(line["iteration"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.fixture
def short_samples(monkeypatch):
    """Let teacher and student write rows of 96 tokens in shards of 16."""
    more = ("--length", "96", "--rows-per-shard", "16", "--shortest", "1")
    monkeypatch.setattr(recipe_run, "write_sampled", functools.partial(write_sampled, more=more))
    own = functools.partial(on_policy.write_on_policy, more=more)
    monkeypatch.setattr(on_policy, "write_on_policy", own)


@pytest.mark.slow
@pytest.mark.parallel
def test_the_whole_recipe_with_every_lever(tmp_path, short_samples, capsys):
    out, recipe = tmp_path / "run", every_lever()
    write_inputs(out, recipe.layers)
    start = Trainings(SPOILED, KILLED)

    def execute():
        recipe_run.Run(recipe, out, Processes.found(), start=start).execute()

    for name in KILLED:  # each kill ends the run, and the same command goes on
        with pytest.raises(HyLoError, match=f"{name} stopped .killed by SIGKILL."):
            execute()
    with pytest.raises(HyLoError, match="last diverged: step 5: .*Run with a lower lr"):
        execute()
    with pytest.raises(HyLoError, match="last diverged: step 5: "):  # it does not pass as done
        execute()
    assert not (out / "report").exists()
    (out / "last" / "diverged.json").unlink()
    del start.spoiled["last"]
    execute()
    check_guards(out)
    check_results(out, recipe, capsys.readouterr().out)

    # the killed stage has the losses of one that was not killed: states, schedule and guard go on as they were
    for name in KILLED:
        apart = tmp_path / name
        arguments = [str(apart) if word == str(out / name) else word for word in start.arguments[name]]
        log = tmp_path / f"{name}.log"
        process = helpers.Forked(arguments, log, HYLO_TEST_SPOIL=json.dumps(SPOILED[name]))
        assert process.wait() == 0, process.reason()
        assert steps(apart) == steps(out / name), name


def check_guards(out) -> None:
    assert (13, "spike") in events(out / "late") and (13, "burst") in events(out / "late")
    assert (3, "skipped") in events(out / "reverse")
    assert (4, "rolled back") in events(out / "jensen")
    assert (5, "stopped") in events(out / "last")
    for name, wanted in (("late", 14), ("reverse", 6), ("jensen", 6), ("last", 6)):
        taken = [line[0] for line in steps(out / name)]
        spoiled = SPOILED[name] if name in KILLED else ()  # their losses are no numbers
        assert taken == [step for step in range(1, wanted + 1) if step not in spoiled], name
    samples = helpers.read_log(out / "late" / "events.jsonl")[-1]["samples"]
    assert len(samples) == 2 and all(prefix.startswith(str(out / "data")) for prefix, _, _ in samples)


def check_results(out, recipe, printed: str) -> None:
    from hylo_megatron.hf import HyLoConfig

    assert [stage.name for stage in recipe.stages if f"after {stage.name}" not in printed] == []
    folder = out / "hf-last"
    config = HyLoConfig.from_pretrained(folder)
    assert not config.mla_rope and config.linear_rope and config.window == positions.window(recipe.window)
    assert config.log_scale == {"base": 600.0, "length": 512}
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (88, 8) and config.mixers.count("mla") == 3
    parts = {stage.name: helpers.read_log(out / stage.name / "train_log.jsonl")[-1] for stage in recipe.stages}
    assert {"kl", "hidden", "hidden layers"} <= parts["late"].keys() and "jsd" in parts["jensen"]
    assert (out / "jensen" / "initial_states").is_dir() and not (out / "last" / "initial_states").exists()
    card = (folder / "README.md").read_text()
    assert "| perplexity, prose |" in card and "jensen" in card and "sampled" in card
    report = json.loads((out / "report" / "evaluation.json").read_text())
    assert "low" in report["differences"]["teacher"]["needle, 256 tokens"]
    text = out / "text" / "eval_long.jsonl"
    log_scale.main(["--model", str(folder), "--text", str(text), "--length", "256", "--documents", "1",
                    "--bases", "300,900", "--write"])  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["log_scale"] in (
        None, *({"base": base, "length": 0} for base in (300.0, 900.0))
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parallel
def test_the_control_with_the_other_loader(tmp_path):
    out, recipe = tmp_path / "run", control()
    world = helpers.make_world(tmp_path / "world")
    model = tiny.save_model(tiny.teacher_model("llama", num_hidden_layers=recipe.layers), tmp_path / "hf")
    flags = ("--dataloader", "dali") if has("nvidia-dali") else ()
    source = Source(model, (world["data"],))
    start = Trainings({}, {})
    recipe_run.Run(recipe, out, Processes.found(), source, start, flags).execute()
    for stage in recipe.stages:
        assert [line[0] for line in steps(out / stage.name)] == [1, 2, 3]
        assert "--hylo-control" in start.arguments[stage.name]
        assert not stage_kind(stage.kind).layerwise
    assert not (out / "student").exists()
    assert (out / f"hf-{recipe.stages[-1].name}" / "config.json").is_file()
    shutil.rmtree(out)
