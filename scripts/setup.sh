#!/usr/bin/env bash
# Installs what the build and the default corpus need, from the distribution (Debian, Ubuntu). Does nothing where all of
# it is there already; uses sudo only if not root.
set -euo pipefail

# package : a file that shows it is there
wanted=(
  "g++ /usr/bin/g++" "cmake /usr/bin/cmake" "make /usr/bin/make" "ninja-build /usr/bin/ninja" "ccache /usr/bin/ccache"
  "python3 /usr/bin/python3" "libopenblas-dev dpkg" "libdnnl-dev dpkg"
  "libcli11-dev dpkg" "nlohmann-json3-dev dpkg" "libgtest-dev dpkg" "libpcre2-dev dpkg"
  "bible-kjv /usr/bin/bible" "bible-kjv-text dpkg"
)

missing=()
for entry in "${wanted[@]}"; do
  package=${entry%% *} sign=${entry#* }
  case $sign in
    dpkg) dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package") ;;
    *) command -v "$(basename "$sign")" >/dev/null 2>&1 || [ -e "$sign" ] || missing+=("$package") ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && { echo "setup: everything is installed"; exit 0; }

command -v apt-get >/dev/null 2>&1 || {
  echo "setup: no apt-get here; install the equivalents of: ${missing[*]}" >&2
  exit 1
}
sudo=
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null 2>&1 || { echo "setup: not root and no sudo; as root run: apt-get install ${missing[*]}" >&2; exit 1; }
  sudo=sudo
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "setup: done"
