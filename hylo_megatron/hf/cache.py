"""The cache of a hybrid: rows that grow with the text in some layers, states of fixed size in the others."""

import torch
from transformers.cache_utils import Cache

from hylo_megatron.hf.inputs import Rows


class HyLoCache(Cache):
    """One dictionary of tensors per layer, batch first. The layers write them; this class reorders and counts them.

    MLA has ``latent`` [B,S,R+P], the latent and the shared key, which is rotated unless the model has ``qk_norm``.
    Linear mixers have ``conv`` [B,W-1,C] and ``state`` (fp32) for every length of text. A window beside either has
    ``window`` [B,W,2GK] and ``sinks`` [B,S,2GK], keys and values of its last and first tokens, with positions
    ``.._at``. ``rows`` is known once a call had padding or positions of its own.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[{} for _ in range(num_layers)])
        self.length = 0
        self.rows: Rows | None = None

    def __getitem__(self, layer: int) -> dict[str, torch.Tensor]:
        return self.layers[layer]

    def append(self, layer: int, rows_BSR: torch.Tensor) -> torch.Tensor:
        """Add rows to a layer whose cache grows, and return all of the layer's rows."""
        past = self.layers[layer].get("latent")
        self.layers[layer]["latent"] = rows_BSR if past is None else torch.cat([past, rows_BSR], 1)
        return self.layers[layer]["latent"]

    def positions(self, mask_BT: torch.Tensor | None, total: int, device: torch.device) -> torch.Tensor:
        """Return the positions [B or 1,T] of all ``total`` tokens, once ``rows`` knows the new ones."""
        if self.rows is None:
            return torch.arange(total, device=device).unsqueeze(0)
        real_BT = torch.ones(1, total, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
        return self.rows.all_positions(real_BT)

    def keep(self, layer: int, conv: torch.Tensor, state: torch.Tensor) -> None:
        """Keep the states of a linear layer. ``conv`` is copied: a view would keep its whole sequence in memory."""
        self.layers[layer].update(conv=conv.clone(), state=state)

    def check_fits(self, num_layers: int, batch: int) -> None:
        """Raise ``ValueError`` if the cache belongs to another model or another batch."""
        if len(self.layers) != num_layers:
            raise ValueError(f"HyLoCache has {len(self.layers)} layers, the model has {num_layers}: start a new cache")
        rows = next((len(tensor) for layer in self.layers for tensor in layer.values()), batch)
        if rows != batch:
            raise ValueError(f"HyLoCache holds {rows} sequences, the input has {batch}: start a new cache")

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def max_cache_len(self) -> int:
        raise ValueError("HyLoCache has no fixed length: static caches and PEFT's prefix tuning are not supported")

    def _each(self, change) -> None:
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = change(tensor)
        self.rows = self.rows and Rows(*map(change, self.rows))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        self.length, self.rows = 0, None
        for layer in self.layers:
            layer.clear()

    def crop(self, *_) -> None:
        raise ValueError("HyLoCache: the states of linear layers cannot be rolled back: start from a new cache")

    def activate_past_recording(self) -> None:
        self.crop()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)
