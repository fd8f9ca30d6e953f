"""A selection from its flags to ``plan.json``."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.architecture import FILE_NAME
from hylo_megatron.config.plan import linear_of_plan, uniform_layers
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.mixers import LINEAR
from hylo_megatron.select.budget import mla_layers
from hylo_megatron.select.measured import measured
from hylo_megatron.select.models import check_base, check_pair
from hylo_megatron.select.plot import draw
from hylo_megatron.select.ranking import Ranking
from hylo_megatron.select.ranks import Ranks


def select(options: Namespace, ranks: Ranks) -> dict[str, Any]:
    """Write ``plan.json`` and return its contents. Raises ``HyLoError``."""
    base = _architecture(options.teacher)
    check_base(base, options.teacher)
    linear = options.linear or LINEAR[0]
    if options.student:
        student = _architecture(options.student)
        check_pair(base, student, options.teacher, options.student)
        linear = student.linear_kind
        if options.linear not in (None, linear):
            raise HyLoError(
                f"--linear {options.linear}: --student {options.student} is {student.plan.name}, and its layers are"
                f" measured; leave --linear out, or give a student of {options.linear} layers"
            )
    if options.method == "explicit":
        explicit = Plan.parse(base.num_layers, options.layers, options.linear, asked="--layers")
        linear = linear_of_plan(options.layers) or linear
        chosen = [layer for layer, kind in enumerate(explicit) if kind == "mla"]
        ranking = Ranking(order=tuple(chosen))
    else:
        budget = {"mla": options.mla, "share": options.cache_share, "cache_bytes": options.cache_bytes}
        count = mla_layers(base, options.geometry, linear, **budget)
        if options.method == "uniform":
            ranking = Ranking(order=uniform_layers(base.num_layers, count))
        elif count == base.num_layers:
            raise HyLoError(
                f"--method {options.method}: the budget allows all {count} layers, nothing to choose; lower it"
            )
        else:
            ranking = measured(options, ranks, count)
        chosen = sorted(ranking.order[:count])
    plan = _plan(options, base, linear, chosen, ranking)
    if ranks.first:
        options.out.mkdir(parents=True, exist_ok=True)
        if ranking.scores:
            draw(ranking.scores, chosen, f"{options.method}: scores of single layers", options.out / "scores.png")
        write_json(options.out / "plan.json", plan)
    return plan


def _architecture(path: Path) -> Architecture:
    return Architecture.load(path) if (path / FILE_NAME).is_file() else read_architecture(path)


def _plan(options: Namespace, base: Architecture, linear: str, chosen: list[int], ranking: Ranking) -> dict:
    plan = Plan("mla" if layer in chosen else linear for layer in range(base.num_layers))
    cached = student_architecture(base, plan, options.geometry).kv_bytes_per_token()
    return {
        "num_layers": base.num_layers,
        "mla_layers": chosen,
        "linear": linear,
        "plan": plan.name,
        "geometry": options.geometry,
        "cache_bytes": cached,
        "cache_share": cached / base.kv_bytes_per_token(),
        "method": options.method,
        "order": list(ranking.order),
        "scores": ranking.scores,
        "rounds": ranking.rounds,
    }
