#!/usr/bin/env bash
# Gets the published kvm-ioctls crate and builds its own tests, unmodified.
#
# usage: conformance/build-kvm-ioctls.sh [--force]
#
# The crate carries all its unit tests and examples. Its source ends up in
# CONFORMANCE_DIR/kvm-ioctls/crate (see common.sh), the program with the unit
# tests in CONFORMANCE_DIR/kvm-ioctls/unit; the documentation tests are compiled
# by cargo when they are run, from what is built here, without the network.
# If that is already there nothing is done; --force does it again.
#
# Exit status: 0 built or already there; 77 this machine cannot (one line says
# what is missing); anything else is a failure, with the end of the log shown.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The version, and what the registry's index says its archive hashes to.
version=0.25.1
checksum=d7a59b7ac62625a405112180b56a99acb4498e1d18f5a7c0cd0916c79a076b0a

case ${1-} in
'' | --force) ;;
*) die "unknown argument $1 (usage: build-kvm-ioctls.sh [--force])" ;;
esac

home=$CONFORMANCE_DIR/kvm-ioctls
log=$home/build.log
mkdir -p "$home"

# Two runs at once (two clones on one cache) take turns.
exec 9>"$home/lock"
flock 9

if [[ ${1-} != --force && -x $home/unit && $(cat "$home/version" 2>/dev/null) == "$version" ]]; then
    exit 0
fi
rm -f "$home/version"
: >"$log"

command -v cargo >/dev/null 2>&1 || unavailable "no cargo here: kvm-ioctls is a Rust crate"
[[ $(uname -sm) == 'Linux x86_64' ]] ||
    unavailable "these tests of kvm-ioctls need Linux on x86_64, this is $(uname -sm)"

# Their own build folder, and none of the caller's flags.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET
export CARGO_TARGET_DIR=$home/build

# A package that does nothing but depend on the crate, so that cargo fetches and
# checks it.
rm -rf "$home/fetch" "$home/crate"
mkdir -p "$home/fetch/src"
: >"$home/fetch/src/lib.rs"
cat >"$home/fetch/Cargo.toml" <<TOML
[package]
name = "fetch"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]
kvm-ioctls = "=$version"
TOML
cd "$home/fetch"
if ! cargo vendor --versioned-dirs vendor >>"$log" 2>&1 </dev/null; then
    unavailable "cargo cannot fetch kvm-ioctls $version here (see $log)"
fi
got=$(sed -n '/^name = "kvm-ioctls"$/,/^$/s/^checksum = "\(.*\)"$/\1/p' Cargo.lock)
[[ $got == "$checksum" ]] ||
    die "kvm-ioctls $version has the checksum $got, expected $checksum"

# Outside of any workspace of ours, with the lock file that it was published
# with. The workspace above it keeps cargo from looking further up.
cp -r "vendor/kvm-ioctls-$version" "$home/crate"
rm -f "$home/crate/.cargo-checksum.json"
chmod -R u+w "$home/crate"
cp "$home/crate/Cargo.lock" "$home/Cargo.lock"
printf '[workspace]\nresolver = "2"\nmembers = ["crate"]\n' >"$home/Cargo.toml"
rm -rf "$home/fetch"

say "building the tests of kvm-ioctls $version"
cd "$home/crate"
if ! cargo fetch --locked >>"$log" 2>&1 </dev/null; then
    unavailable "cargo cannot fetch what kvm-ioctls $version depends on (see $log)"
fi
quietly "$log" cargo test --no-run --locked --offline
# The same again, for the path of the program.
unit=$(cargo test --lib --no-run --locked --offline --message-format=json 2>>"$log" </dev/null |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
[[ -x $unit ]] || die "cargo named no program with the unit tests (see $log)"
cp "$unit" "$home/unit"
# Compiles the documentation tests' dependencies without running any.
quietly "$log" cargo test --doc --locked --offline -- --list

printf '%s\n' "$version" >"$home/version"
say "$("$home/unit" --list 2>/dev/null | grep -c ': test$') unit tests in $home/unit"
