"""The layers of ``--hylo-backend te``, with stand-ins that take the arguments of megatron-core's TE classes.

TransformerEngine itself is not here. The stand-ins compute with torch and keep an ``_extra_state`` as TE's do.
"""

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.extensions import transformer_engine as te  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.layers import specs  # noqa: E402
from hylo_megatron.layers.load import layout_config, load_model, model_tensors  # noqa: E402
from hylo_megatron.mixers.megatron_layers import RMSNorm  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")


def column(input_size, output_size, *, config, init_method, gather_output, bias, skip_bias_add, is_expert,
           skip_weight_param_allocation=False, tp_comm_buffer_name=None, tp_group=None, stride=1,
           name=None):  # fmt: skip
    """The arguments of ``TEColumnParallelLinear``."""


def row(input_size, output_size, *, config, init_method, bias, input_is_parallel, skip_bias_add, is_expert,
        tp_comm_buffer_name=None, tp_group=None, name=None):  # fmt: skip
    """The arguments of ``TERowParallelLinear``."""


def norm(config, hidden_size, eps=1e-5, has_residual=False):
    """The arguments of ``TENorm``."""


def stand_in(takes, base):
    class StandIn(base):
        def __init__(self, *args, **kwargs):
            takes(*args, **kwargs)
            super().__init__(*args, **kwargs)

        def get_extra_state(self):
            return torch.zeros(0, dtype=torch.uint8)

        def set_extra_state(self, state):
            pass

    return StandIn


Column, Row, Norm = stand_in(column, ColumnParallelLinear), stand_in(row, RowParallelLinear), stand_in(norm, RMSNorm)


@pytest.mark.parametrize("linear", ["gdn", "mamba2", "kda", "teacher"])
def test_specs_build_and_checkpoints_fit_both_ways(linear, tmp_path, monkeypatch):
    monkeypatch.setattr(specs, "load", lambda *_: None)
    for name, kind in (("TEColumnParallelLinear", Column), ("TERowParallelLinear", Row), ("TENorm", Norm)):
        monkeypatch.setattr(te, name, kind)
    student, teacher = helpers.write_pair(tmp_path, "gdn" if linear == "teacher" else linear)
    folder, batch = (teacher if linear == "teacher" else student), tiny.tokens(length=16)
    positions, found = torch.arange(16).expand_as(batch), {}
    for backend in ("local", "te"):
        model, _ = load_model(folder, backend=backend)
        with torch.no_grad():
            found[backend] = model.eval()(batch, positions, None), model_tensors(model.sharded_state_dict()).keys()
    kinds = {type(module) for module in model.decoder.modules()}  # those of te
    assert {Column, Row, Norm} <= kinds and not kinds & {ColumnParallelLinear, RowParallelLinear, RMSNorm}
    torch.testing.assert_close(found["te"][0], found["local"][0], rtol=1e-5, atol=1e-5)
    assert found["te"][1] == found["local"][1]


@pytest.mark.parametrize("outputs, kind", [(48, Column), (50, specs.AlignedColumnParallelLinear)])
def test_a_projection_of_an_odd_width_is_torchs(outputs, kind, monkeypatch):
    monkeypatch.setattr(te, "TEColumnParallelLinear", Column)
    config, group = layout_config(tiny.hybrid()), parallel_state.get_tensor_model_parallel_group()
    made = specs.backend("local").column(64, outputs, config, group, kind=specs.TEProjection)
    assert type(made) is kind and made.weight.shape == (outputs, 64)


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(specs.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(HyLoError, match="computes on CUDA devices alone, and none is here"):
        specs.check_cuda()


def test_a_missing_transformer_engine_is_one_line():
    if has("transformer-engine"):
        pytest.skip("TransformerEngine is installed")
    with pytest.raises(HyLoError, match="--hylo-backend te"):
        specs.backend("te")
