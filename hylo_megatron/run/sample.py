"""One greedy answer of teacher and student, through transformers."""

from pathlib import Path

import torch

from hylo_megatron.convert.tokenizer_files import open_tokenizer
from hylo_megatron.files import write_json

PROMPT = "What is the capital of France?"


def answer(folder: Path, prompt: str = PROMPT, tokens: int = 24) -> str:
    import transformers

    from hylo_megatron.hf import register

    register()
    tokenizer = open_tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs.to(model.device), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_sample(teacher: Path, student: Path, out: Path) -> None:
    """Write the prompt and both answers to ``out`` as JSON."""
    answers = {"prompt": PROMPT, "teacher": answer(teacher), "student": answer(student)}
    write_json(out, answers)
