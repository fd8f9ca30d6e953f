"""Each mixer of the transformers model against transformers' own of that kind, and rotary frequencies."""

import copy
import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from helpers.hf import LLAMA3, YARN, scatter, tiny_config

import hylo_megatron  # noqa: F401  (registers the model)
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.rope import rope_frequencies
from hylo_megatron.mixers.gdn.hf_module import HyLoGatedDeltaNet
from hylo_megatron.mixers.hf_layers import Rotation
from hylo_megatron.mixers.kda.hf_module import HyLoKimiDeltaAttention
from hylo_megatron.mixers.mamba2.hf_module import HyLoMamba2
from hylo_megatron.mixers.mla.hf_module import HyLoMLA


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("low_rank", [True, False])
def test_mla_matches_deepseek_v3(interleaved, low_rank):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = tiny_config(q_lora_rank=24 if low_rank else None)
    keys = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
    keys += ("qk_rope_head_dim", "v_head_dim", "rope_parameters", "max_position_embeddings")
    values = {name: copy.deepcopy(getattr(config, name)) for name in keys}
    reference_config = deepseek.DeepseekV3Config(
        **values, num_key_value_heads=4, attention_bias=False, rope_interleave=interleaved
    )
    reference_config._attn_implementation = "eager"
    mla, reference = scatter(HyLoMLA(config, 0)), deepseek.DeepseekV3Attention(reference_config, 0)
    reference.load_state_dict(mla.state_dict(), strict=False)
    reference.q_a_layernorm = reference.kv_a_layernorm = nn.Identity()  # we have no latent norms
    if interleaved:  # DeepSeek's order of rope dims: pairs side by side
        order = torch.arange(8).view(2, 4).T.flatten()
        rope_rows = torch.arange(4 * 14).view(4, 14)
        rope_rows[:, 6:] = rope_rows[:, 6:][:, order]
        query = reference.q_b_proj if low_rank else reference.q_proj
        query.weight.data = query.weight.data[rope_rows.flatten()]
        kv_rows = torch.cat([torch.arange(20), 20 + order])
        reference.kv_a_proj_with_mqa.weight.data = reference.kv_a_proj_with_mqa.weight.data[kv_rows]
    x, positions = torch.randn(2, 13, 32), torch.arange(13).unsqueeze(0)
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    cos_sin = deepseek.DeepseekV3RotaryEmbedding(reference_config)(x, positions)
    expected = reference(x, cos_sin, mask)[0]
    torch.testing.assert_close(mla(x, Rotation(config)(positions), None), expected, atol=1e-5, rtol=1e-4)


def test_gdn_matches_qwen3_next(monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):  # not fla's, which need a GPU
        monkeypatch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))
    config = tiny_config()
    reference_config = qwen.Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, linear_conv_kernel_dim=4, rms_norm_eps=config.rms_norm_eps, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    gdn, reference = scatter(HyLoGatedDeltaNet(config, 0)), qwen.Qwen3NextGatedDeltaNet(reference_config, 0)
    w = {name: value for name, value in gdn.state_dict().items()}
    per_key_head = [w[f"{n}_proj.weight"].view(2, -1, 32) for n in "qkvgba"]
    target = reference.state_dict()
    target["in_proj_qkvz.weight"] = torch.cat(per_key_head[:4], 1).flatten(0, 1)
    target["in_proj_ba.weight"] = torch.cat(per_key_head[4:], 1).flatten(0, 1)
    target["conv1d.weight"] = torch.cat([w[f"{n}_conv1d.weight"] for n in "qkv"])
    target |= {"A_log": w["A_log"], "dt_bias": w["dt_bias"], "norm.weight": w["o_norm.weight"]}
    target["out_proj.weight"] = w["o_proj.weight"]
    reference.load_state_dict(target)
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(gdn(x), reference(x), atol=1e-5, rtol=1e-4)


def test_kda_matches_kimi_linear(monkeypatch):
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    for name in ("chunk_kimi_delta_attention", "causal_conv1d_fn"):  # not fla's, which need a GPU
        function = inspect.getclosurevars(getattr(kimi, name)).nonlocals["torch_function"]
        monkeypatch.setattr(kimi, name, function)
    config = tiny_config(("kda",))
    reference_config = kimi.KimiLinearConfig(
        hidden_size=32, linear_num_heads=4, linear_head_dim=6, linear_conv_kernel_dim=4, num_hidden_layers=1,
        rms_norm_eps=config.rms_norm_eps, layer_types=["linear_attention"], mlp_layer_types=["dense"],
    )  # fmt: skip
    kda, reference = scatter(HyLoKimiDeltaAttention(config, 0)), kimi.KimiLinearDeltaAttention(reference_config, 0)
    target = {name: value for name, value in kda.state_dict().items() if "conv1d" not in name}
    target["conv1d.weight"] = torch.cat([kda.get_parameter(f"{n}_conv1d.weight") for n in "qkv"])
    for name in ("f_a_proj.weight", "f_b_proj.weight", "A_log", "dt_bias"):
        target[f"forget_gate.{name}"] = target.pop(name)
    target["forget_gate.A_log"] = target["forget_gate.A_log"].view(1, 1, 4, 1)
    reference.load_state_dict(target)
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(kda(x), reference(x), atol=1e-5, rtol=1e-4)


def test_mamba2_matches_transformers():
    from transformers.models.mamba2 import modeling_mamba2 as mamba2

    config = tiny_config()
    reference_config = mamba2.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=8, state_size=6, n_groups=2, expand=1, conv_kernel=4, use_bias=False,
        use_conv_bias=True, layer_norm_epsilon=1e-5, rms_norm=True, chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    mixer, reference = scatter(HyLoMamba2(config, 0)), mamba2.Mamba2Mixer(reference_config, 0)
    reference.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rope", [YARN, LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
def test_rope_scaling_uses_the_rope_dims(rope):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama import LlamaConfig

    of_rope_dims = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=64, rope_parameters=dict(rope)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](of_rope_dims, "cpu")
    got = Rotation(tiny_config(rope_parameters=rope, head_dim=16, qk_rope_head_dim=8))
    positions = torch.arange(5).unsqueeze(0)
    angles = positions[..., None] * expected
    assert torch.equal(got(positions)[0], angles.cos() * factor) and torch.equal(
        got(positions)[1], angles.sin() * factor
    )
    with pytest.raises(HyLoError, match="rope_type 'dynamic'"):
        Rotation(tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))(positions)


def test_rope_frequencies_are_made_on_the_cpu():
    """Models are built on the meta device, and what is cached then must still have values."""
    parameters = {"rope_type": "default", "rope_theta": 12345.0}
    with torch.device("meta"):
        frequencies, factor = rope_frequencies(parameters, 8, 64)
    assert torch.equal(frequencies, 1.0 / 12345.0 ** (torch.arange(0, 8, 2).float() / 8)) and factor == 1.0


def test_qk_norm_is_per_head_over_all_dims_before_the_rotation():
    config = tiny_config(qk_norm=True)
    mla, positions, x = scatter(HyLoMLA(config, 0)), torch.arange(9).unsqueeze(0), torch.randn(1, 9, 32)
    q = mla.q_norm(mla.q_b_proj(mla.q_a_proj(x)).view(1, 9, 4, 14))
    latent, shared = mla.kv_a_proj_with_mqa(x).split([20, 8], -1)
    k_nope, v = mla.kv_b_proj(latent).view(1, 9, 4, 16).split([6, 10], -1)
    k = mla.k_norm(torch.cat([k_nope, shared.unsqueeze(2).expand(-1, -1, 4, -1)], -1))
    cos, sin = (t.repeat(1, 1, 2).unsqueeze(2) for t in Rotation(config)(positions)[:2])

    def turn(t):
        a, b = t[..., 6:10], t[..., 10:]
        return torch.cat([t[..., :6], t[..., 6:] * cos + torch.cat([-b, a], -1) * sin], -1)

    scores = torch.einsum("bshd,bthd->bhst", turn(q), turn(k)) * 14**-0.5
    weights = (scores + torch.full((9, 9), -torch.inf).triu(1)).softmax(-1)
    expected = mla.o_proj(torch.einsum("bhst,bthv->bshv", weights, v).flatten(-2))
    torch.testing.assert_close(mla(x, Rotation(config)(positions), None), expected, atol=1e-5, rtol=1e-4)
