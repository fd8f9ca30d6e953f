"""Loads the hybrid in this folder with transformers. The code of the model is in the package hylo-megatron.

A copy of this file lies in every exported folder. It runs only where the package was not imported first, and only with
``trust_remote_code=True``.
"""

import importlib.util

if importlib.util.find_spec("hylo_megatron") is None:
    raise ImportError(
        "this folder holds a hybrid of MLA and linear attention (model_type hylo): install the package hylo-megatron "
        "from its repository (pip install -e . in a clone) into this environment, then load the folder again"
    )

HyLoConfig = importlib.import_module("hylo_megatron.hf").HyLoConfig
HyLoModel = importlib.import_module("hylo_megatron.hf").HyLoModel
HyLoForCausalLM = importlib.import_module("hylo_megatron.hf").HyLoForCausalLM
