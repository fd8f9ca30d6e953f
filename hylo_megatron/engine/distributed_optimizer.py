"""Megatron's distributed optimizer over torch's AdamW, or over the fused Adam of TransformerEngine or Apex.

torch's AdamW runs where neither package is installed. It keeps a tensor ``step`` in each parameter's state, which
megatron-core 0.19.2 does not expect. Its ``distrib_optimizer.py:839`` asserts on a fresh optimizer. Line 1223 raises
``KeyError: step`` and sets the step to zero. Line 1028 gives all parameters one shared step tensor, so that Adam's
step count jumps by the number of parameters at each iteration. With any Adam line 1223 raises an autograd error for
fp32 parameters.

A fused Adam keeps the step in its parameter groups. The groups of a checkpoint replace its own, so a checkpoint that
torch's AdamW has written would leave a group without ``bias_correction``, and with a step that is no whole number.

On a GPU the optimizer's step also takes 20 ms of a 141 ms step of a 135M model: hundreds of small launches follow the
gradient's norm. torch's fused AdamW is one launch, and the copy to the 16-bit weights is one more.
"""

import torch

from hylo_megatron.engine.own_states import of_own_parameters
from hylo_megatron.engine.patch import around, entries


def _fuse(optimizer) -> None:
    """Let one kernel step all parameters on a GPU. A checkpoint of either kind continues as the other."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    fused = torch.cuda.is_available()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = (True, False) if fused else (None, None)
    for param, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(param.device if fused else "cpu")


def _copies(optimizer) -> list[tuple[list, list]]:
    """Return ``(weights, their main copies)`` for the 16-bit and the fp32 weights, as views of what is copied."""
    found = []
    for mains, models in (
        (optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups),
        (optimizer.shard_fp32_groups, optimizer.model_fp32_groups),
    ):
        pairs = [pair for groups in zip(mains, models, strict=True) for pair in zip(*groups, strict=True)]
        weights = []
        for _, model in pairs:
            span = optimizer._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            buffer, _, bucket = optimizer.model_param_gbuf_map[model]
            weights.append(optimizer.buffers[buffer].buckets[bucket].param_data.view(-1)[span.start : span.end])
        found.append((weights, [main for main, _ in pairs]))
    return found


@around
def initialise_fused(initialise, run, self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    self._hylo_copies = None
    _fuse(self.optimizer)


def _complete_groups(optimizer) -> None:
    """Let a fused Adam go on from the parameter groups of a checkpoint that another Adam has written."""
    if isinstance(optimizer, torch.optim.Adam):
        return
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
        if "step" in group:
            group["step"] = int(group["step"])


@around
@torch.no_grad()
def copy_at_once(copy_params, run, self):
    if self.is_stub_optimizer or self.ddp_config.use_megatron_fsdp or self.config.use_precision_aware_optimizer:
        return copy_params(self)
    self._hylo_copies = self._hylo_copies or _copies(self)
    for weights, mains in self._hylo_copies:
        if weights:
            torch._foreach_copy_(weights, mains)


@around
@torch.no_grad()  # the main copy of an fp32 parameter is a view of it, which autograd lets nobody write to
def set_without_step(set_states, run, self, param, tensors):
    """Skip the step, which ``load_state_dict`` has set: "dp_reshardable" checkpoints bring zero here."""
    return set_states(self, param, {**tensors, "step": None})


def _fill_states(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter without a state a fresh one, to load into."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param].update(
                    step=torch.tensor(0.0, device=param.device if group["fused"] else "cpu"),
                    exp_avg=torch.zeros_like(param),
                    exp_avg_sq=torch.zeros_like(param),
                )


@around
def shard_fresh_states(sharded_state_dict, run, self, model_sharded_state_dict, is_loading=False, **kwargs):
    if is_loading:
        _fill_states(self.optimizer)
    return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)


@around
def load_own_steps(load_state_dict, run, self, state_dict):
    """Give each parameter a step tensor of its own after loading."""
    load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    _fuse(self.optimizer)
    _complete_groups(self.optimizer)
    self._hylo_copies = None


def _without_bucket_padding(buffer) -> dict:
    """Return ``param_index_map`` as if the buckets of a buffer followed one another without gaps."""
    shifts, unpadded = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {p: (start - shifts[b], end - shifts[b], b) for p, (start, end, b) in buffer.param_index_map.items()}


@around
def slice_without_gaps(sharded, run, self, *args, **kwargs):
    kept = [buffer.param_index_map for buffer in self.buffers]
    try:
        for buffer in self.buffers:
            buffer.param_index_map = _without_bucket_padding(buffer)
        return of_own_parameters(sharded, self, *args, **kwargs)
    finally:
        for buffer, positions in zip(self.buffers, kept, strict=True):
            buffer.param_index_map = positions


def _has_torch_adam() -> bool:
    """Return whether megatron-core found neither TransformerEngine nor Apex, whose Adam it prefers."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


_CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_FILE = "megatron/core/optimizer/distrib_optimizer.py"
PATCHES = entries(
    "megatron", "megatron-core",
    (f"{_CLASS}.sharded_param_state_fully_reshardable", slice_without_gaps,
     "(self, model_sharded_state_dict, is_loading, metadata)",
     "line 1740 gathers the states without the gaps between buckets, line 1755 cuts them as if the gaps were there:"
     " with several buckets (tied embeddings in a pipeline, overlapped gradient reduction) a checkpoint would hold the"
     f" states of one parameter under the name of another ({_FILE}:1755)"),
    (f"{_CLASS}.__init__", initialise_fused, "(self, optimizer, config, grad_scaler, init_state_fn, ... 11, 444b93a3)",
     "torch's AdamW runs hundreds of small kernels"),
    (f"{_CLASS}._copy_main_params_to_model_params", copy_at_once, "(self)", "one copy for each parameter"),
    (f"{_CLASS}._set_main_param_and_optimizer_states", set_without_step, "(self, model_param, tensors)",
     f"an autograd error for fp32 parameters; with torch's AdamW KeyError: step, or a step of zero ({_FILE}:1223)"),
    (f"{_CLASS}.load_state_dict", load_own_steps, "(self, state_dict)",
     f"gives all parameters one shared step tensor; a fused Adam keeps the checkpoint's groups ({_FILE}:1028)"),
) + entries(
    "megatron", "megatron-core",
    (f"{_CLASS}.sharded_state_dict", shard_fresh_states,
     "(self, model_sharded_state_dict, is_loading, sharding_type, ... 5, 27589f72)",
     f"asserts on a fresh optimizer ({_FILE}:839)"),
    needed=_has_torch_adam,
)  # fmt: skip
