#!/usr/bin/env bash
#SBATCH --job-name=mistral-dist-serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Serve a run or an exported model on one node, to whoever has the key; the job's log says where (docs/serving.md).
#   export VLLM_API_KEY=$(openssl rand -hex 24)
#   sbatch --gpus=1 --cpus-per-gpu=8 --time=8:00:00 slurm/serve.sh RUN|EXPORT [--also RUN] [--engine /path/to/vllm] [-- engine's arguments]
#   slurm/serve.sh RUN|EXPORT ...  # looks at the model first, then submits as slurm/site.env says
set -uo pipefail
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then exec sed -n '/^set/q; s/^# //p' "$0"; fi
if [[ $# -eq 0 ]]; then sed -n '/^set/q; s/^# //p' "$0" >&2; exit 2; fi

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

if [[ "${0##*/}" != slurm_script ]]; then # the name that SLURM gives to what it runs as a job
    ${container[@]+"${container[@]}"} mistral-dist serve --check --host 0.0.0.0 "$@" || exit
    # not as many as a training takes
    if [[ -n "${SBATCH_GPUS_PER_NODE:-}" ]]; then export SBATCH_GPUS_PER_NODE="${SERVE_GPUS:-1}"; fi
    if [[ -n "${SBATCH_GRES:-}" ]]; then export SBATCH_GRES="${SBATCH_GRES%:[0-9]*}:${SERVE_GPUS:-1}"; fi
    if ! command -v sbatch >/dev/null; then echo "sbatch: not found; this is no machine from which SLURM takes jobs" >&2; exit 2; fi
    sbatch "$0" "$@" && exit
    echo "$0: sbatch did not take the job; account, partition, GPUs and time are named in $site (SBATCH_ACCOUNT=...) or to sbatch" >&2
    exit 2
fi

port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node have two
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
exec srun --export=ALL --nodes=1 --ntasks=1 ${container[@]+"${container[@]}"} mistral-dist serve --host 0.0.0.0 --port "$port" "$@"
