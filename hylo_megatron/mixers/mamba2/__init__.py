"""Mamba-2 (arXiv 2405.21060)."""

from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry
from hylo_megatron.mixers.mixer import Mixer

MIXER = Mixer(
    name="mamba2",
    short="M2",
    title="Mamba-2",
    symbol="M",
    slot="mamba_layer",
    geometry=Mamba2Geometry,
    linear=True,
    aliases=("MAMBA2",),
    fp32=("A_log", "dt_bias", "D"),
    fast=("A_log", "dt_bias"),
    heads=("Mamba-2 groups", "num_groups"),
    multiples=(("num_heads", "num_groups"),),
)
