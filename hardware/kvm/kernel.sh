# Sourced: Debian's amd64 kernel 6.12 and its KVM, unpacked into the build directory and not installed.

# debian_kernel FOLDER: FOLDER/vmlinuz and FOLDER/modules are there afterwards.
debian_kernel() {
    folder=$1
    [ ! -e "$folder/complete" ] || return 0
    command -v apt-get >/dev/null || return 1
    rm -rf "${folder:?}"
    mkdir -p "$folder/lists/partial" "$folder/modules"
    # Debian 12 has this kernel among its backports, which are not among a machine's sources as a rule.
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
        "http://deb.debian.org/debian bookworm-backports main" >"$folder/sources"
    apt="-o Dir::Etc::sourcelist=$folder/sources -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists=$folder/lists -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o APT::Architectures::=amd64"
    # shellcheck disable=SC2086 # lists of words
    apt-get -qq $apt update >/dev/null 2>&1 || return 1
    # shellcheck disable=SC2086
    package=$(apt-cache $apt depends linux-image-amd64:amd64 |
        sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
    # shellcheck disable=SC2086
    (cd "$folder" && apt-get -qq $apt download "$package" >/dev/null 2>&1 &&
        dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards './boot/vmlinuz-*' \
            '*/irqbypass.ko.xz' '*/ccp.ko.xz' '*/kvm.ko.xz' '*/kvm-amd.ko.xz' &&
        mv boot/vmlinuz-* vmlinuz && find lib -name '*.ko.xz' -exec mv {} modules \;) || return 1
    echo "$package" >"$folder/name"
    rm -rf "${folder:?}/lists" "${folder:?}"/*.deb "${folder:?}/lib" "${folder:?}/boot"
    touch "$folder/complete"
}
