"""The register as text, for the doctor."""

from collections.abc import Iterable

from hylo_megatron.engine.patch import Patch, installed_version
from hylo_megatron.engine.register import GROUPS, lists, patches


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
    """A line for each package: which versions are listed, which one is installed, and how many names are replaced."""
    lines = [f"{'names replaced in':24}{'versions':14}{'here':16}{'names':>5}  groups"]
    for (package, versions), entries in _by_package().items():
        groups = ", ".join(dict.fromkeys(patch.group for patch in entries))
        lines.append(f"{package:24}{versions:14}{_verdict(package, entries):16}{len(entries):5}  {groups}")
    return lines


def entry_lines() -> list[str]:
    """A line for each name, under the group that it belongs to."""
    lines = package_lines()
    for name, group in GROUPS.items():
        lines += ["", f"{name}: {group.what}"]
        for patch in patches(name):
            lines.append(f"  {patch.target}: {patch.why}")
    return lines
