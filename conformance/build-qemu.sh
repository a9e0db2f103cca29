#!/usr/bin/env bash
# Makes what the rows about QEMU need: Debian's QEMU, which it installs where it
# may, and the guest of qemu/guest.s, as CONFORMANCE_DIR/qemu/guest.bin.
#
# usage: conformance/build-qemu.sh
#
# Exit status: 0 it is there; 77 this machine cannot (one line says what is
# missing); anything else is a failure, with the end of the log shown.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# == 0)) || die "unknown argument $1 (usage: build-qemu.sh)"

home=$CONFORMANCE_DIR/qemu
log=$home/build.log
mkdir -p "$home"
exec 9>"$home/lock"
flock 9
: >"$log"

[[ $(uname -sm) == 'Linux x86_64' ]] ||
    unavailable "QEMU's KVM guests need Linux on x86_64, this is $(uname -sm)"
need_tools "$log" qemu-system-x86_64=qemu-system-x86 as=binutils ld=binutils

quietly "$log" as --64 -o "$home/guest.o" "$CONFORMANCE_ROOT/conformance/qemu/guest.s"
quietly "$log" ld -Ttext=0x100000 --oformat binary -o "$home/guest.bin" "$home/guest.o"
