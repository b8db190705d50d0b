"""A small server that speaks the Hugging Face hub's protocol of downloads: files of commits."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        match = re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not match:
            return self.answer(404)
        if match[1] not in hub.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        self.resolve(hub, *match.groups())

    do_HEAD = do_GET

    def resolve(self, hub, name, revision, path):
        repository = hub.repositories[name]
        oid = repository.get(revision, revision)
        if oid not in repository["commits"]:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if path not in repository["commits"][oid]:
            return self.answer(
                404, **{"X_Error_Code": "EntryNotFound", "X_Repo_Commit": oid, **hub.headers}
            )
        data = repository["commits"][oid][path]
        headers = {"X_Repo_Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.answer(200, data, **{**headers, **hub.headers})


@contextmanager
def serve():
    """Run the server and yield it; it has .address, .repositories by name, .requests and .headers
    that replace its own.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.log_message = lambda *_: None
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.requests, server.headers = {}, [], {}
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def publish(hub, folder, name):
    """Make a folder's files the newest commit of a repository and return the commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repository = hub.repositories.setdefault(name, {"commits": {}})
    repository["main"] = f"{len(repository['commits']):040x}"
    repository["commits"][repository["main"]] = files
    return repository["main"]


def place(monkeypatch, address):
    """Point huggingface_hub to a server."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    huggingface_hub.close_session()  # the client keeps its proxies
