"""Attention over what all ranks hold, against one process, and what travels: torchrun --nproc-per-node N this_file.py

Rank 0 prints a JSON line for each case of ``CASES``, over latents and over keys that heads share: largest relative
error, and values that a rank passes on round the ring.
"""

import json
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from hylo_megatron.config import decisions
from hylo_megatron.engine.register import install
from hylo_megatron.kernels import choose
from hylo_megatron.mixers.megatron_attention import CoreAttention
from hylo_megatron.parallel.attention import Shared, attention_across_ranks
from hylo_megatron.parallel.zigzag import zigzag_positions

LOCAL, B, H, K, V, R, P, SCALE = 32, 2, 3, 24, 16, 20, 8, 0.3
SHARED = 2  # query heads of a key head
CASES = {  # name: --cp-comm-type, bytes that may be gathered at one time
    "ring": ("p2p", decisions.GATHERED),
    "gather": ("all_gather", decisions.GATHERED),
    "gather, a rank at a time": ("all_gather", 1),
    "auto": ("auto", decisions.GATHERED),
    "auto, large": ("auto", 1),
}


def expand_with(weight):
    def expand(latents, rank, keys):
        kv = F.linear(latents[..., :R], weight).unflatten(-1, (H, K - P + V))
        k = torch.cat([kv[..., : K - P], latents[..., R:].unsqueeze(2).expand(-1, -1, H, -1)], -1)
        return k.permute(1, 2, 0, 3), kv[..., K - P :].permute(1, 2, 0, 3)

    return expand


def error(got, want) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def shared_heads(group, cp_comm_type=None) -> CoreAttention:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    return CoreAttention(config, 1, softmax_scale=SCALE, pg_collection=SimpleNamespace(cp=group),
                         cp_comm_type=cp_comm_type)  # fmt: skip


def say(errors: list[float], **more) -> None:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    if dist.get_rank() == 0:
        print(json.dumps({"error": max(map(max, everyone)), **more}), flush=True)


def unweighted(out, lse, part, part_lse) -> None:
    """Join blocks as if their denominators were equal."""
    out.add_(part).div_(2)


def cases():
    """Yield each case's name and --cp-comm-type, with its limit set."""
    for name, (mode, limit) in CASES.items():
        decisions.GATHERED = limit
        yield name, mode
    decisions.GATHERED = CASES["ring"][1]


def main() -> None:
    sent, phase, send = {}, "", dist.batch_isend_irecv

    def count(operations):
        sent[phase] += sum(op.tensor.numel() for op in operations if op.op is dist.isend)
        return send(operations)

    dist.batch_isend_irecv = count
    install("megatron")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    q, latents = torch.randn(LOCAL * size, B, H, K), torch.randn(LOCAL * size, B, R + P)
    weight, d_out = torch.randn(H * (K - P + V), R) / R**0.5, torch.randn(LOCAL * size, B, H, V)
    whole = [x.clone().requires_grad_() for x in (q, latents, weight)]
    keys, values = expand_with(whole[2])(whole[1], 0, slice(None))
    want = F.scaled_dot_product_attention(whole[0].permute(1, 2, 0, 3), keys, values, is_causal=True, scale=SCALE)
    d_want = torch.autograd.grad((want.permute(2, 0, 1, 3) * d_out).sum(), whole)
    here = zigzag_positions(LOCAL, size, rank)

    def share(weight, mode) -> Shared:
        return Shared(group=dist.group.WORLD, scale=SCALE, expand=expand_with(weight), values=H * (K + V),
                      parameters=(weight,), mode=mode)  # fmt: skip

    for case, mode in cases():
        sent.update(forward=0, backward=0)
        phase = "forward"
        mine = [x.clone().requires_grad_() for x in (q[here], latents[here], weight)]
        out = attention_across_ranks(mine[0].permute(1, 2, 0, 3), mine[1], share(mine[2], mode))
        phase = "backward"
        d_q, d_latents, d_weight = torch.autograd.grad((out.permute(2, 0, 1, 3) * d_out[here]).sum(), mine)
        dist.all_reduce(d_weight)
        errors = [error(out, want[:, :, here]), error(d_q, d_want[0][here]), error(d_latents, d_want[1][here]),
                  error(d_weight, d_want[2])]  # fmt: skip
        say(errors, over="latents", case=case, **sent)
    ops, choose.TORCH = choose.TORCH, choose.Ops("unweighted", join_attention=unweighted)
    out = attention_across_ranks(q[here].permute(1, 2, 0, 3), latents[here], share(weight, "auto"))
    say([error(out, want[:, :, here])], over="latents", case="unweighted")
    choose.TORCH = ops
    parts = [torch.randn(LOCAL * size, B, n, width) for n, width in ((SHARED * H, K), (H, K), (H, V))]
    d_out = torch.randn(LOCAL * size, B, SHARED * H * V)
    whole = [x.clone().requires_grad_() for x in parts]
    want = shared_heads(SimpleNamespace(size=lambda: 1))(*whole)
    d_want = torch.autograd.grad((want * d_out).sum(), whole)
    for case, mode in cases():
        sent.update(forward=0, backward=0)
        phase = "forward"
        mine = [x[here].clone().requires_grad_() for x in parts]
        out = shared_heads(dist.group.WORLD, mode)(*mine)
        phase = "backward"
        d_mine = torch.autograd.grad((out * d_out[here]).sum(), mine)
        errors = [error(out, want[here]), *(error(d, w[here]) for d, w in zip(d_mine, d_want, strict=True))]
        say(errors, over="keys and values", case=case, **sent)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
