"""Megatron's distributed optimizer over torch's AdamW, which is what runs without TransformerEngine and Apex.

torch's AdamW keeps a tensor ``step`` in each parameter's state. megatron-core 0.19.2 does not expect it:
``distrib_optimizer.py:839`` asserts on a fresh optimizer; ``:1223`` raises ``KeyError: step``, an autograd error for
fp32 parameters, and sets the step to zero; and ``:1028`` gives all parameters ONE shared step tensor, so that Adam's
step count jumps by the number of parameters at each iteration.
"""

import torch


def install() -> bool:
    """Returns whether the fixes were needed."""
    from megatron.core.optimizer import distrib_optimizer as module

    optimizer = module.DistributedOptimizer
    if module.HAVE_APEX_OR_TE or getattr(optimizer, "_hylo_step_fixes", False):
        return False
    optimizer._hylo_step_fixes = True
    set_states, sharded_state_dict, load_state_dict = (
        optimizer._set_main_param_and_optimizer_states,
        optimizer.sharded_state_dict,
        optimizer.load_state_dict,
    )

    @torch.no_grad()  # the main copy of an fp32 parameter is a view of it, which autograd lets nobody write to
    def set_with_step(self, param, tensors):
        # None is skipped: load_state_dict has set the step, and what "dp_reshardable" checkpoints bring here is zero.
        return set_states(self, param, {**tensors, "step": None})

    def sharded_with_fresh_states(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if is_loading:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    if not self.optimizer.state[param]:
                        self.optimizer.state[param].update(
                            step=torch.tensor(0.0),
                            exp_avg=torch.zeros_like(param),
                            exp_avg_sq=torch.zeros_like(param),
                        )
        return sharded_state_dict(self, model_sharded_state_dict, is_loading=is_loading, **kwargs)

    def load_with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = set_with_step
    optimizer.sharded_state_dict = sharded_with_fresh_states
    optimizer.load_state_dict = load_with_own_steps
    return True
