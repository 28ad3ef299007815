#!/usr/bin/env bash
# Trains on this machine alone; started again with the same RDZV_ID it goes on where it stopped.
#
#   [CONFIG=lstm_moe_demo] [NPROC_PER_NODE=1] [RDZV_ID=NAME-TIME] launch/local.sh [--dry-run] [arguments of train.py]
#
# NPROC_PER_NODE: ranks, on CPU too. --dry-run only prints the command. The run folder is runs/$RDZV_ID.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
command -v torchrun >/dev/null || PATH=$PWD/.venv/bin:$PATH # that of `make`

[[ ${NODES:-1} == 1 ]] || fail "NODES=$NODES: this script is for one; launch/multinode.sh is for more"
config=${CONFIG:-lstm_moe_demo}
run=runs/${RDZV_ID:-$config-$(date +%Y%m%d-%H%M%S)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# seconds that torchrun gives ranks after SIGTERM to save a checkpoint, by itself 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
dry=; if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi

command=(torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-1}"
  train.py "$config" --folder "$run" --resume auto "$@")
print_command "${command[@]}"
[[ $dry ]] || exec "${command[@]}"
