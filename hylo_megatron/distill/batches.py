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

from hylo_megatron import packages
from hylo_megatron.data.data_check import prefixes
from hylo_megatron.data.packed_data import DocumentConfig, DocumentDataset, PackedConfig, PackedDataset
from hylo_megatron.data.token_files import check_packed
from hylo_megatron.distill.losses import Loss
from hylo_megatron.errors import HyLoError

LEARNT = "learnt"  # in the log: the share of positions that the loss mask leaves in the loss
NO_TOKENS = 1e-30  # divisor in place of zero tokens; in fp32 no count of tokens is changed by a number so small
KEYS = ("tokens", "labels", "loss_mask", "position_ids", "answer_weight")


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
    """Build the datasets. Every rank builds the same ones: all pipeline stages and tensor-parallel ranks read the same
    samples."""
    args = get_args()
    packed = check_packed(prefixes(args), args.seq_length)
    config = dataset_config(args, packed)
    kind = PackedDataset if packed else MockGPTDataset if config.mock else DocumentDataset
    found = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, config).build()
    return dali_loaders(args, found) if args.dataloader == "dali" else found


datasets.is_distributed = True


def check_dataloader(args) -> None:
    """Refuse ``--dataloader dali`` beside flags that it does not know, and where DALI is missing."""
    if args.dataloader != "dali":
        return
    others = {
        f"--dataloader-type {args.dataloader_type}": args.dataloader_type != "single",
        "--full-validation": args.full_validation,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--phase-transition-iterations": bool(args.phase_transition_iterations),
    }
    if wrong := next((flag for flag, given in others.items() if given), None):
        raise HyLoError(f"{wrong}: not with --dataloader dali, leave out one of them")
    packages.require("nvidia-dali", "--dataloader dali")
    args.dataloader_type = "external"  # megatron takes the loaders of ``datasets`` as they are


def dali_loaders(args, found: list) -> list:
    """Return a loader in place of each data set, with the samples of megatron's own loader for this rank."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from hylo_megatron.data.dali_loader import DaliLoader

    consumed, loaders = (args.consumed_train_samples, args.consumed_valid_samples, 0), []
    for number, (dataset, begun) in enumerate(zip(found, consumed, strict=True)):
        if dataset is None:
            loaders.append(None)
            continue
        rows = getattr(args, "eval_micro_batch_size", args.micro_batch_size) if number else args.micro_batch_size
        group = parallel_state.get_data_parallel_group()
        sampler = MegatronPretrainingSampler(len(dataset), begun, rows, group.rank(), group.size())
        device = torch.cuda.current_device() if torch.cuda.device_count() else None
        loaders.append(DaliLoader(dataset, sampler, KEYS, rows, device))
    return loaders


def next_batch(iterator, *default) -> dict[str, torch.Tensor] | None:
    """Return ``KEYS`` of the next micro-batch, each ``[B, S / cp]``: the part of this context-parallel rank.

    ``default`` is what ``next`` returns at the end of the data; None is passed on.
    """
    device = torch.cuda.current_device()
    sample = next(iterator, *default)
    if sample is None:
        return None
    batch = {key: sample[key].to(device, non_blocking=True) for key in KEYS if key in sample}
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group) if group.size() > 1 else batch


def loss_function(loss: Loss, tp_group, batch: dict, output: torch.Tensor):
    """Return the loss and the number of tokens, both of this rank, and what is logged.

    The loss is a sum over tokens: megatron divides it by the number of tokens of all ranks. ``tp_group`` is given
    where its ranks share the tokens of a layer-wise loss.
    """
    mask = batch["loss_mask"]
    count = mask.sum().to(torch.int)
    parts = dict(zip(loss.parts, output.detach()[-len(loss.parts) :].clone(), strict=True))
    if tp_group is not None:
        for part in parts.values():
            torch.distributed.all_reduce(part, group=tp_group)
    counts = loss.token_counts(mask, batch["position_ids"])
    # A step without any token in the loss counts as a loss of zero: megatron divides the sum by the count.
    logged = {name: torch.stack([part, counts[name].clamp_min(NO_TOKENS)]) for name, part in parts.items()}
    logged[LEARNT] = torch.stack([count, torch.full_like(count, mask.numel())]).float()
    return output[0].clone(), count, logged  # the pipeline frees what it gets here, and cannot free a view


def learn(batch: dict, model, teacher_states: list | None = None):
    """Return what ``forward_step`` returns, for a given micro-batch and, if the teacher has read it, its states."""
    output = model(
        batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"], batch.get("answer_weight"),
        teacher_states,
    )  # fmt: skip
    inner = get_attr_wrapped_model(model, "settings", return_model_obj=True)
    loss, shared = inner.settings.loss, inner.config.sequence_parallel and inner.settings.loss.layerwise
    return output, partial(loss_function, loss, inner.tp_group if shared else None, batch)


def forward_step(iterator, model):
    return learn(next_batch(iterator), model)
