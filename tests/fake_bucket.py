"""A server on this machine that answers as Google Cloud Storage does, as far as checkpoints ask: objects in memory."""

import contextlib
import email
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Bucket:
    """The objects: {name: (generation, bytes)}, of whatever bucket is asked for."""

    def __init__(self):
        self.objects, self._generations, self.lock = {}, itertools.count(1), threading.Lock()
        self.uploads = {}  # begun in one request, followed by others: {number: [name, bytes so far]}

    def put(self, name, content):
        self.objects[name] = next(self._generations), content
        return self.describe(name)

    def describe(self, name):
        generation, content = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
        }

    def list(self, prefix="", delimiter="", startOffset="", endOffset="", **_):
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < startOffset or (endOffset and name >= endOffset):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket
    requests: list

    def log_message(self, *_):
        pass

    def answer(self, code, content=b"", headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in (("Content-Length", str(len(content))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def go(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.requests.append((self.command, self.path))
        with self.bucket.lock:
            if url.path.startswith("/batch"):
                self.batch(body)
            else:
                self.answer(*self.one(self.command, url.path, query, self.headers, body))

    do_GET = do_POST = do_DELETE = do_PUT = go

    def one(self, command, path, query, headers, body):
        place = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/(.+))?", path)
        if not place:
            return 404, {"error": {"code": 404, "message": path}}
        upload, bucket, objects, name = place.groups()
        if "upload_id" in query:
            return self.resume(query["upload_id"], headers, body)
        held, name = self.bucket.objects, urllib.parse.unquote(name or "")
        if not objects:
            return 200, {"kind": "storage#bucket", "name": bucket, "id": bucket}
        if upload == "/upload":
            if query.get("uploadType") == "multipart":
                parsed = email.message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
                first = parsed.get_payload(0)
                query["name"] = json.loads(first.get_payload())["name"]
                border = b"--" + parsed.get_boundary().encode()
                body = body.split(border)[2].split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            if query.get("uploadType") == "resumable":
                name = query.get("name") or json.loads(body)["name"]
                number = str(len(self.bucket.uploads))
                self.bucket.uploads[number] = [name, b""]
                place = f"http://{headers['Host']}{path}?upload_id={number}"
                return 200, b"", [("Location", place)]
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != held.get(query["name"], (0,))[0]:
                return 412, {"error": {"code": 412, "message": "generation"}}
            return 200, self.bucket.put(query["name"], body)
        if not name:
            return 200, self.bucket.list(**query)
        if copied := re.fullmatch(r"(.+)/(rewriteTo|copyTo)/b/([^/]+)/o/(.+)", name):
            if copied[1] not in held:
                return 404, {"error": {"code": 404, "message": copied[1]}}
            made = self.bucket.put(copied[4], held[copied[1]][1])
            return 200, {"done": True, "resource": made} if copied[2] == "rewriteTo" else made
        if name not in held:
            return 404, {"error": {"code": 404, "message": name}}
        if command == "DELETE":
            del held[name]
            return 204, b""
        generation, content = held[name]
        if query.get("alt") != "media":
            return 200, self.bucket.describe(name)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b""
        marks = [("x-goog-generation", str(generation)), ("Content-Type", "application/octet-stream")]
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or ""):
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            if first > last:
                return 416, b""
            marks.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
            return 206, content[first : last + 1], marks
        return 200, content, marks

    def resume(self, number, headers, body):
        upload = self.bucket.uploads[number]
        upload[1] += body
        if (headers.get("Content-Range") or "").endswith("/*"):
            return 308, b"", [("Range", f"bytes=0-{len(upload[1]) - 1}")]
        return 200, self.bucket.put(*upload)

    def batch(self, body):
        parsed = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + body)
        answers = []
        for n, part in enumerate(parsed.get_payload(), 1):
            command, path = part.get_payload().split()[:2]
            code, *_ = self.one(command, urllib.parse.urlsplit(path).path, {}, {}, b"")
            answers.append(
                f"--end\r\nContent-Type: application/http\r\nContent-ID: <response-{n}>\r\n\r\n"
                f"HTTP/1.1 {code} x\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = ("".join(answers) + "--end--\r\n").encode()
        self.answer(200, content, [("Content-Type", "multipart/mixed; boundary=end")])


@contextlib.contextmanager
def serve():
    """Yield (address, the bucket, all requests so far)."""
    bucket, requests = Bucket(), []
    handler = type("Handler", (Answers,), {"bucket": bucket, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that hangs up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bucket, requests
    finally:
        server.shutdown()
        server.server_close()
