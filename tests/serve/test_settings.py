"""Settings of the engine that the plugin changes, for a GPU (serve/config.py)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.serving import GEOMETRIES, SMALL, sizes

from hylo_megatron.config import GDNGeometry
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf import HyLoConfig
from hylo_megatron.mixers.gdn import serving as gdn
from hylo_megatron.serve import config as plugin
from hylo_megatron.serve.config import EngineSettings, apply

NATIVE = GEOMETRIES["native"]


def settings(monkeypatch, requests=1024, dtype="auto", backend=None, splits=32, norms=False,
             geometry=NATIVE, model="bfloat16", states="auto", window=None, **more) -> SimpleNamespace:  # fmt: skip
    """As the plugin leaves them for 24 heads of Llama-3.2-3B's native size."""
    monkeypatch.setenv("HYLO_SERVE_GEOMETRY", "gpu")
    monkeypatch.setattr(plugin, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    shape = SMALL | dict(num_attention_heads=24, hidden_size=768)
    config = HyLoConfig(mixers=["gdn", "mla"] * 2, qk_norm=norms, window=window, **shape, **sizes(geometry))
    apply(config)
    given = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, quantization=None, dtype=getattr(torch, model)),
        scheduler_config=SimpleNamespace(max_num_seqs=requests),
        cache_config=SimpleNamespace(mamba_cache_dtype="auto", mamba_ssm_cache_dtype=states, cache_dtype=dtype,
                                     enable_prefix_caching=True),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1
        ),
        additional_config=more, speculative_config=None, lora_config=None,
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=splits, backend=backend),
        compilation_config=SimpleNamespace(inductor_compile_config={}),
        kv_transfer_config=None,
    )  # fmt: skip
    EngineSettings.verify_and_update_config(given)
    return given


def test_attention_is_split_as_far_as_its_space_allows(monkeypatch):
    def splits(**given):
        return settings(monkeypatch, **given).attention_config.flash_attn_max_num_splits_for_cuda_graph

    assert splits(requests=64) == 128
    assert splits(requests=512) == 85  # partial results of fp32, 24 heads and 256 values take at most 1 GiB
    assert splits(requests=64, splits=16) == 16  # somebody chose
    assert splits(requests=64, norms=True) == 32  # no latents


def test_fp8_caches_are_refused_before_anything_is_loaded(monkeypatch):
    with pytest.raises(HyLoError, match="rows of 576 values in 8 bits, this model's have 320"):
        settings(monkeypatch, dtype="fp8")
    settings(monkeypatch, dtype="fp8", backend="TRITON_MLA")
    settings(monkeypatch, dtype="fp8", norms=True)


def test_states_are_fp32_and_requests_limited(monkeypatch):
    found = settings(monkeypatch, requests=100_000)
    assert found.cache_config.mamba_ssm_cache_dtype == "float32"
    assert 1 < found.scheduler_config.max_num_seqs < 100_000
    assert found.compilation_config.inductor_compile_config["shape_padding"] is False


def test_requests_are_limited_by_the_bytes_of_their_types(monkeypatch):
    """A position of a cache takes as many bytes as its type, and so does the work space of a request."""

    def most(**given):
        return settings(monkeypatch, requests=100_000, **given).scheduler_config.max_num_seqs

    wide = dict(window=dict(size=2048, sinks=4))
    half, whole = most(states="bfloat16", **wide), most(model="float32", states="bfloat16", **wide)
    assert whole == pytest.approx(half / 2, rel=0.05)  # rows and windows twice as wide, so as many positions a page
    large = dict(geometry=replace(NATIVE, gdn=GDNGeometry(24, 24, 128, 128)))
    assert most(**large) == pytest.approx(most(states="bfloat16", **large) / 2, rel=0.05)  # states in fp32
    assert most(dtype="fp8", backend="TRITON_MLA", **wide) == pytest.approx(most(**wide) / 2, rel=0.05)


def test_prompts_take_vllms_own_kernel_where_it_fits(monkeypatch):
    def kernel(key=128, value=128, **more):
        geometry = replace(NATIVE, gdn=GDNGeometry(2, 4, key, value))
        return settings(monkeypatch, geometry=geometry, **more).additional_config["gdn_prefill_backend"]

    monkeypatch.setattr(gdn, "find_spec", lambda name: name)
    assert kernel() == kernel(value=256) == "auto"  # the latter served as twice as many heads of 128
    assert kernel(64, 64) == kernel(256, 512) == "triton"
    assert kernel(gdn_prefill_backend="triton") == "triton"  # somebody chose
    monkeypatch.setattr(gdn, "find_spec", lambda name: None if name == "cutlass" else name)
    assert kernel() == "triton"
