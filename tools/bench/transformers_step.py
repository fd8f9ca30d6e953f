"""Time a training step without this project's trainer: transformers' models, whole logits, torch's KL and AdamW.

    python tools/bench/train_step.py ... --peer transformers       starts this program, and compares with its result

One process holds student and teacher. The student is the exported hybrid, with the kernels that serve it on a GPU.
Weights, gradients and both moments of AdamW are bf16 on a GPU, which is less memory and work than a trainer takes that
keeps fp32 copies. Layers of the student are recomputed by torch's checkpointing. The last line printed is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from random_model import transformers_config
from timing import this_device, timed
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.distill.arguments import run_architecture
from hylo_megatron.engine.kernel_cache import prepare_kernels
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, json_object, positive, size
from hylo_megatron.mixers import FP32_SUFFIXES
from hylo_megatron.run.training_process import fast_bf16

LARGEST = "largest"
UNTIMED = 2


def transformers_model(arch: Architecture, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return transformers' model of ``arch`` with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    from hylo_megatron.hf import HyLoConfig
    from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

    config = HyLoConfig.from_architecture(arch) if arch.is_hybrid else transformers_config(arch)
    with device:
        build = HyLoForCausalLM._from_config if arch.is_hybrid else AutoModelForCausalLM.from_config
        model = build(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(FP32_SUFFIXES):
            parameter.data = parameter.data.float()
    return model


def load(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Give ``model`` the weights of a Megatron checkpoint."""
    from hylo_megatron.checkpoint.folder import CheckpointReader
    from hylo_megatron.convert.megatron_to_hf import hf_tensors

    known = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in hf_tensors(Architecture.load(folder), CheckpointReader(folder), dtype):
            known.pop(key).copy_(tensor)
    if known:
        raise HyLoError(f"{folder}: the checkpoint has no {next(iter(known))}")
    return model


def divergence(student: nn.Module, teacher: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return the mean KL divergence of the next token, from whole logits in fp32."""
    with torch.no_grad():
        log_t = teacher(input_ids=tokens_BS, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    log_s = student(input_ids=tokens_BS, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def stepper(student: nn.Module, teacher: nn.Module, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    fused = trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay, fused=fused)

    def step(tokens_BS: Tensor) -> Tensor:
        loss = divergence(student, teacher, tokens_BS)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def with_batch(step: Callable, options: argparse.Namespace, vocabulary: int, batch: int,
               device: torch.device) -> dict | None:  # fmt: skip
    """Return what steps of ``batch`` sequences take, or None without the memory for them."""
    generator = torch.Generator(device).manual_seed(1)
    shape, began = (batch, options.seq_length), time.time()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        batches = [torch.randint(vocabulary, shape, generator=generator, device=device)
                   for _ in range(UNTIMED + options.steps)]  # fmt: skip
        steps = [timed(lambda batch=batch: step(batch).item(), device) for batch in batches]
    except torch.OutOfMemoryError:
        return None
    seconds, losses = zip(*steps, strict=True)
    taken, tokens = statistics.median(seconds[UNTIMED:]), batch * options.seq_length
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {
        "layout": f"transformers, batch {batch}", "devices": 1, "tokens": tokens, "seconds": taken,
        "tokens_per_second": tokens / taken, "memory_gib": round(peak, 2), "losses": losses[:3],
        "first_step_seconds": round(time.time() - began - sum(seconds[1:]), 1), "profile": [],
    }  # fmt: skip


def fastest(run: Callable[[int], dict | None]) -> dict | None:
    """Double the batch until memory ends, and return the fastest run."""
    found, batch = [], 1
    while (last := run(batch)) is not None:
        found.append(last)
        batch *= 2
    return max(found, key=lambda each: each["tokens_per_second"], default=None)


def measured(options: argparse.Namespace) -> dict:
    device = this_device()
    dtype = torch.bfloat16 if fast_bf16() else torch.float32
    student = run_architecture(options.student, options.rope, options.seq_length)
    teacher = run_architecture(options.teacher, options.teacher_rope, options.seq_length)
    vocabulary = min(student.vocab_size, teacher.vocab_size)
    torch.manual_seed(1)
    models = [transformers_model(arch, device, dtype) for arch in (student, teacher)]
    if not options.random:
        for model, folder in zip(models, (options.student, options.teacher), strict=True):
            load(model, folder, dtype)
    models[0].train()
    if options.checkpointing:
        models[0].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models[1].eval().requires_grad_(False)
    step = stepper(*models, options)
    if options.batch != LARGEST:
        found = with_batch(step, options, vocabulary, int(options.batch), device)
    elif device.type == "cpu":
        raise HyLoError("--peer-batch largest: a CPU's memory has no such limit; give a number")
    else:
        found = fastest(lambda batch: with_batch(step, options, vocabulary, batch, device))
    if found is None:
        raise HyLoError(f"--peer transformers: out of memory with {options.batch} sequences of {options.seq_length}")
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--student", type=Path, required=True, help="checkpoint, or with --random a folder with its hylo.json")
    add("--teacher", type=Path, required=True)
    add("--random", action="store_true")
    add("--rope", type=json_object, default={}, help="--hylo-rope of the trainer")
    add("--teacher-rope", type=json_object, default={}, help="--hylo-teacher-rope of the trainer")
    add("--seq-length", type=size, required=True)
    add(
        "--batch", default="1", help="sequences of a step, or 'largest': doubled until memory ends, the fastest counts"
    )
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute the student's layers")
    add("--steps", type=size, default=5)
    add("--lr", type=positive, default=1e-5)
    add("--weight-decay", type=float, default=0.05)
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> None:
    prepare_kernels()  # this program is about steps, not about compiling fla's kernels one by one
    print(json.dumps(measured(parsed(argv))))


if __name__ == "__main__":
    main()
