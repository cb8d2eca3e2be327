# shellcheck shell=bash
# The virtual environment of the repository, sourced by demo.sh, test.sh and .ci/run (bash 3.2 or newer).
#   prepare_environment   makes .venv when it is missing, unfinished or its pins changed; sets VENV_PYTHON
#   choose_python         finds the interpreter to make it with
# Messages go to stderr. PYTHON=NAME_OR_PATH chooses the interpreter.

ROOT="$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
# Written last: `version|ttnn|base prefix` of the interpreter, then the pins. Without it the environment is unfinished.
STAMP="$VENV/installed.txt"
INSTALL_LOG="$ROOT/.venv-install.log"
REPORTER="" # process id of report_progress
REPORT_SECONDS=30 # between progress lines where no terminal shows the ticking clock

# Nothing of the caller's Python setup may reach the pinned one: tt-metal users export PYTHONPATH=$TT_METAL_HOME, whose
# `models` package would hide ours.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

say() { printf '%s\n' "$*" >&2; }
die() { # STATUS MESSAGE...
    local status=$1
    shift
    say "error: $*"
    exit "$status"
}

# ---- interpreter ----------------------------------------------------------------------------------------------------

# Prints `state|version|ttnn|base prefix|executable`: state is ok, old or no-venv; ttnn says if its wheel
# (manylinux_2_34) fits. The executable is the real one, also when asked through a pyenv shim or a virtual environment.
PROBE='
import os, platform, sys
ttnn = (
    sys.version_info[:2] in ((3, 10), (3, 12)) and platform.python_implementation() == "CPython"
    and sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32
    and platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split(".")[:2])) >= (2, 34)
)
state = "ok"
if sys.version_info < (3, 10):
    state = "old"
else:
    try:
        import ensurepip, venv
        ensurepip.version()
    except Exception:
        state = "no-venv"
version = "%d.%d.%d" % sys.version_info[:3]
executable = getattr(sys, "_base_executable", "") or sys.executable
base = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
if sys.prefix != sys.base_prefix and os.path.exists(base):  # Python 3.10 names the environment, not what it was made with
    executable = base
print("|".join([state, version, "yes" if ttnn else "no", sys.base_prefix, executable]))
'

probe() { "$1" -I -c "$PROBE" 2>/dev/null </dev/null; } # INTERPRETER; fails for what does not run, pyenv shims included

# Every place where an interpreter of VERSION (3.12) may be, one per line; some do not exist.
candidates() {
    local version=$1 home="${HOME:-}" pyenv_root uv_root
    type -aP "python$version" || true
    pyenv_root="${PYENV_ROOT:-$home/.pyenv}"
    if command -v pyenv >/dev/null; then pyenv_root="$(pyenv root 2>/dev/null || printf '%s' "$pyenv_root")"; fi
    uv_root="${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}"
    printf '%s\n' \
        "$pyenv_root/versions/$version"*/bin/"python$version" \
        "$uv_root/cpython-$version"*/bin/"python$version" \
        "$home/.local/bin/python$version" \
        {/usr,/usr/local,/opt/homebrew,/opt/python"$version"}/bin/"python$version"
}

# Prints the probe line of the best interpreter; fails when there is none.
choose_python() {
    local version candidate line short order="3.12 3.13 3.11 3.14 3.10" noted=""
    if [ "$(uname -sm)" = "Linux x86_64" ]; then order="3.12 3.10 3.13 3.11 3.14"; fi # those with a ttnn wheel first
    for version in $order any; do
        while IFS= read -r candidate; do
            if ! [ -x "$candidate" ] || ! line="$(probe "$candidate")"; then continue; fi
            case $version:$line in
                "$version:ok|$version."* | any:ok*) printf '%s\n' "$line" && return ;;
                *:no-venv*)
                    short="$(field 2 "$line" | cut -d . -f 1,2)"
                    if [ "$noted" != "$short" ]; then
                        say "skipped $candidate: it has no venv and ensurepip (on Debian: apt install python$short-venv)"
                    fi
                    noted=$short
                    ;;
            esac
        done < <(if [ "$version" = any ]; then type -aP python3 python || true; else candidates "$version"; fi)
    done
    return 1
}

# Prints the probe line of $PYTHON, or of the best interpreter; the error says what to do.
find_python() {
    local line
    if [ -n "${PYTHON:-}" ]; then
        line="$(probe "$PYTHON")" || die 2 "PYTHON=$PYTHON does not run: set it to a Python >= 3.10, or unset it"
        case $line in
            ok*) ;;
            old*) die 2 "PYTHON=$PYTHON is Python $(field 2 "$line"): Python >= 3.10 is needed" ;;
            *) die 2 "PYTHON=$PYTHON has no venv and ensurepip: install them (Debian: python3-venv) or choose another" ;;
        esac
    else
        line="$(choose_python)" || die 2 "no Python >= 3.10 with venv found: install CPython 3.12, or set PYTHON=/path/to/python"
    fi
    printf '%s\n' "$line"
}

field() { printf '%s\n' "$2" | cut -d '|' -f "$1"; } # NUMBER PROBE_LINE

# ---- environment ----------------------------------------------------------------------------------------------------

# The pins of pyproject.toml, run time and dev, one per line. pip reads the markers.
pins() { sed -n '/^\(dependencies\|dev\) = \[/,/^]/s/^ *"\(.*\)",\{0,1\}$/\1/p' "$ROOT/pyproject.toml"; }

# Is .venv finished, made for these pins and, where PYTHON is set, by that interpreter?
environment_is_current() {
    local probed
    [ -f "$STAMP" ] && [ "$(sed 1d "$STAMP")" = "$(pins)" ] && "$VENV_PYTHON" -c '' >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] && return
    probed="$(probe "$PYTHON")" || return 1
    [ "$(field 1 "$(head -n 1 "$STAMP")")" = "$(field 2 "$probed")" ] &&
        [ "$(field 3 "$(head -n 1 "$STAMP")")" = "$(field 4 "$probed")" ]
}

# Shows that the caller's command still works: a ticking clock and the log's last step on a terminal, else a line now
# and then. Ends by itself when the script is killed.
report_progress() {
    local last=0 step steps='^(Creating .*|Checking .*|Installing collected packages| *(Collecting|Downloading) [^ ;]+)'
    while sleep 1 >/dev/null 2>&1 && kill -0 "$$" 2>/dev/null; do
        step="$(grep -oE "$steps" "$INSTALL_LOG" | tail -n 1 || true)"
        step="${step#"${step%%[! ]*}"}"
        if [ -t 2 ]; then
            printf '\r\033[K  %d s  %.60s' "$SECONDS" "$step" >&2
        elif [ $((SECONDS - last)) -ge "$REPORT_SECONDS" ]; then
            last=$SECONDS
            say "  $SECONDS s  $step"
        fi
    done
}

stop_report() {
    kill "$REPORTER" 2>/dev/null || true
    wait "$REPORTER" 2>/dev/null || true
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

logged() { # STEP COMMAND...: runs the command with its output in the install log; shows the log's end when it fails
    local status=0
    printf '%s\n' "$1" >>"$INSTALL_LOG"
    shift
    report_progress 9>&- &
    REPORTER=$!
    # The command stays in the foreground, so that Ctrl-C reaches it.
    "$@" >>"$INSTALL_LOG" 2>&1 || status=$?
    stop_report
    [ "$status" -eq 0 ] && return
    tail -n 15 "$INSTALL_LOG" | sed 's/^/  | /' >&2
    die 1 "the environment could not be made; the whole log is $INSTALL_LOG, the next run starts anew"
}

# Makes .venv anew with the interpreter of PROBE_LINE.
install_environment() {
    local line=$1 version ttnn
    version="$(field 2 "$line")"
    ttnn="$(field 3 "$line")"
    SECONDS=0
    trap 'stop_report; die 130 "interrupted: the next run makes .venv anew"' INT
    say "making .venv with $(field 5 "$line") (python $version): a few minutes, about 6 GB"
    : >"$INSTALL_LOG"
    rm -rf "$VENV"
    logged "Creating .venv" "$(field 5 "$line")" -I -m venv "$VENV"
    # pip's own markers know nothing of the C library, so an interpreter that cannot take the wheel drops the pin.
    pins | if [ "$ttnn" = yes ]; then cat; else grep -v '^ttnn='; fi >"$VENV/requirements.txt"
    # Not compiled here: pip would compile all 13000 files, the check of imports below compiles the modules in use.
    logged "Collecting packages" "$VENV_PYTHON" -I -m pip --disable-pip-version-check --no-input \
        install --no-compile --progress-bar off -r "$VENV/requirements.txt"
    # `models` and `demo` are found from any directory; the path is relative, so that a moved repository still works.
    logged "Creating repository.pth" "$VENV_PYTHON" -I -c 'import sysconfig
open(sysconfig.get_path("purelib") + "/repository.pth", "w").write("../../../..\n")'

    logged "Checking imports" "$VENV_PYTHON" -I -c 'import torch, rich.live, pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast'
    if [ "$ttnn" = yes ]; then
        ttnn="$(sed -n 's/^ttnn==\([^; ]*\).*/\1/p' "$VENV/requirements.txt")"
        if ! "$VENV_PYTHON" -I -c 'import ttnn' >>"$INSTALL_LOG" 2>&1; then
            say "ttnn $ttnn does not import here: $(tail -n 1 "$INSTALL_LOG")"
            ttnn=broken
        fi
    fi
    { printf '%s\n' "$version|$ttnn|$(field 4 "$line")" && pins; } >"$STAMP.part"
    mv "$STAMP.part" "$STAMP"
    mv "$INSTALL_LOG" "$VENV/install.log"
    trap - INT
    say "ready after $SECONDS s"
}

# Makes .venv if need be (one script at a time), says which Python it has.
prepare_environment() {
    local line note
    if ! environment_is_current; then
        line="$(find_python)" || exit $?
        exec 9>"$ROOT/.venv.lock"
        if command -v flock >/dev/null && ! flock -n 9; then
            say "another script is making .venv: waiting for it"
            flock 9
        fi
        environment_is_current || install_environment "$line"
        exec 9>&-
    fi
    line="$(head -n 1 "$STAMP")"
    case "$(field 2 "$line")" in
        no) note="no ttnn: it needs CPython 3.12 or 3.10 on x86-64 Linux with glibc >= 2.34; CPU and CUDA work" ;;
        broken) note="ttnn is installed but does not import, see $VENV/install.log; CPU and CUDA work" ;;
        *) note="ttnn $(field 2 "$line")" ;;
    esac
    say "python $(field 1 "$line") ($note)"
}
