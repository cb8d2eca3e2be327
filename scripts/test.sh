#!/usr/bin/env bash
# All tests: scripts/test.sh
#   Everything on the board N150, and on the other boards those ttnn tests that depend on the board; mocks of them where
#   there is no silicon. Two processes at a time. The last line says what was counted.
# Some of them: scripts/test.sh ARGUMENTS, which are pytest's, paths relative to the repository
# Makes .venv on first use. PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
script="${BASH_SOURCE[0]}"
while [ -L "$script" ]; do # called through a link: its own place counts; no readlink -f on older macOS
    link="$(readlink "$script")"
    case $link in /*) script="$link" ;; *) script="$(dirname "$script")/$link" ;; esac
done
source "$(dirname "$script")/_environment.sh"

prepare_environment
cd "$ROOT"
if [ $# -gt 0 ]; then exec "$VENV_PYTHON" -m pytest "$@"; fi

# Without ttnn one run has all tests. With it there are parts, each a run of its own, and two lanes, one thread each, that
# take them from both ends of the list until none is left; the second lane's output comes after the first one's. What
# takes long stands at the ends, so that the lanes meet among small parts and end together.
PARTS="commands N150 N300 P150 T3K P300x2 N150-kernels library"
KERNELS="test_kernels test_first_hour test_mock_cluster" # of N150, a part of their own
WHOLE_MODELS="test_mesh test_layout test_model test_fused test_kernel_audit"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0 # of the first run that fails; the others are run all the same
others=
taken= # a directory that has one of its own for each part that a lane has begun: mkdir succeeds for one of them; and
# what the tests of each have counted: conftest.py
log="$VENV/boards.log"
run() { "$VENV_PYTHON" -m pytest "$@" || failed $?; }
failed() { [ "$status" -ne 0 ] || status=$1; }
stop() {
    [ -z "$others" ] || kill -- "-$others" 2>/dev/null || true
    [ -z "$taken" ] || rm -rf "$taken"
}
part() {
    local ttnn=models/tests/ttnn
    say "part $1"
    # shellcheck disable=SC2046,SC2086 # names without spaces, one argument each
    case $1 in
        commands) run tests --board N150 ;;
        library) run models/tests --ignore $ttnn --board N150 ;;
        N150) run $ttnn $(printf -- "--ignore $ttnn/%s.py " $KERNELS) --board N150 ;;
        N150-kernels) run $(printf -- "$ttnn/%s.py " $KERNELS) --board N150 ;;
        P300x2) # its chips are P150's, wired as N300's
            run $(printf -- "$ttnn/%s.py " $WHOLE_MODELS) --board P300x2 -m "not once and not key_boards"
            ;;
        N300) run $ttnn --board N300 -m "not once" ;;
        *) run $ttnn --board "$1" -m "not once and not key_boards" ;;
    esac
}
lane() { # PARTS
    local each
    for each in "$@"; do
        if mkdir "$taken/$each" 2>/dev/null; then part "$each"; fi
    done
}
backwards() { local each all=; for each in $PARTS; do all="$each $all"; done && printf '%s' "$all"; }

counted() { # one line: what the tests of all parts have counted, if they have
    local what name count sum line= any=
    for what in "cases tried" "faults survived" "tokens compared" "tokens wrong" "mutants caught" "mutants untried"; do
        sum=0
        while IFS=: read -r name count; do
            any=1
            [ "$name" != "$what" ] || sum=$((sum + count))
        done < <(cat "$taken"/*.counts 2>/dev/null)
        line="$line${line:+, }$what: $sum"
    done
    [ -z "$any" ] || printf '%s\n' "$line"
}

trap stop EXIT
trap 'exit 130' INT TERM
taken="$VENV/lanes.$$" && mkdir "$taken"
export TEST_COUNTS="$taken"
case $TTNN in
    no | broken)
        say "no ttnn: its tests are skipped"
        run --board N150
        ;;
    *)
        set -m # a process group of its own, which can be stopped as a whole
        # shellcheck disable=SC2046
        (trap - EXIT INT TERM && lane $(backwards) && exit "$status") </dev/null >"$log" 2>&1 &
        others=$!
        set +m
        # shellcheck disable=SC2086
        lane $PARTS
        wait "$others" || failed $?
        others=
        cat "$log"
        ;;
esac
counted
exit "$status"
