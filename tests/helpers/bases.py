"""Converted tiny teachers, and students of one mixer with their errors."""

from dataclasses import replace

import torch
from helpers import tiny

from hylo_megatron.config import Architecture, GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.convert import hf_to_megatron
from hylo_megatron.init.linear_algebra import relative_error
from hylo_megatron.init.mixer_forward import MixerRunner
from hylo_megatron.init.teacher import BaseModel
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.kda.geometry import KDAGeometry

CPU = torch.device("cpu")
TOKENS, RUNS = tiny.tokens(4, 96), tiny.runs()


class Bases:
    """Converted tiny teachers, made once each."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def model(self, shape="llama", dtype=torch.float32, **changes):
        """``(transformers model, checkpoint folder)``."""
        key = repr((shape, dtype, changes))
        if key not in self.made:
            model, out = tiny.teacher_model(shape, dtype, **changes), self.folder / str(len(self.made))
            hf_to_megatron.convert(tiny.save_model(model, out / "hf"), out / "ckpt")
            self.made[key] = model, out / "ckpt"
        return self.made[key]

    def layer(self, shape="llama", index=1, tokens=TOKENS, **changes):
        """``(an attention layer on TOKENS, the base)``."""
        base = BaseModel(self.model(shape, **changes)[1], CPU)
        return next(layer for layer in base.layers(tokens) if layer.index == index), base


def student(base, kind="mla", **mla_geometry) -> Architecture:
    """``base`` with one kind of mixer; heads like the base model's except for what is given."""
    dim, heads = base.arch.head_dim, base.arch.num_attention_heads
    sizes = dict(kv_lora_rank=256, qk_nope_head_dim=dim, qk_rope_head_dim=dim, v_head_dim=dim) | mla_geometry
    geometry = Geometry(
        MLAGeometry(**sizes),
        GDNGeometry(heads, 2 * heads, dim, dim),
        Mamba2Geometry(heads, dim, dim, heads),
        KDAGeometry(2 * heads, dim),
    )
    return replace(base.arch, plan=(kind,) * base.arch.num_layers, geometry=geometry)


def initialise(kind: str):
    return MIXERS[kind].part("initialise")


def output(layer, arch, weights) -> torch.Tensor:
    weights = {key: tensor.float() for key, tensor in weights.items()}
    runner = MixerRunner(arch, layer.index, CPU)
    runner.load(weights)
    return runner.features(layer.inputs_BSD) @ weights[initialise(arch.plan[layer.index]).OUTPUT_PROJECTION].T


def error(layer, arch, weights) -> float:
    return relative_error(output(layer, arch, weights), layer.output_BSD)
