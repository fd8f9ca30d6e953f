"""Kimi Delta Attention (arXiv 2510.26692)."""

from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.mixers.mixer import Mixer

MIXER = Mixer(
    name="kda",
    short="KDA",
    title="Kimi Delta Attention",
    symbol="G",  # megatron-core has no letter for it; the layer takes the place of Gated DeltaNet's
    slot="gdn_layer",
    geometry=KDAGeometry,
    linear=True,
    fp32=("A_log", "dt_bias"),
    fast=("A_log", "dt_bias"),
    heads=("KDA heads", "num_heads"),
    rotary="head_dim",
)
