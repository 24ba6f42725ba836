#!/usr/bin/env bash
#SBATCH --job-name=atelier
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.txt
#
# sbatch cluster/slurm.sh train_ldm.py -cfg configs/wikiart256_ldm.json
# sbatch --nodes=2 --export=ALL,STAGE=datasets/mine64 cluster/slurm.sh ddpm_accelerate.py -cfg configs/landscape64_ddpm.json \
#   --set data.source=packed --set data.path=datasets/mine64
#
# A task for each GPU. Three minutes before the time is over (sbatch --signal=B:USR1@600: ten; USR2 does, too) each process gets
# USR1, which every run takes as SIGTERM whatever `stop_signal` its config names, saves and stops, and the job is queued again. A
# preempted one stops in the same way, and waits for Slurm to queue it again. STAGE is a packed data set (prepare_data.py pack),
# that of the config's data.path: each node copies it to its own disk first. runs/ lies on a file system that all nodes see. A log
# for each rank: logs/NAME_JOB_rankN.txt.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
mkdir -p logs
# shellcheck source=../setup.sh
source ./setup.sh || exit 1

more=()
if [ -n "${STAGE:-}" ]; then
    named=$(printf '%s' "$USER$(realpath "$STAGE")" | cksum | cut -d ' ' -f 1)
    copy=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/atelier_${named}_$(basename "$STAGE")
    # Whole or absent, and anew where the data set was packed anew.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
        cmp -s "$1/manifest.json" "$2/manifest.json" && exit 0
        rm -rf "$2" "$2.part" && cp -r "$1" "$2.part" && mv "$2.part" "$2"' stage "$STAGE" "$copy" || exit 1
    more=(--set "data.path=$copy")
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
logs=logs/${SLURM_JOB_NAME}_${SLURM_JOB_ID}_rank
warned= step=
trap 'warned=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1 USR2 # srun passes it on
began=$(cat "${logs}0.txt" 2>/dev/null | wc -c) # of an earlier start
# A rank that is done with stopping does not end those that still save; one that has died ends the others by their time limit.
srun --kill-on-bad-exit=0 --open-mode=append --output="${logs}%t.txt" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python "$@"' \
    rank "$@" "${more[@]}" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
    wait "$step"
    status=$?
done
if [ "$status" -ne 0 ] && [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ] && tail -c "+$((began + 1))" "${logs}0.txt" | grep -q "stopped at step"; then
    sleep "${GRACE:-600}" # a job that ends by itself would not count as preempted, and would not be queued again
fi
exit "$status"
