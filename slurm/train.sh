#!/usr/bin/env bash
#SBATCH --job-name=mistral-dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Train on all GPUs of one node or several, through preemption, time limits and nodes that fail (docs/slurm.md).
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=8:00:00 slurm/train.sh RECIPE [section.field=value ...]
#   slurm/train.sh RECIPE ...      # looks at recipe, data and base first, then submits as slurm/site.env says
# Before, on the login node: mistral-dist fetch RECIPE && mistral-dist prepare RECIPE [the same overrides]
# 180 seconds before the time limit, when it is preempted, and on scancel --signal=USR1, the run saves and stops; then the job
# goes back into the queue, and the run goes on by itself. After a plain scancel it stays stopped: submit the same line again.
set -uo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec sed -n '/^set/q; s/^# //p' "$0"; fi
if [[ $# -eq 0 ]]; then sed -n '/^set/q; s/^# //p' "$0" >&2; exit 2; fi

trap 'early=yes' USR1 # before there is a run to ask
site=${SITE_ENV:-${SLURM_SUBMIT_DIR:-.}/slurm/site.env}
if [[ ! -f "$site" && -f "${0%/*}/site.env" ]]; then site=$(realpath "${0%/*}/site.env"); export SITE_ENV=$site; fi # from another folder
if [[ -n "${SITE_ENV:-}" && ! -f "$site" ]]; then echo "SITE_ENV=$site: no such file" >&2; exit 2; fi
trap 'echo "$site, line $LINENO: failed: $BASH_COMMAND" >&2; exit 2' ERR
set -a +u
# shellcheck source=/dev/null
if [[ -f "$site" ]]; then . <(cat "$site"; echo; echo true); fi # its last line may well be a test
set +a -u
trap - ERR
read -ra container <<<"${CONTAINER:-}"
if ! command -v "${container[0]:-mistral-dist}" >/dev/null; then
    echo "${container[0]:-mistral-dist}: not found; say in $site how a job finds the software (docs/slurm.md)" >&2
    exit 2
fi
if [[ ! "${MAX_RESTARTS:-20}" =~ ^[0-9]+$ ]]; then echo "$site: MAX_RESTARTS=$MAX_RESTARTS: a whole number is wanted" >&2; exit 2; fi

if [[ "${0##*/}" != slurm_script ]]; then # the name that SLURM gives to what it runs as a job
    ${container[@]+"${container[@]}"} mistral-dist train --check "$@" || exit
    if ! command -v sbatch >/dev/null; then echo "sbatch: not found; this is no machine from which SLURM takes jobs" >&2; exit 2; fi
    sbatch "$0" "$@" && exit
    echo "$0: sbatch did not take the job; account, partition, GPUs and time are named in $site (SBATCH_ACCOUNT=...) or to sbatch" >&2
    exit 2
fi

# compute nodes have no network, unless site.env says so; what is compiled on the way belongs on a node's own disk
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}" TRITON_CACHE_DIR="/tmp/mistral-dist-$UID/triton"
# srun no longer hands on by itself how many cores a task may use
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# one task on each node, which starts all its workers; where one ends, the others have two minutes to follow
# --export: whatever was left out on the way into the job, the tasks see what site.env says
srun --export=ALL --kill-on-bad-exit=0 --wait=120 ${container[@]+"${container[@]}"} mistral-dist train "$@" &
run=$!
warned="" cancelled=""
ask() { warned=yes; echo "$(date +%FT%T) USR1: the run is asked to save and stop"; kill -USR1 "$run" 2>/dev/null; }
trap 'trapped=yes; ask' USR1
# scancel, which reaches the run by itself; after a warning it is the time limit, and the save may still get through
trap 'trapped=yes; [[ -n "$warned" ]] || cancelled=yes' TERM
if [[ -n "${early:-}" ]]; then ask; fi
# bash runs a trap only while it waits, and that ends the wait: wait again for the run itself
while trapped=; wait "$run"; code=$?; [[ -n "$trapped" ]]; do :; done

# only now, after the save, may the job go back: a requeue ends everything that still runs
if [[ $code -eq 85 && -z "$cancelled" ]]; then
    if [[ ${SLURM_RESTART_COUNT:-0} -ge ${MAX_RESTARTS:-20} ]]; then
        echo "went back into the queue ${SLURM_RESTART_COUNT:-0} times (MAX_RESTARTS); submit the same line again to go on"
    else
        for pause in 10 10 0; do scontrol requeue "$SLURM_JOB_ID" && exit "$code"; sleep "$pause"; done # the controller may be away for a moment
        echo "this cluster does not let the job go back into the queue; submit the same line again to go on"
    fi
fi
exit "$code"
