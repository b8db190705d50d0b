"""SHA-256 of files, and the records of it beside them (FILE.sha256)."""

import hashlib
import os
import re
from pathlib import Path

from utils import InputError, read_regular


def hash_file(path):
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_record(path):
    """Return where the SHA-256 of a file is recorded:

    PATH.sha256, which `sha256sum --check` reads.
    """
    return Path(f"{path}.sha256")


def recorded_hash(path):
    """Return the recorded SHA-256 of a file in hexadecimal, None without a record.

    Raises InputError.
    """
    record = hash_record(path)
    try:
        found = re.search(r"^\\?([0-9a-fA-F]{64})\b", read_regular(record).decode(), re.MULTILINE)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{record}: cannot be read ({error}), remove it or repair it") from None
    if not found:
        raise InputError(f"{record}: holds no SHA-256; remove it, or write it anew with sha256sum")
    return found[1].lower()


# path -> recorded hash, size and time of change of a file that this process has read whole
_verified = {}


def verify_hash(path):
    """Return whether a file has a recorded SHA-256.

    It is read for it once per process. Raises InputError if it has another.
    """
    expected = recorded_hash(path)
    if expected is None:
        return False
    try:
        stat = os.stat(path)
        state = expected, stat.st_size, stat.st_mtime_ns
        differs = _verified.get(str(path)) != state and hash_file(path) != expected
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if differs:
        raise InputError(
            f"{path}: its SHA-256 is not the one in {hash_record(path)}, so it was damaged or changed: move it away and "
            f"download it again (Download.py), or remove {hash_record(path)} if the change is meant"
        )
    _verified[str(path)] = state
    return True
