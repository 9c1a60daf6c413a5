"""A server that answers every request with one status and body, or not at all."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import Any


class BadServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.status, self.body = 500, b"<html>trouble</html>"
        self.silent = False
        self.asked = threading.Event()
        self.released = threading.Event()
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    server: BadServer

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization", ""))
        self.server.asked.set()
        if self.server.silent:
            self.server.released.wait(60)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()
