"""What of transformers' auto classes has no public way to register."""

from functools import partial

from hylo_megatron.engine.patch import Patch, instead

_transformers = partial(Patch, group="transformers", package="transformers", versions=">=5.6.2,<6", expects="missing")
PATCHES = (
    _transformers(
        target="transformers.models.auto.tokenization_auto:TOKENIZER_MAPPING_NAMES[hylo]",
        replacement=instead("TokenizersBackend"),
        why="transformers 5.19 rebuilds tokenizer.json for LlamaTokenizerFast, which folders of old exports may name",
    ),
    _transformers(
        target="transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hylo]",
        replacement=instead("HyLoForCausalLM"),
        why="Trainer's label smoothing shifts the labels of the classes in this table only",
    ),
)
