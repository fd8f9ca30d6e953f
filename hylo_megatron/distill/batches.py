"""Batches and losses of a training step, in the form that megatron's schedules call."""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer

PARTS = {"ild": ("ild attention", "ild hidden"), "distill": ("kl", "ce")}


def dataset_config(args) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=get_blend_from_list(args.data_path),
        blend_per_split=[
            get_blend_from_list(paths) for paths in (args.train_data_path, args.valid_data_path, args.test_data_path)
        ] if args.train_data_path else None,
        split=None if args.train_data_path else args.split, path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss, create_attention_mask=False,
    )  # fmt: skip


def datasets(num_samples, vp_stage=None):
    """Every rank builds the same datasets: all pipeline stages and tensor-parallel ranks read the same samples."""
    args = get_args()
    config = dataset_config(args)
    kind = MockGPTDataset if config.mock else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()


datasets.is_distributed = True


def next_batch(iterator) -> dict[str, torch.Tensor]:
    """``tokens, labels, loss_mask, position_ids`` ``[B, S / cp]`` of this context-parallel rank."""
    device = torch.cuda.current_device()
    keys = ("tokens", "labels", "loss_mask", "position_ids")
    sample = next(iterator)
    batch = {key: sample[key].to(device, non_blocking=True) for key in keys}
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group) if group.size() > 1 else batch


def loss_function(stage: str, loss_mask: torch.Tensor, sequence_parallel: bool, output: torch.Tensor):
    """Sums over this rank's tokens, their number, and what is logged: the engine divides by the global number."""
    count = loss_mask.sum().to(torch.int)
    parts = output.detach()[1:].clone()
    if stage == "ild" and sequence_parallel:
        torch.distributed.all_reduce(parts, group=parallel_state.get_tensor_model_parallel_group())
    logged = {name: torch.stack([part, count.float()]) for name, part in zip(PARTS[stage], parts, strict=True)}
    return output[0].clone(), count, logged  # the pipeline frees what it gets here, and cannot free a view


def forward_step(iterator, model):
    args = get_args()
    batch = next_batch(iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"])
    sequence_parallel = get_attr_wrapped_model(model, "config").sequence_parallel
    return output, partial(loss_function, args.hylo_stage, batch["loss_mask"], sequence_parallel)
