"""One greedy answer of teacher and student, through transformers."""

from pathlib import Path

import torch

from hylo_megatron.convert.tokenizer_files import open_tokenizer
from hylo_megatron.files import write_json

PROMPT = "What is the capital of France?"
NEW_TOKENS = 24


def answer(folder: Path) -> str:
    """Return the answer of a folder's model to ``PROMPT``."""
    import transformers

    from hylo_megatron.hf import register

    register()
    tokenizer = open_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": PROMPT}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs.to(model.device), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_sample(teacher: Path, student: Path, out: Path) -> None:
    """Write the prompt and both answers to ``out`` as JSON."""
    answers = {"prompt": PROMPT, "teacher": answer(teacher), "student": answer(student)}
    write_json(out, answers)
