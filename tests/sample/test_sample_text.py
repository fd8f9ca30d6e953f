"""``hylo sample-text``: rows written in batches are the teacher's, and files of an interrupted run are the same."""

import argparse
import itertools
import json
import shutil
import types

import pytest
import torch
from helpers import text, tiny, tokenizer_kinds
from helpers.hf import model_of, tiny_config
from helpers.samples import LENGTH, sampling
from safetensors.torch import load_file, save_file
from tokenizers import decoders
from torch.cuda._utils import _get_device_index

from hylo_megatron.data.prepare import prepare
from hylo_megatron.errors import HyLoError
from hylo_megatron.sample import command, prompts, vllm_engine
from hylo_megatron.sample.decoder import Decoder, Request, Written
from hylo_megatron.sample.keep import Keeper, Rules
from hylo_megatron.sample.run import SamplingRun
from hylo_megatron.sample.shards import Shards


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tiny.save_model(tiny.teacher_model("smollm2"), tmp_path_factory.mktemp("sampled") / "teacher")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return text.make_tokenizer(folder)


def flags(teacher, out, *more) -> list[str]:
    values = ["--teacher", teacher, "--out", out, "--tokens", 300, "--length", 48, "--batch-size", 3,
              "--rows-per-shard", 4, "--shortest", 1, *more]  # fmt: skip
    return [str(value) for value in values]


def files(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.jsonl")}


def test_an_interrupted_run_goes_on_with_the_same_text(teacher, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command.main(flags(teacher, whole))
    expected = files(whole)
    assert len(expected) >= 2
    write = Decoder.write

    def dying(self, requests):
        yield from itertools.islice(write(self, requests), 6)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Decoder, "write", dying)
        command.main(flags(teacher, cut))
    assert len(files(cut)) == 1
    (cut / "sampled-00001.jsonl").write_text("a shard that is not listed")
    command.main([part for part in flags(teacher, cut) if part not in ("--batch-size", "3")])
    assert files(cut) == expected
    about = json.loads((cut / "sampled.json").read_text())
    assert about["licence"] == "apache-2.0" and about["settings"]["teacher"] == "teacher"
    assert about["tokens"] >= 300 and about["rows"] == 4 * len(expected)
    assert sum(about["dropped"].values()) == about["rows"] - sum(
        len(lines.splitlines()) for lines in expected.values()
    )
    command.main(flags(teacher, cut, "--tokens", 500))  # more of the same
    assert files(cut).items() > expected.items()


class Echo:
    """An engine whose rows are the letters of ``texts``, in turn and in a strange order, ended or not."""

    def __init__(self, teller, *texts: tuple[str, bool]):
        self.teller, self.texts = teller, texts

    def write(self, requests):
        for part in iter(lambda: list(itertools.islice(requests, 3)), []):
            for request in reversed(part):
                content, ended = self.texts[request.row % len(self.texts)]
                yield Written(request.row, list(self.teller.plain(content)), ended)


def run_of(teacher, out, prompt: prompts.Prompt, *texts: tuple[str, bool]) -> SamplingRun:
    teller = prompts.Teller(teacher)
    return SamplingRun(
        engine=Echo(teller, *texts), prompts=prompts.Prompts([prompt], 1), teller=teller,
        keeper=Keeper(Rules(shortest=2)), shards=Shards(out, {}, {}), rows_per_shard=4, keep_prompt=True,
    )  # fmt: skip


def test_dropped_rows_are_counted_by_reason(teacher, tmp_path):
    good, other, loop = ("the quick brown fox", True), ("user system", False), ("the user " * 40, True)
    run = run_of(teacher, tmp_path, prompts.Prompt((0,)), good, loop, ("fox", True), other, good)
    run.until(1)
    assert run.shards.dropped() == {"looping": 1, "short": 1}
    assert [json.loads(line)["row"] for line in files(tmp_path)["sampled-00000.jsonl"].splitlines()] == [0, 3]
    with pytest.raises(HyLoError, match="0 of the last 4 rows were kept .2 copies, 1 looping, 1 short"):
        run_of(teacher, tmp_path, prompts.Prompt((0,)), good, loop, ("fox", True), other, good).until(9999)


def test_a_hybrid_is_sampled_without_vllm_and_goes_on(tmp_path, monkeypatch):
    model_of(("mla", "gdn"), vocab_size=300).save_pretrained(tmp_path / "hybrid")
    folder = text.make_tokenizer(tmp_path / "hybrid")
    monkeypatch.setattr(command.packages, "has", lambda name: False)
    more = ("--start-token", "the")
    command.main(flags(folder, tmp_path / "out", "--tokens", 50, *more))
    command.main(flags(folder, tmp_path / "out", *more))
    command.main(flags(folder, tmp_path / "whole", *more))
    assert files(tmp_path / "out") == files(tmp_path / "whole") and len(files(tmp_path / "whole")) > 1


def test_a_kept_sentence_and_its_continuation_have_their_space(tmp_path):
    tokenizer = tokenizer_kinds.sentencepiece_bpe()  # with Llama 2's decoder, which strips the first space
    strip = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    teller = prompts.Teller(tokenizer_kinds.write(tmp_path, tokenizer, "PreTrainedTokenizerFast"))
    sentence = prompts.Prompt((1, *teller.plain("The quick  brown fox.")), "The quick brown fox.")
    ids = list(teller.plain("over the dog"))
    run = SamplingRun(
        engine=None, prompts=None, teller=teller, keeper=None, shards=None, rows_per_shard=1, keep_prompt=True
    )
    line = run._line(Written(0, ids, True), sentence)
    assert teller.text(ids) == "over the dog" and line["text"] == "The quick brown fox. over the dog"


def test_unusual_line_separators_do_not_break_a_resume(tmp_path):
    Shards(tmp_path, {}, {}).add([{"text": "one\u2028two\u2029three\x85four\rfive\x0csix", "row": 0}], 1, 6, {})
    Shards(tmp_path, {}, {}).replay(Keeper(Rules(shortest=1)))


def test_an_answer_that_does_not_end_is_dropped(teacher, tmp_path):
    asked = prompts.Prompt((0,), messages=[{"role": "user", "content": "Who jumps?"}])
    run = run_of(teacher, tmp_path, asked, ("the brown fox", True), ("the system", False))
    run.until(1)
    assert run.shards.dropped() == {"unfinished": 2, "copies": 1}


@pytest.mark.parametrize(
    "change", [("--seed", 2), ("--temperature", 0.5), ("--batch-size", 4), ("--dtype", "bfloat16")]
)
def test_other_settings_are_refused(teacher, tmp_path, change, capsys):
    command.main(flags(teacher, tmp_path / "out", "--tokens", 20))
    with pytest.raises(SystemExit):
        command.main(flags(teacher, tmp_path / "out", "--tokens", 400, *change))
    assert "use the same flags to go on, or another --out" in capsys.readouterr().err


def test_a_teacher_that_was_trained_further_is_refused(teacher, tmp_path, capsys):
    """One weight of one layer changes; the files keep their names and sizes."""
    folder, out = shutil.copytree(teacher, tmp_path / "teacher"), tmp_path / "out"
    command.main(flags(folder, out, "--tokens", 20))
    settings = json.loads((out / "sampled.json").read_text())["settings"]
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(SystemExit):
        command.main(flags(folder, out, "--tokens", 400))
    assert "digest is" in capsys.readouterr().err


def test_rows_that_do_not_fit_are_refused_wherever_sampling_is_called(teacher, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(command, "start_engine", full)
    with pytest.raises(HyLoError, match="--batch-size: the rows do not fit into memory .CUDA out of memory.$"):
        command.sample(command.parser().parse_args(flags(teacher, tmp_path / "out")))


def test_first_sentences_and_instructions_reach_prepare_data(teacher, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("The quick brown fox jumps. It rests.\n\nAnother user has\nan assistant here! Yes.\n\nShort.\n")
    command.main(flags(teacher, tmp_path / "kept", "--first-sentences", prose))
    command.main(flags(teacher, tmp_path / "bare", "--first-sentences", prose, "--no-keep-prompt"))
    kept, bare = ("".join(files(tmp_path / name).values()) for name in ("kept", "bare"))
    assert "The quick brown fox jumps." in kept and "Another user has an assistant here!" in kept
    assert "Short." not in kept and "The quick brown fox jumps." not in bare
    asked = text.write(
        tmp_path / "asked.jsonl", {"instruction": "Add.", "input": "1, 2"}, text.HELLO, {"messages": "none"}
    )
    chats = tmp_path / "chats"
    command.main(flags(teacher, chats, "--instructions", asked, "--tokens", 60, "--length", 200, "--top-p", 1))
    lines = [json.loads(line) for lines in files(chats).values() for line in lines.splitlines()]
    questions = {line["messages"][0]["content"] for line in lines}
    assert questions <= {"Add.\n\n1, 2", "Hello"} and all(len(line["messages"]) == 2 for line in lines)
    for name, documents in (("kept", kept.count("\n")), ("chats", len(lines))):
        inputs = sorted((tmp_path / name).glob("*.jsonl"))
        assert prepare(inputs, teacher, tmp_path / "tokens")["documents"] == documents


def test_files_are_read_as_format_says(teacher, tmp_path):
    """A text that begins with a row is plain text, and rows with an instruction and a chat are of one kind."""
    teller = prompts.Teller(teacher)
    prose = tmp_path / "notes.md"
    prose.write_text('{"text": "The quick brown fox jumps."}\n\nAnother user has an assistant here! Yes.\n')
    found = prompts.sentence_prompts(teller, prose, None, 40, "text")
    assert [prompt.text for prompt in found][-1] == "Another user has an assistant here!"
    both = text.write(tmp_path / "both.jsonl", text.HELLO | {"text": "Add."}, text.HELLO)

    def asked(form):
        found = prompts.instruction_prompts(teller, both, None, 90, form)
        return [prompt.messages[-1]["content"] for prompt in found]

    with pytest.raises(HyLoError, match="both.jsonl:2: .*'text'"):  # the chat has no text
        prompts.sentence_prompts(teller, both, None, 90, "jsonl")
    assert asked(None) == ["Add.", "Hello"] and asked("chat") == ["Hello"] and asked("jsonl") == ["Add."]


def test_instructions_that_cannot_be_used_are_counted(teacher, tmp_path, capsys):
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    asked = text.write(tmp_path / "asked.jsonl", {"instruction": "Add."}, image, {"answer": "42"})
    command.main(flags(teacher, tmp_path / "out", "--instructions", asked, "--length", 200, "--top-p", 1))
    assert "asked.jsonl: 2 rows cannot be used and were left out, the first is" in capsys.readouterr().out
    several = tmp_path / "several"
    shutil.copytree(teacher, several)
    text.make_tokenizer(several, {"a": text.CHATML, "b": text.CHATML})
    with pytest.raises(SystemExit):
        command.main(flags(several, tmp_path / "none", "--instructions", asked))
    assert "several: has the chat templates a, b and none is the default" in capsys.readouterr().err


def test_broken_weights_are_said_to_be_broken(teacher, tmp_path, capsys):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    save_file(state | {"model.norm.weight": state["model.norm.weight"] * float("nan")}, broken / "model.safetensors")
    with pytest.raises(SystemExit):
        command.main(flags(broken, tmp_path / "out"))
    assert "logits are not finite: the weights are broken" in capsys.readouterr().err


def test_a_student_is_left_to_vllm(teacher, tmp_path, monkeypatch, capsys):
    """vLLM is a stand-in here, which answers with the last token of a prompt, then with an end."""
    calls = []

    class LLM:
        def __init__(self, folder, **options):
            calls.append(options)

        def generate(self, prompts, parameters, use_tqdm):
            ids = [[prompt["prompt_token_ids"][-1], 2, 9] for prompt in prompts]
            calls.append([given["seed"] for given in parameters])
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=found)]) for found in ids]

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=dict)
    monkeypatch.setattr(vllm_engine.packages, "load", lambda *_: fake)
    engine = vllm_engine.VllmEngine(teacher, sampling(), "float32", 4)
    rows = list(engine.write(Request(row, (5, row + 10)) for row in range(3)))
    assert rows == [Written(row, [row + 10], True) for row in range(3)]
    assert calls[0]["max_model_len"] == LENGTH and len(set(calls[1])) == 3


def test_a_student_that_vllm_refuses_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(command.packages, "has", lambda name: True)
    monkeypatch.setattr(command.packages, "require", lambda *_: None)
    options = argparse.Namespace(engine="auto", length=LENGTH, teacher="x")

    def chosen(gpu: bool, kind: str = "gdn", **changes) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return command.engine_of(options, tiny_config(("mla", kind), **changes))

    assert chosen(True, window=tiny.WINDOW, linear_rope=True) == chosen(False, "kda", linear_rope=True) == "vllm"
    assert chosen(False, window=tiny.WINDOWS) == "vllm"
    assert chosen(True, "kda", linear_rope=True) == chosen(False, "mla", window=tiny.WINDOWS) == "transformers"
    for version, engine in (("0.26.0", "transformers"), ("0.32.0+cpu", "vllm")):
        monkeypatch.setattr(command.packages, "version_of", lambda *_, found=version: found)
        assert chosen(True, "kda") == engine and chosen(True) == "vllm"


@pytest.mark.parametrize(
    "more, message",
    [
        (("--length", 9999), "was made for 256 tokens"),
        (("--top-p", 0), "--top-p 0"),
        (("--tokens", "0"), "argument --tokens: '0': expected a number of tokens, such as 10M"),
        (("--start-token", "two words"), "expected one"),
        (("--first-sentences", "nowhere.txt"), "no such file"),
        (("--first-sentences", __file__, "--format", "jsonl"), "test_sample_text.py:1: not a JSON object"),
        (("--format", "text"), "--format text: is that of --first-sentences or --instructions; give one of these"),
        (("--instructions", __file__, "--format", "text"), "--format text: instructions are rows: give jsonl or chat"),
        (("--first-sentences", __file__, "--text-key", "a"), "--text-key: is that of --instructions; leave it out"),
        (("--instructions", __file__, "--text-key", "a", "--format", "chat"), "--text-key: --format chat has no key"),
        (("--instructions", __file__, "--start-token", "a"), "--start-token: begins documents, no chats"),
        (("--engine", "vllm", "--device", "cpu"), "vLLM chooses the device"),
        (("--engine", "vllm", "--no-cuda-graph"), "--no-cuda-graph: for the engine transformers"),
    ],
)
def test_refused_in_one_line(teacher, tmp_path, more, message, capsys):
    with pytest.raises(SystemExit):
        command.main(flags(teacher, tmp_path / "out", *more))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_device_without_an_index_is_the_first(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(command, "load", lambda *a: None)
    options = argparse.Namespace(teacher="x", batch_size=1, no_cuda_graph=True)
    with pytest.raises(AttributeError):  # what `load` returns has no model
        command.start_engine(options, "transformers", None, torch.device("cuda"), torch.bfloat16)
    assert chosen == [0]
