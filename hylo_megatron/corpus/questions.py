"""Questions for ``hylo evaluate --choice`` and ``--answers``, from the BIG-bench package (Apache-2.0).

They are for evaluation only. Every row keeps BIG-bench's canary, by which others keep such text out of training.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.corpus.download import Wheel, cache_folder, fetch_wheel
from hylo_megatron.files import write_text
from hylo_megatron.flags import Parser, command_line

BIG_BENCH = Wheel(
    "bigbench",
    "1.0.0",
    "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    source=True,
)
FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks"
CHOICE = (
    "social_iqa", "goal_step_wikihow/goal_inference", "general_knowledge", "intent_recognition", "timedial",
    "understanding_fables", "hindu_knowledge", "date_understanding",
)  # fmt: skip
ANSWERS = ("qa_wikidata", "disfl_qa", "arithmetic/2_digit_addition", "object_counting")
MOST_OPTIONS = 26


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Rows of one task for ``name``.jsonl. ``left_out``: examples that have no single right answer."""

    name: str
    rows: list[dict]
    left_out: int


def choice_row(example: dict) -> dict | None:
    """Return the question with the options and the only right one; None if several are right, or none."""
    scores = {option.strip(): score for option, score in example.get("target_scores", {}).items()}
    best = [option for option, score in scores.items() if score == max(scores.values())]
    if len(best) != 1 or not 2 <= len(scores) <= MOST_OPTIONS or not all(scores):
        return None
    return {"options": list(scores), "answer": best[0]}


def answers_row(example: dict) -> dict | None:
    """Return the question with its right answers; None if it has none."""
    target = example.get("target") or []
    answers = [answer for answer in ([target] if isinstance(target, str) else target) if answer.strip()]
    return {"answers": answers} if answers else None


def convert(task: str, content: dict) -> Converted:
    """Return the rows of one task of BIG-bench."""
    read = choice_row if task in CHOICE else answers_row
    prefix = content.get("task_prefix", "").strip()
    rows = []
    for example in content["examples"]:
        question = "\n".join(filter(None, [prefix, example["input"].strip()]))
        if question and (found := read(example)):
            rows.append({"question": question, **found, "canary": content["canary"]})
    return Converted(name=Path(task).name, rows=rows, left_out=len(content["examples"]) - len(rows))


def converted(archive: Path) -> Iterator[Converted]:
    """Yield the tasks of ``CHOICE`` and ``ANSWERS`` from BIG-bench's source package, which is not unpacked."""
    wanted = {f"{FOLDER}/{task}/task.json": task for task in (*CHOICE, *ANSWERS)}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted:
                yield convert(wanted.pop(member.name), json.load(tar.extractfile(member)))
            if not wanted:
                return


@command_line
def main() -> None:
    """Run ``hylo fetch-questions``."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for the .jsonl files, choice/ and answers/")
    parser.add_argument("--cache", help="folder for downloads (default $HYLO_CACHE or ~/.cache/hylo_megatron)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)  # fails now, not after the download
    names = {Path(task).name for task in CHOICE}
    for task in converted(fetch_wheel(BIG_BENCH, cache_folder(arguments.cache))):
        folder = arguments.out / ("choice" if task.name in names else "answers")
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in task.rows)
        write_text(folder / f"{task.name}.jsonl", "".join(lines))
        print(f"{folder.name}/{task.name}.jsonl: {len(task.rows)} questions, {task.left_out} left out", flush=True)
    write_text(
        arguments.out / "SOURCES.md",
        f"Questions of {BIG_BENCH.package} {BIG_BENCH.version} (Apache-2.0), sha256 {BIG_BENCH.sha256}.\n"
        "For evaluation only: never train on them.\n",
    )
