# shellcheck shell=bash
# prepare_environment makes the repository's .venv where it is missing, unfinished or out of date, and sets TTNN: the
# version, "no" (no wheel for this Python) or "broken" (does not import). Sourced by the scripts; bash 3.2 or newer.
# uv installs where it is present, else pip. PYTHON=NAME_OR_PATH chooses the interpreter. Messages go to stderr.

ROOT="$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/installed.txt" # written last: `version|ttnn|prefix` of the interpreter, then what `wanted` prints
# tt-metal users export PYTHONPATH=$TT_METAL_HOME, whose `models` package would hide ours.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER

say() { printf '%s\n' "$*" >&2; }
die() { say "error: ${*:2}" && exit "$1"; } # STATUS MESSAGE

# An interpreter about itself: `problem|version|ttnn|prefix|path`. Only CPython with a new glibc can load ttnn's wheel.
PROBE='
import importlib.util, os, platform, sys
version, (libc, release), problem = "%d.%d.%d" % sys.version_info[:3], platform.libc_ver(), ""
ttnn = (sys.implementation.name, sys.platform, platform.machine(), libc) == ("cpython", "linux", "x86_64", "glibc")
ttnn = ttnn and sys.version_info[:2] in ((3, 10), (3, 12)) and [*map(int, release.split(".")[:2])] >= [2, 34]
if sys.version_info < (3, 10):
    problem = "is Python %s: Python >= 3.10 is needed" % version
elif not (sys.argv[1] or importlib.util.find_spec("ensurepip")):  # uv needs none
    problem = "has no ensurepip: install it (Debian: apt install python%d.%d-venv), or uv" % sys.version_info[:2]
print("|".join([problem, version, "yes" if ttnn else "no", sys.base_prefix, os.path.realpath(sys.executable)]))'
probe() { "$1" -I -c "$PROBE" "$(command -v uv)" 2>/dev/null </dev/null; } # INTERPRETER; fails where it does not run

candidates() { # where interpreters may be, the best version first: those with a ttnn wheel
    local home="${HOME:-}" version versions="3.12 3.13 3.11 3.14 3.10" pyenv
    if [ "$(uname -sm)" = "Linux x86_64" ]; then versions="3.12 3.10 3.13 3.11 3.14"; fi
    pyenv="$(pyenv root 2>/dev/null || printf '%s' "${PYENV_ROOT:-$home/.pyenv}")"
    for version in $versions; do
        type -aP "python$version" || true
        printf "%s/python$version\n" "$pyenv/versions/$version"*/bin "$home/.local/bin" \
            "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$home/.local/share}/uv/python}/cpython-$version"*/bin \
            {/usr,/usr/local,/opt/homebrew,"/opt/python$version"}/bin
    done
    type -aP python3 python || true
}

find_python() { # prints what PROBE says of $PYTHON, or of the first candidate without a problem
    local candidate line noted=""
    while IFS= read -r candidate; do
        line="$(probe "$candidate")" || line="does not run: set it to a Python >= 3.10, or unset it|"
        if [ -z "${line%%|*}" ]; then printf '%s\n' "$line" && return; fi
        if [ -n "${PYTHON:-}" ]; then die 2 "PYTHON=$PYTHON ${line%%|*}"; fi
        case $noted$line in "has no ensurepip"*) noted=1 && say "skipped $candidate: it ${line%%|*}" ;; esac
    done < <(if [ -n "${PYTHON:-}" ]; then printf '%s\n' "$PYTHON"; else candidates; fi)
    die 2 "no Python >= 3.10 found: install CPython 3.12, or set PYTHON=/path/to/python"
}

# What .venv depends on besides the interpreter: the place (`-e` writes it down), the pins, the version.
wanted() { printf '%s\n' "$ROOT" && sed -n '/^\[build-system\]/,/^\[tool/p' "$ROOT/pyproject.toml"; }
is_current() { # finished, made for what is wanted and, where PYTHON is set, by that interpreter
    [ "$(sed 1d "$STAMP" 2>/dev/null)" = "$(wanted)" ] && "$VENV_PYTHON" -c '' >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(head -n 1 "$STAMP" | cut -d '|' -f 1,3)" = "$(probe "$PYTHON" | cut -d '|' -f 2,4)" ]
}

make_environment() { # LINE of find_python
    local version ttnn prefix python extras=dev check='import ttnn, importlib.metadata as m; print(m.version("ttnn"))'
    IFS='|' read -r _ version ttnn prefix python <<<"$1"
    if [ "$ttnn" = yes ]; then extras=dev,tt; fi
    trap 'die 130 "interrupted: the next run makes .venv anew"' INT
    say "making .venv with $python (python $version): a few minutes, 6 GB"
    SECONDS=0
    ( # `-e` puts the repository on the path: models, demo, scripts and tests import from any directory
        cd "$ROOT" && rm -rf "$STAMP" .venv && if command -v uv >/dev/null; then
            uv venv --seed --python "$python" .venv && uv pip install --python .venv/bin/python -e ".[$extras]"
        else
            "$python" -I -m venv .venv && "$VENV_PYTHON" -I -m pip --no-input install --no-compile -e ".[$extras]"
        fi && "$VENV_PYTHON" -I -c 'import torch, transformers, pytest, models, demo, scripts, tests'
    ) >&2 || die 1 "the environment could not be made: the lines above say why, the next run starts anew"
    [ "$ttnn" = no ] || ttnn="$("$VENV_PYTHON" -I -c "$check" 2>"$VENV/ttnn.log" | tail -n 1)" || ttnn=broken
    { printf '%s\n' "$version|$ttnn|$prefix" && wanted; } >"$STAMP.part" && mv "$STAMP.part" "$STAMP"
    trap - INT && say "ready after $SECONDS s"
}

prepare_environment() {
    local line version
    if ! is_current; then
        line="$(find_python)" || exit
        exec 9>"$ROOT/.venv.lock"
        if command -v flock >/dev/null; then flock -n 9 || { say "waiting: another script makes .venv" && flock 9; }; fi
        is_current || make_environment "$line"
        exec 9>&-
    fi
    IFS='|' read -r version TTNN _ <"$STAMP"
    case $TTNN in
        no) line="no ttnn: it needs CPython 3.12 or 3.10 on x86-64 Linux with glibc >= 2.34; CPU and CUDA work" ;;
        broken) line="ttnn does not import, see $VENV/ttnn.log; CPU and CUDA work" ;;
        *) line="ttnn $TTNN" ;;
    esac
    say "python $version ($line)"
}
