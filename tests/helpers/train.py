"""Tiny checkpoints and data for the tests of training, and ways to start a training."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from helpers import processes as processes_of_tests
from helpers import tiny
from helpers.paths import ROOT
from helpers.waits import PATIENCE
from helpers.zygote import zygote

from hylo_megatron.checkpoint.folder import write_checkpoint as write
from hylo_megatron.convert.hf_to_megatron import megatron_tensors
from hylo_megatron.engine.register import install
from hylo_megatron.parent import LAUNCHERS

install("megatron")

SEQ = 64
ODD_VOCAB = 301  # does not divide by two: tensor parallelism pads it


def token_batch(rows: int, length: int, vocab: int = ODD_VOCAB, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return a batch of tensors ``[rows, length]``; the loss mask has zeros, more of them in later rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    keep = torch.rand(rows, length, generator=generator) > torch.linspace(0.1, 0.5, rows)[:, None]
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(length).expand(rows, length).contiguous(),
        "labels": tokens[:, 1:].contiguous(), "loss_mask": keep.float(),
        "answer_weight": 1.0 * (torch.rand(rows, length, generator=generator) > 0.8),
    }  # fmt: skip


def write_checkpoint(folder: Path, arch, seed: int) -> Path:
    """Write random weights, smaller than those of ``tiny``, which let a rounding error grow to 6e-5 of a gradient."""
    source = tiny.RandomWeights(arch, seed=seed)
    source.state = {key: value * (0.5 if value.dim() > 1 else 1.0) for key, value in source.state.items()}
    write(folder, arch, megatron_tensors(arch, source), lambda hf: hf.mkdir())
    return folder


def write_pair(folder: Path, linear: str, **changes) -> tuple[Path, Path]:
    """Write a random student and a Transformer of its size as checkpoints."""
    student = tiny.hybrid(linear, vocab_size=ODD_VOCAB, **changes)
    norms = [[1.5 + i, 0.5 + i / 4] for i in range(student.num_layers)]
    student = replace(student, extra={"ild_norms": norms})
    teacher = replace(student.as_teacher(), mla_qk_norm=False)
    return write_checkpoint(folder / "student", student, 1), write_checkpoint(folder / "teacher", teacher, 2)


def big_teacher(folder: Path, **changes) -> Path:
    """Write a Transformer wider and deeper than the students, with more vocabulary rows for the same tokens."""
    arch = tiny.hybrid(vocab_size=ODD_VOCAB + 8, hidden_size=80, intermediate_size=112, head_dim=20,
                       plan=("attention",) * 6, geometry=None, **changes)  # fmt: skip
    return write_checkpoint(folder, arch, 4)


def environment(**changes) -> dict[str, str]:
    """Return the environment of a process of tests, which no launcher has started, even if one started the tests.

    ``PYTHONPATH`` is added to the folders of the repository.
    """
    own = {name: text for name, text in os.environ.items() if name not in LAUNCHERS}
    paths = [str(ROOT), str(ROOT / "tests"), changes.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    return own | {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "HYLO_REGISTER": "0",
                  "PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes  # fmt: skip


def close_groups() -> None:
    """Close the process groups of the present layout.

    megatron-core only forgets them, and their threads go on polling: soon there are hundreds.
    """
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        for group in [group for group in distributed_c10d._world.pg_map if group is not torch.distributed.group.WORLD]:
            torch.distributed.destroy_process_group(group)
    gc.collect()  # models hold on to them


def end_processes() -> None:
    """Close all process groups: a group's thread that is still there when Python ends may abort the process."""
    close_groups()
    torch.distributed.destroy_process_group()


def torchrun(*argv, processes: int = 2, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return processes_of_tests.run([*command, *argv], environment(), timeout)


def refusal(done: subprocess.CompletedProcess) -> str:
    """Return the one line with which a training was refused."""
    assert done.returncode == 2, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return lines[0]


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- whole runs ----


def make_world(work: Path) -> dict[str, Path]:
    """Make teachers, a student and training data that the flags of ``train_flags`` fit."""
    from hylo_megatron.config import Plan
    from hylo_megatron.convert import hf_to_megatron
    from hylo_megatron.data.prepare import prepare
    from hylo_megatron.init.upcycle import upcycle

    shapes = {
        "teacher": {},
        "big": dict(hidden_size=96, num_attention_heads=6, num_hidden_layers=6, intermediate_size=128),
        "deep": dict(num_hidden_layers=6),
        "foreign": dict(vocab_size=tiny.VOCAB + 20),
    }
    for seed, (name, changes) in enumerate(shapes.items()):
        model = tiny.teacher_model("llama", seed=seed, **changes)
        hf_to_megatron.convert(tiny.save_model(model, work / f"{name}-hf"), work / name)
    tiny.write_tokenizer(work / "foreign" / "hf", tiny.VOCAB + 20)
    upcycle(work / "teacher", work / "student", Plan.parse(4, "0,3", "gdn"), tokens_BS=tiny.tokens(4, SEQ), log=str)
    words = torch.randint(3, tiny.VOCAB, (60, 400), generator=torch.Generator().manual_seed(9)).tolist()
    (work / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in d)}) + "\n" for d in words))
    prepare([work / "text.jsonl"], work / "teacher-hf", work / "data")
    return {name: work / name for name in (*shapes, "student", "data")}


def random_world(work: Path) -> dict[str, Path]:
    """Make random students that two ranks divide, with teachers and data: ``gdn``, ``gdn-teacher``, ..."""
    from hylo_megatron.data.prepare import prepare

    (work / "tokenizer").mkdir()
    tiny.write_tokenizer(work / "tokenizer", ODD_VOCAB)
    world = {"data": work / "data"}
    for kind in ("gdn", "mamba2", "kda"):
        world[kind], world[f"{kind}-teacher"] = write_pair(work / kind, kind)
        shutil.copytree(work / "tokenizer", world[kind] / "hf", dirs_exist_ok=True)
    words = torch.randint(3, ODD_VOCAB, (60, 400), generator=torch.Generator().manual_seed(9)).tolist()
    (work / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in d)}) + "\n" for d in words))
    prepare([work / "text.jsonl"], work / "tokenizer", world["data"])
    return world | {"student": world["gdn"], "teacher": world["gdn-teacher"]}


def train_flags(world: dict[str, Path], stage: str, save: Path, student="student", teacher="teacher", **flags) -> list:
    """Return the flags of a run of ``train_iters`` (default 4) steps; ``bf16=True`` gives a flag without a value."""
    values = dict(
        hylo_stage=stage, hylo_student=world.get(student, student), hylo_teacher=world[teacher], save=save,
        data_path=world["data"], seq_length=SEQ, micro_batch_size=2, global_batch_size=4, lr=1e-3, train_iters=4,
        lr_decay_style="cosine", lr_warmup_iters=2, save_interval=1000,
    ) | flags  # fmt: skip
    argv = []
    for name, value in values.items():
        argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return argv


def meeting_store() -> torch.distributed.TCPStore:
    """Return a store for the ranks of one run, on a port that stays taken from the moment when it is chosen."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meeting_place(store: torch.distributed.TCPStore) -> dict[str, str]:
    """Return the environment variables with which ranks meet in ``store``, as torchrun sets them."""
    return dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")


def train(*argv, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """Run a training to its end, as ``processes`` ranks of this machine, with more variables in its environment."""
    store = meeting_store()
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(processes)]
        shared = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes)) | meeting_place(store) | variables
        ranks = []
        try:
            for rank, paths in enumerate(files):
                variables = environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared)
                ranks.append(zygote(environment()).start(argv, variables, *paths))
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:  # those that run on after a failure here
                rank.send(signal.SIGKILL)
        out, err = ("".join(pair[i].read_text(errors="replace") for pair in files) for i in range(2))
    return subprocess.CompletedProcess(["train", *argv], next((code for code in codes if code), 0), out, err)


def train_command(*argv) -> list[str]:
    return [sys.executable, "-m", "hylo_megatron.train", *map(str, argv)]


def single() -> dict[str, str]:
    return environment(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


class Forked:
    """A training of a recipe's runner as a fork of the zygote, in place of ``launch.Process``.

    ``arguments`` are those of the interpreter; ``variables`` are added to the training's environment.
    """

    def __init__(self, arguments: list[str], log: Path, **variables: str):
        assert arguments[:2] == ["-m", "hylo_megatron.train"]
        self.errors = log.with_suffix(".err")
        self.training = zygote(environment()).start(arguments[2:], single() | variables, log, self.errors)

    def poll(self) -> int | None:
        return self.training.poll()

    def wait(self) -> int:
        return self.training.wait()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.training.send(how)
        self.wait()

    def reason(self) -> str:
        if (code := self.poll()) < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.errors.read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if "error: " in line), f"exit code {code}: {lines[-3:]}")


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    from hylo_megatron.checkpoint.folder import CheckpointReader

    reader = CheckpointReader(folder)
    return {key: reader[key] for key in reader.entries}


def everything(iteration: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of one saved iteration, unsharded, those of the optimizer too."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    entries = dcp.FileSystemReader(iteration).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if hasattr(entry, "size")
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(iteration), no_dist=True, planner=planner)
    return tensors
