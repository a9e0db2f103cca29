#!/usr/bin/env bash
# Shows that run.sh judges rightly: programs that pass, fail, skip, hang, crash
# or lie are put before it, and each line of its table, its count and its exit
# status are compared with what they must be. Needs no KVM, no network and a few
# seconds.
#
# usage: conformance/selfcheck.sh
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run=$CONFORMANCE_ROOT/conformance/run.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

checks=0 failures=0
check() {
    local what=$1 got=$2 want=$3
    checks=$((checks + 1))
    if [[ $got != "$want" ]]; then
        failures=$((failures + 1))
        printf 'selfcheck.sh: %s\n  got:  %s\n  want: %s\n' "$what" "$got" "$want"
    fi
}

# fake NAME: makes a program from what is on stdin.
fake() {
    mkdir -p "$(dirname "$scratch/$1")"
    { printf '#!/usr/bin/env bash\n' && cat; } >"$scratch/$1"
    chmod +x "$scratch/$1"
}

# row NAME PROMISE SECONDS COMMAND, into the list $scratch/suite.
row() {
    printf '%s\t%s\t%s\tselfcheck\t%s\n' "$@" >>"$scratch/suite"
}

# table ARGS...: runs run.sh on the list; sets out and status.
table() {
    status=0
    out=$(TWOFOLD_CONFORMANCE_DIR=$scratch/cache \
        "$run" --suite "$scratch/suite" --logs "$scratch/logs" "$@" 2>&1) || status=$?
}

# The line of the table about a row, without the seconds.
line_of() {
    sed -n "s/^\([a-z()]*\)  *[0-9.]*  \($1\)\( .*\|\)$/\1 \2\3/p" <<<"$out" | tr -s ' '
}

# state_of PID: alive, or gone (also when nobody has collected its status yet).
state_of() {
    local line
    if { read -r line <"/proc/$1/stat"; } 2>/dev/null && [[ ${line##*) } != Z* ]]; then
        echo alive
    else
        echo gone
    fi
}

# What KVM's selftests do: exit 0, 4 or 254, with their own words.
fake pass <<<'echo "Random seed: 0x6b8b4567"'
fake fail <<'SH'
echo "==== Test Assertion Failure ====" >&2
echo "  guest.c:10: r == 0" >&2
printf '     1\t0x1234: main at guest.c:10\n' >&2
echo "  the slot is gone" >&2
exit 254
SH
fake skip <<'SH'
echo "1..0 # SKIP - Requirement not met: kvm_has_cap(KVM_CAP_NONE)"
exit 4
SH
fake crash <<<'echo "before the end"; kill -SEGV $$'
# Ignores the polite signal, and leaves a child in a process group of its own.
fake hang <<SH
trap '' TERM
set -m
sleep 300 &
echo \$! >"$scratch/orphan"
echo "waiting for nothing"
while :; do sleep 300; done
SH
fake subtests <<'SH'
echo "1..3"; echo "ok 1 one"; echo "ok 2 two # SKIP no huge pages"; echo "ok 3 three"
SH
fake allskipped <<'SH'
echo "1..2"; echo "ok 1 one # SKIP no huge pages"; echo "ok 2 two # SKIP no huge pages"
SH
fake liar <<'SH'
echo "1..2"; echo "ok 1 one"; echo "not ok 2 two"
SH
fake partly <<<'echo "Skipping tests for KVM_MEM_GUEST_MEMFD memory regions"'
fake arguments <<<'[[ $* == "-b 16M -v 2" ]] || { echo "got: $*"; exit 254; }'
# Killed by what looks like a time limit, long before it.
fake killed <<<'kill -KILL $$'
# A program that is missing is a failure too.

row 'a pass' pass 10 "$scratch/pass"
row 'a fail' pass 10 "$scratch/fail"
row 'a skip' pass 10 "$scratch/skip"
row 'a crash' pass 10 "$scratch/crash"
row 'a hang' pass 1 "$scratch/hang"
row 'some subtests' pass 10 "$scratch/subtests"
row 'no subtest' pass 10 "$scratch/allskipped"
row 'a liar' pass 10 "$scratch/liar"
row 'a part' pass 10 "$scratch/partly"
row 'words' pass 10 "$scratch/arguments -b 16M -v 2"
row 'killed' pass 10 "$scratch/killed"
row 'missing' pass 10 "$scratch/nowhere"
row 'later pass' later 10 "$scratch/pass"
row 'later fail' later 10 "$scratch/fail"
row 'later skip' later 10 "$scratch/skip"

table --under none
check 'a program that exits 0 passes' "$(line_of 'a pass')" 'pass a pass'
check 'a failed assertion shows its message, not its stack' \
    "$(line_of 'a fail')" 'fail a fail status 254: the slot is gone'
check 'a skip shows the reason it gives' "$(line_of 'a skip')" \
    'skip a skip Requirement not met: kvm_has_cap(KVM_CAP_NONE)'
check 'a crash names the signal' "$(line_of 'a crash')" \
    'fail a crash killed by SIGSEGV; last: before the end'
check 'a hang is ended' "$(line_of 'a hang')" \
    'fail a hang did not end within 1 s; last: waiting for nothing'
check 'a hang leaves no process behind' \
    "$(state_of "$(cat "$scratch/orphan")")" 'gone'
check 'skipped subtests are counted in the remark' "$(line_of 'some subtests')" \
    'pass some subtests 1 of its subtests skipped: no huge pages'
check 'nothing but skipped subtests is a skip' "$(line_of 'no subtest')" \
    'skip no subtest no huge pages'
check 'a failed subtest with status 0 is a failure' "$(line_of 'a liar')" \
    'fail a liar status 0, but not ok 2 two'
check 'what a test says it leaves out is shown' "$(line_of 'a part')" \
    'pass a part Skipping tests for KVM_MEM_GUEST_MEMFD memory regions'
check 'arguments arrive one by one' "$(line_of 'words')" 'pass words'
check 'a kill before the limit is no time-out' "$(line_of 'killed' | cut -d';' -f1)" \
    'fail killed killed by SIGKILL'
check 'a missing program is a failure' "$(line_of 'missing' | cut -d: -f1)" \
    'fail missing status 127'
check 'a row not promised yet stands in brackets' "$(line_of 'later fail')" \
    '(fail) later fail status 254: the slot is gone'
check 'rows not promised yet are summed up apart' "$(grep '^In brackets' <<<"$out")" \
    'In brackets, not promised yet: 1 of 3 pass.'
check 'the last line counts the promised rows' "$(tail -n 1 <<<"$out")" \
    '4 passed, 6 failed, 2 skipped'
check 'failures make the run fail' "$status" 1
check 'each row has its log' "$(grep -c 'the slot is gone' "$scratch/logs/a_fail.log")" 1

# Which rows decide the exit status.
table --under none --only 'a pass'
check 'a run of passes succeeds' "$status $(tail -n 1 <<<"$out")" '0 1 passed, 0 failed, 0 skipped'
table --under none --only 'a skip'
check 'a skip makes the run fail' "$status $(tail -n 1 <<<"$out")" '1 0 passed, 0 failed, 1 skipped'
table --under none --only 'a fail'
check 'a failure makes the run fail' "$status $(tail -n 1 <<<"$out")" '1 0 passed, 1 failed, 0 skipped'
table --under none --only 'later [fs]'
check 'rows not promised yet do not make the run fail' \
    "$status $(tail -n 1 <<<"$out")" '0 0 passed, 0 failed, 0 skipped'
table --under none --only 'no such row'
check 'a pattern without a row is an error' "$status" 2
table --list --only 'a h'
check '--list starts nothing' "$status $(tr -s ' ' <<<"$out")" '0 pass 1s selfcheck a hang'

# The command prefix.
fake prefix <<SH
echo "\$@" >>"$scratch/started"
[[ \$1 == run && \$2 == -- ]] || exit 9
shift 2
exec "\$@"
SH
table --under "$scratch/prefix run --" --only 'words'
check 'programs are started with the prefix' "$status $(cat "$scratch/started")" \
    "0 run -- $scratch/arguments -b 16M -v 2"

# KVM's selftests and kvm-ioctls' tests, from a cache that looks built.
crate_version=$(sed -n 's/^version=//p' "$CONFORMANCE_ROOT/conformance/build-kvm-ioctls.sh")
mkdir -p "$scratch/cache/selftests" "$scratch/cache/kvm-ioctls/crate"
echo 0 >"$scratch/cache/selftests/version"
echo "$crate_version" >"$scratch/cache/kvm-ioctls/version"
fake cache/selftests/bin/x86_64/some_test <<<'exit 0'
fake cache/kvm-ioctls/unit <<'SH'
case $* in
*a_pass*) echo "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 70 filtered out" ;;
*a_fail*)
    echo "thread 'a_fail' (7) panicked at src/vcpu.rs:2783:21:"
    echo 'assertion `left == right` failed'
    echo '  left: 0'
    echo ' right: 1024'
    echo 'note: run with `RUST_BACKTRACE=1`'
    echo "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 70 filtered out"
    exit 101
    ;;
*ignored*) echo "test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 70 filtered out" ;;
*) echo "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 71 filtered out" ;;
esac
SH
# Stands in for cargo: starts what cargo would, by the runner that it is given.
fake bin/cargo <<SH
"\$CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER" "$scratch/cache/kvm-ioctls/unit" "\$@"
SH
: >"$scratch/suite"
row 'selftest' pass 10 'selftests/x86_64/some_test'
row 'unit pass' pass 10 'unit a_pass'
row 'unit fail' pass 10 'unit a_fail'
row 'unit ignored' pass 10 'unit ignored'
row 'unit renamed' pass 10 'unit no_longer_there'
row 'doc pass' pass 10 'doc a_pass'
: >"$scratch/started"
PATH=$scratch/bin:$PATH table --under "$scratch/prefix run --"
check 'a selftest is found in the cache' "$(line_of 'selftest')" 'pass selftest'
check 'a Rust test that ran passes' "$(line_of 'unit pass')" 'pass unit pass'
# shellcheck disable=SC2016 # the quotes are the test's own
check 'a Rust test that panics shows where' "$(line_of 'unit fail')" \
    'fail unit fail src/vcpu.rs:2783:21: assertion `left == right` failed (left: 0, right: 1024)'
check 'an ignored Rust test is a skip' "$(line_of 'unit ignored')" \
    'skip unit ignored the test is ignored'
check 'a Rust test that does not exist is a failure' "$(line_of 'unit renamed')" \
    'fail unit renamed no test of this name was run'
check 'a documentation test passes' "$(line_of 'doc pass')" 'pass doc pass'
check 'a documentation test is started with the prefix' \
    "$(tail -n 1 "$scratch/started" | cut -d' ' -f1-3)" "run -- $scratch/cache/kvm-ioctls/unit"
check 'Rust tests are counted like the rest' "$(tail -n 1 <<<"$out")" \
    '3 passed, 2 failed, 1 skipped'

# Guests of QEMU: a program that prints what its guest would.
fake bin/qemu-system-x86_64 <<'SH'
[[ $* == *guest.bin* ]] || exit 9
echo "1..2"; echo "ok 1 - one"
case $* in
*whole*) echo "ok 2 - two" ;;
*wrong*) echo "not ok 2 - two" ;;
*status*) echo "ok 2 - two"; exit 3 ;;
esac
SH
: >"$scratch/suite"
for guest in whole wrong status reset; do
    row "guest $guest" pass 10 "qemu -machine $guest"
done
PATH=$scratch/bin:$PATH table --under none
check 'a guest whose report is whole passes' "$(line_of 'guest whole')" 'pass guest whole'
check 'a check that fails in a guest is shown' "$(line_of 'guest wrong')" \
    'fail guest wrong not ok 2 - two'
check 'the status of QEMU counts as well' "$(line_of 'guest status' | cut -d: -f1)" \
    'fail guest status status 3'
check 'a guest that ends before its report does is a failure' "$(line_of 'guest reset')" \
    'fail guest reset the guest ended after 1 of 2 checks; last: ok 1 - one'

# A machine that cannot have the suites.
rm -rf "$scratch/cache"
cat >"$scratch/suite" <<SH
a selftest	pass	10	selfcheck	selftests/x86_64/some_test
a unit test	pass	10	selfcheck	unit a_pass
SH
fake bin/apt-get <<<'exit 100'
fake bin/cargo <<<'echo "no registry"; exit 101'
PATH=$scratch/bin:$PATH table --under none --if-available
check 'with --if-available, suites that cannot be had are no failure' "$status" 0
check 'each is left out in one line' "$(grep -c ' left out: ' <<<"$out") $(wc -l <<<"$out")" '2 2'
PATH=$scratch/bin:$PATH table --under none
check 'without it they are a failure' "$status" 1
row 'a pass' pass 10 "$scratch/pass"
PATH=$scratch/bin:$PATH table --under none --if-available
check 'what can be had is still run' "$status $(tail -n 1 <<<"$out")" \
    '0 1 passed, 0 failed, 0 skipped'

# What a row needs around it.
rm "$scratch/suite"
fake surroundings <<<'[[ $COLOUR == blue && $(</proc/sys/vm/nr_hugepages) -ge ${LEAST:-0} ]]'
pages=$(</proc/sys/vm/nr_hugepages)
row 'an environment' pass 10 "COLOUR=blue $scratch/surroundings"
row 'another environment' pass 10 "COLOUR=red $scratch/surroundings"
table --under none
check 'a row has the environment that it names' "$(line_of 'an environment')" \
    'pass an environment'
check 'and not another' "$(line_of 'another environment' | cut -d' ' -f1)" 'fail'
rm "$scratch/suite"
row 'too much' pass 10 "hugepages=999999999 $scratch/surroundings"
row 'a little' pass 10 "hugepages=1 LEAST=$((pages + 1)) COLOUR=blue $scratch/surroundings"
table --under none
check 'a row that needs what the machine does not give is no failure' \
    "$status $(grep -c '^unavail .* too much ' <<<"$out")" '0 1'
check 'huge pages are there, or the row says so' \
    "$(sed -n 's/^\([a-z]*\) .* a little.*/\1/p' <<<"$out" | sed 's/unavail/pass/')" 'pass'
check 'and are given back' "$(</proc/sys/vm/nr_hugepages)" "$pages"

# The project's own list can be read, and names each row once.
duplicates=$("$run" --list | cut -c43- | sort | uniq -d)
check 'no row of suite.tsv has the name of another' "$duplicates" ''

printf 'selfcheck.sh: %d passed, %d failed\n' $((checks - failures)) "$failures"
((failures == 0))
