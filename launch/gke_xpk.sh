#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster: submit an xpk workload that runs dar_jax.main on all hosts.
#   NAME=dar-l CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b TPU=v6e-16 SLICES=2 \
#     IMAGE=us-docker.pkg.dev/my-project/images/dar_jax:tpu bash launch/gke_xpk.sh [--dry-run] \
#     --config=configs/imagenet_dar.py:l --workdir=gs://my-bucket/dar_l --config.mesh.dcn_data=2
# IMAGE is launch/Dockerfile built with EXTRA=tpu,gcs. Without a bucket, all hosts must share runs/:
# `xpk storage attach` with --type=gcpfilestore --auto-mount=true --mount-point=/dar_jax/runs.
# A preempted run saves and ends with status 143; that, and what else ends it, xpk restarts: it
# resumes. With `errors` for the arguments: the last day's warnings and errors of all hosts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
for example in NAME=dar-l CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b TPU=v6e-16 \
  IMAGE=us-docker.pkg.dev/my-project/images/dar_jax:tpu; do
  variable=${example%%=*}
  [[ -n ${!variable:-} ]] || fail "$variable is not set, e.g. $example"
done
(($# > 0)) || fail "no arguments for dar_jax.main, e.g. --config=FILE --workdir=gs://BUCKET/NAME"

if [[ $1 == errors ]]; then
  run gcloud logging read --project="$PROJECT" --freshness=1d --order=asc \
    --format='value(resource.labels.pod_name,textPayload)' "resource.type=k8s_container AND \
resource.labels.cluster_name=$CLUSTER AND resource.labels.pod_name:$NAME AND \
textPayload=~\"^[EWF][01]|[Ee]rror\""
  exit
fi
# `exec`: the signal that announces a preemption must reach Python, not a shell around it.
run xpk workload create --workload="$NAME" \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --max-restarts=100 --termination-grace-period-seconds=300 \
  --command="exec python -m dar_jax.main$(printf ' %q' "$@") --preempted_status=143"
