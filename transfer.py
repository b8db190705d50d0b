"""One file from an HTTP server, however often the connection breaks: PATH.part until it is complete, then PATH."""

import base64
import binascii
import json
import os
import re
import shutil
import socket
import ssl
import sys
import time
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from checksum import hash_file, record, record_of, recorded_hash
from utils import InputError, atomic_write

ATTEMPTS = 6  # in a row that bring nothing new
BACKOFF = 1.0  # seconds before the second attempt; twice as long before each further one
TIMEOUT = 60  # seconds without a byte
CHUNK = 2**20
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


def part_of(path):
    """Where the bytes are that have come so far."""
    return path.with_name(f"{path.name}.part")


def _state_of(path):
    """Where it is noted of which version on the server PATH.part is a part."""
    return path.with_name(f"{path.name}.part.json")


def megabytes(count):
    return f"{count / 1e6:,.1f} MB"


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _read_state(path):
    """The server's description of the file that PATH.part is a part of, {} if nothing sure is known."""
    try:
        state = json.loads(_state_of(path).read_text())
        return state if _size(part_of(path)) <= state["size"] else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _discard(path):
    part_of(path).unlink(missing_ok=True)
    _state_of(path).unlink(missing_ok=True)


def _describe(response):
    """What a response says of the whole file: its size, version and MD5, None where it does not; and where its bytes start."""
    headers = response.headers
    start, size = 0, headers.get("Content-Length")
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        start, size = span.groups() if span else (-1, None)
    # Google's storage names the MD5 of what it stores, which is not what it sends if it unpacks it on the way
    as_stored = headers.get("x-goog-stored-content-encoding", "identity") == "identity"
    md5 = re.search(r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash", []))) if as_stored else None
    try:
        md5 = base64.b64decode(md5[1]).hex() if md5 else None
    except binascii.Error:
        md5 = None
    size = None if size is None else int(size)
    return {"size": size, "etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "md5": md5}, int(start)


def _open(url, headers):
    """The response to a GET request. Raises InputError for an answer or an address that waiting does not make better."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url}: an address begins with http:// or https://")
    try:
        response = urlopen(Request(url, headers={"User-Agent": "ALBEF-Download", **headers}), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code in (*TEMPORARY, 416):
            raise
        raise InputError(f"{url}: the server answers {error.code} {error.reason}: check the address, or name a mirror "
                         "(--url, ALBEF_MIRROR)") from None  # fmt: skip
    except InvalidURL as error:
        raise InputError(f"{url}: no valid address ({error})") from None
    if response.headers.get_content_type() == "text/html" and "Content-Type" in response.headers:
        response.close()
        raise InputError(f"{url}: the server answers with a web page, perhaps to log in on: open the address in a browser")
    return response


def _request(url, path):
    """Asks for what is missing of PATH.part. Returns the response and the server's description of the file.

    PATH.part is continued only if the server says that it still has the version that the part is of, and gives just the
    bytes that were asked for. In every other case it is emptied.
    """
    state, have = _read_state(path), _size(part_of(path))
    etag = state.get("etag")
    version = etag if etag and not etag.startswith("W/") else state.get("modified")  # a weak ETag may be other bytes' too
    if state and version and have:
        try:
            response = _open(url, {"Range": f"bytes={have}-", "If-Range": version})
        except HTTPError as error:
            if error.code != 416:
                raise
        else:
            description, start = _describe(response)
            if response.status == 206 and start == have and description == {**description, **_identity(state)}:
                return response, state
            if response.status == 200:
                return response, _start_again(path, description, response)
            response.close()
    response = _open(url, {})
    description, start = _describe(response)
    if response.status != 200:
        response.close()
        raise HTTPException(f"status {response.status} for a request of the whole file")
    return response, _start_again(path, description, response)


def _identity(state):
    return {key: state[key] for key in ("size", "etag", "modified")}


def _start_again(path, description, response):
    """Empties PATH.part and notes what it will be a part of."""
    try:
        part_of(path).unlink(missing_ok=True)  # before the note changes: never a note for another version's bytes
        if description["size"] is None:
            if not response.chunked:  # then a cut connection looks like the end
                raise InputError(f"{path.name}: the server does not say how large it is: try another mirror (--url)")
            _state_of(path).unlink(missing_ok=True)
        else:
            with atomic_write(_state_of(path), "w") as file:
                json.dump(description, file)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write there ({error.strerror}), name another folder with --to") from None
    return description


def _check_space(path, size):
    free, missing = shutil.disk_usage(path.parent).free, size - _size(part_of(path))
    if free < missing:
        raise InputError(f"{path.parent}: {megabytes(missing)} of {path.name} are to come and {megabytes(free)} are free: make "
                         "room, or name another folder with --to")  # fmt: skip


def _append(file, data, path, size):
    """Writes without a buffer: what is in PATH.part is what has come, whatever ends the process."""
    data = memoryview(data)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise InputError(f"{part_of(path)}: cannot write ({error.strerror}); {megabytes(_size(part_of(path)))} of "
                         f"{megabytes(size)} are kept: make room, and the same command continues") from None  # fmt: skip


def _attempt(url, path):
    """One request: brings PATH.part nearer to completion, or completes it and returns the server's description.

    Raises OSError and HTTPException for what another attempt may overcome.
    """
    state = _read_state(path)
    if state and _size(part_of(path)) == state["size"]:
        return state  # ended between the last byte and the renaming
    response, state = _request(url, path)
    with response:
        size, have = state["size"], _size(part_of(path))
        if size is not None:
            _check_space(path, size)
        # the bar of a log file is a line every now and then
        interval = 0.5 if sys.stderr.isatty() else 30
        with (
            open(part_of(path), "ab", buffering=0) as file,
            tqdm(total=size, initial=have, desc=path.name, unit="B", unit_scale=True, mininterval=interval) as bar,
        ):
            while data := response.read1(CHUNK):
                _append(file, data, path, size or 0)
                bar.update(len(data))
            have = file.tell()
    if size is not None and have > size:
        _discard(path)
        raise HTTPException(f"{have} bytes came of a file of {size}")
    if size is not None and have < size:
        raise ConnectionError(f"the connection closed at {megabytes(have)} of {megabytes(size)}")
    return state


def _reason(error):
    error = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _by_other_means(path):
    return f"check the network and the proxy variables, name a mirror (--url, ALBEF_MIRROR), or fetch {path.name} by other " \
           f"means and put it into {path.parent}/"  # fmt: skip


def _hopeless(error):
    """Whether an error before any answer means that there is no network or no such host."""
    reason = getattr(error, "reason", None)
    return isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError))


def _transfer(url, path):
    """Completes PATH.part, in as many attempts as it takes while they bring something; the server's description of it."""
    failures, most = 0, _size(part_of(path))
    while True:
        try:
            return _attempt(url, path)
        except (OSError, HTTPException) as error:
            have = _size(part_of(path))
            failures = 1 if have > most else failures + 1  # a server that starts again and again brings nothing new
            most = max(most, have)
            if failures == ATTEMPTS or (_hopeless(error) and not have):
                kept = f"; {megabytes(have)} are kept, and the same command continues" if have else ""
                raise InputError(f"{url}: {_reason(error)}: {_by_other_means(path)}{kept}") from None
            wait = BACKOFF * 2 ** (failures - 1)
            print(f"{path.name}: {_reason(error)}; again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def fetch(url, path):
    """Downloads url to path and records its SHA-256 in PATH.sha256. Raises InputError, which keeps PATH.part if it is good.

    A PATH.part of the same version of the file is continued. A PATH.sha256 that is there before the file must fit it. Path
    appears at the end, by renaming, with its record already there.
    """
    expected = recorded_hash(path)  # a broken record had better be known now
    state = _transfer(url, path)
    part = part_of(path)
    with open(part, "rb+") as file:
        os.fsync(file.fileno())  # else a power failure could leave the name without the bytes
    stat, digest = part.stat(), hash_file(part)
    if state["md5"] and hash_file(part, "md5") != state["md5"]:
        _discard(path)
        raise InputError(f"{url}: what came has not the MD5 that the server names, and was removed: run the same command again")
    if expected and digest != expected:
        _discard(path)
        raise InputError(f"{url}: what came has SHA-256 {digest}, not the one in {record_of(path)}, and was removed: try "
                         "again, or remove that record if the server's file has changed for good reason")  # fmt: skip
    record(path, digest, stat)
    os.replace(part, path)
    _state_of(path).unlink(missing_ok=True)


def adopt(url, path):
    """Records the SHA-256 of a file that was got by other means. Raises InputError unless it has the size on the server."""
    accept = f"`sha256sum {path.name} > {record_of(path).name}` in {path.parent}/ accepts it as it is"
    try:
        with _open(url, {}) as response:
            size = _describe(response)[0]["size"]
    except (OSError, HTTPException, InputError) as error:
        raise InputError(f"{path} is there without a record and cannot be compared with the server's "
                         f"({_reason(error)}): {accept}") from None  # fmt: skip
    stat = path.stat()
    if size != stat.st_size:
        raise InputError(f"{path} is there without a record and has {stat.st_size} bytes, the server's {size}: move it away to "
                         f"download it; {accept}")  # fmt: skip
    record(path, hash_file(path), stat)
