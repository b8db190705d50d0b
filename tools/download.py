"""Download the released files of ALBEF and unpack the archives among them.

To continue an interrupted download, repeat the command. The SHA-256 of a downloaded file is
recorded in FILE.sha256. It is verified whenever this command names the file again or a script loads
the file. Unpacking keeps existing files. The environment variables http_proxy, https_proxy and
no_proxy configure proxies.

names of the files:
"""

import os
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from configs.cli import Parser
from engine.launch import run_script
from utils import InputError

RELEASED = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/"
FILES = {
    "ALBEF": ("ALBEF.pth", "pre-trained on 14M images"),
    "ALBEF_4M": ("ALBEF_4M.pth", "pre-trained on 4M images"),
    "pretrain_model_nlvr": ("pretrain_model_nlvr.pth", "text assignment, for NLVR.py"),
    "mscoco": ("mscoco.pth", "fine-tuned on COCO, for Retrieval.py"),
    "flickr30k": ("flickr30k.pth", "fine-tuned on Flickr30K, for Retrieval.py"),
    "vqa": ("vqa.pth", "fine-tuned on VQA v2, for VQA.py"),
    "refcoco": ("refcoco.pth", "fine-tuned on RefCOCO+, for Grounding.py"),
    "data": ("data.tar.gz", "annotations of the downstream tasks"),
    "json_pretrain": ("json_pretrain.zip", "annotations for Pretrain.py and Pretrain_nlvr.py"),
}
ATTEMPTS = 5  # attempts in a row without new data
# seconds before the second attempt, doubled each time; seconds without data
BACKOFF, TIMEOUT = 1.0, 60
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError)
BROKEN = (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError)

TABLE = "\n".join(f"  {name:20} {file:24} {text}" for name, (file, text) in FILES.items())
parser = Parser(__doc__ + TABLE, "ALBEF_4M --output weights/")
parser.add_argument(
    "names",
    nargs="+",
    choices=[*FILES, "all"],
    metavar="NAME",
    help="names of files from the list above, or all",
)
parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder to write to")
parser.add_argument("--no_unpack", action="store_true", help="do not unpack archives")
parser.add_argument(
    "--mirror",
    default=os.environ.get("ALBEF_MIRROR", RELEASED),
    metavar="ADDRESS",
    help="address of a folder with these files; the environment variable ALBEF_MIRROR sets it, too",
)


def receive(url: str, part: Path) -> None:
    """Append the missing bytes to `part`. Raises one of NETWORK if a retry may help."""
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.unlink()
        elif error.code < 500 and error.code not in (408, 425, 429):
            raise InputError(f"{url}: the server answers {error.code}; try a --mirror") from None
        raise
    except (InvalidURL, ValueError) as error:
        raise InputError(f"{url}: not a valid address ({error}); correct --mirror") from None
    with response:
        if response.length is None or response.headers.get_content_type() == "text/html":
            raise InputError(
                f"{url}: the server sends a web page or a stream, not a file; try a --mirror"
            )
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise HTTPException("the server sends other bytes than requested")
        size = start + response.length
        progress = tqdm(total=size, initial=start, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if start else "wb", buffering=0) as file, progress:
            while data := response.read1(2**20):
                progress.update(file.write(data))
            os.fsync(file.fileno())
    if (received := part.stat().st_size) != size:
        raise ConnectionError(f"the connection closed at {received:,} of {size:,} bytes")


def download(url: str, path: Path) -> None:
    """Download a file. Raises InputError after ATTEMPTS attempts, and OSError of the disk."""
    part, failures, most = path.with_name(f"{path.name}.part"), 0, 0
    while True:
        try:
            receive(url, part)
            return os.replace(part, path)
        except NETWORK as error:
            reason, received = ascii(str(error)), part.stat().st_size if part.exists() else 0
        failures, most = 1 if received > most else failures + 1, max(most, received)
        if failures == ATTEMPTS:
            raise InputError(
                f"{url}: {reason}; check the network and --mirror. To continue at"
                f" {received:,} bytes, repeat the command"
            )
        wait = BACKOFF * 2 ** (failures - 1)
        print(f"{path.name}: {reason}; retry in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def unpack(path: Path) -> None:
    """Unpack an archive into its folder and keep existing files. Raises InputError, OSError."""
    unpacked = path.with_name(f"{path.name}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        shutil.unpack_archive(path, unpacked, filter=None if path.suffix == ".zip" else "data")
        for file in [file for file in unpacked.rglob("*") if not file.is_dir()]:
            target = path.parent / file.relative_to(unpacked)
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target):
                print(f"{target}: kept, because it exists already")
            else:
                shutil.move(file, target)  # a folder of the user may be a link to another disk
    except BROKEN as error:
        raise InputError(
            f"{path}: damaged or unsafe ({error}); remove this file and {path.name}.sha256, and"
            " download it again"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def provide(url: str, path: Path, *, unpacking: bool) -> None:
    """Download a file unless it exists, verify or record its SHA-256, and unpack it."""
    from filelock import FileLock

    from models.hashes import hash_file, hash_record, verify_hash
    from utils import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # a second process waits
        if missing := not path.exists():
            download(url, path)
        if not (verified := verify_hash(path)) and missing:
            with atomic_write(hash_record(path), "w") as file:
                file.write(f"{hash_file(path)}  {path.name}\n")  # in the format of sha256sum
        if unpacking:
            unpack(path)
    state = "verified" if verified else "recorded" if missing else "not recorded"
    print(f"{path}: complete, SHA-256 {state}", flush=True)


def main() -> None:
    """Download the files on the command line."""
    args = parser.parse_args()
    if not args.mirror.startswith(("http://", "https://")):
        raise InputError(
            f"--mirror {args.mirror}: not an address; write one with http:// or https://"
        )
    for name in FILES if "all" in args.names else args.names:
        file = FILES[name][0]
        unpacking = not args.no_unpack and not file.endswith(".pth")
        try:
            provide(f"{args.mirror.rstrip('/')}/{file}", args.output / file, unpacking=unpacking)
        except OSError as error:  # of the disk
            raise InputError(
                f"{error.filename or args.output}: {error.strerror or error}; make room and"
                " repeat the command to continue, or name another --output"
            ) from None


if __name__ == "__main__":
    run_script(main)
