#!/usr/bin/env bash
# Dependencies run one way: llmc <- moe <- train_gpt_moe.cu and library/; dev, test and scripts are leaves. Fails on an include that
# runs against the arrows.
set -uo pipefail
cd "$(dirname "$0")/.."

# includes OF FOLDERS... : lines `file:line:#include "..."` of the sources in these places
includes() { grep -rnE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' "$@" --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' 2>/dev/null; }

bad=$(
  includes llmc | grep -E 'include[[:space:]]*"(\.\./)*(moe|library|dev|scripts|data)/|include[[:space:]]*"(\.\./)*(train_gpt_moe|test_gpt_moe)'
  includes moe | grep -E 'include[[:space:]]*"(\.\./)*(library|dev|scripts|data)/|include[[:space:]]*"(\.\./)*(train_gpt_moe|test_gpt_moe)'
  includes library train_gpt_moe.cu | grep -E 'include[[:space:]]*"(\.\./)*(dev|scripts|data)/'
  # The trainer is host code only.
  grep -nHE '<<<|\bcuda[A-Z][A-Za-z]*\(' train_gpt_moe.cu 2>/dev/null | sed 's/$/   (the trainer is host code only)/'
)
if [ -n "$bad" ]; then
  echo "check_layers: these lines run against llmc <- moe <- trainer:" >&2
  echo "$bad" >&2
  exit 1
fi
echo "check_layers: ok"
