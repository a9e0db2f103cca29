#!/bin/sh
# Lints and builds the hypervisor and its host for arm64 and runs them on QEMU's machine model, with two
# processors. Installs what it needs where that is possible (Debian, as root).
#
#   run.sh                  fails if something is missing
#   run.sh --if-available   says so and succeeds instead, without counting it as passed
#   run.sh --instructions   one processor, on which each instruction takes a nanosecond: the figures
#                           are counts of instructions, the same on every run
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. ./rust.sh
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/../../target/hardware-arm64}
export CARGO_TARGET_DIR
mkdir -p "$CARGO_TARGET_DIR"
programs="qemu-system-aarch64 aarch64-linux-gnu-ld"
packages="qemu-system-arm binutils-aarch64-linux-gnu"

missing() {
    for program in $programs; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

give_up() {
    echo "hardware/arm64: NOT RUN: $1"
    [ "${IF_AVAILABLE:-}" = yes ] && exit 0
    exit 1
}

[ "${1:-}" != --if-available ] || IF_AVAILABLE=yes
machine="-smp 2"
[ "${1:-}" != --instructions ] || machine="-smp 1 -icount shift=0,sleep=off"
if [ -n "$(missing)" ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing $packages" >&2
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } \
            >/dev/null 2>&1 || true
fi
[ -z "$(missing)" ] || give_up "missing: $(missing | tr '\n' ' ')(on Debian in: $packages)"
rust_for_aarch64 "$CARGO_TARGET_DIR/rust" ||
    give_up "no Rust libraries for aarch64; \`rustup target add aarch64-unknown-linux-gnu\` would do"

# Flags from the environment would replace those of .cargo/config.toml.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET || true
if [ "$CLIPPY" = yes ]; then
    cargo clippy --release --quiet -- -D warnings
else
    echo "hardware/arm64: NOT LINTED: no clippy for this compiler" >&2
fi
cargo build --release --quiet
images=$CARGO_TARGET_DIR/aarch64-unknown-linux-gnu/release
# A run that hangs is a failure.
# shellcheck disable=SC2086 # a list of words
timeout "${TWOFOLD_HARDWARE_SECONDS:-120}" qemu-system-aarch64 -M virt,virtualization=on,gic-version=3 \
    -cpu "${TWOFOLD_ARM_CPU:-max}" -m 512 $machine -nographic -nodefaults -serial stdio \
    -semihosting-config enable=on,target=native \
    -kernel "$images/el2" -device "loader,file=$images/host" </dev/null
