#!/bin/sh
# Builds the image and runs it: run.sh bochs MODEL, or run.sh qemu.
# Models with EPT: tigerlake, corei7_icelake_u; with nested paging: ryzen.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
machine=${1:-qemu}
model=${2:-tigerlake}
cd "$here"
# Flags from the environment would replace those of .cargo/config.toml.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET || true
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/../../target/hardware}
export CARGO_TARGET_DIR
cargo build --release --quiet
target=$CARGO_TARGET_DIR
elf=$target/x86_64-unknown-linux-gnu/release/twofold-hardware-x86
work=$target/hardware-x86
mkdir -p "$work"
objcopy -O binary "$elf" "$work/image.bin"

# A run that hangs is a failure.
limit="timeout ${TWOFOLD_HARDWARE_SECONDS:-120}"
case $machine in
bochs)
    nasm -f bin rom.asm -o "$work/rom.bin"
    sed "s#@DIR@#$work#; s#@MODEL@#$model#" bochsrc.in >"$work/bochsrc-$model"
    printf 'c\nq\n' >"$work/bochs-commands"
    TERM=xterm $limit bochs-bin -q -f "$work/bochsrc-$model" -rc "$work/bochs-commands" </dev/null
    ;;
qemu)
    status=0
    $limit qemu-system-x86_64 -machine q35 -accel tcg -cpu max -m 128 -smp 2 -display none \
        -nodefaults -no-reboot -debugcon stdio -global isa-debugcon.iobase=0xe9 \
        -device isa-debug-exit,iobase=0xf4,iosize=4 -kernel "$work/image.bin" || status=$?
    [ "$status" -eq 33 ]
    ;;
*)
    echo "$0: no machine called $machine; there are bochs and qemu" >&2
    exit 2
    ;;
esac
