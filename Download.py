"""Download the released files of ALBEF: checkpoints and annotation lists.

  Download.py --list                    print the names Download.py ALBEF_4M --to weights/
  download weights/ALBEF_4M.pth, or continue an interrupted download Download.py data json_pretrain
  download and unpack the annotation lists

The SHA-256 of a downloaded file is recorded beside it (FILE.sha256). A file with a record is
verified when it is named here or loaded. Proxies: the variables http_proxy, https_proxy and
no_proxy. Mirrors: --url or the variable ALBEF_MIRROR.
"""

import difflib
import os
import shutil
import ssl
import sys
import tarfile
import time
import zipfile
import zlib
from http.client import HTTPException, InvalidURL
from lzma import LZMAError
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from configs.flags import Flags
from models.hashes import hash_file, hash_record, verify_hash
from utils import (
    InputError,
    atomic_write,
    printable,
    run_script,
)

RELEASED = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/"
FILES = {  # name: (file, what it is, what takes it)
    "ALBEF": ("ALBEF.pth", "pre-trained on 14M images", "--checkpoint of every fine-tuning script"),
    "ALBEF_4M": (
        "ALBEF_4M.pth",
        "pre-trained on 4M images",
        "--checkpoint of every fine-tuning script",
    ),
    "pretrain_model_nlvr": (
        "pretrain_model_nlvr.pth",
        "text assignment, for NLVR2",
        "NLVR.py --checkpoint",
    ),
    "mscoco": (
        "mscoco.pth",
        "fine-tuned on COCO retrieval",
        "Retrieval.py --config configs/Retrieval_coco.yaml --evaluate",
    ),
    "flickr30k": (
        "flickr30k.pth",
        "fine-tuned on Flickr30K retrieval",
        "Retrieval.py --config configs/Retrieval_flickr.yaml --evaluate",
    ),
    "vqa": ("vqa.pth", "fine-tuned on VQA v2", "VQA.py --evaluate"),
    "refcoco": ("refcoco.pth", "fine-tuned on RefCOCO+", "Grounding.py --evaluate, Visualize.py"),
    "data": (
        "data.tar.gz",
        "annotations of the downstream tasks",
        "train_file, val_file, test_file, ... of their configs",
    ),
    "json_pretrain": (
        "json_pretrain.zip",
        "annotations for pre-training",
        "train_file of Pretrain.py and Pretrain_nlvr.py",
    ),
}
# attempts without new bytes; seconds before the next one, doubled each time; seconds of silence
ATTEMPTS, BACKOFF, TIMEOUT = 5, 1.0, 60
# another attempt may succeed
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    LZMAError,
    EOFError,
    RuntimeError,
    UnicodeError,
)


def released_files(names):
    """Return the files of names, which may have any case, lack the extension, or be `all`.

    Raises InputError.
    """
    known = {alias.lower(): file for key, (file, *_) in FILES.items() for alias in (key, file)}
    names = FILES if "all" in map(str.lower, names) else names
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
            hint = (
                f"did you mean {known[near[0]]}?"
                if near
                else f"the names are {', '.join(FILES)}, all"
            )
            raise InputError(f"{name}: no released file has that name, {hint}")
    return list(dict.fromkeys(known[name.lower()] for name in names))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def request(url, start):
    """Return the response to a GET request for the bytes from `start`.

    Raises InputError; NETWORK if a retry may succeed.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: an address begins with http:// or https://")
    try:
        response = urlopen(
            Request(url, headers={"Range": f"bytes={start}-"} if start else {}), timeout=TIMEOUT
        )
    except HTTPError as error:
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise
        raise InputError(
            f"{url}: the server answers {error.code}: check the address, or name a mirror (--url)"
        ) from None
    except (InvalidURL, ValueError) as error:
        raise InputError(f"{url}: not a valid address ({error})") from None
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise InputError(
            f"{url}: the server answers with a web page, perhaps to log in on: open the address in a browser"
        )
    if response.length is None:  # a closed connection would look like the end of the file
        raise InputError(
            f"{url}: the server does not say how large the file is: name a mirror (--url)"
        )
    return response


def attempt(url, part):
    """Complete the file `part` with one request.

    Raises InputError, OSError of the disk and NETWORK.
    """
    have = size_of(part)
    try:
        response = request(url, have)
    except HTTPError as error:
        if error.code == 416:  # the part does not belong to this file
            part.unlink()
        raise
    with response:
        have = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        if (response.status == 206) != bool(have):
            raise HTTPException("the server sends other bytes than the missing ones")
        size = have + response.length
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=size, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while data := response.read1(2**20):
                file.write(data)
                file.flush()  # received bytes survive the end of the process
                bar.update(len(data))
            # otherwise a power failure could leave an empty file with this name
            os.fsync(file.fileno())
    if size_of(part) != size:
        raise ConnectionError(f"the connection closed at {size_of(part):,} of {size:,} bytes")


def fetch(url, path):
    """Download url to path.

    Give up after ATTEMPTS attempts without new bytes. Raises InputError, OSError of the disk.
    """
    part, failures, most = path.with_name(f"{path.name}.part"), 0, 0
    while True:
        try:
            attempt(url, part)
            return os.replace(part, path)
        except NETWORK as error:
            why, have = printable(str(error)), size_of(part)
        failures, most = 1 if have > most else failures + 1, max(most, have)
        if failures == ATTEMPTS:
            raise InputError(
                f"{url}: {why}: check the network and the proxy variables, or name a mirror (--url); the same "
                f"command continues at {have:,} bytes"
            )
        wait = BACKOFF * 2 ** (failures - 1)
        print(f"{part.stem}: {why}; again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def unpack(path):
    """Unpack an archive into its folder and keep existing files. Raises InputError, OSError."""
    unpacked, kept = path.with_name(f"{path.name}.unpacking"), []
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        zipped = path.suffix == ".zip"
        with zipfile.ZipFile(path) if zipped else tarfile.open(path) as archive:
            size = (
                sum(member.file_size for member in archive.infolist())
                if zipped
                else sum(member.size for member in archive)
            )
            if size > (free := shutil.disk_usage(path.parent).free):
                raise InputError(
                    f"{path}: unpacks into {size:,} bytes and {path.parent} has {free:,} free: make room, or keep "
                    "the archive packed (--no_unpack)"
                )
            archive.extractall(unpacked, **({} if zipped else {"filter": "data"}))
        files = [file for file in unpacked.rglob("*") if not file.is_dir()]
        for file in files:
            target = path.parent / file.relative_to(unpacked)
            if os.path.lexists(target):
                kept.append(target)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)  # a folder of the user may be a link to another disk
        print(
            f"{path}: {len(files) - len(kept)} files unpacked into {path.parent}/, {len(kept)} existing ones kept"
        )
    except BROKEN as error:
        raise InputError(
            f"{path}: not a whole archive, or not one to trust ({printable(str(error))}): remove it and its "
            ".sha256, and download it again"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def provide(url, path, unpacking):
    """Download url to path unless it exists, verify and unpack it.

    Raises InputError, OSError of the disk.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):  # a second process waits
        if new := not path.exists():
            fetch(url, path)
        state = "verified" if verify_hash(path) else "not recorded"
        if new and state != "verified":
            with atomic_write(hash_record(path), "w") as file:
                file.write(f"{hash_file(path)}  {path.name}\n")  # in the format of sha256sum
            state = "recorded"
        if unpacking:
            unpack(path)
    print(f"{path}: complete, {tqdm.format_sizeof(size_of(path))}B, SHA-256 {state}", flush=True)


def main():
    flags = Flags(__doc__)
    flags.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="released file, in any case, with or without extension; or all",
    )
    flags.add_argument(
        "--list",
        action="store_true",
        help="print the names, the files and the scripts that read them",
    )
    flags.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="folder to write to")
    flags.add_argument(
        "--url",
        default=os.environ.get("ALBEF_MIRROR", RELEASED),
        metavar="ADDRESS",
        help="address of a mirror's folder that has the released file names",
    )
    flags.add_argument("--no_unpack", action="store_true", help="leave archives packed")
    args = flags.parse_args()
    if args.list:
        for name, entry in {"name": ("file", "what it is", "what takes it"), **FILES}.items():
            print("{:21}{:25}{:37}{}".format(name, *entry))
        return
    if not args.names:
        raise InputError("name a file; --list prints the names")
    files = released_files(args.names)
    try:
        args.to.mkdir(parents=True, exist_ok=True)
        for file in files:
            provide(
                f"{args.url.rstrip('/')}/{file}",
                args.to / file,
                not file.endswith(".pth") and not args.no_unpack,
            )
    except OSError as error:  # of the disk
        raise InputError(
            f"{error.filename or args.to}: {error.strerror or error}; make room, or name a folder to write to with "
            "--to; received bytes are kept, and the same command continues"
        ) from None


if __name__ == "__main__":
    run_script(main)
