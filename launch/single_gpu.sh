#!/usr/bin/env bash
# Train on one GPU (or, where there is none, in one CPU process). Run the same line again to go on.
#   launch/single_gpu.sh RECIPE [section.field=value ...]
#   CUDA_VISIBLE_DEVICES=1 launch/single_gpu.sh RECIPE     # another card than the first
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec grep '^# ' "$0"; fi
if [[ $# -eq 0 ]]; then grep '^# ' "$0" >&2; exit 2; fi
exec mistral-dist train --processes 1 "$@"
