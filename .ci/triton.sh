#!/usr/bin/env bash
# GPU kernels in Triton's interpreter. PyTorch for a CPU comes without Triton, which takes 1 GB, so it lies beside the
# environment and goes again.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
.venv/bin/python -m pip install --quiet --no-deps --target "$dir" triton
PYTHONPATH="$dir" OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests/kernels/triton
