"""Unmodified megatron-core on a machine without a CUDA device: calls of ``torch.cuda`` get their meaning on a CPU.

Megatron-core names ``torch.cuda`` and ``device="cuda"`` throughout. None of these entries is needed where torch finds
a CUDA device.
"""

import contextlib
import functools
import sys
import types
from functools import partial

import torch

from hylo_megatron.engine.patch import Patch, instead

_CPU = torch.device("cpu")
_is_available = torch.cuda.is_available
# Modules that insist on a device and count the devices. All other modules hear that there is none.
_COUNTING = ("megatron.training.initialize", "megatron.core.dist_checkpointing.strategies.async_utils")


def without_cuda() -> bool:
    """Whether torch finds no CUDA device, whatever has been replaced since."""
    return not _is_available()


# ---- replacements: each gets the original and returns what takes its place ----


class _TypeName(str):
    """Make ``torch.FloatTensor`` and ``torch.cuda.FloatTensor`` equal: the optimizer sorts by that name."""

    def _bare(self, other):
        return str(other).replace("cuda.", "")

    def __eq__(self, other):
        return isinstance(other, str) and self._bare(self) == self._bare(other)

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__


class _Stream:
    """A CUDA stream whose methods all exist and do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _on_cpu(factory, run):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    # `with torch.device(...)` recognises factories by identity: let it remember the originals before they are wrapped,
    # or transformers' from_pretrained builds its model on the wrong device and keeps random weights, silently.
    torch.utils._device._device_constructors()
    return call


def _constant(value):
    """Return a replacement that makes a new function each time: dynamo rejects one object under two names."""
    return lambda original, run: lambda *args, **kwargs: value


def _asked_by_a_counting_module() -> bool:
    return sys._getframe(2).f_globals.get("__name__") in _COUNTING


def _properties(*_):
    return types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1, uuid="cpu", gcnArchName="cpu"
    )


def _type_name(tensor_type, run):
    return lambda self, *args, **kwargs: (
        tensor_type(self, *args, **kwargs) if args or kwargs else _TypeName(tensor_type(self))
    )


def _returns_self(original, run):
    return lambda self, *args, **kwargs: self


# ---- entries ----

_torch = partial(Patch, group="cpu", package="torch", versions=">=2.11", needed=without_cuda)


def _cuda(name: str, expects: str, replacement, why: str = "called without a device in sight") -> Patch:
    return _torch(target=f"torch.cuda:{name}", expects=expects, replacement=replacement, why=why)


_NOTHING = {
    "synchronize": "(device)",
    "empty_cache": "()",
    "set_device": "(device)",
    "reset_peak_memory_stats": "(device)",
    "ipc_collect": "()",
}
_ZERO = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
_FACTORIES = {
    "tensor": "builtin",
    "zeros": "builtin",
    "ones": "builtin",
    "empty": "builtin",
    "full": "builtin",
    "rand": "builtin",
    "randn": "builtin",
    "arange": "builtin",
    "empty_like": "builtin",
    "zeros_like": "builtin",
}

PATCHES = (
    _torch(
        target="torch._dynamo.config:disable",
        replacement=instead(True),
        why="functions that megatron-core compiles would be compiled for the CPU, for minutes",
        expects="bool",
    ),
    _cuda("is_available", "()", lambda original, run: lambda: _asked_by_a_counting_module(),
          "initialize_megatron asserts a device; torch and transformers must hear the truth"),
    _cuda("device_count", "()", lambda original, run: lambda: int(_asked_by_a_counting_module()),
          "initialize_megatron and the writer of checkpoints (async_utils.py:565) divide by it"),
    _cuda("current_device", "()", _constant(_CPU), "the device of most tensors that megatron-core makes"),
    _cuda("Stream", "class", instead(_Stream)),
    _cuda("current_stream", "(device)", lambda original, run: lambda *args, **kwargs: _Stream()),
    _cuda("stream", "(stream)", lambda original, run: lambda *args, **kwargs: contextlib.nullcontext()),
    _cuda("get_device_properties", "(device)", instead(_properties)),
    _cuda("get_device_capability", "(device)", _constant((0, 0))),
    _cuda("get_device_name", "(device)", _constant("cpu")),
    _cuda("memory_stats", "(device)", lambda original, run: lambda *args, **kwargs: {}),
    *(_cuda(name, expects, _constant(None)) for name, expects in _NOTHING.items()),
    *(_cuda(name, "(device)", _constant(0)) for name in _ZERO),
    _cuda("manual_seed", "(seed)",  # torch.manual_seed would call this one again
          lambda original, run: lambda seed: torch.default_generator.manual_seed(int(seed))),
    _cuda("get_rng_state", "(device)", lambda original, run: lambda device=None: torch.get_rng_state()),
    _cuda("set_rng_state", "(new_state, device)",
          lambda original, run: lambda state, device=None: torch.set_rng_state(state)),
    *(
        _torch(target=f"torch:{name}", expects=expects, replacement=_on_cpu,
               why='megatron-core makes tensors with device="cuda" and pins memory')
        for name, expects in _FACTORIES.items()
    ),
    _torch(target="torch:Tensor.cuda", expects="builtin", replacement=_returns_self, why="moves to the device"),
    _torch(target="torch.nn:Module.cuda", expects="(self, device)", replacement=_returns_self,
           why="moves to the device"),
    _torch(target="torch:Tensor.type", expects="builtin", replacement=_type_name,
           why="megatron-core's optimizers sort parameters by names such as torch.cuda.FloatTensor"),
    *(
        _torch(target=f"torch.optim:Optimizer.{name}", expects="(self)", replacement=_constant(None),
               why="asks for the CUDA generator at each step")
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    ),
    _torch(target="torch.utils.data._utils.pin_memory:pin_memory", expects="(data, device)",
           replacement=instead(lambda data, device=None: data), why="loaders of megatron-core pin their batches"),
)  # fmt: skip
