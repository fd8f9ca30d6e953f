"""Times on the device of this process. A call counts until the device has done its work."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that ``call`` takes, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Return the median of ``repeats`` calls after two calls for warming up."""
    times = [timed(call, device)[0] for _ in range(repeats + 2)]
    return statistics.median(times[2:])


def copy_rate(device: torch.device) -> float:
    """Return the bytes that a large copy reads and writes in a second."""
    size = 1 << (32 if device.type == "cuda" else 27)
    source, target = (torch.empty(size, device=device, dtype=torch.uint8) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device)
