"""Serves a folder over HTTP on 127.0.0.1, and misbehaves on request."""

import contextlib
import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


class Server:
    """What the running server knows.

    Attributes:
        url: address of the folder.
        faults: file name -> faults of its next GET requests, one each: "cut", "500", "wrong", "slow", "403".
        requests: number of GET requests of each file.
        moved: file name -> address that requests for it are redirected to.
    """

    def __init__(self, folder: Path, faults: dict[str, list[str]]) -> None:
        self.folder = folder
        self.faults = faults
        self.requests: Counter[str] = Counter()
        self.moved: dict[str, str] = {}
        self.url = ""


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            name = self.path.split("?")[0].strip("/")
            path = server.folder / name
            faults = server.faults.get(name, []) if body else []
            fault = faults.pop(0) if faults else ""
            server.requests[name] += body
            if name in server.moved:
                self.send_response(302)
                self.send_header("Location", server.moved[name])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault in ("500", "403") or not path.is_file():
                self.send_response(int(fault) if fault else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if fault == "wrong":
                data = bytes(byte ^ 1 for byte in data)
            if fault == "slow":
                time.sleep(0.5)
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.wfile.write(data)

    return Handler


def has_ipv6() -> bool:
    """Whether this machine can listen on ::1."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as free:
        free.bind(("::1", 0))
        return True
    return False


class IPv6Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def serve(folder: Path, faults: dict[str, list[str]] | None = None, host: str = "127.0.0.1") -> Iterator[Server]:
    """Serves a folder while the block runs; `host` may be an IPv6 address."""
    state = Server(folder, faults or {})
    kind = IPv6Server if ":" in host else http.server.ThreadingHTTPServer
    server = kind((host, 0), handler_of(state))
    state.url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
