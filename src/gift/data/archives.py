"""Files and folders that a user has unpacked, or still has in archives."""

import gzip
import hashlib
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


@dataclass(frozen=True)
class Source:
    """What there is to prepare a task from.

    Attributes:
        path: A folder of archives, of unpacked archives, or of both; or one archive.
        scratch: An empty folder that archives are unpacked into.
        hashes: SHA-256 of archives by name; others are not checked.
    """

    path: Path
    scratch: Path
    hashes: Mapping[str, str]

    def find(self, wanted: str, archives: tuple[str, ...]) -> Path:
        """Return a file or folder, unpacking the archive that holds it if nothing unpacked lies there.

        Args:
            wanted: Its path in the archive. The last part alone will do in `path`, as when `path` is the unpacked
                folder itself, and a .mat file may lie one folder deeper.
            archives: Names of the archives that may hold it.

        Raises:
            ValueError: If it is in none of them, or an archive is damaged.
        """
        if self.path.is_dir() and (found := _look(self.path, wanted)):
            return found
        names = [self.path.name] if self.path.is_file() else [name for name in archives if (self.path / name).is_file()]
        for name in names:
            folder = self.scratch / name
            if not folder.exists():
                archive = self.path if self.path.is_file() else self.path / name
                check_hash(archive, self.hashes.get(name))
                unpack(archive, folder)
            if found := _look(folder, wanted):
                return found
        raise ValueError(
            f"There is no {wanted} in {self.path}: give a folder with it or with one of {', '.join(archives)}."
        )


def _look(base: Path, wanted: str) -> Path | None:
    name = PurePosixPath(wanted).name
    deeper = sorted(base.glob(f"*/{name}")) if name.endswith(".mat") else []
    return next((place for place in (base / wanted, base / name, *deeper) if place.exists()), None)


def check_hash(file: Path, expected: str | None) -> None:
    """Compare a file with its published SHA-256, if there is one.

    Raises:
        ValueError: If they differ.
    """
    if expected is None:
        return
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(
            f"{file} is not the published file: its SHA-256 is {actual}, not {expected}. Download it anew, or unpack "
            "it yourself if you mean to use another edition."
        )


def unpack(archive: Path, folder: Path, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack a .tar, .tar.gz, .tgz or .zip file into a new folder.

    Args:
        archive: The file.
        folder: Where to; it is created.
        keep: Which files are unpacked, by their names in the archive.

    Raises:
        ValueError: If it is damaged, or holds a link or a path that leads out of the folder.
    """
    folder.mkdir(parents=True)
    try:
        if archive.name.lower().endswith(".zip"):
            _unpack_zip(archive, folder, keep)
        else:
            _unpack_tar(archive, folder, keep)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}. Was the download complete?") from error


def _unpack_tar(archive: Path, folder: Path, keep: Callable[[str], bool]) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{archive} holds {member.name}, which is neither a file nor a folder.")
            _refuse_outside(archive, member.name)
            if member.isfile() and keep(member.name):
                tar.extract(member, folder, filter="data")


def _unpack_zip(archive: Path, folder: Path, keep: Callable[[str], bool]) -> None:
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            if stat.S_ISLNK(entry.external_attr >> 16) or entry.flag_bits & 1:
                raise ValueError(f"{archive} holds {entry.filename}, which is a link or encrypted.")
            _refuse_outside(archive, entry.filename)
            if not entry.is_dir() and keep(entry.filename):
                file.extract(entry, folder)


def _refuse_outside(archive: Path, name: str) -> None:
    if not is_inside(name):
        raise ValueError(f"{archive} holds {name!r}, a path that leads out of the folder.")


def is_inside(path: str) -> bool:
    """Return whether a relative path with slashes stays in its folder, on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and not set(path) & set("\\:\0")
