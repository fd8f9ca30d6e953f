"""``Architecture``: everything that defines a model, Transformer or hybrid; ``hylo.json`` of each checkpoint."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from hylo_megatron.config import positions
from hylo_megatron.config.geometry import ALWAYS, Geometry
from hylo_megatron.config.plan import Plan
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.json_file import Dimension, Positive, check, read_json
from hylo_megatron.mixers import MIXERS

FILE_NAME = "hylo.json"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ADVICE = "expected a file that hylo convert, hylo upcycle or training wrote: copy it again"


class Extra(TypedDict, total=False):
    """Entries that belong to a model and not to its computation. Other keys are kept as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")

    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None
    ild_norms: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]]


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with SwiGLU MLPs whose token mixers follow ``plan``.

    ``rope_parameters`` is transformers' dictionary (``rope_type``, ``rope_theta``, scaling fields). ``geometry`` is
    set when the plan has mixers other than ``attention``. ``qk_norm`` is a per-head RMSNorm on queries and keys of
    attention (Qwen3), ``mla_qk_norm`` the same in MLA layers. ``config/positions.py`` explains ``mla_rope``,
    ``linear_rope``, ``log_scale`` and ``window``. ``extra`` is kept as it is: token ids, and the norms of
    the teacher's layers that ILD divides by.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    model_type: Literal[MODEL_TYPES]
    vocab_size: Dimension
    hidden_size: Dimension
    intermediate_size: Dimension
    num_attention_heads: Dimension
    num_key_value_heads: Dimension
    head_dim: Dimension
    rms_norm_eps: Positive
    max_position_embeddings: Dimension
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    plan: tuple[Literal[tuple(MIXERS)], ...]
    attention_bias: bool = False
    qk_norm: bool = False
    mla_qk_norm: bool = False
    geometry: Geometry | None = None
    extra: Extra = field(default_factory=dict)
    mla_rope: bool = positions.FIELDS["mla_rope"]
    linear_rope: bool = positions.FIELDS["linear_rope"]
    log_scale: positions.LogScale | None = positions.FIELDS["log_scale"]
    window: positions.Window | None = positions.FIELDS["window"]

    def __post_init__(self):
        object.__setattr__(self, "plan", Plan(self.plan))  # files and transformers have a list
        if self.geometry:  # readers of earlier versions refuse the dimensions of mixers that they do not know
            unused = dict.fromkeys(vars(self.geometry).keys() - {*ALWAYS, *self.plan})
            object.__setattr__(self, "geometry", replace(self.geometry, **unused))

    @property
    def num_layers(self) -> int:
        return len(self.plan)

    @property
    def is_hybrid(self) -> bool:
        return self.plan.is_hybrid

    @property
    def linear_kind(self) -> str:
        return self.plan.linear_kind

    def as_teacher(self) -> "Architecture":
        """Return the architecture of a base model with the same sizes."""
        plan = Plan.transformer(self.num_layers)
        return replace(self, plan=plan, geometry=None, **positions.FIELDS)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one more token adds to the cache. States of fixed size are not counted."""
        kinds = [MIXERS[kind] for kind in self.plan if not MIXERS[kind].linear]
        return bytes_per_value * sum(entry.part("memory").cached_values(self) for entry in kinds)

    def window_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that a request's windows cache, whatever the length of its text."""
        rows = sum(positions.window_rows(self.window) for kind in self.plan if positions.has_window(self.window, kind))
        return bytes_per_value * rows * MIXERS["attention"].part("memory").cached_values(self)

    def to_dict(self) -> dict:
        values = asdict(self)
        values["plan"] = list(self.plan)
        for name, default in positions.FIELDS.items():  # earlier versions read files without settings new to them
            if values[name] == default:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict, where: str = FILE_NAME) -> "Architecture":
        """Return the architecture that ``values`` describe; ``where`` is their name in a refusal.

        Raises ``HyLoError`` if no model can be built of them.
        """
        arch = check(values, cls, where, ADVICE)
        # Checkpoints of earlier versions may lack the length that YaRN starts from.
        rope = checked_rope(arch.rope_parameters, arch.max_position_embeddings, f"{where}: rope_parameters")
        if reason := misfit(arch):
            raise HyLoError(f"{where}: {reason}; {ADVICE}")
        return replace(arch, rope_parameters=rope)

    def save(self, folder: str | os.PathLike) -> None:
        write_json(Path(folder) / FILE_NAME, self.to_dict())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Architecture":
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise HyLoError(f"{path} not found: expected a checkpoint made by hylo convert, hylo upcycle or training")
        return cls.from_dict(read_json(path), str(path))


def misfit(arch: Architecture) -> str | None:
    """Return which fields contradict one another, or None."""
    if not arch.plan:
        return "plan has no layers"
    if arch.is_hybrid != (arch.geometry is not None):
        return "geometry is missing" if arch.is_hybrid else "geometry is set, but all layers of the plan are attention"
    norms = arch.extra.get("ild_norms")
    if norms is not None and len(norms) != arch.num_layers:
        return f"extra.ild_norms has {len(norms)} entries for {arch.num_layers} layers"
    shared = [("num_attention_heads", arch.num_attention_heads, "num_key_value_heads", arch.num_key_value_heads)]
    for name in dict.fromkeys(arch.plan):
        if MIXERS[name].geometry and getattr(arch.geometry, name) is None:
            return f"geometry.{name} is missing, and the plan has such layers"
        for many, few in MIXERS[name].multiples:
            part = getattr(arch.geometry, name)
            shared.append((f"{name}.{many}", getattr(part, many), f"{name}.{few}", getattr(part, few)))
    letters = {}
    for name in dict.fromkeys(arch.plan):
        if (other := letters.setdefault(MIXERS[name].symbol, name)) != name:
            return f"plan has {other} and {name} layers, which megatron-core cannot tell apart in one model"
    for many, count, few, divisor in shared:
        if count % divisor:
            return f"{many} is {count}, expected a multiple of {few} ({divisor})"
    if reason := positions.misfit(arch):
        return reason
    rotated = {"head_dim": arch.head_dim}
    if "mla" in arch.plan:
        rotated["mla.qk_rope_head_dim"] = arch.geometry.mla.qk_rope_head_dim
    for name, size in rotated.items():
        if size % 2:
            return f"{name} is {size}, expected an even number: rotary embeddings turn pairs"
    return None
