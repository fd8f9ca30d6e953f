"""Upcycles Transformers into hybrids of MLA and Gated DeltaNet or Mamba-2 layers.

Importing this is light: torch, transformers and megatron are only imported by the parts that need them. Checkpoints
with ``model_type: hylo`` load through transformers' auto classes once this package is imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

STARTED_BY = os.getppid()  # as early as possible: see run/parent.py


def _register_config() -> None:
    from hylo_megatron.hf import register_config

    register_config()


def _register_models() -> None:
    if importlib.util.find_spec("torch") is not None:
        from hylo_megatron.hf import register_models

        register_models()


def _register_tokenizer() -> None:
    from hylo_megatron.hf import register_tokenizer

    register_tokenizer()


_AFTER_IMPORT = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers our classes right after transformers' auto classes are imported, whenever that happens."""

    def find_spec(self, name, path=None, target=None):
        if name not in _AFTER_IMPORT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _AFTER_IMPORT[name]()

            spec.loader.exec_module = exec_module
        return spec


def _install() -> None:
    for name, action in _AFTER_IMPORT.items():
        if name in sys.modules:
            action()
    if not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


_install()
