"""The model as megatron-core's ``HybridModel``."""
