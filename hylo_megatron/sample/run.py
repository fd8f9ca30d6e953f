"""One run of sampling: rows of an engine are filtered in the order of their numbers and written to shards."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hylo_megatron.errors import HyLoError
from hylo_megatron.sample.decoder import Request, Written
from hylo_megatron.sample.keep import Keeper
from hylo_megatron.sample.prompts import Prompt, Prompts, Teller
from hylo_megatron.sample.shards import Shards, to_check

SECONDS_BETWEEN_LINES = 10
FEWEST_KEPT = 0.02  # share of a shard's rows; a run that keeps fewer would not come to an end


@dataclass
class Shard:
    """The shard that is being filled."""

    lines: list[dict] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    dropped: Counter = field(default_factory=Counter)


@dataclass(kw_only=True)
class SamplingRun:
    """``engine`` has ``write(requests)``. ``keep_prompt``: first sentences stay in the training text."""

    engine: object
    prompts: Prompts
    teller: Teller
    keeper: Keeper
    shards: Shards
    rows_per_shard: int
    keep_prompt: bool

    def until(self, wanted: int) -> None:
        """Sample until the shards have ``wanted`` tokens, or slightly more, because the last shard is complete."""
        if self.shards.tokens >= wanted:
            return
        self.shards.replay(self.keeper)
        self.drawn, self.began = 0, time.monotonic()
        self.shown = self.began
        shard = Shard()
        for written in self._in_order(self.shards.rows):
            self._judge(written, shard)
            if shard.rows < self.rows_per_shard:
                continue
            self._close(shard)
            shard = Shard()
            if self.shards.tokens >= wanted:
                break
        self._show(wanted)

    def _in_order(self, first: int) -> Iterator[Written]:
        """Yield rows ``first``, ``first + 1`` and so on; the engine finishes them in an order of its own."""
        requests = (Request(row, self.prompts[row].ids) for row in itertools.count(first))
        early: dict[int, Written] = {}
        for written in self.engine.write(requests):
            self.drawn += len(written.ids) + written.ended
            if time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
                self.shown = time.monotonic()
                self._show()
            early[written.row] = written
            while first in early:
                yield early.pop(first)
                first += 1

    def _judge(self, written: Written, shard: Shard) -> None:
        prompt = self.prompts[written.row]
        line = self._line(written, prompt)
        reason = "unfinished" if prompt.messages and not written.ended else self.keeper.refusal(*to_check(line))
        shard.rows += 1
        if reason:
            shard.dropped[reason] += 1
            return
        shard.lines.append(line)
        shard.tokens += len(written.ids) + self._kept_of(prompt)

    def _kept_of(self, prompt: Prompt) -> int:
        """Return how many tokens of the prompt are in the training text."""
        return len(prompt.ids) if prompt.messages or (self.keep_prompt and prompt.text) else 0

    def _line(self, written: Written, prompt: Prompt) -> dict:
        if prompt.messages:
            answer = {"role": "assistant", "content": self.teller.text(written.ids).strip()}
            return {"messages": [*prompt.messages, answer], "row": written.row}
        kept = self.keep_prompt and prompt.text
        text = self._continued(prompt, written.ids) if kept else self.teller.text(written.ids)
        return {"text": text, "row": written.row}

    def _continued(self, prompt: Prompt, ids: list[int]) -> str:
        """Return the prompt's text with its continuation. Many decoders drop a space before the first token, so the
        continuation is decoded together with the prompt.
        """
        begun = list(prompt.ids[1:])  # without the token that begins a document
        alone, whole = self.teller.text(begun), self.teller.text([*begun, *ids])
        return prompt.text + whole[len(alone) :] if whole.startswith(alone) else whole

    def _close(self, shard: Shard) -> None:
        if len(shard.lines) < FEWEST_KEPT * shard.rows:
            counts = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in shard.dropped.items())
            raise HyLoError(
                f"{self.shards.out}: {len(shard.lines)} of the last {shard.rows} rows were kept ({counts}): use"
                " another temperature, more prompts or a greater --length"
            )
        self.shards.add(shard.lines, shard.rows, shard.tokens, shard.dropped)

    def _show(self, wanted: int | None = None) -> None:
        rate = self.drawn / max(time.monotonic() - self.began, 1e-6)
        print(
            f"{self.shards.tokens:,} tokens kept{f' of {wanted:,} wanted' if wanted else ''},"
            f" {self.drawn:,} drawn at {rate:,.0f} tokens/s",
            flush=True,
        )
