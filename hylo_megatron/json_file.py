"""Read JSON files of other people, checked against a declared type. Errors name file and field. No torch.

A type is anything that pydantic validates strictly: a dataclass, a ``TypedDict``, ``dict[str, int]``, or one of the
numbers below. Booleans are not numbers, numbers are not strings, and ``NaN`` and ``Infinity`` are never allowed.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from hylo_megatron.errors import HyLoError
from hylo_megatron.files import not_downloaded

T = TypeVar("T")
Object = dict[str, Any]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Dimension = Annotated[int, Field(ge=1, lt=2**31)]  # a dimension of a model
PartDimension = Annotated[int, Field(ge=0, lt=2**31)]  # a dimension of a part that may be absent
Number = Annotated[float, Field(allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _not_finite(word: str):
    raise ValueError(f"{word} is no JSON number")


def _finite_float(word: str) -> float:
    return value if math.isfinite(value := float(word)) else _not_finite(word)


def parse(text: str | bytes, where: str, advice: str = "") -> Any:
    """Return the value of JSON ``text``. An error says ``where`` it is, and gives the ``advice``."""
    try:
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite_float)
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
    except ValueError as error:  # also Python's own limit on digits
        reason = str(error).split(";")[0]
    raise HyLoError(f"{where}: not valid JSON ({reason}){_then(advice)}") from None


@functools.cache
def _validator(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def check(value: Any, kind: type[T], where: str, advice: str = "") -> T:
    """Return the parsed ``value`` as a ``kind``. Raises ``HyLoError`` that names the first wrong field."""
    try:
        return _validator(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "the whole"
    found = f"is {shown(first['input'])}: {_lower(first['msg'])}"
    if first["type"] in ("missing", "missing_argument"):
        found = "is missing"
    elif first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        found = "is unknown"
    raise HyLoError(f"{where}: field {field} {found}{_then(advice)}") from None


def read_json(path: str | os.PathLike, kind: type[T] = Object, advice: str = "") -> T:
    """Read the JSON file ``path`` as a ``kind``. Raises ``HyLoError`` if that is impossible."""
    path = Path(path)
    if reason := not_downloaded(path):
        raise HyLoError(f"{path}: {reason}")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise HyLoError(f"{path} not found{_then(advice)}") from None
    except OSError as error:
        raise HyLoError(f"{path}: cannot be read ({error.strerror}){_then(advice)}") from None
    return check(parse(text, str(path), advice), kind, str(path), advice)


def _then(advice: str) -> str:
    return f"; {advice}" if advice else ""


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def shown(value: Any) -> str:
    """Return a value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
