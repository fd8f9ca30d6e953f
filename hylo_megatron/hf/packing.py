"""Packed rows: several consecutive documents, each computed as if alone.

Legend: B batch, S positions of a row, N documents of one group, L the longest of them, D model.
"""

from collections import defaultdict
from collections.abc import Callable

import torch

from hylo_megatron.kernels.rope import Angles

SHORT = 16  # documents of up to this many tokens form one group


class Documents:
    """The documents of packed rows, in groups of similar length.

    A mixer runs once for each group, on a right-padded batch with one document per row. Mixers only look back and so
    never see padding on the right: no mask is needed. Lengths in a group differ by less than a factor of two, which
    bounds the padding.
    """

    def __init__(self, starts_BS: torch.Tensor, angles: Angles):
        first = starts_BS.flatten().nonzero().flatten().tolist()
        groups = defaultdict(list)
        for start, end in zip(first, [*first[1:], starts_BS.numel()], strict=True):
            groups[max(end - start - 1, SHORT - 1).bit_length()].append((start, end - start))
        self.shape, self.groups = starts_BS.shape, []
        place, filled = torch.empty(starts_BS.numel()).long(), 0  # index of each token among the tokens of all groups
        for members in groups.values():
            start, length = (torch.tensor(column)[:, None] for column in zip(*members, strict=True))
            offset = torch.arange(int(length.max()))[None]
            index_NL = start + torch.minimum(offset, length - 1)  # padding repeats the last token
            real_NL = offset < length
            place[index_NL[real_NL]] = filled + real_NL.flatten().nonzero().flatten()
            filled += index_NL.numel()
            self.groups.append(index_NL.to(starts_BS.device))
        self.place = place.to(starts_BS.device)
        flat = [part if part is None else part.expand(*self.shape, -1).flatten(0, 1) for part in angles]
        self.angles = [
            Angles(*(part if part is None else part[index_NL] for part in flat)) for index_NL in self.groups
        ]

    def apply(self, mixer: Callable[[torch.Tensor, Angles], torch.Tensor], x_BSD: torch.Tensor) -> torch.Tensor:
        """Return ``mixer(x [N,L,D], angles)`` of every group, at the positions of the documents in the rows."""
        flat = x_BSD.flatten(0, 1)
        outs = [
            mixer(flat[index], angles).flatten(0, 1) for index, angles in zip(self.groups, self.angles, strict=True)
        ]
        return torch.cat(outs)[self.place].unflatten(0, self.shape)


def document_starts(
    shape: tuple[int, int],
    position_ids: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    cu_seq_lens: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return [B,S], True where a document starts, or None if every row is one document.

    ``mask_BS``: True for real tokens. Raises ``ValueError`` for wrong or contradictory boundaries.
    """
    given = [
        starts for starts in (_from_lengths(shape, *cu_seq_lens), _from_index(shape, seq_idx)) if starts is not None
    ]
    if len(given) == 2 and not torch.equal(*given):
        raise ValueError("HyLoModel: cu_seq_lens and seq_idx place documents differently: give one of them")
    if not given and position_ids is None:
        return None
    starts_BS = None if position_ids is None else _from_positions(shape, position_ids, mask_BS)
    if given:
        if starts_BS is not None and (starts_BS & ~given[0]).any():
            raise ValueError("HyLoModel: position_ids restart where cu_seq_lens or seq_idx start no document")
        starts_BS = given[0]
    starts_BS = starts_BS.clone()
    starts_BS[:, 0] = True
    if not starts_BS[:, 1:].any():
        return None
    return starts_BS if mask_BS is None else _with_padding(starts_BS, mask_BS)


def restarted(starts_BS: torch.Tensor) -> torch.Tensor:
    """Return positions [B,S] that count from 0 in every document."""
    index = torch.arange(starts_BS.shape[1], device=starts_BS.device).expand(starts_BS.shape)
    return index - torch.where(starts_BS, index, 0).cummax(1).values


def _from_lengths(shape, q: torch.Tensor | None, k: torch.Tensor | None) -> torch.Tensor | None:
    if q is None and k is None:
        return None
    ends = q if q is not None else k
    if q is not None and k is not None and not torch.equal(q, k):
        raise ValueError("HyLoModel: cu_seq_lens_q and cu_seq_lens_k differ: a document attends to itself")
    total = shape[0] * shape[1]
    if ends.dim() != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != total or (ends.diff() < 0).any():
        raise ValueError(
            f"HyLoModel: cu_seq_lens_q is {_shown(ends)}, expected offsets that rise from 0 to the {total} tokens"
        )
    starts = torch.zeros(total, dtype=torch.bool, device=ends.device)
    starts[ends[ends < total].long()] = True
    starts_BS = starts.view(shape)
    if not starts_BS[:, 0].all():
        raise ValueError("HyLoModel: cu_seq_lens_q has a document that goes on in the next row: use one row")
    return starts_BS


def _from_index(shape, seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    if seq_idx is None:
        return None
    if tuple(seq_idx.shape) != tuple(shape):
        raise ValueError(f"HyLoModel: seq_idx has shape {tuple(seq_idx.shape)}, expected {tuple(shape)}")
    starts_BS = torch.ones(shape, dtype=torch.bool, device=seq_idx.device)
    starts_BS[:, 1:] = seq_idx.diff() != 0
    return starts_BS


def _from_positions(shape, position_ids: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """Return where the positions of real tokens return to 0.

    Positions after padding may count the padding or not. Everything else is refused.
    """
    position = position_ids.expand(shape).long()
    index = torch.arange(shape[1], device=position.device).expand(shape)
    real = torch.ones_like(index, dtype=torch.bool) if mask_BS is None else mask_BS
    last = torch.where(real, index, -1).cummax(1).values
    before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)  # the last real token before this one
    step = position - position.gather(1, before.clamp(min=0))
    goes_on = ~real | (before < 0) | (step == 1) | (step == index - before)
    starts = ~goes_on & (position == 0)
    if (bad := ~goes_on & ~starts).any():
        row, at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"HyLoModel: position_ids[{row}] goes from {int(position[row, before[row, at]])} to "
            f"{int(position[row, at])} at index {at}: expected the next position, or 0 where a document starts"
        )
    return starts


def _with_padding(starts_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Return ``starts_BS`` with a start wherever padding begins or ends: a run of padding becomes a document."""
    flips = torch.zeros_like(starts_BS)
    flips[:, 1:] = mask_BS[:, 1:] != mask_BS[:, :-1]
    seen = mask_BS.cumsum(1) > 1  # a real token lies before this one
    if (flips & mask_BS & seen & ~starts_BS).any():
        raise ValueError("HyLoModel: attention_mask has padding inside a packed document: pad between documents")
    return starts_BS | flips


def _shown(values: torch.Tensor) -> str:
    listed = values.flatten().tolist()
    return str(listed) if len(listed) <= 8 else f"[{', '.join(map(str, listed[:8]))}, ...]"
