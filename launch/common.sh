# shellcheck shell=bash
# What the scripts share: they source it at the top of the checkout. With --help a script prints
# its head, with --dry-run the commands that it would run.
script=launch/${BASH_SOURCE[1]##*/}
dry_run=
case ${1:-} in
  -h | --help) sed -n '2,/^set/s/^# //p' "$script"; exit ;;
  --dry-run) dry_run=1; shift ;;
esac

# Before any command that an interrupt made fail is taken for something else.
trap 'echo "$script: stopped; run it again to go on" >&2; exit 130' INT
fail() { echo "$script: $1" >&2; exit 2; }
say() { if [[ -z $dry_run ]]; then echo "$1"; fi; }
# Runs a command and, if it failed other than by an interrupt, says what it said of that.
try() {
  local errors
  { errors=$(run "$@" 2>&1 >&3); } 3>&1 || { echo "$errors" >&2; return 1; }
}
run() { if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

# make_environment DIRECTORY EXTRA: a virtual environment, made anew if making it was interrupted.
make_environment() {
  local python=${PYTHON:-python3}
  if cmp -s setup.py "$1/installed"; then return; fi
  if [[ -e $1 && ! -e $1.unfinished ]]; then
    "$1/bin/python" -m pip --version &>/dev/null ||
      fail "$1 is not a virtual environment with pip: remove it"
  else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "Python 3.11 or newer is needed, $python is not: set PYTHON=python3.11"
    run touch "$1.unfinished"
    try "$python" -m venv --clear "$1" ||
      fail "$python made no environment: on Debian and Ubuntu, apt install python3-venv"
  fi
  say "Installing into $1, which takes some minutes"
  try "$1/bin/python" -m pip install --quiet --editable ".[$2]"
  run cp setup.py "$1/installed"
  run rm -f "$1.unfinished"
}
