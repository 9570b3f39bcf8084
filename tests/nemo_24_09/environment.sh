#!/usr/bin/env bash
# A virtual environment with NeMo 2.0.0, the release in nemo:24.09, for a CPU: environment.sh FOLDER [PYTHON]
#
# Some minutes and 2 GB. `NEMO_BENCH_NEMO_1=FOLDER/bin/python pytest tests/integration/test_nemo_24_09.py` then trains with it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"${2:-python3.11}" -m venv "$1"
"$1/bin/pip" install --quiet torch==2.13.0
"$1/bin/pip" install --quiet -r "$here/requirements.txt"
"$1/bin/pip" install --quiet --no-deps nemo_toolkit==2.0.0 megatron-core==0.9.0
