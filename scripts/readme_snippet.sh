#!/usr/bin/env bash
# Writes the first ```c block of README.md to a file:  scripts/readme_snippet.sh OUTPUT.c
set -euo pipefail
output=${1:?usage: scripts/readme_snippet.sh OUTPUT.c}
readme=$(dirname "$0")/../README.md
if [[ ! -f $readme ]]; then
  echo "README.md does not exist, so it has no C snippet to compile" >&2
  exit 1
fi
awk '/^```/ { if (inside) exit; inside = ($0 ~ /^```c[ \t]*$/); next } inside' "$readme" >"$output"
if [[ ! -s $output ]]; then
  echo "README.md has no \`\`\`c block" >&2
  exit 1
fi
