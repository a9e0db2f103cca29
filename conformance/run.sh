#!/usr/bin/env bash
# Runs other people's KVM clients, unmodified, under Twofold, and prints a table.
#
# usage: conformance/run.sh [--under "COMMAND PREFIX"] [--only PATTERN] [--list]
#                           [--if-available] [--suite FILE] [--logs FOLDER]
#
#   --under PREFIX   what each program is started with (words split at blanks);
#                    by default target/release/twofold run --
#                    "none" starts them on the machine's own /dev/kvm
#   --only PATTERN   only rows whose name contains PATTERN (a shell pattern)
#   --list           print the rows and start nothing
#   --if-available   where the programs cannot be had (no Debian packages, no
#                    registry), say so in one line and do without them
#   --suite FILE     another list of rows (by default suite.tsv, beside this)
#   --logs FOLDER    where the programs' output goes, a file a row
#                    (by default target/conformance/logs)
#
# Each line of the table: pass, skip with the test's own reason, or fail with the
# last line that means something; seconds; the row's name. A row that is not
# promised yet stands in brackets and counts nowhere; so does one that needs huge
# pages which this machine does not give ("unavail"). The last line counts the
# promised rows. Exit status: 0 if every promised row passed; 1 if one failed or
# skipped, or if a suite could not be built; 2 for a wrong command line.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    sed -n '/^# usage/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

wrong() {
    printf 'run.sh: %s\n' "$*" >&2
    usage >&2
    exit 2
}

here=$CONFORMANCE_ROOT/conformance
suite=$here/suite.tsv
logs=$CONFORMANCE_ROOT/target/conformance/logs
only=
list=false
if_available=false
twofold=$CONFORMANCE_ROOT/target/release/twofold
under=("$twofold" run --)
default_under=true
arguments=("$@")

while (($# > 0)); do
    case $1 in
    --under | --only | --suite | --logs)
        (($# > 1)) || wrong "$1 needs a value"
        case $1 in
        --under)
            default_under=false
            if [[ $2 == none ]]; then under=(); else read -ra under <<<"$2"; fi
            ;;
        --only) only=$2 ;;
        --suite) suite=$2 ;;
        --logs) logs=$2 ;;
        esac
        shift 2
        ;;
    --list)
        list=true
        shift
        ;;
    --if-available)
        if_available=true
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) wrong "unknown argument $1" ;;
    esac
done

# The rows, as parallel lists.
names=() promises=() limits=() features=() commands=()
read_suite() {
    local name promise limit feature command number=0
    [[ -r $suite ]] || wrong "cannot read $suite"
    while IFS=$'\t' read -r name promise limit feature command; do
        number=$((number + 1))
        [[ -z $name || $name == \#* ]] && continue
        [[ $promise == pass || $promise == later ]] ||
            die "$suite:$number: the promise is '$promise', neither pass nor later"
        [[ $limit =~ ^[1-9][0-9]*$ ]] ||
            die "$suite:$number: '$limit' is no number of seconds"
        [[ -n $command ]] || die "$suite:$number: no command"
        # shellcheck disable=SC2053 # the pattern is meant to be one
        [[ -z $only || $name == *$only* ]] || continue
        names+=("$name") promises+=("$promise") limits+=("$limit")
        features+=("$feature") commands+=("$command")
    done <"$suite"
    ((${#names[@]} > 0)) || wrong "no row matches '$only'"
}
read_suite

if $list; then
    for i in "${!names[@]}"; do
        printf '%-5s %4ss  %-28s %s\n' "${promises[i]}" "${limits[i]}" \
            "${features[i]}" "${names[i]}"
    done
    exit 0
fi

# Proof that nothing was run by the kernel's KVM: as root its device is hidden
# from everything below, in a mount namespace of our own.
if $default_under && [[ -c /dev/kvm && -z ${TWOFOLD_KVM_HIDDEN-} ]] && ((EUID == 0)) &&
    unshare --mount mount --bind /dev/null /dev/kvm 2>/dev/null; then
    # shellcheck disable=SC2016 # expanded by the inner shell
    TWOFOLD_KVM_HIDDEN=yes exec unshare --mount bash -c \
        'mount --bind /dev/null /dev/kvm && exec "$@"' hide \
        "${BASH_SOURCE[0]}" "${arguments[@]}"
fi

if $default_under; then
    [[ -x $twofold ]] || die "there is no $twofold yet: make build"
    # And proof that the preloaded library is there at all.
    "${under[@]}" grep -q libtwofold /proc/self/maps ||
        die "'twofold run' starts programs without libtwofold.so"
fi

# Builds what the rows need. A suite that this machine cannot have is left out.
declare -A left_out=()
prepare() {
    local suite_name=$1 script=$2 status=0 i used=false reason
    for i in "${!commands[@]}"; do
        [[ ${commands[i]} =~ ^([^ ]*=[^ ]*\ )*($3) ]] && used=true
    done
    $used || return 0
    { reason=$("$script" 2>&1 >&3) || status=$?; } 3>&1
    if ((status == EXIT_UNAVAILABLE)); then
        reason=${reason##*$'\n'}
        left_out[$suite_name]=${reason#*: }
        printf '%s left out: %s\n' "$suite_name" "${left_out[$suite_name]}"
    elif ((status != 0)); then
        printf '%s\n' "$reason" >&2
        die "could not build $suite_name"
    fi
}
prepare "KVM's selftests" "$here/build-selftests.sh" 'selftests/'
prepare "kvm-ioctls' tests" "$here/build-kvm-ioctls.sh" 'unit |doc '
prepare QEMU "$here/build-qemu.sh" 'qemu '
prepare "Linux under QEMU" "$here/build-linux.sh" 'linux '
if ((${#left_out[@]} > 0)) && ! $if_available; then
    die "not everything is available here (--if-available does without)"
fi

mkdir -p "$logs"
logs=$(cd "$logs" && pwd)

# cargo starts the documentation tests through this.
runner=$logs/.runner
{
    echo '#!/bin/sh'
    printf 'exec'
    ((${#under[@]} == 0)) || printf ' %q' "${under[@]}"
    # shellcheck disable=SC2016 # expanded by the runner
    echo ' "$@"'
} >"$runner"
chmod +x "$runner"

# A guest that resets itself ends QEMU, as one that turns itself off does.
qemu=(qemu-system-x86_64 -accel kvm -display none -nodefaults -no-reboot -monitor none)

# argv_of COMMAND: sets argv, kind, where (the folder to start it in) and
# huge_pages (how many it needs).
argv_of() {
    local words environment=()
    read -ra words <<<"$1"
    where=$logs
    huge_pages=0
    while [[ ${words[0]} == *=* ]]; do
        case ${words[0]} in
        hugepages=*) huge_pages=${words[0]#*=} ;;
        *) environment+=("${words[0]}") ;;
        esac
        words=("${words[@]:1}")
    done
    case ${words[0]} in
    selftests/*)
        kind=selftest
        argv=("${under[@]}" "$CONFORMANCE_DIR/selftests/bin/${words[0]#selftests/}" "${words[@]:1}")
        ;;
    unit)
        kind=cargo
        argv=("${under[@]}" "$CONFORMANCE_DIR/kvm-ioctls/unit" --exact --test-threads=1 "${words[@]:1}")
        ;;
    doc)
        kind=cargo
        where=$CONFORMANCE_DIR/kvm-ioctls/crate
        argv=(env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET
            "CARGO_TARGET_DIR=$CONFORMANCE_DIR/kvm-ioctls/build"
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$runner"
            cargo test --doc --quiet --locked --offline -- --test-threads=1 "${words[@]:1}")
        ;;
    qemu)
        kind=report
        argv=("${under[@]}" "${qemu[@]}" -debugcon stdio -device "isa-debug-exit,iobase=0xf4"
            -kernel "$CONFORMANCE_DIR/qemu/guest.bin" "${words[@]:1}")
        ;;
    linux)
        kind=report
        argv=("${under[@]}" "${qemu[@]}" -serial stdio -m 256
            -kernel "$CONFORMANCE_DIR/linux/vmlinuz" -initrd "$CONFORMANCE_DIR/linux/archive"
            -append "console=ttyS0 quiet panic=-1 processors=${words[1]}"
            -smp "${words[1]}" "${words[@]:2}")
        ;;
    /*)
        kind=selftest
        argv=("${under[@]}" "${words[@]}")
        ;;
    *) die "$suite: no such kind of command: $1" ;;
    esac
    ((${#environment[@]} == 0)) || argv=(env "${environment[@]}" "${argv[@]}")
}

# Huge pages of 2 MiB, which only the kernel's administrator reserves. What was
# reserved before is restored after each row, whatever became of it.
pool=/proc/sys/vm/nr_hugepages
reserved_before=
reserve_huge_pages() {
    local wanted=$1 now
    [[ -w $pool ]] && grep -q '^Hugepagesize: *2048 kB' /proc/meminfo || return 1
    reserved_before=$(<"$pool")
    echo $((reserved_before + wanted)) >"$pool" || return 1
    now=$(<"$pool")
    if ((now < reserved_before + wanted)); then
        give_back_huge_pages
        return 1
    fi
}

give_back_huge_pages() {
    [[ -z $reserved_before ]] || echo "$reserved_before" >"$pool"
    reserved_before=
}
trap give_back_huge_pages EXIT

# Every process of a session, so that nothing outlives its row, whatever process
# groups a test made for itself.
end_session() {
    local session=$1 stat line fields pid
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        # After the name in parentheses: state, parent, group, session.
        read -ra fields <<<"${line##*) }"
        if [[ ${fields[3]-} == "$session" ]]; then
            pid=${stat#/proc/}
            kill -KILL "${pid%/stat}" 2>/dev/null || true
        fi
    done
}

session=
interrupted() {
    [[ -z $session ]] || end_session "$session"
    exit 130
}
trap interrupted INT TERM

# The last line of a log that tells something: not a stack trace, not a summary
# that repeats the verdict.
telling_line() {
    sed -e 's/\r$//' "$1" |
        grep -avE '^[[:space:]]*$|^ *[0-9]+	|^ +[0-9]+: |^ +at |stack trace empty|addr2line|^timeout: |^note: |^# Totals|^test result|^failures:|^ {4}[a-z_:]+$|^error: (test|doctest) failed|^error: doctests|rerun pass|^all doctests ran' |
        tail -n 1 | sed -e 's/^[[:space:]]*//' | cut -c1-160 || true
}

# Where and with what a Rust test panicked, on one line.
panic_line() {
    sed -n '/panicked at /{
        s/.*panicked at \(.*\)$/\1/
        $!N;$!N;$!N
        s/\n *\(left: [^\n]*\)\n *\(right: [^\n]*\)/ (\1, \2)/
        s/\n\(stack backtrace\|note: \).*//
        s/\n/ /;s/\n.*//
        p;q
    }' "$1" | cut -c1-160
}

# The reason that a test gives for skipping.
skip_reason() {
    local reason
    reason=$(sed -n 's/.*# SKIP[ :-]*//p' "$1" | tail -n 1 | cut -c1-160)
    [[ -n $reason ]] || reason=$(telling_line "$1")
    printf '%s' "${reason:-no reason given}"
}

# judge STATUS SECONDS LIMIT LOG: sets verdict and remark.
judge() {
    local status=$1 spent=$2 limit=$3 log=$4 ok skipped not_ok ran ignored
    remark=
    if ((status == 124 || status == 137)) && ((spent >= limit)); then
        verdict=fail
        remark="did not end within $limit s; last: $(telling_line "$log")"
    elif ((status >= 128 && status <= 192)); then
        verdict=fail
        remark="killed by SIG$(kill -l $((status - 128)) 2>/dev/null || echo "$((status - 128))"); last: $(telling_line "$log")"
    elif [[ $kind == cargo ]]; then
        ran=$(sed -n 's/^test result: .* \([0-9]*\) passed;.*/\1/p' "$log" | tail -n 1)
        ignored=$(sed -n 's/^test result: .* \([0-9]*\) ignored;.*/\1/p' "$log" | tail -n 1)
        if ((status != 0)); then
            verdict=fail
            remark=$(panic_line "$log")
            [[ -n $remark ]] || remark="status $status: $(telling_line "$log")"
        elif ((${ran:-0} > 0)); then
            verdict=pass
        elif ((${ignored:-0} > 0)); then
            verdict=skip
            remark="the test is ignored"
        else
            verdict=fail
            remark="no test of this name was run"
        fi
    elif [[ $kind == report ]]; then
        # The guest says how many checks there are, and of each how it went.
        ran=$(sed -n 's/^1\.\.\([0-9]*\)\r*$/\1/p' "$log" | tail -n 1)
        ok=$(grep -acE '^ok ' "$log" || true)
        verdict=fail
        if grep -aqE '^(not ok|Bail out!) ' "$log"; then
            remark=$(grep -aE '^(not ok|Bail out!) ' "$log" | head -n 1 | tr -d '\r' | cut -c1-160)
        elif ((status != 0)); then
            remark="status $status: $(telling_line "$log")"
        elif ((ok == 0 || ok != ${ran:-0})); then
            remark="the guest ended after $ok of ${ran:-an unknown number of} checks; last: $(telling_line "$log")"
        else
            verdict=pass
        fi
    else
        not_ok=$(grep -acE '^not ok ' "$log" || true)
        ok=$(grep -aE '^ok ' "$log" | grep -avc '# SKIP' || true)
        skipped=$(grep -acE '^ok .*# SKIP' "$log" || true)
        if ((status == 4)); then
            verdict=skip
            remark=$(skip_reason "$log")
        elif ((status != 0)); then
            verdict=fail
            remark="status $status: $(telling_line "$log")"
        elif ((not_ok > 0)); then
            verdict=fail
            remark="status 0, but $(grep -aE '^not ok ' "$log" | head -n 1 | cut -c1-120)"
        elif grep -aqE '^1\.\.0 # SKIP' "$log" || ((skipped > 0 && ok == 0)); then
            verdict=skip
            remark=$(skip_reason "$log")
        else
            verdict=pass
            if ((skipped > 0)); then
                remark="$skipped of its subtests skipped: $(skip_reason "$log")"
            elif grep -aqE '^Skipping ' "$log"; then
                remark=$(grep -aE '^Skipping ' "$log" | head -n 1 | cut -c1-120)
            fi
        fi
    fi
}

width=0
for i in "${!names[@]}"; do
    case ${commands[i]} in
    selftests/* | *=*\ selftests/*) from="KVM's selftests" ;;
    unit\ * | doc\ *) from="kvm-ioctls' tests" ;;
    qemu\ *) from=QEMU ;;
    linux\ *) from="Linux under QEMU" ;;
    *) from=here ;;
    esac
    if [[ -n ${left_out[$from]-} ]]; then
        unset "names[i]"
    elif ((${#names[i]} > width)); then
        width=${#names[i]}
    fi
done
# Nothing is left to run, and it was said why.
((${#names[@]} > 0)) || exit 0

printf '%-7s %8s  %-*s %s\n' result seconds "$width" test remark

passed=0 failed=0 skipped_rows=0
later=0 later_passed=0 unavailable=0
for i in "${!names[@]}"; do
    argv_of "${commands[i]}"
    log=$logs/$(tr -c 'A-Za-z0-9._\n-' _ <<<"${names[i]}").log
    if ((huge_pages > 0)) && ! reserve_huge_pages "$huge_pages"; then
        unavailable=$((unavailable + 1))
        printf '%-7s %8s  %-*s %s\n' unavail - "$width" "${names[i]}" \
            "needs $huge_pages huge pages, and cannot reserve them"
        continue
    fi
    start=$EPOCHREALTIME
    status=0
    (cd "$where" && exec setsid timeout -k 2 "${limits[i]}" "${argv[@]}") >"$log" 2>&1 </dev/null &
    session=$!
    { wait "$session" || status=$?; } 2>/dev/null
    end_session "$session"
    session=
    give_back_huge_pages
    end=$EPOCHREALTIME
    # Both have six digits behind the point (or comma, by locale).
    spent=$((${end/[.,]/} - ${start/[.,]/}))
    judge "$status" $((spent / 1000000)) "${limits[i]}" "$log"

    shown=$verdict
    if [[ ${promises[i]} == later ]]; then
        shown="($verdict)"
        later=$((later + 1))
        [[ $verdict != pass ]] || later_passed=$((later_passed + 1))
    else
        case $verdict in
        pass) passed=$((passed + 1)) ;;
        skip) skipped_rows=$((skipped_rows + 1)) ;;
        *) failed=$((failed + 1)) ;;
        esac
    fi
    seconds=$(printf '%d.%02d' $((spent / 1000000)) $((spent % 1000000 / 10000)))
    line=$(printf '%-7s %8s  %-*s %s' "$shown" "$seconds" "$width" "${names[i]}" "$remark")
    printf '%s\n' "${line%"${line##*[! ]}"}"
done

((later == 0)) || printf 'In brackets, not promised yet: %d of %d pass.\n' "$later_passed" "$later"
((unavailable == 0)) ||
    printf '%d could not be tried on this machine\n' "$unavailable"
((failed == 0)) || printf "The programs' output is in %s\n" "$logs"
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped_rows"
((failed + skipped_rows == 0))
