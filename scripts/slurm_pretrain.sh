#!/usr/bin/env bash
#SBATCH --job-name=albef-pretrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# one task per node: torchrun, which starts a process for each GPU
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# the job is requeued when its time is up, when it is preempted or when a node fails; it appends to the same log
#SBATCH --requeue
#SBATCH --open-mode=append
# signal this script 180 seconds before the end: enough for an iteration and a checkpoint
#SBATCH --signal=B:TERM@180

# Pre-train on several nodes, requeued at each time limit. Submit it in the repository's folder. All nodes must see this folder,
# the data and output_dir:
#
#     sbatch [--nodes=4 ...] scripts/slurm_pretrain.sh [arguments of Pretrain.py]
#
# Environment variables: PYTHON, the interpreter (default: python); GPUS, processes per node (default: all GPUs of the job);
# MAX_RESTARTS, restarts after a process has died (default: 3). To save and end without a requeue: scontrol update JobId=ID
# Requeue=0, then scancel --signal=TERM ID. scancel ID alone does not requeue either.

cd "${SLURM_SUBMIT_DIR:?is not set, start this script with sbatch}" || exit 2
if [[ ! -f Pretrain.py || ! -f scripts/node.py ]]; then
    echo "error: $PWD is not the repository's folder: call sbatch there" >&2
    exit 2
fi

# --resume is for jobs that are submitted a second time; a requeued job continues by itself. It comes last, so that no argument
# is taken for its value. With --checkpoint it would resume the run that was saved in that file.
case " $* " in
*" --checkpoint"*) ;;
*) set -- "$@" --resume ;;
esac

nodes=$SLURM_JOB_NUM_NODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# jobs on the same node have different ids; systems assign ports from 32768 on by themselves
port=$((10000 + SLURM_JOB_ID % 20000))

# GPUs and data workers do the work
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun kills processes that take longer than this to save and end (default: 30 s); less than the 180 above
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# Send the signal to the tasks, not to srun, which kills its tasks at once on SIGTERM.
stopping='' interrupted=''
trap 'stopping=yes interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# srun does not inherit --cpus-per-task. If torchrun ends on a node, the other nodes have a minute to notice: killing them at
# once would hide their exit codes.
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-python}" scripts/node.py --nnodes="$nodes" --nproc_per_node="${GPUS:-gpu}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${hosts%%$'\n'*}:$port" \
    Pretrain.py "$@" &
step=$!

# a signal ends bash's `wait`, but not the step
status=''
until [[ $status ]]; do
    interrupted=''
    wait "$step"
    code=$?
    [[ $interrupted ]] || status=$code
done

# 143: SIGTERM ended the run, perhaps without a signal to this script, since preemption sends SIGTERM to the tasks only. 0 is a
# complete run, 2 an input error, which a restart would repeat.
if [[ $status != 0 && $status != 2 && ($stopping || $status == 143) ]]; then
    # scancel sends SIGTERM too; then the job is no longer RUNNING, and must not be requeued
    if [[ $(scontrol show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then
        echo "job $SLURM_JOB_ID was ended with status $status and is not requeued; submit it again to continue"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID is requeued and continues from the last save"
    else
        echo "job $SLURM_JOB_ID could not be requeued; submit it again to continue" >&2
    fi
fi
exit "$status"
