#!/bin/bash
# Two nodes on one Linux machine: network namespaces joined by a link of limited rate, a torchrun in each.
#
#   sudo benchmarks/two_nodes.sh RATE RANKS_PER_NODE SCRIPT [ARGS...]        RATE as tc has it (1gbit), or none
#
# Needs root and iproute2. TORCHRUN names the launcher (.venv/bin/torchrun). The first node's output is shown; the
# second's too where it fails.
set -u
[ $# -ge 3 ] || { sed -n 2,8p "$0"; exit 2; }
rate=$1 per_node=$2; shift 2
torchrun=${TORCHRUN:-.venv/bin/torchrun}
prefix=moe$$ log=$(mktemp)
trap 'ip netns del ${prefix}0; ip netns del ${prefix}1; rm -f "$log"' EXIT

ip netns add ${prefix}0 && ip netns add ${prefix}1 || exit 1
ip link add link0 netns ${prefix}0 type veth peer name link1 netns ${prefix}1 || exit 1
for node in 0 1; do
  ip -n $prefix$node link set lo up
  ip -n $prefix$node address add 10.55.0.1$node/24 dev link$node
  ip -n $prefix$node link set link$node up
  if [ "$rate" != none ]; then
    # a queue that holds a fifth of a second: packets wait for the link, none is dropped
    ip netns exec $prefix$node tc qdisc add dev link$node root tbf rate "$rate" burst 256kb latency 200ms || exit 1
  fi
done

start() { # NODE SCRIPT [ARGS...]
  local node=$1; shift
  ip netns exec $prefix$node env GLOO_SOCKET_IFNAME=link$node NCCL_SOCKET_IFNAME=link$node OMP_NUM_THREADS=1 \
    "$torchrun" --nnodes 2 --node-rank "$node" --nproc-per-node "$per_node" \
    --master-addr 10.55.0.10 --master-port 29500 "$@"
}
start 1 "$@" >"$log" 2>&1 &
second=$!
start 0 "$@"; status=$?
wait $second || { status=1; cat "$log" >&2; }
exit $status
