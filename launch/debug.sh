#!/usr/bin/env bash
# Single-GPU debug mode: 20 steps of your own recipe in one process, in a run directory of their own.
#   launch/debug.sh RECIPE [section.field=value ...]
set -euo pipefail
if [[ $# -eq 0 || "$1" == "-h" || "$1" == "--help" ]]; then exec grep '^#' "$0"; fi
exec mistral-dist train --debug "$@"
