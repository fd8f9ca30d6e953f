"""Runs a recipe: fetch -> convert -> upcycle -> train stages -> export -> evaluate -> generate.

Every step writes its result under its final name only when it is whole, so the same command goes on where it stopped.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from hylo_megatron.config import parse_plan, plan_name
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf, smollm2
from hylo_megatron.convert.checkpoint import TRACKER
from hylo_megatron.data import prepare, text
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import Settings, evaluate
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.recipes.table import closing_table
from hylo_megatron.recipes.training_process import fast_bf16, train

PROMPT = "What is the capital of France?"


class Run:
    """One run of ``recipe`` in folder ``out``; ``execute()`` does what is not done yet."""

    def __init__(self, recipe: Recipe, out: Path, tp: int = 1, pp: int = 1):
        self.recipe, self.out, self.tp, self.pp = recipe, out, tp, pp
        self.logs, self.started, self.number = out / "logs", time.time(), 0
        self.hf, self.teacher, self.text, self.data = out / "hf", out / "teacher", out / "text", out / "data" / "train"
        self.total = 8 + 2 * len(recipe.stages)

    def _claim(self) -> None:
        """The folder belongs to one recipe: going on with another one would mix two runs."""
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.out / "data").mkdir(exist_ok=True)
        path, mine = self.out / "recipe.json", json.loads(json.dumps(asdict(self.recipe)))
        if path.is_file() and json.loads(path.read_text()) != mine:
            raise HyLoError(f"{self.out} holds a run with other settings ({path}); choose another OUT, or remove it")
        path.write_text(json.dumps(mine, indent=1))

    def step(self, what: str, done: Path, action: Callable[[], object]) -> None:
        self.number += 1
        label = f"[{self.number:2d}/{self.total}] {what}"
        if done.exists():
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

    def measure(self, name: str, folder: Path, teacher: Path | None = None) -> None:
        """Perplexity of ``folder``, the last time with the teacher, needles and pictures."""
        r, final = self.recipe, teacher is not None
        settings = Settings(
            context=r.eval_context, ppl_tokens=r.eval_tokens, needle_lengths=r.needle_lengths,
            needle_samples=r.needle_samples, needle_depths=r.needle_depths, skip=() if final else ("needle",),
            dtype="bfloat16" if fast_bf16() else "float32",
        )  # fmt: skip
        report = evaluate(
            folder, teacher_dir=teacher, out_dir=self.out / "report" if final else None,
            prose=self.text / "eval_prose.jsonl", code=self.text / "eval_code.jsonl",
            curves=[self.out / s.name / "train_log.jsonl" for s in r.stages] if final else (), settings=settings,
        )  # fmt: skip
        scratch = self.out / f"eval-{name}.json.partial"
        scratch.write_text(json.dumps(report, indent=1, default=str))
        os.replace(scratch, self.out / f"eval-{name}.json")

    def upcycle(self) -> None:
        from hylo_megatron.init.calibration import calibration_tokens
        from hylo_megatron.init.upcycle import upcycle

        tokens = calibration_tokens(
            self.text / "train.jsonl", self.hf, self.recipe.calibration_tokens, self.recipe.calibration_length
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        upcycle(self.teacher, self.out / "student", self.plan(), tokens_BS=tokens, device=device)

    def plan(self) -> tuple[str, ...]:
        return parse_plan(30, self.recipe.plan, self.recipe.linear)

    def train(self, stage: Stage, student: Path) -> Path:
        """The stage's checkpoint folder, trained to its last step."""
        self.number += 1
        save, label = self.out / stage.name, f"[{self.number:2d}/{self.total}] {stage.name}"
        tracker = save / TRACKER
        if tracker.is_file() and tracker.read_text().strip() == str(stage.steps):
            print(f"{label}: done before", flush=True)
            return save
        print(f"{label}: {stage.steps} steps, {stage.tokens:,} tokens of {stage.seq_length}", flush=True)
        started = time.time()
        log = self.logs / f"{stage.name}.log"
        train(stage, student, self.teacher, save, self.data, self.tp, self.pp, self.recipe.save_every, log)
        print(f"      {time.time() - started:.0f} s", flush=True)
        return save

    def export(self, name: str, checkpoint: Path) -> Path:
        folder = self.out / f"hf-{name}"
        if not folder.exists():
            with (self.logs / "steps.log").open("a") as log, contextlib.redirect_stderr(log):
                megatron_to_hf.convert(checkpoint, folder, torch.bfloat16)
        return folder

    def execute(self) -> None:
        self._claim()
        print(f"{self.recipe.name}: {plan_name(self.plan())}, TP {self.tp} PP {self.pp}, in {self.out}", flush=True)
        text_out = self.text / "eval_code.jsonl"
        self.step("fetch SmolLM2-135M-Instruct", self.hf, lambda: smollm2.main(["--out", str(self.hf)]))
        self.step("fetch text", text_out, lambda: text.main(["--out", str(self.text)]))
        self.step(
            "tokens", self.data.with_suffix(".json"),
            lambda: prepare.main(
                ["--input", str(self.text / "train.jsonl"), "--tokenizer", str(self.hf), "--out", str(self.data)]
            ),
        )  # fmt: skip
        self.step("convert to Megatron", self.teacher, lambda: hf_to_megatron.convert(self.hf, self.teacher))
        student = self.out / "student"
        self.step(f"upcycle to {plan_name(self.plan())}", student, self.upcycle)
        measured = "eval-init.json"
        folder = self.export("init", student)
        self.step("evaluate the start", self.out / measured, lambda: self.measure("init", folder))
        for stage in self.recipe.stages:
            student = self.train(stage, student)
            folder, last = self.export(stage.name, student), stage is self.recipe.stages[-1]
            what = "evaluate, teacher beside student" if last else f"evaluate {stage.name}"
            self.step(
                what, self.out / f"eval-{stage.name}.json",
                lambda f=folder, n=stage.name, t=self.hf if last else None: self.measure(n, f, t),
            )  # fmt: skip
        self.step("generate", self.out / "sample.json", lambda: self.generate(folder))
        self.number = self.total
        print(closing_table(self.out, self.recipe, time.time() - self.started))

    def generate(self, folder: Path) -> None:
        """One greedy answer of teacher and student, through transformers."""
        import transformers

        import hylo_megatron  # noqa: F401  registers the model class

        answers = {"prompt": PROMPT}
        for name, path in (("teacher", self.hf), ("student", folder)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path)
            chat = [{"role": "user", "content": PROMPT}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            answers[name] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        (self.out / "sample.json").write_text(json.dumps(answers, indent=1))
