"""The hybrid as a transformers model. Imports neither torch nor transformers until something here is used."""

_WHERE = {
    "HyLoConfig": "configuration_hylo",
    "HyLoModel": "modeling_hylo",
    "HyLoForCausalLM": "modeling_hylo",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def register_config() -> None:
    """Make ``AutoConfig`` know ``model_type: hylo``."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from hylo_megatron.hf.configuration_hylo import HyLoConfig

    AutoConfig.register("hylo", HyLoConfig, exist_ok=True)


def register_tokenizer() -> None:
    """Make ``AutoTokenizer`` use a hybrid's ``tokenizer.json`` unchanged, whatever class its folder names."""
    from hylo_megatron.engine.register import install

    install("transformers")


def register() -> None:
    """Register config, models and tokenizer with transformers' auto classes.

    ``import hylo_megatron`` calls this, except in the programs of this package.
    """
    import hylo_megatron.hf.modeling_hylo  # noqa: F401  registers the models

    register_config()
    register_tokenizer()
