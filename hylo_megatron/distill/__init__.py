"""Distillation of the hybrid from its teacher: layer by layer (``ild``) and end to end (``distill``)."""

import hylo_megatron.engine.megatron_setup  # noqa: F401  before anything of megatron
