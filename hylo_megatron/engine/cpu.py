"""Unmodified megatron-core on a machine without a CUDA device: calls of ``torch.cuda`` get their meaning on a CPU.

Megatron-core names ``torch.cuda`` and ``device="cuda"`` throughout. None of these entries is needed where torch finds
a CUDA device.
"""

import contextlib
import functools
import sys
import types

import torch

from hylo_megatron.engine.patch import entries, instead

_CPU = torch.device("cpu")
_is_available = torch.cuda.is_available
# Modules that insist on a device and count the devices. All other modules hear that there is none.
_COUNTING = ("megatron.training.initialize", "megatron.core.dist_checkpointing.strategies.async_utils")


def without_cuda() -> bool:
    """Return whether torch finds no CUDA device, whatever has been replaced since."""
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

_CALLED = "called without a device in sight"
_CUDA = (
    ("is_available", "()", lambda original, run: lambda: _asked_by_a_counting_module(),
     "initialize_megatron asserts a device; torch and transformers must hear the truth"),
    ("device_count", "()", lambda original, run: lambda: int(_asked_by_a_counting_module()),
     "initialize_megatron and the writer of checkpoints (async_utils.py:565) divide by it"),
    ("current_device", "()", _constant(_CPU), "the device of most tensors that megatron-core makes"),
    ("Stream", "class", instead(_Stream), _CALLED),
    ("current_stream", "(device)", lambda original, run: lambda *args, **kwargs: _Stream(), _CALLED),
    ("stream", "(stream)", lambda original, run: lambda *args, **kwargs: contextlib.nullcontext(), _CALLED),
    ("get_device_properties", "(device)", instead(_properties), _CALLED),
    ("get_device_capability", "(device)", _constant((0, 0)), _CALLED),
    ("get_device_name", "(device)", _constant("cpu"), _CALLED),
    ("memory_stats", "(device)", lambda original, run: lambda *args, **kwargs: {}, _CALLED),
    *((name, "()", _constant(None), _CALLED) for name in ("empty_cache", "ipc_collect")),
    *((name, "(device)", _constant(None), _CALLED)
      for name in ("synchronize", "set_device", "reset_peak_memory_stats")),
    *((name, "(device)", _constant(0), _CALLED)
      for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")),
    ("manual_seed", "(seed)",  # torch.manual_seed would call this one again
     lambda original, run: lambda seed: torch.default_generator.manual_seed(int(seed)), _CALLED),
    ("get_rng_state", "(device)", lambda original, run: lambda device=None: torch.get_rng_state(), _CALLED),
    ("set_rng_state", "(new_state, device)",
     lambda original, run: lambda state, device=None: torch.set_rng_state(state), _CALLED),
)  # fmt: skip
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "arange", "empty_like", "zeros_like")
_RANDOM = "megatron.core.tensor_parallel.random"
_GENERATOR = "megatron-core reads and sets the generator of the CUDA device"

PATCHES = (
    *entries(
        "cpu", "torch",
        ("torch._dynamo.config:disable", instead(True), "bool",
         "functions that megatron-core compiles would be compiled for the CPU, for minutes"),
        *((f"torch.cuda:{name}", replacement, expects, why) for name, expects, replacement, why in _CUDA),
        *((f"torch:{name}", _on_cpu, "builtin", 'megatron-core makes tensors with device="cuda" and pins memory')
          for name in _FACTORIES),
        ("torch:Tensor.cuda", _returns_self, "builtin", "moves to the device"),
        ("torch.nn:Module.cuda", _returns_self, "(self, device)", "moves to the device"),
        ("torch:Tensor.type", _type_name, "builtin",
         "megatron-core's optimizers sort parameters by names such as torch.cuda.FloatTensor"),
        *((f"torch.optim:Optimizer.{name}", _constant(None), expects, "asks for the CUDA generator at each step")
          for name, expects in (("_accelerator_graph_capture_health_check", "(self)"),
                                ("_cuda_graph_capture_health_check", "(self) or missing"))),  # not in torch 2.11
        ("torch.utils.data._utils.pin_memory:pin_memory", instead(lambda data, device=None: data), "(data, device)",
         "loaders of megatron-core pin their batches"),
        needed=without_cuda,
    ),
    *entries(
        "megatron", "megatron-core",
        (f"{_RANDOM}:_get_cuda_rng_state",
         instead(lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()),
         "(device, clone, graph_safe)", _GENERATOR),
        (f"{_RANDOM}:_set_cuda_rng_state",
         instead(lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
         "(new_state, device, graph_safe)", _GENERATOR),
        needed=without_cuda,
    ),
)  # fmt: skip
