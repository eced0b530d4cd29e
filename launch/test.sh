#!/usr/bin/env bash
# Lint, types and tests in a virtual environment of their own, .venv-test:
#   bash launch/test.sh [--dry-run] [pytest arguments]
# PYTHON chooses the interpreter of a new environment (default python3), VENV its directory.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh` or `zsh`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
venv=${VENV:-.venv-test}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
if [[ -n ${PYTHON:-} && -x $venv/bin/python && ! -e $venv.unfinished ]] &&
  [[ $(version "$PYTHON") != $(version "$venv/bin/python") ]]; then
  fail "$venv has Python $(version "$venv/bin/python"), PYTHON is $(version "$PYTHON"): remove it"
fi
make_environment "$venv" test

run "$venv/bin/ruff" check .
run "$venv/bin/ruff" format --check .
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # asks no network for a newer version
run "$venv/bin/pyright" --pythonpath "$venv/bin/python"
run exec "$venv/bin/python" -m pytest "$@"
