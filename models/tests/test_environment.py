"""Files of results: written whole or not at all, with errors that name them."""

import json
import os
import stat
import subprocess
import sys

import pytest

from models.cli.environment import write_json, write_text
from models.errors import UserError


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664])
def test_a_file_that_is_there_keeps_its_permissions(tmp_path, permissions):
    path = tmp_path / "results.json"
    path.write_text("old")
    path.chmod(permissions)
    write_json(str(path), {"a": [1, 2]})
    assert mode(path) == permissions and json.loads(path.read_text()) == {"a": [1, 2]}


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(str(tmp_path / "new.html"), "text", "--html")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new.html") == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(str(tmp_path / "link"), "new", "--html")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_full_device_is_named_with_its_flag(flag):
    with pytest.raises(UserError, match=f"^cannot write {flag} /dev/full: No space left on device"):
        write_json("/dev/full", {}) if flag == "--json" else write_text("/dev/full", "text", flag)


def test_a_disk_that_gets_full_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    script = (
        "import resource, sys; from models.cli.command import run_command; "
        "from models.cli.environment import write_json; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "sys.exit(run_command(lambda: write_json(sys.argv[1], {'a': 'x' * 10000})))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write --json {path}: File too large: choose another file\n"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_a_reader_that_has_gone_is_no_mistake_of_the_file(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            write_text(f"/dev/fd/{writer}", "text", "--html")
    finally:
        os.close(writer)


def test_standard_output_can_be_a_pipe():
    script = "from models.cli.environment import write_json; write_json('/dev/stdout', {'a': 1})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
