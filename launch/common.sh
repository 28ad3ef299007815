# What the launch scripts share: sourced, not run.
# shellcheck shell=bash
fail() { echo "error: $1" >&2; exit 2; }

[[ ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "NPROC_PER_NODE=$NPROC_PER_NODE: ranks per node, a number"

# print_command WORDS...: as they are run, but without passwords and keys
print_command() {
  local words=() line
  mapfile -d '' -t words < <(python3 -I moe_dist/config/redact.py "$@" 2>/dev/null)
  ((${#words[@]} == $#)) || words=("$1" "(not shown: there is no python3 that finds the passwords in it)")
  line=$(printf " %q" "${words[@]}")
  echo "+${line//'\*\*\*'/***}"
}

# read_master HOST:PORT: sets host, without the brackets of an IPv6 address, and port
read_master() {
  if ! [[ $1 =~ ^(\[([0-9A-Za-z:.%_-]+)\]|([0-9A-Za-z_][0-9A-Za-z._-]*)):([0-9]{1,5})$ ]] || ((10#${BASH_REMATCH[4]} < 1 || 10#${BASH_REMATCH[4]} > 65535)); then
    fail "RDZV_ENDPOINT=$1: host:port, as node0:29400 or [fd00::1]:29400"
  fi
  # shellcheck disable=SC2034
  host=${BASH_REMATCH[2]}${BASH_REMATCH[3]} port=${BASH_REMATCH[4]}
}
