"""Command line of training: Megatron's own flags, the ``--hylo-*`` ones, and what the checkpoint already says."""

import argparse
from dataclasses import replace
from pathlib import Path

from hylo_megatron.config import Architecture, positions
from hylo_megatron.config.decisions import INITIAL_STATES
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.config.stages import STAGE_KINDS, TRAIN
from hylo_megatron.distill.losses import LOSSES
from hylo_megatron.distill.spikes import ACTIONS, SpikeSettings
from hylo_megatron.flags import json_object, size, weight
from hylo_megatron.json_file import Object, check
from hylo_megatron.options import add_options


# fmt: off
def _add_model_arguments(add) -> None:
    add("--hylo-student", required=True, help="student checkpoint to start from (hylo upcycle or an earlier stage)")
    add("--hylo-teacher", required=True,
        help="teacher checkpoint; for distill it may be wider or deeper than the base")
    add("--hylo-backend", choices=("local", "te"), default="local", help="torch layers, or TransformerEngine's")
    add("--hylo-linear-cp", choices=("auto", "a2a", "states"), default="auto",
        help="context parallelism of linear blocks: all-to-all over heads, or states composed from those of all ranks"
        " (default: auto, which is states)")
    add("--hylo-mlp-block", type=size,
        help="tokens that the MLPs of the frozen teacher and recomputed MLPs compute at once (default: all, and where"
        " gate and up of a rank have over 2**29 values, blocks of at most 2**28)")
    add("--hylo-recurrence-block", type=size,
        help="tokens that the recurrence of GDN and KDA blocks reads at once, a multiple of 64: less memory in the"
        " backward pass of a long sequence (default: all)")
    add("--hylo-teacher-fp8", action="store_true",
        help="multiply in FP8 in the teacher's layers, whose weights then take half the memory (distill; Ada, Hopper"
        " or newer)")
    add("--hylo-offload-teacher", action="store_true",
        help="keep the teacher's layers in the host's memory; each is on the GPU only while it computes")
    add("--hylo-offload-optimizer", action="store_true",
        help="keep the optimizer's states in the host's memory during forward and backward passes")
    add("--hylo-initial-states", choices=INITIAL_STATES, default="zero",
        help="what linear blocks start a sequence from: the last states of the previous step (carried), or noise with"
        " their mean and deviation (random); for the last steps of a training, to reach further")
    add("--hylo-rope", type=json_object, help='change the student\'s rotary embedding, e.g. {"rope_theta": 4e5}')
    positions.add_flags(add, "--hylo-", "as --hylo-student has it")
    add("--hylo-teacher-rope", type=json_object,
        help="the same for the teacher's, beyond the length it was trained for")


def _add_run_arguments(add) -> None:
    add("--hylo-student-iteration", type=size,
        help="wait until --hylo-student holds this iteration: an earlier stage may still be training it")
    add("--dataloader", choices=("torch", "dali"), default="torch",
        help="what reads the samples: torch's loader, or NVIDIA DALI, which copies them to the GPU ahead of their step"
        " (default: torch; same samples, same order)")
    add("--no-self-test", action="store_true", help="do not compare the GPU kernels with their references at start-up")
    add("--no-memory-check", action="store_true",
        help="start even if a rank needs more memory than its GPU has by the planner's count")
    add("--hylo-keep-last", type=size, help="checkpoints to keep, the newest; older ones are deleted (default: all)")
    add("--hylo-last-weights-only", action="store_true",
        help="save the last step without the optimizer's states, which take six times the room of the weights; the"
        " next stage does not read them, and the finished run cannot be given more steps")
    add("--hylo-on-spike", choices=ACTIONS, default="warn",
        help="what follows a loss spike, or a loss or gradient that is not finite. skip: leave the step's update out;"
        " rollback: go back to the last checkpoint's weights and on with the next samples; stop: end the training, as"
        " warn does for values that are not finite")
    add("--hylo-random-weights", action="store_true",
        help="start student and teacher from random weights, made on the device; their folders need no more than"
        " hylo.json. For benchmarks: nothing is saved")
    add("--hylo-profile", help="folder for a table of the time of each group of kernels in two of the last steps")
    add("--hylo-log", help="JSON lines with the losses of every step (default: SAVE/train_log.jsonl)")


def add_hylo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--hylo-*`` flags: those of the stage, of the models and of the run, and those of every loss."""
    parser.set_defaults(cp_comm_type=["auto"])  # megatron's flag, whose default is p2p
    group = parser.add_argument_group("hylo")
    add = group.add_argument
    add("--hylo-stage", choices=tuple(STAGE_KINDS), required=True,
        help=", ".join(f"{kind.name}: {kind.help}" for kind in STAGE_KINDS.values()))
    _add_model_arguments(add)
    add("--hylo-train", choices=TRAIN, help="mixers: weights copied from the base stay frozen"
        f" (default: {', '.join(f'{kind.train} for {kind.name}' for kind in STAGE_KINDS.values())})")
    add("--hylo-control", action="store_true",
        help="train a Transformer as student, the control of a hybrid; all of its weights count as copied")
    add("--hylo-copied-lr-mult", type=weight, default=0.2, help="learning rate of copied weights, as a factor")
    add("--hylo-decay-lr-mult", type=weight, default=5.0, help="learning rate of A_log and dt_bias, as a factor")
    add("--hylo-loss", choices=tuple(LOSSES), help="what student and teacher are compared by (default: the stage's)")
    for loss in LOSSES.values():
        add_options(group, loss)
    add("--hylo-answer-weight", type=weight, default=0.0,
        help="cross-entropy of the answers in packed data (hylo make-retrieval), as a share of a sample's tokens")
    _add_run_arguments(add)
    add_options(group, SpikeSettings)
    return parser


# fmt: on


def run_architecture(path: str, rope: dict | None = None, seq_length: int = 0, **changes) -> Architecture:
    """Return a checkpoint's architecture as this run uses it: with its changes of the rotary embedding, and with a
    maximum length of at least ``seq_length``. ``changes``: settings of ``config/positions.py``."""
    arch, rope = Architecture.load(path), rope or {}
    where = "--hylo-rope, --hylo-teacher-rope"
    rope, kept = check(rope, Object, where), arch.rope_parameters
    if rope.get("rope_type", kept.get("rope_type")) != kept.get("rope_type"):  # each has scaling fields of its own
        kept = {"rope_theta": kept["rope_theta"]}
    # Scaling starts from the checkpoint's own maximum unless it says otherwise, never from this run's sequences.
    rope = checked_rope(kept | rope, arch.max_position_embeddings, where)
    longest = max(arch.max_position_embeddings, seq_length)
    arch = replace(arch, rope_parameters=rope, max_position_embeddings=longest)
    return positions.changed(arch, changes, str(path), "--hylo-")


def student_architecture(args) -> Architecture:
    """Return the architecture of the student that this run trains."""
    changes = positions.given(args, "hylo_")
    return run_architecture(args.hylo_student, args.hylo_rope, args.seq_length, **changes)


def engine_flags(arch: Architecture, tokenizer: Path) -> list[str]:
    """Return Megatron flags that follow from the student and the machine. The user's flags come later and win."""
    import torch

    flags = [
        "--num-layers", 2 * arch.num_layers, "--hidden-size", arch.hidden_size,
        "--ffn-hidden-size", arch.intermediate_size, "--num-attention-heads", arch.num_attention_heads,
        "--group-query-attention", "--num-query-groups", arch.num_key_value_heads, "--kv-channels", arch.head_dim,
        "--max-position-embeddings", arch.max_position_embeddings, "--norm-epsilon", arch.rms_norm_eps,
        "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--position-embedding-type", "none",
        "--hidden-dropout", 0, "--attention-dropout", 0, "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", tokenizer, "--make-vocab-size-divisible-by", 1,
        "--calculate-per-token-loss", "--transformer-impl", "local",
        "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-bias-dropout-fusion",
        "--no-bias-swiglu-fusion", "--no-rope-fusion",
        "--ckpt-format", "torch_dist", "--dataloader-type", "single", "--num-workers", 0, "--seed", 1234,
        "--adam-beta2", 0.95, "--clip-grad", 1.0, "--save-interval", 1000,
        "--eval-iters", 0, "--eval-interval", 1000000,
        # Without the distributed optimizer, megatron cannot save a bf16 model that also has fp32 parameters
        # (optimizer.py:1165).
        "--split", "100,0,0", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
    ]  # fmt: skip
    if not arch.tie_word_embeddings:
        flags += ["--untie-embeddings-and-output-weights"]
    if torch.cuda.device_count() == 0:
        flags += ["--distributed-backend", "gloo", "--use-cpu-initialization", "--log-interval", 1]
    else:  # the GPU waits for megatron's own line; our log has every step
        flags += ["--log-interval", 10]
    return [str(flag) for flag in flags]
