#!/usr/bin/env bash
# A script on two nodes that are network namespaces of this machine (launch/namespaces.sh), a torchrun in each.
#
#   sudo benchmarks/two_nodes.sh RATE RANKS_PER_NODE SCRIPT [ARGS...]        RATE as tc has it (1gbit), or none
#
# TORCHRUN names the launcher (.venv/bin/torchrun).
set -euo pipefail
(($# >= 3)) || { sed -n 2,6p "$0"; exit 2; }
cd "$(dirname "$0")/.."
export RATE=${1/none/} PER_NODE=$2 TORCHRUN=${TORCHRUN:-.venv/bin/torchrun} OMP_NUM_THREADS=1
export TWO_NODES="benchmarks/two_nodes.sh $1 $2 "  # before the script's own command, in what it tells (machine.py)
shift 2
# shellcheck disable=SC2016  # of each node, not of this shell
exec launch/namespaces.sh bash -c '"$TORCHRUN" --nnodes 2 --node-rank "$NODE" --nproc-per-node "$PER_NODE" \
  --master-addr "${RDZV_ENDPOINT%:*}" --master-port "${RDZV_ENDPOINT##*:}" "$@"' node "$@"
