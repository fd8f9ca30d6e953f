"""Time the KL divergence of hidden states, forward and backward: ours, fla's, Liger's and plain torch, in one process.

    python tools/bench/kl_loss.py [--tokens 65536] [--vocabulary 128256] [--student 2048] [--teacher 4096]
    python tools/bench/kl_loss.py --tokens 64 --vocabulary 301 --student 16 --teacher 24      a toy size, for a CPU

Every implementation gets the same hidden states and heads, and returns the mean over tokens with the gradients of the
student's states and head. Prints time, share of the device's rate of products, floor (the four heads' products at that
rate), peak memory beside the inputs, and the ratio of times to ours. An implementation whose loss or gradient differs
from ours by more than 2 % is left out. Kernels of fla and Liger need a GPU. Writes JSON and a picture to ``--out``.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import card, seconds, synchronize, this_device
from torch import Tensor

from hylo_megatron import packages
from hylo_megatron.distill.head import HeadInputs
from hylo_megatron.distill.losses import KL
from hylo_megatron.engine.product_rate import measured_rate
from hylo_megatron.evaluate.plots import new_figure
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, size

CHUNKS = (4096, 2048, 1024)
TOLERANCE = 0.02  # bf16 logits of 128,256 words
OURS = "ours, chunk {}"

# h: the student's hidden states, t: the teacher's, each with its head
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(chunk: int) -> Loss:
    def loss(h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor) -> Tensor:
        tokens = len(h)
        inputs = HeadInputs(
            h_TD=h, head_ND=head, t_TC=t, teacher_head_NC=teacher_head, vocab_size=len(head),
            labels_T=torch.zeros(tokens, dtype=torch.long, device=h.device),
            mask_T=torch.ones(tokens, device=h.device), position_T=torch.arange(tokens, device=h.device),
        )  # fmt: skip
        return KL(chunk=chunk)(inputs)[0] / tokens

    return loss


def plain(h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor) -> Tensor:
    log_s, log_t = (F.linear(*pair).float().log_softmax(-1) for pair in ((h, head), (t, teacher_head)))
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def fla_loss() -> Loss:
    from fla.modules import FusedKLDivLoss

    module = FusedKLDivLoss()
    return lambda h, head, t, teacher_head: module(h, t, head, teacher_head)


def liger_fused() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.0)  # the forward KL
    return lambda h, head, t, teacher_head: module(h, head, t, teacher_head, None)


def liger_chunked() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def loss(h: Tensor, head: Tensor, t: Tensor, teacher_head: Tensor) -> Tensor:
        return module(h, head, t, teacher_head, torch.zeros(len(h), dtype=torch.long, device=h.device))

    return loss


def implementations(device: torch.device) -> dict[str, Loss]:
    """Return the installed implementations that run on ``device``, ours first."""
    found = {OURS.format(chunk): ours(chunk) for chunk in CHUNKS}
    others = {"fla": ("fla", fla_loss), "Liger, fused": ("liger_kernel", liger_fused),
              "Liger, chunked": ("liger_kernel", liger_chunked)}  # fmt: skip
    for name, (module, make) in others.items():
        if device.type != "cuda":
            print(f"{name}: needs a GPU")
        elif packages.spec(module) is None:
            print(f"{name}: {module} is not installed")
        else:
            found[name] = make()
    return found | {"torch, whole logits": plain}


def measure(loss: Loss, inputs: list[Tensor], device: torch.device) -> dict:
    """Return time, memory beside ``inputs``, loss, and the norm of the gradient by the student's states."""
    h, head = inputs[:2]

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(*inputs)
        return value.detach(), torch.autograd.grad(value, (h, head))

    value, gradients = call()
    found = {"loss": value.item(), "gradient_norms": [g.float().norm().item() for g in gradients]}
    del value, gradients
    synchronize(device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found["seconds"] = seconds(call, device, 5)
    if device.type == "cuda":
        found["extra_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    return found


def differs(found: dict, expected: dict) -> str:
    """Return what an implementation computes otherwise than ours, or nothing."""
    pairs = zip(
        [found["loss"], *found["gradient_norms"]], [expected["loss"], *expected["gradient_norms"]], strict=True
    )
    far = [(got, wanted) for got, wanted in pairs if abs(got - wanted) > TOLERANCE * abs(wanted)]
    return f"loss or norm of a gradient is {far[0][0]:.6g}, ours {far[0][1]:.6g}" if far else ""


def compare(inputs: list[Tensor], device: torch.device) -> dict[str, dict]:
    """Return what each implementation took. Others than ours that fail, or compute something else, are left out."""
    results: dict[str, dict] = {}
    for name, loss in implementations(device).items():
        try:
            found = measure(loss, inputs, device)
        except Exception as error:  # other packages' kernels, and memory
            if name in map(OURS.format, CHUNKS):
                raise
            print(f"{name}: left out: {(str(error) or type(error).__name__).splitlines()[0]}")
            torch.cuda.empty_cache()
            continue
        if reason := differs(found, next(iter(results.values()), found)):
            print(f"{name}: left out: {reason}")
            continue
        results[name] = found
    return results


def random_inputs(tokens: int, vocabulary: int, widths: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Return hidden states and head of the student, which have gradients, and those of the teacher."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    student, teacher = (
        [torch.randn(rows, width, device=device, dtype=dtype) / scale for rows, scale in
         ((tokens, 1), (vocabulary, width**0.5))]
        for width in widths
    )  # fmt: skip
    return [*(x.requires_grad_() for x in student), *teacher]


def draw(results: dict[str, dict], floor: float, title: str, path: Path) -> None:
    figure = new_figure(6.5, 1.2 + 0.4 * len(results))
    axes = figure.subplots()
    axes.barh(list(results), [found["seconds"] * 1e3 for found in results.values()], color="#0072B2")
    axes.axvline(floor * 1e3, color="black", label="floor")
    axes.invert_yaxis()
    axes.set_xlabel("ms, forward and backward")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=size, default=65536)
    parser.add_argument("--vocabulary", type=size, default=128256)
    parser.add_argument("--student", type=size, default=2048, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=size, default=4096, help="width of the teacher's")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    device, tokens, rows = this_device(), options.tokens, options.vocabulary
    widths = options.student, options.teacher
    results = compare(random_inputs(tokens, rows, widths, device), device)
    rate = measured_rate(device)
    flops = 2 * tokens * rows * (3 * widths[0] + widths[1])
    floor, best = flops / rate, results[OURS.format(CHUNKS[0])]["seconds"]
    title = f"KL of {tokens:,} tokens, {rows:,} words, {widths[0]} and {widths[1]} wide, {card(device)}"
    print(f"{title}: floor {floor * 1e3:,.2f} ms (products at {rate / 1e12:.2f} TFLOP/s)")
    print(f"{'':22}{'ms':>10}{'of rate':>9}{'GiB':>7}{'ours is faster by':>19}")
    for name, found in results.items():
        memory, ratio = found.get("extra_gib", ""), found["seconds"] / best
        print(f"{name:22}{found['seconds'] * 1e3:10,.2f}{floor / found['seconds']:9.0%}{memory:>7}{ratio:18.2f}x")
    versions = {name: packages.version_of(name) for name in ("torch", "triton", "flash-linear-attention",
                                                              "liger-kernel")}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kl_loss-{tokens}x{rows}.json"
    write_json(path, {
        "name": title, "command": " ".join(["python", *sys.argv]), "device": card(device), "versions": versions,
        "product_rate": rate, "floor_seconds": floor, "results": results,
    })  # fmt: skip
    draw(results, floor, title, path.with_suffix(".png"))
    print(f"{path} and .png")


if __name__ == "__main__":
    main()
