"""A hub on this machine: as much of the Hugging Face hub's HTTP as sharing needs, in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_ofatest"


class FakeHub:
    """Repositories by name, each with its files; what was asked for is in ``requests``."""

    def __init__(self):
        self.repositories, self.private, self.requests = {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, self.path))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, headers, content = hub.answer(self.command, self.path, body, token)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = _serve

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, body, token):
        path = path.partition("?")[0]
        if method == "POST" and token != TOKEN:
            return refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            return (
                self._preupload(body) if match[2] == "preupload" else self._commit(match[1], body)
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self._tell(match[1], match[2] or "")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._give(match[1], match[3])
        return refusal(404, "Nothing", path)

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "somebody":
            return refusal(403, "Forbidden", "You don't have the rights to create a model there")
        if name in self.repositories:
            return as_json({"url": f"{self.address}/{name}"}, 409)
        self.repositories[name] = {}
        self.private[name] = wanted.get("visibility") == "private" or wanted.get("private") is True
        return as_json({"url": f"{self.address}/{name}"})

    def _preupload(self, body):
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
        return as_json({"files": modes})

    def _commit(self, name, body):
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[name][line["value"]["path"]] = content
        return as_json({"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _tell(self, name, rest):
        if name not in self.repositories:
            return refusal(401, "RepoNotFound", "Repository not found")
        if rest.startswith("/revision/") and rest.rpartition("/")[2] not in ("main", COMMIT):
            return refusal(404, "RevisionNotFound", "Invalid rev id")
        files = self.repositories[name]
        if rest.startswith("/tree/"):
            return as_json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                    for path, data in files.items()
                ]
            )
        siblings = [{"rfilename": path} for path in files]
        private = self.private.get(name, False)
        return as_json({"id": name, "sha": COMMIT, "private": private, "siblings": siblings})

    def _give(self, name, path):
        data = self.repositories.get(name, {}).get(path)
        if data is None:
            return refusal(404, "EntryNotFound", "Entry not found")
        return 200, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT}, data


def etag(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def refusal(status, code, message):
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return status, headers, json.dumps({"error": message}).encode()
