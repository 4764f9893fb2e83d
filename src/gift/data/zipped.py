"""Zip archives of images, unpacked once into a cache."""

import errno
import hashlib
import lzma
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

MAX_UNPACKED_BYTES = 256 * 2**30  # ImageNet has 150 GB
MAX_RATIO = 100  # images hardly shrink in an archive; even drawings in BMP files stay far below
_RATIO_FREE_BYTES = 64 * 2**20  # so much may be unpacked at any ratio
# What zipfile raises for archives that are damaged, encrypted, or packed in a way it does not know.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, RuntimeError)
# Damaged bzip2 data (without a number), offsets before the file, names that exclude each other: no fault of the disk.
_MISFITS = (None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class _RefusedError(Exception):
    """An archive that can be read but must not be unpacked."""


def unpacked(archive: Path) -> Path:
    """Return the folder with the contents of a zip archive, which is unpacked the first time.

    The folder lies in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`, `gift/unpacked`) under a digest of the path,
    size and time of the archive. If all is in one folder inside the archive, that one is returned. Hidden files are not
    unpacked.

    Raises:
        ValueError: If the archive is damaged, would write outside of its folder, holds links, or is far larger
            unpacked than packed. Nothing is left behind then.
        OSError: If it cannot be unpacked there, for lack of space for example.
    """
    state = archive.stat()
    identity = f"{archive.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gift" / "unpacked"
    folder = cache / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        try:
            _unpack(archive, partial)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _move(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive into a folder."""
    try:
        with zipfile.ZipFile(archive) as opened:
            _write(opened, _members(archive, opened, shutil.disk_usage(folder).free), folder)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except _DAMAGED as error:
        raise ValueError(f"{archive} cannot be unpacked, it is damaged or not a zip archive: {error}") from error
    except OSError as error:
        if error.errno not in _MISFITS:
            raise
        raise ValueError(f"{archive} cannot be unpacked, its contents do not fit together: {error}") from error


def _write(opened: zipfile.ZipFile, members: dict[PurePosixPath, zipfile.ZipInfo], folder: Path) -> None:
    for path, member in members.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x": where names differ only in case, a file system may take two for one.
        with opened.open(member) as source, target.open("xb") as file:
            shutil.copyfileobj(source, file, 2**20)


def _members(archive: Path, opened: zipfile.ZipFile, free_bytes: int) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return the files of an archive by the path to write; zipfile writes no more of one than its `file_size`."""
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        path = _path(archive, member)
        if member.is_dir() or any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            continue
        if path in members:
            raise _RefusedError(f"{archive} holds {path} twice: pack it anew.")
        members[path] = member
    size, packed_bytes = sum(member.file_size for member in members.values()), archive.stat().st_size
    if size > MAX_UNPACKED_BYTES or size > max(_RATIO_FREE_BYTES, MAX_RATIO * packed_bytes):
        raise _RefusedError(
            f"{archive} has {packed_bytes} bytes and would have {size} unpacked, more than {MAX_RATIO} times as many "
            f"or than {MAX_UNPACKED_BYTES}: unpack it yourself if you trust it, and give the folder."
        )
    if size > free_bytes:
        raise OSError(errno.ENOSPC, f"{archive} needs {size} bytes unpacked, and {free_bytes} are free in the cache")
    if not members:
        raise _RefusedError(f"{archive} holds no files.")
    return members


def _path(archive: Path, member: zipfile.ZipInfo) -> PurePosixPath:
    """Return where to write a file, refusing what lies outside of the folder or is no plain file."""
    path = PurePosixPath(member.filename.replace("\\", "/"))  # some programs on Windows write these
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0]:
        raise _RefusedError(f"{archive} would write {member.filename!r} outside of its folder: do not trust it.")
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _RefusedError(f"{archive} holds {member.filename!r}, a link or no plain file: pack the files themselves.")
    return path
