"""What the plugin adds to older engines (vllm_states.py): above all, first tokens start from states of zeros."""

from types import SimpleNamespace

import pytest
import torch
from vllm import platforms
from vllm.model_executor.layers.mamba.ops import ssd_chunk_scan

from hylo_megatron.engine import vllm_plugin
from hylo_megatron.engine.register import patches
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.gdn.vllm_module import HyLoGatedDeltaNet
from hylo_megatron.mixers.kda.vllm_module import HyLoKimiDeltaAttention, check_layer
from hylo_megatron.mixers.mamba2.vllm_module import HyLoMamba2
from hylo_megatron.mixers.vllm_states import FreshStates


class Metadata(SimpleNamespace):
    def replace(self, **changes):
        return Metadata(**{**vars(self), **changes})


class Plain:
    """Stands for the engine's builder: gives back what it is given."""

    def __init__(self, kv_cache_spec, *_):
        self.kv_cache_spec = kv_cache_spec

    def build(self, common_prefix_len, metadata):
        return metadata


class Builder(FreshStates, Plain):
    pass


def test_first_tokens_are_decoded_from_zeros():
    layers = {name: SimpleNamespace(kv_cache=(torch.ones(6, 2), torch.ones(6, 3, 4))) for name in ("a", "b", "other")}
    config = SimpleNamespace(
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    builder = Builder(None, ["a", "b"], config, "cpu")
    lengths = torch.tensor([9, 1, 5, 1, 0])  # decoded, a first token, a prompt, a first token, padding
    metadata = Metadata(
        seq_lens_cpu_upper_bound=lengths, seq_lens=lengths, block_table_tensor=torch.tensor([[1], [2], [3], [4], [0]]),
        is_prefilling=torch.tensor([False, True, True, True, False]),
    )  # fmt: skip
    built = builder.build(0, metadata)
    assert built.is_prefilling.tolist() == [False, False, True, False, False]
    for name, layer in layers.items():
        kept = [1, 1, 1, 1, 1, 1] if name == "other" else [1, 1, 0, 1, 0, 1]
        assert all(state.flatten(1).amax(1).tolist() == kept for state in layer.kv_cache)
    assert builder.build(0, metadata.replace(seq_lens_cpu_upper_bound=lengths + 1)).is_prefilling[1]
    unpadded = builder.build(
        0, metadata.replace(seq_lens_cpu_upper_bound=lengths[:4])
    )  # as the V2 model runner gives it
    assert unpadded.is_prefilling.tolist() == built.is_prefilling.tolist()


@pytest.mark.parametrize("block", [HyLoGatedDeltaNet, HyLoMamba2, HyLoKimiDeltaAttention])
def test_linear_blocks_have_such_a_builder(block):
    builder = block.get_attn_backend(None).get_builder_cls()
    assert builder.build is FreshStates.build and builder.supports_update_block_table is False


@pytest.mark.parametrize("hopper, repaired, needed", [(True, False, True), (True, True, False),
                                                      (False, False, False)])  # fmt: skip
def test_racy_tilings_of_the_scan_are_left_out_on_hopper(monkeypatch, hopper, repaired, needed):
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_device_capability=lambda _: hopper))
    monkeypatch.delattr(ssd_chunk_scan, "_drop_racy_wgmma_configs", raising=False)
    if repaired:
        monkeypatch.setattr(ssd_chunk_scan, "_drop_racy_wgmma_configs", None, raising=False)
    (entry,) = patches("vllm model")
    assert entry.needed() == needed


def test_tilings_that_are_left():
    tilings = [(2, 4, 64), (1, 4, 64), (2, 2, 64), (2, 8, 32)]  # stages, warps, rows
    configs = [SimpleNamespace(num_stages=s, num_warps=w, kwargs={"BLOCK_SIZE_M": m}) for s, w, m in tilings]
    assert vllm_plugin.sound_tilings(configs, None) == configs[1:]


def test_kimi_delta_attention_of_an_older_engine_is_refused():
    class Older:
        def _forward(self, q_proj_states, k_proj_states, v_proj_states, g1, beta, core_attn_out): ...

    with pytest.raises(HyLoError, match="as 0.26 does.*install vLLM 0.32"):
        check_layer(Older)
