#!/usr/bin/env python3
"""``hylo evaluate`` under its earlier name."""

from hylo_megatron.cli import run

if __name__ == "__main__":
    run("evaluate")
