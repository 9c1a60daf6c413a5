"""A server that passes every request on at once and keeps some answers back: what was asked for has happened."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

HELD_BACK = ("transfer-encoding", "connection", "content-length", "host")


class SlowProxy(http.server.ThreadingHTTPServer):
    """Before ``upstream``; ``delay_s`` says for a path how long its answer waits."""

    daemon_threads = True

    def __init__(self, upstream: str, delay_s: Callable[[str], float]) -> None:
        self.upstream, self.delay_s = upstream, delay_s
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Pass)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Pass(http.server.BaseHTTPRequestHandler):
    server: SlowProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HELD_BACK}
        asked = urllib.request.Request(self.server.upstream + self.path, body, headers, method=self.command)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                status, content, kind = answer.status, answer.read(), answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers.get_content_type()
        self.server.asked.append(self.path)
        time.sleep(self.server.delay_s(self.path))
        with contextlib.suppress(OSError):  # who asked has given up
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        pass
