"""A server on the loopback interface that is no MLflow: it refuses, redirects, talks nonsense, or never ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

MANNERS = ("error", "redirect", "garbage", "mirror", "drip", "refused")


@contextlib.contextmanager
def strange_server(manner: str) -> Iterator[int]:
    """The port of a server of one of MANNERS; `mirror` answers with what it was sent, `drip` a byte now and then."""
    over = threading.Event()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = int(listening.getsockname()[1])
        if manner != "refused":
            listening.listen(16)
            threading.Thread(target=_accept, args=(listening, manner, port, over), daemon=True).start()
        try:
            yield port
        finally:
            over.set()


def _accept(listening: socket.socket, manner: str, port: int, over: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while not over.is_set():
            connection, _ = listening.accept()
            threading.Thread(target=_answer, args=(connection, manner, port, over), daemon=True).start()


def _answer(connection: socket.socket, manner: str, port: int, over: threading.Event) -> None:
    with connection, contextlib.suppress(OSError):
        asked = connection.recv(1 << 16)
        if manner == "drip":
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not over.wait(0.2):
                connection.sendall(b"x")
        elif manner == "redirect":
            place = f"http://127.0.0.1:{port}/again".encode()
            connection.sendall(b"HTTP/1.1 307 Go\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n")
        elif manner == "garbage":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\x1b]0;{no'[")
        else:
            body = asked if manner == "mirror" else b"broken: " + asked.split(b"\r\n", 1)[0]
            connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
