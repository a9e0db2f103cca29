# Sourced by run.sh: finds a Rust compiler with `core` for aarch64, or says what is missing.
#
# A rustup target is used if there is one. Otherwise Debian's own compiler and libraries, in one
# version for both architectures, are unpacked into a folder of the build directory; nothing is
# installed, since the packages would take the place of other compilers.

# rust_for_aarch64 FOLDER: exports RUSTC, LD_LIBRARY_PATH and PATH where they are needed. CLIPPY says
# whether `cargo clippy` is the compiler's own.
rust_for_aarch64() {
    folder=$1
    libraries=$(rustc --print target-libdir --target aarch64-unknown-linux-gnu 2>/dev/null || true)
    if [ -n "$libraries" ] && ls "$libraries"/libcore-*.rlib >/dev/null 2>&1; then
        CLIPPY=no
        cargo clippy --version >/dev/null 2>&1 && CLIPPY=yes
        return 0
    fi
    CLIPPY=yes
    if [ ! -e "$folder/complete" ] || [ ! -e "$folder/usr/bin/cargo-clippy" ]; then
        if unpack_rust "$folder.new"; then
            rm -rf "$folder"
            mv "$folder.new" "$folder"
        elif [ -e "$folder/complete" ]; then
            # From before clippy was among the packages.
            CLIPPY=no
        else
            return 1
        fi
    fi
    PATH=$folder/usr/bin:$PATH
    RUSTC=$folder/usr/bin/rustc
    LD_LIBRARY_PATH=$folder/usr/lib/x86_64-linux-gnu
    export RUSTC LD_LIBRARY_PATH PATH
}

unpack_rust() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    [ "$(dpkg --print-architecture)" = amd64 ] || return 1
    rm -rf "$1"
    mkdir -p "$1/lists/partial" "$1/packages"
    # Lists of its own, so that the machine's are not changed.
    apt="-qq -o Dir::State::lists=$1/lists -o APT::Architectures::=amd64 -o APT::Architectures::=arm64
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache="
    # shellcheck disable=SC2086 # lists of words
    apt-get $apt update >/dev/null 2>&1 || return 1
    # Their names carry versions: the compiler's library, and LLVM, which that one needs.
    compiler=$(depends_of "$apt" libstd-rust-web-dev 'libstd-rust-web-[0-9.]*')
    llvm=$(depends_of "$apt" "$compiler" 'libllvm[0-9]*')
    # shellcheck disable=SC2086
    (cd "$1/packages" && apt-get $apt download rustc-web rust-web-clippy libstd-rust-web-dev:amd64 \
        libstd-rust-web-dev:arm64 $compiler $llvm >/dev/null 2>&1) || return 1
    for package in "$1"/packages/*.deb; do
        dpkg -x "$package" "$1" || return 1
    done
    rm -rf "$1/lists" "$1/packages"
    touch "$1/complete"
}

# depends_of OPTIONS PACKAGE PATTERN: the names among a package's dependencies.
depends_of() {
    # shellcheck disable=SC2086 # a list of words
    apt-cache ${1#-qq} depends $2 2>/dev/null | sed -n "s/.*Depends: \($3\)\$/\1/p" | sort -u
}
