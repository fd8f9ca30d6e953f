"""One entry of the register: a name of another library that is replaced at run time."""

import functools
import importlib
import inspect
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hylo_megatron.packages import version_of

SHOWN = 60  # characters of a list of parameters
# The versions of each package that the entries were written for.
VERSIONS = {"megatron-core": "==0.19.2", "torch": ">=2.11", "transformers": ">=5.6.2,<6", "vllm": ">=0.26,<0.33",
            "flash-linear-attention": "==0.6.0", "triton": ">=3.6,<3.8"}  # fmt: skip
MISSING = object()  # the value of a name that does not exist; as a replacement: delete the name
_STEP = re.compile(r"\.?(?P<attribute>\w+)(?:\((?P<argument>[^)]*)\))?|\[(?P<key>[^]]*)\]")


def always() -> bool:
    return True


def instead(value: Any) -> Callable[[Any, Any], Any]:
    """Return the ``replacement`` of a patch that puts ``value`` there, whatever was there before."""
    return lambda original, run: value


def around(function: Callable) -> Callable[[Any, Any], Callable]:
    """Return the ``replacement`` of a patch whose calls are ``function(original, run, *arguments)``."""

    def replacement(original: Any, run: Any) -> Callable:
        @functools.wraps(original)
        def call(*args, **kwargs):
            return function(original, run, *args, **kwargs)

        return call

    return replacement


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """A name, what takes its place, and what is known about the place.

    ``target`` is ``module:path``. A path has attributes, keys and calls: ``torch:Tensor.cuda``, ``os:environ[HOME]``,
    ``logging:getLogger(torch).filters``. ``replacement`` is called with the original and with what the entry point
    gave to ``install``, and returns the new value. ``expects`` describes the original as ``describe`` does, with "or"
    between alternatives. ``why`` ends with the place in the library's source, where that helps.
    """

    group: str
    target: str
    replacement: Callable[[Any, Any], Any]
    why: str
    package: str
    versions: str
    expects: str
    needed: Callable[[], bool] = always

    def place(self) -> "Place":
        return Place.find(self.target)

    def fits(self, value: Any) -> bool:
        """Return whether ``value`` is what the entry was written for."""
        return describe(value) in self.expects.split(" or ")

    def versioned(self) -> str:
        return f"{self.package}{self.versions}"


def entries(group: str, package: str, *rows: tuple[str, Callable, str, str], needed=always) -> tuple[Patch, ...]:
    """Return an entry for each row: target, replacement, what is expected there, and why it is replaced."""
    return tuple(
        Patch(group=group, package=package, versions=VERSIONS[package], needed=needed, target=target,
              replacement=replacement, expects=expects, why=why)
        for target, replacement, expects, why in rows
    )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a value is kept: an attribute or a key of ``owner``."""

    owner: Any
    name: str
    is_key: bool

    @classmethod
    def find(cls, target: str) -> "Place":
        """Import the module of ``target`` and walk its path. Raises ``AttributeError`` or ``KeyError`` on the way."""
        module, _, path = target.partition(":")
        owner = importlib.import_module(module)
        *steps, last = _STEP.finditer(path)
        for step in steps:
            if step["key"] is not None:
                owner = owner[step["key"]]
                continue
            owner = getattr(owner, step["attribute"])
            if step["argument"] is not None:
                owner = owner(step["argument"])
        is_key = last["key"] is not None
        return cls(owner, last["key"] if is_key else last["attribute"], is_key)

    def get(self) -> Any:
        """Return the value as the owner itself holds it, for example a class method's descriptor."""
        if self.is_key:
            return self.owner.get(self.name, MISSING)
        if inspect.isclass(self.owner) and self.name in vars(self.owner):
            return vars(self.owner)[self.name]
        return getattr(self.owner, self.name, MISSING)

    def is_inherited(self) -> bool:
        return not self.is_key and inspect.isclass(self.owner) and self.name not in vars(self.owner)

    def set(self, value: Any) -> None:
        if value is not MISSING:
            if self.is_key:
                self.owner[self.name] = value
            else:
                setattr(self.owner, self.name, value)
        elif self.is_key:
            self.owner.pop(self.name, None)
        else:
            delattr(self.owner, self.name)


def describe(value: Any) -> str:
    """Return what a value is, for comparison with ``expects``: the parameters of a function, else its type.

    A long list of parameters is cut; their number and a hash of the whole list follow.
    """
    if value is MISSING:
        return "missing"
    if inspect.isclass(value):
        return "class"
    if not callable(value) and not isinstance(value, staticmethod | classmethod):
        return type(value).__name__
    try:
        parameters = list(inspect.signature(getattr(value, "__func__", value)).parameters.values())
    except (TypeError, ValueError):  # written in C
        return "builtin"
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters)
    if len(text) > SHOWN:
        text = f"{text[:SHOWN].rpartition(',')[0]}, ... {len(parameters)}, {zlib.crc32(text.encode()):08x}"
    return f"({text})"


def installed_version(package: str) -> str | None:
    """Return the version of a package as installed here. vLLM's CPU build has a name of its own."""
    return version_of(package, f"{package}-cpu")
