"""Check that a teacher can teach a student. No torch in here."""

from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import StageKind
from hylo_megatron.convert.tokenizer_files import check_rows, has_tokenizer, tokenizer_identity
from hylo_megatron.errors import HyLoError


def padded_rows(student: Architecture, teacher: Architecture, tp: int) -> int:
    """Return the number of rows of both heads: a rank's shards of both have to hold the same tokens."""
    return -(-max(student.vocab_size, teacher.vocab_size) // tp) * tp


def check_vocabularies(student: Architecture, teacher: Architecture, folders: tuple[Path, Path]) -> None:
    """Raise ``HyLoError`` if student and teacher do not have the same tokens. ``folders`` hold their tokenizers.

    The numbers of rows may differ by padding: Qwen2.5's models have 151,936 or 152,064 rows for one tokenizer. Folders
    without a tokenizer pass if the numbers are equal.
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


def check_teacher(
    student: Architecture,
    teacher: Architecture,
    kind: StageKind,
    prefix: str = "--hylo-",
    stage: str = "--hylo-stage",
) -> None:
    """Raise ``HyLoError`` if a model of this shape cannot teach the student in this kind of stage.

    ``prefix`` and ``stage`` are spellings of the command.
    """
    if teacher.is_hybrid:
        raise HyLoError(
            f"{prefix}teacher: a hybrid ({teacher.plan.name}), expected a Transformer; give the base model"
        )
    same = (teacher.num_layers, teacher.hidden_size) == (student.num_layers, student.hidden_size)
    if kind.layerwise and not same:
        raise HyLoError(
            f"{stage} {kind.name} compares layer by layer: the teacher must be the base model"
            f" ({student.num_layers} layers of {student.hidden_size}); another one can teach in {stage} distill"
        )


def check_pair(student: Architecture, teacher: Architecture, kind: StageKind, folders: tuple[Path, Path]) -> None:
    """Check shapes and vocabularies of the two checkpoints in ``folders``. Raises ``HyLoError``."""
    check_teacher(student, teacher, kind)
    check_vocabularies(student, teacher, tuple(folder / "hf" for folder in folders))
