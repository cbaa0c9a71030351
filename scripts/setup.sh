#!/usr/bin/env bash
# Installs what the build and the default corpus need, from the distribution (Debian, Ubuntu). Does nothing where all of
# it is there already; uses sudo only if not root. With --tests also what only tests use: a browser without a window, and
# what makes PNG files of charts.
set -euo pipefail

# Without these nothing builds; without those something is slower or refuses with a line that says so.
required=(g++ cmake make python3 libcli11-dev nlohmann-json3-dev libgtest-dev bible-kjv bible-kjv-text)
optional=(libdnnl-dev libopenblas-dev libpcre2-dev libopenmpi-dev openmpi-bin ninja-build ccache)
[ "${1:-}" != --tests ] || optional+=(chromium-headless-shell librsvg2-bin)

# A tool counts as installed wherever it came from, a library as a package.
installed() {
  case $1 in
    g++ | cmake | make | python3 | ccache | chromium-headless-shell) command -v "$1" >/dev/null 2>&1 && return ;;
    ninja-build) command -v ninja >/dev/null 2>&1 && return ;;
  esac
  dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'
}
missing=() wished=()
for package in "${required[@]}"; do installed "$package" || missing+=("$package"); done
for package in "${optional[@]}"; do installed "$package" || wished+=("$package"); done
[ ${#missing[@]} -eq 0 ] && [ ${#wished[@]} -eq 0 ] && { echo "setup: everything is installed"; exit 0; }

command -v apt-get >/dev/null 2>&1 || {
  echo "setup: no apt-get here; install the equivalents of: ${missing[*]} ${wished[*]}" >&2
  exit 1
}
sudo=
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || { echo "setup: not root and no sudo; as root run: apt-get install ${missing[*]} ${wished[*]}" >&2; exit 1; }
  sudo=sudo
fi
export DEBIAN_FRONTEND=noninteractive
# install PACKAGE...
install() { $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
echo "setup: installing ${missing[*]} ${wished[*]}"
$sudo apt-get update -qq
if ! install "${missing[@]}" "${wished[@]}" 2>/dev/null; then  # one that this release lacks stops all: singly then
  [ ${#missing[@]} -eq 0 ] || install "${missing[@]}"
  for package in "${wished[@]}"; do install "$package" || echo "setup: going on without $package"; done
fi
echo "setup: done"
