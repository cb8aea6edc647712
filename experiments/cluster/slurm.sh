#!/bin/bash
#SBATCH --job-name=ads
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One process per GPU; JAX reads the rest from Slurm. Five minutes before the time limit the processes get SIGTERM: the
# run saves and exits with 143, and the job is queued again. After a preemption Slurm does that by itself.
# srun does not take over the number of cores by itself: a process would decode pictures and compile on one of them.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun antgmm compress recipe.toml --run /shared/runs/ads --mesh data=2,fsdp=8 --coordinator auto --log tensorboard
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
