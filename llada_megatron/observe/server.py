"""A report that is served while its run goes on: to this machine, read-only, built again when the run wrote.

The page, its state and the pictures of the report's folder have exact names; nothing else can be asked for.
Whoever has an account on the machine can read them as well.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llada_megatron.config.errors import BadInput, Refusal, in_words
from llada_megatron.observe.page import to_html
from llada_megatron.observe.report import Report, write_report
from llada_megatron.record.run_dir import PAGE, RunDir

ADDRESS = "127.0.0.1"
PORT = 8000
HOSTS = ("127.0.0.1", "localhost")
"""Names that a browser here, or at the end of a tunnel, asks for. Another name is a page of somebody else
that had it lead here."""
REST = 9.0
"""Building takes at most one part in 1 + REST of the time, as the run may train on the same CPUs."""
STALE_SEC = 60.0
"""So old a report of a run that goes on is built again, for what no file says: that the run is silent."""
IDLE_SEC = 10.0
"""Until a silent connection is closed."""


class LiveReport:
    """The newest report of a run; thread-safe."""

    def __init__(
        self, run_dir: Path, build: Callable[[Path], Report] = write_report, rest: float = REST
    ) -> None:
        """Builds the first report, with its errors: BadInput where the directory holds no step yet."""
        self._run_dir, self._build, self._rest = run_dir, build, rest
        self._lock = threading.Lock()
        self._seen: object = None
        self._version = 0
        self._problem = ""
        self._next = 0.0
        self._make()

    def file(self, name: str) -> tuple[str, bytes] | None:
        """Kind and content of what a browser may ask for; None for anything else."""
        with self._lock:  # nobody reads what is being written
            if name == "state.json":
                self._refresh()
                going = self._report.figures["progress"]["going"]
                state = {"version": str(self._version), "going": going, "problem": self._problem}
                return "application/json", json.dumps(state).encode()
            if name in ("", PAGE):
                page = to_html(self._report.parts, version=str(self._version))
                return "text/html; charset=utf-8", page.encode(errors="backslashreplace")
            pictures = {path.name: path for path in RunDir(self._run_dir).report.glob("*.png")}
            if name in pictures and not pictures[name].is_symlink():
                return "image/png", pictures[name].read_bytes()
        return None

    def _refresh(self) -> None:
        now = time.monotonic()
        going = self._report.figures["progress"]["going"]
        stale = going and now - self._made > STALE_SEC
        if now < self._next or (not stale and self._seen == self._files()):
            return
        try:
            self._make()
            self._problem = ""
        except Refusal as refusal:  # a line that is being written, or a folder that is gone
            self._problem = str(refusal)
        except OSError as error:
            self._problem = in_words(error)

    def _make(self) -> None:
        began = time.monotonic()
        seen = self._files()  # before it is read: what comes meanwhile is new
        try:
            self._report = self._build(self._run_dir)
        finally:
            self._made = time.monotonic()
            self._next = self._made + self._rest * (self._made - began)
        self._seen = seen
        self._version += 1

    def _files(self) -> object:
        """What changes when the run has written something."""
        files = RunDir(self._run_dir)
        paths = [files.config, files.events, files.metrics, files.evaluations, files.samples, files.stop]
        paths += [files.checkpoints, *sorted(files.scores.glob("*.json"))]
        found = []
        for path in paths:
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((path.name, status.st_mtime_ns, status.st_size))
        return found


class Server(ThreadingHTTPServer):
    """Serves a run's report on 127.0.0.1. Raises BadInput for a port that is taken or cannot be had."""

    daemon_threads = True  # a browser that keeps a connection does not keep the server

    def __init__(self, report: LiveReport, port: int = PORT) -> None:
        """port: 0 for a free one."""
        self.report = report
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            why = in_words(error) if isinstance(error, OSError) else "there is none above 65535"
            raise BadInput(f"port {port} cannot be had ({why}): give another with --port.") from None

    @property
    def url(self) -> str:
        """What to open."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is none."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_SEC
    server_version, sys_version = "llada", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in HOSTS:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to localhost alone")
            return
        found = self.server.report.file(urlsplit(self.path).path.removeprefix("/"))
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the user's."""
