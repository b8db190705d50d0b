"""A small server that speaks the Hugging Face hub's protocol: repositories, uploads by LFS,
commits, revisions, downloads.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the client would wait 40 ms for each body

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        body = self.body()
        for pattern, function in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                if (
                    match.groups()
                    and function is not Handler.put
                    and match[1] not in hub.repositories
                ):
                    return self.answer(404, X_Error_Code="RepoNotFound")
                return function(self, hub, body, *match.groups())
        self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, hub, body):
        asked = json.loads(body)
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else f"me/{asked['name']}"
        )
        if name in hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{hub.address}/{name}"})
        # the client's older and newer key
        private = asked.get("private", asked.get("visibility") == "private")
        hub.repositories[name] = {"private": private, "commits": {"0" * 40: {}}, "main": "0" * 40}
        self.answer(content={"url": f"{hub.address}/{name}"})

    def info(self, hub, body, name):
        self.answer(content={"id": name, "sha": hub.repositories[name]["main"], "siblings": []})

    def tree(self, hub, body, name):
        repository = hub.repositories[name]
        files = repository["commits"][repository["main"]]
        self.answer(
            content=[
                {"type": "file", "path": path, "size": len(data), "oid": "0"}
                for path, data in files.items()
            ]
        )

    def preupload(self, hub, body, name):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(content={"files": files})

    def batch(self, hub, body, name):
        objects = [
            {**given, "actions": {"upload": {"href": f"{hub.address}/lfs/{given['oid']}"}}}
            for given in json.loads(body)["objects"]
        ]
        self.answer(content={"transfer": "basic", "objects": objects})

    def put(self, hub, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        hub.blobs[oid] = body
        self.answer()

    def commit(self, hub, body, name):
        repository = hub.repositories[name]
        files = dict(repository["commits"][repository["main"]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        oid = f"{len(repository['commits']):040x}"
        repository["commits"][oid], repository["main"] = files, oid
        self.answer(content={"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, hub, body, name, revision, path):
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


ROUTES = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": lambda self, *_: self.answer(content={"errors": [], "warnings": []}),
    "/lfs/(.+)": Handler.put,
    "/api/models/([^/]+/[^/]+)": Handler.info,
    "/api/models/([^/]+/[^/]+)/revision/main": Handler.info,
    "/api/models/([^/]+/[^/]+)/tree/main": Handler.tree,
    "/api/models/([^/]+/[^/]+)/preupload/main": Handler.preupload,
    "/api/models/([^/]+/[^/]+)/commit/main": Handler.commit,
    r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.resolve,
}


@contextmanager
def serve():
    """Run the server and yield it; it has .address, .repositories by name, .requests and .headers
    that replace its own.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.log_message = lambda *_: None
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.requests, server.blobs, server.headers = {}, [], {}, {}
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def place(monkeypatch, address):
    """Point huggingface_hub to a server."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    huggingface_hub.close_session()  # the client keeps its proxies
