"""Gated DeltaNet on a CPU in fp32 or with heads of any shape, which vLLM's CPU build lacks.

Legend: T tokens of all requests, H value heads, V value dim.
"""

from torch import Tensor

from hylo_megatron.kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    l2norm,
    log_decay,
    recurrent_gated_delta_rule,
)
from hylo_megatron.mixers.vllm_cpu import conv_weight, run_requests


def gated_delta_net(layer, qkv_TC: Tensor, beta_TH: Tensor, decay_TH: Tensor, out_THV: Tensor) -> None:
    """Fill ``out_THV`` by the convolution and the delta rule of each request, from its cached states.

    ``layer``: a vLLM Gated DeltaNet layer; its state is kept as ``[slot, H, V, K]``.
    """
    weight_CW, log_decay_TH = conv_weight(layer), log_decay(decay_TH, layer.A_log, layer.dt_bias)
    keys = layer.key_dim // layer.tp_size

    def run(tokens: slice, conv_state: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv, conv_state = causal_conv1d(
            qkv_TC[tokens][None], weight_CW, initial_state=conv_state, output_final_state=True
        )
        q, k, v = qkv.split([keys, keys, qkv.shape[-1] - 2 * keys], -1)
        q, k = (l2norm(x.unflatten(-1, (-1, layer.head_k_dim))) for x in (q, k))
        rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
        out, state = rule(
            q,
            k,
            v.unflatten(-1, (-1, layer.head_v_dim)),
            g=log_decay_TH[tokens][None],
            beta=beta_TH[tokens][None].sigmoid(),
            initial_state=None if state is None else state.transpose(2, 3),
            output_final_state=True,
        )
        out_THV[tokens] = out[0].to(out_THV.dtype)
        return conv_state, state.transpose(2, 3)

    run_requests(layer, run)
