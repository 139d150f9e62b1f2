#!/usr/bin/env bash
# Train on all GPUs of this machine (or, where there is none, in two CPU processes). Run the same line again to go on.
#   launch/multi_gpu.sh RECIPE [section.field=value ...]
#   GPUS=4 ZERO=3 launch/multi_gpu.sh RECIPE               # fewer cards, another ZeRO stage
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec grep '^# ' "$0"; fi
if [[ $# -eq 0 ]]; then grep '^# ' "$0" >&2; exit 2; fi
exec mistral-dist train ${GPUS:+--gpus "$GPUS"} ${ZERO:+--zero "$ZERO"} "$@"
