#!/usr/bin/env bash
# Train on a TPU slice of one host or many; SPOT=1 takes spot capacity. Actions:
#   create, delete    the slice, at once; queue, unqueue: the same, when `state` says ACTIVE
#   run ARGUMENTS     copy HEAD as a wheel, install, start dar_jax.main on all hosts, follow host 0
#   logs, errors      follow host 0; the last warnings and errors of all hosts, each with its name
# NAME=dar ZONE=us-east5-b TPU=v6e-16 RUNTIME=v2-alpha-tpuv6e bash launch/tpu_pod.sh [--dry-run] \
#   run --config=configs/imagenet_dar.py:l --workdir=gs://my-bucket/dar_l
# The same `run` on a new slice resumes. What fails is started again, but for mistakes (status 2).
# SHARE=10.0.0.2:/runs mounts that NFS export as runs/ on every host, for a --workdir=runs/NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh && source launch/wheel.sh
tpus() { run gcloud compute tpus "$@" --zone="$ZONE"; }
on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }
follow() { on 0 'tail -n +1 -F dar_jax/train.log'; }
for example in NAME=dar ZONE=us-east5-b TPU=v6e-16 RUNTIME=v2-alpha-tpuv6e; do
  variable=${example%%=*}; [[ -n ${!variable:-} ]] || fail "$variable is not set, e.g. $example"
done
new=("$NAME" --accelerator-type="$TPU" ${SPOT:+--spot})
case ${1:-} in
  create) tpus tpu-vm create "${new[@]}" --version="$RUNTIME" ;;
  delete) tpus tpu-vm delete "$NAME" --quiet ;;
  queue) tpus queued-resources create "${new[@]}" --node-id="$NAME" --runtime-version="$RUNTIME" ;;
  state) tpus queued-resources describe "$NAME" --format='value(state.state)' ;;
  unqueue) tpus queued-resources delete "$NAME" --force --quiet ;;
  run) (($# > 1)) || fail "no arguments for dar_jax.main, e.g. --config=FILE --workdir=gs://DIR"
    make_wheel
    tpus tpu-vm scp "$wheel" launch/requirements.lock "$NAME:" --worker=all
    on all "mkdir -p dar_jax/runs && mv ${wheel##*/} requirements.lock dar_jax && cd dar_jax && \
${SHARE:+sudo apt-get install -qq -y nfs-common && (mountpoint -q runs || \
sudo mount $SHARE runs) && sudo chmod a+rwx runs && }python3 -m pip install -q uv && \
python3 -m uv venv -q --python=3.12 --allow-existing && python3 -m uv pip install -q \
--reinstall-package=dar-jax -c requirements.lock './${wheel##*/}[tpu,gcs]'"
    on all "cd dar_jax; (trap '' HUP; for try in \$(seq 100); do .venv/bin/python -m dar_jax.main\
$(printf ' %q' "${@:2}") && break; ((\$? != 2)) || break; sleep 30; done) \
>train.log 2>&1 </dev/null &"; follow ;;
  logs) follow ;;
  errors) on all "grep -iE '^[EWF][01]|error' dar_jax/train.log | tail | sed \"s/^/\$HOSTNAME: /\"" ;;
  *) fail "unknown action '${1:-}'; known: create delete queue state unqueue run logs errors" ;;
esac
