"""Text that a stage's student writes itself, in a recipe's mix."""

from dataclasses import replace

import pytest
from helpers import text
from helpers.hf import model_of

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.convert.card_records import _stage  # noqa: E402
from hylo_megatron.data.prepare import prepare  # noqa: E402
from hylo_megatron.data.token_files import read_summary  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.json_file import read_json  # noqa: E402
from hylo_megatron.recipes.smollm2 import smollm2_cpu, smollm2_gpu  # noqa: E402
from hylo_megatron.run import on_policy  # noqa: E402
from hylo_megatron.run.datasets import data_path, make_datasets, mix_of  # noqa: E402
from hylo_megatron.run.launch import Processes  # noqa: E402
from hylo_megatron.run.recipe_run import Run  # noqa: E402
from hylo_megatron.run.sampled import with_sampled  # noqa: E402
from hylo_megatron.run.source import Source  # noqa: E402


@pytest.mark.parametrize("recipe", [smollm2_cpu(), smollm2_gpu()], ids=lambda recipe: recipe.name)
def test_the_share_is_one_of_the_plain_text_of_distillation(recipe):
    assert on_policy.with_on_policy(recipe, 0.0) == recipe
    assert all("on_policy" not in stage for stage in recipe.to_dict()["stages"])  # recipes of earlier versions
    mixed = on_policy.with_on_policy(with_sampled(recipe, 0.5), 0.4)
    assert mixed.stages[0].on_policy == 0 and mix_of(mixed.stages[0]) == mixed.stages[0].mix
    for stage in mixed.stages[1:]:
        old, new = dict(stage.mix), dict(mix_of(stage))
        plain = old["sampled"] + old.get("text", 0) + old.get("long", 0)
        assert sum(new.values()) == pytest.approx(1) and new["on-policy"] == pytest.approx(0.4 * plain)
        assert new["sampled"] == pytest.approx(0.6 * old["sampled"])
        assert all(new[name] == part for name, part in old.items() if name in ("chat", "retrieval"))
        assert on_policy.on_policy_tokens(stage) >= 0.4 * plain * stage.tokens
    assert all(stage.on_policy == 0 for stage in mixed.as_control().stages)
    assert "; 40% of the plain text by the student" in _stage(mixed.to_dict()["stages"][-1], 1).mix


@pytest.mark.parametrize(
    "index, changes, message",
    [
        (0, dict(on_policy=0.3), "stage ild: on_policy 0.3: a stage of kind ild reads the teacher's states"),
        (1, dict(on_policy=1.3), "expected a share from 0 to 1"),
        (1, dict(on_policy=-0.1), "expected a share from 0 to 1"),
        (1, dict(on_policy=0.3, mix=(("chat", 1.0),)), "its mix has no plain text to replace"),
    ],
)
def test_refused_before_anything_starts(tmp_path, index, changes, message):
    stages = list(smollm2_gpu().stages)
    stages[index] = replace(stages[index], **changes)
    with pytest.raises(HyLoError, match=message):
        Run(replace(smollm2_gpu(), stages=tuple(stages)), tmp_path / "out", Processes.found()).execute()
    assert not (tmp_path / "out").exists()


def test_token_files_cannot_be_mixed_with_it(tmp_path):
    recipe = on_policy.with_on_policy(smollm2_cpu(), 0.3)
    source = Source(tmp_path / "hf", (tmp_path / "mine",))
    with pytest.raises(HyLoError, match=r"needs the training text as text files, found token files .*mine"):
        Run(recipe, tmp_path / "out", Processes.found(), source).execute()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model_of(("mla", "gdn"), vocab_size=300).save_pretrained(folder)
    return text.make_tokenizer(folder)


SMALL = ("--length", "40", "--rows-per-shard", "8", "--shortest", "1", "--start-token", "the")


def test_a_hybrid_writes_the_text_of_a_stage(student, tmp_path):
    data = tmp_path / "data"
    stage = replace(smollm2_cpu().stages[1], seq_length=32, steps=1, global_batch=1, on_policy=0.5)
    recipe = replace(smollm2_cpu(), stages=(stage,))
    prepare([text.write(tmp_path / "train.jsonl", *({"text": "the quick fox " * 40} for _ in range(20)))], student,
            data / "train")  # fmt: skip
    make_datasets(recipe, data, student)
    assert not on_policy.packed(data, stage).exists()  # its student does not exist yet
    on_policy.write_on_policy(stage, student, tmp_path / "own", data, tokenizer=student, seed=3, more=SMALL)
    shares = data_path(data, stage)
    assert shares == ["0.5", str(data / "text-32"), "0.5", str(data / "on-policy-distill")]
    summary = read_summary(data / "on-policy-distill")
    assert summary["pack_length"] == 33 and summary["sequences"] >= stage.samples(0.5)
    about = read_json(tmp_path / "own" / "sampled.json")
    assert about["settings"]["engine"] == "transformers" and about["settings"]["seed"] == 3


class Recorded(Run):
    """A run whose trainings, exports and measurements are only noted."""

    def train(self, index):
        self.notes.append(f"train {self.recipe.stages[index].name}")
        return self.out / self.recipe.stages[index].name

    def export(self, name, checkpoint):
        self.notes.append(f"export {name}")
        return self.out / f"hf-{name}"


def test_each_stage_reads_its_own_students_text(tmp_path, monkeypatch):
    recipe = on_policy.with_on_policy(smollm2_gpu(), 0.3)
    source = Source(tmp_path / "hf", (tmp_path / "out" / "data" / "train",))
    run = Recorded(recipe, tmp_path / "out", Processes.found(), source)
    run.notes = []

    def write(stage, student, out, data, *, tokenizer, seed):
        run.notes.append(f"{stage.name} from {student.name}, seed {seed}")
        on_policy.packed(data, stage).write_text("{}")

    monkeypatch.setattr(on_policy, "write_on_policy", write)
    run.logs.mkdir(parents=True)
    run.data.mkdir()

    def stages():
        run.own_text(0, "init", run.student)
        for index, stage in enumerate(recipe.stages):
            run.own_text(index + 1, stage.name, run.train(index))

    stages()
    assert run.notes == [
        "train ild", "export ild", "distill-2k from hf-ild, seed 1235",
        "train distill-2k", "export distill-2k", "distill-8k from hf-distill-2k, seed 1236",
        "train distill-8k", "export distill-8k", "distill-32k from hf-distill-8k, seed 1237",
        "train distill-32k",
    ]  # fmt: skip
    run.notes.clear()
    stages()  # continued: the text is there
    assert run.notes == [f"train {stage.name}" for stage in recipe.stages]
