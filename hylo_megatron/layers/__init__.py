"""Mixers and layer specs for megatron-core's ``HybridModel``."""

import hylo_megatron.platform.engine  # noqa: F401  before anything of megatron
