"""Requests that begin with a single token start from states of zeros (versions.py)."""

from types import SimpleNamespace

import torch

from hylo_megatron.vllm.versions import FreshStates


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
