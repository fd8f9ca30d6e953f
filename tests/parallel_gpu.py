"""The cells of two processes on what this machine has, NCCL on two GPUs: python tests/parallel_gpu.py WORK [fp32 bf16]

Prints a table: each layout against one process of the same precision; the kernels are those that training takes.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import parallel_parity as parity
import parity_table
import torch
import train_helpers as helpers

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry

SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             geometry=Geometry(MLAGeometry(64, 32, 32, 64), GDNGeometry(4, 8, 64, 64), Mamba2Geometry(4, 64, 64, 4)),
             max_position_embeddings=512)  # fmt: skip
LENGTH = 512


def cells(work: Path, dtype: str):
    """``(layout, what, one process's cell, two processes' cell)``."""
    for linear in ("gdn", "mamba2"):
        folders = [str(folder) for folder in helpers.write_pair(work / f"{linear}-{dtype}", linear, **SIZES)]
        for stage in ("ild", "distill"):
            alone = parity.Cell(f"alone-{linear}-{stage}-{dtype}", *folders, stage, "all", dtype=dtype, length=LENGTH)
            for layout, sizes in parity.LAYOUTS[2].items():
                name = f"{layout}-{linear}-{stage}-{dtype}".replace(" ", "_")
                two = parity.Cell(name, *folders, stage, "all", dtype=dtype, length=LENGTH, **sizes)
                yield f"{layout}, {dtype}", f"{linear} {stage}", alone, two


def main(work: Path, dtypes: list[str]) -> None:
    work.mkdir(parents=True)
    found = [cell for dtype in dtypes for cell in cells(work, dtype)]
    (work / "cells-2.json").write_text(json.dumps([asdict(two) for *_, two in found]))
    alone = {one.name: parity.run_cell(one, work / f"{one.name}.jsonl") for *_, one, _ in found}
    done = helpers.torchrun(parity.__file__, work, 2, timeout=900)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-6000:])
    for layout, what, one, two in found:
        if not (work / f"{two.name}.pt").exists():
            continue
        got, lines = torch.load(work / f"{two.name}.pt"), (work / f"{two.name}.jsonl", work / f"{one.name}.jsonl")
        loss = parity.loss_gap(*(helpers.read_log(path)[0] for path in lines))
        gaps = parity.gradient_gaps(got["gradients"], alone[one.name]["gradients"])
        decay = {key: gap for key, gap in gaps.items() if key.endswith((".A_log", ".dt_bias"))}
        others = max(gap for key, gap in gaps.items() if key not in decay)
        parity_table.MEASURED[layout, what] = (loss, others, max(decay.values()))
    print("loss / gradient / that of A_log and dt_bias\n" + parity_table.table())
    sys.exit(done.returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["fp32", "bf16"])
