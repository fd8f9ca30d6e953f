"""The model as megatron-core's ``HybridModel``."""

import hylo_megatron.engine.megatron_setup  # noqa: F401  before anything of megatron
