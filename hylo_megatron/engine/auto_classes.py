"""Entries of transformers' auto classes that no public function registers."""

from hylo_megatron.engine.patch import entries, instead

_AUTO = "transformers.models.auto"
PATCHES = entries(
    "transformers", "transformers",
    (f"{_AUTO}.tokenization_auto:TOKENIZER_MAPPING_NAMES[hylo]", instead("TokenizersBackend"), "missing",
     "transformers 5.19 rebuilds tokenizer.json for LlamaTokenizerFast, which folders of old exports may name"),
    (f"{_AUTO}.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hylo]", instead("HyLoForCausalLM"), "missing",
     "Trainer's label smoothing shifts the labels of the classes in this table only"),
)  # fmt: skip
