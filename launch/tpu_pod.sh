#!/usr/bin/env bash
# Train on a TPU slice of one host or many; SPOT=1 takes spot capacity. Actions:
#   create, delete    the slice, at once; queue, unqueue: the same, when `state` says ACTIVE
#   run ARGUMENTS     copy HEAD, install, start dar_jax.main on all hosts, follow host 0
#   logs              follow host 0
# NAME=dar ZONE=us-east5-b TPU=v6e-16 RUNTIME=v2-alpha-tpuv6e SHARE=10.0.0.2:/runs \
#   bash launch/tpu_pod.sh [--dry-run] run --config=configs/imagenet_dar.py:l --workdir=runs/dar_l
# SHARE is an NFS export, mounted as runs/ on every host: the same `run` on a new slice resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
tpus() { run gcloud compute tpus "$@" --zone="$ZONE"; }
on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }
follow() { on 0 'tail -n +1 -F dar_jax/train.log'; }
for example in NAME=dar ZONE=us-east5-b TPU=v6e-16 RUNTIME=v2-alpha-tpuv6e SHARE=10.0.0.2:/runs; do
  variable=${example%%=*}
  [[ -n ${!variable:-} ]] || fail "$variable is not set, e.g. $example"
done
new=("$NAME" --accelerator-type="$TPU" ${SPOT:+--spot})
case ${1:-} in
  create) tpus tpu-vm create "${new[@]}" --version="$RUNTIME" ;;
  delete) tpus tpu-vm delete "$NAME" --quiet ;;
  queue) tpus queued-resources create "${new[@]}" --node-id="$NAME" --runtime-version="$RUNTIME" ;;
  state) tpus queued-resources describe "$NAME" --format='value(state.state)' ;;
  unqueue) tpus queued-resources delete "$NAME" --force --quiet ;;
  run) (($# > 1)) || fail "no arguments for dar_jax.main, e.g. --config=FILE --workdir=runs/NAME"
    run git archive --output=dar_jax.tar.gz HEAD
    tpus tpu-vm scp dar_jax.tar.gz "$NAME:" --worker=all
    on all "mkdir -p dar_jax/runs && tar -xzf dar_jax.tar.gz -C dar_jax && cd dar_jax \
&& sudo apt-get install -qq -y nfs-common && (mountpoint -q runs || sudo mount $SHARE runs) \
&& sudo chmod a+rwx runs && python3 -m pip install -q uv && python3 -m uv venv -q --python=3.12 \
--allow-existing && python3 -m uv pip install -q -e .[tpu]"
    on all "cd dar_jax; nohup .venv/bin/python -m dar_jax.main$(printf ' %q' "${@:2}") \
>train.log 2>&1 </dev/null &"
    follow ;;
  logs) follow ;;
  *) fail "unknown action '${1:-}'; known: create delete queue state unqueue run logs" ;;
esac
