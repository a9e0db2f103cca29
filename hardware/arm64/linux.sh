#!/bin/sh
# Boots Debian's arm64 kernel as the host below the hypervisor, on two processors, to a program that
# prints and tries to read the hypervisor's memory. Needs what run.sh needs, and device-tree-compiler.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. ./rust.sh
. ./kernel.sh
. ../archive.sh
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/../../target/hardware-arm64}
export CARGO_TARGET_DIR
for program in qemu-system-aarch64 aarch64-linux-gnu-ld fdtput; do
    command -v $program >/dev/null || {
        echo "linux.sh: $program is missing; on Debian: apt-get install qemu-system-arm" \
            "binutils-aarch64-linux-gnu device-tree-compiler" >&2
        exit 1
    }
done
rust_for_aarch64 "$CARGO_TARGET_DIR/rust" || { echo "linux.sh: no Rust for aarch64" >&2; exit 1; }
kernel=$(debian_kernel "$CARGO_TARGET_DIR/arm64-kernel") ||
    { echo "linux.sh: no kernel to be had" >&2; exit 1; }
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET || true
cargo build --release --quiet
images=$CARGO_TARGET_DIR/aarch64-unknown-linux-gnu/release
work=$CARGO_TARGET_DIR/linux
mkdir -p "$work"

aarch64-linux-gnu-strip -o "$work/init" "$images/init"
{ archived init 33261 "$work/init"; archive_ends; } >"$work/archive"

# The kernel's memory begins above the hypervisor's: what the hypervisor has is not in the tree.
machine="-M virt,virtualization=on,gic-version=3 -cpu cortex-a72 -m 512 -smp 2"
# shellcheck disable=SC2086 # a list of words
qemu-system-aarch64 $(echo "$machine" | sed "s#virtualization=on#&,dumpdtb=$work/tree#") \
    -display none >/dev/null 2>&1
fdtput -t x "$work/tree" /memory@40000000 reg 0 48000000 0 18000000
fdtput -t s "$work/tree" /chosen bootargs "console=ttyAMA0 quiet panic=-1"
archive=0x4f000000
fdtput -t x "$work/tree" /chosen linux,initrd-start ${archive#0x}
fdtput -t x "$work/tree" /chosen linux,initrd-end \
    "$(printf %x $((archive + $(stat -c %s "$work/archive"))))"

# shellcheck disable=SC2086
timeout "${TWOFOLD_HARDWARE_SECONDS:-120}" qemu-system-aarch64 $machine -nographic -nodefaults \
    -serial stdio -semihosting-config enable=on,target=native -no-reboot -kernel "$images/el2" \
    -device "loader,file=$kernel,addr=0x48000000,force-raw=on" \
    -device "loader,file=$work/tree,addr=0x47e00000,force-raw=on" \
    -device "loader,file=$work/archive,addr=$archive,force-raw=on" </dev/null | tee "$work/console"
grep -q '^PASS' "$work/console"
