"""Tiny random models for the tests: Hugging Face folders of each supported shape, and hybrid checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hylo_megatron.checkpoint.folder import write_checkpoint
from hylo_megatron.config import Architecture, GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.convert.hf_to_megatron import megatron_tensors
from hylo_megatron.mixers import FP32_SUFFIXES
from hylo_megatron.mixers.kda.geometry import KDAGeometry

VOCAB, HIDDEN, LAYERS = 300, 64, 4
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LOG_SCALE = {"base": 3.0, "length": 4}
WINDOW = {"size": 6, "sinks": 2}
WINDOWS = WINDOW | {"mla": True}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

SHAPES = {
    "llama": dict(model_type="llama", rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", rope_parameters={**DEFAULT, "rope_theta": 1e6}, rms_norm_eps=1e-6),
    "qwen3": dict(model_type="qwen3", head_dim=32, rope_parameters={**DEFAULT, "rope_theta": 1e6},
                  tie_word_embeddings=True, rms_norm_eps=1e-6),
    "smollm2": dict(model_type="llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                    rope_parameters={**DEFAULT, "rope_theta": 1e5}, tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", num_key_value_heads=4, sliding_window=None),
}  # fmt: skip
_SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=256, rope_parameters=DEFAULT,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def runs(rows: int = 8, length: int = 128, seed: int = 0) -> torch.Tensor:
    """Stretches of about 16 tokens from a few that go together: something for a decaying state to hold."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(VOCAB // 6, (rows, length // 16), generator=generator).repeat_interleave(16, 1)
    return 6 * topic + torch.randint(6, (rows, length), generator=generator)


def tokens(rows: int = 2, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def scatter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random tensor fit for parameter ``name``, large enough that every part of a model shows in its logits."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith(FP32_SUFFIXES):
        return noise.clamp(-1.5, 1.5) * 0.7
    if "norm" in name:
        return 1 + 0.2 * noise
    return noise * (0.4 if "conv1d" in name else 0.2 if name.endswith("bias") else 0.1)


def teacher_model(shape: str = "llama", dtype=torch.float32, seed: int = 0, common: float = 0.0, **changes):
    """A transformers model with every parameter random, norms and biases included.

    ``common`` is added to all embeddings: real hidden states have such a direction too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = _SIZES | SHAPES[shape] | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = scatter(name, tuple(parameter.shape), generator)
    model.model.embed_tokens.weight.data += common
    return model.to(dtype).eval()


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """``model.safetensors``, or that many shards with their index, keys dealt out in turn."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        part = {key: tensor for key, tensor in state.items() if where[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_tokenizer(folder: Path, size: int = VOCAB) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" if i != 2 else "</s>" for i in range(size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


def save_model(model, folder: Path, shards: int = 1) -> Path:
    """A Hugging Face folder of ``model`` with a tokenizer."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if key not in tied}
    write_weights(folder, state, shards)
    write_tokenizer(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, single file or sharded."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Asserts equal keys, dtypes and bytes; NaN equals itself, and 0.0 differs from -0.0."""
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert got[key].shape == tensor.shape, key
        assert torch.equal(got[key].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), key


GEOMETRY = Geometry(
    MLAGeometry(24, 8, 8, 16), GDNGeometry(2, 4, 16, 16), Mamba2Geometry(4, 16, 16, 2), KDAGeometry(4, 12)
)
GEOMETRY_Q_LORA = Geometry(
    MLAGeometry(24, 8, 16, 12, q_lora_rank=40),
    GDNGeometry(2, 2, 16, 32),
    Mamba2Geometry(4, 16, 8, 4),
    KDAGeometry(2, 32, norm_eps=1e-2),
)


def hybrid(linear: str = "gdn", **changes) -> Architecture:
    """A hybrid whose mixers differ in every width."""
    values = dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=256, rope_parameters=DEFAULT,
        tie_word_embeddings=True, plan=("mla", linear, linear, "mla"), geometry=GEOMETRY, extra={"eos_token_id": 2},
    )  # fmt: skip
    return Architecture(**(values | changes))


class RandomWeights:
    """Random tensors under Hugging Face names; stands in for ``HFWeights``."""

    def __init__(self, arch: Architecture, dtype=torch.float32, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.expected = hf_shapes(arch)
        self.state = {
            key: scatter(key, shape, generator).to(torch.float32 if key.endswith(FP32_SUFFIXES) else dtype)
            for key, shape in self.expected.items()
        }

    def dtype(self, key: str) -> torch.dtype:
        return self.state[key].dtype

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.state[key]


def write_hybrid(folder: Path, arch: Architecture, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """A Megatron checkpoint of ``arch`` with random weights; returns them under Hugging Face names."""
    source = RandomWeights(arch, dtype, seed)
    write_checkpoint(folder, arch, megatron_tensors(arch, source), lambda hf: hf.mkdir())
    return source.state
