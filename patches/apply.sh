#!/usr/bin/env bash
# Apply the patches of this folder to a vLLM source tree, or take them back. Either all change the tree, or none.
set -euo pipefail

usage="usage: apply.sh VLLM_SOURCE [--reverse]"
tree=${1:?$usage}
direction=${2:---forward}
case "$direction" in --forward | --reverse) ;; *) echo "$usage" >&2; exit 2 ;; esac
[ -d "$tree/vllm" ] || { echo "$tree holds no folder vllm; name the folder that contains it" >&2; exit 1; }
patches=("$(dirname "$0")"/vllm-0.32/*.patch)
for patch in "${patches[@]}"; do
  command=(patch --quiet --strip=1 --no-backup-if-mismatch --batch "$direction" --directory="$tree" --input="$(realpath "$patch")")
  "${command[@]}" --dry-run >/dev/null || { echo "$(basename "$patch") does not fit this vLLM, or is done already; nothing was changed" >&2; exit 1; }
done
for patch in "${patches[@]}"; do
  patch --quiet --strip=1 --batch "$direction" --directory="$tree" --input="$(realpath "$patch")"
done
