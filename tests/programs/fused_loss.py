"""Compare the fused chunk of the loss with the one in torch, and print "equal". Needs TRITON_INTERPRET=1."""

import torch
import triton  # noqa: F401
from helpers.kl import gradients, kl_inputs
from triton.runtime import interpreter  # noqa: F401

from hylo_megatron.distill import kl_fused
from hylo_megatron.distill.losses import KL


def main() -> None:
    kl_fused.BLOCK = 16  # several blocks a row
    settings = KL(kl_weight=0.8, ce_weight=0.2, chunk=7, teacher_length=9)  # rows with and without a teacher
    results = []
    for fits in (False, True):
        kl_fused.fits = lambda *_, fits=fits: fits
        x = kl_inputs(16, settings)
        loss = settings(x)
        results.append([*loss, *gradients(loss[0], x.h_TD, x.head_ND)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main()
