"""A digest of a teacher's folder. Another teacher has another digest, even if names and sizes of files are equal."""

import json
from hashlib import sha256
from pathlib import Path

from hylo_megatron.errors import HyLoError

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SAMPLE = 4096  # bytes of the start, the middle and the end of each tensor


def fingerprint(folder: Path) -> str:
    """Return a digest of the configuration, the tokenizer, the safetensors headers and some bytes of every tensor.

    Raises ``HyLoError`` if a file cannot be read.
    """
    found = sha256()
    for path in [*(folder / name for name in SMALL_FILES), *sorted(folder.glob("*.safetensors"))]:
        if not path.is_file():
            continue
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        for part in _tensor_bytes(path) if path.suffix == ".safetensors" else (path.read_bytes(),):
            found.update(part)
    return found.hexdigest()[:16]


def _tensor_bytes(path: Path):
    """Yield the header of a safetensors file, and ``SAMPLE`` bytes from three places of each of its tensors."""
    with path.open("rb") as file:
        try:
            header = file.read(int.from_bytes(file.read(8), "little"))
            tensors = json.loads(header)
            spans = sorted(entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__")
        except (ValueError, TypeError, AttributeError, KeyError, MemoryError, OverflowError):
            raise HyLoError(f"{path}: damaged, expected a safetensors file: copy it again") from None
        yield header
        first = 8 + len(header)
        for begin, end in spans:
            for at in (begin, (begin + end - SAMPLE) // 2, end - SAMPLE):
                at = max(at, begin)
                file.seek(first + at)
                yield file.read(min(SAMPLE, end - at))
