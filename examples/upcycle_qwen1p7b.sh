#!/usr/bin/env bash
# Qwen3-1.7B -> hybrid of 7 MLA and 21 linear layers, by the published recipe: convert, upcycle, distil to 64K, export.
# Variables: HF_MODEL DATA | PROXY=1, TEACHER OUT PLAN LINEAR TOKENS TP PP CP SEED EVAL ...: docs/examples.md.
# bash runs the line after the next one. torchrun gives the file to Python, to which that line is a string.
''':'
PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" exec "${PYTHON:-python3}" -W ignore "$0" "$@"
'''
import os
import sys

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a clone that is not installed
from hylo_megatron.cli import example

example("qwen1p7b")
# The end of the last word that bash sees: '
