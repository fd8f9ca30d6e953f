"""Gated DeltaNet with rotated queries and keys on a GPU: vLLM's own layer with torch in place of its kernels."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as vllm_layer
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import causal_conv1d, chunk_gated_delta_rule, l2norm, log_decay
from hylo_megatron.kernels.rope import turn
from hylo_megatron.mixers.gdn.vllm_module import HyLoGatedDeltaNet
from hylo_megatron.mixers.gdn.vllm_rotation import OP

HEADS, VALUES, DIM, WIDTH, SLOTS = 2, 4, 8, 4, 5
CHANNELS = (2 * HEADS + VALUES) * DIM


def parts(qkv: Tensor) -> list[Tensor]:
    sizes = [HEADS * DIM, HEADS * DIM, VALUES * DIM]
    return [x.unflatten(-1, (-1, DIM)) for x in qkv.split(sizes, -1)]


def convolved(rows: Tensor, state: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    return causal_conv1d(rows[None], weight, initial_state=state, output_final_state=True)


def conv_fn(
    x_CT, weight, bias, *, activation, conv_states, has_initial_state, cache_indices, query_start_loc, metadata
):
    out = torch.empty_like(x_CT)
    for r, known in enumerate(has_initial_state):
        here, slot = slice(query_start_loc[r], query_start_loc[r + 1]), cache_indices[r]
        state = conv_states[slot].T[None] if known else None
        rows, left = convolved(x_CT[:, here].T, state, weight)
        out[:, here], conv_states[slot] = rows[0].T, left[0].T
    return out


def conv_update(x_TC, conv_states, weight, bias, activation, *, conv_state_indices, validate_data):
    each = [convolved(x_TC[r : r + 1], conv_states[s].T[None], weight) for r, s in enumerate(conv_state_indices)]
    for slot, (_, left) in zip(conv_state_indices, each, strict=True):
        conv_states[slot] = left[0].T
    return torch.cat([rows[0] for rows, _ in each])


def prepared(*, conv_output, a, b, A_log, dt_bias, apply_l2norm, **_):  # noqa: N803
    q, k, v = parts(conv_output)
    return l2norm(q), l2norm(k), v, log_decay(a, A_log, dt_bias), b.sigmoid()


class Rule(nn.Module):
    gdn_prefill_backend = "triton"

    def forward(self, q, k, v, *, g, beta, initial_state, cu_seqlens, **_):
        out, states = torch.empty_like(v), torch.empty_like(initial_state)
        for r in range(len(initial_state)):
            here, before = slice(cu_seqlens[r], cu_seqlens[r + 1]), initial_state[r : r + 1].mT
            part, state = chunk_gated_delta_rule(
                *(x[:, here] for x in (q, k, v)), g=g[:, here], beta=beta[:, here], initial_state=before,
                output_final_state=True,
            )  # fmt: skip
            out[:, here], states[r] = part, state[0].mT
        return out, states


def decode(*, A_log, a, b, dt_bias, q, k, v, initial_state, cu_seqlens, ssm_state_indices, **_):  # noqa: N803
    slots = ssm_state_indices[: len(cu_seqlens) - 1]
    g, beta = log_decay(a, A_log, dt_bias)[None], b.sigmoid()[None]
    out, left = Rule()(l2norm(q), l2norm(k), v, g=g, beta=beta, initial_state=initial_state[slots],
                       cu_seqlens=cu_seqlens)  # fmt: skip
    initial_state[slots] = left
    return out, None


@pytest.fixture
def layer(monkeypatch) -> HyLoGatedDeltaNet:
    for name, stand_in in (
        ("causal_conv1d_fn", conv_fn), ("causal_conv1d_update", conv_update), ("fused_post_conv_prep", prepared),
        ("fused_sigmoid_gating_delta_rule_update", decode),
        ("fused_recurrent_gated_delta_rule_packed_decode", lambda **_: None),
    ):  # fmt: skip
        monkeypatch.setattr(vllm_layer, name, stand_in)
    torch.manual_seed(0)
    layer = HyLoGatedDeltaNet.__new__(HyLoGatedDeltaNet)
    nn.Module.__init__(layer)
    layer.conv1d, layer.chunk_gated_delta_rule = nn.Module(), Rule()
    layer.conv1d.weight, layer.conv1d.bias = nn.Parameter(torch.randn(CHANNELS, 1, WIDTH)), None
    layer.A_log, layer.dt_bias = (nn.Parameter(torch.randn(VALUES)) for _ in range(2))
    for name, value in dict(
        prefix="layer", tp_size=1, num_k_heads=HEADS, num_v_heads=VALUES, head_k_dim=DIM, head_v_dim=DIM,
        key_dim=HEADS * DIM, value_dim=VALUES * DIM, activation="silu", enable_packed_recurrent_decode=True,
        kv_cache=(torch.full((SLOTS, WIDTH - 1, CHANNELS), 3.0), torch.full((SLOTS, VALUES, DIM, DIM), 3.0)),
    ).items():  # fmt: skip
        setattr(layer, name, value)
    layer.rotate(SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=[])))
    return layer.requires_grad_(False)


def metadata(decodes: list[int], prompts: list[tuple[int, int, bool]]) -> GDNAttentionMetadata:
    """``decodes``: slots; ``prompts``: slot, tokens, and whether the request goes on."""
    d, lengths = len(decodes), [1] * len(decodes) + [length for _, length, _ in prompts]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    slots, known = (
        torch.tensor([*decodes, *(p[0] for p in prompts)]),
        torch.tensor([True] * d + [p[2] for p in prompts]),
    )
    return GDNAttentionMetadata(
        num_prefills=len(prompts), num_prefill_tokens=sum(lengths[d:]), num_decodes=d, num_decode_tokens=d,
        num_spec_decodes=0, num_spec_decode_tokens=0, num_actual_tokens=sum(lengths),
        has_initial_state=known if prompts else None, non_spec_query_start_loc=starts,
        non_spec_state_indices_tensor=slots, prefill_query_start_loc=starts[d:] - d, prefill_state_indices=slots[d:],
        prefill_has_initial_state=known[d:],
    )  # fmt: skip


def angles(at: Tensor) -> tuple[Tensor, Tensor]:
    turns = at[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    return turns.cos(), turns.sin()


def run(layer, batch: GDNAttentionMetadata, inputs: list[Tensor], at: list[int], padding: int = 2) -> Tensor:
    """Run the operator on tokens with padding behind them, and return the output of the tokens."""
    tokens = batch.num_actual_tokens
    qkv, b, a = (torch.cat([x, x.new_full((padding, x.shape[1]), 5.0)]) for x in inputs)
    out = torch.zeros(tokens + padding, VALUES, DIM)
    context = SimpleNamespace(attn_metadata={"layer": batch}, no_compile_layers={"layer": layer})
    with override_forward_context(context):
        getattr(torch.ops.vllm, OP)(qkv, b, a, *angles(torch.tensor(at + [9] * padding)), out, "layer")
    return out[:tokens]


def reference(layer, qkv: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Return the output of a complete sequence."""
    q, k, v = parts(convolved(qkv, None, layer.conv1d.weight[:, 0])[0])
    cos, sin = (x[:, None] for x in angles(torch.arange(len(qkv))))
    q, k = (l2norm(turn(x, cos, sin)) for x in (q, k))
    g, beta = log_decay(a, layer.A_log, layer.dt_bias)[None], b.sigmoid()[None]
    return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0][0]


def test_prompts_chunks_and_tokens_are_rotated_alike(layer):
    sequences = {slot: [torch.randn(9, size) for size in (CHANNELS, VALUES, VALUES)] for slot in (1, 3)}
    want = {slot: reference(layer, *inputs) for slot, inputs in sequences.items()}
    done = dict.fromkeys(sequences, 0)
    for decodes, prompts in (([], [(1, 4)]), ([1], [(3, 5)]), ([3], [(1, 3)]), ([1, 3], []), ([], [(3, 2)])):
        given = [(slot, 1) for slot in decodes] + prompts
        spans = [(slot, range(done[slot], done[slot] + length)) for slot, length in given]
        batch = metadata(decodes, [(slot, length, done[slot] > 0) for slot, length in prompts])
        inputs = [torch.cat([sequences[slot][i][span] for slot, span in spans]) for i in range(3)]
        got = run(layer, batch, inputs, [at for _, span in spans for at in span])
        torch.testing.assert_close(got, torch.cat([want[slot][span] for slot, span in spans]), rtol=1e-4, atol=1e-5)
        for slot, length in given:
            done[slot] += length
    assert done == {1: 9, 3: 9}


def test_a_path_of_vllm_that_rotates_nothing_is_refused(layer):
    layer.enable_packed_recurrent_decode = True
    inputs = [torch.randn(2, size) for size in (CHANNELS, VALUES, VALUES)]
    with pytest.raises(HyLoError, match="read 2 tokens and let 0 of them be rotated"):
        run(layer, metadata([1, 3], []), inputs, [4, 7])


def test_a_layer_without_these_places_is_refused(layer, monkeypatch):
    monkeypatch.delattr(vllm_layer.QwenGatedDeltaNetAttention, "split_ba")
    with pytest.raises(HyLoError, match="Gated DeltaNet here has no split_ba"):
        layer.rotate(None)
