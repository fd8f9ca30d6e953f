"""Sample training text from a teacher: documents from a start token or first sentences, chats from instructions.

Writes sampled-*.jsonl, which hylo prepare-data reads, and sampled.json with the teacher, the settings and the counts.
The same command goes on after an interruption and gives the same files. Rows are the same for the same seed,
--batch-size and device; another of these rounds the logits otherwise, which changes words here and there.
"""

import argparse
import re
from hashlib import sha256
from pathlib import Path

import torch

from hylo_megatron import packages
from hylo_megatron.convert.card_records import STAMP
from hylo_megatron.data.formats import add_format
from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.evaluate.models import DTYPES, check_folder, kv_bytes_per_token, load, resolve_device, resolve_dtype
from hylo_megatron.flags import Parser, command_line, count, positive, share, size, tokens
from hylo_megatron.hf import register
from hylo_megatron.json_file import read_json
from hylo_megatron.sample import prompts as prompt_kinds
from hylo_megatron.sample.decoder import CPU_ROWS, Decoder, Sampling, rows_by_memory
from hylo_megatron.sample.fingerprint import fingerprint
from hylo_megatron.sample.keep import Keeper, Rules
from hylo_megatron.sample.lockstep import LockstepDecoder, cache_bytes_per_token
from hylo_megatron.sample.prompts import Prompt, Prompts, Teller
from hylo_megatron.sample.row_cache import refusal
from hylo_megatron.sample.run import SamplingRun
from hylo_megatron.sample.shards import SIDECAR, Shards
from hylo_megatron.sample.vllm_engine import VllmEngine
from hylo_megatron.serve.refused import refused_settings

ENGINES = ("auto", "transformers", "vllm")
LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*?)\s*$", re.MULTILINE)
SHORTEST_DOCUMENT, SHORTEST_ANSWER = 20, 1


def read_prompts(options: argparse.Namespace, teller: Teller) -> tuple[Prompts, dict]:
    """Return the prompts, and what ``sampled.json`` says about them."""
    most, token = options.length // 2, options.start_token
    if options.first_sentences:
        kind, file = "first sentences", options.first_sentences
        found = prompt_kinds.sentence_prompts(teller, file, token, most, options.form)
    elif options.instructions:
        kind, file = "instructions", options.instructions
        found = prompt_kinds.instruction_prompts(teller, file, options.text_key, most, options.form)
    else:
        kind, file, found = "start token", None, [Prompt((teller.start(token),))]
    digest = sha256(repr([prompt.ids for prompt in found]).encode()).hexdigest()[:16]
    about = {"kind": kind, "file": file and str(file.name), "number": len(found), "digest": digest}
    return Prompts(found, options.seed), about


def unserved(config) -> bool:
    """Return whether the vLLM here refuses the hybrid (``serve/refused.py``, ``mixers/kda/vllm_module.py``)."""
    fields = {"linear_rope": config.linear_rope, "window": config.window}
    older = re.match(r"0\.(\d+)", packages.version_of("vllm") or "")
    return bool(
        ("kda" in config.mixers and older and int(older[1]) < 32)
        or any(refused_settings(config.mixers, **fields, on_gpu=torch.cuda.is_available()))
    )


def engine_of(options: argparse.Namespace, config) -> str:
    """Return transformers or vllm. Raises ``HyLoError`` if neither can sample this model here."""
    if options.engine != "auto":
        return options.engine
    if config.model_type == "hylo" and (not packages.has("vllm") or unserved(config)):
        return "transformers"
    reason = refusal(config, options.length)
    if reason:
        packages.require("vllm", f"sampling from {options.teacher} ({reason})")
    return "vllm" if reason else "transformers"


def licence_of(folder: Path) -> str:
    """Return the licence that the folder names: in hylo_source.json, which hylo fetch-smollm2 writes, or README.md."""
    source, page = folder / STAMP, folder / "README.md"
    if source.is_file() and (named := read_json(source).get("licence")):
        return str(named)
    found = LICENCE.search(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else None
    return found[1] if found else "unknown: that of the teacher"


def check_files(options: argparse.Namespace) -> None:
    """Refuse flags about files that are not given. Raises ``HyLoError``."""
    form, files = options.form, options.first_sentences or options.instructions
    for flag, given, advice in (
        (f"--format {form}", form and not files, "is that of --first-sentences or --instructions; give one of these"),
        (f"--format {form}", form == "text" and options.instructions, "instructions are rows: give jsonl or chat"),
        ("--text-key", options.text_key and not options.instructions, "is that of --instructions; leave it out"),
        ("--text-key", options.text_key and form == "chat", "--format chat has no key of a text; leave one out"),
        ("--start-token", options.start_token and options.instructions, "begins documents, no chats; leave it out"),
    ):
        if given:
            raise HyLoError(f"{flag}: {advice}")


def check_flags(options: argparse.Namespace, engine: str) -> None:
    """Refuse flags that vLLM would not follow. Raises ``HyLoError``."""
    if engine == "vllm" and options.device != "auto":
        raise HyLoError(f"--device {options.device}: vLLM chooses the device itself: leave the flag out")
    if engine == "vllm" and options.no_cuda_graph:
        raise HyLoError("--no-cuda-graph: for the engine transformers, this model is sampled by vllm: leave it out")


def start_engine(
    options: argparse.Namespace, engine: str, sampling: Sampling, device: torch.device, dtype: torch.dtype
):
    """Return the engine, and how many rows it writes at once (None: vLLM decides)."""
    if engine == "vllm":
        return VllmEngine(options.teacher, sampling, str(dtype).removeprefix("torch."), options.batch_size), None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # set_device takes no device without an index
    model = load(options.teacher, device, dtype).model
    hybrid = model.config.model_type == "hylo"
    rows = options.batch_size or CPU_ROWS
    if not options.batch_size and device.type == "cuda":
        per_token = kv_bytes_per_token(model.config, dtype.itemsize, sampling.length)
        if hybrid:
            per_token = cache_bytes_per_token(model, sampling.length)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        rows = rows_by_memory(torch.cuda.mem_get_info(device)[0], per_token, sampling.length, vocabulary)
    if hybrid:
        return LockstepDecoder(model, sampling, rows), rows
    return Decoder(model, sampling, rows, not options.no_cuda_graph), rows


def sample(options: argparse.Namespace) -> Shards:
    """Do what is not done yet, and return the shards. Raises ``HyLoError``."""
    try:
        return _sample(options)
    except torch.OutOfMemoryError as error:
        raise HyLoError(f"--batch-size: the rows do not fit into memory ({first_line(error)})") from None


def _sample(options: argparse.Namespace) -> Shards:
    from transformers import AutoConfig

    check_files(options)
    register()
    folder = check_folder(options.teacher)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    most = getattr(config, "max_position_embeddings", options.length)
    if options.length > most:
        raise HyLoError(f"--length {options.length}: {folder} was made for {most} tokens: use at most as many")
    ends = config.eos_token_id
    teller = Teller(folder, set(ends if isinstance(ends, list) else [ends]) - {None})
    prompts, about = read_prompts(options, teller)
    engine = engine_of(options, config)
    check_flags(options, engine)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if (options.out / SIDECAR).is_file():  # a batch of another size would round otherwise
        options.batch_size = options.batch_size or Shards.read(options.out)["settings"].get("rows_at_once")
    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        length=options.length,
        seed=options.seed,
        ends=teller.ends,
    )
    writer, rows = start_engine(options, engine, sampling, device, dtype)
    chats = about["kind"] == "instructions"
    shortest = options.shortest if options.shortest is not None else (SHORTEST_ANSWER if chats else SHORTEST_DOCUMENT)
    settings = {
        "teacher": folder.resolve().name, "digest": fingerprint(folder),
        "device": device.type, "dtype": str(dtype).removeprefix("torch."),
        "prompts": about, "keep_prompt": options.keep_prompt, "temperature": options.temperature,
        "top_p": options.top_p, "length": options.length, "seed": options.seed, "engine": engine,
        "rows_at_once": rows, "rows_per_shard": options.rows_per_shard, "shortest": shortest,
        "repeats": options.repeats, "alike": options.alike,
    }  # fmt: skip
    shards = Shards(options.out, settings, {"licence": options.licence or licence_of(folder)})
    keeper = Keeper(Rules(shortest, options.repeats, options.alike))
    SamplingRun(
        engine=writer, prompts=prompts, teller=teller, keeper=keeper, shards=shards,
        rows_per_shard=options.rows_per_shard, keep_prompt=options.keep_prompt,
    ).until(options.tokens)  # fmt: skip
    return shards


def parser() -> Parser:
    found = Parser(description=__doc__)
    add = found.add_argument
    add("--teacher", required=True, type=Path, metavar="FOLDER", help="Hugging Face folder with its tokenizer")
    add("--out", required=True, type=Path, metavar="FOLDER", help="for the shards and sampled.json")
    add("--tokens", required=True, type=tokens, help="tokens wanted after filtering, such as 10M")
    kinds = found.add_mutually_exclusive_group()
    kinds.add_argument("--first-sentences", type=Path, metavar="FILE", help="text whose first sentences begin rows")
    kinds.add_argument("--instructions", type=Path, metavar="FILE", help="rows with an instruction, or chats")
    add_format(add, "--first-sentences or --instructions")
    add("--text-key", help="key of the instruction (default: instruction, prompt, question or text)")
    add("--keep-prompt", action=argparse.BooleanOptionalAction, default=True,
        help="keep first sentences in the text (default on)")  # fmt: skip
    add(
        "--start-token", help="token that begins a document (default: the tokenizer's, else the end-of-document token)"
    )
    add("--length", type=size, default=1024, help="most tokens of a row, its prompt included")
    add("--temperature", type=positive, default=1.0)
    add("--top-p", type=share, default=0.95, help="share of the likeliest tokens from which is drawn")
    add("--seed", type=count, default=1)
    add("--shortest", type=count, help=f"fewest words (default {SHORTEST_DOCUMENT}, of answers {SHORTEST_ANSWER})")
    add("--repeats", type=share, default=Rules.repeats,
        help="largest share of repeated runs of 4 words in 200 words; more is a loop and dropped")  # fmt: skip
    add("--alike", type=share, default=Rules.alike,
        help="share of common runs of 5 words (MinHash) from which a text is dropped as a copy")  # fmt: skip
    engines = "auto: transformers; vllm (if installed) for hybrids that it serves and models that cannot be batched"
    add("--engine", choices=ENGINES, default="auto", help=engines)
    add("--batch-size", type=size, help="rows written at once (default: by memory, on a CPU 8)")
    add("--rows-per-shard", type=size, default=1000)
    add("--no-cuda-graph", action="store_true", help="launch the kernels of a step one by one")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bfloat16 on a GPU, float32 on a CPU")
    add("--licence", help="recorded for the model card (default: the one that the teacher's README.md names)")
    return found


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo sample-text``."""
    options = parser().parse_args(argv)
    if options.top_p == 0:
        raise HyLoError("--top-p 0: expected a share above 0")
    if options.length < 2:
        raise HyLoError(f"--length {options.length}: expected at least 2 tokens, one of them a prompt's")
    shards = sample(options)
    counts = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in shards.dropped().items())
    kept = sum(shard["kept"] for shard in shards.about["shards"])
    print(
        f"{options.out}: {shards.tokens:,} tokens in {kept:,} of {shards.rows:,} rows"
        f" (dropped: {counts or 'none'}), {len(shards.about['shards'])} shards, {SIDECAR}"
    )
