#!/bin/sh
# Starts Debian's arm64 kernel as the original protected hypervisor on the same machine model. Counts the
# instructions that it takes for faults of its host and for sharing memory with its EL2, and decodes the
# host's stage 2 that it builds with this project's codec. Needs what run.sh needs and Debian's
# packages; the kernel is unpacked into the build directory and not installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
target=${CARGO_TARGET_DIR:-$here/../../target}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/../../target/hardware-arm64}
export CARGO_TARGET_DIR
. ./rust.sh
. ./kernel.sh
. ../archive.sh
for program in qemu-system-aarch64 aarch64-linux-gnu-ld; do
    command -v $program >/dev/null || {
        echo "original.sh: $program is missing; on Debian: apt-get install qemu-system-arm" \
            "binutils-aarch64-linux-gnu" >&2
        exit 1
    }
done
(cd ../.. && CARGO_TARGET_DIR=$target cargo build --quiet -p twofold-pkvm --example original)
rust_for_aarch64 "$CARGO_TARGET_DIR/rust" || { echo "original.sh: no Rust for aarch64" >&2; exit 1; }
kernel=$(debian_kernel "$CARGO_TARGET_DIR/arm64-kernel") ||
    { echo "original.sh: no kernel to be had" >&2; exit 1; }
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET || true
cargo build --release --quiet
images=$CARGO_TARGET_DIR/aarch64-unknown-linux-gnu/release
work=$CARGO_TARGET_DIR/original
mkdir -p "$work"
aarch64-linux-gnu-strip -o "$work/init" "$images/init"
{ archived init 33261 "$work/init"; archive_ends; } >"$work/archive"

# A recorded run counts its instructions, and when it ends the machine stays there to be read.
port=${TWOFOLD_DEBUG_PORT:-3941}
look_into() { # NAME LOOKS ARGUMENTS...: what to look for, and what the machine starts
    echo "$1:"
    looks=$2
    shift 2
    qemu-system-aarch64 -M virt,virtualization=on,gic-version=3 -cpu cortex-a72 -m 512 -smp 1 \
        -icount "shift=0,rr=record,rrfile=$work/record" -no-shutdown \
        -display none -nodefaults -serial "file:$work/console" -gdb "tcp:127.0.0.1:$port" -S \
        "$@" </dev/null &
    machine=$!
    # shellcheck disable=SC2086 # a list of words
    timeout "${TWOFOLD_HARDWARE_SECONDS:-300}" "$target/debug/examples/original" \
        "127.0.0.1:$port" $looks
    kill -KILL $machine
    wait $machine 2>/dev/null || true
    port=$((port + 1))
}
trap 'kill -KILL $machine 2>/dev/null || true' EXIT
# The numbers of the calls are those of Linux 6.1, and this project's.
look_into "$(basename "$kernel"), kvm-arm.mode=protected" \
    "--count --table share_hyp=9 unshare_hyp=10" \
    -kernel "$kernel" -initrd "$work/archive" -append "console=ttyAMA0 kvm-arm.mode=protected"
look_into "this project's" "--count share_hyp=64 unshare_hyp=65" \
    -kernel "$images/el2" -device "loader,file=$images/host"
