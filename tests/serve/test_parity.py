"""vLLM's tokens against transformers', in fp32: every published geometry, as a CPU and as a GPU would run it."""

import os

import pytest
import torch
from helpers.serving import GEOMETRIES, log_probabilities, prompt, write_folder
from programs.generate import generate, start
from safetensors.torch import load_file, save_file

from hylo_megatron.hf import HyLoForCausalLM

LENGTHS = (1, 2, 5, 23, 64, 140, 301, 1)
ON_GPU = {"HYLO_SERVE_GEOMETRY": "gpu"}
CASES = [  # geometry, linear blocks, norms on queries and keys, whose kernels' geometry
    ("native", "gdn", False, "cpu"),
    ("native", "kda", False, "cpu"),
    ("native-100", "gdn", False, "gpu"),
    ("llama-1b", "gdn", False, "gpu"),
    ("llama-3b", "mamba2", False, "gpu"),
    ("qwen3-1.7b", "gdn", True, "gpu"),
    ("qwen3-1.7b", "mamba2", False, "gpu"),
]

WINDOW = dict(window=dict(size=24, sinks=3), num_key_value_heads=2)
WINDOWS = WINDOW | dict(window=dict(size=24, sinks=3, mla=True))  # beside MLA layers too
POSITIONS = [  # geometry, linear blocks, norms on queries and keys, whose kernels, settings, and those of the engine
    ("native", "gdn", False, "cpu", WINDOW | dict(linear_rope=True, attention_bias=True), {}),
    ("native", "kda", False, "cpu", WINDOWS | dict(linear_rope=True, base_qk_norm=True), {}),
    ("split", "gdn", False, "gpu", dict(linear_rope=True), {}),
    ("qwen3-1.7b", "gdn", True, "gpu", WINDOWS, dict(enable_chunked_prefill=True, max_num_batched_tokens=48)),
]


def check(folder, answers: list, prompts: list[list[int]], tolerance: float, close: float = 0) -> None:
    """Each token is the most probable one after those before it, or within ``close`` of that, and as probable as
    transformers says."""
    model = HyLoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for given, answer in zip(prompts, answers, strict=True):
        tokens = [token for token, _ in answer]
        expected = log_probabilities(model, given + tokens, len(tokens))
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (expected.max(-1).values - chosen <= close).all(), len(given)
        gaps = [abs(expected[i, token].item() - value) for i, (token, value) in enumerate(answer)]
        assert max(gaps) <= tolerance, (len(given), max(gaps))


def check_scores(folder, scored: dict, given: list[int]) -> None:
    model = HyLoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def probable(tokens: list[int], last: int) -> torch.Tensor:
        expected = log_probabilities(model, tokens, last)
        return expected.gather(1, torch.tensor(tokens[-last:])[:, None])[:, 0]

    assert (probable(given, len(given) - 1) - torch.tensor(scored["prompt"])).abs().max() <= 1e-4
    assert abs(probable(given + scored["beam"], 6).sum().item() - scored["beam_score"]) <= 1e-3


@pytest.mark.parametrize("geometry, linear, qk_norm, device", CASES)
def test_every_geometry_is_served_exactly(geometry, linear, qk_norm, device, tmp_path):
    changes = {"linear_norm_eps": 1e-2, "kda_norm_eps": 1e-2} if geometry in ("native", "qwen3-1.7b") else {}
    changes |= {"tie_word_embeddings": geometry == "llama-3b"}
    changes |= WINDOW if (geometry, linear) == ("qwen3-1.7b", "mamba2") else {}
    folder = write_folder(tmp_path / f"{geometry}-{linear}", geometry, linear, qk_norm, **changes)
    other = write_folder(tmp_path / "other", geometry, linear, qk_norm, seed=1, **changes)
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    env = ON_GPU if device == "gpu" else {}
    updates = [("singly", other), ("session", folder), ("reload", other), ("singly", folder)]
    got = generate(tmp_path, folder, prompts, 16, env, poison=True, updates=updates, dtype="float32",
                   max_model_len=1024, max_num_seqs=8)  # fmt: skip
    check(folder, got["answers"], prompts, 1e-4)
    assert got["again"] == got["answers"]
    check(other, got["updated"][0], prompts, 1e-4)
    assert got["updated"] == [got["updated"][0], got["answers"]] * 2  # attention's derived weights follow as well
    check_scores(folder, got["scored"], prompts[-2])
    assert "no layer of its config.json has such a parameter" in got["refused"][0]
    assert "self_attn.kv_a_proj_with_mqa.weight: a tensor of shape [3, 5] does not fit" in got["refused"][1]
    trained = GEOMETRIES[geometry].mla
    padded = device == "gpu" and not qk_norm and (trained.kv_lora_rank, trained.v_head_dim) != (256, 128)
    assert ("runs padded with zeros" in got["log"]) == padded
    assert ("keeps them expanded" in got["log"]) == qk_norm


@pytest.mark.parametrize("geometry, linear, qk_norm, device, settings, engine", POSITIONS)
def test_settings_of_positions_are_served_exactly(geometry, linear, qk_norm, device, settings, engine, tmp_path):
    """More requests than run at once, some in chunks, and all of them again from caches of NaN."""
    settings = dict(mla_rope=False, log_scale={"base": 9.0, "length": 20}) | settings
    folder = write_folder(tmp_path / "model", geometry, linear, qk_norm, **settings)
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    env, sizes = ON_GPU if device == "gpu" else {}, dict(dtype="float32", max_model_len=1024, max_num_seqs=3) | engine
    got = generate(tmp_path, folder, prompts, 8, env, poison=True, **sizes)
    check(folder, got["answers"], prompts, 1e-4)
    assert got["again"] == got["answers"]


@pytest.mark.parametrize("linear", ["kda", "mamba2"])
def test_windows_go_on_from_cached_prefixes(linear, tmp_path):
    """Each prompt twice, and prompts that share a beginning with others."""
    folder = write_folder(
        tmp_path / "model", "native", linear, qk_norm=True, linear_rope=linear != "mamba2", **WINDOWS
    )
    prompts = [prompt(length, i) for i, length in enumerate((700, 650, 30, 1))]
    prompts += [prompts[0][:600] + prompt(200, 7)[1:], prompts[1][:300] + prompt(400, 8)[1:]]
    got = generate(tmp_path, folder, prompts, 8, twice=True, dtype="float32", max_model_len=1024, max_num_seqs=4,
                   enable_prefix_caching=True)  # fmt: skip
    check(folder, got["answers"], prompts, 1e-4)
    check(folder, got["again"], prompts, 1e-4)
    assert [count >= 600 for count in got["cached"]] == [True, True, False, False, True, True]


BESIDE_MLA = {"gdn": {"mla": True}, "kda": {}, "mamba2": {"mla": True}}


@pytest.mark.parametrize("linear", ["gdn", "kda", "mamba2"])
def test_windows_of_decoded_tokens_in_one_kernel(linear, tmp_path):
    """In Triton's interpreter, as a GPU runs them: beside prompts, before a window is full, from caches of NaN."""
    pytest.importorskip("triton")
    settings = WINDOW | dict(window=dict(size=7, sinks=0 if linear == "kda" else 2) | BESIDE_MLA[linear])
    folder = write_folder(tmp_path / "model", "native", linear, **settings)
    prompts = [prompt(length, i) for i, length in enumerate((1, 2, 5, 23, 64, 1))]
    env = {"HYLO_SERVE_WINDOW": "triton", "TRITON_INTERPRET": "1"}
    got = generate(tmp_path, folder, prompts, 8, env, poison=True, dtype="float32", max_model_len=256, max_num_seqs=4)
    assert "one Triton kernel attends within the window of decoded tokens" in got["log"]
    check(folder, got["answers"], prompts, 1e-4)
    assert got["again"] == got["answers"]


def test_one_token_to_twenty_thousand_and_no_state_leaks(tmp_path):
    """More requests than run at once, so that states are used again; then all of it once more, with NaN in every cache
    that the first pass left behind."""
    folder = write_folder(tmp_path / "long", "native", "gdn")
    lengths = [1, 2, 3, 20000, 63, 64, 65, 129, *(7 * i % 301 + 1 for i in range(24)), 4000]
    prompts = [prompt(length, i) for i, length in enumerate(lengths)]
    got = generate(tmp_path, folder, prompts, 24, poison=True, dtype="float32", max_model_len=20480, max_num_seqs=8)
    check(folder, got["answers"], prompts, 2e-4)
    assert got["again"] == got["answers"]


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    """vLLM alone would serve a half-copied one with weights from whatever memory held."""
    folder = write_folder(tmp_path / "cut", "native", "gdn")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.4.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = start(tmp_path, folder, [[1]], 1, dtype="float32", max_model_len=1024)
    said = "no tensor in the folder for model.layers.4.self_attn.o_proj.weight (1 in all)"
    assert done.returncode != 0 and said in done.stdout + done.stderr


@pytest.mark.parallel
@pytest.mark.parametrize("size, settings", [
    ("tensor_parallel_size", WINDOW),
    ("tensor_parallel_size", WINDOWS | dict(num_key_value_heads=1)),  # a copy of the head on each rank
    # two windows of the first stage are with its only linear layer
    ("pipeline_parallel_size", WINDOWS | dict(mixers=["gdn", "mla", "mla", "gdn", "gdn", "gdn"])),
])  # fmt: skip
def test_two_ranks_serve_what_one_does(size, settings, tmp_path):
    folder = write_folder(tmp_path / "ranks", "llama-1b", "gdn", linear_rope=True, **settings)
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    # The warm-up, which is left out elsewhere, makes the buffers of later stages.
    env = {**ON_GPU, "VLLM_CPU_OMP_THREADS_BIND": f"0|{min(1, os.cpu_count() - 1)}", "VLLM_CPU_CI_ENV": "0"}
    got = generate(tmp_path, folder, prompts, 8, env, dtype="float32", max_model_len=1024, max_num_seqs=8,
                   **{size: 2})  # fmt: skip
    check(folder, got["answers"], prompts, 1e-4)


def test_bf16_follows_transformers(tmp_path):
    """Random weights have close calls: where the tokens differ, transformers gives both nearly the same chance. The
    engine starts without weights and is sent them, as a reinforcement learning trainer does it."""
    folder = write_folder(tmp_path / "bf16", "native", "gdn", dtype=torch.bfloat16)
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    got = generate(tmp_path, folder, prompts, 16, first=folder, load_format="dummy", dtype="bfloat16",
                   max_model_len=1024, max_num_seqs=8)  # fmt: skip
    model = HyLoForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for given, answer in zip(prompts, got["answers"], strict=True):
        tokens = [token for token, _ in answer]
        expected = log_probabilities(model, given + tokens, len(tokens))
        behind = expected.max(-1).values - expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() <= 0.5 and behind.median() == 0, (len(given), behind)


def test_fp8_weights_stay_near_transformers(tmp_path):
    """vLLM quantises while it loads; layers are small enough for their rounding errors to be small too. An update is a
    whole one, for single tensors have no place in quantised weights."""
    folder, other = (write_folder(tmp_path / f"fp8-{seed}", "native", "gdn", seed=seed) for seed in range(2))
    for each in (folder, other):
        tensors = load_file(each / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and "layers" in name:
                tensor.mul_(0.2)
        save_file(tensors, each / "model.safetensors", {"format": "pt"})
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    got = generate(tmp_path, folder, prompts, 16, updates=[("reload", other)], quantization="fp8_per_channel",
                   dtype="bfloat16", max_model_len=1024, max_num_seqs=8)  # fmt: skip
    check(folder, got["answers"], prompts, 0.2, close=0.2)
    check(other, got["updated"][0], prompts, 0.2, close=0.2)
    assert all("cannot be written into quantised weights" in said for said in got["refused"])
