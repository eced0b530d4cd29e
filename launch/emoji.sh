#!/usr/bin/env bash
# Emoji in colour on a CPU: fetches pictures, trains a tokenizer and a prior, samples, evaluates.
#   bash launch/emoji.sh [--dry-run]
# Longer than the quickstart, after the installation into .venv-emoji. Run it again to resume. The
# pictures, Microsoft's and under the MIT licence, come with npm, or without it from the registry
# whose address is in npm_config_registry. PYTHON chooses the interpreter (default python3).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh` or `zsh`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
(($# == 0)) || fail "unknown argument '$1': it takes --help or --dry-run"

runs=runs/emoji package=@lobehub/fluent-emoji-3d version=1.1.0
part=$runs/unfinished file=fluent-emoji-3d-$version.tgz environment=.venv-emoji
dar=(--config=configs/emoji.py:dar_32 "--workdir=$runs/dar_32")

make_environment $environment emoji,evaluate
if [[ ! -e $runs/emoji.tgz ]]; then
  run mkdir -p "$part"
  if command -v npm >/dev/null; then
    run npm pack --silent --pack-destination "$part" "$package@$version"
  else
    url=${npm_config_registry:-}
    [[ $url ]] || fail "npm is needed, or npm_config_registry=URL, a registry of its packages"
    run curl --fail --silent --show-error --location --output "$part/lobehub-$file" \
      "${url%/}/$package/-/$file"
  fi
  run mv "$part/lobehub-$file" "$runs/emoji.tgz"
fi
stage() { say $'\n'"$1"; run $environment/bin/python -m dar_jax.main "${@:2}"; }

stage "1 of 5: tokenizer" --config=configs/emoji.py:tokenizer_32 "--workdir=$runs/tokenizer_32"
stage "2 of 5: codes, once for all steps" "${dar[0]}" --mode=cache --config.cache.kind=codes "--workdir=$runs/codes"
stage "3 of 5: prior" "${dar[@]}" --config.data.source=codes "--config.data.path=$runs/codes"
stage "4 of 5: pictures" "${dar[@]}" --mode=sample
stage "5 of 5: evaluation" "${dar[@]}" --mode=evaluate

say "
Pictures: $PWD/$runs/dar_32/samples/{grid,previews}.png and $PWD/$runs/{tokenizer,dar}_32/report.html
To draw more: $environment/bin/dar-jax ${dar[*]} --mode=sample --config.sample.labels=animal-mammal"
