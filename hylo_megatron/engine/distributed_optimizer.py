"""Megatron's distributed optimizer over torch's AdamW, which is what runs without TransformerEngine and Apex.

torch's AdamW keeps a tensor ``step`` in each parameter's state. megatron-core 0.19.2 does not expect it:
``distrib_optimizer.py:839`` asserts on a fresh optimizer; ``:1223`` raises ``KeyError: step``, an autograd error for
fp32 parameters, and sets the step to zero; and ``:1028`` gives all parameters ONE shared step tensor, so that Adam's
step count jumps by the number of parameters at each iteration.

On a GPU the step is also waited for: hundreds of small launches follow the gradient's norm, 20 ms of a 141 ms step of
a 135M model. torch's fused AdamW is one launch, and the copy to the 16-bit weights one more.
"""

import torch


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """One kernel for all parameters, on a GPU; a checkpoint of either kind continues as the other."""
    fused = torch.cuda.is_available()
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = (True, False) if fused else (None, None)
    for param, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(param.device if fused else "cpu")


def _copies(optimizer) -> list[tuple[list, list]]:
    """``(16-bit or fp32 weights, their main copies)`` in two lists, found once; views of what the engine copies."""
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


def _without_bucket_padding(buffer) -> dict:
    """``param_index_map``, as if the buckets of a buffer followed one another without gaps."""
    shifts, unpadded = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {p: (start - shifts[b], end - shifts[b], b) for p, (start, end, b) in buffer.param_index_map.items()}


def _save_right_slices(optimizer) -> None:
    """``:1740`` gathers the states without the gaps between buckets, ``:1755`` cuts them as if the gaps were there.

    A pipeline stage with tied embeddings has two buckets, and overlapped gradient reduction makes more: checkpoints of
    these hold the states of one parameter, and its main copy, under the name of another.
    """
    sharded = optimizer.sharded_param_state_fully_reshardable

    def sharded_without_gaps(self, *args, **kwargs):
        kept = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_bucket_padding(buffer)
            return sharded(self, *args, **kwargs)
        finally:
            for buffer, positions in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = positions

    optimizer.sharded_param_state_fully_reshardable = sharded_without_gaps


def install() -> bool:
    """Returns whether the step's fixes were needed; the slices' is needed everywhere."""
    from megatron.core.optimizer import distrib_optimizer as module

    if not getattr(module.DistributedOptimizer, "_hylo_slices", False):
        module.DistributedOptimizer._hylo_slices = True
        _save_right_slices(module.DistributedOptimizer)

    optimizer = module.DistributedOptimizer
    if module.HAVE_APEX_OR_TE or getattr(optimizer, "_hylo_step_fixes", False):
        return False
    optimizer._hylo_step_fixes = True
    initialise, copy_params, set_states, sharded_state_dict, load_state_dict = (
        optimizer.__init__,
        optimizer._copy_main_params_to_model_params,
        optimizer._set_main_param_and_optimizer_states,
        optimizer.sharded_state_dict,
        optimizer.load_state_dict,
    )

    def initialise_fused(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self._hylo_copies = None
        if isinstance(self.optimizer, torch.optim.Adam):
            _fuse(self.optimizer)

    @torch.no_grad()
    def copy_main_to_model(self):
        if self.is_stub_optimizer or self.ddp_config.use_megatron_fsdp:
            return copy_params(self)
        self._hylo_copies = self._hylo_copies or _copies(self)
        for weights, mains in self._hylo_copies:
            if weights:
                torch._foreach_copy_(weights, mains)

    @torch.no_grad()  # the main copy of an fp32 parameter is a view of it, which autograd lets nobody write to
    def set_with_step(self, param, tensors):
        # None is skipped: load_state_dict has set the step, and what "dp_reshardable" checkpoints bring here is zero.
        return set_states(self, param, {**tensors, "step": None})

    def sharded_with_fresh_states(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if is_loading:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    if not self.optimizer.state[param]:
                        device = param.device if group["fused"] else "cpu"
                        self.optimizer.state[param].update(
                            step=torch.tensor(0.0, device=device),
                            exp_avg=torch.zeros_like(param),
                            exp_avg_sq=torch.zeros_like(param),
                        )
        return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)

    def load_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        if isinstance(self.optimizer, torch.optim.Adam):
            _fuse(self.optimizer)
        self._hylo_copies = None

    optimizer.__init__ = initialise_fused
    optimizer._copy_main_params_to_model_params = copy_main_to_model
    optimizer._set_main_param_and_optimizer_states = set_with_step
    optimizer.sharded_state_dict = sharded_with_fresh_states
    optimizer.load_state_dict = load_with_own_steps
    return True
