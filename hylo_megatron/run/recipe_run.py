"""Run a recipe: source -> convert -> upcycle -> training stages -> export -> evaluate -> generate.

Every step gives its result the final name only when the result is complete, so the same command continues an
interrupted run.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hylo_megatron.checkpoint import disk
from hylo_megatron.checkpoint.diverged import DIVERGED, why_diverged
from hylo_megatron.checkpoint.iterations import trained_to
from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.model_card import put_figures
from hylo_megatron.distill.losses import fitting
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import only_writer, write_text
from hylo_megatron.json_file import read_json
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.run import disk_need, memory_need, on_policy
from hylo_megatron.run.background import Background
from hylo_megatron.run.datasets import data_path, make_datasets
from hylo_megatron.run.launch import Processes, start_own
from hylo_megatron.run.measurements import Measurement
from hylo_megatron.run.sample import write_sample
from hylo_megatron.run.sampled import sampled_tokens, write_sampled
from hylo_megatron.run.source import FetchedSource, Source
from hylo_megatron.run.table import closing_table
from hylo_megatron.run.training_process import TrainingProcess


class Run:
    """One run of ``recipe`` in folder ``out``. ``execute()`` does what is not done yet.

    ``start`` starts trainings (``launch.start_own``, or that of a ``World``). ``flags`` are given to each training,
    except those that change nothing by the loss of its stage.
    ``beside``: run evaluations and the start of the next stage during a training (None: on a GPU only).
    """

    def __init__(self, recipe: Recipe, out: Path, processes: Processes, source: Source | None = None, start=start_own,
                 flags: tuple = (), beside: bool | None = None):  # fmt: skip
        self.recipe, self.out, self.processes, self.start, self.flags = recipe, out, processes, start, flags
        self.source = source or FetchedSource(out, recipe.text)
        self.logs, self.started, self.number = out / "logs", time.time(), 0
        self.hf, self.base, self.data = self.source.base, out / "teacher", out / "data"
        # Layer-wise stages compare with the base model; another teacher is used from the first stage after these.
        self.teacher = out / "other-teacher" if self.source.teacher else self.base
        self.plan = Plan.parse(recipe.layers, recipe.plan, recipe.linear)
        if recipe.control:
            self.plan = Plan(("attention",) * recipe.layers)
        self.student = self.base if recipe.control else out / "student"
        self.total = 4 - recipe.control + len(self.source.steps()) + len(recipe.stages) + (self.teacher != self.base)
        self.total += 2 + len(recipe.stages) if self.source.held_out else 0
        self.total += bool(sampled_tokens(recipe)) + sum(bool(stage.on_policy) for stage in recipe.stages)
        self.background = Background(self.logs, beside)
        self.trainings: list[TrainingProcess] = []
        self.next_training: TrainingProcess | None = None
        self.recomputed: dict[str, int] = {}  # sub-layers, of stages that memory_need.settle chose for

    def _claim(self) -> None:
        """Refuse a folder that belongs to another recipe, because two runs would be mixed."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        path, mine = self.out / "recipe.json", self.recipe.to_dict() | self.source.to_dict()
        found = read_json(path, dict[str, Any], "choose another folder, or remove it") if path.is_file() else mine
        if other := ", ".join(name for name in {**mine, **found} if found.get(name) != mine.get(name)):
            raise HyLoError(
                f"{self.out} holds a run with other settings ({path}: {other}); choose another folder, or remove it"
            )
        write_text(path, json.dumps(mine, indent=1))

    def step(self, what: str, action: Callable[[], object], done: Path | None = None) -> None:
        """Run ``action`` unless ``done`` exists. The output of ``action`` goes to the log."""
        self.number += 1
        label = f"[{self.number:2d}/{self.total}] {what}"
        if done and done.exists():
            print(f"{label}: done before", flush=True)
            return
        print(label, flush=True)
        started = time.time()
        with (
            (self.logs / "steps.log").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            action()
        print(f"      {time.time() - started:.0f} s", flush=True)

    def measure(self, name: str, model: Path, full: bool = False, report: Path | None = None) -> None:
        """Measure perplexity, and with ``full`` everything else. On a GPU the next steps do not wait for this."""
        if not self.source.held_out:
            return
        if report:
            self.background.wait("teacher")  # the report compares the student with the teacher
        job = Measurement(name, model, self.out, self.source.held_out, self.recipe, full, report)
        self.step(f"evaluate {name}", lambda: self.background.start(name, job), job.result)

    def sample_text(self) -> None:
        write_sampled(
            self.recipe, self.source.teacher or self.hf, self.out / "sampled", self.data / "sampled", self.hf
        )

    def own_text(self, index: int, name: str, checkpoint: Path) -> None:
        """Let the student before stage ``index`` write the share of its text that ``on_policy`` asks for."""
        if index == len(self.recipe.stages) or not self.recipe.stages[index].on_policy:
            return
        stage = self.recipe.stages[index]
        done, folder = on_policy.packed(self.data, stage), self.out / on_policy.ON_POLICY / stage.name

        def write():
            self.background.wait()  # the rows take the GPU's memory, which evaluations share
            student, seed = self.export(name, checkpoint), self.recipe.seed + index
            on_policy.write_on_policy(stage, student, folder, self.data, tokenizer=self.hf, seed=seed)

        self.step(f"{stage.name}: sample {on_policy.on_policy_tokens(stage):,} tokens from {name}", write, done)

    def prepare(self) -> None:
        """Make the tokens and the packed data sets of the stages."""
        self.source.make_tokens()
        self.background.start("datasets", functools.partial(make_datasets, self.recipe, self.data, self.hf))

    def upcycle(self) -> None:
        from hylo_megatron.init.calibration import calibration_tokens
        from hylo_megatron.init.upcycle import upcycle

        recipe, device = self.recipe, "cuda" if torch.cuda.is_available() else "cpu"
        tokens = calibration_tokens(
            self.source.tokens[0], self.hf, recipe.calibration_tokens, recipe.calibration_length
        )
        upcycle(
            self.base, self.out / "student", self.plan, init=recipe.init, geometry=recipe.geometry, tokens_BS=tokens,
            qk_norm=recipe.init == "svd" and Architecture.load(self.base).qk_norm, device=device,
            **recipe.settings,
        )  # fmt: skip

    def _trained(self, stage: Stage) -> bool:
        return trained_to(self.out / stage.name, stage.steps)

    def _check_not_diverged(self, stage: Stage) -> None:
        if why := why_diverged(self.out / stage.name):
            raise HyLoError(
                f"{stage.name} diverged: {why}. Run with a lower lr of this stage in another folder; or remove"
                f" {self.out / stage.name / DIVERGED} and continue with --hylo-on-spike rollback"
            )

    def _start(self, index: int) -> TrainingProcess:
        """Start the processes of a stage; they wait for the end of the previous stage."""
        stages = self.recipe.stages
        stage, save = stages[index], self.out / stages[index].name
        student = self.out / stages[index - 1].name if index else self.student
        teacher = self.base if stage_kind(stage.kind).layerwise else self.teacher
        shared = fitting(self.flags, stage_kind(stage.kind), stage.loss)
        own = replace(self.processes.fit(stage), recompute=self.recomputed.get(stage.name, stage.recompute)).flags()
        flags = [*own, *shared, "--hylo-student", student, "--hylo-teacher", teacher, "--save", save,
                 "--save-interval", self.recipe.save_every, "--hylo-keep-last", 1, "--hylo-last-weights-only",
                 "--seed", self.recipe.seed,
                 "--data-path", *data_path(self.data, stage, self.source.tokens)]  # fmt: skip
        if self.recipe.control:
            flags.append("--hylo-control")
        if index:
            flags += ["--hylo-student-iteration", stages[index - 1].steps]
        log = self.logs / f"{stage.name}.log"
        self.trainings.append(TrainingProcess(stage, flags, save, self.processes, log, self.start))
        return self.trainings[-1]

    def train(self, index: int) -> Path:
        """Train the stage to its last step and return its folder. On a GPU the next stage starts meanwhile."""
        self.number += 1
        stage = self.recipe.stages[index]
        save, label = self.out / stage.name, f"[{self.number:2d}/{self.total}] {stage.name}"
        self._check_not_diverged(stage)
        if self._trained(stage):
            print(f"{label}: done before", flush=True)
            return save
        print(f"{label}: {stage.steps} steps, {stage.tokens:,} tokens of {stage.seq_length}", flush=True)
        started = time.time()
        self.background.wait("datasets")
        torch.cuda.empty_cache()  # memory that calibration or an evaluation left
        training = self.next_training or self._start(index)
        self.next_training = None

        def start_next():
            following = self.recipe.stages[index + 1 : index + 2]
            if self.background.beside and following and not following[0].on_policy:  # its text is not written yet
                self.next_training = self._start(index + 1)

        try:
            training.wait(start_next)
        except HyLoError:
            self._check_not_diverged(stage)
            raise
        if not self._trained(stage):
            raise HyLoError(f"{stage.name} was stopped by a signal; the same command continues from its checkpoint")
        print(f"      {time.time() - started:.0f} s", flush=True)
        return save

    def export(self, name: str, checkpoint: Path) -> Path:
        folder = self.out / f"hf-{name}"
        if not folder.exists():
            with (self.logs / "steps.log").open("a") as log, contextlib.redirect_stderr(log):
                megatron_to_hf.convert(checkpoint, folder, torch.bfloat16)
        return folder

    def execute(self) -> None:
        self.recipe.check_positions()
        on_policy.check(self.recipe, self.data, self.source.tokens)
        self.processes.fit_all(self.recipe.stages)
        with disk.writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        with only_writer(self.out / ".running", str(self.out)):
            self._execute_alone()

    def _execute_alone(self) -> None:
        with disk.writing(self.out):
            self._claim()
        print(f"{self.recipe.name}: {self.plan.name}, {self.processes}, in {self.out}", flush=True)
        try:
            with disk.writing(self.out):
                self._execute()
        except BaseException:
            self.background.stop()
            for training in self.trainings:
                training.stop()
            raise

    def _execute(self) -> None:
        for step in self.source.steps():
            self.step(*step)
        if tokens := sampled_tokens(self.recipe):  # before an evaluation shares the GPU
            done = self.data / "sampled.json"
            self.step(f"sample {tokens:,} tokens from the teacher", self.sample_text, done)
        self._check_room()
        self.measure("teacher", self.hf, full=True)
        self.step("tokens", self.prepare)
        self.step("convert to Megatron", lambda: hf_to_megatron.convert(self.hf, self.base), self.base)
        if self.source.teacher:
            convert = functools.partial(hf_to_megatron.convert, self.source.teacher, self.teacher)
            self.step("convert the teacher", convert, self.teacher)
        if not self.recipe.control:
            self.step(f"upcycle to {self.plan.name}", self.upcycle, self.student)
        self.own_text(0, "init", self.student)
        if self.source.held_out:
            self.measure("init", self.export("init", self.student))
        for index, stage in enumerate(self.recipe.stages):
            checkpoint, last = self.train(index), stage is self.recipe.stages[-1]
            self.own_text(index + 1, stage.name, checkpoint)
            if last or self.source.held_out:
                folder = self.export(stage.name, checkpoint)
                self.measure(stage.name, folder, full=last, report=self.out / "report" if last else None)
        sample = self.out / "sample.json"
        self.step("generate", lambda: write_sample(self.hf, folder, sample), sample)
        self.background.wait()
        self._close(folder)

    def _check_room(self) -> None:
        """Refuse a run that the disk or a GPU has no room for."""
        student = base = read_architecture(self.hf)
        if not self.recipe.control:
            student = student_architecture(base, self.plan, self.recipe.geometry, **self.recipe.settings)
        disk_need.check(self, student)
        teacher = read_architecture(self.source.teacher) if self.source.teacher else base
        self.recomputed = memory_need.settle(self, student, base.as_teacher(), teacher.as_teacher())

    def _close(self, folder: Path) -> None:
        if not self.source.held_out:
            print(f"model: {folder}   {(time.time() - self.started) / 60:.1f} minutes", flush=True)
            return
        table = closing_table(self.out, self.recipe, self.processes, time.time() - self.started)
        write_text(self.out / "report" / "run.md", table + "\n")
        try:
            put_figures(folder, self.out / "report" / "evaluation.json")
        except HyLoError as error:  # a person, or an earlier version, wrote this card
            print(f"model card left as it is: {error}")
        print(table)
