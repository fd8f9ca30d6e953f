"""Unmodified megatron on a machine without a CUDA device.

Megatron names ``torch.cuda`` and ``device="cuda"`` throughout. Where no CUDA device exists, ``install()`` maps those
calls to their CPU meaning inside this process; with a device it does nothing. It must run before megatron is imported.
``install_after_import()`` covers the two spots where megatron reaches for the CUDA generator by another way.
"""

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Iterator

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "empty_like", "zeros_like")


def needed() -> bool:
    return not _really_available()


_really_available = torch.cuda.is_available


class _TypeName(str):
    """``torch.FloatTensor`` and ``torch.cuda.FloatTensor`` compare equal: the optimizer sorts by that name."""

    def _bare(self, other):
        return str(other).replace("cuda.", "")

    def __eq__(self, other):
        return isinstance(other, str) and self._bare(self) == self._bare(other)

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


class _Stream:
    """Stands for a CUDA stream: every method exists and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _constant(value):
    """A fresh function each time: dynamo's rule table rejects one object under two names."""
    return lambda *args, **kwargs: value


def _asked_by_initialize_megatron() -> bool:
    """``initialize_megatron`` asserts a CUDA device and counts them; everybody else hears the truth."""
    return sys._getframe(2).f_globals.get("__name__") == "megatron.training.initialize"


def _properties(*_):
    return types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1, uuid="cpu", gcnArchName="cpu"
    )


def install() -> bool:
    """Returns whether anything was patched (False on a machine with CUDA, or when already done)."""
    if not needed() or getattr(torch.cuda, "_hylo_cpu", False):
        return False
    cuda = torch.cuda
    cuda._hylo_cpu = True
    torch._dynamo.config.disable = True
    cuda.is_available = lambda: _asked_by_initialize_megatron()
    cuda.device_count = lambda: int(_asked_by_initialize_megatron())
    cuda.current_device = _constant(_CPU)
    cuda.Stream = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_device_properties = _properties
    cuda.get_device_capability = _constant((0, 0))
    cuda.get_device_name = _constant("cpu")
    cuda.memory_stats = lambda *args, **kwargs: {}
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "ipc_collect"):
        setattr(cuda, name, _constant(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _constant(0))
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would recurse
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # `with torch.device(...)` recognises factories by identity: let it remember the originals before they are wrapped,
    # or transformers' from_pretrained builds its model on the wrong device and keeps random weights, silently.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    tensor_type = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **kwargs: (
        tensor_type(self, *args, **kwargs) if args or kwargs else _TypeName(tensor_type(self))
    )
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda self: None)
    import torch.utils.data._utils.pin_memory as pinning

    pinning.pin_memory = lambda data, device=None: data
    return True


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, megatron's ``jit_fuser`` becomes no compiler.

    With dynamo disabled ``torch.compile`` changes nothing, and its first call imports Inductor, which is a third of
    what a training imports.
    """
    compiler = torch.compile
    if needed():
        torch.compile = lambda model=None, **_: model if model is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = compiler


def install_after_import() -> None:
    """Points megatron's RNG tracker at the CPU generator."""
    import megatron.core.tensor_parallel.random as rng

    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
