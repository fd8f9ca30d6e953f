#!/usr/bin/env python3
"""``hylo prepare-data`` under its earlier name."""

from hylo_megatron.cli import run

if __name__ == "__main__":
    run("prepare-data")
