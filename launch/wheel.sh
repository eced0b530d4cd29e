# shellcheck shell=bash
# make_wheel: the package of HEAD, as $wheel.
make_wheel() {
  local version
  version=$(sed -n 's/^ *version="\(.*\)",$/\1/p' setup.py)
  wheel=dist/dar_jax-$version-py3-none-any.whl
  say "Building $wheel"
  run "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir=dist "git+file://$PWD"
}
