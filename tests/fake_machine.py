"""A fake user's machine for the tests of the shell scripts: a clone, a PATH, and interpreters that install nothing."""

import re
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SHELL_FILES = ["scripts/_environment.sh", "scripts/demo.sh", "scripts/serve.sh", "scripts/test.sh", ".ci/run"]

# What the scripts may use: bash 3.2 and these.
TOOLS = "bash cat cp cut dirname env flock head mkdir mv rm sed sleep tail uname".split()

# An interpreter that answers the probe and `-m venv`; pip and all that follows is the environment's python, below.
FAKE_PYTHON = """\
#!/usr/bin/env bash
case "$*" in
    *platform*) echo "{problem}|{version}|{ttnn}|{prefix}|$0" ;;
    *"-m venv "*) mkdir -p "${{@: -1}}/bin" && cp "{venv_python}" "${{@: -1}}/bin/python" ;;
    *) exit 1 ;;
esac
"""
# Makes what `-m venv` makes; notes what it was asked to install.
FAKE_UV = """\
#!/usr/bin/env bash
case "$1" in
    venv) mkdir -p "${{@: -1}}/bin" && cp "{venv_python}" "${{@: -1}}/bin/python" ;;
    pip) printf '%s\\n' "$*" >>uv-calls ;;
esac
"""
# Notes the calls of pip, which fails or hangs where asked to, and prints the arguments of any script it is given; it
# fails where they hold the text of the file fails-with, and leaves what is in the file counts as what it has counted.
VENV_PYTHON = """\
#!/usr/bin/env bash
root="$(dirname "$0")/../.."
case "$*" in
    *"-m pip "*)
        echo "Collecting fake-torch"
        printf '%s\\n' "$*" >>"$root/pip-calls"
        if [ -e "$root/pip-fails" ]; then echo "ERROR: no space left on the fake device"; exit 1; fi
        while [ -e "$root/pip-hangs" ]; do sleep 0.1; done
        ;;
    *"import ttnn"*)
        if [ -e "$root/ttnn-is-broken" ]; then echo "ImportError: libfake.so" >&2; exit 1; fi
        echo 0.81.1
        ;;
    *"-c "*) ;;
    *)
        echo "ran in $PWD:"
        printf '<%s>\\n' "$@"
        if [ -e "$root/counts" ]; then cat "$root/counts" >"$TEST_COUNTS/$$.counts"; fi
        if [ -e "$root/fails-with" ]; then case "$*" in *"$(cat "$root/fails-with")"*) exit 3 ;; esac; fi
        ;;
esac
"""


def write_executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A fake user: a clone, a PATH with the few tools the scripts use, and the interpreters a test puts there."""

    def __init__(self, folder: Path):
        self.clone, self.bin, self.home = folder / "my clone", folder / "bin", folder / "home"
        (self.clone / "demo").mkdir(parents=True)
        self.bin.mkdir()
        self.home.mkdir()
        for name in (*SHELL_FILES, "pyproject.toml"):
            (self.clone / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.clone / name)
        # The tests see only interpreters they made: not those of the machine they run on.
        environment = self.clone / "scripts/_environment.sh"
        text, count = re.subn(r"\{/usr,.*\}/bin", f'"{folder}"/nowhere', environment.read_text())
        assert count == 1
        environment.write_text(text)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        write_executable(self.bin / "venv-python", VENV_PYTHON)
        self.uname("Linux x86_64")

    def python(self, name: str | Path, version: str, *, ttnn="no", problem="") -> Path:
        """Make a fake interpreter at a path, or by a name on PATH."""
        path = self.bin / name
        values = {"problem": problem, "version": version, "ttnn": ttnn, "prefix": path.parent}
        write_executable(path, FAKE_PYTHON.format(venv_python=self.bin / "venv-python", **values))
        return path

    def uname(self, answer: str):
        (self.bin / "uname").unlink()
        write_executable(self.bin / "uname", f"#!/usr/bin/env bash\necho {answer}\n")

    def start(self, *command, cwd=None, **env) -> subprocess.Popen:
        env = {"PATH": str(self.bin), "HOME": str(self.home), **env}
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd or self.home,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *command, cwd=None, **env) -> subprocess.CompletedProcess:
        process = self.start(*command, cwd=cwd, **env)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def choose(self, **env) -> subprocess.CompletedProcess:
        """Run find_python; stdout is the chosen interpreter's path."""
        code = 'set -euo pipefail; source "$1"; line="$(find_python)" || exit; echo "${line##*|}"'
        return self.run(self.bin / "bash", "-c", code, "-", self.clone / "scripts/_environment.sh", **env)

    def demo(self, *args, **env) -> subprocess.CompletedProcess:
        return self.run(self.clone / "scripts/demo.sh", *args, **env)

    def wait_for_pip(self):
        deadline = time.monotonic() + 120
        while not self.installs:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def uv(self):
        write_executable(self.bin / "uv", FAKE_UV.format(venv_python=self.bin / "venv-python"))

    def calls(self, program: str) -> list[str]:
        """The arguments of every call of pip or uv that installs."""
        calls = self.clone / f"{program}-calls"
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def installs(self) -> int:
        return len(self.calls("pip"))
