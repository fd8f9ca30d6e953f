"""Perplexity per token and loss by position, without ever holding the logits of a whole sequence.

Shapes: B documents, S tokens, D model width, T = scored tokens of a batch, N vocabulary.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.texts import read_texts

IGNORED = -100
FIRST_BUCKET = 128  # tokens; buckets double from there
BATCH_TOKENS = {"cuda": 65536, "cpu": 4096}
OTHER_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def rows_per_batch(length: int, device: torch.device, batch_size: int | None) -> int:
    """Sequences of ``length`` tokens to run at once: what was asked for, else what suits the device."""
    return batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // length)


def encode_documents(tokenizer: PreTrainedTokenizerBase, file: str | Path, context: int, max_tokens: int) -> list:
    """Token ids of documents in file order, each cut to ``context``, until ``max_tokens`` can be scored.

    The first token of a document is not scored (it is BOS where the tokenizer adds one).
    """
    documents, left = [], max_tokens
    for text in read_texts(file):
        ids = _encode_start(tokenizer, text, min(context, left + 1))
        if len(ids) > 1:
            documents.append(ids)
            left -= len(ids) - 1
        if left <= 0:
            break
    if not documents:
        raise HyLoError(f"{file} holds no document of two tokens or more: nothing to score")
    return documents


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """The first ``count`` ids of a text that may be far longer."""
    chars = 8 * count
    while True:
        ids = tokenizer(text[:chars], verbose=False).input_ids
        if chars >= len(text) or len(ids) > count + 8:  # the last ids depend on where the text was cut
            return ids[:count]
        chars *= 4


def batches(documents: list[list[int]], batch_size: int | None, device: torch.device) -> Iterator[list[list[int]]]:
    """Longest first, so that neighbours have nearly one length and memory peaks at once."""
    ordered = sorted(documents, key=len, reverse=True)
    while ordered:
        rows = rows_per_batch(len(ordered[0]), device, batch_size)
        yield ordered[:rows]
        ordered = ordered[rows:]


def token_losses(model: PreTrainedModel, ids_BS: torch.Tensor, chunk: int) -> torch.Tensor:
    """Negative log likelihood (nats, float32) of tokens 1.. of every row: [B, S-1]; ``IGNORED`` ids give 0.

    Rows are padded on the right: nothing looks ahead, so padding needs no mask.
    """
    hidden_BSD = model.base_model(input_ids=ids_BS.clamp_min(0), use_cache=False).last_hidden_state
    hidden_TD = hidden_BSD[:, :-1].flatten(0, 1)
    targets_T = ids_BS[:, 1:].flatten()
    head = model.get_output_embeddings()
    losses = [
        F.cross_entropy(head(h_TD).float(), target_T, ignore_index=IGNORED, reduction="none")
        for h_TD, target_T in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(ids_BS.shape[0], -1)


def bucket_edges(context: int) -> list[int]:
    """0, 128, 256, 512, ... up to ``context``."""
    edges, edge = [0], FIRST_BUCKET
    while edge < context:
        edges.append(edge)
        edge *= 2
    return [*edges, context]


def _by_position(loss_S: torch.Tensor, count_S: torch.Tensor) -> list[dict]:
    """Mean loss of the tokens at positions ``from`` <= p < ``to`` of their documents."""
    rows, edges = [], bucket_edges(len(loss_S))
    for start, end in zip(edges, edges[1:], strict=False):
        tokens = int(count_S[start:end].sum())
        if tokens:
            rows.append({"from": start, "to": end, "tokens": tokens, "loss": loss_S[start:end].sum().item() / tokens})
    return rows


@torch.inference_mode()
def perplexity_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    context: int = 2048,
    max_tokens: int = 20_000,
    batch_size: int | None = None,
    chunk: int = 1024,
    label: str = "",
) -> dict:
    """Perplexity per token of a JSON-lines file. ``chunk``: positions whose logits exist at a time.

    Returns perplexity, loss (nats a token), tokens and documents scored, by_position, seconds.
    """
    if context < 2 or max_tokens < 1:
        raise HyLoError(f"context {context} and {max_tokens} tokens to score: expected at least 2 and 1")
    if any(getattr(model.config, name, None) not in (None, 1.0) for name in OTHER_HEADS):
        raise HyLoError(f"{model.config.model_type} scales or caps its logits, which this evaluation does not cover")
    began = time.perf_counter()
    documents = encode_documents(tokenizer, file, context, max_tokens)
    longest, total = max(map(len, documents)), sum(len(ids) - 1 for ids in documents)
    loss_S, count_S = (torch.zeros(longest, dtype=torch.float64) for _ in range(2))
    shown = began
    for batch in batches(documents, batch_size, model.device):
        ids_BS = torch.full((len(batch), len(batch[0])), IGNORED)
        for row, ids in enumerate(batch):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
        losses = token_losses(model, ids_BS.to(model.device), chunk)
        loss_S[1 : ids_BS.shape[1]] += losses.double().sum(0).cpu()
        count_S[1 : ids_BS.shape[1]] += (ids_BS[:, 1:] != IGNORED).sum(0)
        if label and (time.perf_counter() - shown > 10 or count_S.sum() == total):
            shown = time.perf_counter()
            print(f"{label}: {int(count_S.sum())}/{total} tokens, {shown - began:.0f} s", flush=True)
    loss = loss_S.sum().item() / total
    if not math.isfinite(loss):
        raise HyLoError(f"the loss on {file} is not a finite number: the weights are broken or overflow in this dtype")
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": total,
        "documents": len(documents),
        "by_position": _by_position(loss_S, count_S),
        "seconds": round(time.perf_counter() - began, 2),
    }
