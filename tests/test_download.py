"""Download.py against a local server that cuts connections, ignores ranges, serves other versions and worse."""

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

import Download
import utils
from conftest import ROOT, exit_status

CONTENT, OTHER = (random.Random(seed).randbytes(300_000) for seed in (0, 1))
FILE = "ALBEF_4M.pth"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.script holds what is different in the coming requests, one dict each."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, how = self.server, self.server.script.pop(0) if self.server.script else {}
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        body = server.files.get(self.path.rpartition("/")[2], b"")
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"', "Content-Type": "application/octet-stream"}
        status, start, size = 200 if body else 404, 0, len(body)
        if asked and (self.headers["If-Range"] in {**headers, **how.get("headers", {})}.values() or how.get("ignore_if_range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < size else 416
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}" if start < size else f"bytes */{size}"
        self.close_connection = True
        self.send_response(how.get("status", status))
        for name, value in {**headers, "Content-Length": str(size - start), **how.get("headers", {})}.items():
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
    server.files, server.script, server.requests, server.gate = {FILE: CONTENT}, [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/ALBEF"
    server.ranges = lambda: [asked for _, asked in server.requests]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(server, tmp_path, monkeypatch, capsys):
    """Runs Download.py on the server and tmp_path as a new process would; returns (exit status, stdout, stderr)."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "albef_mirror"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(Download, "BACKOFF", 0.001)

    def call(*args, url=True):
        urllib.request.install_opener(None)  # urllib reads the proxies once in a process
        monkeypatch.setattr(utils, "_verified", {})
        argv = ["Download.py", "--to", str(tmp_path), *(["--url", server.url] if url else []), *args]
        monkeypatch.setattr(sys, "argv", argv)
        return exit_status(Download.main), *capsys.readouterr()

    return call


def assert_complete(folder, content=CONTENT, file=FILE):
    """The file is whole, recorded, and nothing else is left."""
    assert (folder / file).read_bytes() == content
    assert (folder / f"{file}.sha256").read_text() == f"{hashlib.sha256(content).hexdigest()}  {file}\n"
    assert {path.name for path in folder.iterdir()} == {file, f"{file}.sha256", f".{file}.lock"}


def assert_error(result, *parts):
    """One line with all parts, exit status 2; progress bars and retries may stand before it."""
    status, _, err = result
    last = err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert status == 2 and last.startswith("error: ") and all(part in last for part in parts), err


def test_names_in_any_case_and_mirrors(download, server, tmp_path, monkeypatch):
    out = download("--list")[1]
    assert all(f"{name} " in out and file in out and use in out for name, (file, _, use) in Download.FILES.items())
    assert Download.wanted_files(["albef_4m.PTH", "ALBEF_4M"], None) == {FILE: Download.RELEASED + FILE}
    assert len(Download.wanted_files(["all"], None)) == 9
    assert_error(download("albef4m"), "albef4m", "did you mean ALBEF_4M")
    assert_error(download("nothing like it"), "json_pretrain")
    assert_error(download(url=False), "--list")
    assert_error(download("vqa", "--url", "file:///etc"), "file:///etc/vqa.pth", "http://")
    assert_error(download("--url", "http://b/.."), "complete address")
    assert Download.wanted_files(["vqa"], "http://b/c") == {"vqa.pth": "http://b/c/vqa.pth"}
    assert Download.wanted_files(["vqa"], "http://b/c/vqa.pth?key=1") == {"vqa.pth": "http://b/c/vqa.pth?key=1"}
    assert Download.wanted_files([], "http://b/c/other%20one.pth") == {"other one.pth": "http://b/c/other%20one.pth"}
    monkeypatch.setenv("ALBEF_MIRROR", "http://nowhere.invalid/ALBEF/")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/ALBEF"))
    assert download("ALBEF_4M", url=False)[0] == 0
    assert server.requests[0][0] == f"http://nowhere.invalid/ALBEF/{FILE}" and (tmp_path / FILE).read_bytes() == CONTENT


def test_cut_connections_are_continued_and_a_complete_file_needs_no_network(download, server, tmp_path):
    server.script = [{"cut": 100_000}, {"cut": 200_000}, {"cut": 200_000}, {"status": 503}]
    status, out, err = download("ALBEF_4M")
    assert status == 0 and "again in" in err and "100%" in err and "SHA-256 verified" in out
    assert server.ranges() == [None, "bytes=100000-", "bytes=200000-", "bytes=200000-", "bytes=200000-"]
    assert_complete(tmp_path)
    assert download("ALBEF_4M")[0] == 0 and len(server.requests) == 5


def test_gives_up_and_continues_later_unless_the_file_has_changed(download, server, tmp_path):
    for content, ranges in ((CONTENT, ["bytes=100000-"]), (OTHER, ["bytes=100000-"])):
        server.files[FILE], server.script = CONTENT, [{"cut": 100_000}] * Download.ATTEMPTS
        assert_error(download("ALBEF_4M"), server.url, "100,000 of 300,000", "same command continues", "by other means")
        assert (tmp_path / f"{FILE}.part").stat().st_size == 100_000 and not (tmp_path / FILE).exists()
        server.files[FILE] = content
        server.requests.clear()
        assert download("ALBEF_4M")[0] == 0 and server.ranges() == ranges
        assert_complete(tmp_path, content)
        for path in tmp_path.iterdir():
            path.unlink()
    server.script = [{"cut": 10_000 * i} for i in range(1, 25)]  # what brings something does not count as a failure
    assert download("ALBEF_4M")[0] == 0
    (tmp_path / FILE).unlink()
    server.script = [{"cut": 50_000 * (2 - i % 2), "headers": {"ETag": None}} for i in range(100)]
    assert_error(download("ALBEF_4M"), "closed at")  # to start again and again brings nothing
    assert len(server.script) == 100 - Download.ATTEMPTS


DATE = {"ETag": None, "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}


@pytest.mark.parametrize("first,second,ranges", [
    ({}, {"headers": {"Content-Range": "bytes 0-199999/300000"}}, [None, "bytes=100000-", None]),
    ({}, {"headers": {"Content-Range": "bytes 100000-299999/*"}}, [None, "bytes=100000-", None]),
    ({}, {"headers": {"ETag": '"other"'}, "ignore_if_range": True}, [None, "bytes=100000-", None]),
    ({"headers": {"ETag": None}}, {}, [None, None]),
    ({"headers": {"ETag": 'W/"weak"'}}, {}, [None, None]),
    ({"headers": DATE}, {"headers": DATE}, [None, "bytes=100000-"]),
])  # fmt: skip
def test_only_bytes_of_the_same_version_are_continued(download, server, tmp_path, first, second, ranges):
    server.script = [{"cut": 100_000, **first}, second]
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == ranges
    assert_complete(tmp_path)


def test_killed_before_a_whole_part_got_its_name(download, server, tmp_path):
    (tmp_path / f"{FILE}.part").write_bytes(CONTENT)
    (tmp_path / f"{FILE}.part.version").write_text(f'"{hashlib.md5(CONTENT).hexdigest()}"')
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == ["bytes=300000-"]
    assert_complete(tmp_path)


def test_answers_that_waiting_does_not_help(download, server, tmp_path):
    server.script = [{"status": 403}, {"status": 404}, {"headers": {"Content-Type": "text/html; charset=utf-8"}},
                     {"headers": {"Content-Length": None}}]  # fmt: skip
    for parts in (("403", "--url"), ("404", "--url"), ("web page",), ("does not say how large",)):
        assert_error(download("ALBEF_4M"), f"{server.url}/{FILE}", *parts)
    assert_error(download("--url", "http://[::1/ALBEF.pth"), "http://[::1/ALBEF.pth: not a valid address (Invalid IPv6 URL)")
    assert len(server.requests) == 4 and [path.name for path in tmp_path.iterdir()] == [f".{FILE}.lock"]
    for url, attempts in (("http://nowhere.invalid/ALBEF", 1), ("http://127.0.0.1:9", Download.ATTEMPTS)):
        result = download("vqa", "--url", url)
        assert_error(result, f"{url}/vqa.pth", "name a mirror", f"put it into {tmp_path}/")
        assert result[2].count("again in") == attempts - 1


def test_a_full_disk_and_a_folder_that_cannot_be_written_to(download, server, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))  # stands for the disk: writing fails in the middle
    try:
        result = download("ALBEF_4M")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_error(result, str(tmp_path), "File too large", "make room", "same command continues")
    assert download("ALBEF_4M")[0] == 0 and server.ranges() == [None, "bytes=123456-"]
    assert_complete(tmp_path)
    assert_error(download("ALBEF_4M", "--to", f"{tmp_path}/{FILE}"), FILE, "name a folder to write to with --to")


def test_a_silent_server_is_asked_again(download, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Download, "TIMEOUT", 0.3)
    server.script = [{"hold": 100_000}]
    status, _, err = download("ALBEF_4M")
    assert status == 0 and "timed out; again" in err and server.ranges() == [None, "bytes=100000-"]
    assert_complete(tmp_path)


def start(server, folder):
    argv = [sys.executable, str(ROOT / "Download.py"), "ALBEF_4M", "--to", str(folder), "--url", server.url]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


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
    err = killed.communicate()[1]
    assert killed.returncode == -signum or (killed.returncode == 128 + signum and "the same command continues there" in err)
    server.script = [{"hold": 30_000}]
    both, waiting = [start(server, tmp_path) for _ in range(2)], []
    for process in both:
        threading.Thread(target=lambda process=process: waiting.append(process.stdout.readline()), daemon=True).start()
    wait_for(lambda: waiting and part.stat().st_size == 120_000)  # one says that it waits, while the server holds the other
    assert "another process is downloading it, waiting" in waiting[0] and not (tmp_path / FILE).exists()
    server.gate.set()
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    assert server.ranges() == [None, "bytes=90000-"]
    assert_complete(tmp_path)


def test_a_file_must_fit_its_record(download, server, tmp_path, monkeypatch):
    download("ALBEF_4M")
    path, record, hashed = tmp_path / FILE, tmp_path / f"{FILE}.sha256", []
    monkeypatch.setattr(utils, "hash_file", lambda path, f=utils.hash_file: (hashed.append(path), f(path))[1])
    monkeypatch.setattr(utils, "_verified", {})
    assert utils.verify_hash(path) and utils.verify_hash(path) and len(hashed) == 1  # once per process, or change
    os.utime(path, ns=(1, 1))
    assert utils.verify_hash(path) and utils.verify_hash(path) and len(hashed) == 2
    path.write_bytes(OTHER)
    assert_error(download("ALBEF_4M"), FILE, record.name, "move it away")
    assert path.read_bytes() == OTHER and len(server.requests) == 1
    path.unlink()
    server.files[FILE] = OTHER
    assert_error(download("ALBEF_4M"), hashlib.sha256(OTHER).hexdigest(), record.name, "removed")
    assert not path.exists() and not (tmp_path / f"{FILE}.part").exists()
    record.write_text("no hash\n")
    assert_error(download("ALBEF_4M"), record.name, "no SHA-256")
    record.unlink()
    path.write_bytes(CONTENT)  # it came by other means
    assert_error(download("ALBEF_4M"), "without", "move it away", f"sha256sum {FILE} > {record.name}")
    record.write_text(f"{hashlib.sha256(CONTENT).hexdigest()} *{FILE}\n")  # as sha256sum may write it
    assert download("ALBEF_4M")[0] == 0


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
            info.size, info.type = len(content), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
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
    assert_error(download(name), "data/refcoco+/dets.json", "differs", "--to", "--no_unpack")
    assert (data / "refcoco+/dets.json").read_text() == "mine" and not (data / "a.json").exists()
    (data / "refcoco+/dets.json").write_text("{}")  # an equal one, as after an unpacking that was killed
    status, out, _ = download(name)
    assert status == 0 and "2 files unpacked" in out and (data / "a.json").read_text() == "[1]"
    (data / "a.json").write_text("[2]")  # the user's own change
    assert "stay as they are" in download(name)[1] and (data / "a.json").read_text() == "[2]"
    assert not (tmp_path / f"{name}.unpacking").exists()


def test_archives_that_are_broken_or_hold_more_than_files_are_refused_whole(download, server, tmp_path, archive):
    name, offer = archive
    offer({**GOOD, "data/b.json": CONTENT})
    contents = [server.files[name][:-150_000], b"not an archive"]
    if name == "data.tar.gz":
        contents += [make_tar({**GOOD, "../x": b"bad"})]
        contents += [make_tar({**GOOD, "data/x": b""}, kind) for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE)]
    for content in contents:
        server.files[name] = content
        assert_error(download(name), name, "not a whole archive, or not one to trust", "download it again")
        assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.sha256", f".{name}.lock"}
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
