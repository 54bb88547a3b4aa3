#!/usr/bin/env bash
# Writes the first program in LANGUAGE of a page to a file:  scripts/snippet.sh PAGE.md LANGUAGE OUTPUT
# Its block begins with ```LANGUAGE.
set -euo pipefail
page=${1:?usage: scripts/snippet.sh PAGE.md LANGUAGE OUTPUT} language=$2 output=$3
awk -v fence="^\`\`\`$language[ \t]*\$" '/^```/ { if (inside) exit; inside = ($0 ~ fence); next } inside' "$page" >"$output"
if [[ ! -s $output ]]; then
  echo "$page has no \`\`\`$language block" >&2
  exit 1
fi
