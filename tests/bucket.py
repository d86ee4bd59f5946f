"""A bucket for tests: a real S3 server on loopback, and a proxy before it that does to requests what networks and clouds do."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

NAME = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
REFUSALS = {
    "slow": (503, "SlowDown", "Please reduce your request rate."),
    "broken": (500, "InternalError", "We encountered an internal error. Please try again."),
    "conflict": (409, "ConditionalRequestConflict", "Another conditional operation is under way."),
    "forbidden": (403, "AccessDenied", "Access Denied"),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
}


@dataclass(frozen=True)
class Request:
    """What a rule decides by."""

    method: str
    key: str
    query: str
    number: int
    """Counted from 1, over all requests."""

    @property
    def lists(self) -> bool:
        return "list-type=2" in self.query


Rule = Callable[[Request], str | None]
"""What to do to a request: one of REFUSALS, `reset` (in the middle of its body), `cut` (in the middle of the answer's body),
`lost` (no answer, though the bucket did it), `stale` (of a list, the bucket of a while ago), or nothing."""


class Proxy:
    """Stands before the server; `rule` says what goes wrong, `delay` and `rate` how far away it is."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.reset()
        self._lock = threading.Lock()
        self._line = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def address(self, prefix: str) -> str:
        """A storage in the bucket, through this proxy."""
        return f"s3://{NAME}/{prefix}?endpoint_override={self.endpoint}"

    def reset(self) -> None:
        """Behave, and count from nothing."""
        self.rule: Rule = lambda request: None
        self.delay, self.rate = 0.0, float("inf")
        self.requests: Counter[str] = Counter()
        self.sent = self.received = self.number = 0
        self.told: list[str] = []
        self.lists: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}

    def count(self, request: Request, sent: int, received: int) -> None:
        with self._lock:
            self.requests[request.method + (" list" if request.lists else "")] += 1
            self.sent += sent
            self.received += received

    def next_number(self) -> int:
        with self._lock:
            self.number += 1
            return self.number

    def travel(self, size: int) -> None:
        """Take the time that so many bytes take on the line, which all requests share."""
        time.sleep(self.delay / 2)
        if self.rate != float("inf"):
            with self._line:
                time.sleep(size / self.rate)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a process that is killed leaves its connections in the middle."""


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        proxy, (path, _, query) = self.proxy, self.path.partition("?")
        request = Request(self.command, unquote(path).removeprefix(f"/{NAME}").lstrip("/"), query, proxy.next_number())
        what = proxy.rule(request)
        if what:
            proxy.told.append(f"{what} {request.method} {request.key}")
        size = int(self.headers.get("Content-Length") or 0)
        if what == "reset":
            self.rfile.read(size // 2)
            self._reset()
            return
        body = self._chunked() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(size)
        proxy.travel(len(body))
        if what in REFUSALS:
            code, name, words = REFUSALS[what]
            proxy.count(request, len(body), 0)
            self._answer(code, [("Content-Type", "application/xml")], _ERROR.format(name, words).encode())
            return
        status, headers, answer = self._ask(body)
        if request.lists:
            known = proxy.lists.setdefault(query, (status, headers, answer))
            if what == "stale":
                status, headers, answer = known
        proxy.count(request, len(body), len(answer))
        proxy.travel(len(answer))
        if what == "lost":
            self._reset()
        elif what == "cut":
            self._answer(status, headers, answer, cut=True)
            self._reset()
        else:
            self._answer(status, headers, answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "transfer-encoding")}
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        length = next((v for k, v in headers if k.lower() == "content-length"), None)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body[: len(body) // 2] if cut else body)

    def _reset(self) -> None:
        """Close the connection with a reset, as a machine that has gone does."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


@contextlib.contextmanager
def bucket_server() -> Iterator[Proxy]:
    """A server with one empty bucket, and the proxy before it; it keeps its objects in this process's memory."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    upstream = server.get_host_and_port()
    proxy = Proxy(upstream)
    try:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url="http://{}:{}".format(*upstream), region_name="us-east-1", **keys)
        client.create_bucket(Bucket=NAME)
        yield proxy
    finally:
        proxy.close()
        server.stop()


def environment() -> dict[str, str]:
    """A process's environment with this bucket's credentials and no other of the machine's."""
    mine = {name: value for name, value in os.environ.items() if not re.match(r"AWS_|GOOGLE_|AZURE_", name)}
    return {**mine, **CREDENTIALS}


def few(what: str, times: int, matches: Callable[[Request], bool] = lambda request: True) -> Rule:
    """A rule that does this to the first so many requests that match."""
    left = [times]

    def rule(request: Request) -> str | None:
        if left[0] and matches(request):
            left[0] -= 1
            return what
        return None

    return rule


def every(what: str, nth: int, matches: Callable[[Request], bool] = lambda request: True) -> Rule:
    """A rule that does this to every nth request that matches, beginning with the first."""
    seen = [0]

    def rule(request: Request) -> str | None:
        if not matches(request):
            return None
        seen[0] += 1
        return what if seen[0] % nth == 1 else None

    return rule
