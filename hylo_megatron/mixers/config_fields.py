"""Fields of ``config.json`` that hold the dimensions of mixers. No torch in here.

A mixer's ``geometry.py`` has two tables. ``CONFIG_FIELDS`` maps fields of ``config.json`` to those of the geometry.
``CONFIG_DEFAULTS`` is the geometry of a ``HyLoConfig`` that leaves the fields out.
"""

from typing import Any, get_type_hints

from hylo_megatron.mixers.mixer import Mixer


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
