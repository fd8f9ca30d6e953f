"""Build a model and load a checkpoint into it, in any layout of the process groups."""

import os
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.api import CheckpointException

from hylo_megatron.checkpoint.iterations import reading
from hylo_megatron.checkpoint.safe_pickles import check_pickles, explain
from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import check_layout
from hylo_megatron.errors import HyLoError
from hylo_megatron.layers.model import UNFUSED, build_model, model_fields


def start_process_groups(tp: int = 1, pp: int = 1, cp: int = 1, seed: int = 1234) -> None:
    """Start process groups for a program other than ``megatron.training``. One process needs no torchrun."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.device_count() else "gloo"
        if torch.cuda.device_count():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        alone = dict(rank=0, world_size=1, store=torch.distributed.HashStore())
        torch.distributed.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    if not has_layout(tp, pp, cp):  # new groups cost threads, which old groups keep
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(seed)


def has_layout(tp: int, pp: int, cp: int) -> bool:
    return parallel_state.model_parallel_is_initialized() and (tp, pp, cp) == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )


def layout_config(arch: Architecture, dtype=torch.float32, **overrides) -> TransformerConfig:
    """Return a ``TransformerConfig`` for ``arch`` on the current process groups."""
    fields = model_fields(arch) | UNFUSED | dict(
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    ) | overrides  # fmt: skip
    return TransformerConfig(**fields)


def model_tensors(sharded: dict) -> dict:
    """Return ``sharded`` without the ``_extra_state`` objects of linear layers: fp8 scales, which are unused here."""
    return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}


def load_state(model, state: dict) -> None:
    """Run ``load_state_dict``, strict about everything except ``_extra_state``."""
    result = model.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
    if missing or result.unexpected_keys:
        raise HyLoError(f"checkpoint and model differ: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")


def load_weights(model, checkpoint: str | Path) -> None:
    """Load this rank's shards. Raises ``HyLoError`` if names or shapes do not fit."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    sharded = model_tensors(model.sharded_state_dict(metadata=metadata))
    names = list(sharded)
    with reading(checkpoint) as path:
        check_pickles(path)
        try:
            loaded = dist_checkpointing.load(sharded, str(path))
        # torch's is not an Exception, and its text is a whole traceback
        except (Exception, CheckpointException) as error:
            explain(path, error, "does not fit the model that its hylo.json describes")
    load_state(model, {name: loaded[name] for name in names})


def load_model(checkpoint: str | Path, config: TransformerConfig | None = None, padded_vocab_size=None, **kwargs):
    """Return ``(HybridModel with weights, Architecture)``."""
    arch = Architecture.load(checkpoint)
    check_layout(
        arch, parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_context_parallel_world_size(),
        kwargs.get("linear_cp", "auto"),
    )  # fmt: skip
    config = config or layout_config(arch)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if padded_vocab_size is None:
        tp = config.tensor_model_parallel_size
        padded_vocab_size = -(-arch.vocab_size // tp) * tp
    model = build_model(
        arch, config, pg_collection=groups, padded_vocab_size=padded_vocab_size,
        pre_process=kwargs.pop("pre_process", parallel_state.is_pipeline_first_stage()),
        post_process=kwargs.pop("post_process", parallel_state.is_pipeline_last_stage()), **kwargs,
    )  # fmt: skip
    load_weights(model, checkpoint)
    return model, arch
