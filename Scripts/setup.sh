#!/usr/bin/env bash
# Installs what a build needs beside the Swift toolchain and git: a few Debian packages, and those given as arguments. Does
# nothing where they are there.
set -euo pipefail

if ! command -v swift >/dev/null; then
  echo "setup: no 'swift' on the PATH. Install the Swift 6.3 toolchain for Debian 12 (swift.org/install/linux) and try again." >&2
  exit 1
fi
version=$(swift --version 2>/dev/null | grep -oE 'Swift version [0-9]+\.[0-9]+' | head -1 | grep -oE '[0-9]+\.[0-9]+' || true)
if [ -n "$version" ] && [ "$(printf '%s\n6.2\n' "$version" | sort -V | head -1)" != "6.2" ]; then
  echo "setup: Apus needs Swift 6.2 or newer; this is $version." >&2
  exit 1
fi

# libc6-dev, libstdc++-12-dev: C and C++ headers for the packages' C targets. zlib1g-dev: HTTP compression in NIO.
# libsqlite3-dev: GRDB, which keeps responses, files and batches.
# openssl (the program): tests make a certificate of their own with it.
needed=(libc6-dev libstdc++-12-dev zlib1g-dev libsqlite3-dev openssl ca-certificates "$@")
missing=()
if command -v dpkg-query >/dev/null; then
  for package in "${needed[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
fi
if [ "${#missing[@]}" -eq 0 ]; then exit 0; fi

sudo=
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: these Debian packages are missing: ${missing[*]}. Install them as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  sudo=sudo
fi
echo "setup: installing the Debian packages ${missing[*]}${sudo:+ through sudo}."
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
