#!/usr/bin/env bash
# From nothing to pictures on a CPU: trains a tokenizer and a prior on digits, samples, evaluates.
#   bash launch/quickstart.sh [--dry-run]
# About 20 minutes on two cores, after the installation into .venv. Run it again to resume.
# PYTHON chooses the interpreter of a new environment (default python3).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh` or `zsh`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
(($# == 0)) || fail "unknown argument '$1': it takes --help or --dry-run"

runs=runs/mnist
dar=(--config=configs/mnist.py:dar "--config.tokenizer=$runs/tokenizer/model" "--workdir=$runs/dar")

make_environment .venv quickstart
stage() { say $'\n'"$1"; run .venv/bin/python -m dar_jax.main "${@:2}"; }

stage "1 of 4: tokenizer, about 15 minutes" \
  --config=configs/mnist.py:tokenizer "--workdir=$runs/tokenizer"
stage "2 of 4: prior, about 3 minutes" "${dar[@]}"
stage "3 of 4: pictures, less than a minute" "${dar[@]}" --mode=sample
stage "4 of 4: evaluation, about 2 minutes" "${dar[@]}" --mode=evaluate

say "
Pictures: $PWD/$runs/dar/samples/{grid,previews}.png and $PWD/$runs/{tokenizer,dar}/images
What to type now:
  source .venv/bin/activate
  dar-jax ${dar[*]} --mode=sample --config.sample.labels=3,5
  pip install -e '.[demo]'
  dar-jax ${dar[*]} --mode=demo"
