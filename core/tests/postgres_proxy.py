"""A loopback proxy in front of PostgreSQL that counts round trips and breaks connections at chosen messages.

It knows as much of the protocol (PostgreSQL documentation, chapter 53) as that needs: the server's messages one by
one, and the client's bytes as they come. Only for connections without encryption.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

FromServer = Callable[[bytes, bytes], bool]
FromClient = Callable[[bytes], bool]


class PostgresProxy:
    """Forwards connections to the server of ``url``; ``self.url`` leads through it. Also a context manager.

    ``cut_answer(kind, payload)`` and ``cut_request(data)`` are asked about all that passes, and break that connection,
    on both sides and before it is passed on, when they say so. ``hold_request(data)`` breaks it for the client only and
    keeps the data, which reaches the server when ``deliver`` is called: the network was slow.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 0)
        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        separator = "&" if parts.query else "?"
        self.url = url.replace(f":{parts.port}/", f":{port}/") + f"{separator}sslmode=disable&gssencmode=disable"
        self.round_trips = 0
        """How often the server said that it is ready for the next question."""
        self.connections = 0
        self.cut_answer: FromServer | None = None
        self.cut_request: FromClient | None = None
        self.hold_request: FromClient | None = None
        self.refuse = False
        """Whether new connections are closed at once."""
        self._held: list[tuple[socket.socket, bytes]] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut_all(self) -> None:
        """Break all connections."""
        with self._lock:
            ends = list(self._open)
        for end in ends:
            _close(end)

    def deliver(self) -> None:
        """Let what was held reach the server, and wait until it has answered or hung up."""
        held, self._held = self._held, []
        for server, data in held:
            server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            while server.recv(65_536):
                pass
            server.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            if self.refuse:
                _close(client)
                continue
            self.connections += 1
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                _close(client)
                continue
            server.settimeout(None)
            for end in (client, server):  # a message is sent on as it comes, as between two machines
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            self._start(self._forward_requests, client, server)
            self._start(self._forward_answers, client, server)

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65_536):
                if self.hold_request is not None and self.hold_request(data):
                    with self._lock:
                        self._open.discard(server)
                    self._held.append((server.dup(), data))
                    server.detach()
                    _close(client)
                    return
                if self.cut_request is not None and self.cut_request(data):
                    break
                server.sendall(data)
        self._end(client, server)

    def _forward_answers(self, client: socket.socket, server: socket.socket) -> None:
        stream = server.makefile("rb")
        with contextlib.suppress(OSError, ValueError):
            while len(head := stream.read(5)) == 5:
                kind, length = struct.unpack("!cI", head)
                payload = stream.read(length - 4)
                if self.cut_answer is not None and self.cut_answer(kind, payload):
                    break
                if kind == b"Z":
                    self.round_trips += 1
                client.sendall(head + payload)
        self._end(client, server)

    def _end(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._open -= {client, server}
        _close(client)
        _close(server)

    def close(self) -> None:
        """End all connections and stop listening."""
        _close(self._socket)
        self.cut_all()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
