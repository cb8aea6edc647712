"""A local HTTP server with the endpoints of the Hugging Face Hub that downloads and uploads use."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from antgmm_jax.io import hub


class Mirror(ThreadingHTTPServer):
    """Repositories in memory; `with Mirror() as mirror` serves them at `mirror.url`.

    Attributes:
        files: "models/ORG/NAME" or "datasets/ORG/NAME" -> file name -> content.
        created: bodies of the requests that created repositories.
        requests: method and path of all requests.
        sent: bytes of repositories' files that were downloaded.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.sent = 0
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()

    def commit(self, repository: str) -> str:
        """The commit of a repository, a digest of its files."""
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.files[repository].items())
        return hashlib.sha1(json.dumps([repository, content]).encode()).hexdigest()


@contextmanager
def mirrored(files: Mapping[str, Mapping[str, bytes]], cache: Path) -> Iterator[Mirror]:
    """Serves repositories (see `Mirror.files`) as the Hub of this process, with a cache of its own."""
    hub._snapshot.cache_clear()
    with Mirror() as mirror, pytest.MonkeyPatch.context() as patch:
        patch.setenv(hub.ENDPOINT, mirror.url)
        patch.setenv(hub.OFFLINE, "0")
        patch.setenv("HF_TOKEN", "hf_test")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        mirror.files = {name: dict(contents) for name, contents in files.items()}
        yield mirror
    hub._snapshot.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    server: Mirror
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self._read()

    def do_GET(self):
        self._read()

    def do_POST(self):
        path = self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            name = f"{request['organization']}/{request['name']}"
            self.server.files.setdefault(f"models/{name}", {})
            self._json({"url": f"{self.server.url}/{name}"})
        elif path.startswith("api/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            repository = path.removeprefix("api/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[repository][line["value"]["path"]]
            commit = self.server.commit(repository)
            url = f"{self.server.url}/{repository.removeprefix('models/')}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit, "success": True})
        else:
            self._missing()

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path).strip("/")

    def _read(self):
        path = self._path()
        if path.startswith("api/"):
            repository, action, *rest = _split(path.removeprefix("api/"))
            if repository not in self.server.files:
                self._missing("RepoNotFound")
            elif action in ("revision", "") and self._known(repository, "/".join(rest) or "main"):
                self._json({"id": repository.partition("/")[2], "sha": self.server.commit(repository), "siblings": []})
            elif action == "tree" and self._known(repository, rest[0]):
                self._json([_entry(name, data) for name, data in self.server.files[repository].items()])
            else:
                self._missing("RevisionNotFound")
            return
        repository, action, *rest = _split(path if path.startswith("datasets/") else f"models/{path}")
        data = self.server.files.get(repository, {}).get("/".join(rest[1:]))
        if action != "resolve" or data is None:
            self._missing("EntryNotFound")
            return
        digest = hashlib.sha1(data).hexdigest()
        if (span := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self.server.sent += len(part)
            self._send(part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}, 206)
            return
        self.server.sent += len(data) if self.command == "GET" else 0
        self._send(data, {"ETag": f'"{digest}"', "X-Repo-Commit": self.server.commit(repository)})

    def _known(self, repository: str, revision: str) -> bool:
        return revision in ("main", self.server.commit(repository))

    def _json(self, value: Any):
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str = "EntryNotFound"):
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"}, 404)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _split(path: str) -> list[str]:
    """Repository (kind, organization and name as one), action, and the rest of a path."""
    kind, organization, name, *rest = path.split("/")
    return ["/".join((kind, organization, name)), *(rest or [""])]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
