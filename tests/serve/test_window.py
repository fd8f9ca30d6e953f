"""The operator of a window in vLLM: what it reads of the metadata, and plans that layers of a pass share."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import ROOT
from helpers.waits import PATIENCE
from torch import nn
from vllm.forward_context import override_forward_context

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.window import sequence_attention
from hylo_megatron.kernels.window_cache import TokenPlan
from hylo_megatron.kernels.window_decode import TokenKernel
from hylo_megatron.mixers import vllm_window
from hylo_megatron.mixers.mamba2.vllm_module import HyLoMamba2
from hylo_megatron.mixers.vllm_window import DECODES, OP, Batch, HyLoWindow, tokens_of

SIZE, HEADS, GROUPS, DIM, SLOTS, LENGTH = {"size": 6, "sinks": 2}, 4, 2, 8, 4, 12
LAYERS = "first", "second"
WINDOWS = [("first", 0), ("second", 0), ("first", 1)]  # the last one is beside MLA, among the states of "first"
TOKENS = TokenKernel if os.environ.get("TRITON_INTERPRET") == "1" else TokenPlan


def blocks() -> dict[str, nn.Module]:
    """Return linear blocks with a window each and with two states before its places, full of NaN."""
    found = {}
    for name in LAYERS:
        window = HyLoWindow.__new__(HyLoWindow)
        nn.Module.__init__(window)
        window.layer, window.place, window.window, window.heads, window.groups = name, 0, SIZE, HEADS, GROUPS
        window.tokens, window.places = TOKENS, (2, GROUPS, sum(SIZE.values()), 2 * DIM)
        cache = torch.full((SLOTS, *window.places), torch.nan)
        found[name] = SimpleNamespace(window=window, kv_cache=(None, None, cache))
    return found


def gdn(decodes: list[int], prompts: list[tuple[int, int]], padding: int = 0) -> SimpleNamespace:
    """Return metadata of Gated DeltaNet and KDA. ``decodes``: slots; ``prompts``: slots and tokens."""
    lengths = [1] * len(decodes) + [length for _, length in prompts]
    slots = torch.tensor([*decodes, *(slot for slot, _ in prompts), *[0] * padding])
    return SimpleNamespace(
        num_decodes=len(decodes), num_decode_tokens=len(decodes), num_prefills=len(prompts),
        num_prefill_tokens=sum(lengths[len(decodes) :]), num_actual_tokens=sum(lengths) + padding,
        non_spec_state_indices_tensor=slots, non_spec_query_start_loc=torch.tensor([0, *lengths]).cumsum(0),
    )  # fmt: skip


def mamba2(decodes: list[int], prompts: list[tuple[int, int]], padding: int = 0) -> SimpleNamespace:
    lengths = torch.tensor([0, *(length for _, length in prompts)])
    return SimpleNamespace(
        num_decodes=len(decodes), num_prefills=len(prompts), num_prefill_tokens=int(lengths.sum()),
        state_indices_tensor_d=torch.tensor([*decodes, *[0] * padding])[:, None],
        state_indices_tensor_p=torch.tensor([slot for slot, _ in prompts]), query_start_loc_p=lengths.cumsum(0),
    )  # fmt: skip


def run(layers: dict, metadata, spans: list[tuple[int, range]], inputs: dict, padding: int = 0) -> None:
    """Run every layer's operator and compare its output for ``spans``: (slot, positions) in the batch's order."""
    at = torch.tensor([t for _, span in spans for t in span] + [7] * padding)
    context = SimpleNamespace(attn_metadata=dict.fromkeys(LAYERS, metadata), no_compile_layers=layers)
    for name, place in WINDOWS:
        near, far, k, v = (torch.cat([inputs[name, place, slot][i][span] for slot, span in spans]) for i in range(4))
        near, far, kv = (torch.cat([x, x.new_ones(padding, *x.shape[1:])]) for x in (near, far, torch.cat([k, v], -1)))
        out = torch.zeros_like(near)
        with override_forward_context(context):
            getattr(torch.ops.vllm, OP)(near, far, kv, at, out, name, place)
        want = torch.cat([wanted(inputs[name, place, slot])[span] for slot, span in spans])
        torch.testing.assert_close(out[: len(want)], want, rtol=1e-4, atol=1e-5)


def wanted(parts: list[torch.Tensor]) -> torch.Tensor:
    return sequence_attention(*(x[None] for x in parts), SIZE)[0]


@pytest.mark.parametrize("metadata", [gdn, mamba2])
def test_passes_of_two_layers(metadata):
    torch.manual_seed(0)
    shapes = [(LENGTH, heads, DIM) for heads in (HEADS, HEADS, GROUPS, GROUPS)]
    inputs = {(*window, slot): [torch.randn(shape) for shape in shapes] for window in WINDOWS for slot in (1, 2)}
    layers = blocks()
    run(layers, metadata([], [(1, 5)]), [(1, range(5))], inputs)
    run(layers, metadata([1], [(2, 8)]), [(1, range(5, 6)), (2, range(8))], inputs, padding=3)
    # A CUDA graph's capture may run twice with the same metadata, whose tensors hold other numbers each time.
    shared = metadata([1, 2], [], padding=2)
    for step in range(3):
        run(layers, shared, [(1, range(6 + step, 7 + step)), (2, range(8 + step, 9 + step))], inputs, padding=2)
    assert shared.hylo_window.owner == ("first", 0)


def test_passes_with_the_kernel_for_tokens():
    """Runs the test above in Triton's interpreter."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "two_layers"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert "2 passed" in done.stdout and not done.returncode, done.stdout[-3000:] + done.stderr[-2000:]


def chosen(monkeypatch, asked: str | None, fault: str, on_gpu: bool = True) -> type:
    sizes = HEADS, GROUPS, DIM, SIZE, torch.bfloat16
    monkeypatch.delenv(DECODES, raising=False)
    if asked:
        monkeypatch.setenv(DECODES, asked)
    monkeypatch.setattr(vllm_window, "current_platform", SimpleNamespace(is_cuda_alike=lambda: on_gpu))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm_window, "kernel_fault", lambda *_: fault)
    return tokens_of(*sizes)


def test_the_choice_of_what_decodes(monkeypatch):
    said = []
    logger = SimpleNamespace(warning_once=lambda text, *given: said.append(text % given), info_once=said.append)
    monkeypatch.setattr(vllm_window, "logger", logger)
    assert chosen(monkeypatch, None, "", on_gpu=False) is TokenPlan and not said
    assert chosen(monkeypatch, "torch", "") is TokenPlan and not said
    assert chosen(monkeypatch, None, "") is TokenKernel and "one Triton kernel" in said[-1]
    assert chosen(monkeypatch, None, "it is wrong") is TokenPlan and said[-1].endswith("decoded tokens: it is wrong.")
    with pytest.raises(HyLoError, match="HYLO_SERVE_WINDOW is triton: it is wrong; leave it unset"):
        chosen(monkeypatch, "triton", "it is wrong")
    with pytest.raises(HyLoError, match="HYLO_SERVE_WINDOW is 'cuda': expected triton or torch"):
        chosen(monkeypatch, "cuda", "")


def test_the_measurement_of_memory_needs_no_metadata():
    layers, shape = blocks(), (9, HEADS, DIM)
    out, kv = torch.zeros(shape), torch.randn(9, GROUPS, 2 * DIM)
    with override_forward_context(SimpleNamespace(attn_metadata=None, no_compile_layers=layers)):
        getattr(torch.ops.vllm, OP)(torch.randn(shape), torch.randn(shape), kv, torch.arange(9), out, "first", 0)
    assert not out.any() and layers["first"].kv_cache[2].isnan().all()


def test_slots_of_a_batch():
    for made in (gdn([3, 1], [(2, 4), (0, 1)]), mamba2([3, 1], [(2, 4), (0, 1)])):
        batch = Batch.of(made)
        assert batch.token_slots.tolist() == [3, 1] and batch.chunk_slots.tolist() == [2, 0]
        assert batch.chunk_starts.tolist() == [0, 4, 5] and batch.chunk_tokens == 5


def test_no_block_of_the_prefix_cache_gets_states_without_places(monkeypatch):
    """Mamba-2 of vLLM 0.32 copies its own two states from within a prompt into a block where others begin."""
    monkeypatch.setattr(HyLoMamba2, "get_state_shape", lambda layer: ((3, 8), (2, 4, 4)))
    monkeypatch.setattr(HyLoMamba2, "get_state_dtype", lambda layer: (torch.bfloat16, torch.float32))
    cache = SimpleNamespace(
        mamba_block_size=64, mamba_page_size_padded=None, mamba_cache_mode="align", use_replayssm=False
    )
    config = SimpleNamespace(cache_config=cache, num_speculative_tokens=0, speculative_config=None)
    layer = HyLoMamba2.__new__(HyLoMamba2)
    nn.Module.__init__(layer)
    layer.has_window, layer.window = True, SimpleNamespace(places=(1, GROUPS, sum(SIZE.values()), 2 * DIM))
    spec = layer.get_kv_cache_spec(config)
    assert spec.shapes[2] == layer.window.places and spec.dtypes[2] == torch.bfloat16
    assert not getattr(spec, "num_prefill_checkpoint_blocks", 0)
