"""The architecture of a student, from that of its base model. No torch in here."""

from dataclasses import replace

from hylo_megatron.config import positions
from hylo_megatron.config.architecture import Architecture
from hylo_megatron.config.geometry import Geometry, check_heads, geometry_preset
from hylo_megatron.config.rope import same_at_any_width


def student_architecture(
    teacher: Architecture, plan: tuple[str, ...], geometry: str | Geometry, qk_norm: bool = False, **settings
) -> Architecture:
    """Return the architecture of a student.

    ``geometry``: the name of a preset, or the dimensions themselves. ``settings``: fields of ``config/positions.py``.
    """
    if isinstance(geometry, str):
        geometry = geometry_preset(geometry, teacher.hidden_size, teacher.num_attention_heads, teacher.head_dim)
    check_heads(teacher.head_dim, geometry, set(plan))
    rope = same_at_any_width(teacher.rope_parameters, teacher.head_dim)
    arch = replace(
        teacher, plan=plan, geometry=geometry, mla_qk_norm=qk_norm, rope_parameters=rope, extra=dict(teacher.extra)
    )
    return positions.changed(arch, settings, "--mla-layers")
