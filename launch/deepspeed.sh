#!/usr/bin/env bash
# Trains on the nodes of a hostfile with DeepSpeed's launcher, from one of them; it reaches the others by ssh (pdsh).
#
#   NODES=2 GPUS=8 MASTER=node0:29500 RDZV_ID=first CONFIG=moe_256 launch/deepspeed.sh [--dry-run] [arguments of train.py]
#
# HOSTFILE   a line for each node, "name slots=ranks" (launch/hostfile); NODES and GPUS take no more of it
# NODE_RANK  where there is no ssh: start it on each node, with the number of its line from 0
#
# RDZV_ID names the run folder, runs/$RDZV_ID. It restarts nothing: the same command goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
command -v deepspeed >/dev/null || PATH=$PWD/.venv/bin:$PATH # that of `make`

read_master "${MASTER:?host:port of the first node}"
id=${RDZV_ID:?name of the run}
dry=; if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi

# PATH and the threads of a rank are set there, for ssh does not hand on the environment
command=(deepspeed --hostfile "${HOSTFILE:-launch/hostfile}" --num_nodes "${NODES:-1}" --num_gpus "${GPUS:-1}"
  --master_addr "$host" --master_port "$port" ${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"}
  --no_local_rank --no_python env "PATH=$PATH" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" python
  train.py "${CONFIG:-lstm_moe_demo}" --folder "runs/$id" --resume auto "$@")
print_command "${command[@]}"
[[ $dry ]] || exec "${command[@]}"
