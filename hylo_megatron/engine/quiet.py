"""Warnings and log lines of megatron-core that say nothing to a user of this product."""

import re
from functools import partial

from hylo_megatron.engine.patch import Patch

_MESSAGES = re.compile(r".*(transformer.engine|Apex|apex|barrier\(\)|nvidia_resiliency_ext).*", re.IGNORECASE)
_MODULES = re.compile(r"megatron\..*")
_RULES = [("ignore", _MESSAGES, Warning, None, 0), ("ignore", None, Warning, _MODULES, 0)]


def _without(text: str):
    """Return the replacement of a logger's filters: those that are there, and one that drops lines with ``text``."""
    return lambda filters, run: [*filters, lambda record: text not in record.getMessage()]


_quiet = partial(Patch, group="quiet", package="megatron-core", versions="==0.19.2")
PATCHES = (
    _quiet(
        target="warnings:filters",
        replacement=lambda filters, run: [*_RULES, *filters],
        why="dozens of warnings at each start, about packages that are optional",
        expects="list",
    ),
    Patch(
        group="quiet",
        package="torch",
        versions=">=2.11",
        target="logging:getLogger(torch.utils.cpp_extension).filters",
        replacement=_without("No CUDA runtime is found"),
        why="said at each import on a machine without CUDA that has nvcc",
        upstream="torch/utils/cpp_extension.py:178",
        expects="list",
    ),
    _quiet(
        target="logging:getLogger(megatron.core.tensor_parallel.random).filters",
        replacement=_without("CPU RNG state changed"),
        why="without CUDA the generator of the CPU takes part in every step, and changes",
        expects="list",
    ),
)
