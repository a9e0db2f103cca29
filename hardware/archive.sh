# Sourced: an archive as the kernel unpacks it into its first file system.

# archived NAME MODE FILE: one file of it. A header of thirteen numbers, the name, the bytes, each
# padded to four. A folder has /dev/null's bytes.
archived() {
    size=$(stat -Lc %s "$3")
    printf '070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\0' \
        1 "$2" 0 0 1 0 "$size" 0 0 0 0 $((${#1} + 1)) 0 "$1"
    head -c $(((4 - (111 + ${#1}) % 4) % 4)) /dev/zero
    cat "$3"
    head -c $(((4 - size % 4) % 4)) /dev/zero
}

# The end.
archive_ends() {
    archived 'TRAILER!!!' 0 /dev/null
}
