#!/usr/bin/env bash
# From nothing to a fine-tuned, evaluated model: the demo, on any machine.
#   launch/quickstart.sh [section.field=value ...]
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec grep '^# ' "$0"; fi
exec mistral-dist demo "$@"
