#!/bin/bash
#SBATCH --nodes=1-2
#SBATCH --ntasks-per-node=1
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch docs/slurm/job.sh RUN SETTINGS, as: sbatch docs/slurm/job.sh runs/big --model opt-1.3b
# One task a GPU (--gpus-per-task=1 where the cluster counts them). With --array=1-3 a run and a seed for each.
run=$1${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
shift
set -- "$@" ${SLURM_ARRAY_TASK_ID:+--set seed=$SLURM_ARRAY_TASK_ID}
export RLHF_CHAT_GRACE=240 # seconds for the checkpoint, of the 300 above
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TORCH_EXTENSIONS_DIR=/tmp/$USER-extensions TRITON_CACHE_DIR=/tmp/$USER-triton # of the node
tasks=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)) # of this start: after a requeue the nodes may be others
for script in training/step1_sft/main.py training/step2_reward/main.py training/step3_rlhf/main.py; do
    srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$tasks python $script "$run" "$@"
    code=$?
    if [ $code = 143 ]; then # ended by SIGTERM, with a checkpoint
        exec scontrol requeue "$SLURM_JOB_ID"
    elif [ $code != 0 ]; then
        exit $code
    fi
done
