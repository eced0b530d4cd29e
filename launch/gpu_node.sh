#!/usr/bin/env bash
# Train on all GPUs of one machine, which one process drives; the arguments are dar_jax.main's.
#   bash launch/gpu_node.sh [--dry-run] --config=configs/imagenet_dar.py:l --workdir=runs/dar_l
# VENV is the virtual environment to use (default .venv-gpu, made if there is none): for CUDA 13,
# which takes driver 580 or newer; with EXTRA=gpu12 for CUDA 12, driver 525 or newer. SIGTERM
# saves and stops; after that or anything else, the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
(($# > 0)) || fail "no arguments for dar_jax.main, e.g. --config=FILE --workdir=runs/NAME"
venv=${VENV:-.venv-gpu}
if [[ ! -x $venv/bin/python || -e $venv.unfinished ]]; then
  make_environment "$venv" "${EXTRA:-gpu}"
fi

XLA_FLAGS="$(sed '/^#/d' launch/gpu_flags.txt | tr '\n' ' ')${XLA_FLAGS:-}"
export XLA_FLAGS
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95} # JAX takes 0.75
run exec "$venv/bin/python" -m dar_jax.main "$@"
