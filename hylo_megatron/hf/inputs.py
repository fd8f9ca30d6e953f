"""Arguments of a forward call other than tokens: masks, positions, and which arguments are accepted or refused.

Legend: B batch, S new positions, T all positions.
"""

from typing import NamedTuple

import torch

_NO_EFFECT = {"cache_position", "max_length_q", "max_length_k"}  # arguments that repeat what others say


def refuse_unknown(arguments: dict) -> None:
    """Raise ``ValueError`` for an argument that would change the result but that the model does not use."""
    for name, value in arguments.items():
        if name == "is_causal" and value is False:
            raise ValueError("HyLoModel: is_causal=False is not supported: linear layers only look back")
        if name == "token_type_ids" and value is not None and value.any():
            raise ValueError("HyLoModel: token_type_ids has values other than 0, but the model has no token types")
        if name in _NO_EFFECT or name in ("is_causal", "token_type_ids") or value is None or value is False:
            continue
        if name == "output_attentions":
            raise ValueError("HyLoModel: output_attentions is not supported: linear layers have no attention weights")
        raise ValueError(f"HyLoModel: argument {name} is not known: leave it out")


def checked_mask(mask: torch.Tensor | None, batch: int, total: int) -> torch.Tensor | None:
    """Return the mask as [B,T] bool, or None if nothing is padded. Raises ``ValueError``."""
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, total):
        raise ValueError(f"HyLoModel: attention_mask has shape {tuple(mask.shape)}, expected [{batch}, {total}]")
    real = mask.bool()
    if mask.dtype != torch.bool and (mask != real).any():
        raise ValueError("HyLoModel: attention_mask has values other than 0 and 1; give documents by position_ids")
    return None if real.all() else real


def refuse_holes(mask: torch.Tensor | None) -> None:
    """Raise ``ValueError`` for padding between real tokens, cached ones included: convolutions would read it."""
    if mask is not None and ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any():
        raise ValueError("HyLoModel: attention_mask has padding between real tokens: pad a row on one side only")


def refuse_cache(use_cache: bool | None, past_key_values) -> None:
    """Raise ``ValueError`` if a call with packed documents asks for a cache or brings one."""
    if use_cache or past_key_values is not None:
        raise ValueError("HyLoModel: packed documents cannot be cached: set use_cache=False, without past_key_values")


def check_positions(position_ids: torch.Tensor | None, batch: int, length: int) -> None:
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(
            f"HyLoModel: position_ids has shape {tuple(position_ids.shape)}, expected [{batch}, {length}]"
        )


class Rows(NamedTuple):
    """How far rows have come: the number of their real tokens, and the position of the last one."""

    real_B: torch.Tensor
    last_B: torch.Tensor

    @classmethod
    def plain(cls, batch: int, length: int, device: torch.device) -> "Rows":
        """Return rows of ``length`` tokens without padding, counted from 0."""
        real_B = torch.full((batch,), length, device=device)
        return cls(real_B, real_B - 1)

    def check(self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, past: int) -> None:
        """Raise ``ValueError`` if a call's mask and positions do not go on from the ``past`` cached ones."""
        known_B = past if mask is None else mask[:, :past].sum(1)
        if (known_B != self.real_B).any():
            raise ValueError(
                "HyLoModel: attention_mask pads other cached tokens than the earlier calls did, expected their mask"
                " and the new tokens': give all of it in each call, or start a new cache"
            )
        if position_ids is None:
            return
        position_BS = position_ids.expand(len(self.real_B), -1)
        new_BS = torch.ones_like(position_BS, dtype=torch.bool) if mask is None else mask[:, past:]
        first_B = position_BS.gather(1, new_BS.long().argmax(1, keepdim=True)).squeeze(1)
        wrong_B = (self.real_B > 0) & new_BS.any(1) & (first_B != self.last_B + 1)
        if wrong_B.any():
            row = int(wrong_B.nonzero()[0])
            raise ValueError(
                f"HyLoModel: position_ids[{row}] goes on with {int(first_B[row])}, expected"
                f" {int(self.last_B[row]) + 1}, which follows the cached tokens: leave position_ids out"
            )

    def positions(self, new_BS: torch.Tensor) -> torch.Tensor:
        """Return positions [B,S] of new tokens, which count on. ``new_BS``: True for real tokens."""
        return (self.last_B[:, None] + new_BS.long().cumsum(1)).clamp(min=0)

    def all_positions(self, real_BT: torch.Tensor) -> torch.Tensor:
        """Return the positions [B,T] of all tokens so far: those of a row's real tokens follow one another."""
        return (self.last_B[:, None] - self.real_B[:, None] + real_BT.long().cumsum(1)).clamp(min=0)

    def after(self, positions_BS: torch.Tensor, new_BS: torch.Tensor) -> "Rows":
        """Return the rows behind new tokens at these positions."""
        positions_BS = positions_BS.expand(new_BS.shape)
        index_BS = torch.arange(new_BS.shape[1], device=new_BS.device) * new_BS
        last_B = positions_BS.gather(1, index_BS.amax(1, keepdim=True)).squeeze(1)
        return Rows(self.real_B + new_BS.sum(1), torch.where(new_BS.any(1), last_B, self.last_B))


def allowed(mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Return which positions each query sees, [B or 1,1,S,T] bool.

    Returns None for whole sequences and single last tokens without padding, where a query sees everything before it.
    Padding sees itself, so that no row is empty.
    """
    if mask is None and (past == 0 or length == 1):
        return None
    rows = torch.arange(past, past + length, device=device).unsqueeze(1)
    columns = torch.arange(past + length, device=device)
    causal = columns <= rows
    if mask is None:
        return causal[None, None]
    return (causal & mask[:, None, None, :]) | (columns == rows)
