"""Distillation of the hybrid from its teacher: layer by layer (``ild``) and end to end (``distill``)."""

import hylo_megatron.platform.engine  # noqa: F401  before anything of megatron
