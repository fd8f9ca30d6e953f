"""Kimi Delta Attention on a CPU, which vLLM's CPU build lacks.

Legend: T tokens of all requests, C channels, H heads, K head dim.
"""

from torch import Tensor

from hylo_megatron.kernels import causal_conv1d, chunk_kda, l2norm, recurrent_kda
from hylo_megatron.mixers.vllm_cpu import conv_weight, run_requests


def kimi_delta_attention(layer, qkv_TC: Tensor, decay_THK: Tensor, beta_TH: Tensor, out_THK: Tensor) -> None:
    """Fill ``out_THK`` by the convolution and the recurrence of each request, from its cached states.

    ``layer``: a vLLM KDA layer; its state is kept as ``[slot, H, K, K]``, keys first.
    """
    weight_CW = conv_weight(layer)

    def run(tokens: slice, conv_state: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        qkv, conv_state = causal_conv1d(
            qkv_TC[tokens][None], weight_CW, initial_state=conv_state, output_final_state=True
        )
        q, k, v = (x.unflatten(-1, (-1, layer.head_dim)) for x in qkv.chunk(3, -1))
        out, state = (recurrent_kda if q.shape[1] == 1 else chunk_kda)(
            l2norm(q),
            l2norm(k),
            v,
            g=decay_THK[tokens][None],
            beta=beta_TH[tokens][None].sigmoid(),
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            initial_state=state,
            output_final_state=True,
        )
        out_THK[tokens] = out[0].to(out_THK.dtype)
        return conv_state, state

    run_requests(layer, run)
