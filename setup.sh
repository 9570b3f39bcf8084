#!/bin/bash
# NVIDIA's recipe's `bash ./setup.sh`: container image and tokenizer in $STAGE_PATH. More words are overrides.
cd "$(dirname "$0")" && exec "${PYTHON:-python}" setup_stage.py entrypoint=nemo_24_09 "$@"
