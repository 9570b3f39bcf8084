#!/usr/bin/env bash
# Trains five steps with each pair of NeMo or Megatron-Bridge and megatron-core that pip has: one process, TP2, PP2 VP2;
# and twenty with each Bridge from NeMo 2's initial weights.
#
#   tests/stacks.sh FOLDER [CONTAINER ...]     prints a table, as in docs/containers.md; logs and environments stay in FOLDER
#
# PYTHON has this project's own packages, on which each pair is laid. PYTHON312, with torch and what else Bridge wants, is
# needed for Bridge 0.4 and later; without it they are said to be left out.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd); shift
project=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$project/.venv/bin/python}
# What older NeMo imports whether it is used or not; the containers have it.
imports="h5py matplotlib pyparsing cycler kiwisolver contourpy python-dateutil fonttools six"
older="$imports ijson sacrebleu portalocker colorama tabulate lxml rouge_score nltk absl-py inflect more_itertools"
older+=" typeguard opencc pangu==4.0.6.1 jieba zarr==2.18.3 numcodecs==0.13.1 asciitree fasteners"
# Bridge 0.5 and later import models of transformers 5, which wants a Hub client that this project does not take.
newer="six transformers==5.12.1 huggingface_hub==1.5.0"
# container, interpreter, packages, further overrides
pairs=(
  "nemo2_25_02|$python|nemo_toolkit==2.2.0 megatron-core==0.11.0 $older|"
  "nemo2_25_04|$python|nemo_toolkit==2.3.0 megatron-core==0.12.0 $older|"
  "nemo2_25_07|$python|nemo_toolkit==2.4.0 megatron-core==0.13.0 $older|"
  "nemo2_25_09|$python|nemo_toolkit==2.5.0 megatron-core==0.14.0 $imports|"
  "nemo2|$python||"
  "nemo2_26_02|$python|nemo_toolkit==2.7.0 megatron-core==0.16.0|"
  "bridge_26_02|$python|megatron-bridge==0.3.0 megatron-core==0.16.0 six|entrypoint=bridge_26_04 model.rope_scaling=false"
  "bridge_26_04|${PYTHON312:-}|megatron-bridge==0.4.0 megatron-core==0.17.0 six|"
  "bridge_26_06|${PYTHON312:-}|megatron-bridge==0.5.0 megatron-core==0.18.0 $newer|"
  "bridge_0_6|${PYTHON312:-}|megatron-bridge==0.6.2 megatron-core==0.19.2 $newer|entrypoint=bridge_26_06"
)
declare -A layouts=(
  [one]=""
  [TP2]="trainer.devices=2 model.tensor_model_parallel_size=2"
  [PP2VP2]="trainer.devices=2 model.pipeline_model_parallel_size=2 model.virtual_pipeline_model_parallel_size=2"
)
# One thread a process: on shared cores two spin against each other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
echo "| container | packages | one process | TP2 | PP2 VP2 | from NeMo 2's weights |"
echo "|---|---|---|---|---|---|"
for pair in "${pairs[@]}"; do
  IFS='|' read -r name interpreter packages overrides <<<"$pair"
  [[ $# -eq 0 || " $* " == *" $name "* ]] || continue
  row="| $name | $(cut -d' ' -f1,2 <<<"${packages//==/-}") |"
  if [[ -z $interpreter ]]; then
    echo "$row needs Python 3.12 (PYTHON312) | | | |"
    continue
  fi
  overlay=$folder/$name
  if [[ -n $packages && ! -e $overlay/.complete ]]; then
    rm -rf "$overlay"
    # shellcheck disable=SC2086  # a list of packages
    "$interpreter" -m pip install --quiet --disable-pip-version-check --no-deps --target "$overlay" $packages
    touch "$overlay/.complete"
  fi
  for layout in one TP2 PP2VP2; do
    log=$folder/$name-$layout.log
    # shellcheck disable=SC2086  # lists of overrides
    PYTHONPATH=$overlay STAGE_PATH=$folder/stage timeout 600 "$interpreter" "$project/train.py" \
      ${overrides:-entrypoint=$name} data=mock trainer.max_steps=5 trainer.limit_val_batches=0 ${layouts[$layout]} \
      >"$log" 2>&1 && status= || status=" (exit status $?)"
    losses=$(sed -n 's|^step \([15]\)/5  loss \([0-9.]*\).*|\2|p' "$log" | paste -sd' ' | sed 's/ / -> /')
    row+=" ${losses:-failed: $(basename "$log")}$status |"
  done
  if [[ $packages == megatron-bridge* ]]; then
    # shellcheck disable=SC2086  # a list of overrides
    row+=" $("$python" "$project/tests/same_losses.py" "$folder/same-$name" "$interpreter" "$overlay" \
      ${overrides:-entrypoint=$name} 2>&1 | tail -1) |"
  else
    row+=" |"
  fi
  echo "$row"
done
