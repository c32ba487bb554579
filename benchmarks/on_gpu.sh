#!/usr/bin/env bash
# What only a GPU can show: tests, the speed tables' GPU lines, NCCL, generation at Stable
# Diffusion's size with random weights, 400 steps of ViT-S and ViT-B pre-training and their curves.
#   benchmarks/on_gpu.sh                       all parts, at most 40 minutes
#   benchmarks/on_gpu.sh tests speed           these parts, each at most 9 minutes, of:
#                                              tests speed nccl generate vit_small vit_base
#   DEVICE=cpu SMALL=1 benchmarks/on_gpu.sh    a rehearsal on a CPU, at sizes that show nothing
# Each part writes OUT/PART.json (default OUT=runs/on_gpu), with what was left out and why.
# It takes the active virtual environment, else .venv, else python3; that must have torch for CUDA.
# It installs nothing, downloads nothing and needs no data: the puppet draws the pictures.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python3
[ ! -x "$root/.venv/bin/python" ] || python="$root/.venv/bin/python"
[ -z "${VIRTUAL_ENV:-}" ] || python="$VIRTUAL_ENV/bin/python"
exec "$python" "$root/benchmarks/on_gpu.py" "$@"
