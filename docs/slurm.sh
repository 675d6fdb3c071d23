#!/bin/bash
# A launch by Slurm, which goes on by itself after the end of its time and after a preemption:
#
#   sbatch docs/slurm.sh groupwise.recipes.grpo datarus run.shard_size=8
#
# The submission's folder, the run folder and the data lie on a disk that all hosts see. NAME is that of the run, RUNS the
# folder of all runs.
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
name=${NAME:-datarus} runs=${RUNS:-runs}
export HOSTS=$SLURM_JOB_NUM_NODES ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
ENDPOINT=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29400
export ENDPOINT

# Where one torchrun ends in failure the others need not wait for it. A run that was asked to stop leaves RUN/resume.
srun --kill-on-bad-exit=1 bash -c 'ADDRESS=$SLURMD_NODENAME exec bash docs/node.sh "$@"' node "$@" \
    run.folder="$runs" run.name="$name" || {
    [ -e "$runs/$name/resume" ] && scontrol requeue "$SLURM_JOB_ID"
}
