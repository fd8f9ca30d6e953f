"""Measurements of any Hugging Face model beside its teacher: perplexity, retrieval, questions and their report.

Imports neither torch nor transformers until something here is used.
"""

_WHERE = {
    "Settings": "settings",
    "evaluate": "runner",
    "long_documents_of": "perplexity",
    "needles_of": "needle",
    "perplexity_of": "perplexity",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
