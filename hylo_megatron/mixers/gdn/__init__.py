"""Gated DeltaNet (arXiv 2412.06464)."""

from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.mixer import Mixer

MIXER = Mixer(
    name="gdn",
    short="GDN",
    title="Gated DeltaNet",
    symbol="G",
    slot="gdn_layer",
    geometry=GDNGeometry,
    linear=True,
    fp32=("A_log", "dt_bias"),
    fast=("A_log", "dt_bias"),
    heads=("GDN key heads", "num_key_heads"),
    rotary="key_head_dim",
    multiples=(("num_value_heads", "num_key_heads"),),
)
