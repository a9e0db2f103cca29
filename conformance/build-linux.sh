#!/usr/bin/env bash
# Makes what the rows about Linux need besides QEMU: Debian's kernel 6.12, and a
# first file system with Debian's busybox and linux/init. Nothing is installed.
#
# usage: conformance/build-linux.sh
#
# CONFORMANCE_DIR/linux/vmlinuz and .../archive are there afterwards. The kernel
# is the one that hardware/kvm has unpacked, if it has.
#
# Exit status: 0 it is there; 77 this machine cannot (one line says what is
# missing); anything else is a failure.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=../hardware/archive.sh
source "$CONFORMANCE_ROOT/hardware/archive.sh"
# shellcheck source=../hardware/kvm/kernel.sh
source "$CONFORMANCE_ROOT/hardware/kvm/kernel.sh"

(($# == 0)) || die "unknown argument $1 (usage: build-linux.sh)"

"$CONFORMANCE_ROOT/conformance/build-qemu.sh"

home=$CONFORMANCE_DIR/linux
log=$home/build.log
mkdir -p "$home"
exec 9>"$home/lock"
flock 9
: >"$log"

if [[ ! -e $home/vmlinuz ]]; then
    kernel=$CONFORMANCE_ROOT/target/hardware/amd64-kernel
    [[ -e $kernel/complete ]] || kernel=$home/kernel
    mkdir -p "$kernel"
    debian_kernel "$kernel" || unavailable "Debian's kernel cannot be had (apt-get download linux-image-amd64)"
    cp "$kernel/vmlinuz" "$home/vmlinuz"
fi

if [[ ! -e $home/busybox ]]; then
    rm -rf "$home/package"
    mkdir "$home/package"
    (cd "$home/package" && quietly "$log" apt-get download busybox-static) 2>/dev/null ||
        unavailable "missing: busybox (apt-get download busybox-static did not work)"
    dpkg-deb --fsys-tarfile "$home"/package/*.deb |
        tar -x --to-stdout ./bin/busybox >"$home/busybox"
    rm -rf "$home/package"
fi

# Modes as in a file system: folders, and programs that everyone may run.
folder=16877
program=33261
{
    for name in bin dev proc sys; do archived "$name" $folder /dev/null; done
    archived init $program "$CONFORMANCE_ROOT/conformance/linux/init"
    archived bin/busybox $program "$home/busybox"
    archive_ends
} >"$home/archive"
