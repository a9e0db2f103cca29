#!/bin/sh
# What KVM and Twofold do to second-stage entries while the same program runs.
#
# Boots Debian's kernel 6.12 on QEMU's AMD processor, where its KVM has nested paging, and traces what
# KVM does to its tables; runs the same program with `twofold run`; compares. Needs
# qemu-system-x86_64 and, once, Debian's packages: the kernel is unpacked into the build directory and
# not installed.
#
#   run.sh                  fails if something is missing
#   run.sh --if-available   says so and succeeds instead
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. ./kernel.sh
. ../archive.sh

missing() {
    echo "kvm/run.sh: $1"
    [ "$2" = --if-available ] && exit 0
    exit 1
}

command -v qemu-system-x86_64 >/dev/null ||
    missing "qemu-system-x86_64 is missing; on Debian: apt-get install qemu-system-x86" "${1:-}"
twofold=${TWOFOLD_TARGET_DIR:-${CARGO_TARGET_DIR:-$here/../../target}}
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/../../target/hardware}
export CARGO_TARGET_DIR
kernel=$CARGO_TARGET_DIR/amd64-kernel
debian_kernel "$kernel" || missing "Debian's kernel cannot be had" "${1:-}"

cargo build --release --quiet -p twofold-transitions
(cd ../.. && CARGO_TARGET_DIR=$twofold cargo build --release --quiet -p twofold -p twofold-preload)
programs=$CARGO_TARGET_DIR/release
work=$CARGO_TARGET_DIR/hardware-kvm
mkdir -p "$work"

# The program is the very file that runs on Twofold, so it brings its libraries.
folder=16877
program=33261
{
    for name in dev proc sys lib lib64 modules; do archived $name $folder /dev/null; done
    archived init $program "$programs/init"
    archived transitions $program "$programs/transitions"
    ldd "$programs/init" "$programs/transitions" |
        sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' | sort -u |
        while read -r library; do archived "lib/${library##*/}" $program "$library"; done
    archived lib64/ld-linux-x86-64.so.2 $program /lib64/ld-linux-x86-64.so.2
    for module in "$kernel"/modules/*; do
        archived "modules/${module##*/}" $program "$module"
    done
    archive_ends
} >"$work/archive"

# Four levels, as Twofold's tables for this guest have.
rm -f "$work/trace"
timeout "${TWOFOLD_HARDWARE_SECONDS:-120}" qemu-system-x86_64 -machine q35 -accel tcg \
    -cpu max,-la57 -m 512 -smp 1 -display none -nodefaults -no-reboot \
    -serial "file:$work/console" -serial "file:$work/trace" \
    -kernel "$kernel/vmlinuz" -initrd "$work/archive" \
    -append "console=ttyS0 quiet panic=-1 mitigations=off" </dev/null || true
if ! [ -s "$work/trace" ] || grep -a '^init: ' "$work/console"; then
    echo "= entries as KVM's | FAILED | the machine did not do its part: see $work/console"
    exit 1
fi

run="$twofold/release/twofold run --second-stage npt --log twofold_mmu=trace,warn --"
# Both append: Twofold its messages, and the program what it does.
: >"$work/twofold"
$run "$programs/transitions" usual /dev/stderr 2>>"$work/twofold"
TWOFOLD_NX_HUGE_PAGES=Y TWOFOLD_EAGER_PAGE_SPLIT=N \
    $run "$programs/transitions" careful /dev/stderr 2>>"$work/twofold"
echo "$(cat "$kernel/name") beside Twofold:"
"$programs/compare" "$work/trace" "$work/twofold"
