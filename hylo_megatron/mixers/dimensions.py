"""What the geometries of mixers share.

A mixer's ``geometry.py`` has a dataclass of its dimensions and

    CONFIG_FIELDS, CONFIG_DEFAULTS    its fields of ``config.json``: ``config_fields.py``
    native, published                 the presets for a base model
    shrunk                            the dimensions for the small model of a trial run
    check                             refuses dimensions that a base model cannot become, or that no GPU kernel runs
"""

from typing import ClassVar

from pydantic import ConfigDict

WIDEST_HEAD = 256  # of flash attention, and of the kernels of Gated DeltaNet


class Dimensions:
    """Base of the dataclasses of dimensions, which are read from files: unknown keys are refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
