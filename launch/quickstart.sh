#!/usr/bin/env bash
# From nothing to pictures on a CPU: train a tokenizer and a prior on digits, sample, evaluate.
# PYTHON chooses the interpreter of a new environment (default python3). Run again to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=${PYTHON:-python3}
runs=runs/mnist

if [[ ! -x $venv/bin/python ]]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "launch/quickstart.sh: Python 3.11 or newer is needed: set PYTHON=python3.11" >&2
    exit 2
  }
  "$python" -m venv "$venv"
fi
if ! cmp -s setup.py "$venv/installed"; then
  "$venv/bin/python" -m pip install --quiet --editable '.[quickstart]'
  cp setup.py "$venv/installed"
fi

run() { "$venv/bin/python" -m dar_jax.main "$@"; }
dar=(--config=configs/mnist.py:dar "--config.tokenizer=$runs/tokenizer/model" "--workdir=$runs/dar")

run --config=configs/mnist.py:tokenizer --workdir=$runs/tokenizer
run "${dar[@]}"
run "${dar[@]}" --mode=sample
run "${dar[@]}" --mode=evaluate

echo "Pictures: $PWD/$runs/dar/samples/{grid,previews}.png and $PWD/$runs/{tokenizer,dar}/images"
