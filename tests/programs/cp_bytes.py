"""Run each mixer once on ranks that share a sequence, and print what it sends beside what the formulas say.

Under torchrun, in bf16. A JSON line for each mixer: bytes that went to torch.distributed, forward and backward, as the
mean of all ranks.
"""

import json
from contextlib import contextmanager

from helpers.cp_bytes import FORMULAS, sent

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry


@contextmanager
def counted():
    """Yield what counts the bytes that this process sends in the block, as a profile of steps does."""
    from hylo_megatron.engine.register import install, uninstall
    from hylo_megatron.engine.sent_bytes import Sent

    sent = Sent()
    install("counting", sent)
    try:
        yield sent
    finally:
        uninstall("counting")


def make(choice: str, geometry: Geometry, dtype, groups):
    from helpers import tiny
    from megatron.core.transformer.spec_utils import build_module

    from hylo_megatron.layers import specs
    from hylo_megatron.layers.load import layout_config
    from hylo_megatron.mixers import MIXERS
    from hylo_megatron.mixers.megatron_window import window_of

    def layer(kind: str, linear_cp: str = "auto"):
        return MIXERS[kind].part("megatron_module").layer_spec(specs.backend("local"), arch, linear_cp).submodules

    kind, way = choice.split(", ")
    window = tiny.WINDOW if kind == "window" else None
    arch = tiny.hybrid("mamba2" if kind == "Mamba-2" else "gdn", geometry=geometry, window=window)
    common = dict(config=layout_config(arch, dtype), layer_number=1, pg_collection=groups)
    if kind == "window":
        module = window_of(arch, specs.backend("local"))(**common)
        return lambda hidden, _: (module(hidden), None)
    if kind == "MLA":
        comm = {"all-gather": "all_gather", "ring": "p2p"}[way]
        return build_module(layer("mla").self_attention, **common, cp_comm_type=comm)
    linear_cp = {"all-to-all": "a2a", "states": "states"}[way]
    if kind == "GDN":
        return build_module(layer("gdn", linear_cp).self_attention, **common)
    return build_module(layer("mamba2", linear_cp).mixer, **common, d_model=arch.hidden_size)


def main() -> None:
    import torch
    import torch.distributed as dist
    from helpers import tiny
    from megatron.core.process_groups_config import ProcessGroupCollection

    from hylo_megatron.engine.register import install
    from hylo_megatron.layers.load import start_process_groups

    install("megatron")
    dist.init_process_group("gloo")
    size, tokens, batch = dist.get_world_size(), 20, 2
    start_process_groups(cp=size)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    geometry = Geometry(tiny.GEOMETRY.mla, GDNGeometry(4, 8, 8, 12), Mamba2Geometry(8, 8, 12, 4))
    arch = tiny.hybrid(geometry=geometry, window=tiny.WINDOW)
    for choice in FORMULAS:
        mixer = make(choice, geometry, torch.bfloat16, groups)
        hidden = torch.randn(tokens, batch, tiny.HIDDEN, dtype=torch.bfloat16).requires_grad_()
        with counted() as forward:
            out, _ = mixer(hidden, None)
        with counted() as backward:
            out.sum().backward()
        everyone = torch.tensor([sum(each.bytes.values()) for each in (forward, backward)])
        dist.all_reduce(everyone)
        want = sent(choice, arch, size, tokens * batch, batch)
        line = {"choice": choice, "sent": (everyone / size).tolist(), "formula": [want.forward, want.backward]}
        if dist.get_rank() == 0:
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
