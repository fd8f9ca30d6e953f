"""Interface of tasks whose answers are decoded greedily and scored as text: prompts, score, and when to stop.

``run_task.py`` runs every task. A task never sees the model, so tests can answer its prompts without one.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids of one prompt with the answers that count as right.

    ``length``: tokens of prompt and answer that its cell of the report is for; ``len(ids)`` may be a few tokens less
    than ``length - max_new_tokens``, but never more. ``cell``: further labels of the cell, for example the depth.
    """

    ids: tuple[int, ...]
    length: int
    references: tuple[str, ...]
    cell: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question. ``chance``: expected score of a blind guesser, from 0 to 1."""

    name: str
    max_new_tokens: int
    chance: float = 0.0

    def prompts(self, tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int) -> list[Prompt]:
        """Return ``samples`` prompts of each cell of ``length``, the same ones for the same seed."""
        raise NotImplementedError

    def check(self, tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int) -> None:
        """Refuse what ``prompts`` would refuse, before any model is loaded. Raises ``HyLoError``."""
        self.prompts(tokenizer, length, samples, seed)

    def score(self, answer: str, prompt: Prompt) -> float:
        """Return the score of an answer, from 0 to 1."""
        raise NotImplementedError

    def finished(self, text: str) -> bool:
        """Return True if no further token can change the score of the answer so far."""
        return False
