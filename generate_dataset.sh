#!/bin/bash
# NVIDIA's recipe's `bash ./generate_dataset.sh`: Slurm jobs that prepare two shards of the Pile. More words are overrides.
cd "$(dirname "$0")" && exec "${PYTHON:-python}" prepare_data.py hydra/launcher=submitit_slurm "$@"
