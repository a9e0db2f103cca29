#!/usr/bin/env bash
# Builds KVM's own selftests, unmodified, from Debian's linux-source-6.12.
#
# usage: conformance/build-selftests.sh [--force]
#
# The binaries end up in CONFORMANCE_DIR/selftests/bin (see common.sh), with the
# version of the package in CONFORMANCE_DIR/selftests/version. If they are
# already there nothing is done; --force builds them again.
#
# Exit status: 0 built or already there; 77 this machine cannot (one line says
# what is missing); anything else is a failure, with the end of the log shown.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

package=linux-source-6.12
# What of the kernel's tree the tests' Makefiles reach.
parts=(Makefile Kbuild Kconfig scripts include arch tools virt)

case ${1-} in
'' | --force) ;;
*) die "unknown argument $1 (usage: build-selftests.sh [--force])" ;;
esac

home=$CONFORMANCE_DIR/selftests
log=$home/build.log
mkdir -p "$home"

# Two runs at once (two clones on one cache) take turns.
exec 9>"$home/lock"
flock 9

if [[ ${1-} != --force && -f $home/version ]]; then
    exit 0
fi
rm -f "$home/version"
: >"$log"

[[ $(uname -sm) == 'Linux x86_64' ]] ||
    unavailable "KVM's x86 selftests need Linux on x86_64, this is $(uname -sm)"
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null 2>&1 ||
        unavailable "no $tool here: KVM's selftests are built from Debian's package $package"
done
work=$home/work
rm -rf "$work"
mkdir -p "$work/package" "$work/tree"
# apt-get's unprivileged downloader must be able to write here; when it cannot
# (a home folder closed to others), apt-get warns and downloads as root.
cd "$work"
# Package lists may be missing (a fresh machine) or old (the version that they
# name is gone): then they are fetched, once.
updated=false
update_lists() {
    if ! $updated && ((EUID == 0)); then
        updated=true
        apt-get update >>"$log" 2>&1 </dev/null || true
    fi
}
apt-get --print-uris download "$package" >>"$log" 2>&1 </dev/null || update_lists
apt-get --print-uris download "$package" >>"$log" 2>&1 </dev/null ||
    unavailable "apt-get knows no package $package here (see $log)"
say "fetching $package"
if ! apt-get download "$package" >>"$log" 2>&1 </dev/null; then
    update_lists
    apt-get download "$package" >>"$log" 2>&1 </dev/null ||
        unavailable "apt-get cannot download $package here (see $log)"
fi
debs=("$package"_*.deb)
version=$(dpkg-deb -f "${debs[0]}" Version)
need_tools "$log" gcc make flex bison rsync tar xz=xz-utils
quietly "$log" dpkg-deb -x "${debs[0]}" package
rm -f -- "${debs[@]}"

say "building KVM's selftests of $package $version (about a minute)"
quietly "$log" tar -C tree --strip-components=1 \
    -xf "package/usr/src/$package.tar.xz" "${parts[@]/#/$package/}"
rm -rf package

jobs=$(nproc)
quietly "$log" make -C tree -j"$jobs" ARCH=x86 headers_install
# -C the tests' own folder and ARCH=x86: TARGETS=kvm ignores OUTPUT, and with
# x86_64 the guest's code is compiled without SSE4.1.
rm -rf "${home:?}/bin"
mkdir -p "$home/bin"
quietly "$log" make -C tree/tools/testing/selftests/kvm -j"$jobs" \
    ARCH=x86 OUTPUT="$home/bin"

# The sources stay for whoever reads a failure; the objects do not.
find "$home/bin" -name '*.[od]' -delete
rm -rf "$home/src"
mv tree/tools/testing/selftests/kvm "$home/src"
cd "$home"
rm -rf "$work"

count=$(find "$home/bin" -type f -perm -u+x | wc -l)
((count > 0)) || die "the build left no program in $home/bin (see $log)"
printf '%s\n' "$version" >"$home/version"
say "$count programs in $home/bin"
