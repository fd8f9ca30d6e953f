"""The model card of exported folders: what it says, and that it never replaces what a person wrote."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import GEOMETRY, hybrid, write_hybrid

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.convert import megatron_to_hf, model_card
from hylo_megatron.convert.card_records import Origin, Text, TrainedStage, origin_of
from hylo_megatron.corpus.sources import SMALL_MIX
from hylo_megatron.corpus.text import sources_page
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.smollm2 import smollm2_gpu


def a_run(out: Path) -> Path:
    """A recipe's folder after its second stage, as far as a card reads it. Returns the stage's checkpoint."""
    for folder in ("text", "hf"):
        (out / folder).mkdir(parents=True)
    (out / "recipe.json").write_text(json.dumps(smollm2_gpu().to_dict()))
    rows = [dict(source=source, documents=1, characters=2, dropped=0) for source in SMALL_MIX]
    (out / "text" / "SOURCES.md").write_text(sources_page(rows))
    (out / "hf" / "hylo_source.json").write_text("{}")
    write_hybrid(out / "distill-2k", hybrid())
    return out / "distill-2k"


def a_report(plan, perplexity: float = 9.5) -> dict:
    part = {"loss": 2.25, "perplexity": perplexity, "tokens": 1000, "documents": 3, "by_position": []}
    model = {"name": "hf", "plan": list(plan), "parameters": 10**6, "kv_cache_bytes_per_token": 128, "vocabulary": 300}
    return {
        "model": model | {"perplexity": {"prose": part}},
        "settings": {"context": 2048, "seed": 7},
        "device": "cpu",
        "dtype": "float32",
        "versions": {"torch": "2", "transformers": "5"},
    }


def front_matter(folder: Path) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


def card_of(arch, folder: Path) -> tuple[str, str]:
    """Return the card of a model, and its part on use as one line."""
    model_card.write_card(folder, arch, Origin(), with_code=False)
    card = (folder / model_card.NAME).read_text()
    return card, " ".join(card.partition("## Use")[2].partition("## Architecture")[0].split())


ALL_MLA, WINDOW = {"plan": ("mla",) * 4}, {"size": 8, "sinks": 2}
SERVES = "To serve: `vllm serve FOLDER`"
WIDE = replace(GEOMETRY, mla=replace(GEOMETRY.mla, kv_lora_rank=1024))
USES = {  # a student, and what its card says of vLLM
    "gdn": (hybrid(), SERVES),
    "mamba2 with a window": (hybrid("mamba2", window=WINDOW), SERVES),
    "gdn with positions": (hybrid("gdn", linear_rope=True), SERVES),
    "windows beside all": (hybrid(window=WINDOW | {"mla": True}), SERVES),
    "all gdn": (hybrid(plan=("gdn",) * 4), SERVES),
    "all MLA": (hybrid(**ALL_MLA), SERVES),
    "kda": (hybrid("kda"), SERVES),
    "all MLA with windows": (
        hybrid(**ALL_MLA, window=WINDOW | {"mla": True}),
        "vLLM does not serve this model (window in config.json: not supported for a hybrid: vLLM keeps windows among",
    ),
    "kda with positions": (
        hybrid("kda", linear_rope=True),
        "on a CPU: `vllm serve FOLDER`, in an environment with vLLM and hylo-megatron (`pip install -e '.[serve-cpu]'`"
        " in a clone of its repository). vLLM does not serve this model on a GPU (linear_rope in config.json: not",
    ),
    "wide latents": (hybrid(geometry=WIDE), "does not serve this model on a GPU (MLA's kv_lora_rank 1024: no kernel"),
}


@pytest.mark.parametrize("name", USES)
def test_the_card_says_what_vllm_serves(name, tmp_path):
    arch, words = USES[name]
    use = card_of(arch, tmp_path)[1]
    assert words in use
    assert ("`vllm serve FOLDER`" in use) == (name != "all MLA with windows")
    assert use.count("does not serve") == (words != SERVES)


def test_the_card_says_what_vllm_pads(tmp_path):
    use = card_of(hybrid(), tmp_path)[1]
    assert "- In vLLM on a GPU, MLA of latent 24+8," in use and "bytes of cache a token and layer instead of" in use


@pytest.mark.parametrize("plan, title", [
    (("mla", "gdn", "gdn", "mla"), "2MLA2GDN: a hybrid of MLA and linear attention"),
    (("mla",) * 4, "4MLA: a model with MLA only"),
    (("gdn",) * 4, "4GDN: a model with linear attention only"),
])  # fmt: skip
def test_the_card_names_the_layers_that_the_model_has(plan, title, tmp_path):
    card, tags = card_of(hybrid(plan=plan), tmp_path)[0], front_matter(tmp_path)["tags"]
    assert f"# {title}, made with" in card
    assert ("linear-attention" in tags) == ("gdn" in plan) == ("The states of linear layers" in card)
    assert ("hybrid" in tags) == (len(set(plan)) == 2)
    assert ("| rotary embedding |" in card) == ("mla" in plan)


def test_a_run_describes_its_model(tmp_path):
    checkpoint, out = a_run(tmp_path / "run"), tmp_path / "model"
    report = tmp_path / "run" / "eval-distill-2k.json"
    report.write_text(json.dumps(a_report(hybrid().plan)))
    megatron_to_hf.main(["--ckpt", str(checkpoint), "--out", str(out)])
    data, card = front_matter(out), (out / "README.md").read_text()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"mla", "gated-deltanet", "distillation"} <= set(data["tags"])
    assert (
        "# 2MLA2GDN:" in card
        and "on 20,643,840 tokens" in card
        and "| 9.500 |" in card.replace("9.500 (", "9.500 | (")
    )
    assert "| ild | ild | 300 | 4,915,200 | 2,048 |" in card and "| distill-8k |" not in card
    assert "| openwebtext | evals 3.0.1.post1 | CC0-1.0 |" in card and "wikipedia" not in card
    assert "takes 128 bytes of KV cache in bf16; in the base model it takes 512 (25.0% are left)" in card
    assert "sequences of up to 2,048 tokens" in card and "import hylo_megatron" in card


def test_a_stage_that_is_not_finished_has_the_steps_of_its_checkpoint(tmp_path):
    checkpoint = a_run(tmp_path / "run")
    (checkpoint / "release").rename(checkpoint / "iter_0000010")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    megatron_to_hf.main(["--ckpt", str(checkpoint), "--out", str(tmp_path / "model")])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| ild | ild | 300 |" in card and "| distill-2k | distill | 10 | 163,840 |" in card


def test_text_that_the_teacher_wrote_is_in_the_table(tmp_path):
    checkpoint = a_run(tmp_path)
    (tmp_path / "sampled").mkdir()
    sampled = tmp_path / "sampled" / "sampled.json"
    sampled.write_text(json.dumps({"licence": "llama3.2", "settings": {"teacher": "Llama"}}))
    text = Text(name="sampled from Llama", licence="llama3.2")
    assert text not in origin_of(checkpoint).texts  # no stage mixes it
    recipe = smollm2_gpu().to_dict()
    recipe["stages"][0]["mix"] = [["sampled", 0.3], ["text", 0.7]]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert text in origin_of(checkpoint).texts
    sampled.write_text("{}")
    with pytest.raises(HyLoError, match="sampled.json: field 'settings' is missing"):
        origin_of(checkpoint)


def test_a_transformer_gets_no_card(tmp_path):
    write_hybrid(tmp_path / "ckpt", hybrid().as_teacher())
    with pytest.raises(HyLoError, match="--licence: for the model card of a hybrid, a Transformer gets none"):
        megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "model", licence="mit")
    assert not (tmp_path / "model").exists()


def test_what_is_unknown_is_not_claimed(tmp_path):
    write_hybrid(tmp_path / "ckpt", hybrid("kda"))
    assert origin_of(tmp_path / "ckpt") == Origin()
    megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "model", with_code=True, base_model="us/base")
    data, card = front_matter(tmp_path / "model"), (tmp_path / "model" / "README.md").read_text()
    assert data["base_model"] == "us/base" and "license" not in data and "distillation" not in data["tags"]
    assert "no record of a training" in card and model_card.NO_FIGURES in card and "## Data" not in card
    assert "hylo_code/" in card and "import hylo_megatron" not in card


NATIVE = Geometry(MLAGeometry(256, 64, 64, 64), GDNGeometry(2, 4, 16, 32), Mamba2Geometry(2, 16, 8, 2))
UNEVEN = replace(NATIVE, gdn=GDNGeometry(2, 4, 16, 24))  # value heads that vLLM cannot split


@pytest.mark.parametrize(
    "geometry, norm, row",
    [(NATIVE, False, None), (NATIVE, True, "4,096 bytes"), (None, False, "1,280 bytes"), (UNEVEN, False, None)],
)
def test_the_cache_in_vllm_is_told_where_it_is_another(geometry, norm, row):
    """Two MLA layers with four heads: expanded for a norm on keys, or padded to sizes that a kernel has."""
    arch = hybrid(mla_qk_norm=norm, **({"geometry": geometry} if geometry else {}))
    rows = [value for name, value in model_card._architecture(arch) if "in vLLM" in name]
    assert rows == ([row] if row else [])


@pytest.mark.parametrize(
    "text",
    ["apache-2.0", "us/base", "Terms: see LICENSE", "no", "- list", "two\nlines", "mit", "\x7f", "\U0001f600"],
)
def test_any_name_is_a_value_of_the_front_matter(text, tmp_path):
    model_card.write_card(tmp_path, hybrid(), Origin(licence=text, base_model=text), with_code=False)
    data = front_matter(tmp_path)
    assert data["license"] == data["base_model"] == text


def test_a_training_without_a_recipe_leaves_its_log(tmp_path):
    (tmp_path / "kl").mkdir()
    lines = [{"stage": "distill", "iteration": step, "loss": 1.0, "tokens": 64 * step} for step in (1, 2)]
    (tmp_path / "kl" / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = TrainedStage(name="kl", kind="distill", steps=2, tokens=128)
    assert origin_of(tmp_path / "kl") == Origin(stages=(stage,))
    (tmp_path / "kl" / "train_log.jsonl").write_text('{"stage"')
    with pytest.raises(HyLoError, match="train_log.jsonl:1: not valid JSON"):
        origin_of(tmp_path / "kl")


def test_steps_behind_the_exported_iteration_are_not_counted(tmp_path):
    lines = [{"stage": "distill", "iteration": step, "tokens": 64 * step} for step in (1, 2, 3)]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [stage.steps for stage in origin_of(tmp_path, 2).stages] == [2] and not origin_of(tmp_path, 0).stages


def test_texts_of_a_user(tmp_path):
    recipe = smollm2_gpu().to_dict() | {"base": "/models/base", "teacher": "/models/base", "data": ["/d/a.jsonl"]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    origin = origin_of(tmp_path / "ild")
    assert origin.texts == (Text(name="a.jsonl"),) and origin.base_model is None and len(origin.stages) == 1


def test_figures_are_replaced_and_a_persons_text_stays(tmp_path, capsys):
    write_hybrid(tmp_path / "ckpt", hybrid())
    folder = tmp_path / "model"
    megatron_to_hf.convert(tmp_path / "ckpt", folder)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Limits", "Written by hand.\n\n## Limits"))
    for perplexity in (9.5, 8.25):
        (folder / "evaluation.json").write_text(json.dumps(a_report(hybrid().plan, perplexity)))
        model_card.main(["--model", str(folder)])
    text = card.read_text()
    assert "8.250" in text and "9.500" not in text and model_card.NO_FIGURES not in text
    assert text.count("Written by hand.") == 1 and text.count(model_card.BEGIN) == 1


@pytest.mark.parametrize(
    "report, message",
    [
        (a_report(("gdn",) * 4), "describes another model"),
        ({"model": {}}, "field 'plan' is missing"),
    ],
)
def test_a_wrong_evaluation_is_refused(report, message, tmp_path):
    write_hybrid(tmp_path / "ckpt", hybrid())
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(report))
    with pytest.raises(HyLoError, match=message):
        megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "model", evaluation=path)
    assert not (tmp_path / "model").exists()


def test_a_card_without_a_place_for_figures_stays_as_it_is(tmp_path):
    write_hybrid(tmp_path / "ckpt", hybrid())
    folder = tmp_path / "model"
    megatron_to_hf.convert(tmp_path / "ckpt", folder)
    (folder / "README.md").write_text("Mine.\n")
    (tmp_path / "e.json").write_text(json.dumps(a_report(hybrid().plan)))
    with pytest.raises(HyLoError, match="no place for figures"):
        model_card.put_figures(folder, tmp_path / "e.json")
    assert (folder / "README.md").read_text() == "Mine.\n"
