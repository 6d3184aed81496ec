"""A Hugging Face hub on this machine that serves commits, listings and files."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


def digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    gated: bool
    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Commits by branch."""


@dataclass
class Hub:
    url: str = ""
    down: bool = False
    silent_at: str = ""
    """Part of the paths that get no answer while it is set."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """Repositories by ``models/OWNER/NAME`` and ``datasets/OWNER/NAME``."""
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, files: Files, *, branch: str = "main", gated: bool = False) -> str:
        """Commits ``files`` to a branch; returns the commit."""
        commit = digest(json.dumps([branch, *sorted(digest(file) for file in files.values())]).encode())
        repository = self.repositories.setdefault(name, Repository(gated))
        repository.commits[commit], repository.names[branch] = files, commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        kind, *parts = [unquote(part) for part in path.removeprefix("api/").split("/")]
        if kind not in ("models", "datasets"):
            kind, parts = "models", [kind, *parts]
        name, (what, revision, *inside) = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
        repository = self.hub.repositories.get(f"{kind}/{name}")
        while self.hub.silent_at and self.hub.silent_at in path:
            time.sleep(0.05)
        if self.hub.down:
            self._send(503)
        elif repository is None:
            self._send(401, **{"X-Error-Code": "RepoNotFound"})
        elif (files := repository.commits.get(commit := repository.names.get(revision, revision))) is None:
            self._send(404, **{"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            self._send(200, json.dumps({"id": name, "sha": commit, "siblings": []}).encode())
        elif what == "tree":
            listed = _tree(files, "/".join(inside), recursive="recursive=true" in self.path.lower())
            self._send(200, json.dumps(listed).encode()) if listed else self._send(404, **_NO_ENTRY)
        elif repository.gated and not self.headers.get("Authorization"):
            self._send(403, **{"X-Error-Code": "GatedRepo"})
        elif (content := files.get("/".join(inside))) is None:
            self._send(404, **_NO_ENTRY)
        else:
            self._send_file(content, commit)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._send(404)

    def _send_file(self, content: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(content)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if self.command == "HEAD" or not asked:
            self._send(200, content, **headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1 if last else len(content), len(content))
        span = {"Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"}
        self._send(206, content[int(first) : stop], **headers, **span)

    def _send(self, code: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


_NO_ENTRY = {"X-Error-Code": "EntryNotFound"}


def _tree(files: Files, below: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{below}/" if below else ""
    found: dict[str, dict[str, Any]] = {}
    for file, content in files.items():
        first, *rest = file.removeprefix(prefix).split("/")
        if not file.startswith(prefix):
            continue
        if rest:
            found[prefix + first] = {"type": "directory", "oid": digest(first.encode()), "size": 0}
        if recursive or not rest:
            found[file] = {"type": "file", "oid": digest(content), "size": len(content)}
    return [{"path": path, **entry} for path, entry in found.items()]


@contextmanager
def hub_here() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
