"""Write a Hugging Face folder with the shape of a published model, random weights and a small tokenizer.

    python tools/bench/random_model.py --shape llama3b --out models/random-3b [--text models/text.jsonl]

Weights are made on the GPU where there is one, in bf16, and written in shards: an 8B model takes as long as the disk
needs for 16 GB. The folder loads like a downloaded one. Its tokenizer has some hundred tokens of the vocabulary, the
same for every folder, so that folders of one family may teach each other. ``--text`` writes text for a training.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from timing import this_device
from torch import Tensor

from hylo_megatron.checkpoint.folder import whole_folder
from hylo_megatron.config import Architecture
from hylo_megatron.config.shapes import element_count, hf_shapes
from hylo_megatron.convert.megatron_to_hf import SHARD_BYTES, write_weights
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.recipes.proxy import made_up_texts, toy_shape, write_tokenizer
from hylo_megatron.recipes.shapes import SHAPES, shape

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "rms_norm_eps", "max_position_embeddings", "rope_parameters", "tie_word_embeddings")  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DEVIATION = 0.02
DOCUMENTS = 200


def transformers_config(arch: Architecture, **changes):
    """Return transformers' config of a Transformer."""
    from transformers import AutoConfig

    values = {name: getattr(arch, name) for name in NAMES} | {"architectures": [CLASSES[arch.model_type]]} | changes
    return AutoConfig.for_model(arch.model_type, num_hidden_layers=arch.num_layers, **values)


def random_tensors(arch: Architecture, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(1)
    for name, sizes in hf_shapes(arch).items():
        if len(sizes) == 1:  # of a norm
            yield name, torch.ones(sizes, dtype=torch.bfloat16)
            continue
        made = torch.empty(sizes, dtype=torch.bfloat16, device=device)
        yield name, made.normal_(0.0, DEVIATION, generator=generator).cpu()


def write_model(arch: Architecture, folder: Path) -> None:
    """Write the folder of ``arch``, unless it exists."""
    if folder.exists():
        return
    device = this_device()
    total = 2 * element_count(arch)
    with whole_folder(folder, total) as scratch:
        write_tokenizer(scratch, made_up_texts())
        tokens = dict(eos_token_id=2, bos_token_id=None, pad_token_id=None)
        config = transformers_config(arch, dtype="bfloat16", **tokens)
        config.save_pretrained(scratch)
        write_weights(scratch, random_tensors(arch, device), total, "random weights", SHARD_BYTES)


def write_texts(path: Path) -> None:
    """Write made-up text, unless the file exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_up_texts(DOCUMENTS)))


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shape", required=True, choices=tuple(SHAPES))
    add("--out", type=Path, required=True)
    add("--text", type=Path, help="file for made-up text")
    add("--toy", action="store_true", help="the shape with small widths")
    options = parser.parse_args(argv)
    arch = shape(options.shape)
    write_model(toy_shape(arch) if options.toy else arch, options.out)
    if options.text:
        write_texts(options.text)
    print(options.out)


if __name__ == "__main__":
    main()
