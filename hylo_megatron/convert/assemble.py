"""Join an all-MLA and an all-linear student: each layer of the hybrid comes from the student of the layer's kind."""

import functools
from dataclasses import replace
from pathlib import Path

from hylo_megatron.checkpoint.folder import FINITE, CheckpointReader, LazyTensor, write_checkpoint
from hylo_megatron.config import Architecture, Plan, geometry_preset, positions
from hylo_megatron.config.plan import geometry_of_plan
from hylo_megatron.config.positions import Window, has_window
from hylo_megatron.convert.pair import check_vocabularies
from hylo_megatron.convert.tables import mappings
from hylo_megatron.convert.tokenizer_files import copy_companions
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.mixers import LINEAR, MIXERS

# Fields that both students have of their base model, or of their initialisation.
SAME = (
    "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "attention_bias", "qk_norm", "geometry", "mla_qk_norm",
)  # fmt: skip


def _student(folder: str | Path) -> Architecture:
    """Read the architecture of a student. Raises ``HyLoError`` for a base model."""
    arch = Architecture.load(folder)
    if not arch.is_hybrid:
        raise HyLoError(f"{folder}: a Transformer, expected a student; run hylo upcycle on it first")
    return arch


def check_students(first: Architecture, second: Architecture, folders: tuple[str | Path, str | Path]) -> None:
    """Raise ``HyLoError`` if layers of both students do not fit into one model. ``first`` is the MLA student."""
    where = "{} and {} differ in ".format(*folders)
    for name in SAME:
        if getattr(first, name) != getattr(replace(second, plan=first.plan), name):
            raise HyLoError(f"{where}{name}: they must come from the same base and geometry")
    if (second.linear_rope or second.window) and first.rope_parameters != second.rope_parameters:
        raise HyLoError(
            f"{where}rope_parameters ({first.rope_parameters} and {second.rope_parameters}), which layers of both"
            " read: train both with the same --hylo-rope"
        )


def _window(mla: Window | None, linear: Window | None, folders: tuple[str | Path, str | Path]) -> Window | None:
    """Return the hybrid's window: the linear student's, beside MLA layers too where the MLA student's layers have one.

    Either student may be a hybrid, of which only the layers of one kind are taken. Raises ``HyLoError``.
    """
    found = {name: value for name, value in (linear or {}).items() if name != "mla"} or None
    if not has_window(mla, "mla"):
        return found
    if mla != {**(found or {}), "mla": True}:
        raise HyLoError(
            f"{folders[0]} has window {mla}, {folders[1]} {linear}: expected one size, or none in {folders[0]}"
        )
    return mla


def assemble(mla: str | Path, linear: str | Path, plan: tuple[str, ...], out: str | Path) -> Architecture:
    """Write the hybrid checkpoint ``out``. Everything outside the mixers comes from the MLA student."""
    first, second = _student(mla), _student(linear)
    check_students(first, second, (mla, linear))
    window = _window(first.window, second.window, (mla, linear))
    check_vocabularies(first, second, (Path(mla) / "hf", Path(linear) / "hf"))
    for layer, kind in enumerate(plan):
        source, folder = (second, linear) if MIXERS[kind].linear else (first, mla)
        if source.plan[layer] != kind:
            raise HyLoError(f"layer {layer} should be {kind} in the plan, but {folder} has {source.plan[layer]} there")
    is_linear = [MIXERS[kind].linear for kind in plan]
    norms = first.extra.get("ild_norms"), second.extra.get("ild_norms")
    extra = dict(first.extra)
    if all(norms):
        extra["ild_norms"] = [norms[linear][layer] for layer, linear in enumerate(is_linear)]
    arch = replace(
        first, plan=plan, geometry=second.geometry, extra=extra, linear_rope=second.linear_rope, window=window
    )
    if reason := positions.misfit(arch):
        raise HyLoError(f"--mla-layers {arch.plan.name}: {reason}; choose other layers, or another student")
    readers = CheckpointReader(mla, FINITE), CheckpointReader(linear, FINITE)
    # megatron-core counts mixers and MLPs as layers
    linear_layers = {2 * layer for layer, linear in enumerate(is_linear) if linear}
    tensors = {}
    for mapping in mappings(arch):
        for key in mapping.megatron:
            layer = int(key.split(".")[2]) if key.startswith("decoder.layers.") else -1
            reader = readers[layer in linear_layers]
            tensors[key] = LazyTensor(reader.shape(key), reader.dtype(key), functools.partial(reader.__getitem__, key))
    write_checkpoint(out, arch, tensors, functools.partial(copy_companions, Path(mla) / "hf"))
    return arch


def plan_for(text: str, linear_kind: str | None, mla: str | Path, linear: str | Path) -> Plan:
    """Return the plan that ``text`` means. Raises ``HyLoError`` for a file that counts with another geometry."""
    first, second, name = _student(mla), _student(linear), geometry_of_plan(text)
    if name is not None:
        try:
            counted = geometry_preset(name, first.hidden_size, first.num_attention_heads, first.head_dim)
        except HyLoError:  # no dimensions of this name for the base model
            counted = None
        layers = (mla, first.geometry, "mla"), (linear, second.geometry, second.linear_kind)
        other = [at for at, found, kind in layers if getattr(found, kind, None) != getattr(counted, kind, ())]
        name = f"another one in {other[0]}" if other else name
    return Plan.parse(first.num_layers, text, linear_kind, name, "--mla-layers")


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--mla", required=True, help="checkpoint of the all-MLA student (--mla-layers all)")
    linear = "checkpoint of the all-linear student (--mla-layers none)"
    parser.add_argument("--linear-student", required=True, help=linear)
    layers = "1,5,10,14 | uniform:K | a name such as 4MLA12GDN | plan.json of hylo select-layers"
    parser.add_argument("--mla-layers", required=True, help=layers)
    parser.add_argument("--linear", choices=LINEAR, help=f"default: {LINEAR[0]}, or the plan's name")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(argv)
    plan = plan_for(options.mla_layers, options.linear, options.mla, options.linear_student)
    arch = assemble(options.mla, options.linear_student, plan, options.out)
    print(f"{arch.plan.name} -> {options.out}")
