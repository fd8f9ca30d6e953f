"""Greedy decoding of a few tokens after prompts, with as little padding as possible."""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import rows_per_batch

PADDED = 4096  # tokens; longer prompts are batched with prompts of their own length only


def end_tokens(model: PreTrainedModel, tokenizer) -> set[int]:
    """Return the ids that end an answer, from the model's generation settings and its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}


def batches(lengths: list[int], model: PreTrainedModel, batch_size: int | None) -> Iterator[list[int]]:
    """Yield indices of prompts with these lengths that run at once, as many as suit the device.

    Short prompts share a batch if their lengths lie between two powers of two; a long one's mask would be larger
    than the model. Batches of a group are as equal as possible, because GPU kernels are compiled again for another
    number of rows.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length if length > PADDED else -(length - 1).bit_length(), []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: lengths[index])
        count = -(-len(group) // rows_per_batch(model, lengths[group[-1]], batch_size))
        rows = -(-len(group) // count)
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompts: list[tuple[int, ...]],
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
    chunk: int | None = None,
) -> list[list[int]]:
    """Return the new ids of every prompt, each until ``finished(new ids)`` is true or ``max_new_tokens`` are reached.

    Prompts of one length need no padding and no mask; shorter ones are padded on the left. Logits are computed only
    for the last position. ``chunk``: tokens of prompts of one length that one forward pass reads; the cache carries
    the rest, so activations of the whole prompt never exist at once. Raises ``HyLoError`` if a logit is not finite.
    """
    answers, running, past = [[] for _ in prompts], set(range(len(prompts))), None
    broken = torch.zeros((), dtype=torch.bool, device=model.device)
    longest = max(map(len, prompts))
    mask_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    padded = bool((mask_BS == 0).any())
    ids_BS = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
    pieces = ids_BS.split(longest if padded else chunk or longest, 1)
    while True:
        for piece_BS in pieces:
            masks = {"attention_mask": mask_BS} if padded else {}
            out = model(input_ids=piece_BS, past_key_values=past, use_cache=True, logits_to_keep=1, **masks)
            past = out.past_key_values
        logits_BN = out.logits[:, -1].float()
        next_B1 = logits_BN.argmax(-1, keepdim=True)
        broken |= ~logits_BN.gather(1, next_B1).isfinite().all()  # argmax finds NaN first
        for row, token in enumerate(next_B1[:, 0].tolist()):
            if row in running:
                answers[row].append(token)
                if finished(answers[row]) or len(answers[row]) == max_new_tokens:
                    running.remove(row)
        if not running:
            break
        pieces, mask_BS = (next_B1,), torch.cat([mask_BS, torch.ones_like(mask_BS[:, :1])], 1)
    if broken:
        raise HyLoError("the model's logits are not finite: the weights are broken or overflow in this dtype")
    return answers
