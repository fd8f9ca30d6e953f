"""Bytes of a teacher in FP8, and of what waits in the host's memory and comes back for a moment.

See ``layers/fp8.py`` and ``distill/host_memory.py``.
"""

from collections import defaultdict

from hylo_megatron.planner.weights import EMBEDDING

MLP = ("mlp", "post_attention_layernorm")  # parts of a layer's names that belong to its second sub-layer


def in_fp8(elements: dict[str, int]) -> dict[str, int]:
    """Return ``elements`` as if one of the layers' matrices took half an element; the scale of a row is left out."""
    matrices = {name for name in elements if name.startswith("model.layers.") and name.endswith("_proj.weight")}
    return {name: count // 2 if name in matrices else count for name, count in elements.items()}


def streamed_teacher(elements: dict[str, int], tied: bool) -> tuple[dict[str, int], int]:
    """Return the teacher's weights that stay on the device, and the bytes of the largest module that comes and goes.

    ``tied``: the embedding is the head too, and stays.
    """
    stay, modules = {}, defaultdict(int)
    for name, count in elements.items():
        if name.startswith("model.layers."):
            layer, part = name.split(".")[2:4]
            modules[layer, part in MLP] += 2 * count
        elif name == EMBEDDING and not tied:
            modules[name] += 2 * count
        else:
            stay[name] = count
    return stay, max(modules.values(), default=0)
