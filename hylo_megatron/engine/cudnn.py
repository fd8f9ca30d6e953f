"""One cuDNN in a process, torch's own.

With an older one torch leaves cuDNN's attention on Hopper for a slower one without a word. TransformerEngine loads the
system's cuDNN where one is installed. Where that one was older, attention at 64K took 1.7 times as long.
"""

import os
from pathlib import Path

from hylo_megatron.packages import spec

WHERE = ("CUDNN_HOME", "CUDNN_PATH")  # in the environment: where TransformerEngine looks first


def show_own_cudnn() -> None:
    """Show TransformerEngine the cuDNN that came with torch. What the user has set stays.

    Call before megatron-core is imported, which imports TransformerEngine where it is installed.
    """
    wheels = spec("nvidia")  # the folder of NVIDIA's libraries that torch is installed with
    folders = [Path(root, "cudnn") for root in (wheels.submodule_search_locations if wheels else ())]
    found = [folder for folder in folders if (folder / "lib").is_dir()]
    if found and not any(os.environ.get(name) for name in WHERE):
        os.environ[WHERE[0]] = str(found[0])


def older_cudnn() -> str | None:
    """Return one line where torch has an older cuDNN than it was built for."""
    import torch

    try:
        torch.backends.cudnn.version()
    except RuntimeError:  # in torch's own words, of five lines
        return (
            "torch runs with an older cuDNN than the one it was built for, which may make its attention on Hopper"
            " slower; remove the older cuDNN's folder from LD_LIBRARY_PATH, or show torch's own: CUDNN_HOME=FOLDER"
        )
    return None
