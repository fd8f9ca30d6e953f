"""Weights and optimizer states that wait in the host's memory while the GPU needs its own for something else.

A tensor that is away stays the same object, on its device, but its storage is empty. Copies run on the stream of the
computation: they cost the time of the bytes over PCIe, and no kernel can meet a half-copied tensor.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class Away:
    """Tensors that can be away, each with a copy of its own in pinned memory of the host.

    ``constant``: the tensors never change, so that the copies are made once. A view of another tensor stays.
    """

    def __init__(self, *, constant: bool):
        self.constant = constant
        self.copies: dict[Tensor, Tensor] = {}  # tensors are compared by identity

    @torch.no_grad()
    def put(self, tensors: Iterable[Tensor]) -> None:
        """Copy these tensors to the host and free their memory on the device."""
        tensors = [tensor for tensor in tensors if tensor.untyped_storage().nbytes() == tensor.nbytes]
        for tensor in tensors:
            known = tensor in self.copies
            if not known:
                self.copies[tensor] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
                )
            if not (known and self.constant):
                self.copies[tensor].copy_(tensor, non_blocking=True)
        for tensor in tensors:  # the allocator hands the memory to later work of this stream only
            tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> None:
        """Copy these tensors back to the device, if they are away."""
        for tensor in tensors:
            if not tensor.untyped_storage().nbytes():
                tensor.untyped_storage().resize_(tensor.nbytes)
                tensor.copy_(self.copies[tensor], non_blocking=True)

    def forget_all_but(self, tensors: Iterable[Tensor]) -> None:
        self.copies = {tensor: self.copies[tensor] for tensor in tensors if tensor in self.copies}


def stream_layers(model: nn.Module) -> None:
    """Let each layer of a frozen model be on the device only while it computes.

    The final norm and the head stay, and so does an embedding that is the head too.
    """
    modules = list(model.decoder.layers)
    if hasattr(model, "embedding") and not model.share_embeddings_and_output_weights:
        modules.append(model.embedding)
    away = Away(constant=True)
    for module in modules:
        weights = list(module.parameters())
        if any(weight.requires_grad for weight in weights):
            raise ValueError("a layer that is trained cannot be away: its optimizer writes to it")
        away.put(weights)
        module.register_forward_pre_hook(lambda *_, weights=weights: away.take(weights))
        module.register_forward_hook(lambda *_, weights=weights: away.put(weights))


def optimizer_tensors(optimizer) -> Iterator[Tensor]:
    """Yield the moments and the fp32 main copies of megatron-core's distributed optimizer.

    A main copy of an fp32 parameter is that parameter, and stays.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())
        for group in part.shard_fp32_from_float16_groups:
            yield from (main for main in group if main is not None)


class OptimizerAway:
    """Keeps an optimizer's states on the host from the start of a step until ``optimizer.step``."""

    def __init__(self):
        self.away = Away(constant=False)

    @contextlib.contextmanager
    def during_passes(self, optimizer) -> Iterator[None]:
        """Surround a step: forward and backward passes run without the states, the update with them."""
        tensors = list(optimizer_tensors(optimizer))
        self.away.forget_all_but(tensors)  # loading a checkpoint makes new ones
        self.away.put(tensors)
        update = optimizer.step

        def step():
            self.away.take(optimizer_tensors(optimizer))
            return update()

        optimizer.step = step
        try:
            yield
        finally:
            del optimizer.step
            self.away.take(optimizer_tensors(optimizer))
