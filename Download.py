"""Downloads the files that the authors of ALBEF have released: checkpoints and annotation lists.

  Download.py --list                    the names
  Download.py ALBEF_4M --to weights/    downloads weights/ALBEF_4M.pth, or continues where it was interrupted
  Download.py data json_pretrain        downloads and unpacks the annotation lists
  Download.py --url ADDRESS             downloads any other file (and unpacks archives), by its complete address

A file's SHA-256 is recorded beside it (FILE.sha256) when it is first complete, and verified whenever the file is named here or
loaded. Proxies: the variables http_proxy, https_proxy and no_proxy. Mirrors: --url or the variable ALBEF_MIRROR.
"""

import difflib
import filecmp
import os
import re
import shutil
import socket
import ssl
import sys
import tarfile
import time
import zipfile
import zlib
from http.client import HTTPException
from lzma import LZMAError
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tqdm import tqdm

from configs.flags import Flags
from utils import InputError, Interrupted, atomic_write, hash_file, hash_record, recorded_hash, run_script, verify_hash

RELEASED = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/"
FILES = {  # name: (file, what it is, what takes it)
    "ALBEF": ("ALBEF.pth", "pre-trained on 14M images", "--checkpoint of every fine-tuning script"),
    "ALBEF_4M": ("ALBEF_4M.pth", "pre-trained on 4M images", "--checkpoint of every fine-tuning script"),
    "pretrain_model_nlvr": ("pretrain_model_nlvr.pth", "text assignment, for NLVR2", "NLVR.py --checkpoint"),
    "mscoco": ("mscoco.pth", "fine-tuned on COCO retrieval", "Retrieval.py --config configs/Retrieval_coco.yaml --evaluate"),
    "flickr30k": ("flickr30k.pth", "fine-tuned on Flickr30K retrieval",
                  "Retrieval.py --config configs/Retrieval_flickr.yaml --evaluate"),
    "vqa": ("vqa.pth", "fine-tuned on VQA v2", "VQA.py --evaluate"),
    "refcoco": ("refcoco.pth", "fine-tuned on RefCOCO+", "Grounding.py --evaluate, Visualize.py"),
    "data": ("data.tar.gz", "annotations of the downstream tasks", "train_file, val_file, test_file, ... of their configs"),
    "json_pretrain": ("json_pretrain.zip", "annotations for pre-training", "train_file of Pretrain.py and Pretrain_nlvr.py"),
}  # fmt: skip
ATTEMPTS, BACKOFF, TIMEOUT = 6, 1.0, 60  # attempts that bring nothing new; seconds before the next, doubled; without a byte
ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
NETWORK = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)  # what another attempt may overcome
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError, UnicodeError)


def wanted_files(names, url):
    """Return {file name: address} for names in any case, with or without extension, or for a url alone. Raises InputError."""
    base = url or os.environ.get("ALBEF_MIRROR") or RELEASED
    try:
        last = unquote(urlsplit(base).path).rpartition("/")[2]
    except ValueError as error:
        raise InputError(f"{base}: not a valid address ({error})") from None
    if not names:
        if not url or last in ("", ".", ".."):
            raise InputError("name a file, --list prints their names; or give the complete address of another one by --url")
        return {last: url}
    known = {alias.lower(): file for key, (file, *_) in FILES.items() for alias in (key, file)}
    names = FILES if "all" in map(str.lower, names) else names
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
            hint = f"did you mean {known[near[0]]}?" if near else f"the names are {', '.join(FILES)}, all"
            raise InputError(f"{name}: no released file has that name, {hint}")
    files = list(dict.fromkeys(known[name.lower()] for name in names))
    return {last: base} if files == [last] else {file: f"{base.rstrip('/')}/{file}" for file in files}


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def request(url, headers):
    """Return the response to a GET request. Raises InputError for an answer that another attempt does not change, NETWORK."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url}: an address begins with http:// or https://")
    try:
        response = urlopen(Request(url, headers={"User-Agent": "ALBEF-Download", **headers}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise
        raise InputError(f"{url}: the server answers {error.code} {error.reason}: check the address, or name a mirror "
                         "(--url, ALBEF_MIRROR)") from None  # fmt: skip
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise InputError(f"{url}: the server answers with a web page, perhaps to log in on: open the address in a browser")
    return response


def attempt(url, part):
    """Complete PATH.part with one request. Raises InputError, OSError of the disk, and NETWORK."""
    note = part.with_name(f"{part.name}.version")  # of which version on the server the part is; another one is not continued
    have, version = size_of(part), note.read_text() if note.exists() else ""
    try:
        response = request(url, {"Range": f"bytes={have}-", "If-Range": version} if have and version else {})
    except HTTPError as error:
        if error.code == 416:
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # it is whole: the process ended before the file got its name
            part.unlink()
        raise
    with response:
        etag = response.headers.get("ETag", "W/")  # a weak one may be that of other bytes too
        found = response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
        if response.status == 206:
            span = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not span or found != version:
                part.unlink()
                raise HTTPException("the server has another version, or sends other bytes than those that are missing")
            size = int(span[1])
        elif "Content-Length" in response.headers:
            size, have = int(response.headers["Content-Length"]), 0
            part.unlink(missing_ok=True)  # before the note, which is never that of another version's bytes
            note.write_text(found)
        else:  # a cut connection would look like the end
            raise InputError(f"{url}: the server does not say how large the file is: try another mirror (--url)")
        interval = 0.5 if sys.stderr.isatty() else 30  # in a log file each update is a line
        with (
            open(part, "ab") as file,
            tqdm(total=size, initial=have, desc=part.stem, unit="B", unit_scale=True, mininterval=interval) as bar,
        ):
            while data := response.read1(2**20):
                file.write(data)
                file.flush()  # what has come is kept, whatever ends the process
                bar.update(len(data))
            os.fsync(file.fileno())  # else a power failure could leave the name without the bytes
    if size_of(part) != size:
        raise ConnectionError(f"the connection closed at {size_of(part):,} of {size:,} bytes")


def transfer(url, part):
    """Complete PATH.part in as many attempts as it takes while they bring something. Raises InputError, OSError of the disk."""
    failures, most = 0, size_of(part)
    while True:
        try:
            return attempt(url, part)
        except NETWORK as error:
            have, why = size_of(part), str(error).removeprefix("<urlopen error ").rstrip(">")
            failures, most = 1 if have > most else failures + 1, max(most, have)
            hopeless = isinstance(getattr(error, "reason", None), (socket.gaierror, ssl.SSLCertVerificationError))
            if failures == ATTEMPTS or (hopeless and not have):
                kept = f"; {have:,} bytes are kept, and the same command continues" if have else ""
                raise InputError(f"{url}: {why}: check the network and the proxy variables, name a mirror (--url, "
                                 f"ALBEF_MIRROR), or fetch {part.stem} by other means and put it into {part.parent}/"
                                 f"{kept}") from None  # fmt: skip
            wait = BACKOFF * 2 ** (failures - 1)
            print(f"{part.stem}: {why}; again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def fetch(url, path):
    """Download url to path and record its SHA-256, which must be that of the record if there is one. Raises InputError."""
    part = path.with_name(f"{path.name}.part")
    expected = recorded_hash(path)  # a broken record is an error before the transfer
    transfer(url, part)
    digest = hash_file(part)
    if expected not in (None, digest):
        part.unlink()
        raise InputError(f"{url}: what came has SHA-256 {digest}, not the one in {hash_record(path)}, and was removed: try "
                         "again, or remove that record if the server's file has changed for good reason")  # fmt: skip
    with atomic_write(hash_record(path), "w") as file:
        file.write(f"{digest}  {path.name}\n")  # as sha256sum does
    os.replace(part, path)
    part.with_name(f"{part.name}.version").unlink(missing_ok=True)


def unpack(path):
    """Unpack an archive beside itself, all or nothing, unless its files are there. Raises InputError, also if some differ."""
    unpacked = path.with_name(f"{path.name}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unpacked)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(unpacked, filter="data")
        files = {file: path.parent / file.relative_to(unpacked) for file in unpacked.rglob("*") if not file.is_dir()}
        present = [(file, target) for file, target in files.items() if target.exists()]
        if len(present) == len(files):
            print(f"{path}: its files are in {path.parent}/ already and stay as they are")
            return
        for file, target in present:
            if not filecmp.cmp(file, target, shallow=False):
                raise InputError(f"{path}: {target} exists and differs from the archive's: nothing was unpacked; move it "
                                 "away, or unpack into another folder (--to), or not at all (--no_unpack)")  # fmt: skip
        for file, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)  # a folder of the user may be a link to another disk
        print(f"{path}: {len(files)} files unpacked into {path.parent}/")
    except BROKEN as error:
        why = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{path}: not a whole archive, or not one to trust ({why}): nothing was unpacked; remove it and its "
                         ".sha256, and download it again") from None  # fmt: skip
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def provide(url, path, unpacking):
    """Download url to path unless it is there, verify it and unpack it. Raises InputError, OSError of the disk."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))  # the system releases it if this process is killed
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{path}: another process is downloading it, waiting until it is done", flush=True)
        held = lock.acquire(poll_interval=0.2)
    with held:
        if not path.exists():
            fetch(url, path)
        elif not verify_hash(path):
            raise InputError(f"{path} is there without {hash_record(path).name}: move it away to download it; or accept it as "
                             f"it is, in {path.parent}/: sha256sum {path.name} > {hash_record(path).name}")  # fmt: skip
        if unpacking:
            unpack(path)
    print(f"{path}: complete, {tqdm.format_sizeof(size_of(path))}B, SHA-256 verified", flush=True)


def main():
    flags = Flags(__doc__)
    flags.add_argument("names", nargs="*", metavar="NAME", help="a released file, in any case, also without extension; or all")
    flags.add_argument("--list", action="store_true", help="print the names, what they are and which script takes them")
    flags.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="the folder to write to")
    flags.add_argument("--url", help="the folder of a mirror that has the released names, or the complete address of one file")
    flags.add_argument("--no_unpack", action="store_true", help="leave archives as they are")
    args = flags.parse_args()
    if args.list:
        for name, entry in {"name": ("file", "what it is", "what takes it"), **FILES}.items():
            print("{:21}{:25}{:37}{}".format(name, *entry))
        return
    files = wanted_files(args.names, args.url)
    try:
        args.to.mkdir(parents=True, exist_ok=True)
        for file, url in files.items():
            provide(url, args.to / file, file.lower().endswith(ARCHIVES) and not args.no_unpack)
    except Interrupted as error:
        raise Interrupted(error.signum, "what has come is kept, the same command continues there") from None
    except OSError as error:  # of the disk
        raise InputError(f"{error.filename or args.to}: {error.strerror or error}; make room, or name a folder to write to "
                         "with --to; what has come is kept, and the same command continues") from None  # fmt: skip


if __name__ == "__main__":
    run_script(main)
