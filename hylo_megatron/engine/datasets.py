"""megatron-core's data sets without a compiler of C++."""

import importlib.util

from hylo_megatron.engine.patch import Patch, instead

PATCHES = (
    Patch(
        group="megatron",
        package="megatron-core",
        versions="==0.19.2",
        target="megatron.core.datasets.utils:compile_helpers",
        replacement=instead(lambda: None),
        why="the wheel brings the helpers compiled, and no Makefile: compiling them at the start fails",
        upstream="megatron/core/datasets/utils.py",
        expects="()",
        needed=lambda: importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
    ),
)
