"""What the geometries of mixers share."""

from typing import ClassVar

from pydantic import ConfigDict

WIDEST_HEAD = 256  # of flash attention, and of the kernels of Gated DeltaNet


class Dimensions:
    """Base of the dataclasses of dimensions, which are read from files: unknown keys are refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
