"""The progress of a stage that another process trains."""

import json
from types import SimpleNamespace

from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run import training_process


def line(iteration: int, seconds: float | None) -> str:
    values = dict(
        stage="distill", iteration=iteration, loss=2.5, tokens=64 * iteration, lr=1e-3, grad_norm=1.0, memory_gib=0.0
    )
    return json.dumps(values | dict(seconds=seconds)) + "\n"


def test_a_resumed_stage_starts_and_a_first_step_has_no_speed(tmp_path, capsys, monkeypatch):
    log, polls = tmp_path / "train_log.jsonl", iter([None, (3, None), (4, 0.5), 0])
    log.write_text(line(2, 0.25))

    def poll():
        found = next(polls)
        if isinstance(found, tuple):
            with log.open("a") as file:
                file.write(line(*found))
            return None
        return found

    monkeypatch.setattr(training_process, "POLL_SECONDS", 0)
    monkeypatch.setattr(training_process, "SHOW_SECONDS", -1)
    training = training_process.TrainingProcess.__new__(training_process.TrainingProcess)
    training.stage = Stage(name="short", kind="distill", seq_length=16, global_batch=4, steps=5, lr=1e-3)
    training.steps, training.log, training.process = log, log, SimpleNamespace(poll=poll)
    training.wait()
    shown = [text.strip() for text in capsys.readouterr().out.splitlines()]
    assert shown == [
        "short: starting, 0 s",
        "short: step 3/5, loss 2.500",
        "short: step 4/5, loss 2.500, 128 tokens/s",
    ]
