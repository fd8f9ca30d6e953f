"""The code beside an exported model's weights, which ``auto_map`` in its ``config.json`` names.

A folder has a loader, which imports this package, or all modules of the model (``hylo export --with-code``).
"""

import shutil
from pathlib import Path

from transformers.configuration_utils import PretrainedConfig

FOLDER = "hylo_code"
WITH_LOADER, WITH_CODE = "hylo_megatron_loader", f"{FOLDER}/hf_modeling_hylo"  # modules of auto_map


def auto_map(module: str) -> dict[str, str]:
    """Return the ``auto_map`` of a folder whose classes are in ``module``."""
    classes = {"AutoConfig": "HyLoConfig", "AutoModel": "HyLoModel", "AutoModelForCausalLM": "HyLoForCausalLM"}
    return {auto: f"{module}.{name}" for auto, name in classes.items()}


def has_code(config: PretrainedConfig) -> bool:
    """Whether the folder of ``config`` has, or shall have, all modules of the model."""
    named = getattr(config, "auto_map", None) or {}  # the Hub's has OWNER/MODEL-- before each module
    return any(str(name).rpartition("--")[2].startswith(f"{WITH_CODE}.") for name in named.values())


def choose(config: PretrainedConfig) -> None:
    """Let ``config`` name the code that ``write`` writes: the kind that it named before, or the loader."""
    config.auto_map = auto_map(WITH_CODE if has_code(config) else WITH_LOADER)


def write(config: PretrainedConfig, folder: Path) -> None:
    """Write the code that ``config`` names."""
    if not has_code(config):
        shutil.copyfile(Path(__file__).with_name("in_folder.py"), folder / f"{WITH_LOADER}.py")
        return
    from hylo_megatron.hf.assemble import assembled

    (folder / FOLDER).mkdir(exist_ok=True)
    for name, text in assembled().items():
        (folder / FOLDER / name).write_text(text, encoding="utf-8")
