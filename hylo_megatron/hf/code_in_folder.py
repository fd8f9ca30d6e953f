"""``code_beside.py`` for code that runs out of a model's folder: saving a model copies this code as it is."""

import shutil
from pathlib import Path

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FOLDER = "hylo_code"
ENTRY = f"{FOLDER}/hf_modeling_hylo"

# Trainer's label smoothing shifts the labels of the classes in this table only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("hylo", "HyLoForCausalLM")


def choose(config: PretrainedConfig) -> None:
    """Let ``config`` name the code that ``write`` writes."""
    classes = {"AutoConfig": "HyLoConfig", "AutoModel": "HyLoModel", "AutoModelForCausalLM": "HyLoForCausalLM"}
    config.auto_map = {auto: f"{ENTRY}.{name}" for auto, name in classes.items()}


def write(config: PretrainedConfig, folder: Path) -> None:
    """Copy the files of this code into ``folder``."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for file in Path(__file__).parent.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / FOLDER / file.name)
