"""Greedy decoding of a few tokens after long prompts of equal length, without padding and masks."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel


def end_tokens(model: PreTrainedModel, tokenizer) -> set[int]:
    """Return the ids that end an answer, from the model's generation settings and its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id} - {None}


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompts: list[tuple[int, ...]],
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Return the new ids of every prompt, each until ``finished(new ids)`` is true or ``max_new_tokens`` are reached.

    All prompts have one length, so nothing is padded: flash attention takes no mask, and at 32K tokens a mask would be
    larger than the model. Logits are computed only for the last position.
    """
    if len({len(ids) for ids in prompts}) != 1:
        raise ValueError(f"prompts of lengths {sorted({len(ids) for ids in prompts})}: expected one length")
    answers, running, past = [[] for _ in prompts], set(range(len(prompts))), None
    ids_BS = torch.tensor(prompts, device=model.device)
    for _ in range(max_new_tokens):
        out = model(input_ids=ids_BS, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        ids_BS = out.logits[:, -1].float().argmax(-1, keepdim=True)
        for row, token in enumerate(ids_BS[:, 0].tolist()):
            if row in running:
                answers[row].append(token)
                if finished(answers[row]):
                    running.remove(row)
        if not running:
            break
    return answers
