#!/usr/bin/env bash
#SBATCH --job-name=albef-pretrain
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# one task a node: torchrun, which starts a process for each GPU
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# the job may go back to the queue, when its time is up, it is preempted or a node fails, and then goes on in the same log
#SBATCH --requeue
#SBATCH --open-mode=append
# seconds before the end at which this script hears of it: enough for an iteration and a save
#SBATCH --signal=B:TERM@180

# Pre-training on several nodes, for as many time limits as it takes. From the repository's folder, which all nodes must see as
# well as data and output_dir:
#
#     sbatch [--nodes=4 ...] scripts/slurm_pretrain.sh [arguments of Pretrain.py]
#
# In the environment: PYTHON, the interpreter (python); GPUS, processes a node (all GPUs of the job); MAX_RESTARTS, how often the
# processes are started again after one has died (3). To save and end for good: scontrol update JobId=ID Requeue=0, and then
# scancel --signal=TERM ID. scancel ID alone does not requeue either.

cd "${SLURM_SUBMIT_DIR:?is not set, start this script with sbatch}" || exit 2
if [[ ! -f Pretrain.py || ! -f scripts/node.py ]]; then
    echo "error: $PWD is not the repository's folder: call sbatch there" >&2
    exit 2
fi

# --resume is for jobs submitted a second time; a requeued one goes on by itself. It comes last, where no argument can be taken
# for its value. With --checkpoint it would mean the run that was saved in that file.
case " $* " in
*" --checkpoint"*) ;;
*) set -- "$@" --resume ;;
esac

nodes=$SLURM_JOB_NUM_NODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# jobs on the same node have other numbers; systems give away ports from 32768 on by themselves
port=$((10000 + SLURM_JOB_ID % 20000))

# the work is done by GPUs and data workers
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun kills processes that take longer than this to save and end, by default 30 s; less than the 180 above
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

# The signal is for the tasks, not for srun, which at a SIGTERM kills its tasks at once.
stopping='' interrupted=''
trap 'stopping=yes interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# srun does not take over --cpus-per-task. If one node's torchrun ends, the others have a minute to find out for themselves; to
# kill them at once would hide with which status they end.
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    "${PYTHON:-python}" scripts/node.py --nnodes="$nodes" --nproc_per_node="${GPUS:-gpu}" --max-restarts="${MAX_RESTARTS:-3}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${hosts%%$'\n'*}:$port" \
    Pretrain.py "$@" &
step=$!

# a signal ends bash's `wait`, not what it waits for
status=''
until [[ $status ]]; do
    interrupted=''
    wait "$step"
    code=$?
    [[ $interrupted ]] || status=$code
done

# 143: the run was told to end. That may be the first this script hears of it, since preemption begins with a SIGTERM for the
# tasks alone. 0 is a complete run, 2 an input error, which the next start would meet again.
if [[ $status != 0 && $status != 2 && ($stopping || $status == 143) ]]; then
    # scancel, too, begins with SIGTERM; then the job is no longer running, and its owner does not want it back
    if [[ $(scontrol show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then
        echo "job $SLURM_JOB_ID was ended with status $status and is not requeued; submit it again to go on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID is requeued and goes on from the last save"
    else
        echo "job $SLURM_JOB_ID could not be requeued; submit it again to go on" >&2
    fi
fi
exit "$status"
