"""Compare a checkpoint with transformers: rotary frequencies before it is written, logits afterwards.

Only one layer of each model is in memory at a time, so models larger than the memory are checked too. The comparison
runs in fp32 on the CPU.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.convert.hf_config import read_config, transformers_config
from hylo_megatron.convert.hf_folder import HFWeights
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.rope import rope_frequencies

TOKENS, TOLERANCE, VOCABULARY_ROWS = 256, 1e-4, 16384


def transformers_model(folder: str | Path) -> nn.Module:
    """Return transformers' model of the folder with one layer and without weights."""
    from transformers import AutoModel

    raw, path = read_config(folder)
    config = transformers_config(path, raw["model_type"])
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        short.layer_types = config.layer_types[:1]
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(short, dtype=torch.float32).eval()
        model.rotary_emb = type(model.rotary_emb)(config)
    except Exception as error:  # values that pass transformers' validators but give no model
        reason = " ".join(str(error).split())[:300]
        raise HyLoError(f"{path}: transformers cannot make this model ({type(error).__name__}: {reason})") from None
    return model


def check_frequencies(arch: Architecture, rotary: nn.Module, path: Path) -> None:
    """Refuse a rotary embedding whose frequencies differ from those of transformers' module. Raises ``HyLoError``."""
    ours, scaling = rope_frequencies(arch.rope_parameters, arch.head_dim, arch.max_position_embeddings)
    theirs, factor = rotary.inv_freq, rotary.attention_scaling
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-6, atol=0)
    if not same or abs(scaling - factor) > 1e-6 * abs(factor):
        raise HyLoError(
            f"{path}: rotary embedding {arch.rope_parameters} has other frequencies here than in transformers. This is"
            " a fault of this converter: please report it with this config.json"
        )


class _Theirs:
    """The folder's model, run with transformers' own classes."""

    def __init__(self, model: nn.Module, weights: HFWeights, arch: Architecture):
        self.model, self.weights, self.arch = model, weights, arch
        self.norm, model.norm = model.norm, nn.Identity()

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return F.embedding(tokens_BS, self.weights["model.embed_tokens.weight"]).float()

    def layer(self, index: int, x_BSD: Tensor) -> Tensor:
        block = self.model.layers[0].to("meta")  # frees the weights of the previous layer
        prefix = f"model.layers.{index}."
        names = [key for key in self.weights.expected if key.startswith(prefix)]
        state = {key.removeprefix(prefix): self.weights[key].float() for key in names}
        block.load_state_dict(state, assign=True)
        return self.model(inputs_embeds=x_BSD, use_cache=False).last_hidden_state

    def logits(self, x_BSD: Tensor) -> Tensor:
        self.norm.load_state_dict({"weight": self.weights["model.norm.weight"].float()}, assign=True)
        tied = self.arch.tie_word_embeddings
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        normed = self.norm(x_BSD)
        return torch.cat([F.linear(normed, rows.float()) for rows in head.split(VOCABULARY_ROWS)], -1)


@torch.no_grad()
def self_check(weights: HFWeights, arch: Architecture, checkpoint: Path, model: nn.Module) -> float:
    """Return the largest relative difference of the logits, or NaN if transformers' logits are not finite.

    ``model``: from ``transformers_model``. Raises ``HyLoError`` if the difference exceeds the tolerance.
    """
    from hylo_megatron.init.teacher import BaseModel

    ours, theirs = BaseModel(checkpoint, torch.device("cpu")), _Theirs(model, weights, arch)
    length = min(TOKENS, arch.max_position_embeddings)
    tokens_BS = torch.randint(arch.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    a, b, first = theirs.embed(tokens_BS), ours.embed(tokens_BS), ""
    for index in range(arch.num_layers):
        a, b = theirs.layer(index, a), ours.layer(index, b)[1]
        if not first and not _difference(a, b) <= TOLERANCE:
            first = f", first in layer {index}"
    a, b = theirs.logits(a), ours.logits(b)
    difference = _difference(a, b)
    if not a.isfinite().all():
        return float("nan")
    if not difference <= TOLERANCE:
        raise HyLoError(
            f"{weights.folder}: self-check failed: logits of what was written differ from transformers' by"
            f" {difference:.2g} (relative{first}), expected at most {TOLERANCE:g}. This is a fault of this converter:"
            " please report it with config.json. Nothing was kept; --no-self-check would"
        )
    return difference


def _difference(want: Tensor, got: Tensor) -> float:
    return ((want - got).norm() / want.norm().clamp_min(1e-30)).item()
