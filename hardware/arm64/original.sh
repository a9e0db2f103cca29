#!/bin/sh
# Starts Debian's arm64 kernel as the original protected hypervisor on the same machine model, and
# decodes the host's stage 2 that it builds with this project's codec. Needs qemu-system-aarch64 and
# Debian's packages; the kernel is unpacked into the build directory and not installed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
folder=$target/arm64-kernel
. "$here/kernel.sh"
kernel=$(debian_kernel "$folder") || { echo "original.sh: no kernel to be had" >&2; exit 1; }
(cd "$here/../.." && CARGO_TARGET_DIR=$target cargo build --quiet -p twofold-pkvm --example original)

port=${TWOFOLD_DEBUG_PORT:-3941}
qemu-system-aarch64 -M virt,virtualization=on,gic-version=3 -cpu cortex-a72 -m 512 -smp 1 \
    -display none -nodefaults -serial "file:$folder/console" -gdb "tcp:127.0.0.1:$port" -S \
    -kernel "$kernel" -append "console=ttyAMA0 kvm-arm.mode=protected" </dev/null &
machine=$!
trap 'kill $machine 2>/dev/null || true' EXIT
sleep 1
echo "$(basename "$kernel"), kvm-arm.mode=protected"
timeout 120 "$target/debug/examples/original" "127.0.0.1:$port"
