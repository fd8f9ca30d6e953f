"""Mixers and layer specs for megatron-core's ``HybridModel``."""
