"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from hylo_megatron.mixers.mixer import Mixer
from hylo_megatron.mixers.mla.geometry import MLAGeometry

MIXER = Mixer(name="mla", short="MLA", title="MLA", symbol="+", slot="mla_layer", geometry=MLAGeometry)
