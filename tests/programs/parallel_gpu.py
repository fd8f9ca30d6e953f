"""Layouts of two or four processes against one process on what this machine has, with NCCL on GPUs.

``PYTHONPATH=.:tests python tests/programs/parallel_gpu.py WORK [2 4] [fp32 bf16] [gdn mamba2 kda window]``

Prints a table: each layout against one process of the same precision, with the kernels that training takes. Processes
are two unless ``4`` is given. One process and several are launched beside each other, because kernels take minutes to
compile on a new machine.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from helpers import gradients, parity_table
from helpers import train as helpers
from programs import parity

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.mixers import LINEAR
from hylo_megatron.mixers.kda.geometry import KDAGeometry

SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             geometry=Geometry(MLAGeometry(64, 32, 32, 64), GDNGeometry(4, 8, 64, 64), Mamba2Geometry(4, 64, 64, 4),
                               KDAGeometry(4, 64)),
             max_position_embeddings=512)  # fmt: skip
COUNTS = (2, 4)
LENGTH, WINDOW = 512, {"size": 96, "sinks": 4}


def cells(work: Path, linear: str, dtype: str, counts: list[int]):
    """Yield ``(processes, layout, what, one process's cell, their cell)``."""
    mixer, changes = ("gdn", dict(window=WINDOW)) if linear == "window" else (linear, {})
    folders = [str(folder) for folder in helpers.write_pair(work / f"{linear}-{dtype}", mixer, **SIZES, **changes)]
    for stage in ("ild", "distill"):
        what = f"{linear}-{stage}-{dtype}"
        alone = parity.Cell(f"alone-{what}", *folders, stage, "all", dtype=dtype, length=LENGTH)
        for processes in counts:
            for layout, sizes in parity.LAYOUTS[processes].items():
                name = f"{layout}-{what}".replace(" ", "_").replace(",", "")
                cell = parity.Cell(name, *folders, stage, "all", dtype=dtype, length=LENGTH, **sizes)
                yield processes, f"{layout}, {dtype}", f"{linear} {stage}", alone, cell


def launch(work: Path, name: str, found: list[parity.Cell], processes: int) -> bool:
    (work / f"cells-{name}.json").write_text(json.dumps([asdict(cell) for cell in found]))
    done = helpers.torchrun(parity.__file__, work, name, processes=processes, timeout=900)
    if done.returncode:
        (work / f"{name}.err").write_text(done.stdout + done.stderr)
        print(name, *[line for line in done.stderr.splitlines() if "Error" in line][:3], sep="\n  ")
    return done.returncode == 0


def measure(work: Path, alone: parity.Cell, several: parity.Cell) -> list[float]:
    got, want = (torch.load(work / f"{cell.name}.pt")["gradients"] for cell in (several, alone))
    loss = parity.loss_gap(*(helpers.read_log(work / f"{cell.name}.jsonl")[0] for cell in (several, alone)))
    gaps = gradients.gaps(got, want)
    decay = {key: gap for key, gap in gaps.items() if key.endswith((".A_log", ".dt_bias"))}
    others = max(gap for key, gap in gaps.items() if key not in decay)
    return [loss, others, max(decay.values())]


def main(work: Path, chosen: list[str]) -> None:
    work.mkdir(parents=True)
    dtypes, kinds = (
        [name for name in names if name in chosen] or names for names in (("fp32", "bf16"), (*LINEAR, "window"))
    )
    counts = [count for count in COUNTS if str(count) in chosen] or [2]
    groups = {(linear, dtype): list(cells(work, linear, dtype, counts)) for dtype in dtypes for linear in kinds}
    with ThreadPoolExecutor() as pool:
        jobs = []
        for (linear, dtype), found in groups.items():
            alone = list({one.name: one for *_, one, _ in found}.values())
            several = {count: [cell for processes, *_, cell in found if processes == count] for count in counts}
            for count, batch in {1: alone, **several}.items():
                jobs.append(pool.submit(launch, work, f"{linear}-{dtype}-{count}", batch, count))
    measured = {
        (layout, what): measure(work, *pair)
        for found in groups.values()
        for _, layout, what, *pair in found
        if all((work / f"{cell.name}.pt").exists() for cell in pair)
    }
    print(parity_table.table(measured, "loss / gradient / gradient of A_log and dt_bias"))
    sys.exit(not all(job.result() for job in jobs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
