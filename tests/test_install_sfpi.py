"""scripts/install_sfpi.py with an archive of its own in place of a download."""

import hashlib
import io
import tarfile

import pytest

from models.board_mock import cluster
from models.errors import UserError
from scripts import install_sfpi

NAMED = "# sfpi release 7.1.0\n\nsfpi_repo='{repo}'\nsfpi_version='7.1.0'\nsfpi_hashtype='sha256'\n"
DEBIAN = {"ID": "ubuntu", "ID_LIKE": "debian"}


def archive(names):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = 2, 0o755
            file.addfile(member, io.BytesIO(b"g+"))
    return packed.getvalue()


@pytest.fixture
def ttnn(tmp_path):
    """A package directory that names an archive in `release`, which is returned with it."""
    package, releases = tmp_path / "ttnn", tmp_path / "releases/download/7.1.0"
    for directory in (package / "runtime", package / "tt_metal", releases):
        directory.mkdir(parents=True)
    content = archive(["sfpi/" + install_sfpi.COMPILER, "sfpi/include/sfpi.h"])
    (releases / "sfpi_7.1.0_x86_64_debian.txz").write_bytes(content)
    named = NAMED.format(repo=tmp_path.as_uri())
    named += f"sfpi_x86_64_debian_txz_hash='{hashlib.sha256(content).hexdigest()}'\n"
    (package / "tt_metal/sfpi-version").write_text(named)
    return package


def test_the_release_that_the_wheel_names_is_unpacked_where_ttnn_looks(ttnn):
    found = install_sfpi.release(ttnn, DEBIAN, "x86_64")
    assert (found.version, found.url.rpartition("/")[2]) == ("7.1.0", "sfpi_7.1.0_x86_64_debian.txz")
    (ttnn / "runtime/sfpi").mkdir()
    (ttnn / "runtime/sfpi/old").touch()
    install_sfpi.install(found, ttnn / "runtime")
    assert (ttnn / "runtime/sfpi" / install_sfpi.COMPILER).stat().st_mode & 0o100
    assert not (ttnn / "runtime/sfpi/old").exists()
    assert [path.name for path in (ttnn / "runtime").iterdir()] == ["sfpi"]


def test_an_archive_with_another_hash_leaves_what_was_there(ttnn, tmp_path):
    found = install_sfpi.release(ttnn, DEBIAN, "x86_64")
    (tmp_path / "releases/download/7.1.0/sfpi_7.1.0_x86_64_debian.txz").write_bytes(archive(["sfpi/other"]))
    (ttnn / "runtime/sfpi").mkdir()
    with pytest.raises(UserError, match="sha256"):
        install_sfpi.install(found, ttnn / "runtime")
    assert [path.name for path in (ttnn / "runtime").iterdir()] == ["sfpi"]


def test_a_failed_download_says_where_to_put_it_by_hand(ttnn, tmp_path):
    found = install_sfpi.release(ttnn, DEBIAN, "x86_64")
    (tmp_path / "releases/download/7.1.0/sfpi_7.1.0_x86_64_debian.txz").unlink()
    with pytest.raises(UserError) as caught:
        install_sfpi.install(found, ttnn / "runtime")
    assert found.url in str(caught.value) and str(ttnn / "runtime") in str(caught.value)


@pytest.mark.parametrize("distribution", [{}, {"ID": "arch"}, {"ID": "fedora"}])
def test_a_distribution_without_a_release_is_refused(ttnn, distribution):
    with pytest.raises(UserError, match="no release for"):
        install_sfpi.release(ttnn, distribution, "x86_64")


@pytest.mark.skipif(not cluster.is_installed(), reason="ttnn is not installed")
@pytest.mark.parametrize("distribution", [{"ID": "debian"}, DEBIAN, {"ID": "rocky", "ID_LIKE": "rhel centos fedora"}])
def test_the_installed_ttnn_names_a_release(distribution):
    found = install_sfpi.release(install_sfpi.installed_ttnn(), distribution, "x86_64")
    assert found.url.startswith("https://github.com/tenstorrent/sfpi/releases/download/")
    assert len(found.hash) == 64
