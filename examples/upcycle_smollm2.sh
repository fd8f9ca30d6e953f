#!/usr/bin/env bash
# SmolLM2-135M-Instruct -> hybrid, end to end: fetch, convert, upcycle, distil, export, evaluate, generate.
# Variables: RECIPE (window|base; default: window), TOKENS (such as 100M), BATCH_FACTOR (2 for 8 GPUs, or 4 for 4 GPUs
# with RECIPE=base), PLAN (such as 3MLA27GDN), LINEAR (gdn|mamba2|kda), GEOMETRY (such as native), SEED, TP, PP, OUT.
# Flags after the script's name, such as --text prose, go to the recipe (--help lists them). The same command continues
# an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."
args=()
for name in RECIPE TOKENS BATCH_FACTOR PLAN LINEAR GEOMETRY SEED TP PP OUT; do
  value=${!name:-}
  [ -z "$value" ] || args+=("--$(tr '[:upper:]_' '[:lower:]-' <<<"$name")" "$value")
done
exec "${PYTHON:-python3}" -W ignore -m hylo_megatron recipe ${args[@]+"${args[@]}"} "$@"
