"""Unpacking of tar and zip archives from the network: plain files and folders only, and only below the target folder."""

import filecmp
import json
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath

from checksum import hash_file
from utils import InputError, atomic_write

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
# no more than this many times the archive's size, or this many bytes if that is more: JSON shrinks to a tenth, a bomb to a
# thousandth
MAX_RATIO, MAX_SMALL = 100, 2**28
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError, ValueError)


def is_archive(path):
    return str(path).lower().endswith(SUFFIXES)


def marker_of(path):
    """Where it is noted what an archive was unpacked to: its SHA-256 and its files."""
    return path.with_name(f"{path.name}.unpacked")


def is_unpacked(path):
    """Whether this very archive was unpacked beside itself and all its files are still there (changed or not)."""
    try:
        marker = json.loads(marker_of(path).read_text())
        return marker["sha256"] == hash_file(path) and all((path.parent / name).is_file() for name in marker["files"])
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _members(path):
    """Yields (name, problem or None, size, function that opens it; None for a folder) of an archive's members in order."""
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
                problem = "a link" if kind == stat.S_IFLNK else None if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a device"
                yield info.filename, problem, info.file_size, None if info.is_dir() else lambda info=info: archive.open(info)
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                link = info.issym() or info.islnk()
                problem = "a link" if link else None if info.isfile() or info.isdir() else "a device"
                yield info.name, problem, info.size, None if info.isdir() else lambda info=info: archive.extractfile(info)
            while archive.fileobj.read(2**20):
                pass  # the checksum of gzip is at the very end, behind what the archive needs


def _leaves_folder(name):
    windows = PureWindowsPath(name)
    return bool(PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\\" in name)


def _extract(path, folder):
    """Writes the members of an archive below the empty folder and returns the files' names. Raises InputError.

    Only folders and newly opened plain files are ever made, without owner or permissions of the archive: nothing that a
    later member could be led elsewhere by.
    """
    names, total, limit = {}, 0, max(MAX_RATIO * path.stat().st_size, MAX_SMALL)
    for name, problem, size, opened in _members(path):
        if _leaves_folder(name):
            problem = "a path that leaves the folder"
        if problem:
            raise InputError(f"{path}: its member {name!r} is {problem}: nothing was unpacked, do not trust this archive")
        total += size
        if total > limit:
            raise InputError(f"{path}: unpacks to more than {limit / 1e6:,.0f} MB at {name!r}, {MAX_RATIO} times its size: "
                             "nothing was unpacked, unpack it by hand if you trust it")  # fmt: skip
        target = folder / name
        if opened:
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            names[PurePosixPath(name).as_posix()] = None
    return list(names)


def _check_targets(path, unpacked, names):
    """Raises InputError if a file of the archive would replace another or reach through a link in the target folder."""
    folder = path.parent.resolve()
    elsewhere = "move it away, or unpack into another folder with --to"
    for name in names:
        target = folder / name
        if target.is_symlink() or target.parent.resolve() != target.parent:
            raise InputError(f"{path}: {path.parent / name} is, or lies behind, a link: nothing was unpacked; {elsewhere}")
        if target.exists() and not (target.is_file() and filecmp.cmp(unpacked / name, target, shallow=False)):
            raise InputError(f"{path}: {path.parent / name} exists and differs from the archive's: nothing was unpacked; "
                             f"{elsewhere}; --no_unpack leaves the archive as it is")  # fmt: skip


def unpack(path):
    """Unpacks an archive beside itself and returns the names of its files. Raises InputError; then nothing was unpacked.

    Files that are there already are left if they are equal and an error if they differ. All is extracted into a folder of
    its own first and then renamed into place; a call that is killed in between is made good by the next one.
    """
    unpacked = path.with_name(f"{path.name}.unpacking")
    try:
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        names = _extract(path, unpacked)
        _check_targets(path, unpacked, names)
        for name in names:
            target = path.parent / name
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked / name, target)
        with atomic_write(marker_of(path), "w") as file:
            json.dump({"sha256": hash_file(path), "files": names}, file)
    except InputError:
        raise  # a ValueError too, but one that says it all
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is no whole archive ({reason}): remove it and its .sha256, and download it again") from None
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{path}: cannot be unpacked:{where} {error.strerror or error}") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return names
