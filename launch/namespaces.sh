#!/usr/bin/env bash
# Two nodes on one Linux machine, to try what is meant for several: runs COMMAND at once in two network namespaces that
# a cable joins, each with an address of its own.
#
#   sudo -E env NODES=2 NPROC_PER_NODE=2 RDZV_ID=try [RATE=1gbit] launch/namespaces.sh launch/multinode.sh [ARGS]
#
# COMMAND finds NODE (0 or 1), RDZV_ENDPOINT, ADDRESS, and the interface where gloo and NCCL look for it. RATE limits the cable,
# as tc has it. Needs root and iproute2.
set -euo pipefail
(($#)) || { sed -n 2,8p "$0"; exit 2; }

prefix=node$$- running=()
ip netns add "${prefix}0"
ip netns add "${prefix}1"
trap 'kill "${running[@]}" 2>/dev/null || true; wait; ip netns delete "${prefix}0"; ip netns delete "${prefix}1"' EXIT
trap 'exit 143' TERM INT
ip link add eth0 netns "${prefix}0" type veth peer name eth0 netns "${prefix}1"
for node in 0 1; do
  ip -n "$prefix$node" link set lo up
  ip -n "$prefix$node" address add "10.55.0.1$node/24" dev eth0
  ip -n "$prefix$node" link set eth0 up
  if [[ ${RATE:-} ]]; then # a queue that holds a fifth of a second: packets wait for the cable, none is dropped
    ip netns exec "$prefix$node" tc qdisc add dev eth0 root tbf rate "$RATE" burst 256kb latency 200ms
  fi
done
for node in 0 1; do
  NODE=$node ADDRESS=10.55.0.1$node RDZV_ENDPOINT=10.55.0.10:29400 GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 \
    ip netns exec "$prefix$node" "$@" &
  running+=($!)
done
status=0
for each in "${running[@]}"; do wait "$each" || status=$?; done
running=()
exit "$status"
