"""Flags of Megatron that are checked before Megatron is imported, which takes seconds.

They are declared here as Megatron declares them; a test holds the two equal. Flags that only Megatron knows are left
for its own parser, which reads the whole command line again.
"""

import argparse

from hylo_megatron.distill.arguments import add_hylo_arguments
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, given, share, size, weight

# Megatron accepts any number. A training needs numbers within these limits.
LIMITS = {
    size: ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "micro_batch_size",
           "global_batch_size", "seq_length", "train_iters", "save_interval", "log_interval"),
    weight: ("lr", "min_lr", "weight_decay", "clip_grad"),
    share: ("lr_warmup_fraction",),
}  # fmt: skip

WHOLE = ("train_samples", "eval_iters", "lr_decay_iters", "lr_warmup_iters", "recompute_num_layers",
         "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")  # fmt: skip
TEXTS = ("save", "load", "split", "data_args_path", "per_split_data_args_path", "recompute_granularity",
         "recompute_method", "cuda_graph_impl")  # fmt: skip
LISTS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
FULL_LISTS = ("cp_comm_type",)  # of one value and more
SWITCHES = ("mock_data", "sequence_parallel", "bf16", "fp16", "no_save_optim", "no_load_optim", "finetune",
            "async_save", "check_for_spiky_loss", "optimizer_cpu_offload")  # fmt: skip
# Megatron's defaults other than None, and False of a switch
DEFAULTS = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
            "eval_iters": 100, "lr_warmup_iters": 0, "log_interval": 100, "min_lr": 0.0, "weight_decay": 0.01,
            "clip_grad": 1.0, "cuda_graph_impl": "none", "no_save_optim": None, "no_load_optim": None}  # fmt: skip


def limited(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return ``parser``, whose numbers now have limits, and which requires no flag: the checks say what to give."""
    limits = {name: kind for kind, names in LIMITS.items() for name in names}
    for action in parser._actions:
        action.required = False
        action.type = limits.get(action.dest, action.type)
    return parser


def first_parser() -> argparse.ArgumentParser:
    """Return a parser of our flags and of those of Megatron's flags that are declared here."""
    parser = Parser(add_help=False, allow_abbrev=False)
    numbers = dict.fromkeys(name for names in LIMITS.values() for name in names)
    kinds = {name: {} for name in numbers} | {name: {"type": int} for name in WHOLE}
    kinds |= {name: {} for name in TEXTS} | {name: {"nargs": "*"} for name in LISTS}
    kinds |= {name: {"nargs": "+"} for name in FULL_LISTS}
    kinds |= {name: {"action": "store_true"} for name in SWITCHES}
    other = {"save_interval": ["--persistent-save-interval"]}
    for name, kind in kinds.items():
        default = DEFAULTS.get(name, False if name in SWITCHES else None)
        parser.add_argument(f"--{name.replace('_', '-')}", *other.get(name, ()), default=default, **kind)
    return limited(add_hylo_arguments(parser))


def first_flags(user: list[str]) -> argparse.Namespace:
    """Return the flags that the checks read, as ``command_line.user_flags`` does for all.

    Raises ``HyLoError`` for a value that is refused, and for a flag of ours that does not exist.
    """
    parser = first_parser()
    known, others = parser.parse_known_args(user)
    if unknown := [word for word in others if word.startswith("--hylo-")]:
        raise HyLoError(f"unrecognized arguments: {' '.join(unknown)}")
    return argparse.Namespace(**vars(known), given=given(parser, user))
