"""Distillation of the hybrid from its teacher: model, losses, schedule and command line."""

import hylo_megatron.engine.megatron_setup  # noqa: F401  before anything of megatron
