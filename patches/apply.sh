#!/usr/bin/env bash
# Apply the patches of this folder to a vLLM source tree, or take them back. Either all change the tree, or none.
set -euo pipefail

usage="usage: apply.sh VLLM_SOURCE [--reverse]"
tree=${1:?$usage}
direction=${2:---forward}
case "$direction" in --forward | --reverse) ;; *) echo "$usage" >&2; exit 2 ;; esac
[ -d "$tree/vllm" ] || { echo "$tree holds no folder vllm; name the folder that contains it" >&2; exit 1; }
[ "$direction" = --forward ] && opposite=--reverse || opposite=--forward
patches=("$(dirname "$0")"/vllm-0.32.0/*.patch)

change() { # DIRECTION PATCH [--dry-run]
  patch --silent --strip=1 --fuzz=0 --force --no-backup-if-mismatch --reject-file=- "$1" --directory="$tree" --input="$(realpath "$2")" "${@:3}" >/dev/null 2>&1
}
refuse() {
  echo "$1; nothing was changed" >&2
  exit 1
}

for patch in "${patches[@]}"; do
  name=$(basename "$patch")
  change "$direction" "$patch" --dry-run && continue
  change "$opposite" "$patch" --dry-run && refuse "$name: there is nothing to do, $tree is as asked for already"
  refuse "$name does not fit $tree: it is not vLLM 0.32.0, or was changed otherwise"
done
for patch in "${patches[@]}"; do
  change "$direction" "$patch"
done
