"""Whether a teacher can teach a student; no torch in here."""

from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.convert.tokenizer_files import check_rows, has_tokenizer, tokenizer_identity
from hylo_megatron.errors import HyLoError


def padded_rows(student: Architecture, teacher: Architecture, tp: int) -> int:
    """Vocabulary rows of both heads: shards of student and teacher have to be of the same tokens."""
    return -(-max(student.vocab_size, teacher.vocab_size) // tp) * tp


def check_vocabularies(student: Architecture, teacher: Architecture, folders: tuple[Path, Path]) -> None:
    """Raises ``HyLoError`` when the two do not have the same tokens. ``folders``: of their tokenizers.

    Sizes may differ by padding: Qwen2.5's models have 151,936 or 152,064 rows for one tokenizer. Folders without a
    tokenizer pass if the sizes are equal.
    """
    rows = (student.vocab_size, teacher.vocab_size)
    if not all(map(has_tokenizer, folders)):
        if rows[0] != rows[1]:
            raise HyLoError(_differ(rows, "and a tokenizer that would show what they share is missing"))
        return
    found = [tokenizer_identity(folder) for folder in folders]
    if found[0].fingerprint != found[1].fingerprint:
        sizes = " and ".join(f"{identity.size} ({folder})" for identity, folder in zip(found, folders, strict=True))
        raise HyLoError(_differ(rows, f"their tokenizers, of {sizes} ids, turn texts into other ids"))
    for identity, size, folder in zip(found, rows, folders, strict=True):
        check_rows(identity, size, folder)


def _differ(rows: tuple[int, int], why: str) -> str:
    return (
        f"teacher and student vocabularies differ: {rows[1]} and {rows[0]} rows, {why}; distillation compares the same"
        " tokens, so take a teacher of the same family"
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
