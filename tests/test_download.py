"""Download.py against a local server that closes connections, ignores ranges and sends damaged
data.
"""

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

import Download
from models import hashes

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
    """Runs Download.py on the server and tmp_path as a new process would; returns (exit status,
    stdout, stderr).
    """
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "albef_mirror"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(Download, "BACKOFF", 0.001)

    def call(*args, url=True):
        urllib.request.install_opener(None)  # urllib reads the proxies once in a process
        monkeypatch.setattr(hashes, "_verified", {})
        argv = [
            "Download.py",
            "--to",
            str(tmp_path),
            *(["--url", server.url] if url else []),
            *args,
        ]
        monkeypatch.setattr(sys, "argv", argv)
        return exit_status(Download.main), *capsys.readouterr()

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


def test_names_in_any_case_and_mirrors(download, server, tmp_path, monkeypatch):
    out = download("--list")[1]
    assert all(
        f"{name} " in out and file in out and use in out
        for name, (file, _, use) in Download.FILES.items()
    )
    assert Download.released_files(["albef_4m.PTH", "ALBEF_4M"]) == [FILE]
    assert len(Download.released_files(["all"])) == 9
    assert_error(download("albef4m"), "albef4m", "did you mean ALBEF_4M")
    assert_error(download("nothing like it"), "json_pretrain")
    assert_error(download(url=False), "--list")
    for url in (
        "file:///etc",
        "data:,x",
        "/etc",
        "http://[::1",
        "http://a b",
        "http://127.0.0.1:x",
        "http://127.0.0.1/\x1b[2J",
    ):
        result = download("vqa", "--url", url)
        assert_error(result, "/vqa.pth")
        assert "\x1b" not in result[2]
    server.files["vqa.pth"] = b"abc"
    assert download("vqa", "--url", f"{server.url}/a%00b")[0] == 0
    monkeypatch.setenv("ALBEF_MIRROR", "http://nowhere.invalid/ALBEF/")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/ALBEF"))
    assert download("ALBEF_4M", url=False)[0] == 0
    assert (
        server.requests[-1][0] == f"http://nowhere.invalid/ALBEF/{FILE}"
        and (tmp_path / FILE).read_bytes() == CONTENT
    )


def test_cut_connections_are_continued_and_a_complete_file_needs_no_network(
    download, server, tmp_path
):
    server.script = [{"cut": 100_000}, {"cut": 200_000}, {"cut": 200_000}, {"status": 503}]
    status, out, err = download("ALBEF_4M")
    assert status == 0 and "again in" in err and "verified" not in out
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
    server.script = [{"cut": 100_000}] * Download.ATTEMPTS
    assert_error(download("ALBEF_4M"), server.url, "100,000 of 300,000", "same command continues")
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
    assert len(server.script) == 100 - Download.ATTEMPTS


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


def test_a_longer_part_is_not_of_this_file(download, server, tmp_path):
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT + b"x")
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == ["bytes=300001-", None]
    assert_complete(tmp_path)


def test_answers_that_waiting_does_not_help(download, server, tmp_path):
    answers = [
        ({"status": 403}, "403"),
        ({"status": 404, "reason": "\x1b]0;title\x07\x1b[2J"}, "404"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "web page"),
        *(({"headers": {"Content-Length": size}}, "how large") for size in (None, "abc", "-1")),
    ]
    for number, (answer, words) in enumerate(answers, 1):
        server.script = [answer]
        result = download("ALBEF_4M")
        assert_error(result, f"{server.url}/{FILE}", words)
        assert "\x1b" not in result[2] and len(server.requests) == number
    assert [path.name for path in tmp_path.iterdir()] == [f".{FILE}.lock"]
    server.script = [{"status": 503, "reason": "\x1b[2J"}] * Download.ATTEMPTS
    result = download("ALBEF_4M")
    assert_error(result, FILE, "name a mirror")
    assert "\x1b" not in result[2] and result[2].count("again in") == Download.ATTEMPTS - 1


def test_a_full_disk_and_a_folder_that_cannot_be_written_to(download, server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # stands for the disk: writing fails in the middle
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))
    try:
        result = download("ALBEF_4M")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_error(result, str(tmp_path), "File too large", "make room", "same command continues")
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == [None, "bytes=123456-"]
    assert_complete(tmp_path)
    assert_error(
        download("ALBEF_4M", "--to", f"{tmp_path}/{FILE}"),
        FILE,
        "name a folder to write to with --to",
    )


def test_a_silent_server_is_asked_again(download, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Download, "TIMEOUT", 0.3)
    server.script = [{"hold": 100_000}]
    status, _, err = download("ALBEF_4M")
    assert status == 0 and "timed out; again" in err and server.ranges() == [None, "bytes=100000-"]
    assert_complete(tmp_path)


def start(server, folder):
    argv = [
        sys.executable,
        str(ROOT / "Download.py"),
        "ALBEF_4M",
        "--to",
        str(folder),
        "--url",
        server.url,
    ]
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


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
    assert_error(download("ALBEF_4M"), FILE, record.name, "move it away")
    assert path.read_bytes() == OTHER and len(server.requests) == 1
    path.unlink()
    server.files[FILE] = OTHER
    assert_error(download("ALBEF_4M"), FILE, record.name)
    record.write_text("no hash\n")
    assert_error(download("ALBEF_4M"), record.name, "no SHA-256")
    record.unlink()
    status, out, _ = download("ALBEF_4M")  # Download.py did not write this file
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
    data = tmp_path / "data"
    assert download(name, "--no_unpack")[0] == 0 and not data.exists()
    (data / "refcoco+").mkdir(parents=True)
    (data / "refcoco+/dets.json").write_text("mine")
    status, out, _ = download(name)
    assert status == 0 and "1 files unpacked" in out and "1 existing ones kept" in out
    assert (data / "refcoco+/dets.json").read_text() == "mine" and (
        data / "a.json"
    ).read_text() == "[1]"
    assert not (tmp_path / f"{name}.unpacking").exists()


def test_an_archive_that_the_disk_cannot_hold_is_refused_before_it_is_unpacked(
    download, tmp_path, archive, monkeypatch
):
    name, offer = archive
    offer({**GOOD, "data/bomb.json": bytes(20_000_000)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    unpacked = []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: unpacked.append(1))
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *_, **__: unpacked.append(1))
    assert_error(download(name), name, "20,000,005", "20,000,000", "--no_unpack")
    assert (
        not unpacked
        and not (tmp_path / "data").exists()
        and (tmp_path / name).stat().st_size < 100_000
    )


def test_archives_that_are_broken_or_hold_more_than_files_are_refused_whole(
    download, server, tmp_path, archive
):
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
        assert_error(
            download(name), name, "not a whole archive, or not one to trust", "download it again"
        )
        assert {path.name for path in tmp_path.iterdir()} == {
            name,
            f"{name}.sha256",
            f".{name}.lock",
        }
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.sha256").unlink()


def test_no_archive_writes_outside_the_folder(download, server, tmp_path, archive):
    name, offer = archive
    for member in ("../x", "data/../../x", f"{tmp_path}/../x"):
        offer({**GOOD, member: b"bad"})
        download(name, "--to", str(tmp_path / "to"))
        assert not (tmp_path / "x").exists() and not (tmp_path / "../x").exists()
        shutil.rmtree(tmp_path / "to")


def test_a_folder_of_the_user_may_be_a_link(download, tmp_path, tmp_path_factory, archive):
    name, offer = archive
    offer(GOOD)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tmp_path / "data").symlink_to(elsewhere)
    assert download(name)[0] == 0 and (elsewhere / "a.json").read_text() == "[1]"
