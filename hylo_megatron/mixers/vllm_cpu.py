"""Linear mixers on a CPU, request by request: for tests and small use.

vLLM's CPU build lacks Kimi Delta Attention, and Gated DeltaNet in fp32 or with heads of any shape. Legend: T tokens of
all requests, C channels, W width of the convolution, H value heads, K key dim, V value dim.
"""

from collections.abc import Callable

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _unpacked_conv_weight

from hylo_megatron.kernels import causal_conv1d, chunk_gated_delta_rule, l2norm, recurrent_gated_delta_rule
from hylo_megatron.kernels.rope import Angles, turn

Step = Callable[[slice, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def run_requests(layer, step: Step) -> None:
    """Call ``step`` for each request of this pass of a linear layer, and keep the states that ``step`` returns.

    ``step(tokens, conv_state, state)`` gets the request's place among the tokens, and its states of batch size 1:
    [1,W-1,C], and fp32 as vLLM orders it. They are None where the request begins.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # vLLM measures its memory
        return
    metadata = metadata[layer.prefix]
    conv_states, states = layer.kv_cache[:2]
    if is_conv_state_dim_first():
        conv_states = conv_states.transpose(1, 2)
    decodes, requests = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
    starts = metadata.non_spec_query_start_loc.tolist()
    slots = metadata.non_spec_state_indices_tensor.tolist()
    known = [True] * decodes + (metadata.has_initial_state[decodes:requests].tolist() if requests > decodes else [])
    for request in range(requests):
        slot = slots[request]
        before = (conv_states[slot][None], states[slot][None].float()) if known[request] else (None, None)
        conv_state, state = step(slice(starts[request], starts[request + 1]), *before)
        conv_states[slot] = conv_state[0].to(conv_states.dtype)
        states[slot] = state[0].to(states.dtype)


def gated_delta_rule(
    layer,
    qkv_TC: Tensor,
    g: Tensor,
    beta_TH: Tensor,
    out_THV: Tensor,
    angles: Angles,
    *,
    key_dim: int,
    keys_last: bool,
) -> None:
    """Fill ``out_THV`` by the convolution and the delta rule of each request, from the request's cached states.

    ``g``: the log decay, [T,H] or [T,H,K]. ``keys_last``: the layer keeps its states as ``[slot,H,V,K]``, else keys
    come before values.
    """
    weight_CW = _unpacked_conv_weight(layer)
    values = out_THV.shape[1] * out_THV.shape[2]
    keys = (qkv_TC.shape[-1] - values) // 2

    def step(tokens: slice, conv_state: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv, conv_state = causal_conv1d(
            qkv_TC[tokens][None], weight_CW, initial_state=conv_state, output_final_state=True
        )
        q, k, v = qkv.split([keys, keys, values], -1)
        q, k = (x.unflatten(-1, (-1, key_dim)) for x in (q, k))
        if angles.linear_cos is not None:
            q, k = (turn(x, angles.linear_cos[tokens], angles.linear_sin[tokens]) for x in (q, k))
        q, k = l2norm(q), l2norm(k)
        rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
        before = state.mT if keys_last and state is not None else state
        decay, beta = g[tokens][None], beta_TH[tokens][None].sigmoid()
        v = v.unflatten(-1, out_THV.shape[1:])
        out, state = rule(q, k, v, g=decay, beta=beta, initial_state=before, output_final_state=True)
        out_THV[tokens] = out[0].to(out_THV.dtype)
        return conv_state, state.mT if keys_last else state

    run_requests(layer, step)
