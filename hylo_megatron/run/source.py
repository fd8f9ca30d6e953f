"""Inputs of a run: the base model, optionally another teacher, training text and held-out text."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hylo_megatron.config import Architecture
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.corpus import smollm2, text
from hylo_megatron.data import prepare
from hylo_megatron.recipes import proxy
from hylo_megatron.recipes.published import Base


class Step(NamedTuple):
    """A step before all others; it is done when ``done`` exists."""

    what: str
    action: Callable[[], object]
    done: Path


@dataclass
class Source:
    """Files from which a run starts.

    ``tokens``: prefixes of token files, which ``make_tokens`` writes if ``inputs`` are given. ``teacher``: None for
    the base model itself. ``held_out``: folder of held-out text, as ``hylo fetch-text`` writes it, or None.
    """

    base: Path
    tokens: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    teacher: Path | None = None
    held_out: Path | None = None

    def steps(self) -> list[Step]:
        return []

    def architecture(self) -> Architecture:
        """Return the base model's architecture. Raises ``HyLoError``."""
        return read_architecture(self.base)

    def make_tokens(self) -> None:
        if self.inputs and not self.tokens[0].with_name(self.tokens[0].name + ".json").is_file():
            prepare.prepare(list(self.inputs), self.base, self.tokens[0], workers=os.cpu_count() or 1)

    def to_dict(self) -> dict:
        """Return what must not change when a run is continued."""
        values = {"base": self.base, "teacher": self.teacher or self.base, "data": self.inputs or self.tokens}
        return json.loads(json.dumps(values, default=lambda path: str(path.resolve())))


class FetchedSource(Source):
    """SmolLM2-135M-Instruct and free text, fetched into the run's folder."""

    def __init__(self, out: Path, mix: str):
        folder = out / "text"
        super().__init__(out / "hf", (out / "data" / "train",), (folder / "train.jsonl",), held_out=folder)
        self.mix = mix

    def steps(self) -> list[Step]:
        base, folder = self.base, self.held_out
        return [
            Step("fetch SmolLM2-135M-Instruct", lambda: smollm2.main(["--out", str(base)]), base),
            Step("fetch text", lambda: text.main(["--out", str(folder), "--mix", self.mix]), folder / "SOURCES.md"),
        ]

    def to_dict(self) -> dict:
        return {}  # the sources are fixed, wherever the run's folder is


class ProxySource(Source):
    """A random model of the base's family with its tokenizer, and text, all made in ``folder``."""

    def __init__(self, folder: Path, base: Base, tokens: Path, teacher: Path | None, held_out: Path | None):
        super().__init__(folder / "model", (tokens,), (folder / "train.jsonl",), teacher, held_out)
        self.folder, self.model = folder, base

    def steps(self) -> list[Step]:
        return [Step("make a random model and text", lambda: proxy.write_inputs(self.folder, self.model), self.base)]

    def architecture(self) -> Architecture:
        """Return the architecture before the model is made, but for its vocabulary: layouts are refused at once."""
        values = proxy.small_values(self.model, proxy.VOCAB)
        return Architecture(
            model_type=self.model.model_type, plan=("attention",) * values.pop("num_hidden_layers"),
            qk_norm=self.model.model_type == "qwen3", **values,
        )  # fmt: skip

    def to_dict(self) -> dict:
        return {}
