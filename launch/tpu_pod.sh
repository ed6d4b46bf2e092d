#!/usr/bin/env bash
# A command on every host of a TPU pod slice, over ssh.
#
#   launch/tpu_pod.sh --name my-pod --zone us-east5-a -- \
#       composer train --config sd15_composer --workdir /mnt/shared/runs/sd15 \
#       --config.source=cache:/mnt/shared/cache
#
# The hosts have the project installed (pip install 'composer-jax[tpu]') and the workdir mounted at
# one path, by NFS or gcsfuse. COMPOSER_PROCESSES=auto lets JAX find the other hosts. gcloud must be
# logged in. When one host's command ends, so do the others': JAX's heartbeat takes 30 s. Send the
# same line again and training goes on; --restarts N does so up to N times.
#
#   --name NAME --zone ZONE [--project PROJECT] [--restarts N] [--dry-run] -- COMMAND...

set -euo pipefail

name="" zone="" project="" restarts=0 dry=""
usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  case "$1" in
    --name | --zone | --project | --restarts)
      [ $# -gt 1 ] || usage
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run)
      dry="echo"
      shift
      ;;
    --)
      shift
      break
      ;;
    *)
      echo "tpu_pod.sh: no option $1" >&2
      usage
      ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ $# -gt 0 ] || usage

remote="COMPOSER_PROCESSES=auto $(printf '%q ' "$@")"
flags=(--zone "$zone" --worker all)
[ -z "$project" ] || flags+=(--project "$project")
for attempt in $(seq 0 "$restarts"); do
  [ "$attempt" -eq 0 ] || echo "tpu_pod.sh: restart $attempt of $restarts" >&2
  code=0
  $dry gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" --command "$remote" || code=$?
  # 2 is a mistake in the command: it would only come again
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then break; fi
done
exit "$code"
