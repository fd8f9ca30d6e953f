"""One cuDNN in a process, torch's own.

With an older one torch leaves cuDNN's attention on Hopper for a slower one without a word. TransformerEngine's library
names each of cuDNN's eight libraries, and the system's are loaded for them where it has cuDNN installed. Where those
were older, attention at 64K took 1.7 times as long. A library that is loaded already is not looked for again.
"""

import contextlib
import ctypes
import os
from pathlib import Path

from hylo_megatron.packages import has, spec

WHERE = ("CUDNN_HOME", "CUDNN_PATH")  # in the environment: where TransformerEngine looks first


def load_own_cudnn() -> None:
    """Load the cuDNN that came with torch for TransformerEngine, where that is installed. What the user has set stays.

    Call before megatron-core is imported, which imports TransformerEngine.
    """
    if not has("transformer-engine") or any(os.environ.get(name) for name in WHERE):
        return
    wheels = spec("nvidia")  # the folder of NVIDIA's libraries that torch is installed with
    folders = [Path(root, "cudnn") for root in (wheels.submodule_search_locations if wheels else ())]
    found = [folder for folder in folders if (folder / "lib").is_dir()]
    if not found:
        return
    os.environ[WHERE[0]] = str(found[0])
    for library in sorted((found[0] / "lib").glob("libcudnn*.so.*")):
        with contextlib.suppress(OSError):  # older_cudnn() says what is in use in the end
            ctypes.CDLL(str(library))


def older_cudnn() -> str | None:
    """Return one line where torch has an older cuDNN than it was built for."""
    import torch

    try:
        torch.backends.cudnn.version()
    except RuntimeError:  # in torch's own words, of five lines
        return (
            "torch runs with an older cuDNN than the one it was built for, which may make its attention on Hopper"
            " slower; put the folder of torch's own, nvidia/cudnn/lib beside torch, first in LD_LIBRARY_PATH, and"
            " unset CUDNN_HOME and CUDNN_PATH"
        )
    return None
