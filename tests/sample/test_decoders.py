"""Rows that are written in batches are the teacher's rows alone, and draws have the right shares."""

import types

import pytest
import torch
from helpers import tiny
from helpers.hf import HYBRIDS, model_of
from helpers.samples import sampling

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import draw
from hylo_megatron.sample import row_cache
from hylo_megatron.sample.decoder import Decoder, Request, Sampling, Written, rows_by_memory
from hylo_megatron.sample.lockstep import LockstepDecoder, cache_bytes_per_token


def written_alone(model, request: Request, rules: Sampling) -> Written:
    """The same row with the whole text read again for every token."""
    ids = list(request.ids)
    while len(ids) < rules.length:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        uniform = draw.uniforms(rules.seed, torch.tensor([request.row]), torch.tensor([len(ids) - 1]))
        token = int(draw.draw(logits, uniform, rules.temperature, rules.top_p))
        if token in rules.ends:
            return Written(request.row, ids[len(request.ids) :], True)
        ids.append(token)
    return Written(request.row, ids[len(request.ids) :], False)


@pytest.mark.parametrize("shape", ["smollm2", "qwen3", "qwen2"])
def test_rows_of_a_batch_are_those_of_rows_alone(shape):
    requests = [Request(row, tuple(range(3, 4 + row % 5))) for row in range(9)]
    alone = [written_alone(tiny.teacher_model(shape), request, sampling()) for request in requests]
    for rows in (2, 4):
        decoder = Decoder(tiny.teacher_model(shape), sampling(), rows)
        assert sorted(decoder.write(iter(requests))) == alone
    assert {row.ended for row in alone} == {True, False}  # both ways to end


@pytest.mark.parametrize("kind", ["gdn", "mamba2", "kda", "window", "linear_rope", "nope"])
def test_rows_of_a_hybrids_batch_are_those_of_rows_alone(kind):
    requests = [Request(row, tuple(range(3, 4 + row % 5))) for row in range(9)]
    model = model_of(**HYBRIDS[kind])
    alone = [written_alone(model, request, sampling()) for request in requests]
    assert list(LockstepDecoder(model, sampling(), 4).write(iter(requests))) == alone
    assert {row.ended for row in alone} == {True, False}  # both ways to end


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [None, {"size": 20, "sinks": 2}, {"size": 80, "sinks": 2, "mla": True}])
def test_bytes_of_a_hybrids_cache(window, qk_norm):
    model = model_of(("mla", "gdn"), window=window, qk_norm=qk_norm).bfloat16()
    with torch.no_grad():
        cache = model(torch.zeros(1, 50, dtype=torch.int64), use_cache=True).past_key_values
    assert cache.num_bytes() <= 50 * cache_bytes_per_token(model, 50) < cache.num_bytes() + 50


def test_an_attention_that_sees_too_much_is_refused(monkeypatch):
    def everything(query, keys, values, position, scale):
        return plain(query, keys, values, torch.full_like(position, keys.shape[1] - 1), scale)

    plain = row_cache.attend_plain
    monkeypatch.setattr(row_cache, "attend_plain", everything)
    with pytest.raises(HyLoError, match="logits of single tokens over the cache differ by .*, expected less than 5%"):
        Decoder(tiny.teacher_model("smollm2"), sampling(), 2)


@pytest.mark.parametrize(
    "rope, refused",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "depend on the longest row"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, "change at 32 tokens"),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, None),
        ({"full_attention": {"rope_type": "dynamic"}}, "depend on the longest row"),
        ({"rope_type": "yarn", "factor": 2.0}, None),
    ],
)
def test_rotary_frequencies_of_the_longest_row_are_refused(rope, refused):
    reason = row_cache.refusal(types.SimpleNamespace(model_type="llama", rope_parameters=rope), 64)
    assert refused in reason if refused else reason is None


def test_flash_attention_is_for_equal_widths_up_to_256():
    for widths in ((320, 320), (192, 128)):  # decided before the device is touched
        assert not row_cache.flash_serves(torch.device("cuda"), torch.bfloat16, *widths)


def test_uniform_numbers_are_a_rows_own():
    rows, places = torch.arange(2000) % 40, torch.arange(2000) // 40
    found = draw.uniforms(1, rows, places)
    assert torch.equal(draw.uniforms(1, rows[7:9], places[7:9]), found[7:9])
    assert found.unique().numel() > 1995 and found.min() >= 0 and found.max() < 1
    assert abs(found.mean() - 0.5) < 0.03 and abs(torch.corrcoef(torch.stack([found[1:], found[:-1]]))[0, 1]) < 0.1
    assert not torch.equal(draw.uniforms(2, rows, places), found)


def test_draws_have_the_shares_of_the_nucleus():
    shares = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    uniform = (torch.arange(10000) + 0.5) / 10000
    logits = shares.log().expand(10000, 5)
    counts = torch.bincount(draw.draw(logits, uniform, 1.0, 1.0), minlength=5) / 10000
    torch.testing.assert_close(counts, shares, atol=1e-3, rtol=0)
    counts = torch.bincount(draw.draw(logits, uniform, 1.0, 0.8), minlength=5) / 10000
    torch.testing.assert_close(counts, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=1e-3, rtol=0)
    sharper = torch.bincount(draw.draw(logits, uniform, 0.5, 1.0), minlength=5) / 10000
    torch.testing.assert_close(sharper, shares**2 / (shares**2).sum(), atol=1e-3, rtol=0)


def test_rows_by_memory():
    assert rows_by_memory(80 * 2**30, 23040, 1024, 49152) == 2048
    assert rows_by_memory(20 * 2**30, 23040, 1024, 49152) == 704
    assert rows_by_memory(2**28, 23040, 1024, 49152) == 8
    with pytest.raises(HyLoError, match="--length 1024"):
        rows_by_memory(2**20, 23040, 1024, 49152)
