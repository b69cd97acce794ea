"""The outside of the journal's crash tests: an HTTP server in a process of its own, which counts what reaches it.

``POST /<what>`` is counted under its ``Idempotency-Key`` and answered with a number of its own; with the header
``X-Die`` the server kills the process named there by SIGKILL before it answers. ``GET /`` gives all that came.
Prints its port. Ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_came: list[dict[str, str]] = []
_lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with _lock:
            _came.append({"what": self.path.strip("/"), "key": self.headers["Idempotency-Key"], "body": body})
            number = len(_came)
        die = self.headers.get("X-Die")
        if die is not None:
            os.kill(int(die), signal.SIGKILL)
            return
        self._answer({"number": number})

    def do_GET(self) -> None:
        with _lock:
            self._answer(list(_came))

    def _answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return None


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
