"""Warnings and log lines of megatron-core that say nothing to a user of this product."""

import re

from hylo_megatron.engine.patch import entries

_MESSAGES = re.compile(r".*(transformer.engine|Apex|apex|barrier\(\)|nvidia_resiliency_ext).*", re.IGNORECASE)
_MODULES = re.compile(r"megatron\..*")
_RULES = [("ignore", _MESSAGES, Warning, None, 0), ("ignore", None, Warning, _MODULES, 0)]


def _without(text: str):
    """Return the replacement of a logger's filters: those that are there, and one that drops lines with ``text``."""
    return lambda filters, run: [*filters, lambda record: text not in record.getMessage()]


PATCHES = entries(
    "quiet", "megatron-core",
    ("warnings:filters", lambda filters, run: [*_RULES, *filters], "list",
     "dozens of warnings at each start, about packages that are optional"),
    ("logging:getLogger(megatron.core.tensor_parallel.random).filters", _without("CPU RNG state changed"), "list",
     "without CUDA the generator of the CPU takes part in every step, and changes"),
) + entries(
    "quiet", "torch",
    ("logging:getLogger(torch.utils.cpp_extension).filters", _without("No CUDA runtime is found"), "list",
     "said at each import on a machine without CUDA that has nvcc (torch/utils/cpp_extension.py:178)"),
)  # fmt: skip
