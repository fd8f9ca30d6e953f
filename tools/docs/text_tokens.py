"""Count the tokens of each source in the files of ``hylo fetch-text``, as docs/data.md states them.

hylo fetch-text --mix prose --out w/text
hylo fetch-smollm2 --out w/hf
python tools/docs/text_tokens.py --text w/text --tokenizer w/hf
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import batched
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line

BATCH = 64  # documents


def rows(file: Path) -> Iterator[dict]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, help="folder of hylo fetch-text")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder whose tokenizer counts")
    arguments = parser.parse_args(argv)
    if not (files := sorted(arguments.text.glob("*.jsonl"))):
        raise HyLoError(f"--text {arguments.text}: no .jsonl files, expected those of hylo fetch-text")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    print("| file | source | documents | tokens | longest document |\n|---|---|---:|---:|---:|")
    for file in files:
        lengths = defaultdict(list)
        for batch in batched(rows(file), BATCH):
            ids = tokenizer([row["text"] for row in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for row, tokens in zip(batch, ids, strict=True):
                lengths[row["source"]].append(len(tokens))
        for source, found in {**lengths, "all": [each for some in lengths.values() for each in some]}.items():
            print(f"| {file.name} | {source} | {len(found):,} | {sum(found):,} | {max(found):,} |", flush=True)


if __name__ == "__main__":
    main()
