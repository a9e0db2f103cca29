# shellcheck shell=bash
# What the conformance scripts share: where things are kept, how a step that is
# quiet unless it fails is run, and how a missing tool is reported.
#
# Read with `source`; it sets:
#   CONFORMANCE_ROOT   the checkout
#   CONFORMANCE_DIR    the cache of everything fetched, built and logged:
#                      TWOFOLD_CONFORMANCE_DIR, or target/conformance below the
#                      checkout. A second clone that is given the first one's
#                      folder builds nothing again.

export CONFORMANCE_ROOT CONFORMANCE_DIR
CONFORMANCE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONFORMANCE_DIR=${TWOFOLD_CONFORMANCE_DIR:-$CONFORMANCE_ROOT/target/conformance}

# Where this cannot work, and installing software would not be an error of the
# project: the exit status that run.sh reads as "left out".
export EXIT_UNAVAILABLE=77

say() {
    printf '%s: %s\n' "${0##*/}" "$*"
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# One line on stderr that names what this machine lacks.
unavailable() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$EXIT_UNAVAILABLE"
}

# quietly LOG COMMAND...: appends what the command prints to LOG; shows the end
# of it only if the command fails.
quietly() {
    local log=$1 status=0
    shift
    printf '+ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null || status=$?
    if ((status != 0)); then
        {
            printf '%s: failed with status %d: %s\n' "${0##*/}" "$status" "$*"
            printf 'The last lines of %s:\n' "$log"
            tail -n 20 "$log"
        } >&2
        return "$status"
    fi
}

# need_tools LOG TOOL[=PACKAGE]...: makes sure that each tool is there. As root
# with apt-get it installs the missing ones; otherwise it ends the script with
# one line that names them.
need_tools() {
    local log=$1 item missing=() packages=()
    shift
    for item in "$@"; do
        if ! command -v "${item%%=*}" >/dev/null 2>&1; then
            missing+=("${item%%=*}")
            packages+=("${item#*=}")
        fi
    done
    ((${#missing[@]} == 0)) && return 0
    if command -v apt-get >/dev/null 2>&1 && ((EUID == 0)); then
        say "installing ${packages[*]}"
        if quietly "$log" apt-get update &&
            quietly "$log" env DEBIAN_FRONTEND=noninteractive \
                apt-get install -y --no-install-recommends "${packages[@]}"; then
            return 0
        fi
        unavailable "missing: ${missing[*]} (apt-get install ${packages[*]} did not work)"
    fi
    unavailable "missing: ${missing[*]} (as root on Debian: apt-get install ${packages[*]})"
}
