#!/bin/sh
# Puts twofold-cpu's 16-bit modes and what depends on privilege before Bochs, and asks QEMU about
# what differs. ../run.sh installs the programs.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
for program in bochs-bin nasm qemu-system-x86_64; do
    command -v "$program" >/dev/null || {
        echo "processor: $program is missing; hardware/run.sh installs it"
        [ "${1:-}" = --if-available ] && exit 0
        exit 1
    }
done
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$here/../../target/hardware}"
(cd "$here/.." && cargo build --quiet -p twofold-processor)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nasm -f bin "$here/driver.asm" -o "$work/driver.bin"
nasm -f bin "$here/../x86/rom.asm" -o "$work/reset.bin"
"$CARGO_TARGET_DIR/debug/twofold-processor" "$work/driver.bin" "$work/reset.bin" \
    "$here/../x86/bochsrc.in" "$work"
