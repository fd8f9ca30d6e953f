"""The ``lm_eval`` command on exported folders, with local tasks: nothing is downloaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import hybrid, write_hybrid, write_tokenizer

from hylo_megatron.convert.megatron_to_hf import convert
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

QUESTIONS = [f"w{i + 5} w{i + 6} w{i + 7}" for i in range(6)]
CHOICES = [[f"w{i + 40}", f"w{i + 60} w{i + 61}", f"w{i + 80}"] for i in range(6)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{answer}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
ANSWER = """
output_type: generate_until
generation_kwargs: {until: ["</s>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
# In the process of lm_eval: the package is not installed.
WITHOUT_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "hylo_megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def write_task(folder: Path, name: str, rows: list[dict], rest: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest)


def expected(folder: Path) -> tuple[list[list[float]], list[str]]:
    """Return the log likelihood of every choice, and the greedy answers, by the package's own model."""
    model = HyLoForCausalLM.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def likelihood(question: str, choice: str) -> float:
        both = torch.tensor([ids(question) + ids(choice)])
        logs = model(both).logits[0, :-1].log_softmax(-1).gather(1, both[0, 1:, None])
        return logs[len(ids(question)) - 1 :].sum().item()

    with torch.no_grad():
        scores = [[likelihood(q, choice) for choice in row] for q, row in zip(QUESTIONS, CHOICES, strict=True)]
        options = dict(max_new_tokens=4, do_sample=False)
        answers = [model.generate(torch.tensor([ids(q)]), **options)[0, 3:].tolist() for q in QUESTIONS]
    return scores, [" ".join(f"w{token}" for token in answer) for answer in answers]


@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "with the package"])
def test_choices_and_generated_answers(with_code, tmp_path):
    arch, folder = hybrid("kda"), tmp_path / "model"
    write_hybrid(tmp_path / "ckpt", arch)
    convert(tmp_path / "ckpt", folder, with_code=with_code)
    write_tokenizer(folder, arch.vocab_size)
    scores, answers = expected(folder)
    best = [row.index(max(row)) for row in scores]
    rows = [dict(q=q, choices=c, answer=b) for q, c, b in zip(QUESTIONS, CHOICES, best, strict=True)]
    rows[0]["answer"] = (best[0] + 1) % 3  # one wrong answer of six
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(tasks, "tiny_choice", rows, CHOICE)
    answered = [dict(q=q, answer=answer) for q, answer in zip(QUESTIONS, answers, strict=True)]
    write_task(tasks, "tiny_answer", [*answered[:-1], {**answered[-1], "answer": "w0"}], ANSWER)
    start = (WITHOUT_PACKAGE if with_code else "") + "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [
        *(sys.executable, "-c", start, "--model", "hf"),
        *("--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"),
        *("--include_path", tasks, "--tasks", "tiny_choice,tiny_answer", "--device", "cpu", "--batch_size", "4"),
        *("--output_path", tmp_path / "out", "--log_samples"),
    ]
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    assert result["tiny_choice"]["acc,none"] == pytest.approx(5 / 6)
    assert result["tiny_answer"]["exact_match,none"] == pytest.approx(5 / 6)
    samples = next((tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")).read_text().splitlines()
    for sample in map(json.loads, samples):
        got = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert got == pytest.approx(scores[sample["doc_id"]], abs=1e-3)
