"""BIG-bench's tasks as question files, from a package made here."""

import io
import json
import tarfile

from helpers.evaluation import write_lines

from hylo_megatron.corpus import questions
from hylo_megatron.evaluate.questions import read_answers, read_choices

CANARY = "never train on this"


def test_tasks_become_files_that_the_evaluation_reads(tmp_path):
    choice = [
        {"input": " Eyes of a horse? ", "target_scores": {" two": 1, "four ": 0}},
        {"input": "Two right ones?", "target_scores": {"a": 1, "b": 1, "c": 0}},
        {"input": "One option?", "target_scores": {"a": 1}},
        {"input": "", "target_scores": {"a": 1, "b": 0}},
    ]
    short = [
        {"input": "2 + 2", "target": "4"},
        {"input": "3?", "target": ["3", "three"]},
        {"input": "?", "target": []},
    ]
    tasks = {
        "social_iqa": {"examples": choice, "task_prefix": "", "canary": CANARY},
        "arithmetic/2_digit_addition": {"examples": short, "task_prefix": "Add:", "canary": CANARY},
        "another": {},
    }
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as tar:
        for name, content in tasks.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"{questions.FOLDER}/{name}/task.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = {task.name: task for task in questions.converted(tmp_path / "package.tar.gz")}
    assert set(found) == {"social_iqa", "2_digit_addition"} and found["social_iqa"].left_out == 3
    assert found["social_iqa"].rows == [
        {"question": "Eyes of a horse?", "options": ["two", "four"], "answer": "two", "canary": CANARY}
    ]
    assert read_choices(write_lines(tmp_path / "c.jsonl", found["social_iqa"].rows))[0].answer == 0
    numbers = read_answers(write_lines(tmp_path / "a.jsonl", found["2_digit_addition"].rows))
    assert [(short.question, short.answers) for short in numbers] == [
        ("Add:\n2 + 2", ("4",)), ("Add:\n3?", ("3", "three")),
    ]  # fmt: skip


def test_names_of_the_files_differ():
    names = [task.rsplit("/", 1)[-1] for task in (*questions.CHOICE, *questions.ANSWERS)]
    assert len(set(names)) == len(names)
