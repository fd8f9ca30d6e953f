"""Which samples a step has read, in terms of the files that a person can look into."""

from typing import Any

SHOWN = 8


def place(data: Any, index: int) -> list:
    """Return ``[PREFIX, kind, number]`` of a sample: a packed sequence, or the document in which it begins."""
    if hasattr(data, "dataset_index"):  # megatron-core's blend
        inner = data.datasets[int(data.dataset_index[index])]
        return place(inner, int(data.dataset_sample_index[index]))
    prefix = str(getattr(data, "dataset_path", None))
    if hasattr(data, "sequence"):
        return [prefix, "sequence", data.sequence(index)]
    if getattr(data, "shuffle_index", None) is not None:
        first = data.sample_index[data.shuffle_index[index]][0]
        return [prefix, "document", int(data.document_index[first])]
    return [prefix, "sample", index]


def step_samples(data: Any, first: int, count: int) -> list[list]:
    """Return the places of a step's samples, or none without ``data``. ``first``: samples read before the step."""
    return [] if data is None else [place(data, index) for index in range(first, first + count)]


def shown(samples: list[list]) -> str:
    """Return the first few samples as text."""
    words = [f"{prefix} {kind} {number}" for prefix, kind, number in samples[:SHOWN]]
    more = f" and {len(samples) - SHOWN} more in events.jsonl" if len(samples) > SHOWN else ""
    return (", ".join(words) or "unknown") + more
