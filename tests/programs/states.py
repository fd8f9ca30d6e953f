"""Linear blocks that pass states between ranks, against one process: torchrun --nproc-per-node N this_file.py

Rank 0 prints one JSON line a case: largest relative errors of the output, of the input's gradient and of the
parameters', against the recurrence token by token over the whole sequence in fp64.
"""

import json
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from helpers import tiny
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from hylo_megatron.config import GDNGeometry, Mamba2Geometry
from hylo_megatron.engine.register import install
from hylo_megatron.kernels import (
    Ops,
    mamba_split_conv1d_scan_combined,
    recurrent_gated_delta_rule,
    recurrent_kda,
    recurrent_ssd,
)
from hylo_megatron.layers import specs
from hylo_megatron.layers.load import layout_config, start_process_groups
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.parallel import state_passing
from hylo_megatron.parallel.zigzag import zigzag_positions

install("megatron")
B = 2


@dataclass
class Case:
    name: str
    kind: str  # gdn | mamba2 | kda
    heads: int  # key heads, or groups
    length: int  # of a rank
    dtype: torch.dtype = torch.float64
    drop: str = ""  # what is not exchanged
    segment: int | None = None  # positions of a chunk that the recurrence reads at once


GDN3, M2, KDA3 = ("gdn", 3), ("mamba2", 3), ("kda", 3)  # heads that do not divide by the ranks
CASES = [
    Case("gdn", *GDN3, 70), Case("gdn dividing", "gdn", 4, 40), Case("gdn fp32", *GDN3, 70, torch.float32),
    Case("gdn bf16", *GDN3, 70, torch.bfloat16), Case("gdn short", *GDN3, 6),
    Case("gdn segments", *GDN3, 70, segment=16),
    Case("gdn no states", *GDN3, 40, drop="states"), Case("gdn no halo", *GDN3, 40, drop="halo"),
    Case("gdn no gradient of states", *GDN3, 40, drop="d_states"),
    Case("gdn no gradient of halo", *GDN3, 40, drop="d_halo"),
    Case("mamba2", *M2, 70), Case("mamba2 dividing", "mamba2", 4, 40), Case("mamba2 fp32", *M2, 70, torch.float32),
    Case("mamba2 bf16", *M2, 70, torch.bfloat16), Case("mamba2 short", *M2, 6),
    Case("mamba2 no states", *M2, 40, drop="states"), Case("mamba2 no halo", *M2, 40, drop="halo"),
    Case("mamba2 no gradient of states", *M2, 40, drop="d_states"),
    Case("mamba2 no gradient of halo", *M2, 40, drop="d_halo"),
    Case("kda", *KDA3, 70), Case("kda dividing", "kda", 4, 40), Case("kda fp32", *KDA3, 70, torch.float32),
    Case("kda bf16", *KDA3, 70, torch.bfloat16), Case("kda short", *KDA3, 6),
    Case("kda segments", *KDA3, 70, segment=16),
    Case("kda no states", *KDA3, 40, drop="states"),
    Case("kda no gradient of states", *KDA3, 40, drop="d_states"),
]  # fmt: skip


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, sizes, start: int = 0):
    inside = x[..., start : start + len(weight)].mT
    padded = torch.nn.functional.pad(inside, (weight.shape[1] - 1, 0))
    convolved = torch.nn.functional.silu(torch.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).mT
    return torch.cat([x[..., :start], convolved, x[..., start + len(weight) : sum(sizes)]], -1).split(sizes, -1)


def plain_ssd(x, dt, A, B, C, chunk_size, D, *_):
    return recurrent_ssd(x, dt, A, B, C, D)


def plain_kernels(_) -> Ops:
    """No chunks, and nothing by hand in backward."""
    recurrences = dict(chunk_gated_delta_rule=recurrent_gated_delta_rule, chunk_kda=recurrent_kda, chunk_ssd=plain_ssd)
    return Ops("plain", split_convolve=plain_conv, **recurrences)


def architecture(kind: str, heads: int):
    """Value heads share key heads, and heads share groups."""
    gdn, mamba2 = GDNGeometry(heads, 2 * heads, 8, 12), Mamba2Geometry(2 * heads, 8, 12, heads)
    return tiny.hybrid(kind, geometry=replace(tiny.GEOMETRY, gdn=gdn, mamba2=mamba2, kda=KDAGeometry(heads, 12)))


def make_mixer(kind: str, heads: int, groups, linear_cp: str, dtype=torch.float64):
    """A mixer with random parameters; A_log and its kin are fp64 too where ``dtype`` is."""
    arch = architecture(kind, heads)
    layer = MIXERS[kind].part("megatron_module").layer_spec(specs.backend("local"), arch, linear_cp).submodules
    spec = layer.mixer if kind == "mamba2" else layer.self_attention
    extra = {"d_model": arch.hidden_size} if kind == "mamba2" else {}
    mixer = build_module(spec, config=layout_config(arch), layer_number=1, pg_collection=groups, **extra).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in mixer.named_parameters():
        value = tiny.scatter(name, tuple(parameter.shape), generator)
        if name.endswith(("A_log", "dt_bias")):  # decays from hardly to strongly
            value = value - 3
        keep = torch.float32 if name in mixer.fp32_names and dtype != torch.float64 else dtype
        parameter.data = value.to(keep)
    return mixer


def plain_mixer(case: Case):
    """The same on one rank, token by token, with the same parameters in fp64."""
    groups = state_passing.without_context_parallelism(ProcessGroupCollection.use_mpu_process_groups())
    mixer = make_mixer(case.kind, case.heads, groups, "auto", case.dtype)
    for parameter in mixer.parameters():
        parameter.data = parameter.data.double()
    mixer.kernels, forward = plain_kernels, type(mixer).forward
    if case.kind == "mamba2":  # the engine's forward pass knows only its own kernels

        def forward(mixer, hidden):
            y = mamba_split_conv1d_scan_combined(
                mixer.in_proj(hidden)[0].transpose(0, 1), mixer.conv1d_weight.squeeze(1), mixer.conv1d_bias,
                mixer.dt_bias, -mixer.A_log.exp(), mixer.D, 64, headdim=mixer.headdim, ngroups=case.heads,
                kernels=plain_kernels,
            )  # fmt: skip
            return mixer.out_proj(mixer.norm(y.transpose(0, 1)))

    return mixer, forward


def gradients(mixer, forward, hidden: Tensor, d_out: Tensor) -> list[Tensor]:
    """``[out, d_hidden, d_parameters..]``, fp64."""
    hidden = hidden.clone().requires_grad_()
    out, _ = forward(mixer, hidden)
    found = torch.autograd.grad((out * d_out).sum(), [hidden, *mixer.parameters()])
    return [x.detach().double() for x in (out, *found)]


def dropping(what: str):
    """Classes of ``state_passing`` in which one exchange is left out."""
    starts, before = state_passing._Starts, state_passing._Before

    class Starts(starts):
        @staticmethod
        def forward(ctx, *inputs):
            return starts.forward(ctx, *inputs) * (what != "states")

        @staticmethod
        def backward(ctx, d_start):
            d_transfer, d_written, _ = starts.backward(ctx, d_start)
            return d_transfer * (what != "d_states"), d_written * (what != "d_states"), None

    class Before(before):
        @staticmethod
        def forward(ctx, *inputs):
            return before.forward(ctx, *inputs) * (what != "halo")

        @staticmethod
        def backward(ctx, d):
            return before.backward(ctx, d)[0] * (what != "d_halo"), None

    return Starts, Before


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def errors_of(mixer, found: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    names = ["output", "input", *(name for name, _ in mixer.named_parameters())]
    return {name: error(*pair) for name, *pair in zip(names, found, want, strict=True)}


def compare(case: Case) -> dict[str, dict[str, float]]:
    """Errors ``shared`` by the ranks, and of the same kernels on one process, ``alone``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(2)
    hidden, d_out = (torch.randn(case.length * size, B, tiny.HIDDEN).to(case.dtype) for _ in range(2))
    want = gradients(*plain_mixer(case), hidden.double(), d_out.double())
    groups, here = ProcessGroupCollection.use_mpu_process_groups(), zigzag_positions(case.length, size, rank)
    one = make_mixer(case.kind, case.heads, state_passing.without_context_parallelism(groups), "auto", case.dtype)
    alone = errors_of(one, gradients(one, type(one).forward, hidden, d_out), want)
    mixer = make_mixer(case.kind, case.heads, groups, "states", case.dtype)
    if case.segment:
        mixer.cut_recurrence(case.segment)
    kept = state_passing._Starts, state_passing._Before
    if case.drop:
        state_passing._Starts, state_passing._Before = dropping(case.drop)
    found = gradients(mixer, type(mixer).forward, hidden[here], d_out[here])
    state_passing._Starts, state_passing._Before = kept
    for part in found[2:]:
        dist.all_reduce(part)
    errors = errors_of(mixer, found, [want[0][here], want[1][here], *want[2:]])
    everyone = [None] * size
    dist.all_gather_object(everyone, errors)
    return {"shared": {name: max(errors[name] for errors in everyone) for name in errors}, "alone": alone}


def main() -> None:
    dist.init_process_group("gloo")
    start_process_groups(cp=dist.get_world_size())
    for case in CASES:
        errors = compare(case)
        if dist.get_rank() == 0:
            print(json.dumps({"case": case.name, **errors}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
