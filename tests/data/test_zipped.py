import os
import stat
import zipfile
from types import SimpleNamespace

import pytest

from gift.data import zipped
from gift.data.zipped import unpacked

CONTENTS = {"train/a/1.png": b"one", "train/b/2.png": b"two"}


@pytest.fixture
def cache(caches):
    return caches / "gift" / "unpacked"


def pack(path, contents=CONTENTS, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_unpacked_once(tmp_path, cache, monkeypatch):
    archive = pack(tmp_path / "images.zip", {**CONTENTS, "other/c/3.png": b"three", "train/": b""})
    folder = unpacked(archive)
    assert folder.parent == cache
    assert files(folder) == {**CONTENTS, "other/c/3.png": b"three"}
    monkeypatch.setattr(zipped, "_unpack", None)
    assert unpacked(archive) == folder


def test_an_archive_that_changed_is_unpacked_anew(tmp_path):
    first = unpacked(pack(tmp_path / "images.zip"))
    second = unpacked(pack(tmp_path / "images.zip", {"x/1.png": b"other", "y/1.png": b"another"}))
    assert files(second) == {"x/1.png": b"other", "y/1.png": b"another"}
    assert first != second


def test_the_one_folder_at_the_top_is_returned_and_system_files_are_not_unpacked(tmp_path):
    contents = {f"flowers/{name}": data for name, data in CONTENTS.items()}
    folder = unpacked(pack(tmp_path / "images.zip", {**contents, "__MACOSX/._x": b"", "flowers/.DS_Store": b""}))
    assert folder.name == "flowers"
    assert files(folder) == CONTENTS


def test_paths_as_windows_writes_them_are_folders(tmp_path):
    archive = pack(tmp_path / "images.zip", {"a_1.png": b"one", "b_1.png": b"two"})
    archive.write_bytes(archive.read_bytes().replace(b"_1.png", b"\\1.png"))
    assert files(unpacked(archive)) == {"a/1.png": b"one", "b/1.png": b"two"}


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/x.png", "C:/x.png", "..\\x.png", "\\x.png", "//x/y.png"]
)
def test_a_path_outside_of_the_folder_is_refused(tmp_path, cache, name):
    with pytest.raises(ValueError, match="outside of its folder"):
        unpacked(pack(tmp_path / "images.zip", {**CONTENTS, name: b"evil"}))
    assert list(cache.iterdir()) == []
    assert not list(tmp_path.rglob("x.png"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(tmp_path, cache, kind):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        entry = zipfile.ZipInfo("train/a")
        entry.external_attr = (kind | 0o777) << 16
        opened.writestr(entry, "/etc")
        opened.writestr("train/a/passwd", "x")
    with pytest.raises(ValueError, match=r"'train/a', a link or no plain file"):
        unpacked(archive)
    assert list(cache.iterdir()) == []


def test_an_archive_that_grows_too_much_is_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(zipped, "_RATIO_FREE_BYTES", 1000)
    archive = pack(tmp_path / "images.zip", {"a/1.bmp": bytes(300_000)})
    with pytest.raises(ValueError, match="would have 300000 unpacked, more than 100 times as many"):
        unpacked(archive)
    monkeypatch.setattr(zipped, "_RATIO_FREE_BYTES", 300_000)
    assert unpacked(archive).name == "a"
    monkeypatch.setattr(zipped, "MAX_UNPACKED_BYTES", 299_999)
    os.utime(archive, (1, 1))
    with pytest.raises(ValueError, match="299999"):
        unpacked(archive)
    assert len(list(cache.iterdir())) == 1


def test_an_archive_that_the_disk_cannot_hold_is_an_error_of_the_disk(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(zipped.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(OSError, match="needs 6 bytes unpacked, and 5 are free"):
        unpacked(pack(tmp_path / "images.zip"))
    assert list(cache.iterdir()) == []


def damaged(path, how):
    data = pack(path, method=zipfile.ZIP_STORED).read_bytes()
    if how == "cut off":
        data = data[:-30]
    elif how == "another byte":
        data = data.replace(b"two", b"tvo")
    elif how == "no archive":
        data = b"not a zip"
    elif how == "empty":
        data = b""
    elif how == "encrypted":
        data = data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    elif how == "a file is a folder":
        pack(path, {"a": b"1", "a/1.png": b"2"})
        return path
    elif how == "holds train/a/1.png twice":
        data = data.replace(b"train/b/2.png", b"train/a/1.png")
    elif how == "bzip2":
        data = pack(path, {"a/1.png": b"1" * 99}, zipfile.ZIP_BZIP2).read_bytes().replace(b"BZh9", b"BZh0")
    elif how == "no files":
        pack(path, {"train/": b""})
        return path
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "damaged or not a zip"),
        ("another byte", "damaged .*CRC"),
        ("no archive", "damaged or not a zip"),
        ("empty", "damaged or not a zip"),
        ("encrypted", "encrypted"),
        ("a file is a folder", "do not fit together"),
        ("holds train/a/1.png twice", "holds train/a/1.png twice"),
        ("bzip2", "Invalid data stream"),
        ("no files", "holds no files"),
    ],
)
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, cache, how, message):
    with pytest.raises(ValueError, match=f"images.zip .*{message}"):
        unpacked(damaged(tmp_path / "images.zip", how))
    assert list(cache.iterdir()) == []
