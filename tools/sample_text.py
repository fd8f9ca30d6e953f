#!/usr/bin/env python3
"""``hylo sample-text`` as a script."""

from hylo_megatron.cli import run

if __name__ == "__main__":
    run("sample-text")
