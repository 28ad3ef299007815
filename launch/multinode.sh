#!/usr/bin/env bash
# Trains on several nodes: start it on each, with the same variables.
#
#   NODES=2 NPROC_PER_NODE=8 RDZV_ENDPOINT=node0:29400 RDZV_ID=first CONFIG=moe_256 launch/multinode.sh [--dry-run] [arguments of train.py]
#
# NODES           how many, or a range such as 1:2: nodes may come and go, and the run continues with those present
# NPROC_PER_NODE  ranks per node, on CPU too
# RDZV_ENDPOINT   host:port of one of the nodes, by the name that `hostname` prints there; this node has to stay
# RDZV_ID         name of the run, whose folder is runs/$RDZV_ID: the same disk on all nodes
# RESTARTS        how often failed ranks are started again, and a killed agent (default 0)
# ADDRESS         address of this node for the others, if its host name does not resolve there
# RDZV_CONF       more of torchrun's --rdzv-conf: last_call_timeout=5 waits 5 s instead of 30 for more nodes than the
#                 fewest; is_host=1 on RDZV_ENDPOINT's node and is_host=0 on the others, if torchrun cannot tell
#
# --dry-run only prints the command. SIGTERM saves a checkpoint; the same command goes on from it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
command -v torchrun >/dev/null || PATH=$PWD/.venv/bin:$PATH # that of `make`

nodes=${NODES:-1} restarts=${RESTARTS:-0}
[[ $restarts =~ ^[0-9]{1,6}$ ]] || fail "RESTARTS=$restarts: a number, 0 or more"
if ! [[ $nodes =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || ((${nodes%:*} > ${nodes#*:})); then
  fail "NODES=$nodes: a number, or a range such as 1:2"
fi
master=${RDZV_ENDPOINT:?host:port of one of the nodes} id=${RDZV_ID:?name of the run, the same on all nodes}
conf=${RDZV_CONF:-} address=${ADDRESS:-}
address=${address#[} address=${address%]}
read_master "$master"
if [[ $address && $conf != *is_host=* ]]; then
  # where they are written differently, torchrun compares addresses; it ends where this node's own name has none
  if [[ $address == "$host" ]]; then conf+=${conf:+,}is_host=1
  elif ! getent hosts "$(uname -n)" >/dev/null; then conf+=${conf:+,}is_host=0; fi
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# seconds that torchrun gives ranks after SIGTERM to save a checkpoint, by itself 30; where nodes come and go it stays 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
# with agents' store shared with ranks, torch 2.13 tells its place to the first nodes alone: one that joins later waits
# for it in vain
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
dry=; if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi

# ranks of a killed agent are killed with it (setpriv), for the next agent starts new ones
command=(torchrun --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-1}" --max-restarts "$restarts"
  --rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id "$id" ${conf:+--rdzv-conf "$conf"}
  ${address:+--local-addr "$address"}
  --no-python setpriv --pdeathsig KILL python
  train.py "${CONFIG:-lstm_moe_demo}" --folder "runs/$id" --resume auto "$@")
print_command "${command[@]}"
[[ ! $dry ]] || exit 0
getent hosts "$host" >/dev/null || echo "launch: no address of $host is known here yet; torchrun tries for a minute" >&2

agent='' stopping=''
trap 'stopping=1; [[ ! $agent ]] || kill -TERM "$agent" 2>/dev/null || true' TERM INT
TORCHELASTIC_ERROR_FILE=$(mktemp); export TORCHELASTIC_ERROR_FILE
trap 'rm -f "$TORCHELASTIC_ERROR_FILE"' EXIT
for ((left = restarts; ; left--)); do
  : >"$TORCHELASTIC_ERROR_FILE"
  "${command[@]}" &
  asked=$stopping agent=$! status=0
  [[ ! $asked ]] || kill -TERM "$agent" 2>/dev/null || true  # when there was none to tell; at any later time the trap does
  wait "$agent" || status=$?
  while kill -0 "$agent" 2>/dev/null; do status=0; wait "$agent" || status=$?; done  # a signal had ended the wait
  agent=''
  if ((status == 0)) || [[ $stopping ]]; then exit "$status"; fi
  # an agent that was killed, or has lost the others (it wrote why), is started again; where ranks have failed too often
  # it writes nothing, and that is the end
  if ! ((status > 128)) && [[ ! -s $TORCHELASTIC_ERROR_FILE ]]; then exit "$status"; fi
  if ((left == 0)); then exit "$status"; fi
  echo "launch: the agent ended with status $status; starting it again ($left left)" >&2
done
