"""A proxy before PostgreSQL that cuts connections between any two messages, or in the middle of one.

It knows the borders of the protocol's messages (PostgreSQL documentation, "Frontend/Backend Protocol"), counts those of
all its connections together, and at the one it is told of does one of these:

    before     the client's message is not passed on, and the connection is cut
    after      it is passed on and the server may act on it, but no answer comes back: a commit whose outcome is unknown
    answer     the server's message is passed on by half
    hold       nothing is passed on before the caller says so: it restarts the server meanwhile

Later connections are left alone. It runs in a process of its own; what it counts is in memory that both share.
"""

from __future__ import annotations

import mmap
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["before", "after", "answer", "hold", "none"]

MODES: tuple[Mode, ...] = ("before", "after", "answer")
ANSWER_SECONDS = 0.05
_NEGOTIATIONS = (80877103, 80877104)  # SSLRequest, GSSENCRequest: answered by one byte


class Shared:
    """Counters that the proxy writes, and its caller reads."""

    _FIELDS = ("frontend", "backend", "reached", "go_on")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self._FIELDS))

    def __getitem__(self, name: str) -> int:
        at = 8 * self._FIELDS.index(name)
        return int(struct.unpack("q", self._memory[at : at + 8])[0])

    def __setitem__(self, name: str, value: int) -> None:
        at = 8 * self._FIELDS.index(name)
        self._memory[at : at + 8] = struct.pack("q", value)


class _Cut(Exception):
    """This connection ends here."""


@dataclass(slots=True)
class _Connection:
    client: socket.socket
    server: socket.socket
    started: bool = False
    negotiating: bool = False
    from_client: bytearray = field(default_factory=bytearray)
    from_server: bytearray = field(default_factory=bytearray)

    def close(self) -> None:
        for side in (self.client, self.server):
            # A reset, as when a machine or a cable is gone, and no orderly end.
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            side.close()


class Proxy:
    """``run`` serves ``listener`` until the process is killed. Give it one cut: a mode and the message's number."""

    def __init__(self, listener: socket.socket, port: int, mode: Mode, number: int, shared: Shared) -> None:
        self._listener = listener
        self._port = port
        self._mode = mode
        self._number = number
        self._shared = shared
        self._connections: list[_Connection] = []

    def run(self) -> None:
        while True:
            sides = {side: each for each in self._connections for side in (each.client, each.server)}
            for ready in select.select([self._listener, *sides], [], [])[0]:
                if ready is self._listener:
                    self._accept()
                    continue
                connection = sides[ready]
                if connection not in self._connections:
                    continue  # cut a moment ago
                try:
                    self._pass_on(connection, from_client=ready is connection.client)
                except (_Cut, OSError):
                    self._connections.remove(connection)
                    connection.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._port))
        except OSError:  # the server is down: so is the proxy, for this client
            client.close()
            return
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append(_Connection(client, server))

    def _pass_on(self, connection: _Connection, from_client: bool) -> None:
        source = connection.client if from_client else connection.server
        data = source.recv(1 << 16)
        if not data:
            raise _Cut
        buffer = connection.from_client if from_client else connection.from_server
        buffer += data
        while message := _next_message(connection, buffer, from_client):
            del buffer[: len(message)]
            (self._to_server if from_client else self._to_client)(connection, message)

    def _to_server(self, connection: _Connection, message: bytes) -> None:
        shared = self._shared
        shared["frontend"] += 1
        chosen = shared["frontend"] == self._number and self._mode in ("before", "after", "hold")
        if not chosen:
            connection.server.sendall(message)
            return
        shared["reached"] = 1
        if self._mode == "hold":
            while not shared["go_on"]:
                time.sleep(0.001)
            connection.server.sendall(message)
            return
        if self._mode == "after":
            connection.server.sendall(message)
            select.select([connection.server], [], [], ANSWER_SECONDS)
        raise _Cut

    def _to_client(self, connection: _Connection, message: bytes) -> None:
        shared = self._shared
        shared["backend"] += 1
        if shared["backend"] == self._number and self._mode == "answer":
            shared["reached"] = 1
            connection.client.sendall(message[: len(message) // 2])
            raise _Cut
        connection.client.sendall(message)


def _next_message(connection: _Connection, buffer: bytearray, from_client: bool) -> bytes:
    """The first message of the buffer; empty while it is not whole."""
    if not from_client and connection.negotiating and buffer:
        connection.negotiating = False
        return bytes(buffer[:1])
    typed = not from_client or connection.started
    head = 5 if typed else 4
    if len(buffer) < head:
        return b""
    length: int = struct.unpack("!I", buffer[head - 4 : head])[0] + (1 if typed else 0)
    if len(buffer) < length:
        return b""
    if not typed:
        if length == 8 and struct.unpack("!I", buffer[4:8])[0] in _NEGOTIATIONS:
            connection.negotiating = True
        else:
            connection.started = True
    return bytes(buffer[:length])


def listen() -> socket.socket:
    """A socket for a proxy on a free loopback port."""
    return socket.create_server(("127.0.0.1", 0), backlog=64)
