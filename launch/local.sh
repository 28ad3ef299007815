#!/usr/bin/env bash
# Trains on this machine alone; started again with the same RDZV_ID it goes on where it stopped.
#
#   [CONFIG=lstm_moe_demo] [GPUS=1] [RDZV_ID=NAME-TIME] launch/local.sh [--dry-run] [arguments of train.py]
#
# GPUS: ranks, on CPU too. --dry-run only prints the command. The run folder is runs/$RDZV_ID.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH=$PWD/.venv/bin:$PATH # that of `make`

config=${CONFIG:-lstm_moe_demo}
run=runs/${RDZV_ID:-$config-$(date +%Y%m%d-%H%M%S)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
dry=; if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi

command=(torchrun --standalone --nproc-per-node "${GPUS:-1}"
  train.py "$config" --folder "$run" --resume auto "$@")
echo "+$(printf " %q" "${command[@]}")"
[[ $dry ]] || exec "${command[@]}"
