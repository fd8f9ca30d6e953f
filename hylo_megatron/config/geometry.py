"""``Geometry``: the dimensions of every mixer of a model, and the presets that fill them in for a base model."""

from dataclasses import asdict, make_dataclass

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import short
from hylo_megatron.json_file import check
from hylo_megatron.mixers import MIXERS, BaseHeads
from hylo_megatron.mixers.dimensions import Dimensions
from hylo_megatron.mixers.mla.geometry import with_latent

_KINDS = {name: entry for name, entry in MIXERS.items() if entry.geometry}
# Files of earlier versions have these three always, and lack the mixers that came later.
ALWAYS = ("mla", "gdn", "mamba2")
_FIELDS = [
    (name, entry.geometry) if name in ALWAYS else (name, entry.geometry | None, None) for name, entry in _KINDS.items()
]


class _Methods(Dimensions):
    def to_dict(self) -> dict:
        return {name: part for name, part in asdict(self).items() if part is not None}

    @classmethod
    def from_dict(cls, values: dict, where: str = "geometry") -> "Geometry":
        return check(values, cls, where)


Geometry = make_dataclass("Geometry", _FIELDS, bases=(_Methods,), frozen=True)
Geometry.__module__ = __name__  # make_dataclass takes a module from Python 3.12 on
Geometry.__doc__ = "One dataclass of dimensions for each mixer, by the mixer's name in the registry."

PRESETS = ("native", "published")
GEOMETRY_HELP = "native (what serving engines run unpadded) or published (the paper's), with :RANK+ROPE another latent"


def geometry_preset(name: str, hidden_size: int, num_attention_heads: int, head_dim: int) -> Geometry:
    """Return the preset ``native`` or ``published``; ``native:128+32``: with that MLA latent. Raises ``HyLoError``."""
    preset, latent = geometry_name(name)
    base = BaseHeads(hidden_size=hidden_size, num_heads=num_attention_heads, head_dim=head_dim)
    parts = {kind: getattr(entry.part("geometry"), preset)(base) for kind, entry in _KINDS.items()}
    if latent:
        parts["mla"] = with_latent(parts["mla"], head_dim, *latent)
    return Geometry(**parts)


def geometry_name(name: str, asked: str = "--geometry ") -> tuple[str, tuple[int, int] | None]:
    """Return the preset and the latent ``(rank, rope)`` of ``PRESET[:RANK+ROPE]``.

    Raises ``HyLoError``, whose message begins with ``asked``, what gave the name.
    """
    preset, colon, latent = name.partition(":")
    sizes = latent.split("+")
    fits = len(sizes) == 2 and all(size.isdecimal() and 0 < int(size) < 2**31 for size in sizes)
    if preset not in PRESETS or (colon and not fits):
        raise HyLoError(
            f"{asked}{short(name)}: expected one of {', '.join(PRESETS)}, or with another latent native:RANK+ROPE,"
            " such as native:128+32"
        )
    return preset, tuple(map(int, sizes)) if colon else None


def check_heads(head_dim: int, geometry: Geometry, kinds: set[str]) -> None:
    """Raise ``HyLoError`` for mixers that heads of ``head_dim`` cannot become, or that a GPU's kernels do not run."""
    for name, entry in _KINDS.items():
        if name in kinds:
            entry.part("geometry").check(head_dim, entry.dimensions(geometry))
