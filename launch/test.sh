#!/usr/bin/env bash
# Lint, types and tests in a virtual environment of their own: bash launch/test.sh [pytest arguments]
# PYTHON chooses the interpreter of a new environment (default python3), VENV its directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv-test}
python=${PYTHON:-python3}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

fail() { echo "launch/test.sh: $1" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or newer is needed, $python is not: set PYTHON=python3.11"
if [[ ! -x $venv/bin/python ]]; then
  "$python" -m venv "$venv"
elif [[ -n ${PYTHON:-} && $(version "$python") != $(version "$venv/bin/python") ]]; then
  fail "$venv has Python $(version "$venv/bin/python"), PYTHON is $(version "$python"): remove it"
fi
if ! cmp -s setup.py "$venv/installed"; then
  "$venv/bin/python" -m pip install --quiet --editable '.[test]'
  cp setup.py "$venv/installed"
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$venv/bin/pyright" --pythonpath "$venv/bin/python"  # asks no network
exec "$venv/bin/python" -m pytest "$@"
