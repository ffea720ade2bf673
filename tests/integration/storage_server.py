"""A real S3 endpoint over HTTP for the tests (moto's server), and a proxy before it that does what networks do."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3

ACCESS_KEY, SECRET_KEY = "tester", "do-not-print-this-secret"


@contextmanager
def moto_server(address: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The endpoint's URL."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=address, port=port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def client(url: str) -> Any:
    """boto3's, for the server at `url`."""
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )


@dataclass
class Faults:
    """What the proxy does to object reads (GET below a prefix); drawn by a hash of the request's number, so every run
    sees as many."""

    below: str = "/"
    error_share: float = 0.0
    """503 Slow Down."""
    hang_share: float = 0.0
    """No answer, for longer than any client waits."""
    truncate_share: float = 0.0
    """Half of the body, then the connection closes."""
    short_share: float = 0.0
    """Half of the body, and a Content-Length to match."""
    always_failing: str = ""
    """The end of a path that is always answered with 503."""
    never_answered: str = ""
    """The end of a path that is never answered."""
    refuse: bool = False
    """403 to everything."""
    away: bool = False
    """Every connection is closed without an answer."""
    seen: Counter[str] = field(default_factory=Counter)

    def draw(self, number: int) -> str:
        value = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:4], "big") / 2**32
        for kind in ("error", "hang", "truncate", "short"):
            share = getattr(self, f"{kind}_share")
            if value < share:
                return kind
            value -= share
        return ""


@contextmanager
def faulty_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """A proxy before `endpoint`; yields its URL. `faults` may be changed while it runs."""
    upstream = endpoint.removeprefix("http://")
    closing = threading.Event()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.body()
            fault = self.fault()
            with lock:
                faults.seen[f"{self.command} {fault}".strip()] += 1
            if fault == "refuse":
                self.answer(403, [], b"<Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>")
                return
            if fault == "error":
                self.answer(503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
                return
            if fault == "away":
                self.close_connection = True
                return
            if fault == "hang":
                closing.wait(60)
                self.close_connection = True
                return
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            headers = [item for item in answer.getheaders() if item[0].lower() not in DROPPED]
            if fault == "truncate" and len(data) > 1:
                self.answer(answer.status, headers, data[: len(data) // 2], length=len(data))
                self.close_connection = True
            elif fault == "short" and len(data) > 1:
                self.answer(answer.status, headers, data[: len(data) // 2])
            else:
                length = int(answer.getheader("Content-Length") or len(data)) if self.command == "HEAD" else None
                self.answer(answer.status, headers, data, length=length)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            del self.headers["Transfer-Encoding"]
            chunks = []
            while length := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def fault(self) -> str:
            if faults.away or faults.refuse:
                return "away" if faults.away else "refuse"
            path = self.path.partition("?")[0]
            if self.command != "GET" or not path.startswith(faults.below) or path.endswith("/"):
                return ""
            if faults.always_failing and path.endswith(faults.always_failing):
                return "error"
            if faults.never_answered and path.endswith(faults.never_answered):
                return "hang"
            with lock:
                faults.seen["drawn"] += 1
                number = faults.seen["drawn"]
            return faults.draw(number)

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


DROPPED = ("content-length", "transfer-encoding", "connection", "date", "server")
