"""SHA-256 of files, and the records of them beside the files (FILE.sha256)."""

import hashlib
import os
import re
from pathlib import Path

from utils import InputError, read_regular

# path -> recorded hash, size and modification time of a file that this process has verified
_verified = {}


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_record(path: Path | str) -> Path:
    """Return the file that records the SHA-256 of `path`, as `sha256sum --check` reads it."""
    return Path(f"{path}.sha256")


def verify_hash(path: Path | str) -> bool:
    """Compare a file with its recorded SHA-256. The file is read once per process.

    Returns:
        Whether there is a record.

    Raises:
        InputError: The hashes differ, or the record holds no SHA-256.
        OSError: A file cannot be read.
    """
    record = hash_record(path)
    if not record.exists():
        return False
    # sha256sum writes a backslash first if the name has an escaped sign
    digest = re.match(rb"\\?([0-9a-fA-F]{64})\b", read_regular(record))
    if not digest:
        raise InputError(f"{record} holds no SHA-256; remove it, or write it with sha256sum")
    expected, stat = digest[1].decode().lower(), os.stat(path)
    state = expected, stat.st_size, stat.st_mtime_ns
    if _verified.get(str(path)) != state and hash_file(path) != expected:
        raise InputError(
            f"{path}: its SHA-256 is not the one in {record}, so the file was damaged or changed;"
            f" move it away and download it again, or remove {record} if you changed the file"
        )
    _verified[str(path)] = state
    return True
