#!/usr/bin/env bash
# Train on several machines: the same line on each, with its own node rank. Run the same lines again to go on.
#   launch/multi_node.sh RECIPE [section.field=value ...] --nodes 2 --node-rank 0 --main-address gpu1:29500
#   NODES=2 NODE_RANK=1 MAIN_ADDRESS=gpu1:29500 launch/multi_node.sh RECIPE      # the same by the environment
#   srun --nodes 2 --ntasks-per-node 1 launch/multi_node.sh RECIPE               # in a SLURM job all of it is found
#   GPUS=4 ZERO=3 ... launch/multi_node.sh RECIPE          # fewer cards on each machine, another ZeRO stage
# Before, once, where all machines see it: mistral-dist fetch RECIPE && mistral-dist prepare RECIPE [the same overrides]
set -euo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec grep '^# ' "$0"; fi
if [[ $# -eq 0 ]]; then grep '^# ' "$0" >&2; exit 2; fi
if [[ -z "${NODES:-}${SLURM_STEP_ID:-}" && " $* " != *" --nodes"[\ =]* ]]; then
    echo "$0: how many machines? Add --nodes 2 --node-rank 0 --main-address HOST (docs/slurm.md for SLURM); for one: multi_gpu.sh" >&2; exit 2
fi
exec mistral-dist train ${GPUS:+--gpus "$GPUS"} ${ZERO:+--zero "$ZERO"} ${NODES:+--nodes "$NODES"} \
    ${NODE_RANK:+--node-rank "$NODE_RANK"} ${MAIN_ADDRESS:+--main-address "$MAIN_ADDRESS"} "$@"
