"""``config.json`` of an exported Transformer: the base model's, with what training has changed."""

import json
from pathlib import Path

import torch

from hylo_megatron.config import Architecture
from hylo_megatron.convert.hf_folder import read_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import read_json

CHANGED = ("rope_parameters", "max_position_embeddings")  # all that a stage changes in a Transformer


def write_transformer_config(arch: Architecture, base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write ``folder/config.json``. Raises ``HyLoError`` if the file would describe another model than ``arch``.

    ``base`` holds the base model's ``config.json``, whose other fields are kept as they are.
    """
    config = read_json(base / "config.json", advice="expected the base model's")
    config["dtype"] = str(dtype).removeprefix("torch.")
    before = read_architecture(base)
    if any(getattr(arch, name) != getattr(before, name) for name in CHANGED):
        for name in ("rope_theta", "rope_scaling"):  # older spellings, which would contradict
            config.pop(name, None)
        config |= {name: getattr(arch, name) for name in CHANGED}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    found = read_architecture(folder)
    for name in CHANGED:
        if getattr(found, name) != getattr(arch, name):
            raise HyLoError(
                f"{folder / 'config.json'}: {name} would read as {getattr(found, name)}, expected"
                f" {getattr(arch, name)}; this model's config.json cannot say so"
            )
