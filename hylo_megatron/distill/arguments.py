"""Command line of training: Megatron's own flags, the ``--hylo-*`` ones, and what the checkpoint already says."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hylo_megatron.config import Architecture
from hylo_megatron.distill.kl import KLSettings
from hylo_megatron.errors import HyLoError
from hylo_megatron.platform.capabilities import has


def add_hylo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument_group("hylo").add_argument
    add("--hylo-stage", choices=("ild", "distill"), required=True, help="layer by layer, or end to end")
    add("--hylo-student", required=True, help="student checkpoint to start from (upcycle.py or an earlier stage)")
    add(
        "--hylo-teacher", required=True, help="teacher checkpoint; for distill it may be wider or deeper than the base"
    )
    add(
        "--hylo-train",
        choices=("all", "mixers"),
        default=None,
        help="mixers: weights copied from the base stay frozen (default: mixers for ild, all for distill)",
    )
    add("--hylo-backend", choices=("local", "te"), default="local", help="torch layers, or TransformerEngine's")
    add("--hylo-copied-lr-mult", type=float, default=0.2, help="learning rate of copied weights, as a factor")
    add("--hylo-decay-lr-mult", type=float, default=5.0, help="learning rate of A_log and dt_bias, as a factor")
    add("--hylo-kl-weight", type=float, default=1.0)
    add("--hylo-ce-weight", type=float, default=0.0)
    add("--hylo-temperature", type=float, default=1.0)
    add("--hylo-reverse-kl", action="store_true", help="KL(student || teacher), the paper's formula")
    add("--hylo-teacher-length", type=int, help="positions below it learn from the teacher, the others from the text")
    add(
        "--hylo-ce-beyond-teacher",
        type=float,
        default=1.0,
        help="weight of cross-entropy beyond --hylo-teacher-length",
    )
    add(
        "--hylo-answer-weight",
        type=float,
        default=0.0,
        help="cross-entropy of the answers in packed data (make_retrieval.py), as a share of a sample's tokens",
    )
    add("--hylo-rope", type=json.loads, help='change the student\'s rotary embedding, e.g. {"rope_theta": 4e5}')
    add(
        "--hylo-student-iteration",
        type=int,
        help="wait until --hylo-student holds this iteration: an earlier stage may still be training it",
    )
    add("--no-self-test", action="store_true", help="do not compare the GPU kernels with their references at start-up")
    add("--hylo-kl-chunk", type=int, default=1024, help="tokens whose logits are in memory at once")
    add("--hylo-ild-raw-norms", action="store_true", help="do not divide layer losses by the teacher's norms")
    add("--hylo-ild-attention-weight", type=float, default=1.0)
    add("--hylo-ild-hidden-weight", type=float, default=1.0)
    add("--hylo-keep-last", type=int, help="checkpoints to keep, the newest; older ones are deleted (default: all)")
    add("--hylo-log", help="JSON lines with the losses of every step (default: SAVE/train_log.jsonl)")
    return parser  # fmt: skip


def kl_settings(args) -> KLSettings:
    return KLSettings(
        args.hylo_kl_weight, args.hylo_ce_weight, args.hylo_temperature, args.hylo_reverse_kl, args.hylo_kl_chunk,
        args.hylo_teacher_length, args.hylo_ce_beyond_teacher,
    )  # fmt: skip


def student_architecture(path: str, rope: dict | None = None, seq_length: int = 0) -> Architecture:
    """The student as this run trains it: with the rotary embedding asked for, and room for its sequences."""
    arch = Architecture.load(path)
    return replace(
        arch, rope_parameters=arch.rope_parameters | (rope or {}),
        max_position_embeddings=max(arch.max_position_embeddings, seq_length),
    )  # fmt: skip


def engine_flags(arch: Architecture, tokenizer: Path) -> list[str]:
    """Megatron flags that follow from the student and the machine; what the user writes comes later and wins."""
    flags = [
        "--num-layers", 2 * arch.num_layers, "--hidden-size", arch.hidden_size,
        "--ffn-hidden-size", arch.intermediate_size, "--num-attention-heads", arch.num_attention_heads,
        "--group-query-attention", "--num-query-groups", arch.num_key_value_heads, "--kv-channels", arch.head_dim,
        "--max-position-embeddings", arch.max_position_embeddings, "--norm-epsilon", arch.rms_norm_eps,
        "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "none",
        "--hidden-dropout", 0, "--attention-dropout", 0, "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", tokenizer, "--make-vocab-size-divisible-by", 1,
        "--calculate-per-token-loss", "--transformer-impl", "local",
        "--no-gradient-accumulation-fusion", "--no-persist-layer-norm", "--no-masked-softmax-fusion",
        "--no-bias-dropout-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion",
        "--ckpt-format", "torch_dist", "--dataloader-type", "single", "--num-workers", 0, "--seed", 1234,
        "--adam-beta2", 0.95, "--clip-grad", 1.0, "--log-interval", 1, "--save-interval", 1000,
        "--eval-iters", 0, "--eval-interval", 1000000,
        # Without it, the bf16 optimizer cannot save a model that also has fp32 parameters (optimizer.py:1165).
        "--split", "100,0,0", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
    ]  # fmt: skip
    if not arch.tie_word_embeddings:
        flags += ["--untie-embeddings-and-output-weights"]
    if torch.cuda.device_count() == 0:
        flags += ["--distributed-backend", "gloo", "--use-cpu-initialization"]
    return [str(flag) for flag in flags]


def async_flags() -> list[str]:
    """Without the first the engine turns ``--async-save`` off; its default strategy is a package of its own."""
    return ["--use-persistent-ckpt-worker"] + ([] if has("nvidia-resiliency-ext") else ["--async-strategy", "mcore"])


def check_keep_last(keep: int | None, user: list[str]) -> None:
    if keep is None:
        return
    if keep < 1:
        raise HyLoError(f"--hylo-keep-last {keep}: at least one checkpoint has to stay; leave it out to keep all")
    if "--save-retain-interval" in user:
        raise HyLoError("--hylo-keep-last and --save-retain-interval both delete checkpoints; choose one")


def prepare_command_line() -> Architecture:
    """Puts the student's flags in front of the user's in ``sys.argv``. Raises ``HyLoError`` before anything starts."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        known = add_hylo_arguments(argparse.ArgumentParser(add_help=False))
        print("python -m hylo_megatron.train: all of Megatron's flags, and\n" + known.format_help())
        sys.exit(0)
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--hylo-student")
    parser.add_argument("--save")
    parser.add_argument("--seq-length", type=int, default=0)
    parser.add_argument("--hylo-keep-last", type=int)
    parser.add_argument("--async-save", action="store_true")
    known, _ = parser.parse_known_args()
    if not known.hylo_student:
        raise HyLoError("--hylo-student is missing: the student checkpoint made by upcycle.py")
    arch = student_architecture(known.hylo_student, seq_length=known.seq_length)
    if not arch.is_hybrid:
        raise HyLoError(f"--hylo-student {known.hylo_student} is a Transformer; run upcycle.py on it first")
    tokenizer = Path(known.hylo_student) / "hf"
    user = sys.argv[1:]
    check_keep_last(known.hylo_keep_last, user)
    flags = engine_flags(arch, tokenizer) + (async_flags() if known.async_save else [])
    # A run resumes from its own folder when that holds a checkpoint, else it starts from the student's weights.
    flags += ["--pretrained-checkpoint", known.hylo_student]
    if known.save and "--load" not in user:
        flags += ["--load", known.save]
    sys.argv[1:] = flags + user
    return arch
