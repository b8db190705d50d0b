"""Download.py against a local server that cuts connections, ignores ranges, serves other versions and worse."""

import base64
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

import archives
import checksum
import Download
import transfer
from conftest import ROOT, exit_status
from utils import InputError

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
FILE = "ALBEF_4M.pth"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.script holds what goes wrong in the coming requests, one dict each."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        how = server.script.pop(0) if server.script else {}
        body = server.files.get(self.path.rpartition("/")[2])
        status = how.get("status") or (200 if body is not None else 404)
        body = body or b""
        etag = how.get("etag", f'"{hashlib.md5(body).hexdigest()}"')
        start, asked = 0, self.headers.get("Range")
        same = how.get("ignore_if_range") or self.headers.get("If-Range") in (None, etag, how.get("modified"))
        if asked and same and status == 200 and not how.get("ignore_range"):
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        self.close_connection = True
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", how.get("content_range", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        if etag:
            self.send_header("ETag", etag)
        for name, value in how.get("headers", {}).items():
            self.send_header(name, value)
        if how.get("modified"):
            self.send_header("Last-Modified", how["modified"])
        self.send_header("Content-Type", how.get("type", "application/octet-stream"))
        if how.get("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
        elif not how.get("no_length"):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start : how.get("cut", len(body))]
        if how.get("chunked"):
            body = b"%x\r\n%s\r\n" % (len(body), body) + (b"" if "cut" in how else b"0\r\n\r\n")
        held = how.get("hold", len(body))  # so many bytes, the rest when the test says so
        self.wfile.write(body[:held])
        self.wfile.flush()
        if held < len(body):
            server.gate.wait(30)
            try:
                self.wfile.write(body[held:])
            except OSError:
                pass  # this client was killed


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.script, server.requests, server.gate = {FILE: CONTENT}, [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/ALBEF"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def plain_network(monkeypatch):
    """No variable of the machine that tests run on, and no long waits."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("ALBEF_MIRROR", raising=False)
    urllib.request.install_opener(None)  # urllib reads the proxies once in a process
    monkeypatch.setattr(transfer, "BACKOFF", 0.001)


@pytest.fixture
def download(server, tmp_path, monkeypatch, capsys):
    """Runs Download.py on the server and tmp_path; returns (exit status, stdout, stderr)."""

    def call(*args, url=True):
        argv = ["Download.py", "--to", str(tmp_path), *(["--url", server.url] if url else []), *args]
        monkeypatch.setattr(sys, "argv", argv)
        return exit_status(Download.main), *capsys.readouterr()

    return call


def ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


def assert_complete(folder, content=CONTENT, file=FILE):
    """The file is whole, recorded, and nothing else is left."""
    assert (folder / file).read_bytes() == content
    assert (folder / f"{file}.sha256").read_text().split()[:2] == [hashlib.sha256(content).hexdigest(), file]
    assert {path.name for path in folder.iterdir()} == {file, f"{file}.sha256", f".{file}.lock"}


def assert_error(result, *parts):
    """One line with all parts, exit status 2; progress bars and retries may stand before it."""
    status, _, err = result
    assert status == 2 and "Traceback" not in err
    last = err.replace("\r", "\n").rstrip("\n").rpartition("\n")[2]
    assert last.startswith("error: ") and all(part in last for part in parts), last


# ---------------------------------------------------------------------------------------------------------------------
# names and addresses


def test_list(download):
    status, out, _ = download("--list")
    assert status == 0
    for name, entry in Download.FILES.items():
        assert any(line.split()[:2] == [name, entry.file] and entry.use in line for line in out.splitlines())
    files = {entry.file for entry in Download.FILES.values()}
    assert files == {"ALBEF.pth", "ALBEF_4M.pth", "pretrain_model_nlvr.pth", "mscoco.pth", "flickr30k.pth", "vqa.pth",
                     "refcoco.pth", "data.tar.gz", "json_pretrain.zip"}  # fmt: skip


@pytest.mark.parametrize("name", ["ALBEF_4M", "albef_4m", "albef_4m.PTH", "ALBEF_4M.pth"])
def test_name_in_any_case(name):
    assert Download.wanted_files([name], None) == {FILE: Download.RELEASED + FILE}


def test_all_names():
    assert len(Download.wanted_files(["all"], None)) == 9


def test_unknown_name(download):
    assert_error(download("albef4m"), "albef4m", "did you mean ALBEF_4M?")
    assert_error(download("nothing like it"), "json_pretrain")
    assert_error(download(url=False), "--list")


def test_mirrors(monkeypatch):
    monkeypatch.setenv("ALBEF_MIRROR", "http://mirror/a/")
    assert Download.wanted_files(["vqa"], None) == {"vqa.pth": "http://mirror/a/vqa.pth"}
    assert Download.wanted_files(["vqa"], "http://b/c") == {"vqa.pth": "http://b/c/vqa.pth"}
    assert Download.wanted_files(["vqa"], "http://b/c/vqa.pth?key=1") == {"vqa.pth": "http://b/c/vqa.pth?key=1"}
    assert Download.wanted_files([], "http://b/c/other%20one.pth") == {"other one.pth": "http://b/c/other%20one.pth"}
    with pytest.raises(InputError, match="complete address"):
        Download.wanted_files([], "http://b/..")


def test_other_file_by_its_address(download, server, tmp_path):
    server.files["other.pth"] = OTHER
    assert download("--url", f"{server.url}/other.pth")[0] == 0
    assert_complete(tmp_path, OTHER, "other.pth")


def test_mirror_and_proxy_variables(download, server, tmp_path, monkeypatch):
    monkeypatch.setenv("ALBEF_MIRROR", "http://nowhere.invalid/ALBEF")
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/ALBEF"))
    assert download("ALBEF_4M", url=False)[0] == 0
    assert server.requests[0][0] == f"http://nowhere.invalid/ALBEF/{FILE}"
    assert_complete(tmp_path)


def test_other_schemes_are_refused(download):
    assert_error(download("vqa", "--url", "file:///etc"), "file:///etc/vqa.pth", "http://")


# ---------------------------------------------------------------------------------------------------------------------
# transfers


def test_download_and_second_call(download, server, tmp_path):
    status, out, err = download("ALBEF_4M")
    assert status == 0 and "100%" in err and "SHA-256 verified" in out
    assert_complete(tmp_path)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", f"{FILE}.sha256"], cwd=tmp_path, check=True, capture_output=True)
    assert download("ALBEF_4M")[0] == 0
    assert len(server.requests) == 1  # the second call needs no network


def test_cut_connections_are_continued(download, server, tmp_path):
    server.script = [{"cut": 100_000}, {"cut": 200_000}, {"cut": 200_000}, {"status": 503}]
    status, _, err = download("ALBEF_4M")
    assert status == 0 and "again in" in err
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-", "bytes=200000-", "bytes=200000-"]
    version = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert [headers.get("If-Range") for _, headers in server.requests] == [None, *[version] * 4]
    assert_complete(tmp_path)


def test_gives_up_and_continues_later(download, server, tmp_path):
    server.script = [{"cut": 100_000}] * transfer.ATTEMPTS
    assert_error(download("ALBEF_4M"), server.url, "closed at 0.1 MB of 0.3 MB", "same command continues", "by other means")
    assert (tmp_path / f"{FILE}.part").stat().st_size == 100_000 and not (tmp_path / FILE).exists()
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server)[-1] == "bytes=100000-"
    assert_complete(tmp_path)


def test_progress_renews_the_attempts(download, server, tmp_path):
    server.script = [{"cut": 10_000 * i} for i in range(1, 25)]
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path)


def test_server_that_ignores_ranges(download, server, tmp_path):
    server.script = [{"cut": 100_000}, {"ignore_range": True}]
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path)
    # and if it cuts too, it does not get the better of us by starting again and again
    (tmp_path / FILE).unlink()
    server.script = [{"cut": 100_000, "ignore_range": True}] * 100
    assert_error(download("ALBEF_4M"), "closed at")
    assert len(server.script) == 100 - transfer.ATTEMPTS


@pytest.mark.parametrize("content_range", ["bytes 0-199999/300000", "bytes 100000-299999/300001", "bytes 100000-299999/*", "x"])
def test_wrong_content_range_starts_again(download, server, tmp_path, content_range):
    server.script = [{"cut": 100_000}, {"content_range": content_range}]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, "bytes=100000-", None]
    assert_complete(tmp_path)


def test_changed_file_is_not_glued(download, server, tmp_path):
    server.script = [{"cut": 100_000}] * transfer.ATTEMPTS
    download("ALBEF_4M")
    server.files[FILE] = OTHER
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path, OTHER)


def test_changed_file_of_a_server_that_ignores_if_range(download, server, tmp_path):
    server.script = [{"cut": 100_000}] * transfer.ATTEMPTS
    download("ALBEF_4M")
    server.files[FILE], server.script = OTHER, [{"ignore_if_range": True}]
    server.requests.clear()
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == ["bytes=100000-", None]
    assert_complete(tmp_path, OTHER)


def test_without_any_version_nothing_is_continued(download, server, tmp_path):
    server.script = [{"cut": 100_000, "etag": None}, {"etag": 'W/"weak"', "cut": 150_000}]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, None, None]
    assert_complete(tmp_path)


def test_date_of_change_is_a_version(download, server, tmp_path):
    date = {"etag": None, "modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    server.script = [{"cut": 100_000, **date}, date]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, "bytes=100000-"]
    assert_complete(tmp_path)


def test_range_that_the_server_does_not_have(download, server, tmp_path):
    server.script = [{"cut": 100_000}, {"status": 416}]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, "bytes=100000-", None]
    assert_complete(tmp_path)


def test_chunked(download, server, tmp_path):
    server.script = [{"chunked": True, "cut": 100_000}, {"chunked": True}]
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path)


def test_unknown_length_is_refused(download, server, tmp_path):
    server.script = [{"no_length": True}]
    assert_error(download("ALBEF_4M"), FILE, "does not say how large")
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("status", [403, 404])
def test_answers_that_waiting_does_not_help(download, server, status):
    server.script = [{"status": status}]
    assert_error(download("ALBEF_4M"), f"{server.url}/{FILE}", str(status), "--url")
    assert len(server.requests) == 1


def test_web_page_is_no_checkpoint(download, server, tmp_path):
    server.script = [{"type": "text/html; charset=utf-8"}]
    assert_error(download("ALBEF_4M"), "web page")
    assert not (tmp_path / FILE).exists()


def test_no_network(download, tmp_path):
    for url in ("http://nowhere.invalid/ALBEF", "http://127.0.0.1:9"):
        parts = f"{url}/vqa.pth", "name a mirror", "fetch vqa.pth", f"put it into {tmp_path}/"
        assert_error(download("vqa", "--url", url), *parts)


def test_md5_that_the_server_names(download, server, tmp_path):
    def named(content):
        return {"headers": {"x-goog-hash": f"crc32c=n03x6A==,md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"}}

    server.script = [named(OTHER)]
    assert_error(download("ALBEF_4M"), "MD5", "same command again")
    assert [path.name for path in tmp_path.iterdir()] == [f".{FILE}.lock"]
    server.script = [named(CONTENT)]
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path)


def test_disk_full(download, server, tmp_path):
    """The limit on the size of a file stands for the disk: writing fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))
    try:
        result = download("ALBEF_4M")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_error(result, f"{FILE}.part", "File too large", "0.1 MB of 0.3 MB are kept", "same command continues")
    assert (tmp_path / f"{FILE}.part").read_bytes() == CONTENT[:123_456]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, "bytes=123456-"]
    assert_complete(tmp_path)


def test_silent_server_is_asked_again(download, server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.3)
    server.script = [{"hold": 100_000}]
    status, _, err = download("ALBEF_4M")
    assert status == 0 and "timed out; again" in err
    assert ranges(server) == [None, "bytes=100000-"]
    assert_complete(tmp_path)


def test_free_space_is_checked_first(download, server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    assert_error(download("ALBEF_4M"), "0.3 MB", "0.2 MB are free", "--to")
    assert not (tmp_path / f"{FILE}.part").exists()


def test_folder_that_cannot_be_written_to(download, tmp_path):
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "file"), "/proc/albef"):
        assert_error(download("ALBEF_4M", "--to", folder), folder, "name a folder to write to with --to")


def start(server, folder, *args):
    argv = [sys.executable, str(ROOT / "Download.py"), *args, "--to", str(folder), "--url", server.url]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened in 30 s")


def test_killed_at_30_percent_then_two_at_once(server, tmp_path):
    part = tmp_path / f"{FILE}.part"
    server.script = [{"hold": 90_000}]
    killed = start(server, tmp_path, "ALBEF_4M")
    wait_for(lambda: part.exists() and part.stat().st_size == 90_000)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()

    server.script = [{"hold": 30_000}]
    both = [start(server, tmp_path, "ALBEF_4M") for _ in range(2)]
    seen = {}

    def read(process):
        seen[process.pid] = process.stdout.readline()

    readers = [threading.Thread(target=read, args=(process,)) for process in both]
    for reader in readers:
        reader.start()
    wait_for(lambda: any("waiting" in line for line in seen.values()))  # one of them says so while the other is held
    wait_for(lambda: part.stat().st_size == 120_000)
    assert not (tmp_path / FILE).exists()
    server.gate.set()
    for process, reader in zip(both, readers):
        reader.join()
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "SHA-256 verified" in seen[process.pid] + out
    assert ranges(server) == [None, "bytes=90000-"]
    assert_complete(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_keep_the_part(download, server, tmp_path, signum):
    server.script = [{"hold": 100_000}]
    part = tmp_path / f"{FILE}.part"

    def stop():
        wait_for(lambda: part.exists() and part.stat().st_size == 100_000)
        os.kill(os.getpid(), signum)

    threading.Thread(target=stop).start()
    status, _, err = download("ALBEF_4M")
    assert status == 128 + signum and "the same command continues" in err
    assert part.read_bytes() == CONTENT[:100_000]
    assert download("ALBEF_4M")[0] == 0
    assert ranges(server) == [None, "bytes=100000-"]
    assert_complete(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# records


def test_damaged_file_is_an_error_and_kept(download, server, tmp_path):
    download("ALBEF_4M")
    path = tmp_path / FILE
    stat = path.stat()
    path.write_bytes(OTHER)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # Download.py reads all the same
    assert_error(download("ALBEF_4M"), FILE, f"{FILE}.sha256", "move it away")
    assert path.read_bytes() == OTHER and len(server.requests) == 1


def test_download_must_fit_an_earlier_record(download, server, tmp_path):
    download("ALBEF_4M")
    (tmp_path / FILE).unlink()
    server.files[FILE] = OTHER
    assert_error(download("ALBEF_4M"), hashlib.sha256(OTHER).hexdigest(), f"{FILE}.sha256", "removed")
    assert not (tmp_path / FILE).exists() and not (tmp_path / f"{FILE}.part").exists()
    (tmp_path / f"{FILE}.sha256").write_text("no hash\n")
    assert_error(download("ALBEF_4M"), f"{FILE}.sha256", "no SHA-256")


def test_file_got_by_other_means(download, server, tmp_path):
    (tmp_path / FILE).write_bytes(CONTENT[:-1])
    assert_error(download("ALBEF_4M"), "299999 bytes", "300000", "move it away", "sha256sum")
    assert_error(download("ALBEF_4M", "--url", "http://nowhere.invalid"), "cannot be compared", "sha256sum")
    assert (tmp_path / FILE).read_bytes() == CONTENT[:-1]
    (tmp_path / FILE).write_bytes(CONTENT)
    assert download("ALBEF_4M")[0] == 0
    assert_complete(tmp_path)


def test_verify_hashes_only_what_has_changed(tmp_path, monkeypatch):
    path, hashed = tmp_path / "x.pth", []
    path.write_bytes(CONTENT)
    assert not checksum.verify(path)  # nothing is recorded
    (tmp_path / "x.pth.sha256").write_text(f"{hashlib.sha256(CONTENT).hexdigest()} *x.pth\n")  # as others write it
    monkeypatch.setattr(checksum, "hash_file", lambda p, f=checksum.hash_file: (hashed.append(p), f(p))[1])
    assert checksum.verify(path) and checksum.verify(path) and len(hashed) == 1
    os.utime(path, ns=(1, 1))
    assert checksum.verify(path) and checksum.verify(path) and len(hashed) == 2
    assert checksum.verify(path, cached=False) and len(hashed) == 3
    assert (tmp_path / "x.pth.sha256").read_text().count("# verified") == 1
    path.write_bytes(OTHER)
    for _ in range(2):
        with pytest.raises(InputError, match="move it away.*x.pth.sha256"):
            checksum.verify(path)


# ---------------------------------------------------------------------------------------------------------------------
# archives


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is None:
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                archive.writestr(info, "/etc/passwd")
            else:
                archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members, kind=tarfile.SYMTYPE):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = kind, "/etc/passwd"
            elif name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


GOOD = {"data/": b"", "data/a.json": b"[1]", "data/refcoco+/dets.json": b"{}"}
ARCHIVES = {"data.tar.gz": make_tar, "json_pretrain.zip": make_zip}


@pytest.fixture(params=ARCHIVES)
def archive(request, server):
    """(name, function that puts an archive with the given members on the server)"""
    return request.param, lambda members: server.files.update({request.param: ARCHIVES[request.param](members)})


def test_archives_are_unpacked_once(download, tmp_path, archive):
    name, offer = archive
    offer(GOOD)
    status, out, _ = download(name)
    assert status == 0 and "2 files unpacked" in out
    assert (tmp_path / "data/a.json").read_text() == "[1]" and (tmp_path / "data/refcoco+/dets.json").read_text() == "{}"
    assert not (tmp_path / f"{name}.unpacking").exists()
    (tmp_path / "data/a.json").write_text("[2]")  # the user's own change
    status, out, _ = download(name)
    assert status == 0 and "files unpacked" not in out
    assert (tmp_path / "data/a.json").read_text() == "[2]"


def test_no_unpack(download, tmp_path, archive):
    name, offer = archive
    offer(GOOD)
    assert download(name, "--no_unpack")[0] == 0
    assert not (tmp_path / "data").exists()
    assert download(name)[0] == 0
    assert (tmp_path / "data/a.json").exists()


def test_other_files_are_not_overwritten(download, tmp_path, archive):
    name, offer = archive
    offer(GOOD)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/refcoco+").mkdir()
    (tmp_path / "data/refcoco+/dets.json").write_text("mine")
    assert_error(download(name), "data/refcoco+/dets.json", "differs", "--to", "--no_unpack")
    assert (tmp_path / "data/refcoco+/dets.json").read_text() == "mine" and not (tmp_path / "data/a.json").exists()
    (tmp_path / "data/refcoco+/dets.json").write_text("{}")  # an equal one, as after an unpacking that was killed
    assert download(name)[0] == 0
    assert (tmp_path / "data/a.json").exists()


def test_links_in_the_folder_are_not_followed(download, tmp_path, tmp_path_factory, archive):
    name, offer = archive
    offer(GOOD)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tmp_path / "data").symlink_to(elsewhere)
    assert_error(download(name), "data/a.json", "link")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("member", ["../x", "data/../../x", "/tmp/x", "C:x", "C:\\x", "..\\x"])
def test_paths_that_leave_the_folder(download, tmp_path, archive, member):
    name, offer = archive
    offer({**GOOD, member: b"bad"})
    assert_error(download(name), repr(member), "leaves the folder")
    assert not (tmp_path / "data").exists() and not (tmp_path / f"{name}.unpacking").exists()


def test_links_in_archives(download, server, tmp_path, archive):
    name, offer = archive
    offer({**GOOD, "data/link": None})
    assert_error(download(name), "'data/link' is a link")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_hard_links_and_devices(download, server, tmp_path, kind):
    server.files["data.tar.gz"] = make_tar({**GOOD, "data/x": None}, kind)
    assert_error(download("data"), "'data/x' is a " + ("link" if kind == tarfile.LNKTYPE else "device"))
    assert not (tmp_path / "data").exists()


def test_bombs(download, tmp_path, archive, monkeypatch):
    monkeypatch.setattr(archives, "MAX_SMALL", 1000)
    name, offer = archive
    offer({**GOOD, "data/zeros": bytes(1_000_000)})
    assert_error(download(name), "data/zeros", "unpacks to more than")
    assert not (tmp_path / "data").exists()


def test_broken_archives(download, server, tmp_path, archive):
    name, offer = archive
    offer({**GOOD, "data/b.json": CONTENT})
    whole = server.files[name]
    for content in (whole[:-150_000], b"no archive", whole[:5000] + bytes(100) + whole[5100:]):
        server.files[name] = content
        assert_error(download(name), name)
        assert not (tmp_path / "data").exists() and not (tmp_path / f"{name}.unpacking").exists()
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.sha256").unlink()
