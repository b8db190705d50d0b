"""Downloads the files that the authors of ALBEF have released: checkpoints and annotation lists.

  Download.py --list                    the names
  Download.py ALBEF_4M --to weights/    downloads weights/ALBEF_4M.pth, or continues where it was interrupted
  Download.py data json_pretrain        downloads and unpacks the annotation lists
  Download.py --url ADDRESS             downloads any other file (and unpacks archives), by its complete address

A file's SHA-256 is recorded beside it (FILE.sha256) when it is first complete, and verified whenever the file is named here or
loaded. Proxies: the variables http_proxy, https_proxy and no_proxy. Mirrors: --url or the variable ALBEF_MIRROR.
"""

import difflib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from archives import is_archive, is_unpacked, unpack
from checksum import verify
from configs.flags import Flags
from transfer import adopt, fetch, megabytes
from utils import InputError, Interrupted, run_script

RELEASED = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/"


class File(NamedTuple):
    file: str
    what: str
    use: str


FILES = {
    "ALBEF": File("ALBEF.pth", "pre-trained on 14M images", "--checkpoint of every fine-tuning script"),
    "ALBEF_4M": File("ALBEF_4M.pth", "pre-trained on 4M images", "--checkpoint of every fine-tuning script"),
    "pretrain_model_nlvr": File("pretrain_model_nlvr.pth", "text assignment, for NLVR2", "NLVR.py --checkpoint"),
    "mscoco": File("mscoco.pth", "fine-tuned on COCO retrieval",
                   "Retrieval.py --config configs/Retrieval_coco.yaml --evaluate"),
    "flickr30k": File("flickr30k.pth", "fine-tuned on Flickr30K retrieval",
                      "Retrieval.py --config configs/Retrieval_flickr.yaml --evaluate"),
    "vqa": File("vqa.pth", "fine-tuned on VQA v2", "VQA.py --evaluate"),
    "refcoco": File("refcoco.pth", "fine-tuned on RefCOCO+", "Grounding.py --evaluate, Visualize.py"),
    "data": File("data.tar.gz", "annotations of the downstream tasks", "train_file, val_file, test_file, ... of their configs"),
    "json_pretrain": File("json_pretrain.zip", "annotations for pre-training",
                          "train_file of Pretrain.py and Pretrain_nlvr.py"),
}  # fmt: skip


def released_file(name):
    """The file name that a user means, in any case and with or without its extension. Raises InputError."""
    known = {alias.lower(): entry.file for key, entry in FILES.items() for alias in (key, entry.file)}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), [key.lower() for key in FILES], 1, 0.5)
    hint = next((f"did you mean {key}?" for key in FILES if [key.lower()] == near), f"the names are {', '.join(FILES)}, all")
    raise InputError(f"{name}: no released file has that name, {hint}")


def last_part(url):
    """The file name that an address ends with."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def wanted_files(names, url):
    """{file name: address} of the command line. Raises InputError."""
    base = url or os.environ.get("ALBEF_MIRROR") or RELEASED
    if not names:
        if not url or last_part(url) in ("", ".", ".."):
            raise InputError("name a file, --list prints their names; or give the complete address of another one by --url")
        return {last_part(url): url}
    if "all" in (name.lower() for name in names):
        names = list(FILES)
    files = dict.fromkeys(map(released_file, names))
    if len(files) == 1 and [last_part(base)] == list(files):
        return {last_part(base): base}
    return {file: f"{base.rstrip('/')}/{file}" for file in files}


@contextmanager
def locked(path):
    """Keeps other processes from downloading or unpacking path at the same time; waits for one that does.

    The system releases the lock of a process that was killed. The lock's file stays: removing it is what makes locks fail.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{path}: another process is at it, waiting until it is done", flush=True)
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def is_ready(path, unpacking):
    """Whether path is there and unpacked, if it is to be. Raises InputError if it is not the file that was recorded."""
    return path.is_file() and verify(path, cached=False) and not (unpacking and not is_unpacked(path))


def provide(url, path, unpacking):
    """Downloads url to path unless it is there, verifies it and unpacks it. Raises InputError."""
    if not is_ready(path, unpacking):
        with locked(path):
            if not path.exists():
                fetch(url, path)
            elif not verify(path, cached=False):  # perhaps another process has just downloaded it
                adopt(url, path)
            if unpacking and not is_unpacked(path):
                names = unpack(path)
                print(f"{path}: {len(names)} files unpacked into {path.parent}/")
    print(f"{path}: complete, {megabytes(path.stat().st_size)}, SHA-256 verified", flush=True)


def print_list():
    """The released files as a table."""
    rows = [("name", "file", "what it is", "what takes it"), *((name, *entry) for name, entry in FILES.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main():
    flags = Flags(__doc__)
    flags.add_argument("names", nargs="*", metavar="NAME", help="a released file, in any case, also without extension; or all")
    flags.add_argument("--list", action="store_true", help="print the names, what they are and which script takes them")
    flags.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="the folder to write to")
    flags.add_argument("--url", help="the folder of a mirror, which has the files under their released names; or the complete "
                       "address of the one file to download")  # fmt: skip
    flags.add_argument("--no_unpack", action="store_true", help="leave archives as they are")
    args = flags.parse_args()
    if args.list:
        print_list()
        return
    files = wanted_files(args.names, args.url)
    try:
        args.to.mkdir(parents=True, exist_ok=True)
        for file, url in files.items():
            provide(url, args.to / file, is_archive(file) and not args.no_unpack)
    except Interrupted as error:
        raise Interrupted(error.signum, "what has come is kept, the same command continues there") from None
    except OSError as error:  # of the target folder; the network's are dealt with where they occur
        reason = error.strerror or error
        raise InputError(f"{error.filename or args.to}: {reason}; name a folder to write to with --to") from None


if __name__ == "__main__":
    run_script(main)
