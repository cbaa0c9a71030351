#!/usr/bin/env bash
# Formatting (.clang-format) of every source file.
# `dev/check_format.sh --fix` rewrites the files.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v clang-format >/dev/null 2>&1 || { echo "check_format: clang-format is not installed; skipped"; exit 0; }
mapfile -t files < <(git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')
if [ "${1:-}" = --fix ]; then
  clang-format -i "${files[@]}"
else
  clang-format --dry-run -Werror "${files[@]}" || { echo "check_format: run dev/check_format.sh --fix" >&2; exit 1; }
  echo "check_format: ok"
fi
