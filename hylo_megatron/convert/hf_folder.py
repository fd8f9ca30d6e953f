"""Read the safetensors of a Hugging Face folder, one tensor at a time. Pickles are not read."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import TypedDict

from hylo_megatron.checkpoint import disk
from hylo_megatron.config import Architecture
from hylo_megatron.config.architecture import FILE_NAME
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import not_downloaded
from hylo_megatron.json_file import Object, check, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_QUANTISED = re.compile(
    r"(\.|_)(qweight|qzeros|scales?|scale_inv|scale_2|g_idx|zero_points?|weight_packed|weight_shape|weight_scale.*"
    r"|weight_format|absmax|(nested_)?quant_map|quant_state\..*|SCB|CB)$"
)
_SIDECARS = ("hf_quant_config.json", "quant_config.json", "quantize_config.json")
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # compared at a time, since embeddings are a model's largest tensors


class _Index(TypedDict):
    weight_map: dict[str, str]


class HFWeights:
    """The tensors of a folder, opened lazily and checked against an architecture before anything is read.

    The choice of files and of tensor names follows transformers.
    """

    described_by = "config.json"
    unmapped = "; if the model computes without it, remove it from the file"
    allow_nan, let_pass = False, ", or let it pass with --allow-nan"

    def __init__(self, folder: str | os.PathLike, arch: Architecture, allow_nan: bool = False):
        self.folder, self.expected, self.allow_nan = Path(folder), hf_shapes(arch), allow_nan
        self._files: dict[str, object] = {}
        self.where = self._index()
        self._refuse_quantised()
        self.names = self._names({**self.expected, _HEAD: ()})
        self.where = {key: self.where[name] for key, name in self.names.items()}
        self.where = {k: v for k, v in self.where.items() if not k.endswith("rotary_emb.inv_freq")}
        self._check(arch.tie_word_embeddings)

    def _index(self) -> dict[str, str]:
        """Return the file of each tensor, by the tensor names in the files."""
        if (self.folder / _SINGLE).is_file():  # transformers then ignores an index
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        index = self.folder / _INDEX
        if not index.is_file():
            raise HyLoError(f"{self.folder}: no {_SINGLE} and no {_INDEX}{self._hint()}")
        content = read_json(index, Object, "download it again")
        where = check(content, _Index, str(index), "download it again")["weight_map"]
        for key, name in where.items():
            if name in (".", "..") or re.search(r"[/\\\0]", name):
                raise HyLoError(f"{index}: tensor {key} is in {name!r}, expected a file of the same folder")
        self._check_shards(index, where)
        return where

    def _check_shards(self, index: Path, where: dict[str, str]) -> None:
        """Check that index and shards agree: transformers reads what the shards have, whatever the index says."""
        for shard in sorted(set(where.values())):
            for key in self._open(shard).keys():  # noqa: SIM118
                if where.get(key) != shard:
                    place = f"in {where[key]}" if key in where else "nowhere"
                    raise HyLoError(f"{self.folder / shard}: has tensor {key}, which {index.name} puts {place};"
                                    " download both again")  # fmt: skip

    def _hint(self) -> str:
        for name in (_SINGLE, _INDEX):
            if reason := not_downloaded(self.folder / name):
                return f"; {name} is {reason}"
        if (self.folder.parent / FILE_NAME).is_file():
            return "; it belongs to the checkpoint beside it, of which hylo export writes a folder with weights"
        for pattern, what in (("*.gguf", "is a GGUF file: give the model's folder of safetensors"),
                              ("adapter_model.*", "is an adapter: merge it into its base model first"),
                              ("*.bin", "is a pickle, which is not read: save the model as safetensors"),
                              ("*.pt*", "is a pickle, which is not read: save the model as safetensors"),
                              ("*.safetensors", f"has another name than {_SINGLE}")):  # fmt: skip
            if found := sorted(path.name for path in self.folder.glob(pattern)):
                return f"; {found[0]} {what}"
        return ""

    def _refuse_quantised(self) -> None:
        """Refuse quantised weights wherever the folder shows them, before any shape is compared."""
        for name in _SIDECARS:
            path = self.folder / name
            values = read_json(path) if path.is_file() else {}
            inner = values.get("quantization", values)
            method = isinstance(inner, dict) and (inner.get("quant_algo") or inner.get("bits") or inner.get("w_bit"))
            if method:
                raise HyLoError(f"{path}: the weights are quantised ({method}); dequantise the model first")
        for key, name in self.where.items():
            dtype = self._slice(key, name).get_dtype()
            if _OF_QUANTISED.search(key) or dtype not in _DTYPES:
                raise HyLoError(
                    f"{self.folder / name}: tensor {key} (dtype {dtype}) belongs to quantised weights; dequantise the"
                    f" model first (expected one of {', '.join(_DTYPES)})"
                )

    def _names(self, known) -> dict[str, str]:
        """Return ``{our name: the file's name}``. As in transformers, a prefix of the model is added or dropped."""
        names: dict[str, str] = {}
        for name in self.where:
            short, long = name.removeprefix("model."), f"model.{name}"
            key = next((key for key in (short, long) if name not in known and key in known), name)
            if key in names:
                raise HyLoError(f"{self.folder}: tensors {names[key]} and {name} are the same one; remove one of them")
            names[key] = name
        return names

    def _open(self, name: str):
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            path = self.folder / name
            if not path.is_file():
                reason = not_downloaded(path)
                if reason:
                    raise HyLoError(f"{path}: {reason}")
                raise HyLoError(f"{path} not found: the index names it; download the missing shard")
            try:
                self._files[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                reason = not_downloaded(path) or f"truncated or damaged ({error}); download it again"
                raise HyLoError(f"{path}: {reason}") from None
        return self._files[name]

    def _slice(self, name: str, file: str):
        from safetensors import SafetensorError

        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise HyLoError(f"{self.folder / file}: tensor {name} cannot be read ({error})") from None

    def _at(self, key: str):
        return self._slice(self.names.get(key, key), self.where[key])

    def _check(self, tied: bool) -> None:
        copied = tied and self.where.pop(_HEAD, None)
        for key, shape in self.expected.items():
            if key not in self.where:
                raise HyLoError(
                    f"{self.folder}: tensor {key} is missing; expected shape {list(shape)}{self._alike(key)}"
                )
            found = tuple(self._at(key).get_shape())
            if found != shape:
                raise HyLoError(
                    f"{self.folder / self.where[key]}: tensor {key} has shape {list(found)}, {self.described_by} asks"
                    f" for {list(shape)}; weights and config do not belong together"
                )
            self.dtype(key)
        if unused := sorted(set(self.where) - set(self.expected)):
            raise HyLoError(
                f"{self.folder}: unexpected tensor {unused[0]} ({len(unused)} in all) has no mapping{self.unmapped}"
            )
        if copied:
            self._check_copy(copied)

    def _alike(self, key: str) -> str:
        other = next((name for name in sorted(self.where) if name.endswith(f".{key.removeprefix('model.')}")), None)
        return f"; {other} has another prefix, rename the tensors" if other else ""

    def _check_copy(self, file: str) -> None:
        """Check that an ``lm_head`` beside tied embeddings equals them.

        transformers keeps a different ``lm_head``, other tools use only one of the two tensors.
        """
        head, table = self._slice(self.names.get(_HEAD, _HEAD), file), self._at(_TABLE)
        rows = range(0, self.expected[_TABLE][0], _ROWS)
        same = head.get_shape() == table.get_shape() and head.get_dtype() == table.get_dtype()
        same = same and all(
            torch.equal(*(part[i : i + _ROWS].view(torch.uint8) for part in (head, table))) for i in rows
        )
        if not same:
            raise HyLoError(
                f"{self.folder / file}: lm_head.weight differs from model.embed_tokens.weight, though config.json has"
                " tie_word_embeddings true; set it to false to keep both, or remove lm_head.weight from the file"
            )

    def dtype(self, key: str) -> torch.dtype:
        name = self._at(key).get_dtype()
        if name not in _DTYPES:
            raise HyLoError(
                f"{self.folder / self.where[key]}: tensor {key} has dtype {name}; expected one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[name]

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._open(self.where[key]).get_tensor(self.names.get(key, key))
        if not self.allow_nan and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise HyLoError(
                f"{self.folder / self.where[key]}: tensor {key} holds NaN or Inf; download it again{self.let_pass}"
            )
        return tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises ``HyLoError``, also for a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # save_file makes a file that only its owner can read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        full = disk.explained(error, path, sum(tensor.nbytes for tensor in tensors.values()))
        raise full or HyLoError(f"cannot write {path} ({error}): choose another folder") from None
