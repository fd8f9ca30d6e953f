"""The program behind ``examples/upcycle_llama1b.sh`` and its sisters, with every launcher (``docs/examples.md``)."""

import argparse
import os
import shlex
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from hylo_megatron.config import Plan
from hylo_megatron.config.geometry import geometry_name
from hylo_megatron.config.layout import ParallelLayout, Work, check_parallel_layout
from hylo_megatron.config.plan import linear_of_plan
from hylo_megatron.config.positions import window
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.pair import check_vocabularies
from hylo_megatron.data.documents import detect_format
from hylo_megatron.data.token_files import check_token_files, read_summary
from hylo_megatron.distill.losses import fitting
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line, readable_number, short
from hylo_megatron.mixers import LINEAR
from hylo_megatron.parent import bind_forks, die_with_parent
from hylo_megatron.recipes.proxy import STEPS, proxy
from hylo_megatron.recipes.published import BASES, TOKENS, published
from hylo_megatron.recipes.stage import Recipe
from hylo_megatron.recipes.window import with_window, without_mla_positions
from hylo_megatron.run.launch import Processes, start_own
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.source import ProxySource, Source
from hylo_megatron.run.world import World, exit_on_signals, under_torchrun

# Before the time limit the scheduler sends SIGTERM; training then saves and exits. Only the newest checkpoint is kept.
FLAGS = ("--exit-signal-handler",)


def value(name: str, default: str | None = None) -> str | None:
    return os.environ.get(name) or default


def number(name: str, default: int) -> int:
    """Return the variable as a number: 10000000, 1e7 and 10M are equal."""
    text = value(name, str(default))
    try:
        return readable_number(text)
    except ValueError:
        raise HyLoError(f"{name}={short(text)}: expected a whole number of 1 or more, such as {default}") from None


def words(name: str) -> list[str]:
    """Return the words of the variable, split as a shell splits them."""
    try:
        return shlex.split(value(name, ""))
    except ValueError as error:  # unclosed quotes
        raise HyLoError(f"{name}={short(value(name))}: {str(error).lower()}; close them") from None


def folder(name: str) -> Path | None:
    path = Path(value(name)) if value(name) else None
    if path and not path.is_dir():
        raise HyLoError(f"{name}={path}: no such folder")
    return path


@dataclass(frozen=True)
class Job:
    """A recipe with its inputs, as given by the environment variables."""

    recipe: Recipe
    out: Path
    source: Source
    flags: tuple

    def check(self, processes: Processes) -> None:
        """Refuse a job that would otherwise fail hours later."""
        base = self.source.architecture()
        if base.num_layers != self.recipe.layers:
            raise HyLoError(
                f"HF_MODEL={self.source.base} has {base.num_layers} layers, expected {self.recipe.layers}"
                f" for this recipe ({BASES[self.recipe.name.removeprefix('proxy-').removesuffix('-window')].name})"
            )
        self.recipe.check_positions()
        plan = Plan.parse(self.recipe.layers, self.recipe.plan, self.recipe.linear)
        teacher = read_architecture(self.source.teacher) if self.source.teacher else base
        try:
            student = student_architecture(base, plan, self.recipe.geometry, **self.recipe.settings)
        except HyLoError as error:
            raise HyLoError(str(error).replace("--geometry ", "GEOMETRY=")) from None
        models = {"student": student, "base": base, "teacher": teacher}
        for stage in self.recipe.stages:
            work = Work(processes=processes.ranks, seq_length=stage.seq_length, micro_batch=stage.micro_batch,
                        global_batch=stage.global_batch)  # fmt: skip
            check_parallel_layout(models, processes.layout, work)
        if self.source.base.is_dir():  # a proxy's model is made later
            check_vocabularies(base, teacher, (self.source.base, self.source.teacher or self.source.base))
        if value("FLAGS"):
            self._check_flags()

    def _check_flags(self) -> None:
        # Importing Megatron's parser takes seconds.
        from hylo_megatron.distill.command_line import check_stage, user_flags

        kinds = [(stage, stage_kind(stage.kind)) for stage in self.recipe.stages]
        for stage, kind in kinds:
            try:
                check_stage(user_flags([*stage.flags(), *fitting(self.flags, kind, stage.loss)]))
            except HyLoError as error:
                raise HyLoError(f"FLAGS={short(value('FLAGS'))}: {error}") from None
        for word in map(str, self.flags):
            if not any(fitting([word], kind, stage.loss) for stage, kind in kinds):
                raise HyLoError(f"FLAGS={word}: no stage of this recipe has a loss that reads it; leave it out")


def data_files() -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return ``DATA`` as ``(text files, token prefixes)``, one of which is empty."""
    paths = [Path(part) for part in words("DATA")]
    if not paths:
        raise HyLoError("DATA is not set: jsonl or text files, or the prefix of tokens made by hylo prepare-data")
    tokens = tuple(path for path in paths if Path(f"{path}.idx").is_file())
    inputs = tuple(path for path in paths if path.is_file())
    for path in paths:
        if path not in tokens + inputs:
            raise HyLoError(f"DATA={path}: no such file, and no {path}.idx of hylo prepare-data either")
    for path in inputs:
        detect_format(path)
    for path in tokens:
        check_token_files(path)
        if Path(f"{path}.json").is_file() and read_summary(path).get("pack_length"):
            raise HyLoError(
                f"DATA={path} is packed to one length, but the recipe trains at three: prepare complete documents,"
                " without --pack-length"
            )
    if tokens and inputs:
        raise HyLoError(f"DATA has text ({inputs[0]}) and tokens ({tokens[0]}): give only one of the two kinds")
    return inputs, tokens


def source_of(out: Path, name: str, small: bool) -> Source:
    teacher, held_out, tokens = folder("TEACHER"), folder("EVAL"), out / "data" / "train"
    if held_out and not (held_out / "eval_prose.jsonl").is_file():
        raise HyLoError(f"EVAL={held_out}: has no eval_prose.jsonl; expected a folder as hylo fetch-text makes it")
    if small:
        if value("HF_MODEL") or value("DATA"):
            raise HyLoError("PROXY=1 makes a model and text of its own: leave out HF_MODEL and DATA")
        return ProxySource(out / "proxy", BASES[name], tokens, teacher, held_out)
    if not value("HF_MODEL"):
        raise HyLoError(
            f"HF_MODEL is not set: the folder of {BASES[name].name} as downloaded (config.json, *.safetensors,"
            " tokenizer), e.g. HF_MODEL=models/base DATA=text.jsonl; PROXY=1 tries the recipe without it"
        )
    base = folder("HF_MODEL")
    inputs, prefixes = data_files()
    return Source(base, prefixes or (tokens,), inputs, teacher, held_out)


def window_of(text: str) -> str:
    try:
        found = window(text)
    except argparse.ArgumentTypeError as error:
        raise HyLoError(f"WINDOW={error}") from None
    if not found:
        raise HyLoError(f"WINDOW={text}: expected SIZE+SINKS, such as 256+4:all; leave it out for none")
    return text


def job_of(name: str) -> Job:
    small = value("PROXY", "0") == "1"
    if not small and value("PROXY", "0") != "0":
        raise HyLoError(f"PROXY={short(value('PROXY'))}: expected 1, or 0 for a run with HF_MODEL and DATA")
    base = BASES[name]
    plan = Plan.parse(base.layers, value("PLAN", base.plan), value("LINEAR"), asked="PLAN=").name
    linear = value("LINEAR") or linear_of_plan(value("PLAN", "")) or LINEAR[0]
    geometry = value("GEOMETRY", "native" if value("WINDOW") else "published")
    geometry_name(geometry, "GEOMETRY=")
    recipe = published(name, value("PLAN"), linear, number("TOKENS", TOKENS), number("SEED", 1234), geometry)
    if small:
        recipe = proxy(recipe, base, number("STEPS", STEPS))
    elif value("STEPS"):
        recipe = replace(recipe, stages=tuple(replace(s, steps=number("STEPS", 1)) for s in recipe.stages))
    if value("WINDOW"):
        if recipe.init == "svd":  # would count near tokens twice
            raise HyLoError(f"WINDOW={value('WINDOW')}: needs GEOMETRY=native, which is calibrated on text")
        recipe = without_mla_positions(with_window(recipe, window_of(value("WINDOW"))))
    recipe = replace(recipe, save_every=number("SAVE_EVERY", recipe.save_every))
    out = Path(value("OUT", os.path.join("runs", f"{recipe.name}-{plan}")))
    flags = (*FLAGS, "--data-cache-path", out / "data" / "cache", *words("FLAGS"))
    return Job(recipe, out, source_of(out, name, small), flags)


def processes_of(world: World | None) -> Processes:
    """Return the ranks of ``world`` or of this machine, with the layout that the variables say."""
    layout = ParallelLayout(tp=number("TP", 1), pp=number("PP", 1), cp=number("CP", 1))
    if world:
        return Processes.among(world.size, "ranks of torchrun", layout, cuda_graph=False)
    return Processes.found(layout, cuda_graph=False)


def run(name: str, world: World | None) -> None:
    """Run the recipe on all ranks of ``world``.

    Without a world, run it in this process, or replace this process by torchrun if several ranks are needed.
    """
    job, processes = job_of(name), processes_of(world)
    job.check(processes)
    if not world and processes.ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        os.execv(launcher[0], [*launcher, "--nproc-per-node", str(processes.ranks), sys.argv[0]])
    start = world.start if world else start_own
    Run(job.recipe, job.out, processes, job.source, start, job.flags, beside=False).execute()


@command_line
def main(name: str) -> None:
    warnings.simplefilter("ignore")
    die_with_parent()
    bind_forks()
    exit_on_signals()
    world = World() if under_torchrun() else None
    if world is None:
        run(name, None)
    elif world.rank:
        world.follow()
    else:
        with world.leading():
            run(name, world)
