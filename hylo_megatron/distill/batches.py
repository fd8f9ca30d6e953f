"""Batches and losses of a training step, in the form that megatron's schedules call."""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer

from hylo_megatron.data.packed_data import (
    DocumentConfig,
    DocumentDataset,
    PackedConfig,
    PackedDataset,
    check_packed,
)

PARTS = {"ild": ("ild attention", "ild hidden"), "distill": ("loss", "kl", "ce")}
LEARNT = "learnt"  # the share of positions that are in the loss
NO_TOKENS = 1e-30  # beside any count of tokens it vanishes in fp32
KEYS = ("tokens", "labels", "loss_mask", "position_ids", "answer_weight")


def prefixes(args) -> list[str]:
    """The dataset files that ``--data-path`` and its kin name, without blend weights."""
    blends = [get_blend_from_list(p) for p in (args.data_path, args.train_data_path, args.valid_data_path) if p]
    return [prefix for names, _ in blends for prefix in names]


def dataset_config(args, packed: bool) -> BlendedMegatronDatasetConfig:
    blend_per_split = [
        get_blend_from_list(paths) for paths in (args.train_data_path, args.valid_data_path, args.test_data_path)
    ]
    common = dict(
        random_seed=args.seed, sequence_length=args.seq_length, blend=get_blend_from_list(args.data_path),
        blend_per_split=blend_per_split if args.train_data_path else None,
        split=None if args.train_data_path else args.split, path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(), rows=args.hylo_rows,
    )  # fmt: skip
    if packed:
        return PackedConfig(**common, answer_weight=args.hylo_answer_weight)
    return DocumentConfig(
        **common, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )  # fmt: skip


def datasets(num_samples, vp_stage=None):
    """Every rank builds the same datasets: all pipeline stages and tensor-parallel ranks read the same samples."""
    args = get_args()
    packed = check_packed(prefixes(args), args.seq_length)
    config = dataset_config(args, packed)
    kind = PackedDataset if packed else MockGPTDataset if config.mock else DocumentDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()


datasets.is_distributed = True


def next_batch(iterator, *default) -> dict[str, torch.Tensor]:
    """``KEYS``, each ``[B, S / cp]``, of this context-parallel rank. ``default``: as of ``next``."""
    device = torch.cuda.current_device()
    sample = next(iterator, *default)
    if sample is None:
        return None
    batch = {key: sample[key].to(device, non_blocking=True) for key in KEYS if key in sample}
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group) if group.size() > 1 else batch


def loss_function(args, sequence_parallel: bool, batch: dict, output: torch.Tensor):
    """Sums over this rank's tokens, their number, and what is logged: the engine divides by the global number."""
    stage, mask = args.hylo_stage, batch["loss_mask"]
    count = mask.sum().to(torch.int)
    parts = dict(zip(PARTS[stage], output.detach()[-len(PARTS[stage]) :].clone(), strict=True))
    if stage == "ild" and sequence_parallel:
        for part in parts.values():
            torch.distributed.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
    counts = dict.fromkeys(parts, count.float())
    if args.hylo_teacher_length and "kl" in parts:  # a mean over the tokens that have a teacher
        counts["kl"] = (mask * (batch["position_ids"] < args.hylo_teacher_length)).sum().float()
    # A step without any token to learn counts as a loss of zero: Megatron divides the sum by the count.
    logged = {name: torch.stack([part, counts[name].clamp_min(NO_TOKENS)]) for name, part in parts.items()}
    logged[LEARNT] = torch.stack([count.float(), torch.full_like(counts[next(iter(parts))], mask.numel())])
    return output[0].clone(), count, logged  # the pipeline frees what it gets here, and cannot free a view


def learn(batch: dict, model, teacher_states: list | None = None):
    """What ``forward_step`` returns, for a batch at hand and perhaps what the teacher made of it."""
    output = model(
        batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"], batch.get("answer_weight"),
        teacher_states,
    )  # fmt: skip
    sequence_parallel = get_attr_wrapped_model(model, "config").sequence_parallel
    return output, partial(loss_function, get_args(), sequence_parallel, batch)


def forward_step(iterator, model):
    return learn(next_batch(iterator), model)
