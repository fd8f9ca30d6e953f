"""Run each mixer once on ranks that share a sequence, and print what it sends beside what the formulas say.

Under torchrun. A JSON line for each mixer and data type: bytes that went to torch.distributed, forward and backward,
as the mean of all ranks.
"""

import json
from collections.abc import Callable

from helpers.cp_bytes import FORMULAS, Model, Window, sent

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry


def counter():
    """Return a context that adds up, as ``.bytes``, what this process hands to collectives."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    size = torch.distributed.get_world_size()

    def own(x) -> float:
        return x.numel() * x.element_size()

    def all_to_all(out, x, group, received, sent, *_) -> float:
        away = sum(sent) - sent[torch.distributed.get_rank()] if sent else len(x) * (size - 1) // size
        return own(x) // len(x) * away

    # bytes that leave this rank, of the operation's arguments
    outgoing: dict[str, Callable] = {
        "_allgather_base_": lambda out, x, *_: (size - 1) * own(x),
        "_reduce_scatter_base_": lambda out, x, *_: (size - 1) * own(x) // size,
        "alltoall_base_": all_to_all,
        "send": lambda tensors, *_: sum(map(own, tensors)),
        "recv_": lambda *_: 0,
    }

    class Counter(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                self.bytes += outgoing[func._opname](*args)
            return func(*args, **(kwargs or {}))

    return Counter()


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
    model = Model(geometry, Window(**tiny.WINDOW, groups=2, width=16))
    for choice in FORMULAS:
        for dtype in (torch.float32, torch.bfloat16):
            mixer = make(choice, geometry, dtype, groups)
            hidden = torch.randn(tokens, batch, tiny.HIDDEN, dtype=dtype).requires_grad_()
            with counter() as forward:
                out, _ = mixer(hidden, None)
            with counter() as backward:
                out.sum().backward()
            everyone = torch.tensor([forward.bytes, backward.bytes])
            dist.all_reduce(everyone)
            want = sent(choice, model, size, tokens * batch, batch, dtype.itemsize)
            mean = [total / size for total in everyone.tolist()]
            line = {"choice": choice, "dtype": str(dtype), "sent": mean, "formula": want}
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
