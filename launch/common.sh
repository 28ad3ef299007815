# What the launch scripts share: sourced, not run.
# shellcheck shell=bash
fail() { echo "error: $1" >&2; exit 2; }

[[ ${GPUS:-1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "GPUS=$GPUS: ranks per node, a number"

# print_command WORDS...: as they are run, but without passwords and keys (KEY in moe_dist/config.py)
print_command() {
  echo "+$(printf " %q" "$@")" | sed -E 's#://[^/[:space:]]+@#://***@#g
    s#(^|[^A-Za-z0-9_])((hf_|gh[a-z]_|AKIA)[A-Za-z0-9]{16,}|(sk-|github_pat_|wandb_v1_)[A-Za-z0-9_-]{16,})#\1***#g'
}

# read_master HOST:PORT: sets host, without the brackets of an IPv6 address, and port
read_master() {
  if ! [[ $1 =~ ^(\[([^]]+)\]|([^]:[]+)):([0-9]{1,5})$ ]] || ((10#${BASH_REMATCH[4]} < 1 || 10#${BASH_REMATCH[4]} > 65535)); then
    fail "MASTER=$1: host:port, as node0:29400 or [fd00::1]:29400"
  fi
  # shellcheck disable=SC2034
  host=${BASH_REMATCH[2]}${BASH_REMATCH[3]} port=${BASH_REMATCH[4]}
}
