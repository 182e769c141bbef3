"""Tests of mogplex.py, in its own order. Real sockets on 127.0.0.1, real pseudo-terminals, no mocks.

What works is driven against the embedded demo service; what breaks, against ``RawServer``,
which answers with exactly the bytes that a test gives it. Time is a parameter: no test
sleeps to be right.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import pytest

import mogplex

MODULE = os.path.abspath(mogplex.__file__)
TOKEN = "mog_" + "T0ken" * 6 + "xy"


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class RawServer:
    """A server that answers each request with what ``answer(request_number, request_text, connection)`` says.

    ``answer`` returns the bytes to send, or None when it has spoken on the connection itself. The
    connection is closed after each answer. ``requests`` keeps what was asked, head and body.
    """

    def __init__(self, answer: Callable[[int, str, socket.socket], Optional[bytes]]) -> None:
        self.answer, self.requests = answer, []  # type: Tuple[Any, List[str]]
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = read_request(connection)
            if not request:
                return
            self.requests.append(request)
            answer = self.answer(len(self.requests), request, connection)
            if answer is not None:
                connection.sendall(answer)


def read_request(connection: socket.socket) -> str:
    """One HTTP request, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return ""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < sum(lengths):
        body += connection.recv(65536)
    return (head + b"\r\n\r\n" + body).decode("utf-8", "replace")


def answer(status: int = 200, body: Union[str, bytes, Dict[str, Any], List[Any]] = "", **headers: str) -> bytes:
    """The bytes of one HTTP answer; a dict or a list becomes JSON."""
    if isinstance(body, (dict, list)):
        headers.setdefault("Content_Type", "application/json")
        body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    headers.setdefault("Content_Length", str(len(data)))
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Status", *lines, "Connection: close", "", ""]).encode() + data


def ok(data: Any, **headers: str) -> bytes:
    """A successful answer in the service's envelope."""
    return answer(200, {"ok": True, "data": data}, **headers)


def refusal(status: int, code: str, message: str, **headers: str) -> bytes:
    """A failure in the service's envelope."""
    return answer(status, {"ok": False, "error": {"code": code, "message": message}}, **headers)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No setting, proxy or file of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith(("MOGPLEX_", "GITHUB_", "GITLAB_", "CI_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "NODE_ENV", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOGPLEX_HOME", str(tmp_path / "home"))


@pytest.fixture
def demo() -> Iterator[mogplex.DemoServer]:
    """The embedded service, twenty times as fast as for people."""
    with mogplex.DemoServer(speed=20.0) as server:
        yield server


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``cli("runs", "list", env={...}, stdin="...")``: main() in this process, and all that it left behind."""
    def run(*argv: str, env: Optional[Dict[str, str]] = None, stdin: str = "") -> Result:
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            capsys.readouterr()
            code = mogplex.main(list(argv))
            captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)
    return run


def service(url: str, token: str = TOKEN) -> Dict[str, str]:
    """The environment that points the program at a service of ours."""
    return {"MOGPLEX_URL": url, "MOGPLEX_API_KEY": token, "MOGPLEX_DEV": "1"}


# ---------------------------------------------------------------- 1. Errors

# ---------------------------------------------------------------- 2. Values

# ---------------------------------------------------------------- 3. Auth

# ---------------------------------------------------------------- 4. Client

# ---------------------------------------------------------------- 5. Tail

# ---------------------------------------------------------------- 6. Output

# ---------------------------------------------------------------- 7. Cockpit

# ---------------------------------------------------------------- 8. Demo

# ---------------------------------------------------------------- 9. Commands and main

# ---------------------------------------------------------------- The contract
