"""The base model beside the all-linear student, and the student with some of the base model's attention layers.

For the method ``window`` the student is the base model itself, whose layers see a window.
Legend: B batch, S sequence, D model.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.config.architecture import FILE_NAME
from hylo_megatron.config.positions import Window
from hylo_megatron.convert import megatron_to_hf
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import load
from hylo_megatron.mixers import LINEAR

_SAME = ("num_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")


class BaseAttention(nn.Module):
    """A base model's attention layer with the interface of the mixers of ``hf/modeling_hylo.py``."""

    def __init__(self, attention: nn.Module, rotary: nn.Module):
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, x_BSD: Tensor, *beside) -> Tensor:
        """``beside``: further arguments of hybrids' mixers, ignored, as rows have neither padding nor a cache."""
        positions_1S = torch.arange(x_BSD.shape[1], device=x_BSD.device).unsqueeze(0)
        turn = self.rotary(x_BSD, position_ids=positions_1S)
        return self.attention(x_BSD, position_embeddings=turn, attention_mask=None)[0]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The frozen base model, which is the teacher, and the all-linear student."""

    teacher: nn.Module
    student: nn.Module

    @property
    def num_layers(self) -> int:
        return len(self.student.model.layers)

    def attention(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Return the norm before the base model's attention layer, and the attention layer."""
        base = self.teacher.model.layers[layer]
        return base.input_layernorm, BaseAttention(base.self_attn, self.teacher.model.rotary_emb)

    def linear(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Return the norm before the student's mixer, and the mixer."""
        own = self.student.model.layers[layer]
        return own.input_layernorm, getattr(own, own.mixer_name)

    @contextlib.contextmanager
    def replaced(self, mixers: dict[int, tuple[nn.Module, nn.Module]]) -> Iterator[nn.Module]:
        """Yield the student with other norms and mixers at the layers that ``mixers`` names."""
        before = {layer: self.linear(layer) for layer in mixers}
        try:
            self._put(mixers)
            yield self.student
        finally:
            self._put(before)

    def _put(self, mixers: dict[int, tuple[nn.Module, nn.Module]]) -> None:
        for number, (norm, mixer) in mixers.items():
            layer = self.student.model.layers[number]
            layer.input_layernorm = norm
            setattr(layer, layer.mixer_name, mixer)

    def restored(self, layers: Iterable[int]) -> contextlib.AbstractContextManager[nn.Module]:
        """Return a context of the student with the base model's attention, and the norm before it, at ``layers``."""
        return self.replaced({layer: self.attention(layer) for layer in layers})


class WindowedAttention(nn.Module):
    """A base model's attention layer that sees the last tokens and the first ones alone."""

    def __init__(self, attention: nn.Module, window: Window):
        super().__init__()
        self.attention, self.window = attention, window

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **beside):
        at_S = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        back_SS = at_S[:, None] - at_S
        seen_SS = (back_SS >= 0) & ((back_SS < self.window["size"]) | (at_S < self.window["sinks"]))
        seen_11SS = seen_SS[None, None]
        if attention_mask is not None:  # of a layer with a sliding window of its own
            seen_11SS = seen_11SS & attention_mask
        return self.attention(hidden_states, attention_mask=seen_11SS, **beside)


@dataclass(frozen=True, kw_only=True)
class Windowed:
    """The frozen base model, which is the teacher, and with windows in its layers the student."""

    teacher: nn.Module
    window: Window

    @property
    def num_layers(self) -> int:
        return len(self.teacher.model.layers)

    @contextlib.contextmanager
    def restored(self, layers: Iterable[int]) -> Iterator[nn.Module]:
        """Yield the base model with windows in all layers but ``layers``."""
        restored = set(layers)
        others = [layer for number, layer in enumerate(self.teacher.model.layers) if number not in restored]
        for layer in others:
            layer.self_attn = WindowedAttention(layer.self_attn, self.window)
        try:
            yield self.teacher
        finally:
            for layer in others:
                layer.self_attn = layer.self_attn.attention


def hf_folder(path: Path, scratch: Path) -> Path:
    """Return ``path`` if it is a Hugging Face folder; export a Megatron checkpoint to ``scratch``."""
    if not (path / FILE_NAME).is_file():
        return path
    megatron_to_hf.convert(path, scratch)
    return scratch


def check_base(base: Architecture, teacher_at: Path) -> None:
    """Raise ``HyLoError`` if the model whose layers are chosen is a hybrid itself."""
    if base.is_hybrid:
        raise HyLoError(f"--teacher {teacher_at}: is a hybrid ({base.plan.name}), expected the model it came from")


def check_pair(base: Architecture, student: Architecture, teacher_at: Path, student_at: Path) -> None:
    """Raise ``HyLoError`` if the student is not an all-linear one of this base model."""
    if not all(kind in LINEAR for kind in student.plan):
        raise HyLoError(
            f"--student {student_at}: is {student.plan.name}, expected a student whose layers are all linear"
            " (hylo upcycle --mla-layers none)"
        )
    for name in _SAME:
        if getattr(base, name) != getattr(student, name):
            raise HyLoError(
                f"--student {student_at}: {name} is {getattr(student, name)}, the teacher's is {getattr(base, name)};"
                " expected the base model that the student was made from"
            )


def load_pair(teacher: Path, student: Path, device: torch.device, dtype: torch.dtype) -> Pair:
    """Load both Hugging Face folders. Raises ``HyLoError``."""
    return Pair(teacher=_teacher(teacher, device, dtype), student=_frozen(student, device, dtype))


def load_windowed(teacher: Path, window: Window, device: torch.device, dtype: torch.dtype) -> Windowed:
    """Load a base model, whose layers will see ``window``. Raises ``HyLoError``."""
    return Windowed(teacher=_teacher(teacher, device, dtype), window=window)


def _frozen(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return load(folder, device, dtype).model.requires_grad_(False)


def _teacher(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = _frozen(folder, device, dtype)
    if model.config._attn_implementation != "sdpa":  # without a mask, others would look ahead
        raise HyLoError(f"--teacher {folder}: attention runs as {model.config._attn_implementation}, not as sdpa")
    return model
