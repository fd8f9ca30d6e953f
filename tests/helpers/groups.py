"""Process groups of one rank for tests that run megatron-core in their own process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_rank() -> Iterator[None]:
    """Start the groups of one rank, and end them after the tests that need them."""
    from hylo_megatron.engine.register import install

    install("megatron")  # before the import of megatron-core in the next line
    from hylo_megatron.layers.load import start_process_groups

    start_process_groups()
    try:
        yield
    finally:
        end()


def left_behind() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def end() -> None:
    from helpers.train import end_processes

    if left_behind():
        end_processes()
