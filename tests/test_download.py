"""tools.download on a server that closes connections, ignores ranges and sends damaged data."""

import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, exit_status

from models import hashes
from tools import download as tool

CONTENT, OTHER = (random.Random(seed).randbytes(300_000) for seed in (0, 1))
FILE = "ALBEF_4M.pth"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.script holds what is different in the coming requests, one dict
    each.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, how = self.server, self.server.script.pop(0) if self.server.script else {}
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        body = server.files.get(self.path.rpartition("/")[2], b"")
        headers = {"Content-Type": "application/octet-stream"}
        status, start, size = 200 if body else 404, 0, len(body)
        if asked and not how.get("ignore_range"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < size else 416
            headers["Content-Range"] = (
                f"bytes {start}-{size - 1}/{size}" if start < size else f"bytes */{size}"
            )
        self.close_connection = True
        self.send_response(how.get("status", status), how.get("reason"))
        for name, value in {
            **headers,
            "Content-Length": str(size - start),
            **how.get("headers", {}),
        }.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        body = body[start : how.get("cut", size)]
        held = how.get("hold", len(body))  # so many bytes, the rest when the test says so
        with contextlib.suppress(OSError):  # a client that was killed
            self.wfile.write(body[:held])
            self.wfile.flush()
            if held < len(body) and server.gate.wait(30):
                self.wfile.write(body[held:])


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.script, server.requests, server.gate = (
        {FILE: CONTENT},
        [],
        [],
        threading.Event(),
    )
    server.url = f"http://127.0.0.1:{server.server_port}/ALBEF"
    server.ranges = lambda: [asked for _, asked in server.requests]
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(server, tmp_path, monkeypatch, capsys):
    """Runs the tool on the server and tmp_path as a new process would.

    Returns (exit status, stdout, stderr).
    """
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(tool, "BACKOFF", 0.001)

    def call(*args):
        urllib.request.install_opener(None)  # urllib reads the proxies once in a process
        monkeypatch.setattr(hashes, "_verified", {})
        flags = ["--output", str(tmp_path), "--mirror", server.url]
        monkeypatch.setattr(sys, "argv", ["download", *flags, *args])
        return exit_status(tool.main), *capsys.readouterr()

    return call


def assert_complete(folder, content=CONTENT, file=FILE):
    """The file is whole, recorded, and nothing else is left."""
    assert (folder / file).read_bytes() == content
    assert (
        folder / f"{file}.sha256"
    ).read_text() == f"{hashlib.sha256(content).hexdigest()}  {file}\n"
    assert {path.name for path in folder.iterdir()} == {file, f"{file}.sha256", f".{file}.lock"}


def assert_error(result, *parts):
    """One line with all parts, exit status 2; progress bars and retries may stand before it."""
    status, _, err = result
    last = err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert status == 2 and last.startswith("error: ") and all(part in last for part in parts), err


def test_names_mirrors_and_proxies(download, server, tmp_path, monkeypatch):
    assert_error(download("albef4m"), "albef4m", "ALBEF_4M", "json_pretrain")
    for url in ("file:///etc", "data:,x", "/etc", "http://[::1", "http://a b", "http://\x1b[2J"):
        result = download("vqa", "--mirror", url)
        assert_error(result, "http://")
        assert "\x1b" not in result[2]
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/ALBEF"))
    assert download("ALBEF_4M", "--mirror", "http://nowhere.invalid/ALBEF/")[0] == 0
    assert server.requests[-1][0] == f"http://nowhere.invalid/ALBEF/{FILE}"
    assert (tmp_path / FILE).read_bytes() == CONTENT
    server.files = {file: b"abc" for file, _ in tool.FILES.values()}
    (tmp_path / FILE).unlink()
    (tmp_path / f"{FILE}.sha256").unlink()
    assert download("all", "--no_unpack")[0] == 0
    assert all((tmp_path / file).exists() for file in server.files)


def test_cut_connections_are_continued_and_a_complete_file_needs_no_network(
    download, server, tmp_path
):
    server.script = [{"cut": 100_000}, {"cut": 200_000}, {"cut": 200_000}, {"status": 503}]
    status, out, err = download("ALBEF_4M")
    assert status == 0 and "retry in" in err and "verified" not in out
    assert server.ranges() == [
        None,
        "bytes=100000-",
        "bytes=200000-",
        "bytes=200000-",
        "bytes=200000-",
    ]
    assert_complete(tmp_path)
    status, out, _ = download("ALBEF_4M")
    assert status == 0 and "SHA-256 verified" in out and len(server.requests) == 5


def test_gives_up_and_continues_later(download, server, tmp_path):
    server.script = [{"cut": 100_000}] * tool.ATTEMPTS
    assert_error(download("ALBEF_4M"), server.url, "100,000 of 300,000")
    assert (tmp_path / f"{FILE}.part").stat().st_size == 100_000 and not (tmp_path / FILE).exists()
    server.requests.clear()
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == ["bytes=100000-"]
    assert_complete(tmp_path)
    (tmp_path / FILE).unlink()
    # what brings something does not count as a failure
    server.script = [{"cut": 10_000 * i} for i in range(1, 25)]
    assert download("ALBEF_4M")[0] == 0
    (tmp_path / FILE).unlink()
    server.script = [{"cut": 50_000 * (2 - i % 2), "ignore_range": True} for i in range(100)]
    assert_error(download("ALBEF_4M"), "closed at")  # to start again and again brings nothing
    assert len(server.script) == 100 - tool.ATTEMPTS


@pytest.mark.parametrize(
    "second,ranges",
    [
        (
            {"headers": {"Content-Range": "bytes 0-199999/300000"}},
            [None, "bytes=100000-", "bytes=100000-"],
        ),
        ({"headers": {"Content-Range": None}}, [None, "bytes=100000-", "bytes=100000-"]),
        ({"ignore_range": True}, [None, "bytes=100000-"]),
        ({"status": 416}, [None, "bytes=100000-", None]),
    ],
)
def test_only_the_missing_bytes_are_continued(download, server, tmp_path, second, ranges):
    server.script = [{"cut": 100_000}, second]
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == ranges
    assert_complete(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 403},
        {"status": 404, "reason": "\x1b]0;title\x07\x1b[2J"},
        {"headers": {"Content-Type": "text/html; charset=utf-8"}},
        {"headers": {"Content-Length": None}},
        {"headers": {"Content-Length": "abc"}},
    ],
)
def test_answers_that_waiting_does_not_help(download, server, tmp_path, answer):
    server.script = [answer]
    result = download("ALBEF_4M")
    assert_error(result, f"{server.url}/{FILE}", "--mirror")
    assert "\x1b" not in result[2] and len(server.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f".{FILE}.lock"]


def test_an_unavailable_server_is_tried_a_few_times(download, server):
    server.script = [{"status": 503, "reason": "\x1b[2J"}] * tool.ATTEMPTS
    result = download("ALBEF_4M")
    assert_error(result, FILE, "--mirror")
    assert "\x1b" not in result[2] and result[2].count("retry in") == tool.ATTEMPTS - 1


def test_a_full_disk_and_a_folder_that_cannot_be_written_to(download, server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # stands for the disk: writing fails in the middle
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))
    try:
        result = download("ALBEF_4M")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_error(result, str(tmp_path), "File too large", "--output")
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == [None, "bytes=123456-"]
    assert_complete(tmp_path)
    assert_error(download("ALBEF_4M", "--output", f"{tmp_path}/{FILE}"), FILE, "--output")


def test_a_silent_server_is_asked_again(download, server, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TIMEOUT", 0.3)
    server.script = [{"hold": 100_000}]
    status, _, err = download("ALBEF_4M")
    assert (
        status == 0
        and "timed out" in err
        and "retry" in err
        and server.ranges() == [None, "bytes=100000-"]
    )
    assert_complete(tmp_path)


def start(server, folder):
    command = [sys.executable, "-m", "tools.download", "ALBEF_4M", "--mirror", server.url]
    return subprocess.Popen([*command, "--output", folder], cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_30_percent_then_two_at_once(server, tmp_path, signum):
    part = tmp_path / f"{FILE}.part"
    server.script = [{"hold": 90_000}]
    killed = start(server, tmp_path)
    wait_for(lambda: part.exists() and part.stat().st_size == 90_000)
    killed.send_signal(signum)
    killed.communicate()
    assert killed.returncode in (-signum, 128 + signum)
    server.script = [{"hold": 30_000}]
    both = [start(server, tmp_path) for _ in range(2)]
    # while the server blocks one download, the other waits
    wait_for(lambda: part.stat().st_size == 120_000)
    assert not (tmp_path / FILE).exists()
    server.gate.set()
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert server.ranges() == [None, "bytes=90000-"]
    assert_complete(tmp_path)


def test_a_file_must_fit_its_record(download, server, tmp_path, monkeypatch):
    download("ALBEF_4M")
    path, record, hashed = tmp_path / FILE, tmp_path / f"{FILE}.sha256", []
    monkeypatch.setattr(
        hashes, "hash_file", lambda path, f=hashes.hash_file: (hashed.append(path), f(path))[1]
    )
    monkeypatch.setattr(hashes, "_verified", {})
    # once per process, or change
    assert hashes.verify_hash(path) and hashes.verify_hash(path) and len(hashed) == 1
    os.utime(path, ns=(1, 1))
    assert hashes.verify_hash(path) and hashes.verify_hash(path) and len(hashed) == 2
    path.write_bytes(OTHER)
    assert_error(download("ALBEF_4M"), FILE, record.name)
    assert path.read_bytes() == OTHER and len(server.requests) == 1
    path.unlink()
    server.files[FILE] = OTHER
    assert_error(download("ALBEF_4M"), FILE, record.name)
    record.write_text("no hash\n")
    assert_error(download("ALBEF_4M"), record.name, "no SHA-256")
    record.unlink()
    status, out, _ = download("ALBEF_4M")  # from elsewhere
    assert (
        status == 0 and "verified" not in out and not record.exists() and path.read_bytes() == OTHER
    )
    record.write_text(f"{hashlib.sha256(OTHER).hexdigest()} *{FILE}\n")  # another form of sha256sum
    status, out, _ = download("ALBEF_4M")
    assert status == 0 and "verified" in out


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members, kind=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = (
                len(content),
                tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE,
            )
            if name == "data/x":
                info.type, info.linkname = kind, "a.json"
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = {"data/": b"", "data/a.json": b"[1]", "data/refcoco+/dets.json": b"{}"}


@pytest.fixture(params=[("data.tar.gz", make_tar), ("json_pretrain.zip", make_zip)])
def archive(request, server):
    """(name, function that puts an archive with the given members on the server)"""
    name, make = request.param
    return name, lambda members: server.files.update({name: make(members)})


def test_archives_are_unpacked_and_nothing_is_overwritten(download, tmp_path, archive):
    name, offer = archive
    offer(GOOD)
    data, release = tmp_path / "data", name.partition(".")[0]
    assert download(release, "--no_unpack")[0] == 0 and not data.exists()
    (data / "refcoco+").mkdir(parents=True)
    (data / "refcoco+/dets.json").write_text("mine")
    status, out, _ = download(release)
    assert status == 0 and f"{data}/refcoco+/dets.json: kept" in out
    assert (data / "refcoco+/dets.json").read_text() == "mine"
    assert (data / "a.json").read_text() == "[1]"
    assert not (tmp_path / f"{name}.unpacking").exists()


def test_damaged_and_unsafe_archives_are_refused_whole(download, server, tmp_path, archive):
    name, offer = archive
    offer({**GOOD, "data/b.json": CONTENT})
    contents = [server.files[name][:-150_000], b"not an archive"]
    if name == "data.tar.gz":
        contents += [make_tar({**GOOD, "../x": b"bad"})]
        contents += [
            make_tar({**GOOD, "data/x": b""}, kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE)
        ]
    for content in contents:
        server.files[name] = content
        assert_error(download(name.partition(".")[0]), name, "download it again")
        left = {name, f"{name}.sha256", f".{name}.lock"}
        assert {path.name for path in tmp_path.iterdir()} == left
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.sha256").unlink()


def test_no_archive_writes_outside_the_folder(download, server, tmp_path, archive):
    name, offer = archive
    for member in ("../x", "data/../../x", f"{tmp_path}/../x"):
        offer({**GOOD, member: b"bad"})
        download(name.partition(".")[0], "--output", str(tmp_path / "to"))
        assert not (tmp_path / "x").exists() and not (tmp_path / "../x").exists()
        shutil.rmtree(tmp_path / "to")


def test_a_folder_of_the_user_may_be_a_link(download, tmp_path, tmp_path_factory, archive):
    name, offer = archive
    offer(GOOD)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tmp_path / "data").symlink_to(elsewhere)
    assert download(name.partition(".")[0])[0] == 0 and (elsewhere / "a.json").read_text() == "[1]"
