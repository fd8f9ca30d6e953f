"""Register of every name of another library that this product replaces at run time.

An entry point calls ``install`` with a group. No import of this package replaces anything, with one exception:
``import hylo_megatron`` registers the hybrid with transformers. Each entry names the versions of the package that it
was written for. ``install`` refuses other versions.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from hylo_megatron.engine.patch import MISSING, Patch, Place, installed_version
from hylo_megatron.errors import HyLoError

ALLOW = "HYLO_ALLOW_UNTESTED_VERSIONS"


def import_megatron() -> None:
    """Import the parts of megatron-core that are changed. Raises ``HyLoError`` when megatron does not import."""
    try:
        with installed("importing"):
            import megatron.core
            import megatron.core.ssm.gated_delta_net  # noqa: F401
    except ImportError as error:
        raise HyLoError(
            f"megatron-core does not import ({error}): it brings training and checkpoints; "
            "install with  pip install 'hylo-megatron[train]'  (Python 3.12)"
        ) from error


@dataclass(frozen=True)
class Group:
    """Entries that are installed together, the modules that hold them, the groups they need, and what runs before."""

    what: str
    modules: tuple[str, ...]
    needs: tuple[str, ...] = ()
    before: Callable[[], None] | None = None


GROUPS = {
    "cpu": Group("torch without CUDA", ("cpu",)),
    "quiet": Group("warnings and log lines of megatron-core", ("quiet",)),
    "importing": Group("while megatron-core is imported", ("importing",), ("quiet",)),
    "reading": Group("reads of checkpoints and of sample indices", ("reading",), ("cpu", "quiet"), import_megatron),
    "megatron": Group("models and optimizers of megatron-core",
                      ("cpu", "linear_kernels", "distributed_optimizer", "own_states", "importing"),
                      ("reading",)),
    "results": Group("the queue of what was written", ("checkpoint_writer",)),
    "writing": Group("writes of checkpoints", ("checkpoint_writer",), ("cpu",)),
    "training": Group("the training loop, and how it saves and loads",
                      ("checkpoint_writer", "checkpoint_hooks", "training_hooks", "step_sync"),
                      ("megatron", "writing")),
    "tuning": Group("Triton's tuner", ("compile_ahead", "few_candidates")),
    "counting": Group("what a rank sends, while steps are profiled", ("sent_bytes",)),
    "transformers": Group("the auto classes of transformers", ("auto_classes",)),
    "vllm": Group("the vLLM plugin", ("vllm_plugin",)),
    "vllm model": Group("a hybrid in vLLM", ("vllm_plugin",)),
}  # fmt: skip


@dataclass(frozen=True)
class _Installed:
    original: Any
    undo: Any  # the original, or MISSING where it was inherited


_installed: dict[Patch, _Installed] = {}
_groups: set[str] = set()
_warned: set[str] = set()


def patches(*groups: str) -> list[Patch]:
    """Return the entries of these groups, or all. The modules that hold them import torch at most."""
    found = []
    for name in groups or GROUPS:
        for module in GROUPS[name].modules:
            entries = importlib.import_module(f"hylo_megatron.engine.{module}").PATCHES
            found += [patch for patch in entries if patch.group == name]
    return found


def with_needs(group: str) -> list[str]:
    """Return the names of the groups that ``group`` needs, in the order of installation, and its own."""
    before = [name for need in GROUPS[group].needs for name in with_needs(need)]
    return [*dict.fromkeys(before), group]


def install(group: str, run: Any = None) -> None:
    """Replace the names of ``group`` and of the groups that it needs. A second call changes nothing.

    ``run`` is what the replacements of a training share; a second call with another one installs them for that.
    Every entry of a group says whether it is needed before the first one is replaced, so none sees another's
    replacement. Raises ``HyLoError`` before the first replacement when a version is not listed.
    """
    names = with_needs(group)
    for patch in patches(*names):
        _check_version(patch)
    for name in names:
        if action := GROUPS[name].before:
            action()
        again = name == group and run is not None
        for patch in [patch for patch in patches(name) if (again if patch in _installed else patch.needed())]:
            _replace(patch, run)
        _groups.add(name)


def check_installed(group: str) -> None:
    """Raise ``HyLoError`` unless ``group`` is installed in this process."""
    if group not in _groups:
        raise HyLoError(
            f"{GROUPS[group].what}: the fixes of this package are not installed in this process; call"
            f' hylo_megatron.engine.register.install("{group}") first'
        )


def uninstall(*groups: str) -> None:
    """Put back the originals of these groups, the last one first."""
    for patch in reversed(_installed):
        if patch.group in groups:
            patch.place().set(_installed[patch].undo)
    for patch in [patch for patch in _installed if patch.group in groups]:
        del _installed[patch]
    _groups.difference_update(groups)


@contextlib.contextmanager
def installed(group: str) -> Iterator[None]:
    """Replace the names of ``group`` during the block; names that were replaced before stay so."""
    before = set(_groups)
    install(group)
    try:
        yield
    finally:
        uninstall(*(name for name in with_needs(group) if name not in before))


def original(target: str) -> Any:
    """Return the value of ``target`` without this product."""
    known = [there.original for patch, there in _installed.items() if patch.target == target]
    value = known[0] if known else Place.find(target).get()
    return getattr(value, "__func__", value) if isinstance(value, staticmethod | classmethod) else value


def lists(patch: Patch, version: str) -> bool:
    """Return whether the entry was written for this version of its package."""
    return SpecifierSet(patch.versions).contains(version, prereleases=True)


def _check_version(patch: Patch) -> None:
    found = installed_version(patch.package)
    if found is None or lists(patch, found):
        return
    what = f"{patch.package} {found}: {patch.target} is replaced in {patch.versioned()} only"
    if os.environ.get(ALLOW) != "1":
        raise HyLoError(f"{what}; pip install '{patch.versioned()}', or set {ALLOW}=1 to try this version")
    if patch.package not in _warned:
        _warned.add(patch.package)
        print(f"warning: {what}; {ALLOW}=1 lets this version pass", file=sys.stderr, flush=True)


def _replace(patch: Patch, run: Any) -> None:
    try:
        place = patch.place()
        value = place.get()
    except (ImportError, AttributeError, KeyError) as error:
        place, value, reason = None, MISSING, f" ({error})"
    if place is None or (value is MISSING and "missing" not in patch.expects.split(" or ")):
        raise HyLoError(
            f"{patch.package} {installed_version(patch.package)}: {patch.target} is not there, and would be replaced"
            f"{reason if place is None else ''}; pip install '{patch.versioned()}'"
        )
    if patch not in _installed:
        _installed[patch] = _Installed(value, MISSING if place.is_inherited() else value)
    place.set(patch.replacement(_installed[patch].original, run))


# ---- the register as text, for the doctor ----


def _by_package() -> dict[tuple[str, str], list[Patch]]:
    found: dict[tuple[str, str], list[Patch]] = {}
    for patch in patches():
        found.setdefault((patch.package, patch.versions), []).append(patch)
    return found


def _verdict(package: str, entries: Iterable[Patch]) -> str:
    version = installed_version(package)
    if version is None:
        return "-"
    return version if all(lists(patch, version) for patch in entries) else f"{version}: refused"


def package_lines() -> list[str]:
    """Return a line for each package: the versions listed, the one installed, and how many names are replaced."""
    lines = [f"{'names replaced in':24}{'versions':14}{'here':16}{'names':>5}  groups"]
    for (package, versions), entries in _by_package().items():
        groups = ", ".join(dict.fromkeys(patch.group for patch in entries))
        lines.append(f"{package:24}{versions:14}{_verdict(package, entries):16}{len(entries):5}  {groups}")
    return lines


def entry_lines() -> list[str]:
    """Return a line for each name, under the group that it belongs to."""
    lines = package_lines()
    for name, group in GROUPS.items():
        lines += ["", f"{name}: {group.what}"]
        for patch in patches(name):
            lines.append(f"  {patch.target}: {patch.why}")
    return lines
