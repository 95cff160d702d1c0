#!/bin/bash
# A cohort of slides on several nodes of a Slurm cluster: one Dask scheduler, workers on all nodes, and the cohort itself.
#
#   sbatch scripts/cohort_slurm.sh table.csv OUT RUN [more options of 'monai-vslp cohort']
#
# Table, slides, RUN and OUT must lie on a file system that all nodes see. When the time is over, or a node is lost, submit the
# same again: it goes on where it stopped. Adapt the lines below to the cluster, and for GPUs the two that are marked.
#SBATCH --job-name=monai-vslp-cohort
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@120
##SBATCH --gpus-per-node=1  # GPU: one '#' less

set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: sbatch $0 TABLE OUT RUN [options of 'monai-vslp cohort']" >&2
    exit 2
fi
table=$1 output=$2 run=$3
shift 3

# The environment with monai_vslp; 'monai-vslp' and 'dask' must be found in it on every node.
environment=${MONAI_VSLP_VENV:-$PWD/.venv}
source "$environment/bin/activate"

# Processes per node with one thread each; each holds one slide at a time, so memory per process is what bounds them.
workers_per_node=${WORKERS_PER_NODE:-8}
memory_per_worker=${MEMORY_PER_WORKER:-7GB}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=2  # workers that one slide may take with it
export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0

mkdir -p "$output"
scheduler_file=$output/.scheduler-$SLURM_JOB_ID.json
trap 'rm -f "$scheduler_file"; kill $(jobs -p) 2>/dev/null || true' EXIT

# The scheduler, on the first node.
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=1 -w "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \
    dask scheduler --port 0 --no-dashboard --scheduler-file "$scheduler_file" &
for _ in $(seq 120); do
    [[ -s $scheduler_file ]] && break
    sleep 1
done

# Workers, on every node. GPU: 'dask cuda worker' (dask-cuda) instead, without --nworkers, for one per GPU.
srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    dask worker --scheduler-file "$scheduler_file" --nworkers "$workers_per_node" --nthreads 1 \
    --memory-limit "$memory_per_worker" --local-directory "${TMPDIR:-/tmp}" --death-timeout 120 --no-dashboard &

monai-vslp --quiet cohort "$table" --output "$output" --model "$run" --scheduler-file "$scheduler_file" "$@" &
cohort=$!
trap 'kill -INT $cohort' INT
status=0
wait $cohort || status=$?
if kill -0 $cohort 2>/dev/null; then  # the signal ended the wait, not the cohort
    status=0
    wait $cohort || status=$?
fi
exit $status
