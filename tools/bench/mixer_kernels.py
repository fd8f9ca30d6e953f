"""Time each kernel of a training step, forward and backward, and compare with its floor and with the torch reference.

    python tools/bench/mixer_kernels.py [--tokens 32768 --length 2048] [--model SmolLM2|Llama-3.2-3B]

The floor is the bytes of inputs, outputs and their gradients divided by the measured bandwidth of a copy. A kernel
far above its floor can be improved. Without a GPU it runs at the size of --tokens, in fp32, torch against torch.
"""

import argparse

import torch
import torch.nn.functional as F
from kl_loss import ours, random_inputs
from timing import copy_rate, seconds, this_device

from hylo_megatron.config import geometry_preset
from hylo_megatron.distill import kl_fused
from hylo_megatron.engine.product_rate import measured_rate
from hylo_megatron.flags import command_line
from hylo_megatron.kernels.choose import TORCH, Ops, ops

MODELS = {"SmolLM2": (576, 9, 64, 1536, 49152), "Llama-3.2-3B": (3072, 24, 128, 8192, 128256)}


def forward_backward(run, inputs: list[torch.Tensor]):
    """Return a call that computes ``run`` and all gradients, and the bytes that it has to move at least."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = run(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    weights = [torch.randn_like(out) for out in outs]
    moved = 2 * sum(x.numel() * x.element_size() for x in (*inputs, *outs))

    def call():
        torch.autograd.grad(run(*leaves), leaves, weights)

    return call, moved


def cases(model: str, rows: int, length: int, device: torch.device, dtype: torch.dtype):
    """Yield ``name, function of kernels, inputs`` with the heads and widths of ``model`` in native geometry."""
    hidden, heads, head_dim, ffn, _ = MODELS[model]
    geometry = geometry_preset("native", hidden, heads, head_dim)
    g, m = geometry.gdn, geometry.mamba2

    def random(*shape):
        return torch.randn(rows, length, *shape, device=device, dtype=dtype)

    keys, values = (g.num_key_heads, g.key_head_dim), (g.num_value_heads, g.value_head_dim)
    decay = -F.softplus(random(g.num_value_heads).float() - 2)
    channels = 2 * keys[0] * keys[1] + values[0] * values[1]
    sizes = (channels - values[0] * values[1], values[0] * values[1], values[0] * values[1], values[0], values[0])
    yield (
        "gated delta rule",
        lambda k: (
            lambda q, key, v, d, b: k.chunk_gated_delta_rule(q, key, v, g=d, beta=b, use_qk_l2norm_in_kernel=True)[0]
        ),
        [random(*keys), random(*keys), random(*values), decay, random(values[0]).sigmoid()],
    )
    steps, A = F.softplus(random(m.num_heads).float() - 2), -torch.linspace(0.5, 2, m.num_heads, device=device)
    yield (
        "state-space scan",
        lambda k: lambda x, dt, b, c: k.chunk_ssd(x, dt, A, b, c)[0],
        [random(m.num_heads, m.head_dim), steps, *(random(m.num_groups, m.state_size) for _ in "bc")],
    )
    yield (
        "projection, convolved",
        lambda k: lambda x, w: k.split_convolve(x.transpose(0, 1), w, None, sizes),
        [random(-(-sum(sizes) // 16) * 16).transpose(0, 1).contiguous(),
         torch.randn(channels, g.conv_kernel, device=device, dtype=dtype)],
    )  # fmt: skip
    yield (
        "gated norm",
        lambda k: lambda x, z, w: k.gated_rms_norm(x, z, w, 1e-5),
        [random(*values), random(*values), torch.ones(values[1], device=device, dtype=dtype)],
    )
    yield "SwiGLU", lambda k: k.swiglu_packed, [random(2 * ffn)]
    weight = torch.ones(hidden, device=device, dtype=dtype)
    yield "RMSNorm", lambda k: lambda x, w: k.rms_norm(x, w, 1e-5), [random(hidden), weight]
    target, angles = random(hidden), torch.rand(rows, head_dim // 2, device=device)
    yield "distance", lambda k: lambda x: k.distance(x, target), [random(hidden)]
    yield "rotary", lambda k: lambda x: k.rotate(x, angles.cos(), angles.sin()), [random(heads, head_dim)]


def loss_case(model: str, tokens: int, device: torch.device):
    """Return the KL of hidden states with its gradients, and its FLOPs: two heads forward, two products backward."""
    hidden, _, _, _, vocabulary = MODELS[model]
    inputs, loss = random_inputs(tokens, vocabulary, (hidden, hidden), device), ours(4096)
    return lambda: torch.autograd.grad(loss(*inputs), inputs[:2]), 8 * tokens * vocabulary * hidden


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2", choices=MODELS)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    device = this_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth, rate = copy_rate(device), measured_rate(device)
    fused: Ops = ops(device, dtype)
    size = f"{options.tokens} tokens of {options.length}"
    print(f"{options.model}, {size}, {device.type}, copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'forward and backward':22}{fused.name + ', ms':>10}{'torch, ms':>11}{'ratio':>8}{'floor, ms':>11}")
    for name, of, inputs in cases(options.model, options.tokens // options.length, options.length, device, dtype):
        call, moved = forward_backward(of(fused), inputs)
        ours, reference = seconds(call, device), seconds(forward_backward(of(TORCH), inputs)[0], device, 3)
        floor = moved / bandwidth
        figures = f"{ours * 1e3:10.2f}{reference * 1e3:11.2f}{reference / ours:8.1f}{floor * 1e3:11.2f}"
        print(f"{name:22}{figures}", flush=True)
    call, flops = loss_case(options.model, options.tokens, device)
    ours, fits = seconds(call, device), kl_fused.fits
    kl_fused.fits = lambda *_: False
    reference = seconds(call, device, 3)
    kl_fused.fits = fits
    figures = f"{ours * 1e3:10.2f}{reference * 1e3:11.2f}{reference / ours:8.1f}{flops / rate * 1e3:11.2f}"
    print(f"{'hidden-state KL':22}{figures}   (floor: products at {rate / 1e12:.1f} TFLOP/s)")


if __name__ == "__main__":
    main()
