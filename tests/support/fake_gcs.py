"""Google Cloud Storage's XML API on loopback: generations, conditional puts, listings, uploads in parts.

Written from https://cloud.google.com/storage/docs/xml-api/reference-methods.
"""

import hashlib
import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MODIFIED = "Wed, 01 Jul 2026 12:00:00 GMT"


class Stored(NamedTuple):
    data: bytes
    generation: int


class FakeGcs(ThreadingHTTPServer):
    """One bucket under any name; nothing is signed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.parts_received = 0
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)


class _Handler(BaseHTTPRequestHandler):
    server: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms for the client to acknowledge the head

    def do_HEAD(self) -> None:
        self._get(with_body=False)

    def do_GET(self) -> None:
        if not self._name:
            self._list()
        else:
            self._get(with_body=True)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        if "uploadId" in self._query:
            with self.server.lock:
                self.server.uploads[self._query["uploadId"]][int(self._query["partNumber"])] = data
                self.server.parts_received += 1
            self._answer(200, b"", ETag=_tag(data))
        else:
            self._store(data)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        if "uploadId" in self._query:
            parts = self.server.uploads.pop(self._query["uploadId"])
            self._store(b"".join(parts[number] for number in sorted(parts)), "CompleteMultipartUploadResult")
        else:
            upload = f"upload-{next(self.server.numbers)}"
            self.server.uploads[upload] = {}
            self._answer_xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")

    def do_DELETE(self) -> None:
        with self.server.lock:
            found = self.server.objects.pop(self._name, None)
        self._answer(204 if found else 404, b"")

    @property
    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/").partition("/")[2]

    @property
    def _query(self) -> dict[str, str]:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {key: values[0] for key, values in query.items()}

    def _store(self, data: bytes, result: str = "") -> None:
        """Puts an object. x-goog-if-generation-match: 0 demands that none exists, n that generation n exists."""
        wanted = self.headers.get("x-goog-if-generation-match")
        with self.server.lock:
            found = self.server.objects.get(self._name)
            if wanted is not None and int(wanted) != (found.generation if found else 0):
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            stored = self.server.objects[self._name] = Stored(data, next(self.server.numbers))
        headers = {"ETag": _tag(data), "x-goog-generation": str(stored.generation)}
        if result:
            self._answer_xml(result, f"<ETag>{escape(_tag(data))}</ETag>", **headers)
        else:
            self._answer(200, b"", **headers)

    def _get(self, *, with_body: bool) -> None:
        found = self.server.objects.get(self._name)
        if found is None:
            self._answer(404, b"")
            return
        headers = {"ETag": _tag(found.data), "x-goog-generation": str(found.generation), "Last-Modified": MODIFIED}
        self._answer(200, found.data, with_body=with_body, **headers)

    def _list(self) -> None:
        prefix, delimiter = self._query.get("prefix", ""), self._query.get("delimiter", "")
        objects, folders = "", set()
        for name, stored in sorted(self.server.objects.items()):
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            objects += (
                f"<Contents><Key>{escape(name)}</Key><Size>{len(stored.data)}</Size>"
                f"<LastModified>2026-07-01T12:00:00.000Z</LastModified><ETag>{escape(_tag(stored.data))}</ETag></Contents>"
            )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        self._answer_xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{objects}{prefixes}")

    def _answer_xml(self, name: str, content: str, **headers: str) -> None:
        self._answer(200, f"<?xml version='1.0' encoding='UTF-8'?><{name}>{content}</{name}>".encode(), **headers)

    def _answer(self, status: int, content: bytes, *, with_body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _tag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'
