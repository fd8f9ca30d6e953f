"""A folder that has the model's own code: vLLM takes the plugin's classes, whether remote code is allowed or not."""

import pytest
from helpers.hf import tiny_config
from vllm.transformers_utils.config import get_config

from hylo_megatron.hf import HyLoConfig, code_beside, register_config


@pytest.mark.parametrize("allowed", [True, False])
def test_the_plugin_comes_first(allowed, tmp_path):
    config = tiny_config()
    config.auto_map = code_beside.auto_map(code_beside.WITH_CODE)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "hylo_code" / "hf_modeling_hylo.py").is_file()
    register_config()  # as the plugin does
    assert type(get_config(tmp_path, trust_remote_code=allowed)) is HyLoConfig
