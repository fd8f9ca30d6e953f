"""Linear mixers on vLLM's CPU build, request by request: for tests and small use."""

from collections.abc import Callable

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _unpacked_conv_weight


def conv_weight(layer) -> Tensor:
    """Return the weight [C,W] of a layer's convolution, which vLLM's CPU build may have packed."""
    return _unpacked_conv_weight(layer)


Step = Callable[[slice, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def run_requests(layer, step: Step) -> None:
    """Call ``step`` for each request of this pass of a linear layer, and keep the states that it returns.

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
