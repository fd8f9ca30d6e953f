"""Whether a teacher can teach a student; no torch in here."""

from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Count, read_json


def padded_rows(student: Architecture, teacher: Architecture, tp: int) -> int:
    """Vocabulary rows of both heads: shards of student and teacher have to be of the same tokens."""
    return -(-max(student.vocab_size, teacher.vocab_size) // tp) * tp


class _Named(TypedDict):
    id: Count


class _Vocabulary(TypedDict):
    vocab: dict[str, Count] | list[Any]


class _Tokenizer(TypedDict):
    model: _Vocabulary
    added_tokens: NotRequired[list[_Named]]


def _tokens(tokenizer: Path) -> int:
    """One more than the largest token id."""
    values = read_json(tokenizer, _Tokenizer, "expected the base model's tokenizer.json")
    vocabulary = values["model"]["vocab"]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max(ids + [token["id"] for token in values.get("added_tokens", ())], default=-1)


def check_vocabularies(student: Architecture, teacher: Architecture, tokenizers: tuple[Path, Path]) -> None:
    """Raises ``HyLoError`` when the two do not have the same tokens. ``tokenizers``: folders with ``tokenizer.json``.

    Sizes may differ by padding: Qwen2.5's models have 151,936 or 152,064 rows for one tokenizer.
    """
    sizes, files = (student.vocab_size, teacher.vocab_size), [folder / "tokenizer.json" for folder in tokenizers]
    if sizes[0] == sizes[1]:
        return
    same = all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
    if not same or _tokens(files[0]) > min(sizes):
        raise HyLoError(
            f"teacher and student vocabularies differ: {sizes[1]} and {sizes[0]} tokens, and not by padding of one"
            " tokenizer; distillation compares the same tokens, so take a teacher of the same family"
        )


def check_teacher(student: Architecture, teacher: Architecture, stage: str) -> None:
    """Raises ``HyLoError`` when a model of this shape cannot teach this student in this stage."""
    if teacher.is_hybrid:
        raise HyLoError("--hylo-teacher: expected a Transformer checkpoint (convert_hf_to_megatron.py)")
    if stage == "ild" and (teacher.num_layers, teacher.hidden_size) != (student.num_layers, student.hidden_size):
        raise HyLoError(
            f"--hylo-stage ild compares layer by layer: the teacher must be the base model"
            f" ({student.num_layers} layers of {student.hidden_size}); another one can teach in --hylo-stage distill"
        )


def check_pair(student: Architecture, teacher: Architecture, stage: str, folders: tuple[Path, Path]) -> None:
    """``check_teacher``, and the vocabularies. ``folders``: of both."""
    check_teacher(student, teacher, stage)
    check_vocabularies(student, teacher, tuple(folder / "hf" for folder in folders))
