#!/bin/sh
# Runs the image of hardware/x86 on every machine it has scenarios for, compares its walks with
# twofold-cpu's, and prints a table. Installs the machines where that is possible (Debian, as root).
#
# Then puts the modes and privileges of twofold-cpu before Bochs (processor/run.sh), and compares
# what the real KVM and Twofold do to their entries (kvm/run.sh).
#
#   run.sh                  fails if a machine is missing
#   run.sh --if-available   says so and succeeds instead
set -eu
here=$(cd "$(dirname "$0")" && pwd)
programs="bochs-bin nasm objcopy qemu-system-x86_64"
packages="bochs bochsbios bochs-term vgabios qemu-system-x86 nasm binutils"

missing() {
    for program in $programs; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

install_packages() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || return 0
    echo "installing $packages" >&2
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } \
            >/dev/null 2>&1 || true
}

[ -z "$(missing)" ] || install_packages
if [ -n "$(missing)" ]; then
    echo "hardware: these programs are missing:" $(missing)
    echo "hardware: on Debian they are in: $packages"
    [ "${1:-}" = --if-available ] && exit 0
    exit 1
fi

export TWOFOLD_TARGET_DIR="${CARGO_TARGET_DIR:-$here/../target}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$here/../target/hardware}"
(cd "$here" && cargo build --release --quiet -p twofold-walks)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
# name, and how x86/run.sh calls it
while read -r name arguments; do
    # shellcheck disable=SC2086 # a list of words
    "$here/x86/run.sh" $arguments >"$work/$name.log" 2>&1 </dev/null ||
        echo "= the run itself | FAILED | status $?" >>"$work/$name.log"
    grep -aq ' shown, ' "$work/$name.log" ||
        echo "= the run itself | FAILED | it did not reach its end" >>"$work/$name.log"
    "$CARGO_TARGET_DIR/release/twofold-walks" "$work/$name.log" >"$work/walks" || true
    cat "$work/walks" >>"$work/$name.log"
done <<END
tigerlake bochs tigerlake
icelake bochs corei7_icelake_u
ryzen bochs ryzen
qemu qemu
END

echo "                                          Bochs                          QEMU"
echo "                                          tigerlake  icelake-u  ryzen    max"
echo "                                          EPT        EPT        nested   nested"
awk -F ' [|] ' '
    FNR == 1 { machine++ }
    /^= / {
        name = substr($1, 3)
        if (!(name in known)) { known[name] = 1; order[++count] = name }
        cell[name, machine] = $2
        if ($2 == "FAILED") why[++reasons] = FILENAME ": " $0
    }
    END {
        for (row = 1; row <= count; row++) {
            name = order[row]
            printf "%-42s", name
            for (column = 1; column <= 4; column++)
                printf column < 3 ? "%-11s" : "%-9s", \
                    (name, column) in cell ? cell[name, column] : "?"
            printf "\n"
        }
        for (reason = 1; reason <= reasons; reason++) print why[reason]
        exit reasons > 0
    }' "$work/tigerlake.log" "$work/icelake.log" "$work/ryzen.log" "$work/qemu.log" || failed=1

echo
"$here/processor/run.sh" "$@" >"$work/processor.log" 2>&1 || failed=1
cat "$work/processor.log"
"$here/kvm/run.sh" "$@" >"$work/kvm.log" 2>&1 || failed=1
awk -F ' [|] ' '
    /^= / { printf "\n%-42s%s; %s\n", substr($1, 3), $2, $3; next }
    { print }' "$work/kvm.log"
if [ "$failed" -ne 0 ]; then
    keep=$(mktemp -d)
    cp "$work"/*.log "$keep"
    echo "hardware: something failed; what the machines printed is in $keep"
fi
exit "$failed"
