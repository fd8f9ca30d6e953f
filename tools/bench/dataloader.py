"""Tokens a second that the default loader, NVIDIA DALI's and bare reading of the file give a training step.

    python tools/bench/dataloader.py [--length 2048] [--rows 8] [--batches 400] [--step-ms 0]

Each line is one way to get micro-batches onto the device. The floor reads the same sequences from the file and copies
their ids alone. --step-ms sleeps between two micro-batches as a training step would take, during which a loader can
read ahead. The result is then the wait, in the last column.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from timing import synchronize, this_device

from hylo_megatron import packages
from hylo_megatron.engine.register import install
from hylo_megatron.flags import command_line

install("megatron")
from hylo_megatron.data.dali_loader import DaliLoader  # noqa: E402
from hylo_megatron.data.packed_data import PackedDataset  # noqa: E402
from hylo_megatron.data.token_writer import token_files  # noqa: E402
from hylo_megatron.distill.batches import KEYS  # noqa: E402

VOCABULARY = 49152


def packed_data(folder: Path, length: int, sequences: int) -> PackedDataset:
    """Write random tokens, and open them as training does."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length + 1))
    with token_files(folder / "data", VOCABULARY, (".json",)) as (builder, partial):
        for row in ids:
            builder.add_document(row.astype(builder.dtype), [length + 1])
        partial[".json"].write_text(json.dumps({"pack_length": length + 1}))
    config = SimpleNamespace(
        random_seed=1, sequence_length=length, mmap_bin_files=True, tokenizer=None, answer_weight=0.0, split=None,
        split_matrix=None, allow_ambiguous_pad_tokens=True, rows=VOCABULARY,
    )  # fmt: skip
    low = PackedDataset.build_low_level_dataset(str(folder / "data"), config)
    split = SimpleNamespace(name="train")
    return PackedDataset(low, str(folder / "data"), np.arange(sequences), None, split, config)


def of_torch(data, indices, rows, device, workers: int):
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=indices, num_workers=workers, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def of_file(data, indices, rows, device):
    for batch in indices:
        ids = np.stack([data.dataset[index] for index in batch])
        yield {"tokens": torch.from_numpy(ids.astype(np.int32)).to(device)}


def of_dali(data, indices, rows, device):
    return DaliLoader(data, indices, KEYS, rows, device.index or 0 if device.type == "cuda" else None)


def measured(batches, device: torch.device, step: float) -> tuple[int, float, float]:
    """Return the micro-batches behind the first, their seconds, and the seconds of waiting for them."""
    batches = iter(batches)
    next(batches)
    number, waited, began = 0, 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        if next(batches, None) is None:
            return number, time.perf_counter() - began, waited
        synchronize(device)
        waited += time.perf_counter() - asked
        number += 1
        time.sleep(step)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="micro-batch size")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument(
        "--step-ms", type=float, default=0.0, help="milliseconds of training between two micro-batches"
    )
    options = parser.parse_args()
    device = this_device()
    ways = {
        "floor: file and copy of ids": of_file,
        "torch, in the training process": lambda *given: of_torch(*given, workers=0),
        "torch, 2 worker processes": lambda *given: of_torch(*given, workers=2),
    }
    if packages.has("nvidia-dali"):
        ways["DALI"] = of_dali
    else:
        print("DALI is not installed: pip install nvidia-dali-cuda130")
    with tempfile.TemporaryDirectory() as folder:
        data = packed_data(Path(folder), options.length, options.rows * options.batches)
        indices = np.arange(options.rows * options.batches).reshape(options.batches, options.rows).tolist()
        print(f"{device}, micro-batches of {options.rows} x {options.length} tokens, {options.step_ms} ms a step")
        print(f"{'way':32s} {'tokens/s':>14s} {'ms waiting':>11s}")
        for name, way in ways.items():
            number, seconds, waited = measured(way(data, indices, options.rows, device), device, options.step_ms / 1e3)
            tokens = number * options.rows * options.length
            print(f"{name:32s} {tokens / seconds:14,.0f} {1e3 * waited / number:11.3f}", flush=True)


if __name__ == "__main__":
    main()
