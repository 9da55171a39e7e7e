"""A proxy in front of a server on loopback that can be told to misbehave, as object stores do now and then."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Mood = Literal["well", "errors", "slow", "away"]
SLOW_CHUNK_BYTES, SLOW_PAUSE_S = 16 * 1024, 0.1
_ERROR_BODY = b"<Error><Code>InternalError</Code><Message>told to fail</Message></Error>"
_ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"


@dataclass
class Proxy:
    """`mood`: passes bytes on; answers 500; passes on about 160 kB a second; or hangs up.

    met: the moods that some client had to do with.
    """

    url: str
    mood: Mood = "well"
    met: set[Mood] = field(default_factory=set)


@contextmanager
def moody_proxy(target: str) -> Iterator[Proxy]:
    """A proxy in front of the HTTP server at the URL `target`, until the end of the block."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    proxy = Proxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    parts = urlsplit(target)
    threading.Thread(target=_accept, args=(listener, proxy, (parts.hostname, parts.port)), daemon=True).start()
    try:
        yield proxy
    finally:
        listener.close()


def _accept(listener: socket.socket, proxy: Proxy, target: tuple[str, int]) -> None:
    with suppress(OSError):  # the listener was closed
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, proxy, target), daemon=True).start()


def _serve(client: socket.socket, proxy: Proxy, target: tuple[str, int]) -> None:
    with client, suppress(OSError):
        mood = proxy.mood
        proxy.met.add(mood)
        if mood == "away":
            return
        if mood == "errors":
            _answer_error(client)
            return
        with socket.create_connection(target, timeout=60) as server:
            back = threading.Thread(target=_pump, args=(server, client, proxy), daemon=True)
            back.start()
            _pump(client, server, proxy)
            back.join(60)


def _answer_error(client: socket.socket) -> None:
    """After the head of a request; what follows of its body is read so that the client gets to see the answer."""
    client.settimeout(1)
    with suppress(TimeoutError):
        while client.recv(65536):
            client.sendall(_ERROR % (len(_ERROR_BODY), _ERROR_BODY))
            break
        while client.recv(65536):
            pass


def _pump(source: socket.socket, sink: socket.socket, proxy: Proxy) -> None:
    with suppress(OSError):
        while data := source.recv(SLOW_CHUNK_BYTES):
            mood = proxy.mood
            proxy.met.add(mood)
            if mood in ("errors", "away"):
                break  # connections that are open already are cut
            if mood == "slow":
                time.sleep(SLOW_PAUSE_S)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
