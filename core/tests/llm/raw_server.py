"""A server process that answers with the very bytes it is told to: what ``llmock`` cannot be made to say.

``POST /_queue`` takes a list of ``{"status", "headers", "body"}``, one for each request that follows. With ``"drip"``,
a text, and ``"every"``, seconds, that text is sent again and again after the body, until the client goes away.
``GET /_seen`` gives the bodies of those requests. Prints its port when it listens.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

answers: list[dict[str, Any]] = []
seen: list[Any] = []
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            if self.path == "/_queue":
                answers[:], seen[:] = body, []
                return self.answer(200, {}, b"{}")
            seen.append(body)
            answer = answers.pop(0)
        if "drip" in answer:
            return self.drip(answer["body"].encode(), answer["drip"].encode(), answer["every"])
        self.answer(answer.get("status", 200), answer.get("headers", {}), answer["body"].encode())

    def do_GET(self) -> None:
        self.answer(200, {}, json.dumps(seen).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/event-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, body: bytes, drop: bytes, every: float) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.wfile.write(body)
            while True:
                time.sleep(every)
                self.wfile.write(drop)
        except OSError:  # the client is gone
            return

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
