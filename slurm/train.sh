#!/usr/bin/env bash
#SBATCH --job-name=mistral-dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Train on all GPUs of one node, through preemption and time limits.
#   sbatch --gres=gpu:8 --time=8:00:00 slurm/train.sh RECIPE [section.field=value ...]
# Before, on the login node: mistral-dist fetch RECIPE && mistral-dist prepare RECIPE [the same overrides]
# 180 seconds before the time limit (and on preemption, where the site sends a signal first) the run saves and stops
# (exit code 85); then this script puts the job back into the queue, and the run goes on by itself. More than one node: not here yet.
set -uo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec sed -n '/^set/q; s/^# //p' "$0"; fi
if [[ $# -eq 0 ]]; then sed -n '/^set/q; s/^# //p' "$0" >&2; exit 2; fi

# bash runs a trap only while it waits, so the run is in the background
mistral-dist train "$@" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null' USR1 TERM
wait "$run"; code=$?
# a signal interrupts `wait`: wait again for the run itself
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done

# only now, after the save, may the job go back: a requeue ends everything that still runs
if [[ $code -eq 85 && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_RESTARTS:-20} ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
