"""Perplexity, loss by position and needle retrieval of any Hugging Face model, compared with its teacher."""

from hylo_megatron.evaluate.needle import needles_of
from hylo_megatron.evaluate.perplexity import long_documents_of, perplexity_of
from hylo_megatron.evaluate.runner import Settings, evaluate

__all__ = ["Settings", "evaluate", "long_documents_of", "needles_of", "perplexity_of"]
