"""vLLM's options: what a hybrid does not support is refused before anything is loaded, with what to do instead."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.serving import write_folder
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import MambaSpec

from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.window import cached_values
from hylo_megatron.planner.pages import state_bytes
from hylo_megatron.serve import config as plugin
from hylo_megatron.serve.geometry import Served
from hylo_megatron.serve.model import HyLoForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("options") / "model", "native", "gdn")


def configure(folder, **options):
    given = dict(model=str(folder), dtype="bfloat16", max_model_len=1024, max_num_seqs=4) | options
    return EngineArgs(**given).create_engine_config()


NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3)
REFUSED = {
    "ngram": (dict(speculative_config=NGRAM), "--speculative-config", "leave it out"),
    "draft": (dict(speculative_config=dict(method="draft_model", model="FOLDER", num_speculative_tokens=2)),
              "--speculative-config", "leave it out"),
    "lora": (dict(enable_lora=True), "--enable-lora", "merge_and_unload"),
    "int8": (dict(quantization="int8_per_channel_weight_only"), "--quantization int8_per_channel_weight_only",
             "expected fp8_per_channel"),
    "experts": (dict(quantization="experts_int8"), "--quantization experts_int8", "expected fp8_per_channel"),
    "fp8 by tensor": (dict(quantization="fp8"), "--quantization fp8", "expected fp8_per_channel"),
    "fp8 cache": (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype fp8", "leave it out"),
    "context": (dict(tensor_parallel_size=2, decode_context_parallel_size=2), "--decode-context-parallel-size",
                "--tensor-parallel-size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_what_to_do(folder, case):
    options, names, advises = REFUSED[case]
    options = json.loads(json.dumps(options).replace("FOLDER", str(folder)))
    with pytest.raises(HyLoError) as error:
        configure(folder, **options)
    said = str(error.value)
    assert said.startswith(f"{names}: not supported for a hybrid: ") and advises in said and "\n" not in said


@pytest.mark.parametrize("options", [
    dict(), dict(dtype="float16"), dict(dtype="float32"), dict(enable_prefix_caching=True), dict(runner="pooling"),
    dict(tensor_parallel_size=2, pipeline_parallel_size=2), dict(load_format="dummy"), dict(kv_cache_dtype="bfloat16"),
    dict(quantization="fp8_per_channel"), dict(enable_chunked_prefill=True, max_num_batched_tokens=256),
])  # fmt: skip
def test_the_others_are_let_through(folder, options):
    assert configure(folder, **options).model_config.hf_config.trained_geometry


def test_on_a_gpu_vllms_fp8_methods_are_let_through(folder, monkeypatch):
    given = configure(folder)
    monkeypatch.setattr(plugin, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for method in ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel"):
        given.model_config.quantization = method
        plugin.refuse(given)
    given.model_config.quantization = "bitsandbytes"
    with pytest.raises(HyLoError, match="--quantization bitsandbytes: .* expected fp8 or"):
        plugin.refuse(given)


@pytest.mark.parametrize("of", ["decode", "prefill"])
def test_sequences_on_several_ranks_are_refused(folder, of):
    given = configure(folder)
    setattr(given.parallel_config, f"{of}_context_parallel_size", 2)
    with pytest.raises(HyLoError, match=f"^--{of}-context-parallel-size: .* use --tensor-parallel-size"):
        plugin.refuse(given)


def changed(folder, to, **fields):
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").unlink()
    (to / "config.json").write_text(json.dumps(config | fields))
    return to


def test_a_folder_that_vllm_cannot_serve_is_refused(folder, tmp_path):
    field = {"quantization_config": dict(quant_method="fp8", activation_scheme="dynamic")}
    with pytest.raises(HyLoError, match="quantization_config in config.json: .* export the model unquantised"):
        configure(changed(folder, tmp_path, **field))


def test_windows_without_linear_layers_are_refused(folder, tmp_path):
    model = changed(folder, tmp_path, mixers=["mla"] * 5, window=dict(size=24, sinks=3, mla=True))
    with pytest.raises(HyLoError, match="^window in config.json: .* among the states of linear layers, and this plan"):
        configure(model)


@pytest.mark.parametrize("kinds, windows", [("gmm ggm", 3), ("gmgg mg", 2), ("mggg mmm", 0), ("gg gg", 1)])
def test_a_pipeline_stage_has_the_states_of_its_windows(folder, tmp_path, monkeypatch, kinds, windows):
    """``windows``: those whose keys and values are among the states of each linear layer; 0 is refused."""
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(str(len(stage)) for stage in kinds.split()))
    mixers = [{"m": "mla", "g": "gdn"}[kind] for kind in kinds.replace(" ", "")]
    window = dict(size=24, sinks=3) | ({"mla": True} if "mla" in mixers else {})
    model = changed(folder, tmp_path, mixers=mixers, num_hidden_layers=len(mixers), window=window)
    if windows:
        config = configure(model, pipeline_parallel_size=2)
        assert HyLoForCausalLM.get_mamba_state_shape_from_config(config)[-1][0] == windows
    else:
        with pytest.raises(
            HyLoError, match="^--pipeline-parallel-size: .* a stage has windows beside MLA and no line"
        ):
            configure(model, pipeline_parallel_size=2)


@pytest.mark.parametrize("connector, refused", [("NixlConnector", True), ("OffloadingConnector", False)])
def test_windows_are_not_sent_to_other_servers(folder, tmp_path, connector, refused):
    sends = dict(kv_transfer_config=dict(kv_connector=connector, kv_role="kv_both"))
    configure(folder, **sends)
    model = changed(folder, tmp_path, window=dict(size=24, sinks=3))
    if refused:
        with pytest.raises(HyLoError, match="--kv-transfer-config with NixlConnector: .* without the keys and values"):
            configure(model, **sends)
    else:
        configure(model, **sends)


@pytest.mark.parametrize("kind, device, refused", [("gdn", "gpu", False), ("kda", "gpu", True), ("kda", "cpu", False)])
def test_kimis_rotation_is_refused_on_a_gpu_only(folder, tmp_path, monkeypatch, kind, device, refused):
    monkeypatch.setenv("HYLO_SERVE_GEOMETRY", device)
    model = changed(folder, tmp_path, mixers=["mla", kind, "mla", kind, "mla"], linear_rope=True)
    if refused:
        with pytest.raises(HyLoError, match="linear_rope in config.json: .* Kimi Delta Attention has no place"):
            configure(model)
    else:
        configure(model)


@pytest.mark.parametrize("kind", ["gdn", "kda", "mamba2"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("beside", [{}, {"mla": True}])
def test_states_take_the_bytes_that_the_planner_counts(folder, tmp_path, kind, ranks, beside):
    """With a window; four ranks have a copy each of the two key heads."""
    size = dict(
        window=dict(size=24, sinks=3) | beside,
        num_key_value_heads=2,
        kda_num_heads=4,
        mixers=["mla", kind, "mla", kind, "mla"],
    )
    config = configure(changed(folder, tmp_path, **size))
    config.cache_config.mamba_ssm_cache_dtype = "float32"
    hybrid = config.model_config.hf_config
    parallel = SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=1)
    given = SimpleNamespace(
        model_config=config.model_config, cache_config=config.cache_config, parallel_config=parallel
    )
    made = MambaSpec(
        shapes=HyLoForCausalLM.get_mamba_state_shape_from_config(given),
        dtypes=HyLoForCausalLM.get_mamba_state_dtype_from_config(given), block_size=16,
    )  # fmt: skip
    counted = state_bytes(Served(hybrid.geometry()), kind, tp=ranks, window=cached_values(hybrid, ranks))
    assert made.page_size_bytes == counted
    copies = HyLoForCausalLM.get_mamba_state_copy_func(SimpleNamespace(config=hybrid))
    assert len(copies) == len(made.shapes) == 3 and copies[1] is copies[2]


def test_single_tensors_are_refused_once_weights_are_quantised():
    model = SimpleNamespace(training=False, quantized=True, modules=lambda: [])
    with pytest.raises(HyLoError, match="cannot be written into quantised weights"):
        HyLoForCausalLM.load_weights(model, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tied_model_with_a_head_of_its_own_is_refused(rank):
    rows = SimpleNamespace(org_vocab_start_index=3 * rank, org_vocab_end_index=3 * rank + 3)
    head = torch.randn(6, 4)
    padded = torch.cat([head[3 * rank : 3 * rank + 3], torch.zeros(5, 4)]).bfloat16()
    model = SimpleNamespace(model=SimpleNamespace(embed_tokens=SimpleNamespace(shard_indices=rows, weight=padded)))
    HyLoForCausalLM._check_tied(model, head)
    head[3 * rank + 2, 1] += 1
    with pytest.raises(HyLoError, match="lm_head.weight differs .* tie_word_embeddings"):
        HyLoForCausalLM._check_tied(model, head)
