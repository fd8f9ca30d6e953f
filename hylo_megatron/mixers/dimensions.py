"""What the geometries of mixers share, and the fields of ``config.json`` that hold them. No torch in here.

A mixer's ``geometry.py`` has a dataclass of its dimensions and

    CONFIG_FIELDS        its fields by the fields of ``config.json``
    CONFIG_DEFAULTS      the geometry of a ``HyLoConfig`` that leaves the fields out
    SHRUNK_BY            fields that the small model of a trial run divides, by the number of ``heads`` or by ``width``
    native, published    the presets for a base model
    check                refuses dimensions that a base model cannot become, or that no GPU kernel runs
"""

from dataclasses import replace
from typing import Any, ClassVar, get_type_hints

from pydantic import ConfigDict

from hylo_megatron.mixers.mixer import Mixer

WIDEST_HEAD = 256  # of flash attention, and of the kernels of Gated DeltaNet


class Dimensions:
    """Base of the dataclasses of dimensions, which are read from files: unknown keys are refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


def config_fields(entry: Mixer) -> dict[str, str]:
    """Return {field of ``config.json``: field of the geometry}."""
    return entry.part("geometry").CONFIG_FIELDS


def config_types(entry: Mixer) -> dict[str, Any]:
    """Return what each field of ``config.json`` may hold."""
    types = get_type_hints(entry.geometry, include_extras=True)
    return {field: types[name] for field, name in config_fields(entry).items()}


def config_defaults(entry: Mixer) -> dict[str, Any]:
    """Return the value of each field that a caller of ``HyLoConfig`` leaves out."""
    return geometry_to_config(entry, entry.part("geometry").CONFIG_DEFAULTS)


def geometry_to_config(entry: Mixer, geometry) -> dict[str, Any]:
    """Return the fields of ``config.json`` for the mixer's dimensions."""
    return {field: getattr(geometry, name) for field, name in config_fields(entry).items()}


def config_to_geometry(entry: Mixer, config):
    """Return the mixer's dimensions from the attributes of ``config``."""
    return entry.geometry(**{name: getattr(config, field) for field, name in config_fields(entry).items()})


def shrunk(entry: Mixer, geometry, *, heads: int, width: int):
    """Return the dimensions for a small model: heads ``heads`` times and hidden states ``width`` times narrower."""
    by, table = {"heads": heads, "width": width}, entry.part("geometry").SHRUNK_BY
    sizes = {name: getattr(geometry, name) for name in table}
    return replace(geometry, **{name: size and size // by[table[name]] for name, size in sizes.items()})
