# Sourced: Debian's arm64 kernel, unpacked into the build directory and not installed.

# debian_kernel FOLDER: prints the path of the kernel.
debian_kernel() {
    folder=$1
    if [ ! -e "$folder/complete" ]; then
        command -v apt-get >/dev/null || return 1
        rm -rf "$folder"
        mkdir -p "$folder/lists/partial"
        apt="-o Dir::State::lists=$folder/lists -o APT::Architectures::=amd64
            -o APT::Architectures::=arm64 -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache="
        # shellcheck disable=SC2086 # lists of words
        apt-get -qq $apt update >/dev/null 2>&1 || return 1
        # shellcheck disable=SC2086
        package=$(apt-cache $apt depends linux-image-arm64:arm64 |
            sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
        # shellcheck disable=SC2086
        (cd "$folder" && apt-get -qq $apt download "$package" >/dev/null 2>&1 &&
            dpkg -x ./*.deb .) || return 1
        rm -rf "$folder/lists" "$folder"/*.deb "$folder/lib"
        touch "$folder/complete"
    fi
    echo "$folder"/boot/vmlinuz-*
}
