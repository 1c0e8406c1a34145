#!/usr/bin/env bash
# One launcher per node, joined by torchrun's rendezvous on the first; what the .sbatch files here start. Not called by hand.
#
#   PYTHON          interpreter on every node          (.venv/bin/python)
#   NPROC_PER_NODE  processes per node: a number or gpu  (gpu: one for each GPU)
#   SRUN_OPTIONS    more options of srun, such as "--container-image=registry.example.com/ddpm_ema:0.1.0"
#   MAX_REQUEUES    how often a job may go back into the queue by itself  (1000)
#   MAX_IDLE        how often in a row without anything new in the run directory  (3)
#
# Exit code 75 means "saved, start me again", and 143 "stopped before it could catch a signal": the job is put back into the
# queue under its own id, and appends to its log.
# 2 (bad settings), 3 (diverged) and crashes end it. A node that fails is Slurm's to requeue (--requeue).
set -euo pipefail

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(head -n 1 <<<"$nodes")
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not share a port
NPROC_PER_NODE=${NPROC_PER_NODE:-gpu}
PYTHON=${PYTHON:-.venv/bin/python}
export MASTER_ADDR MASTER_PORT NPROC_PER_NODE PYTHON
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer inherits it
read -r -a srun_options <<<"${SRUN_OPTIONS:-}"

# $SLURM_NODEID is each task's own, so the inner shell must expand it. A node that is done must not have the others killed.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=0 "${srun_options[@]}" bash -c '
    exec "$PYTHON" -m ddpm_ema.launch --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
        --nproc-per-node "$NPROC_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"
' launch "$@" &
step=$!

# Slurm signals the tasks by itself. A TERM that reaches only this shell is passed on to them, and not through srun, which
# would kill them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # the wait was interrupted by the trap, and the tasks are saving
    code=0
    wait "$step" || code=$?
done

# Where the program with its arguments writes: --output-dir, where scores of a read-only run go, a run as first argument, what the
# settings file names, or the default for a folder of images.
run_directory() {
    local previous="" config="" data="" found="" argument
    for argument; do
        case $previous in
            --output-dir | --output_dir | --evaluation.output) echo "$argument" && return ;;
            --config) config=$argument ;;
            --data.path) data=$argument ;;
        esac
        case $argument in
            --output-dir=* | --output_dir=* | --evaluation.output=*) echo "${argument#*=}" && return ;;
            --config=*) config=${argument#*=} ;;
            --data.path=*) data=${argument#*=} ;;
        esac
        previous=$argument
    done
    if [[ -d ${2:-} ]]; then
        echo "$2"
    elif [[ -f $config ]]; then
        # YAML may quote the name, and a comment may follow it.
        found=$(sed -nE "s/^output_dir[[:space:]]*:[[:space:]]*//p" "$config" |
            sed -E -e "s/^\"([^\"]*)\".*/\\1/" -e t -e "s/^'([^']*)'.*/\\1/" -e t -e "s/[[:space:]]+#.*//; s/[[:space:]]*\$//")
        echo "${found:-runs/ddpm}"
    elif [[ -n $data ]]; then
        echo "runs/$(basename "$(realpath -m "$data")")"
    fi
}

# A job that stops again and again with nothing new saved would go round for ever. What was newest, and how often it still was:
memory=${SLURM_SUBMIT_DIR:-.}/.requeued-$SLURM_JOB_ID
run=$(run_directory "$@")
newest=$(find "$run/checkpoints" "$run/scores" -name '*.safetensors' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1) || true
idle=0
if [[ -f $memory && $(tail -n +2 "$memory") == "$newest" ]]; then idle=$(($(head -n 1 "$memory") + 1)); fi

if [[ $code != 75 && $code != 143 ]]; then
    rm -f "$memory"
elif ((idle >= ${MAX_IDLE:-3})); then
    echo "job $SLURM_JOB_ID stopped $((idle + 1)) times in a row with nothing new in '$run'; not put back into the queue: read the log above"
    rm -f "$memory"
elif ((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-1000})); then
    printf '%s\n%s\n' "$idle" "$newest" >"$memory"
    echo "job $SLURM_JOB_ID stopped; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
