#!/usr/bin/env bash
# All tests: scripts/test.sh
#   Everything on the board N150, then those ttnn tests on the other boards that depend on the board; mocks of them where
#   there is no silicon.
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

# The other boards' tests run beside the first run, one thread each; their output comes after its.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0 # of the first run that fails; the others are run all the same
others=
log="$VENV/boards.log"
run() { "$VENV_PYTHON" -m pytest "$@" || { local failed=$?; [ "$status" -ne 0 ] || status=$failed; }; }
stop() { [ -z "$others" ] || kill -- "-$others" 2>/dev/null || true; }
boards() {
    for board in N300 T3K P150; do
        say "ttnn tests, board $board"
        case $board in T3K) chosen="not once" ;; *) chosen="not once and not key_boards" ;; esac
        run models/tests/ttnn --board "$board" -m "$chosen"
    done
    say "ttnn tests of whole models, board P300x2" # its chips are P150's, wired as N300's
    run models/tests/ttnn/test_{mesh,layout,model,fused,kernel_audit}.py --board P300x2
    exit "$status"
}

case $TTNN in
    no | broken) say "no ttnn: its tests on N300, T3K, P150 and P300x2 are skipped" ;;
    *)
        trap stop EXIT
        trap 'exit 130' INT TERM
        set -m # a process group of its own, which can be stopped as a whole
        boards >"$log" 2>&1 &
        others=$!
        set +m
        ;;
esac
say "all tests, board N150"
run --board N150
if [ -n "$others" ]; then
    wait "$others" || status=$?
    others=
    cat "$log"
fi
exit "$status"
