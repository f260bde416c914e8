#!/bin/bash
# LLaMA2-7B on two nodes of eight GPUs: sbatch docs/launch/slurm.sh, in a checkout that all nodes see.
#SBATCH --job-name=lte
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=lte-%j.log

# One task a GPU: JAX gives each task the GPU of its number on the node, and finds the others.
# SIGTERM, five minutes before the end, saves the state; submitted again, the job goes on from it.
srun --kill-on-bad-exit=1 python train.py --config=configs/llama7b.py --workdir=runs/llama7b
