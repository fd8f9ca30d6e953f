"""The Megatron model computes what transformers computes, teacher and hybrid, on one rank and on two."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.paths import PROGRAMS

pytest.importorskip("transformers")
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from programs.logits import LAYOUTS, logits  # noqa: E402

from hylo_megatron.config import Geometry, MLAGeometry  # noqa: E402
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.hf import HyLoForCausalLM  # noqa: E402
from hylo_megatron.layers.load import layout_config, load_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")

TOLERANCE = 1e-4
_QK_NORM = Geometry(MLAGeometry(24, 16, 16, 32, q_lora_rank=40), tiny.GEOMETRY.gdn, tiny.GEOMETRY.mamba2)
_NORM_EPS = replace(tiny.GEOMETRY, gdn=replace(tiny.GEOMETRY.gdn, norm_eps=1e-2))
HYBRIDS = {
    "gdn": tiny.hybrid("gdn"),
    "gdn-norm_eps": tiny.hybrid("gdn", geometry=_NORM_EPS),
    "mamba2": tiny.hybrid("mamba2", tie_word_embeddings=False),
    "kda": tiny.hybrid("kda"),
    "kda-norm_eps-yarn": tiny.hybrid("kda", geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.YARN),
    "gdn-q_lora-yarn": tiny.hybrid("gdn", geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.YARN),
    "mamba2-q_lora-linear": tiny.hybrid("mamba2", geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.LINEAR),
    "gdn-qk_norm": tiny.hybrid(
        "gdn", model_type="qwen3", head_dim=32, qk_norm=True, mla_qk_norm=True, geometry=_QK_NORM, rms_norm_eps=1e-6
    ),
    "mamba2-llama3-padded": tiny.hybrid("mamba2", rope_parameters=tiny.LLAMA3, vocab_size=301),
    "gdn-nope-log_scale": tiny.hybrid("gdn", mla_rope=False, log_scale=tiny.LOG_SCALE),
    "kda-nope-yarn": tiny.hybrid("kda", mla_rope=False, rope_parameters=tiny.YARN, geometry=tiny.GEOMETRY_Q_LORA),
    "mamba2-log_scale-qk_norm": tiny.hybrid(
        "mamba2", model_type="qwen3", head_dim=32, mla_qk_norm=True, geometry=_QK_NORM, log_scale=tiny.LOG_SCALE
    ),
    "gdn-linear_rope-nope": tiny.hybrid("gdn", mla_rope=False, linear_rope=True),
    "kda-linear_rope-yarn": tiny.hybrid(
        "kda", linear_rope=True, geometry=tiny.GEOMETRY_Q_LORA, rope_parameters=tiny.YARN
    ),
    "gdn-window-yarn": tiny.hybrid("gdn", window=tiny.WINDOW, linear_rope=True, rope_parameters=tiny.YARN),
    "mamba2-window-bias": tiny.hybrid("mamba2", window=tiny.WINDOW, model_type="qwen2", attention_bias=True),
    "kda-window-qk_norm": tiny.hybrid("kda", window=tiny.WINDOW, model_type="qwen3", qk_norm=True),
    "gdn-windows-nope": tiny.hybrid(
        "gdn", window=tiny.WINDOWS, mla_rope=False, log_scale=tiny.LOG_SCALE, rope_parameters=tiny.YARN
    ),
    "all-mla-windows-qk_norm": tiny.hybrid(
        plan=("mla",) * 3,
        window=tiny.WINDOWS,
        model_type="qwen3",
        head_dim=32,
        qk_norm=True,
        mla_qk_norm=True,
        geometry=_QK_NORM,
    ),  # fmt: skip
    "no-mla": tiny.hybrid("mamba2", plan=("mamba2",) * 4),
    "all-mla": tiny.hybrid(plan=("mla",) * 3),  # an odd number of layers for the pipeline
}
TEACHERS = [*tiny.SHAPES, "llama-LINEAR", "llama-YARN", "llama-LLAMA3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@functools.cache
def teacher(folder: Path, shape: str) -> torch.Tensor:
    """transformers' logits of a teacher whose checkpoint is ``folder / shape``."""
    base, _, rope = shape.partition("-")
    model = tiny.teacher_model(base, **({"rope_parameters": getattr(tiny, rope)} if rope else {}))
    hf_to_megatron.convert(tiny.save_model(model, folder / f"{shape}.hf"), folder / shape)
    with torch.no_grad():
        return model(tiny.tokens()).logits


@functools.cache
def hybrid(folder: Path, kind: str) -> torch.Tensor:
    """HyLoForCausalLM's logits of the exported checkpoint ``folder / kind``."""
    tiny.write_hybrid(folder / kind, HYBRIDS[kind])
    megatron_to_hf.convert(folder / kind, folder / f"{kind}.hf")
    model = HyLoForCausalLM.from_pretrained(folder / f"{kind}.hf", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tiny.tokens()).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 0.2, "the logits say too little to compare"
    assert (got - want).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("shape", TEACHERS)
def test_teacher_logits_equal_transformers(folder, shape):
    want = teacher(folder, shape)
    close(logits(load_model(folder / shape)[0], tiny.tokens()), want)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_logits_equal_the_exported_model(folder, kind):
    want = hybrid(folder, kind)
    close(logits(load_model(folder / kind)[0], tiny.tokens()), want)


@pytest.mark.parametrize(
    "kind, other",
    [
        ("gdn-norm_eps", dict(geometry=tiny.GEOMETRY)),
        ("gdn-q_lora-yarn", dict(rope_parameters=tiny.DEFAULT)),
        ("mamba2-q_lora-linear", dict(rope_parameters=tiny.DEFAULT)),
        ("gdn-nope-log_scale", dict(mla_rope=True)),
        ("gdn-nope-log_scale", dict(log_scale=None)),
        ("gdn-linear_rope-nope", dict(linear_rope=False)),
        ("kda-linear_rope-yarn", dict(linear_rope=False)),
        ("gdn-window-yarn", dict(window={"size": 5, "sinks": 2})),
        ("kda-window-qk_norm", dict(window={"size": 6, "sinks": 1})),
        ("all-mla-windows-qk_norm", dict(window={"size": 6, "sinks": 1, "mla": True})),
        ("mamba2-llama3-padded", dict(rope_parameters={**tiny.DEFAULT, "rope_theta": 5e5})),
    ],
)
def test_rope_scaling_and_norm_eps_show_in_the_logits(folder, kind, other):
    """Else the comparison above would not see what both sides leave out."""
    want = hybrid(folder, kind)
    changed = folder / f"{kind}-without-{next(iter(other))}"
    tiny.write_hybrid(changed, replace(HYBRIDS[kind], **other))
    assert (logits(load_model(changed)[0], tiny.tokens()) - want).abs().max() > 100 * TOLERANCE


def test_bf16_keeps_decay_parameters_fp32(folder):
    for kind in ("gdn", "mamba2", "kda"):
        hybrid(folder, kind)
        model, _ = load_model(folder / kind, layout_config(HYBRIDS[kind], torch.bfloat16))
        dtypes = {name: p.dtype for name, p in model.bfloat16().named_parameters()}
        decay = [name for name in dtypes if name.endswith(("A_log", "dt_bias", ".D"))]
        assert len(decay) == {"gdn": 4, "mamba2": 6, "kda": 4}[kind]
        assert all((dtype == torch.float32) == (name in decay) for name, dtype in dtypes.items())


def test_a_checkpoint_of_other_sizes_is_refused(folder, tmp_path):
    tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
    replace(HYBRIDS["gdn"], intermediate_size=128).save(tmp_path / "ckpt")
    with pytest.raises(HyLoError) as caught:
        load_model(tmp_path / "ckpt")
    message = str(caught.value)
    assert "release does not fit the model that its hylo.json describes" in message and "\n" not in message
    assert "decoder.layers.1.mlp.linear_fc1.weight" in message


@pytest.mark.slow
def test_two_ranks_give_the_logits_of_one(folder, tmp_path):
    """Tensor parallel, sequence parallel and pipeline parallel in one launch; every hybrid and two teachers."""
    shapes = ("llama", "qwen2", "qwen3")
    want = {kind: hybrid(folder, kind) for kind in HYBRIDS} | {shape: teacher(folder, shape) for shape in shapes}
    done = helpers.torchrun(PROGRAMS / "logits.py", tmp_path, *(folder / name for name in want))
    assert done.returncode == 0, done.stderr[-4000:]
    worst = {
        f"{layout} {name}": (torch.load(tmp_path / f"{layout}-{name}.pt") - logits_).abs().max().item()
        for layout in LAYOUTS
        for name, logits_ in want.items()
    }
    assert not {where: error for where, error in worst.items() if not error <= TOLERANCE}
