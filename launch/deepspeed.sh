#!/usr/bin/env bash
# Trains on the nodes of a hostfile with DeepSpeed's launcher, from one of them; it reaches the others by ssh (pdsh).
#
#   NODES=2 NPROC_PER_NODE=8 RDZV_ENDPOINT=node0:29500 RDZV_ID=first CONFIG=moe_256 launch/deepspeed.sh [--dry-run] [arguments of train.py]
#
# HOSTFILE   a line for each node, "name slots=ranks" (launch/hostfile); NODES and NPROC_PER_NODE take no more of it
# NODE_RANK  where there is no ssh: start it on each node, with the number of its line from 0
#
# RDZV_ID names the run folder, runs/$RDZV_ID. It restarts nothing: the same command goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
command -v deepspeed >/dev/null || PATH=$PWD/.venv/bin:$PATH # that of `make`

read_master "${RDZV_ENDPOINT:?host:port of the first node}"
id=${RDZV_ID:?name of the run} nodes=${NODES:-1} hostfile=${HOSTFILE:-launch/hostfile}
[[ $nodes =~ ^[1-9][0-9]{0,5}$ ]] || fail "NODES=$nodes: a number"
[[ ${NODE_RANK:-0} =~ ^[0-9]{1,6}$ ]] || fail "NODE_RANK=$NODE_RANK: the number of a node, from 0"
remote=; if ((nodes > 1)) && [[ ! ${NODE_RANK:-} ]]; then remote=1; fi
if [[ $remote ]] && (($(cat "$hostfile" 2>/dev/null | grep -cE '^[^#[:space:]]') < nodes)); then
  fail "HOSTFILE=$hostfile: a line for each of NODES=$nodes nodes"
fi
if [[ $remote && ! $PWD =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
  fail "$PWD: DeepSpeed does not quote this folder for the shells of other nodes; move it to a plain name"
fi
dry=; if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi

# quote WORD: sets quoted, from which the shell of another node reads WORD. pdsh replaces %h, %n, %u and %%. DeepSpeed
# (0.19) puts a word with a space between double quotes, and escapes those in it; it leaves other words as they are.
quote() {
  quoted=${1//%/%%}
  if [[ $quoted == *' '* ]]; then
    quoted=${quoted//\\/\\\\} quoted=${quoted//\$/\\\$} quoted=${quoted//\`/\\\`}
  elif [[ ! $quoted =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    quoted="'${quoted//"'"/"'\\''"}'"
  fi
}

launcher=(deepspeed --hostfile "$hostfile" --num_nodes "$nodes" --num_gpus "${NPROC_PER_NODE:-1}"
  --master_addr "$host" --master_port "$port" ${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"}
  --no_local_rank --no_python)
# PATH and the threads of a rank are set there, for ssh does not hand on the environment
rank=(env "PATH=$PATH" "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" python
  train.py "${CONFIG:-lstm_moe_demo}" --folder "runs/$id" --resume auto "$@")
print_command "${launcher[@]}" "${rank[@]}"
[[ ! $dry ]] || exit 0
if [[ $remote ]]; then
  for i in "${!rank[@]}"; do quote "${rank[i]}"; rank[i]=$quoted; done
fi
exec "${launcher[@]}" "${rank[@]}"
