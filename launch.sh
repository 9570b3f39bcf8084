#!/bin/bash
# NVIDIA's recipe's own command, in a job that has this folder as its working folder:
#   DTYPE=<fp8/bf16> MODEL_SIZE=<8b/70b/405b> sbatch -A ${SLURM_ACCOUNT} -p ${SLURM_PARTITION} -N ${NUM_NODES} ./launch.sh
# More words are overrides of train.py. PYTHON names another interpreter than `python`.
#SBATCH --job-name=nemo_llama3.1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --ntasks-per-node=8
#SBATCH --time=1:00:00
set -euo pipefail
fail() { echo "launch.sh: $1" >&2; exit 2; }
[ -n "${DTYPE:-}" ] || fail "DTYPE: set it to fp8 or bf16"
[ -n "${MODEL_SIZE:-}" ] || fail "MODEL_SIZE: set it to 8b, 70b or 405b"
[ -n "${SLURM_JOB_NUM_NODES:-}" ] || fail "this is no Slurm job: sbatch -N NODES ./launch.sh"
gpus=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
experiment=llama31_${MODEL_SIZE,,}_${DTYPE,,}_${gpus}gpu
point=(scale=8gpu trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE")
if [ "${MODEL_SIZE,,}" = 405b ]; then
  point+=(data=mock)
  if [ -e "conf/experiment/$experiment.yaml" ]; then  # on fewer GPUs, of fewer layers
    point=(experiment="$experiment" precision="${DTYPE,,}" model=405b)
  fi
fi
unset JOB_TOTAL_GPUS
exec "${PYTHON:-python}" train.py entrypoint=nemo_24_09 "${point[@]}" "$@"
