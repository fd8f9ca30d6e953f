"""Operators of ours in vLLM: CUDA graphs that break at vLLM's own operators break at ours too."""

from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.compilation import breakable_cudagraph as graphs

from hylo_megatron.mixers.vllm_operators import register, split_at


def _fill(given: Tensor, out: Tensor, layer: str) -> None:
    out.copy_(given + 1)


def test_a_graph_breaks_at_an_operator_and_replays_run_it_again(monkeypatch):
    monkeypatch.setattr(graphs, "is_breakable_cudagraph_enabled", lambda: True)
    monkeypatch.setattr(graphs, "_weak_ref_capture_arg", lambda given: given)  # a kernel of the GPU build
    register("hylo_test_fill", _fill, "out")
    given, out, kept = torch.ones(2), torch.zeros(2), []
    capture = SimpleNamespace(_capturing=True, add_eager=kept.append)
    monkeypatch.setattr(graphs.BreakableCUDAGraphCapture._tls, "active", capture, raising=False)
    torch.ops.vllm.hylo_test_fill(given, out, "layer")
    assert len(kept) == 1
    given.fill_(6)
    kept[0]()
    assert out.tolist() == [7, 7]


def test_a_compiled_model_is_split_once_at_an_operator():
    splits = ["vllm::unified_attention"]
    for _ in range(2):
        split_at("hylo_test_fill", SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=splits)))
    assert splits == ["vllm::unified_attention", "vllm::hylo_test_fill"]
    split_at("hylo_test_fill", SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=None)))
