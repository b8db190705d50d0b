"""The SHA-256 recorded beside a file: PATH.sha256, which `sha256sum --check` reads too."""

import hashlib
import re
from pathlib import Path

from utils import InputError, atomic_write

# A comment to sha256sum. What size and time of change the file had when its hash was last computed: while it has them
# still, a checkpoint of 2 GB is not read whole before every load.
VERIFIED = re.compile(r"^# verified: size (\d+), mtime_ns (\d+)\n?", re.MULTILINE)


def record_of(path):
    """Where the hash of path is recorded."""
    path = Path(path)
    return path.with_name(f"{path.name}.sha256")


def recorded_hash(path):
    """The SHA-256 that is recorded for path in hexadecimal, None without a record. Raises InputError for a broken one."""
    try:
        text = record_of(path).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{record_of(path)}: cannot be read ({error}), remove it or repair it") from None
    found = re.search(r"^\\?([0-9a-fA-F]{64})\b", text, re.MULTILINE)
    if not found:
        raise InputError(f"{record_of(path)}: holds no SHA-256; remove it, or write it anew with sha256sum")
    return found[1].lower()


def hash_file(path, algorithm="sha256"):
    """The hash of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def record(path, digest, stat):
    """Writes PATH.sha256. stat: os.stat of the file, from before its hash was computed."""
    with atomic_write(record_of(path), "w") as file:
        file.write(f"{digest}  {Path(path).name}\n# verified: size {stat.st_size}, mtime_ns {stat.st_mtime_ns}\n")


def verify(path, cached=True):
    """Whether path has a record. Raises InputError if it does and the file is another than the recorded one.

    cached: believe a file whose size and time of change are those it had when it was last verified.
    """
    path, expected = Path(path), recorded_hash(path)
    if expected is None:
        return False
    try:
        stat, text = path.stat(), record_of(path).read_text()
        verified = VERIFIED.search(text)
        unchanged = verified and (int(verified[1]), int(verified[2])) == (stat.st_size, stat.st_mtime_ns)
        if cached and unchanged:
            return True
        digest = hash_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if digest != expected:
        raise InputError(
            f"{path}: its SHA-256 is not the one in {record_of(path)}, so it was damaged or changed: move it away and "
            f"download it again (Download.py), or remove {record_of(path)} if the change is meant"
        )
    if not unchanged:
        try:
            with atomic_write(record_of(path), "w") as file:
                file.write(VERIFIED.sub("", text).rstrip("\n") + "\n")
                file.write(f"# verified: size {stat.st_size}, mtime_ns {stat.st_mtime_ns}\n")
        except OSError:
            pass  # a folder that cannot be written to: the file is hashed again next time
    return True
