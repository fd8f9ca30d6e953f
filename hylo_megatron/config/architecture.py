"""``Architecture``: everything that defines a model, teacher or hybrid; ``hylo.json`` beside each checkpoint."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hylo_megatron.config.geometry import Geometry
from hylo_megatron.config.rope import fix_original_length
from hylo_megatron.errors import HyLoError

FILE_NAME = "hylo.json"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with SwiGLU MLPs whose token mixers follow ``plan``.

    ``rope_parameters`` is transformers' dictionary (``rope_type``, ``rope_theta``, scaling fields).
    ``geometry`` is set when the plan has mixers other than ``attention``. ``qk_norm``: per-head RMSNorm on queries
    and keys of attention (Qwen3); ``mla_qk_norm``: the same in MLA layers. ``extra`` is carried along untouched (token
    ids, the layer norms that ILD divides by).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict
    tie_word_embeddings: bool
    plan: tuple[str, ...]
    attention_bias: bool = False
    qk_norm: bool = False
    mla_qk_norm: bool = False
    geometry: Geometry | None = None
    extra: dict = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.plan)

    @property
    def is_hybrid(self) -> bool:
        return any(kind != "attention" for kind in self.plan)

    @property
    def linear_kind(self) -> str:
        return "mamba2" if "mamba2" in self.plan else "gdn"

    def as_teacher(self) -> "Architecture":
        return replace(self, plan=("attention",) * self.num_layers, geometry=None)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one more token adds to the cache (states of fixed size not counted)."""
        per_kind = {"attention": 2 * self.num_key_value_heads * self.head_dim}
        if self.geometry:
            per_kind["mla"] = self.geometry.mla.kv_lora_rank + self.geometry.mla.qk_rope_head_dim
        return bytes_per_value * sum(per_kind.get(kind, 0) for kind in self.plan)

    def to_dict(self) -> dict:
        values = asdict(self)
        values["plan"] = list(self.plan)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "Architecture":
        values = dict(values)
        values["plan"] = tuple(values["plan"])
        # Checkpoints of earlier versions may lack the length that YaRN starts from.
        values["rope_parameters"] = fix_original_length(values["rope_parameters"], values["max_position_embeddings"])
        if values.get("geometry"):
            values["geometry"] = Geometry.from_dict(values["geometry"])
        return cls(**values)

    def save(self, folder: str | os.PathLike) -> None:
        path = Path(folder) / FILE_NAME
        scratch = path.with_suffix(".json.partial")
        scratch.write_text(json.dumps(self.to_dict(), indent=1))
        os.replace(scratch, path)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Architecture":
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise HyLoError(
                f"{path} not found: expected a checkpoint made by convert_hf_to_megatron.py, upcycle.py or training"
            )
        return cls.from_dict(json.loads(path.read_text()))
