"""Softmax attention as the base model has it: teachers consist of it, hybrids have none."""

from hylo_megatron.mixers.mixer import Mixer

MIXER = Mixer(name="attention", short="ATT", title="attention", symbol="*", slot="attention_layer")
