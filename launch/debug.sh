#!/usr/bin/env bash
# Single-GPU debug mode: 20 steps of your own recipe in one process, looked at from all sides, in a run directory of their own.
#   launch/debug.sh RECIPE [section.field=value ...]
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec grep '^# ' "$0"; fi
if [[ $# -eq 0 ]]; then grep '^# ' "$0" >&2; exit 2; fi
exec mistral-dist train --debug "$@"
