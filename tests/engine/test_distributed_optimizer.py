"""Checkpoints that one Adam has written and another goes on from."""

from types import SimpleNamespace

import torch

from hylo_megatron.engine import distributed_optimizer

KEPT = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "max_lr": 0.3}


def load_into(optimizer, groups: list[dict]):
    """Load as megatron-core does: a checkpoint's groups take the place of the optimizer's own."""

    def load_state_dict(self, state_dict):
        self.optimizer.param_groups = [dict(group) for group in state_dict]

    wrapped = SimpleNamespace(optimizer=optimizer, _hylo_copies="stale")
    distributed_optimizer.load_own_steps(load_state_dict, None)(wrapped, groups)
    assert wrapped._hylo_copies is None
    return optimizer.param_groups


def test_a_fused_adam_goes_on_from_groups_of_torchs():
    fused = SimpleNamespace(defaults={"lr": 1.0, "bias_correction": True, "eps": 1.0}, state={}, param_groups=[])
    groups = load_into(fused, [KEPT | {"step": 5.0, "amsgrad": False}, KEPT])
    assert groups[0] == KEPT | {"step": 5, "amsgrad": False, "bias_correction": True}
    assert isinstance(groups[0]["step"], int) and "step" not in groups[1]


def test_torchs_adam_keeps_its_steps():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    step = torch.tensor(3.0)
    optimizer.state.update({parameter: {"step": step} for parameter in parameters})
    groups = load_into(optimizer, [{**optimizer.param_groups[0], "step": 3.0}])
    assert groups[0]["step"] == 3.0 and "bias_correction" not in groups[0]
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert steps[0] is not steps[1] and all(each == 3 for each in steps)
