#!/usr/bin/env bash
# Fetches data/gpt2.tiktoken, the merge ranks of GPT-2's byte-pair encoding (50,256 lines, 836 kB), out of the source
# package openai-whisper (MIT) with pip. Nothing of the package is installed or run. Does nothing if they are there.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
ranks=gpt2.tiktoken
sha256=306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930

fail() { echo "get_gpt2_ranks.sh: $*" >&2; exit 1; }
intact() { [ -f "$1" ] && [ "$(sha256sum <"$1" | cut -d' ' -f1)" = "$sha256" ]; }

if intact $ranks; then echo "data/$ranks is there"; exit 0; fi
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip: install python3-pip"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# `pip download` runs a source package's build to learn its metadata. This stand-in for the build backend says what pip
# wants to hear, so that no code of the package runs and nothing needs to be installed for it.
mkdir -p "$work/backend/setuptools"
touch "$work/backend/setuptools/__init__.py"
cat >"$work/backend/setuptools/build_meta.py" <<'PYTHON'
import os
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "openai_whisper-20250625.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: openai-whisper\nVersion: 20250625\n")
    return name
PYTHON

if ! PYTHONPATH="$work/backend" SETUPTOOLS_USE_DISTUTILS=stdlib "$python" -m pip download --quiet --no-deps \
    --no-binary :all: --no-build-isolation --use-pep517 --disable-pip-version-check --dest "$work" \
    openai-whisper==20250625 >"$work/log" 2>&1; then
  fail "pip could not download openai-whisper 20250625 (no network?): $(grep -m1 ERROR "$work/log" || tail -n1 "$work/log")"
fi
tar -xzOf "$work"/openai_whisper-20250625.tar.gz openai_whisper-20250625/whisper/assets/gpt2.tiktoken >"$ranks.tmp" ||
  fail "the package holds no gpt2.tiktoken"
intact "$ranks.tmp" || { rm -f "$ranks.tmp"; fail "the ranks do not have the expected checksum: try again"; }
mv "$ranks.tmp" "$ranks"
echo "data/$ranks: 50256 ranks"
