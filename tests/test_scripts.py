"""scripts/demo.sh, scripts/test.sh and the environment they make, with fake interpreters: nothing is installed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.fake_machine import ROOT, SHELL_FILES, Machine, write_executable


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("name", SHELL_FILES)
def test_shell_files_parse(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)


@pytest.mark.parametrize("name", SHELL_FILES[1:])
def test_commands_are_executable(name):
    assert os.access(ROOT / name, os.X_OK)


# ---- interpreter ----


def test_cpython_312_is_preferred_to_newer_and_older(machine):
    for minor in (10, 11, 12, 13):
        machine.python(f"python3.{minor}", f"3.{minor}.1", ttnn="yes" if minor in (10, 12) else "no")
    assert machine.choose().stdout.strip() == str(machine.bin / "python3.12")


def test_cpython_310_is_next_where_ttnn_has_wheels(machine):
    for minor in (10, 11, 13):
        machine.python(f"python3.{minor}", f"3.{minor}.1", ttnn="yes" if minor == 10 else "no")
    assert machine.choose().stdout.strip() == str(machine.bin / "python3.10")
    machine.uname("Darwin arm64")
    assert machine.choose().stdout.strip() == str(machine.bin / "python3.13")


def test_failing_shim_is_passed_over_for_a_working_interpreter_later_on_the_path(machine, tmp_path):
    write_executable(machine.bin / "python3.12", "#!/usr/bin/env bash\necho 'command not found' >&2\nexit 127\n")
    machine.python(tmp_path / "later/python3.12", "3.12.3")
    machine.python("python3.13", "3.13.0")
    chosen = machine.choose(PATH=f"{machine.bin}:{tmp_path / 'later'}")
    assert chosen.stdout.strip() == str(tmp_path / "later/python3.12")
    assert chosen.stderr == ""
    assert machine.choose().stdout.strip() == str(machine.bin / "python3.13")


@pytest.mark.parametrize(
    "place",
    [
        "home/.pyenv/versions/3.12.1/bin/python3.12",
        "home/.local/share/uv/python/cpython-3.12.5-linux-x86_64-gnu/bin/python3.12",
    ],
)
def test_inactive_interpreters_of_pyenv_and_uv_are_found(machine, tmp_path, place):
    machine.python("python3.13", "3.13.0")
    machine.python(tmp_path / place, "3.12.1", ttnn="yes")
    assert machine.choose().stdout.strip() == str(tmp_path / place)


def test_pyenv_is_asked_for_its_root(machine, tmp_path):
    write_executable(machine.bin / "pyenv", f'#!/usr/bin/env bash\n[ "$1" = root ] && echo "{tmp_path}/py env"\n')
    machine.python(tmp_path / "py env/versions/3.10.4/bin/python3.10", "3.10.4", ttnn="yes")
    assert machine.choose().stdout.strip() == str(tmp_path / "py env/versions/3.10.4/bin/python3.10")


def test_interpreter_without_ensurepip_is_skipped_with_a_note(machine):
    machine.python("python3.12", "3.12.3", problem="has no ensurepip: install it")
    machine.python("python3.11", "3.11.2")
    chosen = machine.choose()
    assert chosen.stdout.strip() == str(machine.bin / "python3.11")
    assert chosen.stderr.count("\n") == 1
    assert "python3.12: it has no ensurepip: install it" in chosen.stderr


def test_any_other_python3_is_the_last_choice(machine):
    machine.python("python3", "3.15.0")
    assert machine.choose().stdout.strip() == str(machine.bin / "python3")


@pytest.mark.parametrize("python3", [None, "3.8.1"])
def test_no_usable_python_is_one_line_and_exit_code_2(machine, python3):
    if python3:
        machine.python("python3", python3, problem="is old")
    result = machine.demo()
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert re.match("error: no Python >= 3.10 found: install CPython 3.12", result.stderr)


def test_python_variable_decides(machine, tmp_path):
    machine.python("python3.12", "3.12.1")
    own = machine.python(tmp_path / "own python/python", "3.11.9")
    assert machine.choose(PYTHON=str(own)).stdout.strip() == str(own)


@pytest.mark.parametrize("problem", [None, "is Python 3.9.1: Python >= 3.10 is needed"])
def test_unusable_python_variable_is_one_line_and_exit_code_2(machine, problem):
    machine.python("python3.12", "3.12.1")
    if problem:
        machine.python("chosen", "3.9.1", problem=problem)
    result = machine.demo(PYTHON="chosen")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: PYTHON=chosen {problem or 'does not run: '}")
    assert result.stderr.count("\n") == 1


def test_probe_describes_the_running_interpreter():
    code = 'source "$1"; probe "$2"'
    command = ["bash", "-c", code, "-", ROOT / "scripts/_environment.sh", sys.executable]
    line = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    problem, version, ttnn, prefix, executable = line.strip().split("|")
    assert (problem, version) == ("", "{}.{}.{}".format(*sys.version_info))
    assert (ttnn, prefix) == ("yes" if sys.version_info[1] in (10, 12) and wheel_platform() else "no", sys.base_prefix)
    assert Path(executable).exists()
    assert not executable.startswith(str(ROOT / ".venv"))


def wheel_platform() -> bool:
    """Whether ttnn's manylinux_2_34_x86_64 wheel fits the platform, by packaging's tags rather than by our probe."""
    from packaging.tags import platform_tags

    return "manylinux_2_34_x86_64" in set(platform_tags())


# ---- environment ----


def test_first_use_installs_once_and_says_which_python(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    first = machine.demo("--prompt", "two words", cwd=machine.bin)
    assert first.returncode == 0, first.stderr
    assert first.stdout == textwrap.dedent(
        f"""\
        ran in {machine.bin}:
        <{machine.clone}/demo/simple_text_demo.py>
        <--prompt>
        <two words>
        """
    )
    assert first.stderr.splitlines()[-1] == "python 3.12.1 (ttnn 0.81.1)"
    assert machine.calls("pip")[0].endswith(" -e .[dev,tt]")
    second = machine.demo()
    assert machine.installs == 1
    assert second.stderr == "python 3.12.1 (ttnn 0.81.1)\n"


def test_test_script_shares_the_environment_and_runs_pytest_in_the_repository(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.demo()
    result = machine.run(machine.clone / "scripts/test.sh", "-k", "a or b")
    assert result.stdout == f"ran in {machine.clone}:\n<-m>\n<pytest>\n<-k>\n<a or b>\n"
    assert machine.installs == 1


def test_scripts_work_by_a_relative_path_with_cdpath_set(machine):
    machine.python("python3.12", "3.12.1")
    (machine.home / "scripts").mkdir()
    result = machine.run("scripts/demo.sh", cwd=machine.clone, CDPATH=str(machine.home))
    assert f"<{machine.clone}/demo/simple_text_demo.py>" in result.stdout


def test_uv_installs_where_it_is_present(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.uv()
    for _ in range(2):
        assert machine.demo().stderr.splitlines()[-1] == "python 3.12.1 (ttnn 0.81.1)"
    assert machine.calls("uv") == ["pip install --python .venv/bin/python -e .[dev,tt]"]
    assert machine.calls("pip") == []


def test_interpreter_without_ttnn_drops_its_pin_and_says_so(machine):
    machine.python("python3.12", "3.12.1", ttnn="no")
    result = machine.demo()
    assert machine.calls("pip")[0].endswith(" -e .[dev]")
    assert result.stderr.splitlines()[-1].startswith("python 3.12.1 (no ttnn: it needs CPython 3.12 or 3.10")


def test_ttnn_that_does_not_import_is_reported_and_does_not_stop_the_demo(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "ttnn-is-broken").touch()
    result = machine.demo()
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1].startswith("python 3.12.1 (ttnn does not import, see ")
    assert "ImportError: libfake.so" in (machine.clone / ".venv/ttnn.log").read_text()


@pytest.mark.parametrize("change", ["pins", "place", "stamp", "python"])
def test_changed_pins_interrupted_install_or_lost_python_make_it_anew(machine, change):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.demo()
    if change == "pins":
        project = machine.clone / "pyproject.toml"
        project.write_text(project.read_text().replace("loguru==", "loguru==9."))
    elif change == "place":  # a copy of the repository, whose environment would import the original
        stamp = machine.clone / ".venv/installed.txt"
        stamp.write_text(stamp.read_text().replace(str(machine.clone), "/elsewhere"))
        (machine.clone / ".venv/half-installed").touch()
    elif change == "stamp":
        (machine.clone / ".venv/installed.txt").unlink()
        (machine.clone / ".venv/half-installed").touch()
    else:
        (machine.clone / ".venv/bin/python").unlink()
    assert machine.demo().returncode == 0
    assert machine.installs == 2
    assert not (machine.clone / ".venv/half-installed").exists()


def test_change_outside_the_pins_installs_nothing(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.demo()
    project = machine.clone / "pyproject.toml"
    project.write_text(project.read_text().replace("line-length = 120", "line-length = 100"))
    machine.demo()
    assert machine.installs == 1


def test_another_python_variable_makes_it_anew_and_the_same_does_not(machine, tmp_path):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.python(tmp_path / "own/python", "3.11.9")
    machine.demo()
    machine.demo(PYTHON="python3.12")
    assert machine.installs == 1
    assert "python 3.11.9 (no ttnn" in machine.demo(PYTHON=str(tmp_path / "own/python")).stderr
    assert machine.installs == 2


def test_progress_and_failure_of_pip_are_shown_and_the_next_run_recovers(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "pip-fails").touch()
    result = machine.demo()
    assert (result.returncode, result.stdout) == (1, "")
    assert "Collecting fake-torch\nERROR: no space left on the fake device\n" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: the environment could not be made: ")
    (machine.clone / "pip-fails").unlink()
    recovered = machine.demo()
    assert (recovered.returncode, machine.installs) == (0, 2)
    assert "Collecting fake-torch\n" in recovered.stderr
    assert "Collecting" not in recovered.stdout


def test_ctrl_c_ends_the_install_in_one_line_with_130_and_the_next_run_recovers(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "pip-hangs").touch()
    process = machine.start(machine.clone / "scripts/demo.sh")
    machine.wait_for_pip()
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[2:] == ["error: interrupted: the next run makes .venv anew"]
    (machine.clone / "pip-hangs").unlink()
    assert machine.demo().returncode == 0


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock there is no lock")
def test_two_scripts_at_once_install_once(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "pip-hangs").touch()
    first = machine.start(machine.clone / "scripts/demo.sh")
    machine.wait_for_pip()
    second = machine.start(machine.clone / "scripts/demo.sh")
    assert second.stderr.readline() == "waiting: another script makes .venv\n"
    (machine.clone / "pip-hangs").unlink()
    assert "ready after" in first.communicate(timeout=300)[1]
    assert second.communicate(timeout=300)[1] == "python 3.12.1 (ttnn 0.81.1)\n"
    assert (first.returncode, second.returncode, machine.installs) == (0, 0, 1)


def test_callers_python_path_does_not_reach_the_environment(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    machine.demo()
    write_executable(machine.clone / ".venv/bin/python", '#!/usr/bin/env bash\necho "path=${PYTHONPATH-unset}"\n')
    assert machine.demo(PYTHONPATH="/somewhere").stdout == "path=unset\n"


# ---- .ci/run ----


TTNN = "models/tests/ttnn"
KERNELS = [f"{TTNN}/test_{name}.py" for name in ("kernels", "first_hour", "mock_cluster")]
WHOLE_MODELS = [f"{TTNN}/test_{name}.py" for name in ("mesh", "layout", "model", "fused", "kernel_audit")]
PARTS = [
    ["tests", "--board", "N150"],
    ["models/tests", "--ignore", TTNN, "--board", "N150"],
    [TTNN, *(word for file in KERNELS for word in ("--ignore", file)), "--board", "N150"],
    [*KERNELS, "--board", "N150"],
    [TTNN, "--board", "N300", "-m", "not once"],
    [TTNN, "--board", "T3K", "-m", "not once and not key_boards"],
    [TTNN, "--board", "P150", "-m", "not once and not key_boards"],
    [*WHOLE_MODELS, "--board", "P300x2", "-m", "not once and not key_boards"],
]


def test_ci_lints_checks_types_and_soaks_then_runs_every_part_of_the_tests_once(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    result = machine.run(machine.clone / ".ci/run")
    assert result.returncode == 0, result.stderr
    ran = f"ran in {machine.clone}:\n<-m>\n"
    lint, *parts = result.stdout.split(f"{ran}<pytest>\n")
    soak = f"ran in {machine.clone}:\n<scripts/soak.py>\n<--minutes>\n<3>\n<--memory-mb-per-hour>\n<20000>\n"
    assert lint == f"{ran}<ruff>\n<check>\n<.>\n{ran}<ruff>\n<format>\n<--check>\n<.>\n{ran}<mypy>\n{soak}"
    # which lane has run a part depends on times
    assert sorted(re.findall("^<(.*)>$", part, re.MULTILINE) for part in parts) == sorted(PARTS)
    assert machine.installs == 1
    assert not [*machine.clone.glob(".venv/lanes*")]


def test_ci_fails_where_the_soak_fails(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "fails-with").write_text("scripts/soak.py")
    result = machine.run(machine.clone / ".ci/run")
    assert result.returncode == 3
    assert "<scripts/soak.py>" in result.stdout and "<pytest>" not in result.stdout
    assert result.stderr.splitlines()[-1] == "error: the soak has failed"


def test_parts_of_the_tests_are_files_that_there_are():
    assert all((ROOT / file).is_file() for file in [*KERNELS, *WHOLE_MODELS])


@pytest.mark.parametrize("part", ["tests --board N150", "P150", "--board T3K"])
def test_where_one_part_fails_the_others_are_run_and_the_whole_fails(machine, part):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "fails-with").write_text(part)
    result = machine.run(machine.clone / "scripts/test.sh")
    assert result.returncode == 3
    assert result.stdout.count("<pytest>") == len(PARTS)


@pytest.mark.parametrize("ttnn", ["yes", "no"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_last_line_adds_up_what_the_tests_of_all_parts_have_counted(machine, ttnn, fails):
    machine.python("python3.12", "3.12.1", ttnn=ttnn)
    (machine.clone / "counts").write_text("faults survived:3\ntokens compared:1200\n")
    if fails:
        (machine.clone / "fails-with").write_text("N150")
    result = machine.run(machine.clone / "scripts/test.sh")
    parts = len(PARTS) if ttnn == "yes" else 1
    assert result.returncode == (3 if fails else 0)
    assert result.stdout.splitlines()[-1] == (
        f"cases tried: 0, faults survived: {3 * parts}, tokens compared: {1200 * parts}, tokens wrong: 0, "
        "mutants caught: 0, mutants untried: 0"
    )
    assert result.stdout.count("cases tried") == 1
    assert not [*machine.clone.glob(".venv/lanes*")]


def test_runs_of_pytest_leave_what_their_tests_have_counted(tmp_path):
    """With this repository's conftest.py; a run inside a test adds nothing to its own."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent(
            """\
            import os

            import pytest

            @pytest.mark.parametrize("faults", [2, 5])
            def test_it(faults, tally):
                assert "TEST_COUNTS" not in os.environ
                tally["faults survived"] += faults
                tally["cases tried"] += 1
                assert faults == 2

            @pytest.mark.fault
            @pytest.mark.parametrize("survived", [True, False])
            def test_a_fault(survived):
                assert survived
            """
        )
    )
    counts = tmp_path / "counts"
    counts.mkdir()
    env = {**os.environ, "TEST_COUNTS": str(counts), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert result.returncode == 1, result.stdout
    (left,) = counts.iterdir()
    assert sorted(left.read_text().splitlines()) == ["cases tried:2", "faults survived:8"]
    assert "cases tried: 2, faults survived: 8" in result.stdout


def test_without_ttnn_one_run_has_all_tests(machine):
    machine.python("python3.12", "3.12.1", ttnn="no")
    result = machine.run(machine.clone / "scripts/test.sh")
    assert result.returncode == 0
    assert result.stdout == f"ran in {machine.clone}:\n<-m>\n<pytest>\n<--board>\n<N150>\n"


def test_ci_fails_where_ttnn_does_not_import(machine):
    machine.python("python3.12", "3.12.1", ttnn="yes")
    (machine.clone / "ttnn-is-broken").touch()
    result = machine.run(machine.clone / ".ci/run")
    assert result.returncode == 1
    assert "<pytest>" not in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: ttnn does not import: run this with CPython 3.12 or 3.10")
