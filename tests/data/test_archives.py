import hashlib
import io
import stat
import tarfile
import zipfile

import pytest

from gift.data.archives import Source, check_hash, is_inside, unpack
from tests.data.official_archives import tar, zipped

FILES = {"data/a.txt": b"first", "data/deep/b.txt": b"second"}


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip"])
def test_archives_of_every_kind_are_unpacked_whole_or_in_part(tmp_path, name):
    (zipped if name.endswith("zip") else tar)(tmp_path / name, FILES)
    unpack(tmp_path / name, tmp_path / "whole")
    assert contents(tmp_path / "whole") == FILES
    unpack(tmp_path / name, tmp_path / "part", lambda member: member.endswith("b.txt"))
    assert contents(tmp_path / "part") == {"data/deep/b.txt": b"second"}


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "data/../../out.txt", "c:out.txt", "a\\..\\out.txt"])
def test_a_path_that_leads_out_is_refused_and_nothing_is_written_there(tmp_path, name):
    for write, archive in ((tar, tmp_path / "x.tar"), (zipped, tmp_path / "x.zip")):
        write(archive, {name: b"evil"})
        with pytest.raises(ValueError, match="leads out"):
            unpack(archive, tmp_path / "new" / archive.suffix)
    assert not any(file.name == "out.txt" for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    entry = tarfile.TarInfo("data/link")
    entry.type, entry.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(entry)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        unpack(tmp_path / "x.tar", tmp_path / "new")


def test_links_in_a_zip_are_refused(tmp_path):
    entry = zipfile.ZipInfo("data/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        unpack(tmp_path / "x.zip", tmp_path / "new")


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.zip"])
def test_an_archive_that_is_cut_off_or_damaged_is_refused(tmp_path, name):
    large = {"data/a.bin": bytes(range(256)) * 200}
    (zipped if name.endswith("zip") else tar)(tmp_path / name, large)
    whole = (tmp_path / name).read_bytes()
    for index, content in enumerate((whole[: len(whole) // 2], b"no archive", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpack(tmp_path / name, tmp_path / f"new{index}")


def test_a_hash_is_compared_where_one_is_known(tmp_path):
    file = tmp_path / "x.tar"
    file.write_bytes(b"content")
    check_hash(file, None)
    check_hash(file, hashlib.sha256(b"content").hexdigest())
    with pytest.raises(ValueError, match="not the published file"):
        check_hash(file, hashlib.sha256(b"other").hexdigest())


def test_what_is_unpacked_is_found_before_archives(tmp_path):
    tar(tmp_path / "x.tar", FILES)
    source = Source(tmp_path, tmp_path / "scratch", {"x.tar": "0" * 64})
    with pytest.raises(ValueError, match="not the published file"):
        source.find("data/a.txt", ("x.tar",))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(b"mine")
    assert source.find("data/a.txt", ("x.tar",)).read_bytes() == b"mine"


def test_one_archive_alone_may_be_the_source(tmp_path):
    tar(tmp_path / "y.tar", FILES)
    source = Source(tmp_path / "y.tar", tmp_path / "scratch", {})
    assert source.find("data/deep", ("x.tar",)) == tmp_path / "scratch/y.tar/data/deep"
    with pytest.raises(ValueError, match=r"no data/c.txt in .*one of x.tar"):
        source.find("data/c.txt", ("x.tar",))


def test_only_relative_paths_that_stay_inside_are_inside():
    assert all(map(is_inside, ["a", "a/b.jpg", "./a"]))
    assert not any(map(is_inside, ["", "/a", "..", "a/../b", "a\\b", "c:a", "a\0"]))


def test_a_tar_that_overwrites_through_a_folder_stays_inside(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"one", b"two"):
            entry = tarfile.TarInfo("data/a.txt")
            entry.size, entry.mode = 3, 0o777
            archive.addfile(entry, io.BytesIO(content))
    unpack(tmp_path / "x.tar", tmp_path / "new")
    assert contents(tmp_path / "new") == {"data/a.txt": b"two"}
