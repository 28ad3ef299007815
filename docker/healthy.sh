#!/usr/bin/env bash
# Healthy: as many ranks of train.py as NPROC_PER_NODE says are here, and none of them is stopped or dead.
set -uo pipefail
ranks=0
for process in "${1:-/proc}"/[0-9]*; do
  # a rank's own command, not the launcher's, which names train.py too
  mapfile -d '' -t words 2>/dev/null <"$process/cmdline" || continue
  [[ ${words[0]:-} == *python* && ${words[*]:1:2} =~ ^(-u )?train.py ]] || continue  # -u is torchrun's
  if [[ $(sed 's/.*) //' "$process/stat" 2>/dev/null) != [RSD]* ]]; then
    echo "a rank is stopped or dead: $process"
    exit 1
  fi
  ranks=$((ranks + 1))
done
echo "$ranks of ${NPROC_PER_NODE:-1} ranks"
((ranks >= ${NPROC_PER_NODE:-1}))
