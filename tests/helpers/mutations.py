"""Malformed inputs out of good ones, for property-based tests of readers: ``hypothesis`` strategies."""

import copy
import json

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hylo_megatron.errors import HyLoError

FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same inputs in each run; a fault found once is found again
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NONSENSE = st.sampled_from(
    [None, True, False, 0, -1, 2**31, 2**63, 10**400, 0.5, 1e-320, float("nan"), float("inf"), -1e300, "", "0", "12",
     "x" * 5000, "\udcff", "１２", [], [None], [[]], {}, {"a": 1}, [0, "x"]]
)  # fmt: skip


def _places(value, path=()):
    """Every field of a JSON value, as the keys that lead to it."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


def _changed(value, path, action, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if action == "drop":
        del holder[path[-1]]
    elif action == "add" and isinstance(holder, dict):
        holder["surprise"] = new
    else:
        holder[path[-1]] = new
    return value


@st.composite
def json_values(draw, good):
    """``good`` with one field dropped, replaced by nonsense, or one more."""
    path = draw(st.sampled_from(list(_places(good))))
    return _changed(good, path, draw(st.sampled_from(["drop", "replace", "replace", "add"])), draw(NONSENSE))


def json_texts(good):
    """Bytes of a JSON file: ``json_values``, damaged bytes, or what no parser likes."""
    text = json.dumps(good).encode()
    odd = [b"", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf" + text, b"\xff" + text, text + text,
           b"9" * 5000, text[:-1]]  # fmt: skip
    # surrogates and 10**400 as well: json.dumps writes what the file of somebody may hold
    return st.one_of(
        json_values(good).map(lambda value: json.dumps(value).encode()), files(text), st.sampled_from(odd)
    )


@st.composite
def files(draw, good: bytes, last: int | None = None):
    """``good`` cut short, longer, or with up to three bytes changed (among the first ``last``)."""
    data = bytearray(good)
    action = draw(st.sampled_from(["cut", "grow", "flip", "flip", "flip"]))
    if action == "cut":
        return bytes(data[: draw(st.integers(0, max(0, len(data) - 1)))])
    if action == "grow":
        return bytes(data) + draw(st.binary(min_size=1, max_size=40))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(data), last or len(data)) - 1))
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


def refused_or_equal(read, good, same=lambda got, good: got == good):
    """What ``read`` makes of an input is ``good``, or a ``HyLoError`` of one short line."""
    try:
        got = read()
    except HyLoError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error), str(error)[:2000]
        return
    if not same(got, good):
        pytest.fail(f"taken: {got!r}"[:2000])
