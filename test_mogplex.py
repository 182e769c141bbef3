"""Tests of mogplex.py, in its own order. Real sockets, real pseudo-terminals, no mocks.

What works is driven against the embedded demo service; what breaks, against ``RawServer``,
which answers with exactly the bytes that a test gives it. Time is a parameter: no test
sleeps to be right, and none takes longer than ``LONGEST_TEST_S``. What needs POSIX has the
marker ``posix``.
"""
from __future__ import annotations

import ast
import base64
import concurrent.futures
import configparser
import contextlib
import ctypes
import dis
import errno
import functools
import hashlib
import html
import http.client
import inspect
import io
import json
import os
import pyte
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from typing import (
    Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union,
)

import pytest

import mogplex

# Windows as Wine plays it: a reset is an end there
UNDER_WINE = sys.platform == "win32" and hasattr(ctypes.windll.ntdll, "wine_get_version")

try:
    import trustme
except ImportError:  # under Wine: the wheel of cryptography for Windows does not load there
    if not UNDER_WINE:
        raise
    trustme = None

if os.name != "nt":  # the tests that need them have the marker posix
    import fcntl
    import pty
    import termios

LONGEST_TEST_S = 240.0
LOGIN_LOCK = ("127.0.0.1", 24817)  # who listens there may use the two ports beside it
ENDED_BY_SIGNAL = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]  # and the exit code of each
if os.name != "nt":
    ENDED_BY_SIGNAL.append((signal.SIGHUP, 129))
MODULE = os.path.abspath(mogplex.__file__)
# The program, as an installed one starts: from bytecode. As a script it is compiled each time anew,
# which takes twice as long as all else.
PROGRAM = [sys.executable, "-m", "mogplex"]
# What the system says of a directory that is opened as a file
OPENED_DIRECTORY = "Permission denied" if os.name == "nt" else "Is a directory"
TOKEN = "mog_" + "T0ken" * 6 + "xy"


@contextlib.contextmanager
def ended_at_last(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Leave no process of a test behind, however the test ends."""
    with process:
        try:
            yield
        finally:
            process.terminate()  # it may have files to remove
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def short(value: Any) -> Optional[str]:
    """The part of a test's name for a parameter that is long; Windows takes no long variable."""
    text = repr(value)
    return None if len(text) < 200 else f"{text[:20]}..."


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class RawServer:
    """A server that answers as ``answer(request_number, request_text, connection)`` says.

    ``answer`` returns the bytes to send, or None when it has spoken on the connection itself.
    The connection is closed after each answer. ``requests`` keeps what was asked, head and body.
    """

    def __init__(self, answer: Callable[[int, str, socket.socket], Optional[bytes]]) -> None:
        self.answer = answer
        self.requests: List[str] = []
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
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    while length and len(body) < int(length.group(1)):
        chunk = connection.recv(65536)
        if not chunk:
            return ""
        body += chunk
    return (head + b"\r\n\r\n" + body).decode("utf-8", "replace")


def answer(
    status: int = 200, body: Union[str, bytes, Dict[str, Any], List[Any]] = "", **headers: str,
) -> bytes:
    """The bytes of one HTTP answer; a dict or a list becomes JSON."""
    if isinstance(body, (dict, list)):
        headers.setdefault("Content_Type", "application/json")
        body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    headers.setdefault("Content_Length", str(len(data)))
    lines = [f"HTTP/1.1 {status} Status"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += ["Connection: close", "", ""]
    return "\r\n".join(lines).encode() + data


def ok(data: Any, **headers: str) -> bytes:
    """A successful answer in the service's envelope."""
    return answer(200, {"ok": True, "data": data}, **headers)


def refusal(status: int, code: str, message: str, **headers: str) -> bytes:
    """A failure in the service's envelope."""
    return answer(status, {"ok": False, "error": {"code": code, "message": message}}, **headers)


@contextlib.contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    """Fail a test that takes longer; pytest has shown by then where (see setup.cfg).

    What is interrupted may hang again as it is put away: then that fails a while later.
    Windows has no alarm: there the tests end as a whole.
    """

    def fail(*_: object) -> None:
        pytest.fail(f"not over after {seconds:g} s")

    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        timer = threading.Timer(seconds, os._exit, (1,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds, 15.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def every_test_ends() -> Iterator[None]:
    """No test holds up the others for ever."""
    with ended_within(LONGEST_TEST_S):
        yield


@pytest.fixture
def login_ports() -> Iterator[None]:
    """The two ports of a sign-in: of all tests that run on this machine, for one at a time."""
    while True:
        try:
            lock = socket.create_server(LOGIN_LOCK)
        except OSError:
            time.sleep(0.1)
        else:
            break
    with lock:
        yield


@pytest.fixture(autouse=True, scope="session")
def signals_as_on_a_terminal() -> Iterator[None]:
    """Tests in the background, or under nohup, ignore signals, as would all that they start."""
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield
        return
    usual: Dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PERSONAL = re.compile(
    "(?:MOGPLEX|GITHUB|GITLAB|CI)_.*|.*_proxy|CI|NO_COLOR|FORCE_COLOR|NODE_ENV|BROWSER|SSH_.*"
    "|CODESPACES|REMOTE_CONTAINERS|GITPOD_.*|DEVPOD|PYTHONDONTWRITEBYTECODE"
    "|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE|SSL_CERT_DIR", re.IGNORECASE)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No setting, proxy or file of the person who runs the tests reaches them."""
    for name in filter(PERSONAL.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOGPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(MODULE))  # of the processes that tests start


@pytest.fixture
def demo() -> Iterator[mogplex.DemoServer]:
    """The embedded service, a hundred times as fast as for people."""
    with mogplex.DemoServer(speed=100.0) as server:
        yield server


# The commands of a program that polls and tries again many times as fast as for people. How long
# it really waits is tested where time is a parameter.
HURRY = """
mogplex.LATE_EVENT_S = 0.25
mogplex.backoff_s.__defaults__ = (0.025, 15.0)
mogplex.Timing.__new__.__defaults__ = tuple(
    0.05 if default == mogplex.POLL_S else default
    for default in mogplex.Timing.__new__.__defaults__)
"""
HURRY_LIBRARY = HURRY + 'mogplex.tail.__kwdefaults__["interval_s"] = 0.05\n'
HURRIED = [sys.executable, "-W", "error", "-c", f"""
import mogplex, runpy, sys{HURRY_LIBRARY}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""]  # and then a program that uses the library, with its arguments


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What HURRY does, until the test ends."""
    for function in (mogplex.backoff_s, mogplex.Timing.__new__):
        monkeypatch.setattr(function, "__defaults__", function.__defaults__)  # type: ignore[attr-defined]
    monkeypatch.setattr(mogplex, "LATE_EVENT_S", mogplex.LATE_EVENT_S)
    exec(HURRY, {"mogplex": mogplex})


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hurry: None,
) -> Callable[..., Result]:
    """``cli("runs", "list", env={...}, stdin="...")``: main() here, and all that it left behind."""
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


WITHOUT_POSIX = """
import os, signal, sys, time
import ctypes, http.client, mogplex, pyte, pytest, ssl, subprocess, trustme  # which ask where they are
for module in "fcntl", "pty", "resource", "termios":
    sys.modules[module] = None
for name in "ALRM", "CONT", "HUP", "KILL", "QUIT", "TSTP", "WINCH":
    delattr(signal, f"SIG{name}")
del os.fork, os.mkfifo, time.tzset
os.name = "nt"
import test_mogplex
"""


@pytest.mark.posix
def test_the_tests_import_where_there_is_no_posix() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    environ = {**os.environ, "PYTHONPATH": here}
    done = subprocess.run(
        # The warning of cryptography that setup.cfg passes over as well.
        [sys.executable, "-W", "ignore:Python 3.", "-c", WITHOUT_POSIX], env=environ,
        capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (0, "")


NEEDS_POSIX = set((
    "Terminal adopt chmod cockpit fcntl fork full_disk mkfifo on_a_terminal pty run_file send_signal "
    "shell shell_tools st_mode symlink_to termios umask").split())


def test_a_test_that_needs_posix_has_the_marker() -> None:
    with open(__file__, encoding="utf-8") as file:
        module = ast.parse(file.read())
    unmarked = []
    for test in module.body:
        if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
            continue
        parts = list(ast.walk(test))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
        names |= {part.arg for part in parts if isinstance(part, ast.arg)}
        if names & NEEDS_POSIX and "posix" not in names:
            unmarked.append((test.name, names & NEEDS_POSIX))
    assert unmarked == []


@pytest.mark.posix
def test_a_test_that_hangs_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="not over after 0.1 s"):
        with ended_within(0.1):
            threading.Event().wait(30)


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


# ---------------------------------------------------------------- 1. Errors


@pytest.mark.parametrize("status, code", [
    (400, 1), (401, 64), (403, 65), (404, 1), (405, 1), (409, 1), (418, 1), (429, 75), (500, 1),
    (501, 69), (502, 69), (503, 69), (504, 69), (599, 1),
    *[(status, 69) for status in (408, 425, 520, 521, 522, 523, 524, 527, 529, 530)],
])
def test_the_exit_code_follows_the_http_status(status: int, code: int) -> None:
    assert mogplex.error_class(status)("no").exit == code


def test_what_may_succeed_later_is_told_by_the_status() -> None:
    later = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 527, 529, 530}
    assert {status for status in range(100, 600) if status in mogplex.TRANSIENT_STATUSES} == later


def test_exit_codes_are_the_specification_s() -> None:
    assert {code.name: int(code) for code in mogplex.Exit} == {
        "OK": 0, "FAILURE": 1, "USAGE": 2, "UNAUTHORIZED": 64, "FORBIDDEN": 65, "UNAVAILABLE": 69,
        "TEMPORARY": 75,
        "HANGUP": 129, "INTERRUPTED": 130, "BROKEN_PIPE": 141, "TERMINATED": 143}


def test_an_error_shows_code_message_and_status() -> None:
    refusal = mogplex.ForbiddenError("No", code="FORBIDDEN", status=403)
    assert str(refusal) == "FORBIDDEN: No (HTTP 403)"
    assert str(mogplex.UsageError("No")) == "No"


# ---------------------------------------------------------------- 2. Values


@pytest.mark.parametrize("raw, shown", [
    ("plain \u00fc \u6f22 \U0001f600 text", "plain \u00fc \u6f22 \U0001f600 text"),
    ("a\nb\r\nc\rd\x0be\x0cf\x85g\u2028h\u2029i", " \u23ce ".join("abcdefghi")),
    ("\n\nmiddle\n", "middle"), ("tab\there", "tab here"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07x", "x"),
    ("\x1b]8;;http://evil\x1b\\link", "link"),
    ("\x9b2Jx", "x"),
    ("\x9d0;title\x9cx", "x"),
    ("\x1bPdcs\x1b\\x", "x"),
    ("\x1b(Bx", "x"),
    ("\x1bcx", "x"),
    ("\x1b[", ""),
    ("\x1b", ""),
    ("a\x1b[31", "a"),
    ("\x1b]0;no end", "0;no end"),
    ("\x00\x07\x08\x7f\x80x", "x"),
    ("\x1b\x1b[31mx", "x"), ("\x1b[3\x1b[1mx", "x"),
    ("\u202egnp.exe\u202c\u2066\u2069\u200b\u200d\ufeff", "gnp.exe"),
    ("::error::x", ": :error::x"),
    ("  ::set-output name=a::b", "  : :set-output name=a::b"),
    ("a::b", "a::b"),
    ("a\n::warning::x", "a \u23ce : :warning::x"),
    ("\u200b::error::x", ": :error::x"),
    ("\x1b[0m::error::x", ": :error::x"),
    (":\x00:error::x", ": :error::x"),
    ("##[group]x", "# #[group]x"),
    ("x ##vso[task]", "x # #vso[task]"),
    ("#\x1b[0m#vso[x]", "# #vso[x]"), ("##VSO[x]", "# #VSO[x]"), ("## heading", "## heading"),
    (None, ""), (5, "5"), (["::error::"], "['::error::']"),
])
def test_sanitize(raw: object, shown: str) -> None:
    assert mogplex.sanitize(raw) == shown


def test_sanitize_takes_everything_out_that_a_terminal_obeys() -> None:
    every = "".join(map(chr, range(0x3000))) + "\x1b[31m\x1b]0;t\x07\x9b1m"
    obeyed = {*map(chr, [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F)])}
    assert not obeyed.intersection(mogplex.sanitize(every))


@pytest.mark.parametrize("invisible", [
    "".join(map(chr, range(0xE0000, 0xE1000))),    # tag characters, which can spell a hidden text
    "".join(map(chr, range(0xFE00, 0xFE10))),      # variation selectors
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u2066\u3164\ufeff\uffa0\ufff9",
], ids=short)
def test_sanitize_leaves_nothing_that_is_not_seen(invisible: str) -> None:
    assert mogplex.sanitize(f"a{invisible}b") == "ab"


@pytest.mark.parametrize("text, shown", [
    ("\n" * 16000 + "::error::x", ": :error::x"),
    ("a\n" + " " * 16000 + "::error::x", "a \u23ce " + " " * 16000 + ": :error::x"),
    ("a\n\t\u2003::x", "a \u23ce  \u2003: :x"),
])
def test_a_command_after_much_white_space_is_still_one(text: str, shown: str) -> None:
    assert mogplex.sanitize(text) == shown


LINEAR_SIZE = 20_000  # which takes linear work less than a hundredth of a second, quadratic many


def is_linear(work: Callable[[int], object]) -> bool:
    """Whether eight times the size takes about eight times the work, and not 64 times.

    Both in CPU time of this thread, which Windows counts in 16 ms: the small one is done eight times.
    Where it seems not to be, three times over, for a busy machine may disturb one of them.
    """
    def cpu_s(size: int, times: int = 1) -> float:
        began = time.thread_time()
        for _ in range(times):
            work(size)
        return time.thread_time() - began

    for _ in range(3):
        whole_s = cpu_s(LINEAR_SIZE)
        if whole_s < 0.05 or whole_s < 3.0 * cpu_s(LINEAR_SIZE // 8, 8):
            return True
    return False


@pytest.mark.parametrize("work, expected", [
    (lambda size: re.sub("a+b", "", "a" * size), False),
    (lambda size: sum(1 for _ in range(100 * size)), True),
])
def test_quadratic_work_is_told_from_linear(work: Callable[[int], object], expected: bool) -> None:
    assert is_linear(work) is expected


def long_runs(named: str) -> Iterator[Tuple[str, Callable[[int], str]]]:
    """Texts of any size: runs of each character of ``named`` and of many others, and of pairs."""
    others = " \t\n\r:;#/@[]()=?\\\"'aZ0.-_~%\x1b\x07\x9b\x9d\u0301\u200d\U0001f1e6\ufe0f"
    for char in sorted(set(named) | set(others)):
        yield char, lambda size, char=char: char * size  # type: ignore[misc]
        yield f"a{char}", lambda size, char=char: f"a{char * size}\0"  # type: ignore[misc]
    pairs = ["\x1b]", "\x1b[", "::", "//", "[]", "##", "\\n", "://", "=?", "&id=", "\r\n", " \n", "a b"]
    for pair in pairs:
        yield pair, lambda size, pair=pair: pair * (size // len(pair))  # type: ignore[misc]


def apply_pattern(pattern: Any, text: str) -> None:
    pattern.match(text)
    if not pattern.pattern.rstrip().endswith(r"\Z"):  # which says that it is for match()
        pattern.sub("", text)


PATTERNS = sorted(
    name for name, value in vars(mogplex).items()
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str))
READERS: Dict[str, Callable[[str], object]] = {
    "sanitize": mogplex.sanitize,
    "redact": lambda text: mogplex.redact(text, TOKEN, "a" * 24, "a b" * 9),
    "parse_json": mogplex.parse_json,
    "is_uuid": mogplex.is_uuid,
    "parse_base_url": mogplex.parse_base_url,
    "format_time": mogplex.format_time,
    "parse_duration": mogplex.parse_duration,
    "parse_retry_after": lambda text: mogplex.parse_retry_after(text[:65536], None),
    "text_width": mogplex.text_width,
    "fit": lambda text: mogplex.fit(text, 80),
    "utf16_units": mogplex.utf16_units,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_is_linear(name: str) -> None:
    pattern = getattr(mogplex, name)
    for shown, text in long_runs(pattern.pattern):
        assert is_linear(lambda size: apply_pattern(pattern, text(size))), shown


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_text_is_linear(name: str) -> None:
    def read(text: str) -> None:
        with contextlib.suppress(mogplex.MogplexError, ValueError):
            READERS[name](text)

    for shown, text in long_runs(TOKEN):
        assert is_linear(lambda size: read(text(size))), shown


SECRET = "mog_T0ken+Zq/x9Lm3VwYrEpHs"


def in_base64(before: str, encode: Callable[[bytes], bytes] = base64.b64encode) -> str:
    return encode(f"{before}{SECRET}:more".encode()).decode()


@pytest.mark.parametrize("text", [
    SECRET, f"Bearer {SECRET}.", urllib.parse.quote(SECRET, safe=""),
    re.sub("%..", lambda code: code.group().lower(), urllib.parse.quote(SECRET, safe="")),
    *[in_base64("x" * before) for before in range(4)],
    *[in_base64("x" * before, base64.urlsafe_b64encode) for before in range(3)],
    base64.encodebytes(f"{'x' * 50}{SECRET}".encode()).decode(),
    "\n".join(SECRET), "\r\n  ".join([SECRET[:9], SECRET[9:]]), " ".join(SECRET),
    "\\n".join(SECRET),
    json.dumps({"key": f"{SECRET[:5]}\n\t{SECRET[5:]}"}), mogplex.sanitize("\n".join(SECRET)),
])
def test_a_secret_is_hidden_however_it_is_spelled(text: str) -> None:
    left = mogplex.redact(f"before {text} after", SECRET)
    assert left.startswith("before ") and left.endswith(" after") and "***" in left
    spelled = re.sub(r"\\[nrt]|[\s\u23ce]", "", urllib.parse.unquote(left))
    halves = [SECRET[:8], SECRET[-8:], *(in_base64(before)[4:16] for before in ("", "x", "xx"))]
    assert not [half for half in halves if half.lower() in spelled.lower()]


@pytest.mark.parametrize("text", [
    "", "mog_T0ken", "mog_", SECRET[:-1], SECRET[1:], SECRET.swapcase(), "\n".join(SECRET[:-1]),
    in_base64("")[:20], string.printable,
])
def test_what_is_no_secret_is_not_hidden(text: str) -> None:
    assert mogplex.redact(text, SECRET, "", "short", "e") == text


def test_several_secrets_are_hidden() -> None:
    assert mogplex.redact("refresh-0 and access-0", "access-0", "refresh-0") == "*** and ***"


@pytest.mark.parametrize("text, shown", [
    ("2026-05-17T10:14:00Z", "2026-05-17T10:14:00.000Z"),
    ("2026-05-17T10:14:00.1Z", "2026-05-17T10:14:00.100Z"),
    ("2026-11-23T19:32:19.45275+00:00", "2026-11-23T19:32:19.452Z"),
    ("2026-05-17T10:14:00.999999Z", "2026-05-17T10:14:00.999Z"),
    ("2026-05-17 10:14:00", "2026-05-17 10:14:00"),
    ("2026-05-17T12:14:00+02:00", "2026-05-17T10:14:00.000Z"),
    ("2026-05-17T04:44:00-05:30", "2026-05-17T10:14:00.000Z"),
    ("1969-12-31T23:59:59.5Z", "1969-12-31T23:59:59.500Z"),
    ("2026-13-17T10:14:00Z", "2026-13-17T10:14:00Z"),
    ("yesterday\x1b[2J", "yesterday"),
    ("", ""),
    (None, ""),
    (7, ""),
    ("9999-12-31T23:59:59-23:00", "9999-12-31T23:59:59-23:00"),
    ("2026-02-30T00:00:00Z", "2026-02-30T00:00:00Z"),
])
def test_times(text: object, shown: str) -> None:
    assert mogplex.format_time(text) == shown


@pytest.mark.parametrize("text, seconds", [
    ("600", 600), ("90s", 90), ("30m", 1800), ("2h", 7200), (" 1.5h ", 5400), ("0.5", 0.5),
])
def test_durations(text: str, seconds: float) -> None:
    assert mogplex.parse_duration(text) == seconds


@pytest.mark.parametrize("text", [
    "", "0", "-5", "abc", "5d", "1e9", "inf", "nan", "\u0665", "\u0665x", "9" * 40,
])
def test_senseless_durations(text: str) -> None:
    with pytest.raises(mogplex.UsageError):
        mogplex.parse_duration(text)


def test_shown_durations() -> None:
    lengths = (-1, 8.9, 125, 11400, 352800)
    shown = ["0s", "8s", "2m 05s", "3h 10m", "4d 2h"]
    assert list(map(mogplex.format_duration, lengths)) == shown
    assert list(map(mogplex.format_age, lengths)) == ["0s", "8s", "2m", "3h", "4d"]


@pytest.mark.parametrize("value, date, seconds", [
    ("60", None, 60),
    (" 2.5 ", None, 2.5),
    ("0", None, 0),
    (None, None, None),
    ("", None, None),
    ("soon", None, None),
    ("-5", None, None), ("9" * 5000, None, None), ("1e3", None, None), ("nan", None, None),
    ("Tue, 24 Nov 2026 10:00:30 GMT", "Tue, 24 Nov 2026 10:00:00 GMT", 30),
    ("Tue, 24 Nov 2026 09:00:00 GMT", "Tue, 24 Nov 2026 10:00:00 GMT", 0),
    ("Tue, 24 Nov 2026 10:00:30 GMT", "nonsense", None),
    ("Tue, 99 Nov 2026 10:00:30 GMT", None, None),
])
def test_retry_after(value: Optional[str], date: Optional[str], seconds: Optional[float]) -> None:
    assert mogplex.parse_retry_after(value, date) == seconds


def test_backoff_doubles_with_jitter_to_a_cap() -> None:
    assert [mogplex.backoff_s(n, 0.0) for n in (1, 2, 3, 6, 5000)] == [0.5, 1.0, 2.0, 15.0, 15.0]
    assert mogplex.backoff_s(1, 1.0) == 0.75


@pytest.mark.parametrize("text, shown", [
    ("https://staging.mogplex.com", "https://staging.mogplex.com"),
    ("https://Host.example/", "https://host.example"),
    (" https://h.example/api/ ", "https://h.example/api"),
    ("https://h.example:8443", "https://h.example:8443"),
])
def test_base_urls(text: str, shown: str) -> None:
    assert mogplex.parse_base_url(text) == shown


@pytest.mark.parametrize("text", [
    "", "mogplex.com", "http://mogplex.com", "http://localhost:1", "ftp://h", "https://",
    "https://u:p@h", "https://u@h",
    "https://h?q", "https://h?", "https://h#", "https://h:abc", "https://h:99999", "https://h:0",
    "https://h/a b",
    "https://h\\@evil", "https://h/'\"", "https://h\n.evil", "file:///etc/passwd",
    "https://h/\u00e4", "https://[::1", "//h",
])
def test_base_urls_that_may_not_be_used(text: str) -> None:
    with pytest.raises(mogplex.UsageError, match="MOGPLEX_URL"):
        mogplex.parse_base_url(text)


def test_a_base_url_that_may_not_be_used_says_where_it_came_from() -> None:
    for text in "https://[::1", "mogplex.com", "http://10.0.0.1":
        with pytest.raises(mogplex.UsageError, match="^invalid base_url"):
            mogplex.parse_base_url(text, allow_http=True, source="base_url")


def test_plain_http_is_for_this_machine_in_development_only() -> None:
    for url in ("http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000"):
        assert mogplex.parse_base_url(url, allow_http=True) == url
        with pytest.raises(mogplex.UsageError):
            mogplex.parse_base_url(url)
    for host in ("mogplex.com", "127.0.0.1.evil.example", "localhost.evil", "127.0.0.2"):
        url = f"http://{host}"
        with pytest.raises(mogplex.UsageError):
            mogplex.parse_base_url(url, allow_http=True)


def test_a_password_in_the_base_url_is_not_shown() -> None:
    for password in "hunter2", "hunt/hunter2":
        with pytest.raises(mogplex.UsageError) as caught:
            mogplex.parse_base_url(f"https://me:{password}@h.example")
        assert "hunt" not in str(caught.value)


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
WIDTHS = [
    ("", 0), ("abc", 3), ("\u6f22\u5b57", 4), ("\uff21", 2), ("\u2502\u23ce", 2),
    ("e\u0301", 1), ("\u0e01\u0e34", 1), ("a\u20dd", 1),    # marks: Mn twice, Me
    ("\u1112\u1161\u11ab", 2),                             # Hangul jamo: one syllable
    ("\U0001f600", 2), ("\u2764", 1), ("\u2764\ufe0f", 2),   # emoji, a sign, and that as an emoji
    ("1\ufe0f\u20e3", 2), ("a\ufe0f", 1),                   # a keycap
    (FAMILY, 2),                                          # three emoji, joined
    ("\U0001f44d\U0001f3fd", 2),                           # a skin tone
    ("\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", 4),       # two flags
    ("a\u200db", 2),
]


@pytest.mark.parametrize("text, width", WIDTHS)
def test_widths_are_the_terminal_s(text: str, width: int) -> None:
    assert mogplex.text_width(text) == width
    assert mogplex.text_width(f"\u2502{text}x") == width + 2
    assert mogplex.fit(text, width) == text


def test_widths_are_the_same_without_wcwidth() -> None:
    script = (
        "import sys; sys.modules['wcwidth'] = None\nimport mogplex, json\n"
        "print(json.dumps([mogplex.text_width(text) for text in json.loads(sys.argv[1])]))")
    out, err = python(script, json.dumps([text for text, _ in WIDTHS])).communicate()
    assert (json.loads(out), err) == ([width for _, width in WIDTHS], "")


@pytest.mark.parametrize("text, width, shown", [
    ("abcdef", 4, "abc\u2026"),
    ("\u6f22\u5b57\u6f22", 4, "\u6f22\u2026"),
    ("abc", 3, "abc"),
    ("abc", 0, ""),
    ("e\u0301e\u0301e\u0301", 2, "e\u0301\u2026"),
    (f"{FAMILY}abc", 4, f"{FAMILY}a\u2026"),
    ("\U0001f1e9\U0001f1eaab", 2, "\u2026"), ("1\ufe0f\u20e3bc", 3, "1\ufe0f\u20e3\u2026"),
])
def test_a_text_is_cut_where_a_terminal_can_cut_it(text: str, width: int, shown: str) -> None:
    assert mogplex.fit(text, width) == shown


@pytest.mark.parametrize("text", [
    "", "{", "{}x", "[" * 100_000, '{"a":' * 100_000, "NaN", "[Infinity]", '{"a": -Infinity}', "'a'",
], ids=short)
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        mogplex.parse_json(text)


def test_numbers_that_python_cannot_show_stay_text() -> None:
    digits = "9" * 5000
    assert mogplex.parse_json(f'{{"a": {digits}, "b": 1e999, "c": 1.5, "d": 7}}') == {
        "a": digits, "b": "1e999", "c": 1.5, "d": 7}


def test_a_value_nested_too_deeply_is_not_written() -> None:
    value: List[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        mogplex.compact_json(value)


def test_odd_records_are_read_without_complaint() -> None:
    odd = (None, 5, "x", [], {}, {"a": None}, {"a": True}, {"a": [1]}, {"a": {"b": None}})
    assert {mogplex.text_of(record, "a") for record in odd} == {""}
    assert [mogplex.text_of({"a": value}, "a") for value in ("x", 5, 1.5)] == ["x", "5", "1.5"]
    assert [mogplex.dict_of(record, "a") for record in odd[:-1]] == [{}] * 8
    assert mogplex.dicts_of({"a": [1, {}]}, "a") == [{}]


# ---------------------------------------------------------------- 3. Home and auth

REFRESHABLE = {"access_token": "access-0", "refresh_token": "refresh-0", "expires_at": 1}
CALLBACK = "GET /auth/callback?code=c0dec0de&state={state} HTTP/1.1\r\nHost: {host}\r\n\r\n"


class Issuer:
    """A token endpoint, for RawServer, that takes each refresh token once."""

    def __init__(self) -> None:
        self.count, self.mutex = 0, threading.Lock()
        self.forms: List[Dict[str, str]] = []

    def __call__(self, number: int, request: str, connection: socket.socket) -> bytes:
        form = dict(urllib.parse.parse_qsl(request.partition("\r\n\r\n")[2]))
        with self.mutex:
            self.forms.append(form)
            if form.get("refresh_token", "") not in ("", f"refresh-{self.count}"):
                said = {"error": "invalid_grant", "error_description": "Invalid refresh token"}
                return answer(401, said)
            self.count += 1
            return answer(200, {
                "access_token": f"access-{self.count}", "token_type": "bearer", "expires_in": 3600,
                "refresh_token": f"refresh-{self.count}", "scope": "read write offline_access"})


def post_form(url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
    """The simplest PostForm."""
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=60) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError):
            return error.code, json.load(error)
        return error.code, {}
    except OSError:
        raise mogplex.UnavailableError("no answer") from None


def no_post(url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
    raise AssertionError("nothing may be sent")


def home_of(path: Any, warn: Callable[[str], Any] = print) -> mogplex.Home:
    return mogplex.home_from({"MOGPLEX_HOME": str(path)}, warn)


def resolve(
    home: Any, warn: Callable[[str], Any] = print, base_url: str = "https://a.example",
) -> mogplex.Credential:
    """The credential in force when only this home has one."""
    return mogplex.resolve_credential({"MOGPLEX_HOME": str(home)}, base_url, home_of(home, warn))


def signed_in(
    home: Any, base_url: str, warnings: Optional[List[str]] = None, **entry: Any,
) -> mogplex.Credential:
    """The credential of a home that has just been given an expired sign-in for ``base_url``."""
    home_of(home).store_sign_in({**REFRESHABLE, "base_url": base_url, **entry})
    return resolve(home, (warnings if warnings is not None else []).append, base_url)


def put(home: Any, content: Union[str, bytes, Dict[str, Any], List[Any]]) -> Any:
    """The path of an auth.json with just this in it."""
    home.mkdir(exist_ok=True)
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (home / "auth.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    (home / "auth.json").chmod(0o600)
    return home / "auth.json"


def stored(home: Any) -> Any:
    """What its auth.json says, from its first byte on."""
    text = (home / "auth.json").read_text()
    assert text.startswith("{")  # nothing is left of the room that was reserved
    return json.loads(text)


@pytest.mark.posix
@pytest.mark.parametrize("environ, expected", [
    ({"HOME": "/h"}, "/h/.mogplex"),
    ({"HOME": "/h", "MOGPLEX_HOME": ""}, "/h/.mogplex"),
    ({"HOME": "/h", "MOGPLEX_HOME": "/x/../y/"}, "/y"),
    ({"MOGPLEX_HOME": "here"}, os.path.join(os.getcwd(), "here")),
    ({"HOME": "~"}, "/.mogplex"),
])
def test_home_directory(environ: Dict[str, str], expected: str) -> None:
    assert mogplex.home_directory(environ) == expected


@pytest.mark.parametrize("document, token", [
    *[({name: "t1"}, "t1") for name in mogplex.TOKEN_KEYS],
    ({"mogplex": {"apiKey": " t2\n"}}, "t2"),
    ({"providers": {"mogplex": {"token": "t3"}, "other": {"token": "no"}}}, "t3"),
    ({"token": "no", "mogplex": {"access_token": "t4"}}, "t4"),
    ({"mogplex": None, "token": "t5"}, "t5"),
    ({"mogplex": {"token": "no", "base_url": "https://b.example"}, "token": "t6"}, "t6"),
    ({"mogplex": {"token": "t7", "base_url": "https://a.example/"}}, "t7"),
    (b'\xef\xbb\xbf{"token": "t8"}', "t8"),
    ({}, ""),
    ({"version": 1, "openai": {"token": "no"}}, ""),
    ({"token": "", "mogplex": ["no"]}, ""),
    ({"mogplex": {"token": "no", "base_url": "https://b.example"}}, ""),
])
def test_auth_json_is_read_generously(tmp_path: Any, document: Any, token: str) -> None:
    path, warnings = put(tmp_path, document), []  # type: Tuple[Any, List[str]]
    with contextlib.ExitStack() as stack:
        if not token:
            refused = pytest.raises(mogplex.UnauthorizedError, match="not signed in")
            refusal = stack.enter_context(refused)
        found = resolve(tmp_path, warnings.append)
        assert (found.token, found.source, found.expires_at) == (token, "file", None)
    if not token:
        assert str(path) in str(refusal.value)
        assert "mogplex login" in refusal.value.hint and "MOGPLEX_API_KEY" in refusal.value.hint
    assert warnings == [
        f"ignored the sign-in in {path}: it is for https://b.example, not for https://a.example"
    ] * ("https://b.example" in str(document))


def test_the_environment_comes_first(tmp_path: Any) -> None:
    put(tmp_path, "nonsense")
    environ = {"MOGPLEX_API_KEY": f" {TOKEN}\n"}
    home = home_of(tmp_path)
    credential = mogplex.resolve_credential(environ, "https://a.example", home)
    assert (credential.token, credential.source) == (TOKEN, "environment")
    assert not credential.refreshable
    assert credential.current(no_post) == TOKEN and not credential.renew(TOKEN, no_post)
    put(tmp_path, {"token": "from-file"})
    environ["MOGPLEX_API_KEY"] = " \t"
    credential = mogplex.resolve_credential(environ, "https://a.example", home)
    assert credential.token == "from-file"


@pytest.mark.parametrize("token", [
    "s3cret\x1b[2J", "s3cret\r\nX: y", "s3 cret", "s3cret\u20ac", "s3cret\x7f"])
def test_a_token_that_no_header_can_carry_is_refused_unprinted(tmp_path: Any, token: str) -> None:
    put(tmp_path, {"token": token})
    for environ in {"MOGPLEX_API_KEY": token}, {}:
        with pytest.raises(mogplex.UnauthorizedError) as refusal:
            mogplex.resolve_credential(environ, "https://a.example", home_of(tmp_path))
        assert "cret" not in f"{refusal.value!r} {refusal.value.hint}"
    with pytest.raises(mogplex.UnauthorizedError):
        mogplex.Credential(token)


@pytest.mark.parametrize("token", [None, ""])
def test_no_token_is_an_unauthorized_error_before_anything_is_sent(token: Any) -> None:
    for make in mogplex.Credential, mogplex.Client:
        with pytest.raises(mogplex.UnauthorizedError, match="no token given"):
            make(token)


def test_nobody_s_credential_sends_no_token() -> None:
    credential = mogplex.Credential.anonymous()
    assert (credential.token, credential.current(no_post)) == ("", "")
    assert not credential.refreshable
    assert not credential.renew("", no_post)


@pytest.mark.parametrize("content", [
    "", "s3cret", "[1]", '"s3cret"', b"\xff\xfe{", "[" * 100000, '{"token": "s3cret"'], ids=short)
def test_a_senseless_file_is_an_error_that_names_it(
    tmp_path: Any, content: Union[str, bytes],
) -> None:
    path = put(tmp_path, content)
    for act in (
        lambda: resolve(tmp_path),
        lambda: mogplex.Home(str(tmp_path)).store_sign_in({"token": "new"}),
        lambda: mogplex.Home(str(tmp_path)).forget_sign_in(),
    ):
        with pytest.raises(mogplex.UnauthorizedError, match="is not valid JSON") as refusal:
            act()
        assert str(path) in refusal.value.message
        assert "s3cret" not in repr(refusal.value)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_the_home_is_the_users_directory_without_the_variable_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any,
) -> None:
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    assert mogplex.home_directory({}) == str(tmp_path / ".mogplex")


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Any) -> None:
    (tmp_path / "auth.json").mkdir()
    with pytest.raises(mogplex.UnauthorizedError, match="cannot read .*auth.json: Is a directory"):
        resolve(tmp_path)


@pytest.mark.posix
@pytest.mark.parametrize("mode, warned", [
    (0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1), (0o644, 1),
])
def test_a_file_open_to_others_gives_one_warning(tmp_path: Any, mode: int, warned: int) -> None:
    path = put(tmp_path, {"token": "t", "refresh_token": "r"})
    path.chmod(mode)
    warnings: List[str] = []
    resolve(tmp_path, warnings.append).renew("other", no_post)
    expected = f"{path} is open to other users (mode {mode:04o}); to close it: chmod 600 {path}"
    assert warnings == [expected] * warned


@pytest.mark.posix
def test_storing_keeps_what_others_keep_and_forgetting_takes_only_ours(tmp_path: Any) -> None:
    providers: Dict[str, Any] = {"x": {"token": "y"}}
    others: Dict[str, Any] = {"openai": {"key": "\xe9"}, "providers": providers, "note": 1}
    home = tmp_path / "new" / "home"
    mask = os.umask(0)
    try:
        path = mogplex.Home(str(home)).store_sign_in({"token": "t0"})
    finally:
        os.umask(mask)
    assert stored(home) == {"version": 1, "mogplex": {"token": "t0"}}
    modes = [os.stat(name).st_mode & 0o777 for name in (home, path, path + ".lock")]
    assert modes == [0o700, 0o600, 0o600]
    older = {**others, "providers": {**providers, "mogplex": {"token": "old"}}, "api_key": "older"}
    put(home, older).chmod(0o644)
    mogplex.Home(str(home)).store_sign_in({"token": "t1"})
    assert stored(home) == {"version": 1, **others, "mogplex": {"token": "t1"}}
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert mogplex.Home(str(home)).forget_sign_in() and not mogplex.Home(str(home)).forget_sign_in()
    assert stored(home) == {"version": 1, **others}
    assert sorted(os.listdir(home)) == ["auth.json", "auth.json.lock"]
    assert not home_of(tmp_path / "nowhere").forget_sign_in()
    assert not (tmp_path / "nowhere").exists()


KILLED = """
import json, os, sys, mogplex
home, old, new = sys.argv[1], {"token": "a" * 5000}, {"token": "b" * 5000}
def store(fatal):
    steps = [0]
    def trace(frame, event, argument):
        steps[0] += 1
        if steps[0] == fatal:
            os.kill(os.getpid(), 9)
        return trace
    sys.settrace(trace)
    mogplex.Home(home).store_sign_in(new)
    sys.settrace(None)
    return steps[0]
store(0)
total, replaced, left = store(0), [], set()
for number in range(100):
    mogplex.Home(home).store_sign_in(old)
    child = os.fork()
    if not child:
        store(1 + number * total // 100)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9, "it was not killed"
    with open(home + "/auth.json") as stream:
        document = json.load(stream)
    replaced.append([old, new].index(document.pop("mogplex")))
    assert document == {"version": 1, "other": {"token": "c"}}
    left.update(os.listdir(home))
print(sum(replaced) in range(1, 100), replaced == sorted(replaced), *sorted(left))
"""


def python(script: str, *argv: str, **options: Any) -> Any:
    """A process that runs ``script`` beside the module under test."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv], universal_newlines=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.posix
def test_a_process_killed_at_any_instant_leaves_the_old_or_the_new_file(tmp_path: Any) -> None:
    put(tmp_path, {"version": 1, "other": {"token": "c"}})
    out, err = python(KILLED, str(tmp_path)).communicate()
    assert (out, err) == ("True True auth.json auth.json.lock auth.json.tmp\n", "")


@contextlib.contextmanager
def full_disk(home: Any, most: int = 10) -> Iterator[None]:
    """No file can grow beyond so many bytes: the kernel's own refusal, which holds for root too."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_may_not_be_written_is_replaced(tmp_path: Any) -> None:
    with os.fdopen(os.open(tmp_path / "auth.json", os.O_CREAT | os.O_WRONLY, 0o400), "w") as file:
        file.write("{}")
    home_of(tmp_path).store_sign_in({"token": "new"})
    assert resolve(tmp_path).token == "new"
    home_of(tmp_path).store_sign_in({"token": "newer"})
    assert resolve(tmp_path).token == "newer"
    assert sorted(os.listdir(tmp_path)) == ["auth.json", "auth.json.lock"]


def test_a_file_that_another_process_reads_is_replaced(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows renames nothing to its place: it is written in place."""
    monkeypatch.setattr(mogplex, "SWAP_WAIT_S", 0.1)
    path = put(tmp_path, {"token": "old"})
    with path.open("rb"):
        home_of(tmp_path).store_sign_in({"token": "new"})
    assert resolve(tmp_path).token == "new"
    assert sorted(os.listdir(tmp_path)) == ["auth.json", "auth.json.lock"]


def test_a_path_of_over_260_characters_is_like_any_other(tmp_path: Any) -> None:
    home = str(tmp_path.joinpath(*["d" * 100] * 3))
    for token in "old", "new":
        home_of(home).store_sign_in({"token": token})
    assert resolve(home).token == "new"
    assert mogplex.home_directory({"MOGPLEX_HOME": home}).endswith(home)


@pytest.mark.parametrize("name", ["auth.json", "auth.json.lock", "auth.json.tmp"])
def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Any, name: str) -> None:
    credential = signed_in(tmp_path, "https://a.example", expires_at=int(time.time()) + 50)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / name).unlink()
    (tmp_path / name / "in").mkdir(parents=True)
    assert credential.current(no_post) == "access-0"
    with pytest.raises(mogplex.MogplexError, match=f"cannot (read|write) .*{name[:9]}"):
        home_of(tmp_path).store_sign_in({"token": "new"})
    assert (tmp_path / name / "in").is_dir()


@contextlib.contextmanager
def directory_at(home: Any, name: str) -> Iterator[None]:
    """What stands in the way of root too, whom modes do not stop."""
    with contextlib.suppress(FileNotFoundError):
        (home / name).unlink()
    (home / name / "in").mkdir(parents=True)
    yield


@contextlib.contextmanager
def link_at(home: Any, name: str) -> Iterator[None]:
    if (home / name).exists():
        (home / name).rename(home.parent / "target")
    (home / name).symlink_to(home.parent / "target")
    yield


LOOP = "Too many levels of symbolic links"
OBSTACLES = [
    (full_disk, "auth.json", "File too large"),
    (lambda home: directory_at(home, "auth.json.lock"), "auth.json.lock", "Is a directory"),
    (lambda home: directory_at(home, "auth.json.tmp"), "auth.json", "Is a directory"),
    (lambda home: link_at(home, "auth.json.lock"), "auth.json.lock", LOOP),
]


@pytest.mark.posix
@pytest.mark.parametrize("obstacle, name, reason", OBSTACLES)
def test_a_refresh_token_is_spent_only_where_its_successor_can_be_stored(
    tmp_path: Any, obstacle: Any, name: str, reason: str,
) -> None:
    home, warnings = tmp_path / "home", []  # type: Tuple[Any, List[str]]
    credential = signed_in(home, "https://a.example", warnings, expires_at=int(time.time()) + 50)
    path = home / "auth.json"
    before = path.read_bytes()
    with obstacle(home):
        # It is due, and not over: it goes on serving. Refused by the service, it is not renewed.
        assert credential.current(no_post) == "access-0"
        assert not credential.renew("access-0", no_post)
        over = mogplex.Credential(
            "access-0", base_url="https://a.example", refresh_token="refresh-0", expires_at=1.0,
            home=home_of(home, warnings.append))
        with pytest.raises(mogplex.UnauthorizedError) as refusal:
            over.current(no_post)
        assert refusal.value.message == (
            "the sign-in has ended and cannot be renewed here: "
            f"cannot write {home / name}: {reason}")
        with pytest.raises(mogplex.MogplexError) as unwritten:
            home_of(home).store_sign_in({"token": "new"})
        assert unwritten.value.message == f"cannot write {home / name}: {reason}"
    assert path.read_bytes() == before and warnings == []
    assert (home / "auth.json.tmp").is_dir() or not (home / "auth.json.tmp").exists()


@pytest.mark.posix
def test_a_home_that_cannot_be_written_gives_what_another_process_stored_there(
    tmp_path: Any,
) -> None:
    over = signed_in(tmp_path, "https://a.example")
    home_of(tmp_path).store_sign_in({"token": "their-token"})
    with directory_at(tmp_path, "auth.json.lock"):
        assert over.current(no_post) == "their-token"


def test_a_sign_in_in_a_traceback_shows_no_token() -> None:
    assert "s3cret" not in repr(mogplex.SignIn("s3cret", "s3cret", 1.0))


@pytest.mark.posix
def test_a_refresh_token_is_not_spent_where_its_successor_may_find_no_room(tmp_path: Any) -> None:
    over = signed_in(tmp_path, "https://a.example")
    with full_disk(tmp_path, most=(tmp_path / "auth.json").stat().st_size + 10):
        with pytest.raises(mogplex.UnauthorizedError, match="cannot be renewed here.*too large"):
            over.current(no_post)
    assert stored(tmp_path)["mogplex"]["access_token"] == "access-0"
    assert sorted(os.listdir(tmp_path)) == ["auth.json", "auth.json.lock"]


@pytest.mark.posix
def test_a_link_is_followed_and_stays(tmp_path: Any) -> None:
    issuer, home = Issuer(), tmp_path / "home"
    with RawServer(issuer) as server:
        credential = signed_in(home, server.url)
        with link_at(home, "auth.json"):
            assert credential.current(post_form) == "access-1"
            assert (home / "auth.json").is_symlink()
            assert stored(home)["mogplex"]["access_token"] == "access-1"
            assert sorted(os.listdir(tmp_path)) == ["home", "target", "target.lock"]
            assert home_of(home).forget_sign_in() and (home / "auth.json").is_symlink()


MOUNTED = """
import os, subprocess, sys, mogplex
home, source, mode = sys.argv[1:]
def mount(*options):
    command = ["mount", *options, home + "/auth.json"]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit("cannot mount")
mount("--bind", source)
if mode == "ro":
    mount("-o", "remount,bind,ro")
spent = []
def post(url, form):
    spent.append(form["refresh_token"])
    return 200, {"access_token": "access-1", "refresh_token": "refresh-1", "expires_in": 3600}
credential = mogplex.resolve_credential({}, "https://a.example", mogplex.Home(home, print))
try:
    print(credential.current(post))
except mogplex.MogplexError as error:
    print(error)
print(*spent, *sorted(os.listdir(home)))
"""


@pytest.mark.posix
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bind mounts are Linux's")
@pytest.mark.parametrize("mode, told, spent, access", [
    ("rw", "access-1", "refresh-0 ", "access-1"),
    ("ro", "the sign-in has ended and cannot be renewed here: "
           "cannot write {path}: Read-only file system", "", "access-0"),
])
def test_a_file_mounted_by_itself_is_written_in_place_or_not_renewed(
    tmp_path: Any, mode: str, told: str, spent: str, access: str,
) -> None:
    home = tmp_path / "home"
    signed_in(home, "https://a.example")
    source = tmp_path / "source"
    source.write_text((home / "auth.json").read_text() + " " * 5000)  # longer than what follows it
    source.chmod(0o600)
    (home / "auth.json").write_text("")
    process = subprocess.run(
        ["unshare", "--mount", "--map-root-user", sys.executable, "-c", MOUNTED,
         str(home), str(source), mode],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=60)
    if "cannot mount" in process.stderr or "unshare" in process.stderr:
        pytest.skip("no mounts here")
    lines = [told.replace("{path}", f"{home}/auth.json"), f"{spent}auth.json auth.json.lock"]
    assert (process.stdout.splitlines(), process.stderr) == (lines, "")
    assert json.loads(source.read_text())["mogplex"]["access_token"] == access
    assert source.read_text().endswith("}\n") == (mode == "rw")
    assert source.read_text().startswith("{")


@pytest.mark.posix
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_home_without_locks_is_used_with_one_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, code: int,
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(fcntl, "flock", flock)
    issuer, warnings = Issuer(), []  # type: Tuple[Issuer, List[str]]
    with RawServer(issuer) as server:
        credential = signed_in(tmp_path, server.url, warnings)
        assert credential.current(post_form) == "access-1"
        assert credential.renew("access-1", post_form)
    assert warnings == [
        f"{tmp_path} does not support locks ({os.strerror(code)}): "
        "do not run two commands that sign in or start runs at once"]
    assert stored(tmp_path)["mogplex"]["access_token"] == "access-2"


@contextlib.contextmanager
def held(path: Any) -> Iterator[None]:
    """The lock of a file, in another's hands."""
    with open(f"{path}.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@pytest.mark.posix
def test_no_wait_for_a_lock_is_without_an_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "LOCK_NOTICE_S", 0.1)
    monkeypatch.setattr(mogplex, "LOCK_WAIT_S", 0.3)
    warnings: List[str] = []
    over = signed_in(tmp_path, "https://a.example", warnings)
    auth, history = tmp_path / "auth.json", tmp_path / "runs.jsonl"
    with held(auth), held(history):
        for act in (
            lambda: over.current(no_post),
            lambda: home_of(tmp_path, warnings.append).store_sign_in({"token": "t"}),
            home_of(tmp_path, warnings.append).forget_sign_in,
        ):
            with pytest.raises(mogplex.UnavailableError) as busy:
                act()
            assert busy.value.message == f"another process holds {auth}.lock"
            assert not busy.value.transient  # nobody waits another 5 s of his own accord
        assert warnings == [f"waiting for another process, which holds {auth}.lock"] * 3
        home_of(tmp_path, warnings.append).record_start({"key": "k", "service": "a"})
    assert warnings[3:] == [
        f"waiting for another process, which holds {history}.lock",
        f"this run is not recorded in the history: another process holds {history}.lock"]
    assert stored(tmp_path)["mogplex"]["access_token"] == "access-0" and not history.exists()


@pytest.mark.posix
def test_a_command_waits_for_a_busy_lock_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "LOCK_NOTICE_S", 0.0)
    monkeypatch.setattr(mogplex, "LOCK_WAIT_S", 0.1)
    warnings: List[str] = []
    credential = signed_in(tmp_path, "https://a.example", warnings)
    with held(tmp_path / "auth.json"), mogplex.Client(credential, "https://a.example") as one:
        with pytest.raises(mogplex.UnavailableError):
            one.repos()
    assert len(warnings) == 1


@pytest.mark.posix
@forks
def test_a_fork_s_child_does_not_keep_its_parent_s_lock(tmp_path: Any) -> None:
    home, (reading, writing) = home_of(tmp_path), os.pipe()
    with home.sign_in_lock():
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent has closed its end
            os._exit(0)
    try:
        with ended_within(2.0), home.sign_in_lock():
            pass
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def test_a_path_without_a_root_is_made_and_no_endless_loop(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a drive that does not exist, such a path never comes to a directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):
        mogplex.make_private_directory(os.path.join("a", "b"))


@pytest.mark.posix
def test_a_token_that_still_serves_does_not_wait_for_the_end_of_a_busy_lock(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "LOCK_WAIT_S", 0.1)
    credential = signed_in(tmp_path, "https://a.example", expires_at=int(time.time()) + 50)
    with held(tmp_path / "auth.json"):
        assert credential.current(no_post) == "access-0"


class Pending:
    """A PostForm whose answer comes when it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answered = threading.Event()

    def __call__(self, url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
        self.asked.set()
        assert self.answered.wait(60)
        return 200, {"access_token": "access-1", "refresh_token": "refresh-1", "expires_in": 3600}


def test_a_refresh_that_is_under_way_is_waited_for(tmp_path: Any) -> None:
    credential, post = signed_in(tmp_path, "https://a.example"), Pending()
    assert credential.settle(0.0)  # there is none
    thread = threading.Thread(target=credential.current, args=(post,))
    thread.start()
    assert post.asked.wait(60)
    assert not credential.settle(0.01)
    post.answered.set()
    assert credential.settle(20.0)
    assert stored(tmp_path)["mogplex"]["refresh_token"] == "refresh-1"
    thread.join()


LEAVING = """
import sys, threading, time, mogplex
asked = threading.Event()
def post(url, form):
    asked.set()
    time.sleep(0.5)
    return 200, {"access_token": "access-1", "refresh_token": "refresh-1", "expires_in": 3600}
credential = mogplex.resolve_credential({}, "https://a.example", mogplex.Home(sys.argv[1], print))
threading.Thread(target=credential.current, args=(post,), daemon=True).start()
asked.wait()
"""


def test_the_interpreter_does_not_end_in_the_middle_of_a_refresh(tmp_path: Any) -> None:
    signed_in(tmp_path, "https://a.example")
    assert python(LEAVING, str(tmp_path)).communicate() == ("", "")
    assert stored(tmp_path)["mogplex"]["refresh_token"] == "refresh-1"


def test_closing_a_client_waits_for_a_refresh_that_is_under_way(tmp_path: Any) -> None:
    issuer = Issuer()

    def slowly(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        asked.set()
        assert leaving.wait(60)
        time.sleep(0.1)  # so that a client that does not wait is gone before the answer
        return issuer(number, request, connection)

    class Left(Exception):
        """What an interrupt, or a deadline, does to the caller."""

    def leave_when_asked() -> None:
        if asked.is_set():
            leaving.set()
            raise Left
    asked, leaving = threading.Event(), threading.Event()
    with RawServer(slowly) as server:
        credential = signed_in(tmp_path, server.url)
        with pytest.raises(Left), mogplex.Client(credential, server.url) as client:
            with client.open_run("R", tick=leave_when_asked):
                pass
        assert stored(tmp_path)["mogplex"]["refresh_token"] == "refresh-1"


def test_a_refresh_token_that_does_not_rotate_is_kept_as_it_is(tmp_path: Any) -> None:
    said = {"access_token": "access-1", "refresh_token": "refresh-0", "expires_in": 3600}
    with RawServer(lambda *_: answer(200, said)) as server:
        credential = signed_in(tmp_path, server.url)
        with mogplex.Client(credential, server.url) as client:
            assert credential.current(client.post_form) == "access-1"
    assert stored(tmp_path)["mogplex"]["refresh_token"] == "refresh-0"


def fifo_at(path: Any) -> None:
    os.mkfifo(path)


def device_at(path: Any) -> None:
    path.symlink_to("/dev/zero")


def giant_at(path: Any) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


@pytest.mark.posix
@pytest.mark.parametrize("make, reason", [
    (fifo_at, "Not a regular file"), (device_at, "Not a regular file"),
    (giant_at, "Larger than 8 MiB"), (lambda path: path.mkdir(), "Is a directory"),
])
def test_only_regular_files_of_a_sensible_size_are_read(
    tmp_path: Any, make: Any, reason: str,
) -> None:
    warnings: List[str] = []
    auth, history = tmp_path / "auth.json", tmp_path / "runs.jsonl"
    make(auth)
    make(history)
    with pytest.raises(mogplex.UnauthorizedError) as refusal:
        resolve(tmp_path)
    assert refusal.value.message == f"cannot read {auth}: {reason}"
    with pytest.raises(mogplex.MogplexError):
        home_of(tmp_path).store_sign_in({"token": "t"})
    home = home_of(tmp_path, warnings.append)
    assert home.history("a") == []
    home.record_start({"key": "k", "service": "a"})
    assert warnings == [
        f"cannot read {history}: {reason}",
        f"this run is not recorded in the history: cannot write {history}: {reason}"]


@pytest.mark.posix
def test_every_new_directory_is_private_whatever_the_umask_is(tmp_path: Any) -> None:
    for mask in 0, 0o777:
        home = tmp_path / f"{mask:o}" / "b" / "c"
        before = os.umask(mask)
        try:
            home_of(home).store_sign_in({"token": "t"})
        finally:
            os.umask(before)
        modes = [os.stat(path).st_mode & 0o777 for path in (home, home.parent, home.parent.parent)]
        assert modes == [0o700] * 3


@pytest.mark.posix
def test_a_home_below_a_file(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    home, warnings = str(tmp_path / "file" / "home"), []  # type: Tuple[str, List[str]]
    with pytest.raises(mogplex.UnauthorizedError, match="not signed in"):
        resolve(home, warnings.append)
    with pytest.raises(mogplex.MogplexError, match="cannot write .*json.lock: Not a directory"):
        mogplex.Home(home).store_sign_in({"token": "t"})
    assert not mogplex.Home(home).forget_sign_in()
    assert mogplex.Home(home).runs("https://a.example") == []
    mogplex.Home(home, warnings.append).record_start({"id": "1"})
    assert warnings == [
        "this run is not recorded in the history: "
        f"cannot write {home}/runs.jsonl.lock: Not a directory"]


@pytest.mark.parametrize("left_s, refreshed", [(-5, True), (50, True), (80, False), (None, False)])
def test_the_token_is_refreshed_a_minute_early(
    tmp_path: Any, left_s: Optional[int], refreshed: bool,
) -> None:
    issuer = Issuer()
    with RawServer(issuer) as server:
        expires_at = int(time.time()) + left_s if left_s is not None else None
        credential = signed_in(tmp_path, server.url, expires_at=expires_at)
        assert credential.current(post_form) == ("access-1" if refreshed else "access-0")
        entry = stored(tmp_path)["mogplex"]
        assert entry["access_token"] == credential.token and entry["base_url"] == server.url
        assert credential.renew("access-0", post_form) and credential.token == "access-1"
        assert credential.expires_at and 3500 < credential.expires_at - time.time() <= 3600
    assert (tmp_path / "auth.json").read_text().endswith("}\n")
    assert issuer.forms == [
        {"client_id": "mogplex-cli", "grant_type": "refresh_token", "refresh_token": "refresh-0"}]


SIGN_IN_REFUSED = "the service refused the sign-in"
UNEXPECTED = "unexpected response from {url}: no token in it"
ECHO = {"error": "invalid_grant", "error_description": "bad \x1b[31mrefresh-0\n::error::, c0dec0de"}


@pytest.mark.parametrize("said, error, message", [
    (answer(401, ECHO), mogplex.UnauthorizedError,
     f"{SIGN_IN_REFUSED}: invalid_grant: bad *** \u23ce : :error::, {{code}} (HTTP 401)"),
    (answer(400, {}), mogplex.UnauthorizedError, f"{SIGN_IN_REFUSED}: no reason given (HTTP 400)"),
    (answer(500, ""), mogplex.UnavailableError, "the sign-in service is unavailable (HTTP 500)"),
    (answer(200, {"access_token": []}), mogplex.InvalidResponseError, f"{UNEXPECTED} (HTTP 200)"),
    (answer(404, "<html>"), mogplex.InvalidResponseError, f"{UNEXPECTED} (HTTP 404)"),
    (answer(200, {"access_token": "a\nb"}), mogplex.UnauthorizedError,
     "the new token: the token contains spaces, control or non-ASCII characters"),
    (b"", mogplex.UnavailableError, "no answer"),
])
def test_a_refresh_that_fails_leaves_the_file_and_says_no_secret(
    tmp_path: Any, said: bytes, error: Any, message: str,
) -> None:
    with RawServer(lambda *_: said) as server:
        credential = signed_in(tmp_path, server.url)
        before = (tmp_path / "auth.json").read_bytes()
        expected = message.replace("{url}", server.url + "/api/auth/mcp/token")
        for send in credential.current, functools.partial(credential.renew, "access-0"):
            with pytest.raises(error) as refusal:
                send(post_form)
            assert str(refusal.value) == expected.replace("{code}", "c0dec0de")
        assert (tmp_path / "auth.json").read_bytes() == before and credential.token == "access-0"
        with pytest.raises(error) as refusal:
            sign_in(server.url, Browser(CALLBACK))
        shown = expected.replace("***", "refresh-0").replace("{code}", "***")
        assert str(refusal.value) == shown and refusal.value.exit == error.exit


def test_what_another_process_did_to_the_file_counts(tmp_path: Any) -> None:
    credential = signed_in(tmp_path, "https://a.example")
    theirs = {**REFRESHABLE, "access_token": "theirs", "expires_at": 9e9}
    home_of(tmp_path).store_sign_in(theirs)
    assert credential.current(no_post) == "theirs"
    mogplex.Home(str(tmp_path)).store_sign_in({"token": "a-pat"})
    assert credential.renew("theirs", no_post) and credential.current(no_post) == "a-pat"
    assert not credential.renew("a-pat", no_post)
    credential = signed_in(tmp_path, "https://a.example")
    mogplex.Home(str(tmp_path)).forget_sign_in()  # a refresh must not bring the sign-in back
    assert not credential.renew("access-0", no_post) and credential.current(no_post) == "access-0"


TWENTY = """
import json, sys, urllib.parse, urllib.request, mogplex
def post(url, form):
    with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode()) as answer:
        return answer.status, json.load(answer)
print("ready", flush=True), sys.stdin.readline()
def warn(words):
    if not words.startswith("waiting for another process"):  # as on a slow machine
        print(words)
print(mogplex.resolve_credential({}, sys.argv[2], mogplex.Home(sys.argv[1], warn)).current(post))
"""


@pytest.mark.slow
def test_twenty_processes_refresh_once(tmp_path: Any) -> None:
    issuer = Issuer()
    with RawServer(issuer) as server:
        signed_in(tmp_path, server.url)
        processes = [python(TWENTY, str(tmp_path), server.url) for _ in range(20)]
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 20
        for process in processes:
            process.stdin.write("go\n"), process.stdin.flush()
        assert [process.communicate() for process in processes] == [("access-1\n", "")] * 20
    assert issuer.count == 1


@pytest.mark.parametrize("with_file", [True, False])
def test_twenty_threads_refresh_once(tmp_path: Any, with_file: bool) -> None:
    issuer, tokens = Issuer(), []  # type: Tuple[Issuer, List[str]]
    with RawServer(issuer) as server:
        credential = signed_in(tmp_path, server.url) if with_file else mogplex.Credential(
            "access-0", base_url=server.url, refresh_token="refresh-0", expires_at=1.0)

        def take() -> None:
            tokens.append(credential.current(post_form))
        threads = [threading.Thread(target=take) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tokens == ["access-1"] * 20 and issuer.count == 1


def talk(host: str, request: str) -> str:
    """All that ``host`` answers to these characters."""
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=60) as connection:
        connection.sendall(request.encode())
        if not request:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


class Browser:
    """Answers a sign-in by sending it ``requests``, beside a connection that says nothing."""

    def __init__(self, *requests: str) -> None:
        self.requests, self.done = requests, threading.Event()
        self.pages: List[str] = []

    def __call__(self, url: str) -> None:
        self.query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
        host = urllib.parse.urlsplit(self.query["redirect_uri"]).netloc
        with socket.create_connection(("127.0.0.1", int(host.partition(":")[2]))):
            for request in self.requests:
                text = request.replace("{host}", host).replace("{state}", self.query["state"])
                text = text.replace("{port}", host.partition(":")[2])
                self.pages.append(talk(host, text))
        self.done.set()


def sign_in(base_url: str, browser: Browser, **options: Any) -> Dict[str, Any]:
    """The entry that a sign-in through ``browser`` ends with."""
    announced: List[str] = []
    usual = {"post": post_form, "announce": announced.append, "timeout_s": 20.0, "ports": (0,)}
    try:
        return mogplex.sign_in(base_url, open_browser=browser, **{**usual, **options})
    finally:
        assert browser.done.wait(60)
        assert announced[0].startswith(f"{base_url}/api/auth/mcp/authorize?")


def test_the_whole_sign_in(tmp_path: Any) -> None:
    issuer, browser = Issuer(), Browser(CALLBACK)
    with RawServer(issuer) as server:
        entry = sign_in(server.url, browser)
        mogplex.Home(str(tmp_path)).store_sign_in(entry)
        credential = resolve(tmp_path, base_url=server.url)
    assert (credential.token, credential.refreshable) == ("access-1", True)
    assert entry["base_url"] == server.url and 3500 < entry["expires_at"] - time.time() <= 3600
    verifier, query = issuer.forms[0].pop("code_verifier"), browser.query
    assert issuer.forms == [{
        "client_id": "mogplex-cli", "grant_type": "authorization_code", "code": "c0dec0de",
        "redirect_uri": query["redirect_uri"]}]
    assert len(base64.urlsafe_b64decode(verifier + "==")) == 64
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode()
    digest = digest.rstrip("=")
    assert len(base64.urlsafe_b64decode(query.pop("state") + "=")) == 32
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/auth/callback", query.pop("redirect_uri"))
    assert query == {
        "response_type": "code", "client_id": "mogplex-cli", "scope": "read write offline_access",
        "code_challenge": digest, "code_challenge_method": "S256"}
    assert browser.pages[0].startswith("HTTP/1.1 200 ")
    assert "return to the terminal" in browser.pages[0]


NOISE = [
    ("GET /favicon.ico HTTP/1.1\r\nHost: {host}\r\n\r\n", "404"),
    (CALLBACK.replace("GET", "HEAD"), "404"), (CALLBACK.replace("GET", "POST"), "404"),
    (CALLBACK.replace("{host}", "evil.example"), "404"),
    (CALLBACK.replace("{host}", "localhost"), "404"),
    (CALLBACK.replace("{host}", "localhost:1"), "404"),
    (CALLBACK.replace("/callback", "/callback/x"), "404"),
    (CALLBACK.replace("Host: ", "Host:\r\n"), "404"),
    (CALLBACK.replace("\r\n\r\n", "\r\nHost: {host}\r\n\r\n"), "404"),
    ("GET /auth/callback?code=c0dec0de&state={state} HTTP/1.0\r\n\r\n", "404"),
    ("GET /auth/callback?code=evil&state=wrong HTTP/1.1\r\nHost: {host}\r\n\r\n", "400"),
    ("GET /auth/callback?code=evil&state=%e2%82%ac HTTP/1.1\r\nHost: {host}\r\n\r\n", "400"),
    ("GET /auth/callback?code=evil HTTP/1.1\r\nHost: {host}\r\n\r\n", "400"),
    ("GET /auth/callback?state={state} HTTP/1.1\r\nHost: {host}\r\n\r\n", "400"),
    ("GET /auth/callback?error=evil&state=wrong HTTP/1.1\r\nHost: {host}\r\n\r\n", "400"),
    ("\u20ac\r\n\r\n", "404"), ("\r\n\r\n", "404"), ("", ""),
]


def test_noise_neither_ends_nor_blocks_the_wait() -> None:
    browser = Browser(*[request for request, _ in NOISE], CALLBACK)
    with RawServer(Issuer()) as server:
        assert sign_in(server.url, browser)["access_token"] == "access-1"
    assert [page[9:12] for page in browser.pages] == [status for _, status in NOISE] + ["200"]


def test_the_callback_may_come_under_the_name_localhost() -> None:
    with RawServer(Issuer()) as server:
        browser = Browser(CALLBACK.replace("{host}", "LocalHost:{port}"))
        assert sign_in(server.url, browser)["access_token"] == "access-1"


@pytest.mark.parametrize("target, message", [
    ("error=later&error_description=Not, <b>now</b>\x1b[2J", "later: Not, <b>now</b>"),
    ("error=access_denied&state={state}", "access_denied"),
])
def test_an_error_ends_the_wait(target: str, message: str) -> None:
    browser = Browser(f"GET /auth/callback?{target} HTTP/1.1\r\nHost: {{host}}\r\n\r\n")
    with pytest.raises(mogplex.UnauthorizedError) as refusal:
        sign_in("https://a.example", browser, post=no_post)
    assert str(refusal.value) == f"the sign-in failed: {message}"
    assert html.escape(message) in browser.pages[0] and "<b>" not in browser.pages[0]


def test_the_second_port_and_no_port() -> None:
    assert mogplex.LOGIN_PORTS == (mogplex.sign_in.__kwdefaults__ or {})["ports"] == (24816, 24818)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        taken = [listener.getsockname()[1] for listener in listeners]
        server = stack.enter_context(RawServer(Issuer()))
        browser = Browser(CALLBACK)
        sign_in(server.url, browser, ports=(taken[0], 0))
        assert f":{taken[0]}/" not in browser.query["redirect_uri"]
        names = f"ports {taken[0]} and {taken[1]} of 127.0.0.1"
        with pytest.raises(mogplex.MogplexError, match=f"{names} are in use"):
            mogplex.sign_in(server.url, no_post, announce=print, open_browser=None, ports=taken)


@pytest.mark.parametrize("options, message", [
    ({"timeout_s": 0.0}, "the browser did not finish the sign-in within 0s"),
    ({"stopped": lambda: True}, "the sign-in was cancelled"),
])
def test_the_wait_ends_by_itself(options: Dict[str, Any], message: str) -> None:
    with pytest.raises(mogplex.MogplexError, match=message):
        mogplex.sign_in(
            "https://a.example", no_post, announce=print, open_browser=None, ports=(0,), **options)


@pytest.mark.posix
def test_runs_are_remembered(tmp_path: Any) -> None:
    home, path = str(tmp_path / "h"), tmp_path / "h" / "runs.jsonl"
    warnings: List[str] = []
    assert mogplex.Home(home).runs("https://a.example") == []
    run = {"id": "0", "service": "https://a.example", "task": "\u20ac" * 99}
    mogplex.Home(home, warnings.append).record_start(run)
    mogplex.Home(home, warnings.append).record_start({"id": "1", "service": "https://b.example"})
    with path.open("ab") as stream:
        stream.write(b'5\n[]\n\xff\n{"id": "2", "service": "https://a.exam')  # torn
    mogplex.Home(home, warnings.append).record_start({"id": "3", "service": "https://a.example"})
    assert [run["id"] for run in mogplex.Home(home).runs("https://a.example")] == ["3", "0"]
    assert mogplex.Home(home).runs("https://a.example")[-1]["task"] == "\u20ac" * 99
    assert os.stat(str(path)).st_mode & 0o777 == 0o600 and warnings == []


ASKED = {"repoId": "r-1", "prompt": "Fix\nit", "harness": "codex"}


def start(key: str, **other: Any) -> Dict[str, Any]:
    return mogplex.start_record("https://a.example", {**ASKED, **other}, key, "acme/web")


def test_a_start_is_in_the_history_before_and_after_its_answer(tmp_path: Any) -> None:
    home, one = home_of(tmp_path), start("k-1")
    home.record_start(one)
    assert home.history("https://a.example") == [one] and home.runs("https://a.example") == []
    assert (one["key"], one["repo"], one["task"]) == ("k-1", "acme/web", "Fix it")
    run = {"runId": "R", "branch": {"working": "b"}, "createdAt": "2026-11-23T19:32:19Z"}
    home.record_run(one, run)
    known = {**one, "id": "R", "branch": "b", "time": "2026-11-23T19:32:19Z"}
    assert home.history("https://a.example") == home.runs("https://a.example") == [known]
    home.record_start(one)     # the same key again, which the service answers with the same run
    assert home.history("https://a.example") == [known]
    home.record_run(one, run)
    home.record_run(start("k-2"), run)
    assert [run["id"] for run in home.history("https://a.example")] == ["R"]


def test_one_key_at_two_services_is_two_starts(tmp_path: Any) -> None:
    home = home_of(tmp_path)
    there = mogplex.start_record("https://b.example", ASKED, "k-1", "acme/web")
    home.record_start(there)
    home.record_run(start("k-1"), {"runId": "R"})
    home.record_run(mogplex.start_record("https://c.example", ASKED, "k-2", ""), {"runId": "R"})
    assert home.history("https://b.example") == [there]
    assert [run["id"] for run in home.runs("https://a.example")] == ["R"]


def test_a_start_refused_for_good_takes_only_its_own_record_away(tmp_path: Any) -> None:
    home, service_url = home_of(tmp_path), "https://a.example"
    home.record_start(start("k-0"))
    home.forget_start(start("k-1"))
    assert [record["key"] for record in home.history(service_url)] == ["k-0"]
    again = start("k-0")       # the first may have got through; this one is refused
    home.record_start(again)
    home.forget_start(again)
    assert [record["key"] for record in home.history(service_url)] == ["k-0"]
    one = start("k-1")
    home.record_start(one)
    home.forget_start(one)
    assert [record["key"] for record in home.history(service_url)] == ["k-0"]
    home.record_run(start("k-0"), {"runId": "R"})
    home.record_start(again)
    home.forget_start(again)   # a conflict: that key has had its run
    assert [record["id"] for record in home.runs(service_url)] == ["R"]


@pytest.mark.parametrize("other, age_s, is_found", [
    ({}, 60, True), ({}, 86000, True), ({}, 87000, False),
    ({"prompt": "another"}, 60, False),
    ({"repoId": "r-2"}, 60, False),
    ({"harness": "claude-code"}, 60, True),
])
def test_an_earlier_start_of_the_same_request_is_in_doubt_for_a_day(
    tmp_path: Any, other: Dict[str, str], age_s: float, is_found: bool,
) -> None:
    home, earlier = home_of(tmp_path), start("k-1")
    home.record_start(earlier)
    now = (mogplex.parse_time(earlier["time"]) or 0.0) + age_s
    assert home.start_in_doubt(start("k-2", **other), now) == (earlier if is_found else {})
    assert home.start_in_doubt(start("k-1", **other), now) == {}  # its answer is about to come
    home.record_run(earlier, {"runId": "R"})
    assert home.start_in_doubt(start("k-2", **other), now) == {}


def test_a_start_in_doubt_is_kept_longer_than_500_runs(tmp_path: Any) -> None:
    old = [json.dumps({"id": str(number), "service": "https://a.example"}) for number in range(499)]
    home, doubt = home_of(tmp_path), start("k-1")
    home.record_start(doubt)
    lapsed = {**start("k-0"), "time": "2020-01-01T00:00:00Z"}
    lines = [json.dumps(lapsed), json.dumps(doubt), *old]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    home.record_start(start("k-2"))
    found = home.history("https://a.example")
    assert len(found) == 501 and found[-1] == doubt and found[0]["key"] == "k-2"


def test_records_of_earlier_versions_are_read(tmp_path: Any) -> None:
    record = {
        "id": "R", "service": "a", "repo": "acme/web", "branch": "b", "task": "t",
        "time": "2026-11-23T19:32:19Z"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(record) + "\n")
    home = home_of(tmp_path)
    assert home.runs("a") == home.history("a") == [record]
    home.record_start(start("k"))
    assert home.runs("a") == [record]


@pytest.mark.parametrize("value, kept", [
    (None, True), ("", True), ("0", True), ("1", False), ("no", False),
])
def test_mogplex_no_history_has_one_meaning(
    tmp_path: Any, value: Optional[str], kept: bool,
) -> None:
    home_of(tmp_path).record_run(start("k"), {"runId": "R"})
    environ = {"MOGPLEX_HOME": str(tmp_path)}
    if value is not None:
        environ["MOGPLEX_NO_HISTORY"] = value
    before = (tmp_path / "runs.jsonl").read_bytes()
    home = mogplex.home_from(environ, print)
    assert [run["id"] for run in home.runs("https://a.example")] == ["R"] * kept
    home.record_start(start("k-2"))
    assert ((tmp_path / "runs.jsonl").read_bytes() != before) == kept


FIVE_RUNS = """
import sys, mogplex
for number in range(5):
    record = {"id": sys.argv[2] + str(number), "service": "a"}
    mogplex.Home(sys.argv[1], print).record_start(record)
"""


def test_500_runs_are_kept_and_none_is_lost_between_processes(tmp_path: Any) -> None:
    lines = [f'{{"id": "{number}", "service": "a"}}\n' for number in range(600)]
    (tmp_path / "runs.jsonl").write_text("".join(lines))
    processes = [python(FIVE_RUNS, str(tmp_path), letter) for letter in "xyz"]
    assert [process.communicate() for process in processes] == [("", "")] * 3
    ids = [run["id"] for run in mogplex.Home(str(tmp_path)).runs("a")]
    assert len(ids) == 500 and ids[-1] == "115"
    assert sorted(ids[:15]) == [letter + str(n) for letter in "xyz" for n in range(5)]


@pytest.mark.posix
@pytest.mark.parametrize("obstacle", [
    full_disk,
    lambda home: directory_at(home, "runs.jsonl"),
    lambda home: directory_at(home, "runs.jsonl.lock"),
    lambda home: directory_at(home, "runs.jsonl.tmp"),
])
def test_a_run_that_cannot_be_remembered_is_no_error(tmp_path: Any, obstacle: Any) -> None:
    warnings: List[str] = []
    with obstacle(tmp_path):
        mogplex.Home(str(tmp_path), warnings.append).record_start({"id": "1", "service": "a"})
    assert len(warnings) == 1
    assert warnings[0].startswith("this run is not recorded in the history: ")
    assert mogplex.Home(str(tmp_path)).runs("a") == []


# ---------------------------------------------------------------- 4. Client

REPOS = {"repos": [{"id": "1", "full_name": "acme/web"}]}
Reply = Callable[[int, str, socket.socket], Optional[bytes]]  # as RawServer asks for
Speak = Callable[[socket.socket], None]
Step = Union[bytes, Speak]  # what a server does: bytes to send, or a function that speaks itself


def steps(*order: Step) -> Callable[[int, str, socket.socket], Optional[bytes]]:
    """An ``answer`` for RawServer that goes through ``order`` and stays with the last."""
    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        step = order[min(number, len(order)) - 1]
        if isinstance(step, bytes):
            return step
        step(connection)
        return None
    return reply


def reset_after(data: bytes) -> Speak:
    """Send ``data``, then a TCP reset."""
    def speak(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return speak


def dribble(head: bytes, endless: bytes, pause_s: float = 0.02) -> Speak:
    """Send ``head``, then ``endless`` over and over until nobody listens any more."""
    def speak(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(endless)
            time.sleep(pause_s)
    return speak


def silent(connection: socket.socket) -> None:
    """Say nothing until the other side leaves."""
    connection.recv(1)


def packed(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    return compressor.compress(data) + compressor.flush()


def envelope(data: Any) -> bytes:
    return json.dumps({"ok": True, "data": data}).encode()


class Fault(NamedTuple):
    """What a server does, and what a caller of the client then sees."""

    step: Step
    kind: type
    words: str              # in the message
    tries: int = 1
    delivered: bool = True  # the request may have reached the service
    waits: Sequence[float] = (0.5, 1.0)


Invalid = mogplex.InvalidResponseError
Unavailable = mogplex.UnavailableError
GOOD = ok(REPOS)
CUT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = CUT + b"Transfer-Encoding: chunked\r\n\r\n"
SQUEEZED = zlib.compressobj(9, zlib.DEFLATED, -15)
ZEROS = SQUEEZED.compress(b"\0" * (1 << 20)) + SQUEEZED.flush(zlib.Z_FULL_FLUSH)
BOMB = b"\x1f\x8b\b\0\0\0\0\0\0\3" + ZEROS * 512
ENDLESS_REDIRECT = dribble(
    b"HTTP/1.1 307 X\r\nLocation: https://b.example/\r\nContent-Length: 999999999\r\n\r\n",
    b"x" * 65536, 0.0)
LATER = refusal(503, "SERVICE_UNAVAILABLE", "later", Retry_After="2")
MUCH_LATER = refusal(503, "SERVICE_UNAVAILABLE", "later", Retry_After="6")
HTML = answer(200, "<html>", Content_Type="text/html; charset=utf-8")
FAULTS: Dict[str, Fault] = {
    "closed": Fault(lambda connection: None, Unavailable, "connection was lost", 3),
    "reset before the headers": Fault(reset_after(b""), Unavailable, "connection was lost", 3),
    "reset in the headers": Fault(reset_after(CUT[:20]), Unavailable, "connection was lost", 3),
    "closed in the headers": Fault(CUT[:20], Unavailable, "connection was lost", 3),
    "reset in the body": Fault(reset_after(GOOD[:-5]), Unavailable, "connection was lost", 3),
    "short body": Fault(GOOD[:-5], Unavailable, "connection was lost", 3),
    "short chunk": Fault(CHUNKED + b"40\r\n{", Unavailable, "connection was lost", 3),
    "no last chunk": Fault(CHUNKED + b"2\r\n{}\r\n", Unavailable, "connection was lost", 3),
    "no chunk size": Fault(CHUNKED + b"xyz\r\n", Unavailable, "connection was lost", 3),
    "no HTTP": Fault(b"\0\1\2\r\n\r\n", Unavailable, "connection was lost", 3),
    "short gzip": Fault(
        answer(200, packed(envelope(REPOS))[:-9], Content_Encoding="gzip"),
        Invalid, "compression of the response is broken"),
    "no gzip": Fault(
        answer(200, b"{}", Content_Encoding="gzip"),
        Invalid, "compression of the response is broken"),
    "brotli": Fault(
        answer(200, b"{}", Content_Encoding="br"), Invalid, "unknown encoding of the response: br"),
    "150 headers": Fault(
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 150 + b"\r\n", Invalid, "too many headers"),
    "a long header": Fault(
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", Invalid, "too long ones"),
    "HTML": Fault(
        HTML, Invalid,
        "unexpected response (text/html, 6 characters): is a proxy or login page in between?"),
    "empty": Fault(answer(200), Invalid, "unexpected response (no content type, 0 characters)"),
    "no envelope": Fault(answer(200, {"repos": []}), Invalid, "unexpected response"),
    "no data": Fault(answer(200, {"ok": True, "data": []}), Invalid, "unexpected response"),
    "deep JSON": Fault(answer(200, b"[" * 100000), Invalid, "unexpected response"),
    "another protocol": Fault(
        b"HTTP/1.1 101 X\r\nUpgrade: y\r\n\r\n\0\0", Invalid, "unexpected response"),
    "odd length": Fault(
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\nConnection: close\r\n\r\n{}",
        Invalid, "unexpected response"),
    "512 MiB in gzip": Fault(
        answer(200, BOMB, Content_Encoding="gzip"),
        Invalid, "TOO_LARGE: refused a response of over 32 MiB"),
    "500": Fault(answer(500), mogplex.MogplexError, "HTTP 500", 3),
    "502": Fault(answer(502, "<html>", Content_Type="text/html"), Unavailable, "login page", 3),
    "503": Fault(LATER, Unavailable, "SERVICE_UNAVAILABLE: later (HTTP 503)", 3, waits=(2.0, 2.0)),
    "503 for long": Fault(MUCH_LATER, Unavailable, "later"),
    "504": Fault(answer(504, {"error": "too\nlate"}), Unavailable, "too \u23ce late (HTTP 504)", 3),
    "501": Fault(answer(501), Unavailable, "HTTP 501"),
    "401": Fault(
        refusal(401, "UNAUTHORIZED", "Unauthorized"), mogplex.UnauthorizedError,
        "UNAUTHORIZED: Unauthorized (HTTP 401)", delivered=False),
    "403": Fault(
        refusal(403, "FORBIDDEN", "Missing scope"), mogplex.ForbiddenError,
        "Missing scope", delivered=False),
    "404": Fault(
        refusal(404, "BAD_REQUEST", "Repo not found"), mogplex.MogplexError,
        "BAD_REQUEST: Repo not found (HTTP 404)", delivered=False),
    "429": Fault(
        refusal(429, "RATE_LIMITED", "slow\n::error::", Retry_After="1"),
        mogplex.RateLimitedError, "slow \u23ce : :error::", delivered=False),
    "a long message": Fault(
        refusal(400, "X" * 999, "y" * 99999), mogplex.MogplexError,
        "y" * 1000 + " (HTTP 400)", delivered=False),
    "login": Fault(
        answer(307, Location="/login?next=x"), mogplex.UnauthorizedError,
        "asks for a sign-in", delivered=False),
    "their login": Fault(
        answer(307, Location="https://b.example/login"), Invalid,
        "redirect to https://b.example/login", delivered=False),
    "redirect": Fault(
        answer(302, Location="//b.example/x"), Invalid,
        "refused to follow a redirect to http://b.example/x", delivered=False),
    "odd redirect": Fault(
        answer(307, Location="http://[::1"), Invalid,
        "a redirect to http://[::1", delivered=False),
    "a redirect's endless body": Fault(
        ENDLESS_REDIRECT, Invalid, "https://b.example/", delivered=False),
    **{
        f"{status} of a proxy": Fault(answer(status), Unavailable, f"HTTP {status}", 3)
        for status in (408, 425, 520, 521, 522, 523, 524, 527, 529, 530)
    },
}


def client(url: str, **options: Any) -> mogplex.Client:
    """One that never really waits; ``waits`` has what it would have slept."""
    waits: List[float] = []
    made = mogplex.Client(TOKEN, url, **{"sleep": waits.append, "random": lambda: 0.0, **options})
    made.waits = waits  # type: ignore[attr-defined]
    return made


class VirtualClock:
    """Time that passes only in ``sleep``, and then at once."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now, self.notes = now, []  # type: Tuple[float, List[str]]

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 1
        self.now += seconds

    def note(self, progress: mogplex.Progress) -> None:
        self.notes += [progress.message] if progress.message else []

    def tail(self, one: mogplex.Client, run_id: str = "R", **options: Any) -> Iterator[Any]:
        """A tail in this time; what it says is in ``notes``."""
        return mogplex.tail(one, run_id, **{
            "clock": self,
            "sleep": self.sleep,
            "random": lambda: 0.0,
            "on_progress": self.note,
            **options,
        })


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_apart_and_retried_where_that_helps(name: str) -> None:
    fault = FAULTS[name]
    with RawServer(steps(fault.step)) as server, client(server.url) as one:
        with pytest.raises(mogplex.MogplexError) as error:
            one.repos()
        assert type(error.value) is fault.kind
        assert fault.words in str(error.value) and len(str(error.value)) < 1200
        assert len(server.requests) == fault.tries
        assert one.waits == list(fault.waits[:fault.tries - 1])  # type: ignore[attr-defined]
        assert error.value.delivered == fault.delivered


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.tries == 3])
def test_a_fault_that_passes_is_ridden_out(name: str) -> None:
    step = FAULTS[name].step
    with RawServer(steps(step, step, GOOD)) as server, client(server.url) as one:
        assert one.repos() == REPOS["repos"] and len(server.requests) == 3


@pytest.mark.parametrize("status", range(200, 600))
def test_whether_a_fault_passes_follows_from_the_status_alone(status: int) -> None:
    for code in ("RATE_LIMITED", "NOT_FOUND", ""):
        body = {"error": {"code": code, "message": "x"}}
        error = mogplex.answer_error("https://a.example", status, {}, body, 9)
        passing = (408, 425, 429, 500, 502, 503, 504, *range(520, 525), 527, 529, 530)
        assert error.transient == (status < 300 or status in passing)


def test_a_refused_connection_was_not_delivered() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(mogplex.UnavailableError, match="connection was refused") as error:
            client(f"http://127.0.0.1:{taken.getsockname()[1]}").repos()
    assert not error.value.delivered


def test_an_unknown_host_is_told_by_the_kind_of_error_not_by_its_words() -> None:
    with pytest.raises(mogplex.UnavailableError, match="host name was not found") as error:
        client("https://timeout.refused.ssl-certificate.invalid").run("timed out")
    assert not error.value.delivered


def test_a_host_that_cannot_exist_is_a_usage_error() -> None:
    with pytest.raises(mogplex.UsageError, match="no host that can exist"):
        client("https://" + "a" * 70 + ".example").repos()


@pytest.mark.parametrize("step", [
    silent,
    dribble(b"", b"H"),
    dribble(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    dribble(CUT + b"\r\n", b" "),
    dribble(CHUNKED, b"1\r\n \r\n"),
])
def test_no_exchange_is_longer_than_its_limit_however_it_dribbles(step: Step) -> None:
    words = "no (complete )?answer (within|for) 0.3 s"
    with RawServer(steps(step)) as server, client(server.url, timeout_s=0.3, tries=1) as one:
        with pytest.raises(mogplex.UnavailableError, match=words) as error:
            one.repos()
        assert error.value.delivered and error.value.transient


def test_a_silent_dns_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait() and [])

    def tick() -> None:
        raise KeyboardInterrupt  # as Ctrl+C does

    with pytest.raises(KeyboardInterrupt), client("http://127.0.0.1:1").open_run("x", tick):
        pass
    answered.set()


LONG_LIST = {**REPOS, "x": "y" * (1 << 21)}


@pytest.mark.parametrize("data, encoding", [
    (packed(envelope(REPOS)), "gzip"),
    (packed(envelope(LONG_LIST)), "GZIP"),
    (envelope(REPOS), "identity"),
    (b"\xef\xbb\xbf" + envelope(REPOS), ""),
])
@pytest.mark.parametrize("is_dribbled", [False, True])
def test_bodies_are_decompressed(data: bytes, encoding: str, is_dribbled: bool) -> None:
    whole = answer(200, data, Content_Encoding=encoding)
    step: Step = whole
    if is_dribbled:
        head = whole[:-len(data)]
        step = dribble(head + data[:7], data[7:], 9)
    with RawServer(steps(step)) as server, client(server.url) as one:
        assert one.repos() == REPOS["repos"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_inflating_stops_at_the_end_and_nowhere_else(size: int) -> None:
    data = packed(b"\0" * size)
    for pieces in ([data], [data[:1], data[1:-1], data[-1:]], [data, b"more"]):
        assert sum(map(len, mogplex.inflate(pieces))) == size
    with pytest.raises(zlib.error):
        list(mogplex.inflate([data[:-1]]))


MEMORY = """
import resource, sys, mogplex
client, now = mogplex.Client("mog_x", sys.argv[1], tries=1), [0.0]
def pass_by(seconds): now[0] += seconds
try: client.models()
except mogplex.MogplexError: pass
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for item in mogplex.tail(client, "r", interval_s=0.01, random=lambda: 0.0,
                             clock=lambda: now[0], sleep=pass_by):
        print(len(str(item)))
except mogplex.MogplexError as error:
    print(error)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024
print("within bounds" if used < 100 else f"{used} MiB")
"""
BIG_EVENT = {"id": "1", "message": "x" * 10_000_000 + "\U0001f600\ud800\0"}
BIG = {"run": {"status": "success"}, "events": [BIG_EVENT]}


TOO_LARGE = "refused a response of over 32 MiB"
HUGE = {
    "512 MiB in gzip": (answer(200, BOMB, Content_Encoding="gzip"), TOO_LARGE),
    "a message of 10 MB": (ok(BIG), "10000"),
    "33 MiB": (answer(200, b" " * (33 << 20)), TOO_LARGE),
    "deep": (answer(200, b"[" * 1_000_000), "unexpected response"),
    "digits": (answer(200, b"9" * 1_000_000), "unexpected response"),
}


@pytest.mark.posix
@pytest.mark.parametrize("name", HUGE)
def test_memory_has_its_bounds(name: str) -> None:
    step, told = HUGE[name]
    with RawServer(lambda number, request, _: step if "/events" in request else ok({})) as server:
        command = [sys.executable, "-c", MEMORY, server.url]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True)
        said = done.stdout.decode()
    assert told in said and said.endswith("within bounds\n")


WWW = "https://www.mogplex.com"
BARE = "https://mogplex.com"


@pytest.mark.parametrize("url, status, location, target", [
    (WWW + "/a", 307, BARE + "/a?b=c", BARE + "/a?b=c"),
    (BARE + "/a", 308, WWW + "/a", WWW + "/a"),
    (BARE + "/a", 307, "//WWW.mogplex.com/a", "https://WWW.mogplex.com/a"),
    (WWW + "/a", 302, BARE + "/a", ""),
    (WWW + "/a", 301, BARE + "/a", ""),
    (WWW + "/a", 307, "http://mogplex.com/a", ""),
    (WWW + "/a", 307, "/b", ""),
    (WWW + "/a", 307, "https://mogplex.com:444/a", ""),
    (WWW + "/a", 307, "https://x@mogplex.com/a", ""),
    (WWW + "/a", 307, "https://mogplex.com.evil.example/a", ""),
    (WWW + "/a", 307, "https://evil.example/mogplex.com", ""),
    ("https://evil.example/a", 307, BARE + "/a", ""),
    (WWW + "/a", 307, "", ""),
    (WWW + "/a", 307, "https://[::1", ""),
])
def test_where_the_token_may_follow(url: str, status: int, location: str, target: str) -> None:
    assert mogplex.redirect_target(url, status, location) == target


class Tunnel:
    """A proxy that takes every CONNECT to one TLS server, which has a certificate for ``hosts``."""

    def __init__(self, tmp_path: Any, answer: Reply, *hosts: str) -> None:
        if trustme is None:
            pytest.skip("needs cryptography, whose wheel does not load under Wine")
        authority = trustme.CA()
        self.ca = str(tmp_path / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*hosts).configure_cert(self.context)
        self.asked: List[str] = []  # the hosts and ports
        self.server = RawServer(answer)
        self.proxy = RawServer(self.connect)

    def connect(self, number: int, request: str, connection: socket.socket) -> None:
        self.asked.append(request.split(" ")[1])
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with self.context.wrap_socket(connection, server_side=True) as inside:
            self.server._converse(inside)

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        self.proxy.__exit__()


def proxied(
    monkeypatch: pytest.MonkeyPatch, proxy: str, url: str = WWW, **options: Any,
) -> mogplex.Client:
    """A client that finds ``proxy`` in the environment."""
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    return client(url, trust_env=True, **options)


def test_the_token_follows_between_the_two_hosts_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    redirect = answer(308, Location=f"{BARE}/api/v1/mogplex/runs")
    order = steps(redirect, ok({"runId": "1"}), redirect)
    lines: List[str] = []
    body = {"repoId": "r", "prompt": "p"}
    with Tunnel(tmp_path, order, "www.mogplex.com", "mogplex.com") as tunnel:
        with proxied(monkeypatch, tunnel.proxy.url, verify=tunnel.ca, log=lines.append) as one:
            assert one.start_run(body, "key") == {"runId": "1"}
            assert tunnel.asked == ["www.mogplex.com:443", "mogplex.com:443"]
            for request, host in zip(tunnel.server.requests, ("www.mogplex.com", "mogplex.com")):
                head, _, sent = request.partition("\r\n\r\n")
                assert head.startswith("POST /api/v1/mogplex/runs HTTP/1.1\r\n")
                assert {
                    f"Host: {host}", f"Authorization: Bearer {TOKEN}", "Idempotency-Key: key",
                } <= set(head.split("\r\n"))
                assert json.loads(sent) == body
            [line] = lines
            assert line.startswith(f"POST {BARE}/api/v1/mogplex/runs 200 ") and TOKEN not in line
            with pytest.raises(mogplex.InvalidResponseError, match="redirect"):
                one.repos()  # answered by redirects alone
    assert len(tunnel.server.requests) == 4


@pytest.mark.parametrize("verify, url, words", [
    (True, BARE, "TLS: the TLS certificate is not valid: "),
    ("ca.pem", WWW, "not valid: .*www.mogplex.com"),
    ("nowhere.pem", BARE, "TLS: cannot read the CA certificates"),
    ("junk.pem", BARE, "cannot read the CA certificates"),
])
def test_tls_errors_say_so(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, verify: Any, url: str, words: str,
) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    if verify is not True:
        verify = str(tmp_path / verify)
    with Tunnel(tmp_path, steps(GOOD), "mogplex.com") as tunnel:
        with pytest.raises(mogplex.MogplexError, match=words) as error:
            proxied(monkeypatch, tunnel.proxy.url, url, verify=verify).repos()
        assert error.value.exit == 1 and not error.value.delivered
        assert not tunnel.server.requests


def test_a_certificate_of_a_given_authority_is_good(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Tunnel(tmp_path, steps(GOOD), "mogplex.com") as tunnel:
        with proxied(monkeypatch, tunnel.proxy.url, BARE, verify=tunnel.ca) as one:
            assert one.repos() == REPOS["repos"]


@pytest.mark.parametrize("step, words", [
    (answer(407), "407 Proxy Authentication Required|407 Status"),
    (answer(403), "403 Status"),
])
def test_a_proxy_that_refuses_is_named_without_its_password(
    step: Step, words: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RawServer(steps(step)) as server:
        address = server.url[len("http://"):]
        with pytest.raises(mogplex.UnavailableError, match=words) as error:
            proxied(monkeypatch, f"http://user:pa55w0rd@{address}", tries=1).repos()
    assert "pa55w0rd" not in str(error.value) + error.value.hint
    assert f"through the proxy http://{address}: " in str(error.value)
    assert error.value.hint == "check HTTPS_PROXY and NO_PROXY" and not error.value.delivered


@pytest.mark.parametrize("step, words", [
    (silent, "no (complete )?answer"),
    (lambda connection: None, "the connection was lost"),
])
def test_a_request_lost_in_a_proxy_may_have_arrived(
    step: Step, words: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RawServer(steps(step)) as server:
        proxy = server.url.replace("//", "//user:pa55w0rd@")
        with pytest.raises(mogplex.UnavailableError, match=words) as error:
            proxied(monkeypatch, proxy, timeout_s=0.5, tries=1).repos()
    assert "pa55w0rd" not in str(error.value) and error.value.delivered


UNUSABLE = mogplex.UsageError


@pytest.mark.parametrize("proxy, kind, words", [
    ("http://user:pa55w0rd@127.0.0.1:1", Unavailable, "//127.0.0.1:1: the connection was refused"),
    ("127.0.0.1:1", Unavailable, "through the proxy (http://)?127.0.0.1:1: "),
    ("http://nowhere.invalid:1", Unavailable, "//nowhere.invalid:1: the host name was not found"),
    ("socks5://user:pa55w0rd@127.0.0.1:1", UNUSABLE, "socks5://127.0.0.1:1 cannot be used"),
    ("http://[::1", UNUSABLE, "the proxy .* cannot be used"),
])
def test_a_dead_proxy_is_named(
    proxy: str, kind: type, words: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(mogplex.MogplexError, match=words) as error:
        proxied(monkeypatch, proxy, tries=1).repos()
    assert type(error.value) is kind and not error.value.delivered
    assert "pa55w0rd" not in str(error.value)


def test_this_machine_is_never_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with RawServer(steps(GOOD)) as server:
        assert client(server.url, trust_env=True).repos() == REPOS["repos"]


RUN_1 = ok({"runId": "1"})
LOST_STARTS: Dict[str, Step] = {  # after each of which the run may have been started
    "reset": reset_after(b""),
    "cut short": RUN_1[:-5],
    "a proxy's page": HTML,
    "nothing": answer(200),
    "408": answer(408),
}


@pytest.mark.parametrize("name", LOST_STARTS)
def test_a_start_is_repeated_under_its_key_whatever_became_of_its_answer(name: str) -> None:
    lost = LOST_STARTS[name]
    with RawServer(steps(lost, lost, RUN_1)) as server, client(server.url) as one:
        assert one.start_run({"repoId": "r"}, " k ") == {"runId": "1"}
    keys = [request.count("Idempotency-Key: k\r\n") for request in server.requests]
    assert keys == [1, 1, 1]


@pytest.mark.parametrize("order, tries", [
    ([answer(500), answer(500), RUN_1], 2),
    ([answer(500), reset_after(b""), RUN_1], 2),
    ([reset_after(b""), answer(500), answer(500)], 3),
])
def test_a_start_is_repeated_once_after_a_500(order: List[Step], tries: int) -> None:
    """Each try uses up the budget of ten a minute, and the second finds the run."""
    with RawServer(steps(*order)) as server, client(server.url, tries=5) as one:
        with pytest.raises(mogplex.MogplexError) as error:
            one.start_run({"repoId": "r"}, "k")
    assert len(server.requests) == tries and error.value.delivered


@pytest.mark.parametrize("data", [{}, {"runId": None}, {"runId": ""}, {"run": {"runId": "1"}}])
def test_a_start_without_a_run_s_id_is_an_invalid_response(data: Dict[str, Any]) -> None:
    with RawServer(steps(ok(data))) as server, client(server.url) as one:
        with pytest.raises(mogplex.InvalidResponseError, match="no 'runId'") as error:
            one.start_run({"repoId": "r"}, "k")
    assert error.value.delivered and len(server.requests) == 1


def test_a_start_refused_by_the_queue_is_found_by_its_one_repetition() -> None:
    failed = ok({"runId": "1", "status": "failed", "replayed": True})
    with RawServer(steps(answer(500), failed)) as server, client(server.url) as one:
        assert one.start_run({"repoId": "r"}, "k")["status"] == "failed"
    assert len(server.requests) == 2


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "a\nb", "\xe9"])
def test_an_impossible_idempotency_key_is_not_sent(key: str) -> None:
    with RawServer(steps(RUN_1)) as server, client(server.url) as one:
        with pytest.raises(mogplex.UsageError, match="idempotency key"):
            one.start_run({}, key)
    assert server.requests == []


def test_a_query_of_bytes_that_are_no_text_is_sent_with_replacements() -> None:
    with RawServer(lambda *_: ok({"repos": []})) as server, client(server.url) as asking:
        assert asking.repos(query="\udcff \u00e9", limit=3) == []
    assert server.requests[0].split()[1].endswith("/repos?q=%3F+%C3%A9&limit=3")


def test_a_start_that_may_have_arrived_says_so_though_a_later_try_did_not() -> None:
    order = steps(reset_after(b""), refusal(400, "BAD_REQUEST", "no"))
    with RawServer(order) as server, client(server.url) as one:
        with pytest.raises(mogplex.MogplexError, match="HTTP 400") as error:
            one.start_run({"repoId": "r"}, "k")
    assert error.value.delivered


NO_REPO = ok({"repos": []})
LIMITER_DOWN = refusal(503, "SERVICE_UNAVAILABLE", "External Mogplex run rate limit unavailable")


def start_answered(listed: bytes, *starts: Step) -> Tuple[mogplex.MogplexError, List[str]]:
    """The error of a start that goes through ``starts``, and the methods of all requests."""
    order = steps(*starts)
    tried: List[int] = []

    def route(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        if "/repos?id=nope" in request:
            return listed
        tried.append(number)
        return order(len(tried), request, connection)
    with RawServer(route) as server, client(server.url) as one:
        with pytest.raises(mogplex.MogplexError) as error:
            one.start_run({"repoId": "nope"}, "k")
    return error.value, [request.split(" ")[0] for request in server.requests]


def test_a_start_on_a_repo_that_is_not_listed_fails_at_once() -> None:
    error, methods = start_answered(NO_REPO, LIMITER_DOWN)
    assert str(error) == "NOT_FOUND: the service lists no repo 'nope' (HTTP 503)"
    assert int(error.exit) == 1 and not error.transient and not error.delivered
    assert methods == ["POST", "GET"]


@pytest.mark.parametrize("listed", [
    GOOD, answer(500), answer(503), ok([]), ok(None), ok({"repos": None}), ok({}), HTML,
])
def test_a_503_stays_one_when_the_list_of_repos_proves_nothing(listed: bytes) -> None:
    error, methods = start_answered(listed, LIMITER_DOWN)
    assert int(error.exit) == 69 and error.delivered and "SERVICE_UNAVAILABLE" in str(error)
    assert methods == ["POST", "GET", "POST", "POST"]


@pytest.mark.parametrize("listed", [NO_REPO, ok([]), ok({"repos": None}), answer(500)])
@pytest.mark.parametrize("lost", [
    reset_after(b""), RUN_1[:-5], answer(500), HTML,
    answer(503, "<html>", Content_Type="text/html"),  # a proxy's: what it had sent on is not known
])
def test_a_start_that_may_have_got_through_is_never_one_without_a_repo(
    lost: Step, listed: bytes,
) -> None:
    error, _ = start_answered(listed, lost, LIMITER_DOWN)
    assert int(error.exit) == 69 and error.delivered


class Late(RawServer):
    """A server that refuses connections until ``begin`` is called."""

    def __init__(self, answer: Reply) -> None:
        self.answer = answer
        self.requests: List[str] = []
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def begin(self, _: float) -> None:
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()


def test_a_start_whose_connection_was_refused_is_no_earlier_try() -> None:
    with Late(steps(LIMITER_DOWN, NO_REPO)) as server:
        with client(server.url, sleep=server.begin) as one:
            with pytest.raises(mogplex.MogplexError, match="lists no repo 'r'") as error:
                one.start_run({"repoId": "r"}, "k")
    assert not error.value.delivered and len(server.requests) == 2


@pytest.mark.parametrize("tries", [1, 3])
def test_a_429_is_never_retried(tries: int) -> None:
    slow = refusal(429, "RATE_LIMITED", "slow", Retry_After="1")
    with RawServer(steps(slow)) as server, client(server.url, tries=tries) as one:
        for call in (one.repos, lambda: one.start_run({"repoId": "r"}, "k")):
            with pytest.raises(mogplex.RateLimitedError) as error:
                call()  # type: ignore[operator]
            assert error.value.retry_after_s == 1.0
    assert len(server.requests) == 2


@pytest.mark.parametrize("error, attempt, keyed, again", [
    (mogplex.UnavailableError("x", transient=True), 1, False, True),
    (mogplex.UnavailableError("x", transient=True), 3, False, False),
    (mogplex.UnavailableError("x"), 1, False, False),
    (mogplex.UnavailableError("x", transient=True, retry_after_s=5.0), 1, False, True),
    (mogplex.UnavailableError("x", transient=True, retry_after_s=5.1), 1, False, False),
    (mogplex.RateLimitedError("x", transient=True), 1, True, False),
    (mogplex.InvalidResponseError("x", transient=True), 1, False, False),
    (mogplex.InvalidResponseError("x", transient=True), 1, True, True),
])
def test_what_a_one_shot_command_retries(
    error: mogplex.MogplexError, attempt: int, keyed: bool, again: bool,
) -> None:
    assert mogplex.should_retry(error, attempt, 3, keyed) == again


def test_the_wait_before_a_retry_is_what_is_asked_for_but_no_less_than_the_back_off() -> None:
    asked = mogplex.UnavailableError("x", retry_after_s=2.0)
    assert mogplex.retry_delay_s(asked, 1, 0.0) == 2.0
    assert mogplex.retry_delay_s(asked, 5, 0.0) == 8.0
    assert mogplex.retry_delay_s(mogplex.UnavailableError("x"), 2, 0.0) == 1.0


@pytest.mark.parametrize("call, odd", [
    (lambda one: one.run("a/b"), "a/b"),
    (lambda one: one.events("nope"), "nope"),
    (lambda one: one.sandbox_logs("sbx_1"), "sbx_1"),
    (lambda one: one.sandboxes(repo_id="x y"), "x y"),
    (lambda one: next(VirtualClock().tail(one, "nope")), "nope"),
])
def test_a_malformed_id_is_said_to_look_wrong(
    call: Callable[[mogplex.Client], Any], odd: str,
) -> None:
    with RawServer(steps(refusal(500, "INTERNAL_ERROR", "Internal server error"))) as server:
        with pytest.raises(mogplex.MogplexError, match="INTERNAL_ERROR") as error:
            call(client(server.url))
    assert error.value.hint == f"'{odd}' does not look like an id of the service"


@pytest.mark.parametrize("call", [
    lambda one: one.run(NOWHERE), lambda one: one.repos(query="x"), lambda one: one.models(),
])
def test_a_500_without_a_malformed_id_has_no_hint(call: Callable[[mogplex.Client], Any]) -> None:
    with RawServer(steps(refusal(500, "INTERNAL_ERROR", "Internal server error"))) as server:
        with pytest.raises(mogplex.MogplexError, match="INTERNAL_ERROR") as error:
            call(client(server.url))
    assert error.value.hint == ""


def test_another_fault_than_a_500_does_not_blame_the_id() -> None:
    with RawServer(steps(answer(502))) as server, client(server.url, tries=1) as one:
        with pytest.raises(mogplex.UnavailableError) as error:
            one.run("nope")
    assert error.value.hint == ""


def test_too_many_sign_ins_say_how_long_to_wait() -> None:
    """The token endpoint's 429 is plain text, and names its wait in a header of its own."""
    with RawServer(steps(answer(429, "slow down", X_Retry_After="17"))) as server:
        with pytest.raises(mogplex.RateLimitedError) as error:
            client(server.url).post_form(server.url + "/token", {"code": "c"})
    assert str(error.value) == "too many sign-ins (HTTP 429)"
    assert error.value.retry_after_s == 17.0


@pytest.mark.parametrize("step, told", [
    (answer(401, {"error": "invalid_grant"}), (401, {"error": "invalid_grant"})),
    (answer(500), (500, {})),
    (answer(200, "[1]"), (200, {})),
    (HTML, (200, {})),
])
def test_a_form_is_posted_without_the_token(step: bytes, told: Tuple[int, Any]) -> None:
    with RawServer(steps(step)) as server, client(server.url) as one:
        assert one.post_form(server.url + "/token", {"code": "c d"}) == told
    [request] = server.requests
    assert "authorization" not in request.lower() and TOKEN not in request
    assert "Content-Type: application/x-www-form-urlencoded\r\n" in request
    assert request.endswith("\r\n\r\ncode=c+d")


@pytest.mark.parametrize("identifier, path", [
    ("a/../b?c#d%", "a%2F..%2Fb%3Fc%23d%25"),
    ("\u00e9 \ud800", "%C3%A9%20%3F"),
    (" x ", "x"),
])
def test_ids_stay_in_their_segment(identifier: str, path: str) -> None:
    with RawServer(steps(ok({"run": {}}))) as server, client(server.url) as one:
        one.run(identifier)
    assert server.requests[0].startswith(f"GET /api/v1/mogplex/runs/{path} HTTP/1.1")


@pytest.mark.parametrize("identifier", ["", ".", " .. "])
def test_what_would_name_another_path_is_no_id(identifier: str) -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        with pytest.raises(mogplex.UsageError, match="invalid id"):
            one.run(identifier)
    assert server.requests == []


def renewable(url: str, **more: Any) -> mogplex.Credential:
    return mogplex.Credential("old", base_url=url, refresh_token="refresh-0", **more)


def test_a_refused_token_is_renewed_once_and_the_request_repeated() -> None:
    said: List[str] = []

    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        tokens = re.findall("Bearer (.*)\r", request)
        said.append(" ".join([request.split(" ")[1].rpartition("/")[2], *tokens]))
        if "/token" in request:
            return answer(200, {"access_token": "new", "expires_in": 3600})
        if tokens == ["new"]:
            return ok({"runId": "1"})
        return refusal(401, "UNAUTHORIZED", "Unauthorized")
    with RawServer(reply) as server, mogplex.Client(renewable(server.url), server.url) as one:
        assert one.start_run({"repoId": "r"}, "k") == {"runId": "1"}
    assert said == ["runs old", "token", "runs new"]


def test_a_refused_token_that_nothing_can_renew_is_refused() -> None:
    with RawServer(steps(refusal(401, "UNAUTHORIZED", "Unauthorized"))) as server:
        with mogplex.Client(mogplex.Credential("never"), server.url) as one:
            with pytest.raises(mogplex.UnauthorizedError):
                one.repos()
    assert len(server.requests) == 1


def test_a_refused_token_is_not_renewed_where_that_is_not_wanted() -> None:
    with RawServer(steps(refusal(401, "UNAUTHORIZED", "Unauthorized"))) as server:
        with mogplex.Client(renewable(server.url), server.url) as one:
            with one.open_run("r", lambda: None, renew=False) as exchange:
                assert exchange.status == 401
    assert len(server.requests) == 1


@pytest.mark.parametrize("step", [
    answer(500), answer(502), reset_after(b""), answer(429), HTML,
])
def test_a_refresh_that_fails_delivers_no_request(step: Step) -> None:
    with RawServer(steps(step)) as server:
        credential = renewable(server.url, expires_at=1.0)
        with mogplex.Client(credential, server.url, sleep=lambda _: None) as one:
            with pytest.raises(mogplex.MogplexError) as error:
                one.start_run({"repoId": "r"}, "k")
    assert not error.value.delivered
    assert all("/token" in request for request in server.requests)


class Kept(RawServer):
    """A server that keeps its connections, and answers as RawServer does.

    ``used`` has for each request the number of its connection.
    """

    def __init__(self, answer: Callable[[int, str, socket.socket], Optional[bytes]]) -> None:
        self.used: List[int] = []
        self.connections = 0
        super().__init__(answer)

    def _converse(self, connection: socket.socket) -> None:
        self.connections += 1
        number = self.connections
        with connection, contextlib.suppress(OSError):
            while True:
                request = read_request(connection)
                if not request:
                    return
                self.used.append(number)
                self.requests.append(request)
                data = self.answer(len(self.requests), request, connection)
                if data is not None:
                    connection.sendall(data)


def kept(data: bytes) -> bytes:
    """The bytes of an answer after which the connection stays open."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


def chunked(data: bytes, trailers: bytes = b"") -> bytes:
    """The same, with its body in chunks."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(data), data, trailers)


@pytest.mark.parametrize("body", [kept(envelope(REPOS)), chunked(envelope(REPOS))])
def test_a_connection_is_kept(body: bytes) -> None:
    with Kept(lambda *_: body) as server, client(server.url) as one:
        for _ in range(3):
            assert one.repos() == REPOS["repos"]
        assert server.used == [1, 1, 1]


def test_a_connection_that_speaks_another_protocol_now_is_never_used_again() -> None:
    upgraded = b"HTTP/1.1 101 X\r\nUpgrade: y\r\n\r\n"
    with Kept(lambda number, *_: upgraded if number == 1 else kept(envelope(REPOS))) as server:
        with client(server.url, tries=1) as one:
            with pytest.raises(mogplex.InvalidResponseError):
                one.repos()
            assert one.repos() == REPOS["repos"]
    assert server.used == [1, 2]


def test_a_connection_idle_for_long_is_closed_by_us() -> None:
    """The service closes it after 5 to 6 s; a request sent just then would be lost."""
    now = [0.0]
    with Kept(lambda *_: kept(envelope(REPOS))) as server, client(server.url) as one:
        one.transport.clock = lambda: now[0]
        for idle_s in (0.0, 4.0, 4.4, 4.6, 4.4):
            now[0] += idle_s
            one.repos()
    assert server.used == [1, 1, 1, 2, 2]


def leave_at_once(exchange: mogplex.Exchange) -> None:
    pass


def leave_in_the_body(exchange: mogplex.Exchange) -> None:
    assert exchange.piece(10.0)


@pytest.mark.parametrize("leave", [leave_at_once, leave_in_the_body])
def test_a_connection_left_before_the_end_of_an_answer_is_never_used_again(
    leave: Callable[[mogplex.Exchange], None],
) -> None:
    """Nobody knows where on it the next answer would begin."""
    first = chunked(envelope({"run": {"runId": "x"}}))[:-5]
    order = steps(first, kept(envelope(REPOS)))
    with Kept(order) as server, client(server.url) as one:
        with one.open_run("x", lambda: None) as exchange:
            leave(exchange)
        assert one.repos() == REPOS["repos"]
    assert server.used == [1, 2]


def test_a_connection_whose_answer_was_too_large_or_garbled_is_never_used_again() -> None:
    bad = b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 5\r\n\r\n"
    redirect = b"HTTP/1.1 302 X\r\nLocation: https://b.example\r\nContent-Length: 5\r\n\r\n"
    with Kept(steps(bad, redirect, kept(envelope(REPOS)))) as server, client(server.url) as one:
        for _ in range(2):
            with pytest.raises(mogplex.InvalidResponseError):
                one.repos()
        assert one.repos() == REPOS["repos"]
    assert server.used == [1, 2, 3]


INTERIM = {
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n",
    "100 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
    "103 and 100": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
    "an unknown one": b"HTTP/1.1 199 New\r\nContent-Length: 7\r\n\r\n",
    "many": b"HTTP/1.1 102 Processing\r\n\r\n" * 50,
}


@pytest.mark.parametrize("name", INTERIM)
@pytest.mark.parametrize("form", [kept, chunked])
def test_interim_answers_are_passed_over(form: Callable[[bytes], bytes], name: str) -> None:
    """And on the kept connection the next call gets its own answer."""
    answers = [envelope({"run": {"runId": str(number)}}) for number in range(3)]
    with Kept(lambda number, *_: INTERIM[name] + form(answers[number - 1])) as server:
        with client(server.url, tries=1) as one:
            assert [one.run(str(number))["runId"] for number in range(3)] == ["0", "1", "2"]
    assert server.used == [1, 1, 1]


def test_interim_answers_are_passed_over_before_one_that_ends_the_connection() -> None:
    with Kept(lambda *_: INTERIM["103"] + GOOD) as server, client(server.url, tries=1) as one:
        assert one.repos() == one.repos() == REPOS["repos"]
    assert server.used == [1, 2]


def test_interim_answers_without_end_are_a_time_out() -> None:
    with RawServer(steps(dribble(b"", INTERIM["102"]))) as server:
        with client(server.url, timeout_s=0.3, tries=1) as one:
            with pytest.raises(mogplex.UnavailableError, match="no (complete )?answer"):
                one.repos()


ELSEWHERE = {"run": {"runId": "other", "status": "success"}, "events": []}


@pytest.mark.parametrize("call", [
    lambda one: one.run("mine"), lambda one: one.events("mine"), lambda one: one.cancel("mine"),
    lambda one: one.open_run("mine", lambda: None).__enter__().data(),
    lambda one: one.open_events("mine", lambda: None, True, 9, "", 9.0).__enter__().data(),
])
def test_another_run_s_answer_is_an_invalid_response(call: Callable[[mogplex.Client], Any]) -> None:
    with RawServer(steps(ok(ELSEWHERE))) as server, client(server.url) as one:
        with pytest.raises(mogplex.InvalidResponseError, match="another run, 'other'"):
            call(one)


def test_a_run_s_id_may_come_in_another_case_or_not_at_all() -> None:
    for run in ({"runId": "MINE"}, {}, {"runId": None}):
        with RawServer(steps(ok({"run": run}))) as server, client(server.url) as one:
            assert one.run("mine") == run


LISTS = {
    "repos": lambda one: one.repos(),
    "sandboxes": lambda one: one.sandboxes(),
    "agents": lambda one: one.agents(),
    "models": lambda one: one.models(),
    "servers": lambda one: one.mcp_servers(),
    "events": lambda one: one.events("r"),
}
OBJECTS = {
    "run": lambda one: one.run("r"),
    "sandbox": lambda one: one.create_sandbox({}),
}


@pytest.mark.parametrize("key", [*LISTS, *OBJECTS])
@pytest.mark.parametrize("wrong", [{}, None, "x", 5, True])
def test_an_answer_without_its_list_or_object_is_an_invalid_response(key: str, wrong: Any) -> None:
    call = LISTS.get(key) or OBJECTS[key]
    data = {} if wrong == {} else {key: wrong}
    with RawServer(steps(ok(data))) as server, client(server.url) as one:
        words = f"no (list|object) '{key}'"
        with pytest.raises(mogplex.InvalidResponseError, match=words) as error:
            call(one)
    assert int(error.value.exit) == 1


def test_logs_without_their_sandbox_or_events_are_an_invalid_response() -> None:
    for data in ({"sandbox": {}}, {"lifecycle_events": []}, {}):
        with RawServer(steps(ok(data))) as server, client(server.url) as one:
            with pytest.raises(mogplex.InvalidResponseError):
                one.sandbox_logs("s")


def test_an_empty_list_is_none() -> None:
    for key, call in LISTS.items():
        with RawServer(steps(ok({key: []}))) as server, client(server.url) as one:
            assert call(one) in ([], {"events": []})


def test_a_sandbox_is_created_once_and_never_twice() -> None:
    """The service takes no idempotency key for it."""
    body = {"repoId": "r", "baseBranch": "main", "createBranch": True}
    made = answer(202, {"ok": True, "data": {"sandbox": {"id": "s"}}})
    with RawServer(steps(made, reset_after(b""), answer(502))) as server, client(server.url) as one:
        assert one.create_sandbox(body) == {"id": "s"}
        for number in (2, 3):
            with pytest.raises(mogplex.UnavailableError) as error:
                one.create_sandbox(body)
            assert error.value.delivered and len(server.requests) == number
    head, _, sent = server.requests[0].partition("\r\n\r\n")
    assert head.startswith("POST /api/v1/mogplex/sandboxes HTTP/1.1\r\n")
    assert "Content-Type: application/json" in head and json.loads(sent) == body


def test_the_configs_of_mcp_servers_are_handed_to_nobody() -> None:
    """They hold live secrets."""
    secret = "s3cret-" * 5
    servers = [
        {"name": "a", "enabled": True, "config": {"url": f"https://x/{secret}", "headers": {}}},
        {"name": "b", "enabled": False, "config": {"command": "x", "env": {"KEY": secret}}},
        {"name": "c", "enabled": None, "config": {"args": [secret]}, "token": secret},
        {"name": "d", "enabled": True, "config": secret},
    ]
    with RawServer(steps(ok({"servers": servers}))) as server, client(server.url) as one:
        assert one.mcp_servers() == [
            {"name": "a", "enabled": True, "kind": "http"},
            {"name": "b", "enabled": False, "kind": "stdio"},
            {"name": "c", "enabled": None, "kind": ""},
            {"name": "d", "enabled": True, "kind": ""},
        ]


def test_any_route_can_be_asked() -> None:
    with RawServer(lambda *_: ok({"x": 1})) as server, client(server.url) as one:
        assert one.request("GET", "/automations", params={"limit": 5, "cursor": ""}) == {"x": 1}
        one.request("PUT", "/automations/a", body={"name": "n"})
        one.request("POST", "/automations/a/trigger", body={"repoId": "r"}, idempotency_key="k")
    lines = [request.split(" HTTP")[0] for request in server.requests]
    assert lines == [
        "GET /api/v1/mogplex/automations?limit=5",
        "PUT /api/v1/mogplex/automations/a",
        "POST /api/v1/mogplex/automations/a/trigger",
    ]
    assert server.requests[1].endswith('{"name": "n"}')
    assert "Idempotency-Key: k\r\n" in server.requests[2]


@pytest.mark.parametrize("method, options, tries", [
    ("GET", {}, 3), ("PUT", {"body": {}}, 3), ("DELETE", {}, 3),
    ("POST", {"body": {}}, 1), ("PATCH", {"body": {}}, 1),
])
def test_any_route_is_asked_again_where_that_does_no_harm(
    method: str, options: Dict[str, Any], tries: int,
) -> None:
    with RawServer(steps(answer(502))) as server, client(server.url) as one:
        with pytest.raises(mogplex.UnavailableError):
            one.request(method, "/x", **options)
    assert len(server.requests) == tries


@pytest.mark.parametrize("path, tries", [
    ("/runs", 3), ("/automations/a/trigger", 3),
    ("/sandboxes", 1), ("/runs/r/cancel", 1), ("/automations", 1), ("/automations/a/b/trigger", 1),
])
def test_a_key_makes_a_post_repeatable_only_where_the_service_honours_it(
    path: str, tries: int,
) -> None:
    with RawServer(steps(answer(502))) as server, client(server.url) as one:
        with pytest.raises(mogplex.UnavailableError):
            one.request("POST", path, body={}, idempotency_key="k")
    assert len(server.requests) == tries


@pytest.mark.parametrize("method, key", [("PATCH", "k"), ("POST", "")])
def test_what_is_no_post_with_a_key_is_sent_once_even_where_keys_are_honoured(
    method: str, key: str,
) -> None:
    with RawServer(steps(answer(502))) as server, client(server.url) as one:
        with pytest.raises(mogplex.UnavailableError):
            one.request(method, "/runs", body={}, idempotency_key=key)
    assert len(server.requests) == 1


@pytest.mark.parametrize("data", [None, [], [1], "x", {"a": 1}])
def test_an_envelope_is_given_whole_whatever_its_data(data: Any) -> None:
    whole = {"ok": True, "data": data, "more": 1}
    with RawServer(lambda *_: answer(200, json.dumps(whole).encode())) as server:
        with client(server.url) as one:
            assert one.envelope("GET", "/x", query="a=1&a=") == whole
    assert server.requests[0].startswith("GET /api/v1/mogplex/x?a=1&a= HTTP")


def test_an_envelope_may_be_missing_after_a_204_alone() -> None:
    with one_answer(answer(204)) as server, client(server.url) as one:
        assert one.envelope("DELETE", "/x") == {"ok": True, "data": None}
    with one_answer(answer(200, b'{"ok": true}')) as server, client(server.url, tries=1) as one:
        with pytest.raises(mogplex.InvalidResponseError):
            one.envelope("GET", "/x")


@pytest.mark.parametrize("path", [
    "", "x", "/a b", "/a?b", "/a#b", "/a\\b", "/a\nb", "@evil", "//evil", "/a/", "/..", "/a/../b",
    "/a/.", "/a/%2e%2E/b", "/a/.%2e", "/%252e%252e/b", "/a%2fb", "/a%5Cb", "/a%0d%0ab", "/a%00"])
def test_a_path_that_would_lead_elsewhere_is_refused(path: str) -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        with pytest.raises(mogplex.UsageError, match="invalid path"):
            one.request("GET", path)
    assert server.requests == []


@pytest.mark.parametrize("body, words", [
    ({"x": float("nan")}, "not JSON"), ({"x": {1}}, "not JSON"), ({"x": b"y"}, "not JSON"),
    (functools.reduce(lambda inner, _: {"x": inner}, range(100000), {}), "nested too deeply"),
])
def test_a_body_that_cannot_be_sent_is_a_usage_error(body: Dict[str, Any], words: str) -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        with pytest.raises(mogplex.UsageError, match=words):
            one.request("POST", "/x", body=body)
    assert server.requests == []


def workers() -> List[str]:
    """What the threads of exchanges that are alive are doing."""
    stacks = ["".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()]
    return [stack for stack in stacks if "self.send_request()" in stack or "self._read(" in stack]


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/dev/fd"))


def comes_true(condition: Callable[[], bool], within_s: float = 60.0) -> bool:
    """Whether ``condition`` becomes true within that time."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


ENDLESS: Dict[str, Step] = {
    "silence": silent,
    "the status line": dribble(b"", b"H"),
    "headers": dribble(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "one header": dribble(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "a body": dribble(CUT + b"Content-Length: 99999\r\n\r\n", b" "),
    "chunks": dribble(CHUNKED, b"1\r\n \r\n"),
    "a chunk's size": dribble(CHUNKED, b"0"),
    "trailers": dribble(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n"),
    "interim answers": dribble(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
}


@pytest.mark.posix
@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("is_tls", [False, True])
def test_after_a_time_out_neither_thread_nor_descriptor_lives_on(
    name: str, is_tls: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.ExitStack() as stack:
        if is_tls:
            tunnel = stack.enter_context(Tunnel(tmp_path, steps(ENDLESS[name]), "mogplex.com"))
            one = proxied(
                monkeypatch, tunnel.proxy.url, BARE, verify=tunnel.ca, timeout_s=0.25, tries=1)
        else:
            server = stack.enter_context(RawServer(steps(ENDLESS[name])))
            one = client(server.url, timeout_s=0.1, tries=1)
        threads = len(workers())
        opened = descriptors()
        with pytest.raises(mogplex.UnavailableError):
            one.repos()
        assert comes_true(lambda: len(workers()) <= threads and descriptors() <= opened)


def dribble_a_handshake(connection: socket.socket) -> None:
    """Open a tunnel, then begin the longest TLS record there is, byte by byte."""
    dribble(b"HTTP/1.1 200 Connected\r\n\r\n\x16\x03\x03\x3f\xff\x02\x00\x3f\xf0", b"x")(connection)


@pytest.mark.posix
@pytest.mark.parametrize("step", [
    dribble(b"HTTP/1.1 200 Connected\r\n", b"X: y\r\n"), dribble_a_handshake,
])
def test_neither_does_a_tunnel_s_or_a_tls_handshake(
    step: Step, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RawServer(steps(step)) as server:
        threads = len(workers())
        opened = descriptors()
        with pytest.raises(mogplex.UnavailableError):
            proxied(monkeypatch, server.url, BARE, timeout_s=0.3, tries=1).repos()
        assert comes_true(lambda: len(workers()) <= threads and descriptors() <= opened)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["a body", "chunks", "trailers"])
def test_a_given_session_s_connection_is_closed_from_outside_too(name: str) -> None:
    import requests
    with RawServer(steps(ENDLESS[name])) as server, requests.Session() as session:
        threads = len(workers())
        opened = descriptors()
        with pytest.raises(mogplex.UnavailableError):
            client(server.url, timeout_s=0.3, tries=1, session=session).repos()
        assert comes_true(lambda: len(workers()) <= threads and descriptors() <= opened)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["silence", "headers", "trailers"])
def test_neither_does_it_on_a_kept_connection(name: str) -> None:
    endless = ENDLESS[name]

    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        return kept(envelope(REPOS)) if number == 1 else steps(endless)(number, request, connection)
    with Kept(reply) as server, client(server.url, timeout_s=0.3, tries=1) as one:
        threads = len(workers())
        one.repos()
        with pytest.raises(mogplex.UnavailableError):
            one.repos()
        assert server.used == [1, 1]
        assert comes_true(lambda: len(workers()) <= threads)


@pytest.mark.posix
def test_whoever_leaves_a_stream_takes_its_thread_and_connection_along() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with RawServer(steps(dribble(head, b": x\n\n"))) as server, client(server.url) as one:
        threads = len(workers())
        opened = descriptors()
        with one.open_events("r", lambda: None, True, 9, "", 9.0) as exchange:
            assert exchange.streams and exchange.piece(10.0)
        assert comes_true(lambda: len(workers()) <= threads and descriptors() <= opened)


@pytest.mark.posix
def test_many_requests_leave_no_descriptor_behind() -> None:
    """Each holds a duplicate of its socket while it lasts."""
    with Kept(lambda *_: kept(envelope(REPOS))) as server, client(server.url) as one:
        one.repos()
        opened = descriptors()
        for _ in range(20):
            one.repos()
        assert comes_true(lambda: descriptors() <= opened)
    assert set(server.used) == {1}


@pytest.mark.posix
def test_a_thread_that_cannot_be_started_is_one_clear_line() -> None:
    """Windows takes no size of a stack that there is no room for."""
    size = threading.stack_size(1 << 46)  # more than there is room for
    try:
        with pytest.raises(mogplex.MogplexError, match="cannot start a thread: ") as error:
            client("http://127.0.0.1:1", tries=1).repos()
    finally:
        threading.stack_size(size)
    assert type(error.value) is mogplex.MogplexError and not error.value.delivered


def forked(child: Callable[[], object]) -> int:
    """Run ``child`` in a fork, which ends within 60 s; its process id."""
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    code = 1
    try:
        child()
        code = 0
    finally:
        os._exit(code)


def echo_run(number: int, request: str, connection: socket.socket) -> bytes:
    """The answer about the run that was asked for."""
    run_id = request.split(" ")[1].rpartition("/")[2]
    return kept(envelope({"run": {"runId": run_id}}))


@pytest.mark.posix
@forks
@pytest.mark.parametrize("is_given", [False, True])
def test_both_sides_of_a_fork_have_connections_of_their_own(is_given: bool) -> None:
    """On one connection each would get the other's answers."""
    import requests
    session = requests.Session() if is_given else None
    with Kept(echo_run) as server, client(server.url, session=session) as one:
        def ask(side: str) -> None:
            for number in range(20):
                assert one.run(f"{side}{number}")["runId"] == f"{side}{number}"
        ask("before")
        child = forked(lambda: ask("child"))
        ask("parent")
        assert os.waitpid(child, 0)[1] == 0
        asked = [request.split(" ")[1].rpartition("/")[2] for request in server.requests]
        used = dict(zip(asked, server.used))
        assert used["before0"] == used["parent19"] and used["child0"] != used["before0"]
    if session:
        session.close()


@pytest.mark.posix
@forks
def test_a_fork_while_a_thread_holds_the_client_s_lock_holds_up_nobody() -> None:
    children: List[int] = []
    with Kept(lambda *_: kept(envelope(REPOS))) as server, client(server.url) as one:
        one.repos()

        def clock() -> float:  # read under the lock
            if not children:
                children.append(-1)
                children[0] = forked(one.repos)
            return time.monotonic()
        one.transport.clock = clock
        assert one.repos() == REPOS["repos"]
        assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.posix
@forks
def test_a_fork_during_a_refresh_holds_up_nobody() -> None:
    """Nor does the child wait at its end for a refresh that is its parent's."""
    children: List[int] = []

    def post(url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
        if not children:  # called while the credential is locked
            children.append(-1)
            children[0] = forked(renew_and_settle)
        return 200, {"access_token": "t" * 20, "refresh_token": "r" * 20, "expires_in": 3600}

    def renew_and_settle() -> None:
        assert credential.settle(0.0)
        assert credential.renew("old token", post)

    credential = mogplex.Credential("o" * 20, refresh_token="r" * 20, base_url="https://www.mogplex.com", expires_at=1.0)
    assert credential.renew("o" * 20, post)
    assert os.waitpid(children[0], 0)[1] == 0


@pytest.mark.posix
@forks
def test_a_fork_s_child_that_ends_does_not_end_its_parent_s_stream() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with RawServer(steps(dribble(head, b": x\n\n"))) as server, client(server.url) as one:
        with one.open_events("r", lambda: None, True, 9, "", 9.0) as exchange:
            assert exchange.piece(10.0)
            child = forked(exchange.__exit__)
            assert os.waitpid(child, 0)[1] == 0
            for _ in range(20):
                assert exchange.piece(10.0)


@pytest.mark.parametrize("url", [
    "http://10.0.0.1", "http://mogplex.com", "http://127.0.0.1.evil.example", "https://[::1",
    "mogplex.com", "//mogplex.com", "", "ftp://mogplex.com", "https://me:pw@mogplex.com",
    "https://h?q", "https://h:99999", "https://h/a b",
])
def test_a_base_url_that_would_send_the_token_in_clear_or_nowhere_is_refused(url: str) -> None:
    with pytest.raises(mogplex.UsageError, match="base_url") as error:
        mogplex.Client(TOKEN, base_url=url)
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_embedder_may_use_http_to_this_machine(host: str) -> None:
    assert mogplex.Client(TOKEN, f"http://{host}:1/api/").base_url == f"http://{host}:1/api"


def test_a_sign_in_is_not_renewed_in_clear() -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        with pytest.raises(mogplex.UsageError, match="http://10.0.0.1"):
            one.post_form("http://10.0.0.1/api/auth/mcp/token", {"refresh_token": "r"})
    assert server.requests == []


@pytest.mark.parametrize("token", [None, ""])
def test_no_token_is_an_unauthorized_error(token: Any) -> None:
    with pytest.raises(mogplex.UnauthorizedError):
        mogplex.Client(token)


REFRESH_TOKEN = "refresh-" + "R3fresh" * 4
ECHOES: Dict[str, Callable[[str], Step]] = {
    "message": lambda text: refusal(400, "BAD", f"not {text}"),
    "cut message": lambda text: refusal(400, "BAD", "y" * 985 + text),
    "code": lambda text: refusal(400, f"BAD_{text}", "no"),
    "bare error": lambda text: answer(504, {"error": f"no {text}"}),
    "type": lambda text: answer(200, "<html>", Content_Type=f"text/{text}"),
    "redirect": lambda text: answer(302, Location=f"https://x.invalid/{text}"),
    "cut redirect": lambda text: answer(302, Location="https://x.invalid/" + "y" * 470 + text),
    "encoding": lambda text: answer(200, b"", Content_Encoding=text),
    "status line": lambda text: f"HTTP/1.1 {text}\r\n\r\n".encode(),
    "another run": lambda text: ok({"run": {"runId": text}}),
    "data": lambda text: ok({"run": {"runId": "r", "error": f"it said {text}"}}),
    "a key": lambda text: ok({"run": {"runId": "r", text: 1}}),
}
SPELLINGS: Dict[str, Callable[[str], str]] = {
    "plain": str,
    "in base64": lambda secret: base64.b64encode(f"x:{secret}".encode()).decode(),
    "coloured": lambda secret: f"{secret[:9]}\x1b[31m{secret[9:]}\x1b[0m",
    "with invisible characters": "\u200b".join,
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("secret", [TOKEN, REFRESH_TOKEN])
def test_no_answer_and_no_error_holds_a_token(echo: str, spelling: str, secret: str) -> None:
    told = SPELLINGS[spelling](secret)
    credential = mogplex.Credential(TOKEN, refresh_token=REFRESH_TOKEN)
    lines: List[str] = []
    shown = ""
    with RawServer(steps(ECHOES[echo](told))) as server:
        with mogplex.Client(credential, server.url, tries=1, log=lines.append) as one:
            try:
                shown = repr(one.run("r"))
            except mogplex.MogplexError as error:
                shown = f"{error!r} {error} {error.hint} {error.code}"
    for text in (shown, *lines):
        assert told[8:16] not in text and secret not in text


def test_a_token_in_a_request_is_not_in_its_log_or_error() -> None:
    """``mogplex runs get $MOGPLEX_API_KEY`` is a slip of the hand."""
    lines: List[str] = []
    with RawServer(steps(answer(500))) as server:
        with client(server.url, tries=1, log=lines.append) as one:
            with pytest.raises(mogplex.MogplexError) as error:
                one.run(TOKEN)
    assert TOKEN not in f"{error.value!r} {error.value.hint} {lines}" and len(lines) == 1


def test_a_given_session_keeps_its_certificates_proxies_and_adapters(tmp_path: Any) -> None:
    import requests
    import requests.adapters
    seen: List[Tuple[Any, Any, Any]] = []

    class Adapter(requests.adapters.HTTPAdapter):
        def send(self, request: Any, *args: Any, **settings: Any) -> Any:
            seen.append((settings["verify"], settings["cert"], dict(settings["proxies"])))
            return super().send(request, *args, **settings)
    certificate = str(tmp_path / "client.pem")
    (tmp_path / "client.pem").write_text("")
    with RawServer(steps(GOOD)) as server, requests.Session() as session:
        session.trust_env = False
        session.verify = False
        session.cert = certificate
        session.proxies = {"http": server.url}
        session.mount("http://", Adapter())
        assert client("http://localhost:1", session=session).repos() == REPOS["repos"]
        assert server.requests[0].startswith("GET http://localhost:1/api/v1/mogplex/repos ")
    assert seen == [(False, certificate, {"http": server.url})]


def test_what_a_client_with_a_session_is_asked_for_counts() -> None:
    import requests
    import requests.adapters
    seen: List[Any] = []

    class Adapter(requests.adapters.HTTPAdapter):
        def send(self, request: Any, *args: Any, **settings: Any) -> Any:
            seen.append(settings["verify"])
            return super().send(request, *args, **settings)
    with RawServer(steps(GOOD)) as server, requests.Session() as session:
        session.mount("http://", Adapter())
        client(server.url, session=session, verify="/ca.pem").repos()
    assert seen == ["/ca.pem"]


def test_a_directory_of_certificates_is_trusted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SSL_CERT_DIR names such a one; OpenSSL finds a CA in it by the hash of its name."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    with Tunnel(tmp_path, steps(GOOD), "mogplex.com") as tunnel:
        command = ["openssl", "x509", "-noout", "-subject_hash", "-in", tunnel.ca]
        name = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        trusted = tmp_path / "certificates"
        trusted.mkdir()
        with proxied(monkeypatch, tunnel.proxy.url, BARE, verify=str(trusted)) as one:
            with pytest.raises(mogplex.MogplexError, match="TLS"):
                one.repos()
        shutil.copy(tunnel.ca, str(trusted / f"{name}.0"))
        with proxied(monkeypatch, tunnel.proxy.url, BARE, verify=str(trusted)) as one:
            assert one.repos() == REPOS["repos"]


def test_what_is_sent() -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        one.repos(query="a_b", limit=5)
    lines = server.requests[0].split("\r\n")
    assert lines[0] == "GET /api/v1/mogplex/repos?q=a_b&limit=5 HTTP/1.1"
    assert {
        f"Authorization: Bearer {TOKEN}", f"User-Agent: mogplex/{mogplex.__version__}",
        "Accept: application/json", "Accept-Encoding: identity",
    } <= set(lines)


@pytest.mark.parametrize("length, is_sent", [(4096, True), (4097, False)])
def test_an_event_id_too_long_for_a_header_is_not_sent_back(length: int, is_sent: bool) -> None:
    with RawServer(steps(GOOD)) as server, client(server.url) as one:
        with one.open_events("r", lambda: None, True, 9, "x" * length, 9.0):
            pass
    assert ("Last-Event-ID" in server.requests[0]) is is_sent


def test_proxies_of_the_environment_count_only_where_they_are_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RawServer(steps(answer(403))) as server:
        monkeypatch.setenv("HTTPS_PROXY", server.url)
        with pytest.raises(mogplex.UnavailableError, match="host name was not found"):
            client("https://mogplex.invalid", tries=1).repos()
    assert server.requests == []


@pytest.mark.posix
def test_a_closed_client_keeps_no_connection_and_can_be_used_again() -> None:
    with Kept(lambda *_: kept(envelope(REPOS))) as server, client(server.url) as one:
        opened = descriptors()
        one.repos()
        one.close()
        assert comes_true(lambda: descriptors() <= opened)
        assert one.repos() == REPOS["repos"] and server.used == [1, 2]


def test_a_cookie_never_comes_back() -> None:
    set_cookie = answer(200, {"ok": True, "data": REPOS}, Set_Cookie="a=b; Path=/")
    with RawServer(steps(set_cookie, GOOD)) as server, client(server.url) as one:
        one.repos()
        one.repos()
    assert "cookie" not in server.requests[1].lower()
    assert server.requests[1].startswith("GET /api/v1/mogplex/repos HTTP/1.1\r\n")


def test_a_given_session_s_own_credential_does_not_take_the_token_s_place() -> None:
    import requests
    with RawServer(steps(GOOD)) as server, requests.Session() as session:
        session.headers["Authorization"] = "Basic x"
        session.auth = ("someone", "password")
        one = client(server.url, session=session)
        one.repos()
        one.post_form(server.url, {})
    assert f"Authorization: Bearer {TOKEN}\r\n" in server.requests[0]
    assert "Basic" not in server.requests[0] and "authorization" not in server.requests[1].lower()


# ---------------------------------------------------------------- 5. Tail


def sse(
    data: str, event: str = "message", id: str = "", retry: Optional[int] = None,
) -> mogplex.ServerSentEvent:
    return mogplex.ServerSentEvent(event, id, data, retry)


CONFORMANCE: List[Tuple[bytes, List[mogplex.ServerSentEvent], str, Optional[int]]] = [
    # bytes, events, last_event_id, retry_ms
    (b"", [], "", None),
    (b"\n\n\n", [], "", None),
    (b"data: a\n\n", [sse("a")], "", None),
    (b"data: a\n", [], "", None),
    (b"data: a", [], "", None),
    (b"data: a\n\ndata: b", [sse("a")], "", None),
    (b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", [sse("a"), sse("b"), sse("c")], "", None),
    (b"data: a\r\n\ndata: b\n\rdata: c\r\r", [sse("a"), sse("b"), sse("c")], "", None),
    (b"data: a\rdata: b\ndata: c\r\ndata: d\r\n\r\n", [sse("a\nb\nc\nd")], "", None),
    (b"data: a\r", [], "", None),
    (b"data: a\r\r", [sse("a")], "", None),
    (b"\r\n\r\n\r\ndata:a\r\n\r\n", [sse("a")], "", None),
    (b"\xef\xbb\xbfdata: a\n\n", [sse("a")], "", None),
    (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [sse("b")], "", None),
    (b"\xef\xbb\xbf\n\ndata: a\n\n", [sse("a")], "", None),
    (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [sse("a")], "", None),
    (b"data: \xef\xbb\xbfa\n\n", [sse("\ufeffa")], "", None),
    (b"\xef\xbb", [], "", None),
    (b"\xef\xbbdata: a\n\ndata: b\n\n", [sse("b")], "", None),
    (b"data:a\n\ndata:  a\n\ndata: \n\ndata:\n\ndata\n\n",
     [sse("a"), sse(" a"), sse(""), sse(""), sse("")], "", None),
    (b"data\ndata\n\n", [sse("\n")], "", None),
    (b"data:\ta\n\n", [sse("\ta")], "", None),
    (b"data: a \n\n", [sse("a ")], "", None),
    (b"data: a:b: c\n\n", [sse("a:b: c")], "", None),
    (b"data: a\ndata:\ndata: b\n\n", [sse("a\n\nb")], "", None),
    (b": hello\n:\n:data: x\n\ndata: a\n: between\ndata: b\n\n", [sse("a\nb")], "", None),
    (b"event: add\ndata: a\n\ndata: b\n\n", [sse("a", "add"), sse("b")], "", None),
    (b"event:\ndata: a\n\n", [sse("a")], "", None),
    (b"event: x\nevent: y\ndata: a\n\n", [sse("a", "y")], "", None),
    (b"event: x\n\ndata: a\n\n", [sse("a")], "", None),
    (b"event:  x\ndata: a\n\nevent\ndata: b\n\n", [sse("a", " x"), sse("b")], "", None),
    (b"Data: a\nDATA: b\n data: c\ndata : d\ndatax: e\ndat: f\n\n", [], "", None),
    (b"id: 1\ndata: a\n\ndata: b\n\n", [sse("a", id="1"), sse("b", id="1")], "1", None),
    (b"id: 1\ndata: a\n\nid\ndata: b\n\n", [sse("a", id="1"), sse("b")], "", None),
    (b"id: 1\n\ndata: b\n\n", [sse("b", id="1")], "1", None),
    (b"id: 1\ndata: a\n\nid:\n\n", [sse("a", id="1")], "", None),
    (b"id: 1\n\nid: 2\n", [], "1", None),
    (b"id: 1\n\nid: 2\ndata: x", [], "1", None),
    (b"id: 1\nid: 2\ndata: a\n\n", [sse("a", id="2")], "2", None),
    (b"id:  1 \ndata: a\n\n", [sse("a", id=" 1 ")], " 1 ", None),
    (b"id: 1\nid: 2\x003\ndata: a\n\n", [sse("a", id="1")], "1", None),
    (b"id: \xc3\xa9\xff\ndata: a\n\n", [sse("a", id="\xe9\ufffd")], "\xe9\ufffd", None),
    (b"retry: 1500\n\n", [], "", 1500),
    (b"retry: 1500\ndata: a\n\ndata: b\n\n", [sse("a", retry=1500), sse("b")], "", 1500),
    (b"retry:10\nretry:x\ndata: a\n\n", [sse("a", retry=10)], "", 10),
    (b"retry: 7", [], "", None),
    (b"retry: 0\n", [], "", 0),
    (b"retry: -1\nretry: 1.5\nretry: +1\nretry: 1e3\nretry:\nretry\nretry: 1 \nretry:  1\n"
     b"retry: 0x1\nretry: 1_0\n\n",
     [], "", None),
    ("retry: \u0661\nretry: \xb2\n\n".encode(), [], "", None),
    (b"retry: 007\n\n", [], "", 7),
    (b"retry: " + b"0" * 5000 + b"9\n\n", [], "", 9),
    (b"retry: " + b"9" * 5000 + b"\n\n", [], "", int("9" * 600)),
    (b"retry: 99999999999999999999\n\n", [], "", 99999999999999999999),
    ("data: a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\n\n".encode(),
     [sse("a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i")], "", None),
    (b"data: \x85 \xff \xc3\n\n", [sse("\ufffd \ufffd \ufffd")], "", None),
    (b"data: \xe2\x82\ndata: \xac\n\n", [sse("\ufffd\n\ufffd")], "", None),
    (b"data: \xed\xa0\x80 \xf0\x9f\x98\n\n", [sse("\ufffd\ufffd\ufffd \ufffd")], "", None),
    (b"data: \0a\0\n\n", [sse("\0a\0")], "", None),
    ("data: \xe9\u20ac\U0001f600\n\n".encode(), [sse("\xe9\u20ac\U0001f600")], "", None),
    (b"event: \xc3\xa9\0\ndata: a\n\n", [sse("a", "\xe9\0")], "", None),
    (b"nonsense\nfoo: bar\ndata: a\n\n", [sse("a")], "", None),
    (b"{}\n\ndata: {\"a\": 1}\n\n", [sse('{"a": 1}')], "", None),
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", [sse("YHOO\n+2\n10")], "", None),
    (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
     b"data:  third event\n\n",
     [sse("first event", id="1"), sse("second event"), sse(" third event")], "", None),
]


@pytest.mark.parametrize("data, events, last_event_id, retry_ms", CONFORMANCE)
def test_server_sent_events_by_the_letter(
    data: bytes, events: List[mogplex.ServerSentEvent], last_event_id: str, retry_ms: Optional[int],
) -> None:
    bytewise = [data[at:at + 1] for at in range(len(data))]
    pairs = [data[at:at + 2] for at in range(0, len(data), 2)]
    splits = [[data], bytewise, [b"", *pairs, b""]]
    splits += [[data[:at], data[at:]] for at in range(min(len(data), 200))]
    for pieces in splits:
        decoder = mogplex.SSEDecoder()
        assert [event for piece in pieces for event in decoder.feed(piece)] == events, pieces
        assert (decoder.last_event_id, decoder.retry_ms) == (last_event_id, retry_ms), pieces


def test_a_decoder_resumes_and_tells_what_it_holds() -> None:
    decoder = mogplex.SSEDecoder("7")
    assert decoder.feed(b"data: a\n\n") == [sse("a", id="7")] and decoder.held == 0
    decoder.feed(b"data: b\ndata: c")
    assert decoder.held == 15 and decoder.last_event_id == "7"
    decoder.feed(b"\n\nda")
    assert decoder.held == 2


# What is known of a run: a Story is told what was heard, and when.

def log(*numbers: int) -> List[Dict[str, Any]]:
    """Events that stand for numbers."""
    return [{"id": str(number), "type": "log", "message": f"m{number}"} for number in numbers]


def kind(word: str, **fields: Any) -> Dict[str, Any]:
    """An event of a type, of which there is one."""
    return {"id": word, "type": word, "message": word, **fields}


class Hearing(NamedTuple):
    """What a Story made of what it heard."""

    messages: List[Any]        # of the events that were new
    answers: int               # until the verdict
    status: str


def hear(*answers: Any, interval_s: float = 1.5) -> Hearing:
    """A Story that hears these answers, and the last one again and again, 1.5 s apart.

    An answer is a status, its events, and the run's error.
    """
    story = mogplex.Story("R", 0.0)
    messages: List[Any] = []
    for number in range(20):
        status, events, *error = answers[min(number, len(answers) - 1)]
        now = number * interval_s
        story.begin_answer()
        messages += [event.get("message") for event in events if story.hear_event(event, now)]
        story.hear_run({"status": status, "error": error[0] if error else None}, now)
        if story.verdict:
            return Hearing(messages, number + 1, story.verdict.status)
    return Hearing(messages, 0, "")


FAILED_EVENT = kind("failed", payload={"exit_code": 1})
BOOM = kind("failed", payload={"error": "it went boom"})
ENDS = [  # the answers, how many of them it takes, the status at the end
    # A success is complete with its finished event, and confirmed by a second answer without.
    ([("success", [kind("finished")])], 1, "success"),
    ([("streaming", [kind("finished")]), ("success", [kind("finished")])], 2, "success"),
    ([("success", log(1))], 2, "success"),
    ([("success", log(1)), ("success", [kind("finished")])], 2, "success"),
    # "finished" ends nothing by itself.
    ([("streaming", [kind("finished")])] * 5 + [("success", [])], 6, "success"),
    # Two answers, and no wait for an event where one has come, before the status or after.
    ([("failed", [FAILED_EVENT], "Agent run exited with code 1.")], 2, "failed"),
    ([("streaming", [FAILED_EVENT]), ("failed", [], "Agent run exited with code 1.")], 3, "failed"),
    ([("failed", [], "boom"), ("failed", [BOOM], "boom")], 2, "failed"),
    ([("cancelled", [kind("cancelled")], "stopped")], 2, "cancelled"),
    ([("failed", [kind("log", message="so it went boom")], "boom")], 2, "failed"),
    ([("failed", [kind("log", payload={"error": "boom"})], "boom")], 2, "failed"),
    ([("failed", [])], 2, "failed"),
    # Up to 5 s for the event that says why.
    ([("failed", [], "boom")], 6, "failed"),
    ([("failed", log(1), "boom")] * 3 + [("failed", [BOOM], "boom")], 4, "failed"),
    ([("failed", [kind("finished")], "boom")], 6, "failed"),
    ([("failed", [kind("cancel_requested")], "boom")], 6, "failed"),
    # Cancelled while its sandbox started, then alive again.
    ([("cancelled", []), ("streaming", []), ("failed", []), ("failed", [])], 4, "failed"),
    ([("cancelled", []), ("failed", []), ("failed", [])], 3, "failed"),
    ([("cancelled", [kind("cancelled")]), ("streaming", []), ("failed", [], "boom")], 8, "failed"),
    ([("failed", [], "boom")] * 2 + [("streaming", []), ("failed", [])], 5, "failed"),
    ([("cancelled", []), ("streaming", []), ("cancelled", []), ("streaming", []), ("success", [])],
     6, "success"),
    # What has no status, and statuses of tomorrow.
    ([("", []), ("", []), ("success", [])], 4, "success"),
    ([(None, []), (5, []), (["x"], []), ("cooling", []), ("success", [])], 6, "success"),
]


@pytest.mark.parametrize("answers, count, status", ENDS)
def test_when_a_run_has_ended(answers: Any, count: int, status: str) -> None:
    heard = hear(*answers)
    assert (heard.answers, heard.status) == (count, status)


def test_two_answers_in_one_breath_are_one() -> None:
    assert hear(("success", []), interval_s=0.1).answers == 16  # which is 1.5 s
    assert hear(("success", [kind("finished")]), interval_s=0.1).answers == 1


UNIDENTIFIED = {"message": "a"}
NEWS = [  # the answers' events, the messages that are new
    ([log(1, 2), log(1, 2, 3)], ["m1", "m2", "m3"]),
    # A server that reorders, repeats and changes its list.
    ([log(2, 1, 1), log(3, 1), log(2), log(4, 3, 2, 1)], ["m2", "m1", "m3", "m4"]),
    # A number and its digits are one id; true is none.
    ([[{"id": 1, "message": "a"}, {"id": "1", "message": "b"}]], ["a"]),
    ([[{"id": 0, "message": "a"}], [{"id": "0", "message": "b"}]], ["a"]),
    ([[{"id": True, "message": "a"}, {"id": 1, "message": "b"}, {"id": True, "message": "c"}]],
     ["a", "b", "c"]),
    # Without an id the content counts, and how often it comes in one answer.
    ([[UNIDENTIFIED, {"message": "b"}], [{"message": "b"}, UNIDENTIFIED]], ["a", "b"]),
    ([[UNIDENTIFIED, UNIDENTIFIED], [UNIDENTIFIED, UNIDENTIFIED]], ["a", "a"]),
    ([[UNIDENTIFIED], [UNIDENTIFIED, UNIDENTIFIED], [UNIDENTIFIED] * 3], ["a", "a", "a"]),
    ([[{"id": "", **UNIDENTIFIED}, {"id": None, **UNIDENTIFIED}]], ["a", "a"]),
    ([[{"message": "a"}, {"message": "a", "type": "x"}]], ["a", "a"]),
    ([[{"id": [1], "message": "a"}, {"id": {}, "message": "\ud800\0", "type": [], "payload": 7}]],
     ["a", "\ud800\0"]),
]


@pytest.mark.parametrize("answers, messages", NEWS)
def test_which_events_are_new(answers: Any, messages: List[str]) -> None:
    assert hear(*[("streaming", events) for events in answers]).messages == messages


def test_what_is_known_of_a_run_becomes_its_verdict() -> None:
    story = mogplex.Story("R", 0.0)
    payloads: List[Dict[str, Any]] = [
        {"working_branch": "main"},
        {"stage": "git_sync", "working_branch": "mogplex/agent-1"},
        {"stage": "git_delivery", "working_branch": "", "pull_request_url": "https://x/1"},
        {"pull_request_url": None}]
    for number, payload in enumerate(payloads):
        story.hear_event({"id": str(number), "type": "log", "payload": payload}, float(number))
    assert story.delivery == mogplex.Delivery("mogplex/agent-1", "https://x/1", True)
    assert story.last_event_at == 3.0
    run = {"status": "success", "createdAt": "2026-05-17T10:14:00Z",
           "updatedAt": "2026-05-17T10:15:30.5+00:00", "branch": {"working": "main"}}
    story.hear_event(kind("finished"), 4.0)
    assert story.hear_run(run, 4.0) and not story.hear_run(run, 5.0)
    assert story.verdict == mogplex.Verdict(
        "R", "success", "", "mogplex/agent-1", "https://x/1", False, 90.5, run)


def test_a_run_of_which_little_is_known_has_a_verdict_too() -> None:
    story = mogplex.Story("R", 0.0)
    run = {"status": "failed", "error": 7, "createdAt": 5}
    story.hear_run(run, 0.0)
    story.hear_run(run, 1.5)
    story.hear_run(run, 6.5)
    assert story.verdict == mogplex.Verdict("R", "failed", "7", "", "", False, None, run)


def test_a_full_list_is_said_once() -> None:
    story = mogplex.Story("R", 0.0)
    assert story.hear_length(199, 200) == "" and not story.truncated
    assert story.hear_length(200, 200) == (
        "the service lists only the first 200 events of a run; later events are not shown")
    assert story.hear_length(200, 200) == "" and story.truncated
    assert mogplex.Story("R", 0.0).hear_length(20, 20) == (
        "only the first 20 events were asked for; later events are not shown")


def test_memory_does_not_grow_with_the_length_of_a_run() -> None:
    seen = mogplex.Seen()
    assert all(seen.add({"id": f"{number}"}) for number in range(220_000))
    assert len(seen._recent | seen._older) <= 2 * mogplex.REMEMBERED_EVENTS
    # A stream that is replayed from its start repeats nothing of the last 50,000.
    assert not any(seen.add({"id": f"{number}"}) for number in range(170_000, 220_000))


def test_memory_does_not_grow_with_events_without_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mogplex, "REMEMBERED_EVENTS", 100)
    seen = mogplex.Seen()
    assert all(seen.add({"message": number}) for number in range(1000))
    assert len(seen._copies) <= 100


def test_an_event_that_is_too_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"deep": deep}
    with pytest.raises(mogplex.InvalidResponseError, match="TOO_LARGE: an event is nested"):
        mogplex.Seen().add(deep)


@pytest.mark.parametrize("event, reason", [
    ({"type": "failed", "payload": {"error": "boom", "exit_code": 1}}, "boom"),
    ({"type": "failed", "payload": {"exit_code": 1, "failure_code": "rate_limited"}},
     "rate_limited, exit code 1"),
    ({"type": "finished", "payload": {"exit_code": 0}}, ""),
    ({"type": "failed", "payload": "odd"}, ""),
    ({"type": "log", "payload": {"error": "boom"}}, ""),
])
def test_why_a_run_failed(event: Dict[str, Any], reason: str) -> None:
    assert mogplex.failure_of(event) == reason


@pytest.mark.parametrize("told, ended", [
    ({"run": {"status": "success"}, "status": "success", "alreadyTerminal": True}, True),
    ({"status": "already_terminal"}, True),
    ({"status": "cancelled", "alreadyTerminal": False}, False),
    ({"status": "cancellation_requested"}, False),
    ({"alreadyTerminal": "yes"}, False),
])
def test_what_a_cancel_answers(told: Dict[str, Any], ended: bool) -> None:
    assert mogplex.already_ended(told) is ended


# How well the service answers: a Link is told what came, when, and the dice.

def error(status: int, code: str = "CODE", asked_s: Optional[float] = None) -> mogplex.MogplexError:
    """What the client makes of an answer of this status; code "" when it is no envelope."""
    transient = status in (0, 408, 425, 429, 500, 502, 503, 504)
    return mogplex.error_class(status)(
        "no", code=code, status=status, retry_after_s=asked_s, transient=transient)


def lost() -> mogplex.MogplexError:
    return mogplex.UnavailableError("the connection was lost", transient=True)


def ridden_out(
    link: mogplex.Link, failure: mogplex.MogplexError, longest_s: float = 9000.0,
) -> float:
    """How long a Link rides out one and the same failure, and raises it in the end."""
    now = 0.0
    while now < longest_s:
        try:
            now += link.failed(failure, now, 0.0).wait_s
        except mogplex.MogplexError as raised:
            raised.__dict__["at"] = now
            raise
    return now


OUTAGES = [  # what fails for ever after a good answer, the exit code at the end
    (error(502), 69), (error(500), 69), (error(200), 69), (lost(), 69), (error(429), 75),
    (error(401), 64), (error(307, "UNAUTHORIZED"), 69), (error(302, "REDIRECT"), 69),
    # What is no envelope is a proxy's page.
    (error(403, ""), 69), (error(404, ""), 69), (error(405, ""), 69), (error(410, ""), 69),
    (error(408), 69), (error(425), 69), (error(520), 69),
]


@pytest.mark.parametrize("failure, code", OUTAGES)
def test_300_s_are_ridden_out_after_a_good_answer(failure: mogplex.MogplexError, code: int) -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    with pytest.raises(mogplex.MogplexError, match="GAVE_UP: gave up after 3.. s ") as raised:
        ridden_out(link, failure)
    assert int(raised.value.exit) == code
    assert 300 <= raised.value.__dict__["at"] <= 330
    assert raised.value.__cause__ is failure


@pytest.mark.parametrize("failure", [
    error(400), error(403), error(404), error(405), error(410), error(200, "TOO_LARGE"),
    mogplex.UnauthorizedError("the sign-in has ended and cannot be renewed here")])
def test_a_refusal_in_the_service_s_words_is_final(failure: mogplex.MogplexError) -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    with pytest.raises(mogplex.MogplexError) as raised:
        link.failed(failure, 1.0, 0.0)
    assert raised.value is failure


@pytest.mark.parametrize("failure, tries", [
    (error(502), 3), (error(500), 3), (lost(), 3), (error(429), 3),
    (error(401), 1), (error(403, ""), 1), (error(404), 1), (error(404, ""), 1), (error(501), 1),
])
def test_three_tries_before_the_first_good_answer(
    failure: mogplex.MogplexError, tries: int,
) -> None:
    link = mogplex.Link(0.0)
    for _ in range(tries - 1):
        link.failed(failure, 0.0, 0.0)
        assert link.connection in ("lost", "limited")
    with pytest.raises(mogplex.MogplexError) as raised:
        link.failed(failure, 0.0, 0.0)
    assert raised.value is failure


def test_a_run_just_started_may_be_unknown_for_10_s() -> None:
    link = mogplex.Link(100.0, just_started=True)
    for now in (100.0, 101.0, 109.9):
        link.failed(error(404), now, 0.0)
    with pytest.raises(mogplex.MogplexError, match="HTTP 404"):
        link.failed(error(404), 110.0, 0.0)


def test_to_a_start_that_was_answered_a_401_is_an_outage() -> None:
    with pytest.raises(mogplex.UnauthorizedError, match="GAVE_UP"):
        ridden_out(mogplex.Link(0.0, just_started=True), error(401))
    with pytest.raises(mogplex.MogplexError, match="HTTP 403"):
        mogplex.Link(0.0, just_started=True).failed(error(403), 0.0, 0.0)


def test_the_exit_code_of_a_mixed_outage() -> None:
    for failures, code in (((error(503), error(429)), 69), ((error(429), error(401)), 64),
                           ((error(401), error(503)), 69)):
        link = mogplex.Link(0.0)
        link.good(0.0)
        link.failed(failures[0], 1.0, 0.0)
        with pytest.raises(mogplex.MogplexError) as raised:
            link.failed(failures[1], 301.0, 0.0)
        assert int(raised.value.exit) == code


@pytest.mark.parametrize("asked_s", [2.5, 60.0, 3000.0, 68400.0])
@pytest.mark.parametrize("status", [429, 503])
def test_what_the_service_asks_for_is_waited_and_said(asked_s: float, status: int) -> None:
    link = mogplex.Link(0.0)
    wait_s, message = link.failed(error(status, asked_s=asked_s), 0.0, 0.0)
    assert wait_s == asked_s and link.retry_at == asked_s
    wait = mogplex.format_duration(asked_s)
    assert message.endswith(f"CODE: no (HTTP {status}); retrying in {wait}, as the service asks")


def test_a_longer_wait_is_said_though_the_outage_is_known() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    said = [link.failed(error(429, asked_s=asked_s), 0.0, 0.0).message
            for asked_s in (None, 10.0, 5.0, 10.0, 60.0)]
    assert [bool(message) for message in said] == [True, True, False, False, True]
    link.good(0.0)
    said = [link.failed(error(429, asked_s=asked_s), 0.0, 0.0).message for asked_s in (5.0, 30.0)]
    assert all(said)


def test_each_kind_of_trouble_in_an_outage_is_said_once() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    failures = (error(503), error(401), error(503), error(429), error(401), lost())
    said = [link.failed(failure, 0.0, 0.0).message.split(":")[0] for failure in failures]
    assert said == [
        "request failed", "token refused, though it worked before", "", "rate limited", "", ""]


def test_the_300_s_count_no_time_that_the_service_asked_for() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    assert ridden_out(link, error(429, asked_s=60.0)) >= 9000.0
    with pytest.raises(mogplex.RateLimitedError, match="gave up after 3.. s"):
        ridden_out(link, error(429), 20_000.0)


@pytest.mark.parametrize("status, code", [(429, 75), (503, 69), (500, 69)])
def test_a_wait_that_the_time_out_has_no_room_for_ends_it_at_once(status: int, code: int) -> None:
    for good in (False, True):
        link = mogplex.Link(0.0)
        if good:
            link.good(0.0)
        assert link.failed(error(status, asked_s=600.0), 0.0, 0.0, 600.0).wait_s == 600.0
        with pytest.raises(mogplex.MogplexError) as raised:
            link.failed(error(status, asked_s=600.0), 0.0, 0.0, 30.0)
        assert int(raised.value.exit) == code and raised.value.retry_after_s == 600.0
        assert str(raised.value) == ("CODE: no; the service asks to wait 10m 00s, and only 30s "
                                     f"of the time-out is left (HTTP {status})")


@pytest.mark.parametrize("failure, message", [
    (lost(), "request failed: the connection was lost; retrying in 1s"),
    (error(500, "INTERNAL_ERROR"), "request failed: INTERNAL_ERROR: no (HTTP 500); retrying in 1s"),
    (error(429, "LIMIT", 60.0), "rate limited: LIMIT: no (HTTP 429); "
                                "retrying in 1m 00s, as the service asks"),
    (error(401), "token refused, though it worked before: CODE: no (HTTP 401); retrying in 1s"),
])
def test_what_is_said_of_an_outage(failure: mogplex.MogplexError, message: str) -> None:
    link = mogplex.Link(0.0)
    assert link.good(0.0) == ""
    assert link.failed(failure, 0.0, 0.0).message == message
    assert link.failed(failure, 1.0, 0.0).message == ""  # once
    assert (link.good(2.0), link.good(3.0)) == ("connected again", "")
    assert (link.connection, link.failures, link.retry_at) == ("connected", 0, None)
    assert link.failed(failure, 4.0, 0.0).message == message


def test_the_back_off_of_a_link() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    assert [link.failed(lost(), 0.0, 0.0).wait_s for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]
    link.good(0.0)
    assert link.failed(lost(), 0.0, 0.99).wait_s > 0.7


def test_a_token_is_renewed_once_between_good_answers() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    assert link.renews
    link.failed(error(503), 0.0, 0.0)
    assert link.renews
    link.failed(error(401), 0.0, 0.0)
    assert not link.renews
    link.good(1.0)
    assert link.renews


def test_a_suspended_machine_is_no_outage() -> None:
    link = mogplex.Link(0.0)
    link.good(0.0)
    link.tick(0.0)
    link.failed(lost(), 1.0, 0.0)
    link.tick(3600.0)
    link.failed(lost(), 3600.5, 0.0)
    for now in range(3601, 3890, 10):
        link.tick(float(now))
    with pytest.raises(mogplex.UnavailableError, match="gave up"):
        link.failed(lost(), 3902.0, 0.0)


def test_a_tail_asks_every_second_and_a_half() -> None:
    assert mogplex.Link(0.0).pace.interval_s(0.0) == 1.5
    assert inspect.signature(mogplex.tail).parameters["interval_s"].default == 1.5


# The pace of one tail, and of ten.

def paced(pace: mogplex.Pace, minutes: float, now: float = 0.0, news: bool = False) -> List[float]:
    """The intervals of a tail that always gets an answer."""
    intervals, end = [], now + 60 * minutes
    while now < end:
        pace.polled(now)
        pace.succeeded(news, now)
        intervals.append(pace.interval_s(0.0))
        now += intervals[-1]
    return intervals


def test_the_pace_of_a_tail_alone() -> None:
    quiet = paced(mogplex.Pace(1.5, 0.0), 2)
    assert quiet[:20] == [1.5] * 20
    assert quiet[20:25] == [1.875, 2.34375, 2.9296875, 3.662109375, 4.0]
    assert quiet[-1] == 4.0
    assert paced(mogplex.Pace(1.5, 0.0), 2, news=True) == [1.5] * 80
    pace = mogplex.Pace(1.5, 0.0)
    paced(pace, 2)
    pace.succeeded(True, 130.0)
    assert pace.interval_s(0.9) == 1.5
    # Four tails of silent runs fit one token.
    assert 4 * sum(interval == 4.0 for interval in paced(mogplex.Pace(1.5, -60.0), 1.5)[-15:]) == 60


def test_the_pace_after_refusals() -> None:
    pace = mogplex.Pace(1.5, 0.0)
    for refused in (3.0, 6.0, 12.0, 24.0, 30.0, 30.0):
        for number in range(60):
            pace.polled(number * 0.5)
        pace.refused()
        assert pace.interval_s(0.0) == refused <= pace.interval_s(0.99) <= 30.0
    shortened = paced(pace, 60)
    assert shortened == sorted(shortened, reverse=True)
    assert shortened[5] > 25 and shortened[-1] == 4.0
    crowded = mogplex.Pace(1.5, 0.0)
    for now in (0.0, 1.5, 3.0, 4.5, 6.0, 7.5, 9.0):  # a tenth of what a token may ask in a minute
        crowded.polled(now)
    crowded.refused()
    assert crowded.interval_s(0.0) == 10.0


class SharedClock:
    """Time for many threads, of which one runs at a time.

    It moves only when all of them sleep, to the moment at which the next one wakes.
    """

    def __init__(self, threads: int) -> None:
        self.now = 1.8e9
        self.asleep: Dict[int, float] = {}  # when each wakes
        self.threads = threads
        self.changed = threading.Condition()

    def __call__(self) -> float:
        return self.now

    def sleep(self, who: int, seconds: float) -> None:
        with self.changed:
            self.asleep[who] = self.now + seconds
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.next_to_wake() == who)
            self.now = max(self.now, self.asleep.pop(who))

    def next_to_wake(self) -> Optional[int]:
        """The thread whose turn it is; None while one is awake."""
        if len(self.asleep) < self.threads:
            return None
        return min(self.asleep, key=lambda one: (self.asleep[one], one))

    def leave(self) -> None:
        with self.changed:
            self.threads -= 1
            self.changed.notify_all()


@pytest.mark.parametrize("seed, task", [(1, "x"), (2, "fail"), (3, "fail")])
@pytest.mark.slow
def test_ten_tails_on_one_token(seed: int, task: str) -> None:
    clock = SharedClock(10)
    ended: Dict[int, Tuple[float, List[Any]]] = {}
    with metered(mogplex.DemoServer(clock=clock)) as server:
        with mogplex.Client(server.token, server.url) as starting:
            run_id = starting.start_run({**WEB, "prompt": task}, "k")["runId"]
        run = server.service.runs[run_id]  # two minutes, of which the agent says nothing for most
        began = run.steps[0].at_s
        late = mogplex.demo_later(run.steps[6:], 110.0)
        run.steps = run.steps[:6] + late

        def follow(who: int) -> None:
            dice = random.Random(seed * 100 + who)
            clock.sleep(who, dice.random() * 3 * (seed % 2))
            try:
                with mogplex.Client(server.token, server.url) as one:
                    items = list(mogplex.tail(
                        one, run_id, clock=clock, random=dice.random,
                        sleep=lambda seconds: clock.sleep(who, seconds)))
                ended[who] = clock.now - began, items
            finally:
                clock.leave()  # the others do not wait for one that broke
        threads = [threading.Thread(target=follow, args=(who,)) for who in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        clock.now += 1000
        with mogplex.Client(server.token, server.url) as asking:
            run = asking.events(run_id)
    wanted = [event["message"] for event in run["events"]]
    for at, items in ended.values():
        assert items[-1].status == ("success" if task == "x" else "failed") and 117 < at < 118 + 45
        assert [item["message"] for item in items[:-1]] == wanted
    assert len(ended) == 10 and server.service.refusals <= 10


# A tail that polls. Each server answers from a list; time is virtual.

def poll(status: Any = "streaming", *events: Any, **run: Any) -> bytes:
    """An answer of the events route; an event is an object, or a number that stands for one."""
    return ok({"run": {"runId": "R", "status": status, **run}, "events": listed(*events)})


def listed(*events: Any) -> List[Any]:
    """Events as that route lists them."""
    return [log(event)[0] if isinstance(event, int) else event for event in events]


def followed(items: Iterator[Any]) -> Tuple[List[str], Any]:
    """The messages of a tail's events, and its verdict."""
    *events, verdict = items
    return [event["message"] for event in events], verdict


@contextlib.contextmanager
def tailing(
    *order: Step, **options: Any,
) -> Iterator[Tuple[Iterator[Any], VirtualClock, List[float], RawServer]]:
    """A tail of a run on a server that goes through ``order``.

    And its clock, when its requests came in the time of that, and the server.
    """
    clock, times = VirtualClock(), []  # type: Tuple[VirtualClock, List[float]]
    reply = steps(*order)

    def timed(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        times.append(clock.now - 1000.0)
        return reply(number, request, connection)
    with RawServer(timed) as server, mogplex.Client(TOKEN, server.url) as one:
        yield clock.tail(one, **options), clock, times, server


END = (poll("success", 1), poll("success", 1))
FINISHED_EVENT = {"id": "9", "type": "finished", "message": "done"}


@pytest.mark.parametrize("order, messages, times", [
    ((poll("success", 1, 2), poll("success", 1, 2, 3)), ["m1", "m2", "m3"], [0, 1.5]),
    ((poll("streaming", 1), poll("streaming", 1, 2), *END), ["m1", "m2"], [0, 1.5, 3, 4.5]),
    ((poll("streaming", 1), poll("success", 1, FINISHED_EVENT)), ["m1", "done"], [0, 1.5]),
    ((poll("failed", 1, error="boom"),), ["m1"], [0, 1.5, 3, 4.5, 6, 7.5]),
    # Things of an odd type, and what is not there.
    ((ok({"events": [7, None, "x", *listed(1)],
          "run": {"status": "success", "error": 7, "createdAt": 5}}),),
     ["m1"], [0, 1.5, 3, 4.5, 6, 7.5]),
    # An answer without a status: the run's own route is asked.
    ((ok({"events": []}), ok({"run": {"status": "success"}}),
      ok({"events": [], "run": None}), ok({"run": {"status": "success"}})), [], [0, 0, 3, 3]),
    # As after a 204: no more events come.
    ((answer(204), ok({"run": {"status": "streaming"}}),
      answer(204), poll("success")), [], [0, 0, 3, 3, 6]),
])
def test_every_event_once_and_the_true_verdict(
    order: Any, messages: List[str], times: List[float],
) -> None:
    with tailing(*order) as (items, clock, at, _):
        told, verdict = followed(items)
    assert told == messages and clock.notes == [] and at == times
    assert verdict.status in ("success", "failed")


def test_a_slow_answer_costs_no_further_interval() -> None:
    """The second terminal answer is read an interval after the first was heard, and confirms it."""
    def slow(connection: socket.socket) -> None:
        clock.now += 1.0
        connection.sendall(poll("success", 1))

    with tailing(slow, poll("success", 1)) as (items, clock, times, _):
        followed(items)
    assert times == [0, 2.5]


def test_a_full_list_is_said_once_and_the_tail_ends_with_the_run() -> None:
    full = poll("streaming", *range(199), None)  # a null counts, and is no event
    order = (full, full, poll("success", *range(199), None))
    with tailing(*order, limit=999) as (items, clock, _, server):
        told, verdict = followed(items)
    assert len(told) == 199 and verdict.truncated and verdict.status == "success"
    assert "?limit=200 " in server.requests[0]
    assert clock.notes == [
        "the service lists only the first 200 events of a run; later events are not shown"]


def test_a_verdict_of_the_first_answer_knows_that_the_list_was_full() -> None:
    with tailing(poll("success", *range(10, 209), FINISHED_EVENT)) as (items, clock, times, _):
        told, verdict = followed(items)
    assert len(told) == 200 and times == [0] and verdict.truncated and len(clock.notes) == 1


def limited(**headers: str) -> bytes:
    return refusal(429, "RATE_LIMITED", "Rate limit exceeded", **headers)


AT_TEN = "Mon, 25 May 2026 10:00:00 GMT"


@pytest.mark.parametrize("headers, least_s, most_s", [
    ({"Retry_After": "60"}, 60, 60),
    ({"Retry_After": "2.5"}, 2.5, 2.5),
    ({"Retry_After": "7200"}, 7200, 7200),
    ({"Retry_After": "0"}, 0.5, 3),
    ({"Retry_After": "Mon, 25 May 2026 10:01:30 GMT", "Date": AT_TEN}, 90, 90),
    ({"Retry_After": "Mon, 25 May 2026 09:00:00 GMT", "Date": AT_TEN}, 0.5, 3),
    ({}, 0.5, 3),
    ({"Retry_After": "soon"}, 0.5, 3),
    ({"Retry_After": "-5"}, 0.5, 3),
    ({"Retry_After": "9" * 30}, 0.5, 3),
])
@pytest.mark.parametrize("first", [0, 1])  # before the first good answer, and after
def test_what_a_429_asks_for_is_waited(
    first: int, headers: Dict[str, str], least_s: float, most_s: float,
) -> None:
    with tailing(*(poll(),) * first, limited(**headers), *END) as (items, clock, times, _):
        assert followed(items)[1].status == "success"
    assert least_s <= times[first + 1] - times[first] <= most_s + 0.01
    said = "rate limited: RATE_LIMITED: Rate limit exceeded (HTTP 429); retrying in "
    assert clock.notes[0].startswith(said)
    assert clock.notes[1:] == ["connected again"]


def test_waits_have_jitter() -> None:
    with tailing(limited(Retry_After="60"), *END, random=lambda: 0.5) as (items, _, times, _2):
        followed(items)
    assert 61 < times[1] < 65
    assert times[2] - times[1] > 3  # and the pace afterwards is slower


@pytest.mark.parametrize("refused, error", [
    (limited(Retry_After="600"), mogplex.RateLimitedError),
    (refusal(503, "SERVICE_UNAVAILABLE", "later", Retry_After="600"), mogplex.UnavailableError),
])
def test_a_wait_longer_than_the_time_out_ends_it_at_once(refused: bytes, error: Any) -> None:
    with tailing(poll(), refused, timeout_s=30) as (items, clock, times, _):
        with pytest.raises(error, match="asks to wait 10m 00s, and only 28s of") as raised:
            list(items)
    assert clock.now == 1001.5 and len(times) == 2 and raised.value.retry_after_s == 600


def test_the_time_out_of_a_tail() -> None:
    with tailing(poll(), timeout_s=30) as (items, clock, times, _):
        with pytest.raises(mogplex.TailTimeout, match="timed out after 30s waiting for terminal"):
            list(items)
    assert clock.now == 1030.0 and times[-1] < 30


PASSING = [name for name, fault in FAULTS.items() if fault[0] is not silent and name not in (
    "401", "403", "404", "429", "a long message", "login", "512 MiB in gzip", "503 for long",
    "503")]


@pytest.mark.parametrize("name", PASSING)
def test_a_poll_that_is_no_answer_is_thrown_away_and_tried_again(name: str) -> None:
    bad, half = FAULTS[name][0], poll("success", 9)[:-4]
    done = poll("success", 1, 2)
    with tailing(poll("streaming", 1), bad, half, bad, done, bad, done) as (items, clock, times, _):
        told, verdict = followed(items)
    assert (told, verdict.status) == (["m1", "m2"], "success")
    # Back-off grows while there is no good answer, and starts anew after one.
    waits = [round(later - sooner, 2) for sooner, later in zip(times, times[1:])]
    assert waits == [1.5, 0.5, 1.0, 2.0, 1.5, 0.5]
    assert [note.split(":")[0] for note in clock.notes] == ["request failed", "connected again"] * 2


@pytest.mark.parametrize("order, code", [
    ([answer(502)], 69), ([answer(500)], 1), ([answer(200, "<html>")], 1),
    ([reset_after(b"")], 69), ([limited()], 75), ([limited(), answer(503), limited()], 75),
    ([refusal(503, "SERVICE_UNAVAILABLE", "x", Retry_After="20")], 69),
])
def test_before_the_first_answer_there_are_three_tries(order: List[Step], code: int) -> None:
    states: List[str] = []

    def note(progress: mogplex.Progress) -> None:
        states.append(progress.connection)

    with tailing(*order, on_progress=note) as (items, _, times, _2):
        with pytest.raises(mogplex.MogplexError) as error:
            list(items)
    assert int(error.value.exit) == code and len(times) == 3
    assert set(states) <= {"connecting", "lost", "limited"}  # never "connected"


@pytest.mark.parametrize("bad, code", [
    (answer(502), 69), (reset_after(b""), 69), (poll("success", 1)[:-2], 69),
    (answer(200, "<html>"), 69), (answer(500), 69), (limited(), 75),
    (answer(302, Location="https://portal.example"), 69), (answer(404, "<html>"), 69),
    (answer(405), 69),
])
def test_after_one_it_gives_up_after_300_s_without_a_good_answer(bad: Step, code: int) -> None:
    with tailing(poll("streaming", 1), bad) as (items, clock, times, _):
        assert next(items)["id"] == "1"
        with pytest.raises(mogplex.MogplexError, match="GAVE_UP: gave up after 3.. s ") as error:
            list(items)
    assert int(error.value.exit) == code and len(clock.notes) == 1
    assert 300 <= times[-1] <= 375 and len(times) > 9


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_refusals_that_are_final_end_it_at_once(status: int) -> None:
    with tailing(poll("streaming", 1), refusal(status, "CODE", "no")) as (items, clock, times, _):
        with pytest.raises(mogplex.MogplexError, match=f"CODE: no .HTTP {status}."):
            list(items)
    assert len(times) == 2 and clock.notes == []


REFUSED_TOKEN = refusal(401, "UNAUTHORIZED", "Unauthorized")


def test_a_401_is_final_before_the_first_good_answer() -> None:
    with tailing(REFUSED_TOKEN) as (items, _, times, _2):
        with pytest.raises(mogplex.UnauthorizedError):
            list(items)
    assert len(times) == 1


def test_a_401_after_a_good_answer_is_an_outage() -> None:
    with tailing(poll("streaming", 1), *[REFUSED_TOKEN] * 20, *END) as (items, clock, times, _):
        assert followed(items)[1].status == "success"
    assert times[-1] > 200
    assert clock.notes == [
        "token refused, though it worked before: UNAUTHORIZED: Unauthorized (HTTP 401); "
        "retrying in 1s",
        "connected again"]


@pytest.mark.parametrize("refused", [REFUSED_TOKEN, answer(307, Location="/login")])
def test_a_401_that_stays_ends_in_64_after_300_s(refused: bytes) -> None:
    with tailing(poll("streaming", 1), refused) as (items, clock, times, _):
        with pytest.raises(mogplex.UnauthorizedError, match="gave up after 3.. s"):
            list(items)
    assert 300 <= times[-1] <= 330 and len(clock.notes) == 1


def test_a_run_that_was_just_started_may_be_unknown_at_first() -> None:
    unknown = refusal(404, "NOT_FOUND", "Run not found")
    with tailing(unknown, unknown, *END, just_started=True) as (items, _, times, _2):
        assert followed(items)[1].status == "success"
    with tailing(unknown, just_started=True) as (items, _, times, _2):
        with pytest.raises(mogplex.MogplexError, match="NOT_FOUND"):
            list(items)
    assert 10 <= times[-1] <= 16
    with tailing(unknown) as (items, _, times, _2):
        with pytest.raises(mogplex.MogplexError, match="NOT_FOUND"):
            list(items)
    assert len(times) == 1


@pytest.mark.parametrize("token, refreshes, code", [
    (answer(200, {"access_token": "new", "expires_in": 3600}), 1, 64),
    (answer(401, {"error": "invalid_grant"}), 1, 64),
    (answer(500), None, 69),
])
def test_a_sign_in_is_refreshed_once_between_good_answers(
    token: bytes, refreshes: Optional[int], code: int,
) -> None:
    seen: List[str] = []

    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        seen.append("refresh" if "/token" in request else (re.findall("Bearer (.*)\r", request))[0])
        return token if "/token" in request else poll("streaming", 1) if len(seen) < 3 else REFUSED_TOKEN
    clock = VirtualClock()
    with RawServer(reply) as server, mogplex.Client(renewable(server.url), server.url) as one:
        with pytest.raises(mogplex.MogplexError) as error:
            list(clock.tail(one))
    assert int(error.value.exit) == code and refreshes in (None, seen.count("refresh"))
    assert seen[:4] == ["old", "old", "old", "refresh"]
    assert (seen[4] == "new") == (b"access_token" in token)
    assert clock.now - 1000 >= 10


def test_a_refreshed_sign_in_goes_on_quietly() -> None:
    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        if "/token" in request:
            return answer(200, {"access_token": "new", "expires_in": 3600})
        if "Bearer new" in request:
            return poll("success", 1)
        return poll("streaming", 1) if number < 2 else REFUSED_TOKEN
    clock = VirtualClock()
    with RawServer(reply) as server, mogplex.Client(renewable(server.url), server.url) as one:
        assert followed(clock.tail(one))[1].status == "success" and clock.notes == []


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n\r\n"
CHUNKED_STREAM = STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"


def then_silent(data: bytes) -> Speak:
    """Send ``data``, then say nothing until the other side leaves."""
    def speak(connection: socket.socket) -> None:
        connection.sendall(data)
        silent(connection)
    return speak


HANGS: Dict[str, Step] = {
    "silence": silent,
    "dribbled status": dribble(b"", b"H"),
    "dribbled headers": dribble(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "dribbled body": dribble(CUT + b"\r\n", b" "),
    "dribbled stream": dribble(STREAM, b":"),
    "heartbeats": dribble(STREAM, b": x\n\n", 0.001),
    "events": dribble(STREAM, b"data: {}\n\n", 0.001),
    "half of a poll": then_silent(poll()[:-9]),
}


@pytest.mark.parametrize("name", HANGS)
def test_the_deadline_holds_in_real_time_whatever_hangs(name: str) -> None:
    with RawServer(steps(HANGS[name])) as server, mogplex.Client(TOKEN, server.url) as one:
        with pytest.raises(mogplex.TailTimeout):
            list(mogplex.tail(one, "R", timeout_s=0.2))


@pytest.mark.parametrize("step", [silent, dribble(b"", b"H")])
@pytest.mark.slow
def test_the_deadline_holds_while_a_refresh_hangs(
    step: Step, monkeypatch: pytest.MonkeyPatch,
) -> None:
    # How long leaving waits for the answer to what has been sent.
    monkeypatch.setattr(mogplex.Credential.settle, "__defaults__", (0.2,))
    with RawServer(steps(step)) as server:
        credential = renewable(server.url, expires_at=1.0)
        with mogplex.Client(credential, server.url) as one:
            with pytest.raises(mogplex.TailTimeout):
                list(mogplex.tail(one, "R", timeout_s=0.2))
        assert "/token" in server.requests[0]


@pytest.mark.posix
@pytest.mark.skipif(os.name == "nt", reason="holds a lock as POSIX does")
def test_the_deadline_holds_while_the_lock_of_a_refresh_is_held(tmp_path: Any) -> None:
    home = mogplex.Home(str(tmp_path))
    credential = mogplex.Credential(
        "old", base_url="https://a.example", refresh_token="r", expires_at=1.0, home=home)
    with open(home.auth_path + ".lock", "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with mogplex.Client(credential, "https://a.example") as one:
            with pytest.raises(mogplex.TailTimeout):
                list(mogplex.tail(one, "R", timeout_s=0.2))


@pytest.mark.parametrize("error", [
    mogplex.MogplexError("stdout is full", transient=True), mogplex.UnavailableError("x"),
    BrokenPipeError(), KeyboardInterrupt(),
])
def test_what_on_progress_raises_leaves_the_tail(error: BaseException) -> None:
    def stop(progress: mogplex.Progress) -> None:
        if progress.connection == "connected":
            raise error

    with tailing(poll("streaming", 1), on_progress=stop) as (items, _, times, _2):
        with pytest.raises(type(error)) as raised:
            list(items)
    assert raised.value is error and len(times) == 1


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for jump in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda real=time.time: real() + jump)
        with tailing(poll("streaming", 1), limited(Retry_After="5"), *END) as (items, _, times, _2):
            assert followed(items)[1].status == "success" and times[2] - times[1] == 5
        monkeypatch.undo()


def test_signs_of_life_come_in_every_wait() -> None:
    ticks: List[float] = []

    def note(progress: mogplex.Progress) -> None:
        ticks.append(clock.now)

    order = [poll("streaming", 1)] * 9
    with tailing(*order, *END, on_progress=note) as (items, clock, _, _2):
        followed(items)
    assert max(later - sooner for sooner, later in zip(ticks, ticks[1:])) <= 0.5


# A tail that reads a stream.

def streamed(*blocks: Any) -> bytes:
    """A stream of these: text as it is, a number as an event whose id it is, an object as data."""
    def block(one: Any) -> str:
        if isinstance(one, str):
            return one
        record = {"id": str(one), "message": f"m{one}"} if isinstance(one, int) else one
        return (f"id: {one}\n" if isinstance(one, int) else "") + f"data: {json.dumps(record)}\n\n"
    return STREAM + "".join(map(block, blocks)).encode()


@contextlib.contextmanager
def streaming(
    status: Sequence[str], *order: Step, **options: Any,
) -> Iterator[Tuple[Iterator[Any], VirtualClock, RawServer, List[str]]]:
    """A tail of a run whose events route goes through ``order``, and its own through ``status``.

    And its clock, the server, and the last event ids that it has sent.
    """
    clock = VirtualClock()
    asked: List[str] = []
    statuses = list(status)
    reply = steps(*order)

    def route(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        if "/events?" not in request:
            return ok({"run": {"status": statuses.pop(0) if len(statuses) > 1 else statuses[0]}})
        asked.append((re.findall("(?i)last-event-id: (.*)\r", request) or [""])[0])
        return reply(len(asked), request, connection)
    with RawServer(route) as server, mogplex.Client(TOKEN, server.url) as one:
        yield clock.tail(one, **options), clock, server, asked


def test_a_stream_is_read_and_resumed() -> None:
    order = streamed(": hi\n\n", 1, 2, "id: 3\n\n"), streamed(4), streamed()
    with streaming(["streaming", "success"], *order) as (items, clock, server, asked):
        assert followed(items)[0] == ["m1", "m2", "m4"]
    assert asked[:2] == ["", "3"] and asked[2] == "4" and clock.notes == []
    assert "Accept: text/event-stream, application/json\r\n" in server.requests[0]


@pytest.mark.parametrize("identifier", ["\xe9\u20ac\U0001f600", "a b", " x", "\x0bx", "x" * 4096])
def test_an_event_id_goes_back_as_it_came(identifier: str) -> None:
    first = streamed(f'id: {identifier}\ndata: {{"message":"m"}}\n\n')
    with streaming(["streaming", "success"], first, streamed()) as (items, _, server, asked):
        assert followed(items)[0] == ["m"]
    assert asked[1].strip() == identifier.strip()


@pytest.mark.parametrize("odd", ["id: " + "x" * 5000, "id: a\0b", "id"])
def test_an_event_id_that_cannot_go_back_does_not(odd: str) -> None:
    first = streamed(f'{odd}\ndata: {{"message":"m"}}\n\n')
    with streaming(["streaming", "success"], first, streamed()) as (items, _, server, asked):
        assert followed(items)[0] == ["m"]
    assert asked[1] == ""


def test_a_clean_end_is_never_success_and_json_may_come_between() -> None:
    order = (
        streamed(1), streamed(2), poll("streaming", 1, 2, 3), poll("streaming", 1, 2, 3, 4),
        streamed(3, 4, 5), poll("success", 1, 2, 3, 4, 5), poll("success", 6))
    with streaming(["streaming"], *order) as (items, clock, _, asked):
        told, verdict = followed(items)
    assert told == [f"m{number}" for number in range(1, 7)]
    assert verdict.status == "success" and not verdict.truncated
    assert asked == ["", "1", "2", "2", "2", "5", "5"] and clock.notes == []


@pytest.mark.parametrize("cut", [
    pytest.param("reset", marks=pytest.mark.skipif(UNDER_WINE, reason="Wine tells of a reset as of an end")),
    "chunk", "half an event",
])
def test_a_broken_stream_is_resumed_and_its_half_event_dropped(cut: str) -> None:
    whole = streamed(1)
    body = whole[len(STREAM):]
    first: Step = {
        "reset": reset_after(whole + b"id: 9\ndata: {"),
        "half an event": whole + b'id: 9\ndata: {"id": "9"}\n',
        "chunk": CHUNKED_STREAM + b"%x\r\n%b\r\n5\r\nid:" % (len(body), body),
    }[cut]
    order = first, streamed(1, 2), streamed()
    with streaming(["streaming", "success"], *order) as (items, clock, _, asked):
        assert followed(items)[0] == ["m1", "m2"]
    assert asked[1] == "1" and len(clock.notes) == (0 if cut == "half an event" else 2)


@pytest.mark.parametrize("head, frame", [
    (STREAM, b"%b"),
    (CHUNKED_STREAM, b"c0ffe0"),
    (STREAM[:-2] + b"Content-Length: 999999\r\n\r\n", b"%b"),
    (STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n", b"gzip"),
])
def test_an_event_is_delivered_as_it_arrives(head: bytes, frame: bytes) -> None:
    got = [threading.Event() for _ in range(3)]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)

    def speak(connection: socket.socket) -> None:
        connection.sendall(head)
        for number, event in enumerate(got):
            data = streamed(number)[len(STREAM):]
            if frame == b"c0ffe0":
                data = b"%x\r\n%b\r\n" % (len(data), data)
            elif frame == b"gzip":
                data = squeeze.compress(data) + squeeze.flush(zlib.Z_SYNC_FLUSH)
            connection.sendall(data)
            assert event.wait(60)  # the next comes when this one has been seen
        connection.sendall(b"0\r\n\r\n" if frame == b"c0ffe0" else b"")
    with streaming(["success"], speak, poll("success")) as (items, *_):
        for number, event in enumerate(got):
            assert next(items)["message"] == f"m{number}"
            event.set()
        assert list(items)[-1].status == "success"


@pytest.mark.parametrize("retry, wait_s", [
    ("", 1.5), ("retry: 100\n\n", 1.5), ("retry: 5000\n\n", 5.0), ("retry: 99999999\n\n", 30.0),
    ("retry: " + "9" * 5000 + "\n\n", 30.0), ("retry: x\n\n", 1.5),
])
def test_the_time_to_reconnect_is_the_server_s_within_bounds(retry: str, wait_s: float) -> None:
    at: List[float] = []

    def speak(connection: socket.socket) -> None:
        at.append(clock.now)
        connection.sendall(streamed(retry, len(at), {"run": {"status": "streaming"}}))
    with streaming(["success"], speak, speak, poll("success")) as (items, clock, _, _2):
        followed(items)
    assert at[1] - at[0] == wait_s


IN_REAL_TIME: Dict[str, Any] = {"clock": time.monotonic, "sleep": time.sleep, "interval_s": 0.1}
LAST_EVENT = {"id": "9", "message": "done"}


@pytest.mark.parametrize("kind_of_event", ["finished", "log"])
@pytest.mark.parametrize("after", ["silence", "comments", "empty events"])
def test_a_stream_that_brings_no_more_events_is_left_and_the_run_is_asked(
    kind_of_event: str, after: str,
) -> None:
    sent = streamed({**LAST_EVENT, "type": kind_of_event})
    speak = {"silence": then_silent(sent),
             "comments": dribble(sent, b": x\n\n", 0.01),
             "empty events": dribble(sent, b"data: {}\n\n", 0.01)}[after]
    with streaming(["streaming", "success"], speak, idle_s=0.1, **IN_REAL_TIME) as (
            items, clock, _, _2):
        told, verdict = followed(items)
    assert (told, verdict.status, clock.notes) == (["done"], "success", [])


def test_a_last_event_that_is_repeated_delays_nothing() -> None:
    again = streamed({**LAST_EVENT, "type": "finished"})[len(STREAM):]
    speak = dribble(STREAM + again, again, 0.01)
    with streaming(["success"], speak, idle_s=30.0, **IN_REAL_TIME) as (items, *_):
        assert followed(items)[0] == ["done"]


def test_what_a_stream_once_said_of_the_run_is_asked_again_when_it_is_silent() -> None:
    said = then_silent(streamed({"run": {"status": "streaming"}}))
    order = said, then_silent(STREAM)
    with streaming(["success"], *order, idle_s=0.1, **IN_REAL_TIME) as (items, _, server, _2):
        assert followed(items)[1].status == "success"
    assert "/events?" not in server.requests[1]


def test_a_stream_is_left_after_30_s_without_an_event() -> None:
    assert inspect.signature(mogplex.tail).parameters["idle_s"].default == 30.0


def test_a_run_that_streams_is_over_with_the_first_answer_after_its_finished_event() -> None:
    ending = streamed(1, {**LAST_EVENT, "type": "finished"})
    with streaming(["success"], ending) as (items, clock, server, asked):
        assert followed(items)[1].status == "success"
    assert len(server.requests) == 2 and clock.now == 1000.0


def test_comments_show_in_time_that_the_service_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mogplex, "GOOD_STREAM_S", 0.05)
    requests_at: Dict[str, int] = {}

    def note(progress: mogplex.Progress) -> None:
        if progress.message:
            requests_at[progress.message.split(":")[0]] = len(server.requests)

    order = poll("streaming", 1), reset_after(b""), dribble(STREAM, b": x\n\n", 0.01)
    options = {**IN_REAL_TIME, "idle_s": 0.5, "on_progress": note}
    with streaming(["success"], *order, **options) as (items, _, server, asked):
        followed(items)
    # The third request's stream said so, and not the answer of the run that was asked in the end.
    assert requests_at == {"request failed": 2, "connected again": 3}


def test_a_204_sends_the_tail_to_the_run() -> None:
    with streaming(["streaming", "success"], streamed(1), answer(204)) as (items, clock, _, _2):
        told, verdict = followed(items)
    assert (told, verdict.status, clock.notes) == (["m1"], "success", [])


def test_the_token_in_a_stream_is_hidden_wherever_it_is_split() -> None:
    echo = streamed({"id": "1", "message": f"the token is {TOKEN}!"}, 2)
    for at in (len(STREAM), echo.index(TOKEN.encode()) + 9):
        def speak(connection: socket.socket, at: int = at) -> None:
            connection.sendall(echo[:at])
            time.sleep(0.05)
            connection.sendall(echo[at:])
        with streaming(["success"], speak) as (items, *_):
            told, _ = followed(items)
        assert told == ["the token is ***!", "m2"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_token_in_a_stream_is_hidden_however_it_is_spelled(spelling: str) -> None:
    event = {"id": "1", "message": SPELLINGS[spelling](TOKEN)}

    def speak(connection: socket.socket) -> None:
        connection.sendall(streamed(event, 2))
    with streaming(["success"], speak) as (items, *_):
        told, _ = followed(items)
    assert "***" in told[0] and TOKEN not in mogplex.sanitize(told[0])
    assert told[1] == "m2"


def test_a_stream_is_waited_for_longer_than_a_request_may_take() -> None:
    def speak(connection: socket.socket) -> None:
        connection.sendall(streamed(1))
        asked.wait(0.6)
        connection.sendall(streamed(2)[len(STREAM):])
    asked = threading.Event()
    with RawServer(steps(speak, poll("success", 1, 2))) as server:
        with mogplex.Client(TOKEN, server.url, timeout_s=0.3) as one:
            told, _ = followed(mogplex.tail(one, "R", interval_s=0.01, idle_s=30.0))
    assert told == ["m1", "m2"] and "Last-Event-ID: 2" in server.requests[2]


def test_a_stream_may_carry_the_run_and_lists_of_events() -> None:
    first = {"run": {"status": "streaming"}, "events": [{"id": "1", "message": "m1"}]}
    second = {"events": [{"id": "2"}, {"id": "3", "message": "m3"}], "run": {"status": "success"}}
    order = streamed(first, 2, second, {"run": {"status": "success"}}, 4)
    with streaming(["success"], order, streamed(5)) as (items, _, server, asked):
        told, verdict = followed(items)
    # Two terminal words in one breath are not two reads: what came an interval later is there.
    assert told == ["m1", "m2", "m3", "m4", "m5"]
    assert verdict.status == "success" and len(asked) == 2


def test_what_is_no_event_is_said_once_and_left_out() -> None:
    texts = ("[DONE]", "7", "null", "{", "{}", "[" * 100_000)
    junk = "".join(f"event: ping\ndata: {text}\n\n" for text in texts)
    with streaming(["success"], streamed(junk, 1, junk)) as (items, clock, _, _2):
        assert followed(items)[0] == ["m1"]
    assert clock.notes == ["ignored data in the stream that is not an event"]


@pytest.mark.parametrize("endless", [
    b"data: " + b"x" * 200_000, b"data: x\n" * 30_000, b"data\n" * 30_000], ids=short)
def test_an_event_without_an_end_is_refused(
    endless: bytes, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "MAX_BODY", 100_000)
    with streaming(["streaming"], STREAM + endless) as (items, *_):
        with pytest.raises(mogplex.InvalidResponseError, match="TOO_LARGE: an event is larger"):
            list(items)


def test_comments_are_no_event_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mogplex, "MAX_BODY", 100_000)
    with streaming(["success"], STREAM + b": x\n\n" * 60_000) as (items, *_):
        assert followed(items)[1].status == "success"


@pytest.mark.parametrize("text, kept", [
    ('{"b": 1, "a": 1.50}', True), ('{"a":"\\ud800\\u0000"}', True),
    ('{"a":\n1}', False), ('{"a":"\xe9"}', False),
])
def test_an_event_keeps_its_text_where_that_is_a_line_of_ascii_json(text: str, kept: bool) -> None:
    event = mogplex.parse_json(text)
    line = mogplex.ndjson_lines([event], [text])
    assert (line == text) == kept
    assert line.isascii() and "\n" not in line and json.loads(line) == event


@pytest.mark.skipif(UNDER_WINE, reason="Wine tells of a reset as of an end")
def test_the_stream_follows_the_faults_of_polls() -> None:
    """A stream that only ever breaks is no good answer, however often it begins."""
    order = streamed(1), reset_after(STREAM + b": x\n\ndata: {")
    with streaming(["streaming"], *order) as (items, clock, _, _2):
        with pytest.raises(mogplex.UnavailableError, match="GAVE_UP"):
            list(items)
    assert [note.split(":")[0] for note in clock.notes] == ["request failed"]


def test_run_follow_starts_one_run_and_follows_it_through_faults(
    cli: Callable[..., Result], demo: mogplex.DemoServer,
) -> None:
    """Every second answer is lost, the start's too: one run, all its events, the true verdict."""
    address = demo.url[len("http://"):].split(":")

    def half(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        with socket.create_connection((address[0], int(address[1]))) as inner:
            inner.sendall(request.replace("Connection: keep-alive", "Connection: close").encode())
            data = b""
            while b"\r\n0\r\n\r\n" not in data:
                data += inner.recv(65536)
        if number % 2 == 0:
            return data
        faults: List[Step] = [
            reset_after(b""), reset_after(data[:40]), data[:-9], answer(502, "<html>"), answer(200)]
        return steps(faults[number // 2 % 5])(1, request, connection)
    before = len(demo.service.runs)
    with RawServer(half) as server:
        demo.hosts.add(server.url[len("http://"):])
        result = cli("run", "--repo", mogplex.DEMO_WEB, "--follow", "--json", "hi",
                     env=service(server.url, demo.token))
    started, *events, end = map(json.loads, result.out.splitlines())
    assert result.code == 0 and len(demo.service.runs) == before + 1
    assert end["status"] == "success" and end["runId"] == started["runId"]
    with mogplex.Client(demo.token, demo.url) as asking:
        assert events == asking.events(started["runId"])["events"]


# Several tails at once.


class Shared(VirtualClock):
    """Time in which another program spends requests of the same token, one every ``every_s``."""

    def __init__(self, every_s: float) -> None:
        super().__init__(1.8e9)
        self.every_s = every_s
        self.spent_at = self.now
        self.spend: Callable[[], object] = int

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        while self.now - self.spent_at >= self.every_s:
            self.spent_at += self.every_s
            with contextlib.suppress(mogplex.DemoRefusal):
                self.spend()


class Crowd(NamedTuple):
    """What twenty runs on one token came to."""

    late_s: List[float]      # each verdict, after the run's end
    refused_at: List[float]  # the 429s
    told: List[bool]         # of each run, whether it told all its events once


def followed_crowd(
    clock: Shared, task: str, cancels: bool = False, spread_s: float = 0.0, rest_s: float = 61.0,
) -> Crowd:
    """Twenty runs that end within ``spread_s``, followed ``rest_s`` after their starts."""
    dice = random.Random(5)
    ends: Dict[str, float] = {}
    late_s: List[float] = []
    refused_at: List[float] = []
    events: Dict[str, List[str]] = {}

    def log(line: str) -> None:
        if " 429 " in line:
            refused_at.append(clock.now)

    with metered(mogplex.DemoServer(clock=clock)) as server:
        runs = server.service.runs
        with mogplex.Client(server.token, server.url) as starting:
            for number in range(20):
                run_id = starting.start_run({**WEB, "prompt": task}, str(number))["runId"]
                run = runs[run_id]
                late = mogplex.demo_later(run.steps[2:], 150.0 + dice.random() * spread_s)
                run.steps = run.steps[:2] + late
                ends[run_id] = max(step.at_s for step in run.steps if step.status)
        clock.now += rest_s
        clock.spent_at = clock.now
        clock.spend = functools.partial(server.service.sign_in.admit, server.token, "")
        with mogplex.Client(server.token, server.url, log=log) as one:
            for run_id, item in mogplex.tail_many(
                one, ends, clock=clock, sleep=clock.sleep, random=dice.random, cancels=cancels,
            ):
                if isinstance(item, mogplex.Verdict):
                    late_s.append(clock.now - ends[run_id])
                else:
                    assert isinstance(item, dict), item
                    events.setdefault(run_id, []).append(item["message"])
        clock.now += 1000
        told = []
        with mogplex.Client(server.token, server.url) as asking:
            for run_id, messages in events.items():
                listed = asking.events(run_id)["events"]
                told.append(messages == [event["message"] for event in listed])
    return Crowd(late_s, refused_at, told)


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("task", ["x", "fail", "crash"])
@pytest.mark.slow
def test_twenty_runs_on_one_token_that_end_at_once_are_told_within_a_minute(
    task: str, cancels: bool,
) -> None:
    crowd = followed_crowd(Shared(every_s=1e9), task, cancels)
    assert len(crowd.late_s) == 20 and max(crowd.late_s) <= 60.0
    assert crowd.refused_at == [] and all(crowd.told) and len(crowd.told) == 20


@pytest.mark.parametrize("every_s", [4.0, 2.5, 1.5])
@pytest.mark.slow
def test_twenty_runs_share_a_token_and_are_refused_once_a_minute(every_s: float) -> None:
    """Also where the runs were started on it a moment ago."""
    crowd = followed_crowd(Shared(every_s), "fail", spread_s=300.0, rest_s=0.0)
    assert len(crowd.late_s) == 20 and all(crowd.told)
    at = crowd.refused_at
    assert at and min([later - sooner for sooner, later in zip(at, at[1:])], default=60.0) >= 60.0


@pytest.mark.parametrize("reserved, most", [(0, 52), (8, 52), (20, 40), (50, 10), (99, 10)])
def test_a_budget_leaves_what_is_reserved(reserved: int, most: int) -> None:
    budget = mogplex.Budget(0.0, metered=True)
    budget.reserved = reserved
    budget.answered(0.0)
    sent: List[float] = []
    while budget.free_at < 300.0:
        sent.append(max(0.0, budget.free_at))
        budget.spend(1, sent[-1], 0.0)
    in_a_minute = [sum(at <= other < at + 60.0 for other in sent) for at in sent]
    assert most - 4 <= max(in_a_minute) <= most and sent[:4] == [0.0] * 4


def test_a_sign_in_has_a_wider_budget() -> None:
    """The service refuses it nothing."""
    budget = mogplex.Budget(0.0, metered=False)
    budget.answered(0.0)
    budget.spend(100, 0.0, 0.0)
    assert budget.free_at < 30.0


def test_a_budget_sends_one_request_ahead_and_again_after_a_429() -> None:
    budget = mogplex.Budget(0.0, metered=True)
    budget.spend(1, 0.0, 0.0)
    assert budget.free_at == 2.0
    budget.answered(0.5)
    assert budget.free_at <= 0.5
    budget.refused(1.0, until=61.0)
    budget.answered(1.1)  # to what was sent before
    assert budget.free_at == 61.0
    budget.spend(1, 61.0, 0.0)
    assert budget.free_at == 63.0


def test_a_budget_slows_down_once_for_requests_that_were_refused_together() -> None:
    alone = mogplex.Budget(0.0, metered=True)
    together = mogplex.Budget(0.0, metered=True)
    for budget in (alone, together):
        for number in range(21):
            budget.spend(1, float(number), 0.0)
        budget.refused(21.0, until=81.0)
    together.refused(21.1, until=82.0)
    for budget in (alone, together):
        budget.spend(10, 82.0, 0.0)
    assert alone.free_at == together.free_at > 82.0 + 10 * 3.0 - 4 * 3.0


def test_a_second_terminal_answer_that_comes_late_is_the_end() -> None:
    """More than the 5 s for the event that says why have passed by then."""
    story = mogplex.Story("R", 0.0)
    story.hear_run({"status": "failed", "error": "boom"}, 0.0)
    story.hear_run({"status": "failed", "error": "boom"}, 6.4)
    assert story.verdict is None
    story.hear_run({"status": "failed", "error": "boom"}, 6.5)
    assert story.verdict is not None


Answer = Callable[[int, str, socket.socket], Optional[bytes]]


def run_asked(request: str) -> str:
    """The id of the run that a request is about."""
    found = re.search(r"/runs/([^/? ]+)", request)
    return found.group(1) if found else ""


def of_runs(**answers: Step) -> Answer:
    """An ``answer`` for RawServer: one for each run, whatever is asked about it."""
    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        step = answers[run_asked(request)]
        if isinstance(step, bytes):
            return step
        step(connection)
        return None
    return reply


OVER = ok({"run": {"status": "success"}, "events": [FINISHED_EVENT]})
GOES_ON = ok({"run": {"status": "streaming"}, "events": log(1)})
NO_CONTENT = answer(204)


def test_a_stream_and_an_answer_that_hangs_hold_up_no_other_run() -> None:
    """The stream and the silence last until the verdict on the third run has come."""
    over = threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.sendall(streamed(1, 2))
        assert over.wait(30)

    def hang(connection: socket.socket) -> None:
        assert over.wait(30)

    with RawServer(of_runs(S=stream, H=hang, A=OVER)) as server:
        with mogplex.Client(TOKEN, server.url) as one:
            heard: List[Tuple[str, str]] = []
            for run_id, item in mogplex.tail_many(one, ["S", "H", "A"]):
                name = item["message"] if isinstance(item, dict) else type(item).__name__
                heard.append((run_id, name))
                if len(heard) == 4:
                    break
        over.set()
    assert [name for run_id, name in heard if run_id == "S"] == ["m1", "m2"]
    assert [name for run_id, name in heard if run_id == "A"] == ["done", "Verdict"]


def test_a_run_that_is_given_up_does_not_end_the_others() -> None:
    gone = refusal(404, "NOT_FOUND", "no such run")
    clock = VirtualClock()
    with RawServer(of_runs(A=gone, B=OVER)) as server, mogplex.Client(TOKEN, server.url) as one:
        items = list(mogplex.tail_many(one, ["A", "B", "A"], clock=clock, sleep=clock.sleep))
    ends = {run_id: item for run_id, item in items if not isinstance(item, dict)}
    assert isinstance(ends["A"], mogplex.MogplexError) and ends["A"].status == 404
    assert isinstance(ends["B"], mogplex.Verdict) and len(items) == 3


def test_the_time_out_of_several_tails_is_for_all() -> None:
    clock = VirtualClock()
    with RawServer(of_runs(A=GOES_ON, B=GOES_ON)) as server, mogplex.Client(TOKEN, server.url) as one:
        items = mogplex.tail_many(one, "AB", timeout_s=30, clock=clock, sleep=clock.sleep)
        with pytest.raises(mogplex.TailTimeout, match="timed out after 30s"):
            list(items)
    assert clock.now == pytest.approx(1030.0)


def many(one: mogplex.Client, run_ids: str, clock: VirtualClock, **options: Any) -> mogplex.Tails:
    """Several tails in virtual time."""
    timing = mogplex.Timing(timeout_s=120.0, clock=clock, sleep=clock.sleep, random=lambda: 0.0)
    return mogplex.Tails(one, run_ids, timing, 200, mogplex.tell_nobody_of_many, **options)


def test_every_request_of_several_tails_is_paid_for() -> None:
    """After a 204 a look takes two."""
    clock = VirtualClock()
    asked_at: List[float] = []

    def answer(number: int, request: str, connection: socket.socket) -> bytes:
        asked_at.append(clock.now)
        return NO_CONTENT if "/events?" in request else GOES_ON

    with RawServer(answer) as server, mogplex.Client(TOKEN, server.url) as one:
        with pytest.raises(mogplex.TailTimeout):
            list(many(one, "ABCDE", clock).items())
    assert 40 <= max(sum(at <= other < at + 60 for other in asked_at) for at in asked_at) <= 58


def test_the_budget_of_several_tails_follows_the_credential_and_the_runs_left() -> None:
    with RawServer(of_runs(A=OVER, B=GOES_ON)) as server, mogplex.Client(TOKEN, server.url) as one:
        for cancels, reserved in ((True, 1), (False, 0)):
            tails = many(one, "AB", VirtualClock(), cancels=cancels)
            with pytest.raises(mogplex.TailTimeout):
                list(tails.items())
            assert tails.budget.reserved == reserved
        signed_in = mogplex.Credential(TOKEN, refresh_token="r")
        with mogplex.Client(signed_in, server.url) as other:
            wider = many(other, "AB", VirtualClock()).budget
        for budget in (wider, tails.budget):
            budget.spend(100, 2000.0, 0.0)
        assert wider.free_at < 2030.0 < tails.budget.free_at


@pytest.mark.parametrize("first", [
    lambda connection: connection.sendall(streamed(1)), refusal(404, "NOT_FOUND", "no such run")])
def test_the_first_good_answer_lets_the_other_tails_begin(first: Step) -> None:
    """Also one whose look goes on, and one for which its run is given up."""
    clock = VirtualClock()
    with RawServer(of_runs(A=first, B=GOES_ON)) as server, mogplex.Client(TOKEN, server.url) as one:
        tails = many(one, "AB", clock)
        items = tails.items()
        assert next(items)[0] == "A" and tails.budget.free_at <= clock.now
        items.close()


@pytest.mark.slow
def test_an_outage_of_several_tails_is_ridden_out_for_300_s() -> None:
    """The waits for the others' turns count too."""
    clock = VirtualClock()
    since: List[float] = []

    def answer(number: int, request: str, connection: socket.socket) -> bytes:
        if number <= 30:
            since.append(clock.now)
            return GOES_ON
        return refusal(503, "SERVICE_UNAVAILABLE", "later")

    names = [f"R{number}" for number in range(30)]
    with RawServer(answer) as server, mogplex.Client(TOKEN, server.url) as one:
        items = mogplex.tail_many(
            one, names, clock=clock, sleep=clock.sleep, random=lambda: 0.0)
        ends = [item for _, item in items if not isinstance(item, dict)]
    assert {type(end) for end in ends} == {mogplex.UnavailableError} and len(ends) == 30
    assert 300 <= clock.now - since[-1] < 400


def test_what_on_progress_raises_ends_all_tails_and_their_threads() -> None:
    def refuse(run_id: str, progress: mogplex.Progress) -> None:
        if progress.status:
            raise KeyboardInterrupt

    hold = threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.sendall(streamed(1))
        connection.settimeout(20)
        assert connection.recv(1) == b""  # the client leaves
        hold.set()

    with RawServer(of_runs(A=stream, B=GOES_ON)) as server:
        with mogplex.Client(TOKEN, server.url) as one:
            with pytest.raises(KeyboardInterrupt):
                list(mogplex.tail_many(one, "AB", on_progress=refuse))
            assert hold.wait(20)


def test_a_reader_that_takes_nothing_is_waited_for() -> None:
    """Events are not read into memory without a bound."""
    sent = threading.Event()

    def stream(connection: socket.socket) -> None:
        connection.sendall(STREAM)
        connection.settimeout(1.0)
        with contextlib.suppress(OSError):
            for number in range(200_000):
                connection.sendall(streamed(number)[len(STREAM):] * 50)
        sent.set()

    with RawServer(of_runs(A=stream)) as server, mogplex.Client(TOKEN, server.url) as one:
        tails = mogplex.Tails(one, "A", mogplex.Timing(), 200, mogplex.tell_nobody_of_many)
        items = tails.items()
        assert next(items)[0] == "A"
        assert sent.wait(60) and tails.posted.qsize() <= mogplex.MOST_POSTED + 1
        items.close()


# ---------------------------------------------------------------- 6. Output

RUN = {
    "runId": "run-uuid", "status": "streaming", "harness": "codex", "repoId": "8f3a2b1c-...",
    "branch": {"base": "main", "working": "feat/x", "createBranch": True}, "rootDirectory": None,
    "eventsUrl": "/api/v1/mogplex/runs/run-uuid/events", "sandboxId": "vsb_abc", "error": None,
    "cancelUrl": "/api/v1/mogplex/runs/run-uuid/cancel", "createdAt": "2026-05-17T10:14:00Z",
    "updatedAt": "2026-05-17T10:15:30.0+00:00",
}


def test_a_run_as_a_block() -> None:
    assert mogplex.run_text(RUN, False) == """\
run     run-uuid
status  streaming
harness codex
repo    8f3a2b1c-...
branch  feat/x (base main, created)
sandbox vsb_abc
events  /api/v1/mogplex/runs/run-uuid/events
cancel  /api/v1/mogplex/runs/run-uuid/cancel
created 2026-05-17T10:14:00.000Z
updated 2026-05-17T10:15:30.000Z"""


def test_rows_without_a_value_are_left_out_and_error_and_root_appear_with_one() -> None:
    assert mogplex.run_text({"runId": "r", "branch": 7, "sandboxId": None}, False) == "run     r"
    run = {**RUN, "error": "Sandbox\nlaunch \x1b[31mfailed", "rootDirectory": "web"}
    shown = mogplex.run_text(run, False)
    assert "root    web\n" in shown and shown.endswith("error   Sandbox \u23ce launch failed")
    branch = {"working": "x", "createBranch": False}
    assert mogplex.run_text({"branch": branch}, False) == "branch  x"


def test_a_run_whose_events_tell_more() -> None:
    delivery = mogplex.Delivery("mogplex/agent-1", "https://g/1", True)
    run = {"runId": "r", "branch": {"working": "main"}, "sandboxRecordId": "s"}
    assert mogplex.run_text(run, False, delivery, "command_failed,\nexit code 1") == """\
run     r
branch  main
pushed  mogplex/agent-1
pull    https://g/1
record  s
reason  command_failed, \u23ce exit code 1"""


def test_a_started_run() -> None:
    branch = {
        "base": "main", "working": "mogplex/run/2026-05-17/refactor-auth", "createBranch": True}
    run = {"runId": "R", "status": "pending", "harness": "codex", "branch": branch,
           "repoId": "8f3a2b1c-1234-4abc-9def-1234567890ab"}
    assert mogplex.started_text(run, False) == """\
started run R (pending)
repo    8f3a2b1c-1234-4abc-9def-1234567890ab
harness codex
branch  mogplex/run/2026-05-17/refactor-auth (base main, created)
tail events: mogplex runs events R --follow"""
    assert mogplex.started_text({**run, "replayed": True, "status": "failed"}, False).startswith(
        "matched existing run R (failed)\n")


EVENT_LINES = [
    ({"createdAt": "2026-05-17T10:14:00.5Z", "type": "log", "message": "hi"},
     "2026-05-17T10:14:00.500Z  log             hi"),
    ({"type": "status_changed"}, "status_changed"),
    ({}, ""),
    ({"message": 5, "type": ["x"]}, "                5"),
    # Tools, in either spelling of the types.
    ({"createdAt": "2026-05-17T10:14:00Z", "type": "tool_call", "toolName": "sh", "message": "ls"},
     "2026-05-17T10:14:00.000Z  tool_call       tool=sh  ls"),
    ({"type": "tool_started", "toolName": "sh", "message": "ls"}, "tool_started    tool=sh  ls"),
    ({"type": "tool_finished", "toolName": "sh"}, "tool_finished   tool=sh"),
    # What was delivered.
    ({"type": "log", "message": "Ready", "payload": {"pull_request_url": "https://g/1"}},
     "log             Ready https://g/1"),
    ({"type": "log", "payload": {"pull_request_url": "https://g/1"}},
     "log             https://g/1"),
    ({"type": "log", "message": "at https://g/1", "payload": {"pull_request_url": "https://g/1"}},
     "log             at https://g/1"),
    ({"type": "log", "message": "No code changes", "payload": {"pull_request_url": None}},
     "log             No code changes"),
    # Why it failed.
    ({"type": "failed", "message": "Harness failed", "payload": {"error": "boom\nbang"}},
     "failed          Harness failed: boom \u23ce bang"),
    ({"type": "failed", "payload": {"error": "boom"}}, "failed          boom"),
    ({"type": "failed", "payload": {"error": "boom", "pull_request_url": "https://g/1"}},
     "failed          boom"),
    ({"type": "failed", "message": "it said boom", "payload": {"error": "boom"}},
     "failed          it said boom"),
    ({"type": "failed", "message": "Harness run failed",
      "payload": {"exit_code": 1, "failure_code": "command_failed"}},
     "failed          Harness run failed: command_failed, exit code 1"),
    ({"type": "finished", "message": "Harness run finished", "payload": {"exit_code": 3}},
     "finished        Harness run finished: exit code 3"),
    ({"type": "finished", "message": "Harness run finished", "payload": {"exit_code": 0}},
     "finished        Harness run finished"),
    ({"type": "failed", "message": "no", "payload": {"exit_code": True, "failure_code": ["x"]}},
     "failed          no"),
    ({"type": "log", "message": "ran", "payload": {"exit_code": 1}}, "log             ran"),
    ({"type": "::error::", "toolName": "\x1b[2J##[x]", "message": "\r::warning::x"},
     ": :error::      tool=# #[x]  : :warning::x"),
]


@pytest.mark.parametrize("event, line", EVENT_LINES)
def test_events_as_lines(event: Dict[str, Any], line: str) -> None:
    assert mogplex.event_line(event) == line


def test_a_newline_has_a_spelling_for_every_encoding() -> None:
    names = ("utf-8", "ascii", "latin-1", None, "no-such")
    assert [mogplex.newline_mark(name) for name in names] == [
        " \u23ce ", " | ", " | ", " | ", " | "]


def test_json_lines_are_ascii_and_as_they_came() -> None:
    record = {"b": "\u2028\u00fc\x1b::error::", "a": [None, 1.5], "\ud800": "\ud800"}
    line = mogplex.ndjson(record)
    assert line.isascii() and "\n" not in line
    assert list(json.loads(line)) == ["b", "a", "\ud800"]


@pytest.mark.parametrize("texts, lines", [
    (['{"a": 1}', '{"b":2}'], '{"a": 1}\n{"b":2}'),                  # as they came
    (['{"a": 1}', ""], '{"a":1}\n{"b":"##"}'),                       # one is not known
    (['{"a":\n1}', '{"b":2}'], '{"a":1}\n{"b":"##"}'),               # one is two lines
    (['{"a":1}', '{"b":"\u00fc"}'], '{"a":1}\n{"b":"##"}'),          # one is not ASCII
    (['{"a":1}', '{"b": "##"}'], '{"a":1}\n{"b": "##"}'),
])
def test_a_stream_s_texts_are_its_json_lines_where_they_are_lines(
    texts: List[str], lines: str,
) -> None:
    records = [{"a": 1}, {"b": "##"}]
    assert mogplex.ndjson_lines(records, texts) == lines.replace("##", "#\\u0023")


NESTED = {
    "runId": "r", "branch": {"working": "b", "create": False}, "none": None, "empty": "", "n": 1.5,
    "lists": [[{"id": 7}], ["x"]], "0": {"1": "digits"}, "a.b": {"c.d": "dots"}, "": "no key",
    "a": {"c": "short"}, "\u00fc": "u",
}


@pytest.mark.parametrize("path, value", [
    ("runId", "r"), ("branch.working", "b"), ("branch", {"working": "b", "create": False}),
    ("branch.create", False), ("none", None), ("empty", ""), ("n", 1.5),
    ("lists.0.0.id", 7), ("lists.1.0", "x"), ("lists.1", ["x"]), ("lists.01.000", "x"),
    ("0.1", "digits"), ("a.c", "short"), ("a.b.c.d", None), ("\u00fc", "u"),
    ("nope", None), ("x", None), ("runId.x", None), ("n.5", None), ("none.x", None), ("branch.0", None),
    ("lists.2", None), ("lists.-1", None), ("lists.x", None), ("lists.0.1", None),
    ("lists.\u0661", None), ("lists." + "9" * 5000, None), (".".join("x" * 9999), None),
    (" runId", None), ("RUNID", None), ("$.runId", None), ("lists[0]", None),
])
def test_the_value_at_a_path(path: str, value: object) -> None:
    assert mogplex.value_at(NESTED, path) == value


def test_a_path_finds_keys_that_contain_dots() -> None:
    record = {"a.b": {"c.d": 1, "e": 2}, "x.y": 3, "x": {"z": 4}}
    found = [mogplex.value_at(record, path) for path in ("a.b.c.d", "a.b.e", "x.y", "x.z", "a")]
    assert found == [1, 2, None, 4, None]


def test_a_path_into_a_list_of_lists() -> None:
    assert mogplex.value_at([[{"id": "first"}], []], "0.0.id") == "first"
    assert mogplex.value_line([{"id": 1}], "0.id", "utf-8") == "1"


@pytest.mark.parametrize("value, line", [
    ("plain \u2713 \"quoted\" C:\\new", "plain \u2713 \"quoted\" C:\\new"),
    ("a\nb\r\nc\td\x00", r"a\nb\r\nc\td\u0000"),
    ("\x1b[2J\x9b1m\x7f", r"\u001b[2J\u009b1m\u007f"),
    ("a\u2028b\u202ec\u200bd\U000e0041", r"a\u2028b\u202ec\u200bd\udb40\udc41"),
    ("\ud800", r"\ud800"),
    ("::error::x", r"\u003a:error::x"), ("  ::error::x", r"  \u003a:error::x"), ("a::b", "a::b"),
    ("\n::error::x", r"\n::error::x"),
    ("x##[group]y ##VSO[z] ## heading", r"x#\u0023[group]y #\u0023VSO[z] ## heading"),
    ("\x1b[0Ksection_start:1:x\r", r"\u001b[0Ksection_start:1:x\r"),
    (None, ""), ("", ""), (True, "true"), (5, "5"), (1.5, "1.5"), ([], "[]"),
    ({"a": ["\n", None]}, r'{"a":["\n",null]}'), (["##[group]"], r'["#\u0023[group]"]'),
])
def test_the_value_at_a_path_is_one_harmless_line(value: object, line: str) -> None:
    assert mogplex.value_line({"v": value}, "v", "utf-8") == line


def test_a_value_that_stdout_cannot_spell_is_escaped() -> None:
    assert mogplex.value_line({"v": "caf\u00e9 \u2713"}, "v", "cp1252") == r"caf\u00e9 \u2713"


def test_a_value_of_any_size_is_a_line_in_linear_time() -> None:
    def check(size: int) -> None:
        line = mogplex.value_line({"v": part * size}, "v", "utf-8")
        assert len(line) >= size and line.isprintable()

    for part in ("::", "##", "#[", " :", "\x1b[", "a\n"):
        assert is_linear(check), part


REPO_ID = "8f3a2b1c-1234-4abc-9def-1234567890ab"
WIDE_REPO = {"id": REPO_ID, "full_name": "acme/web", "default_branch": "a-long-branch-indeed" * 4}


def test_a_table_is_as_wide_as_its_texts_where_no_width_is_given() -> None:
    whole = mogplex.table([WIDE_REPO], mogplex.REPO_COLUMNS, mogplex.Setting())
    assert WIDE_REPO["default_branch"] in whole and "\u2026" not in whole


@pytest.mark.parametrize("width", [100, 80, 70])
def test_a_table_is_shortened_to_the_terminal_but_not_in_its_ids(width: int) -> None:
    setting = mogplex.Setting(width=width)
    narrow = mogplex.table([WIDE_REPO], mogplex.REPO_COLUMNS, setting)
    assert REPO_ID in narrow and "acme/web" in narrow and "\u2026" in narrow
    assert max(map(len, narrow.splitlines())) <= width


def test_an_id_is_whole_in_any_column_and_on_any_terminal() -> None:
    sandbox = {"id": REPO_ID, "repo_id": REPO_ID.replace("8", "9"), "error": "x" * 200,
               "status": "waiting for a person"}
    narrow = mogplex.table([sandbox], mogplex.SANDBOX_COLUMNS, mogplex.Setting(width=20))
    assert REPO_ID in narrow and sandbox["repo_id"] in narrow and "x" * 10 not in narrow
    assert sandbox["status"] in narrow


def test_colours_take_no_room_in_a_table() -> None:
    sandbox = {"id": "s", "status": "running", "error": "e" * 90}
    setting = mogplex.Setting(width=100)
    without = mogplex.table([sandbox], mogplex.SANDBOX_COLUMNS, setting)
    coloured = mogplex.table([sandbox], mogplex.SANDBOX_COLUMNS, setting._replace(colour=True))
    assert "\x1b[32mrunning\x1b[0m" in coloured
    assert re.sub("\x1b.*?m", "", coloured).split() == without.split()


def test_numbers_and_blanks_in_a_table_stay_text() -> None:
    repos = [{"id": "0012", "full_name": "1e5"}, {"full_name": "x"}]
    columns = mogplex.REPO_COLUMNS[:2]
    assert mogplex.table(repos, columns, mogplex.Setting()) == (
        "ID    REPO\n0012  1e5\n      x")


CELLS = [  # columns, a record, what its row holds
    (mogplex.REPO_COLUMNS,
     {"id": "1", "full_name": "a/\x1b[2Jb", "default_branch": "main", "root_directory": None},
     ["1", "a/b", "main", ""]),
    (mogplex.SANDBOX_COLUMNS,
     {"id": "1", "repo_id": "R", "base_branch": "main", "working_branch": "x", "status": "paused",
      "preview_url": "https://p", "last_active_at": "1970-01-01T00:01:00Z", "error": "e\nf"},
     ["1", "acme/web", "x", "paused", "https://p", "40s ago", "e \u23ce f"]),
    (mogplex.SANDBOX_COLUMNS,
     {"id": "1", "repo_id": "Q", "base_branch": "main", "working_branch": "", "status": 5,
      "last_active_at": "soon"},
     ["1", "Q", "main", "5", "", "soon", ""]),
    (mogplex.HISTORY_COLUMNS,
     {"id": "1", "key": "k", "repo": "R", "branch": "b", "task": "t",
      "time": "1970-01-01T00:00:00Z"},
     ["1", "acme/web", "b", "1m ago", "t"]),
    (mogplex.HISTORY_COLUMNS,
     {"key": "k", "repo": "a/b", "time": "1970-01-01T00:00:00Z", "task": "t"},
     ["in doubt: key k", "a/b", "", "1m ago", "t"]),
]


@pytest.mark.parametrize("columns, record, row", CELLS)
def test_records_as_rows(columns: Any, record: Dict[str, Any], row: List[str]) -> None:
    setting = mogplex.Setting(now=100.0, repo_names={"R": "acme/web"})
    assert mogplex.row_of(record, columns, setting) == row


def test_a_column_is_added_in_one_line_and_is_in_every_format() -> None:
    added = mogplex.Column("INSTALLATION", mogplex.plain("installation_id"))
    columns = (*mogplex.REPO_COLUMNS, added)
    repos = [{"id": "1", "full_name": "a/b", "installation_id": 77}]
    shown = {name: write(repos, columns, mogplex.Setting(width=80))
             for name, write in mogplex.LIST_FORMATS.items()}
    titles, row = shown["table"].splitlines()
    assert titles.split() == ["ID", "REPO", "BRANCH", "ROOT", "INSTALLATION"]
    assert row.split() == ["1", "a/b", "77"]
    assert shown["tsv"] == "ID\tREPO\tBRANCH\tROOT\tINSTALLATION\n1\ta/b\t\t\t77"
    assert shown["json"] == '{"id":"1","full_name":"a/b","installation_id":77}'


@pytest.mark.parametrize("environment, flags, coloured", [
    ({}, [], False), ({"FORCE_COLOR": "1"}, [], True), ({"FORCE_COLOR": "0"}, [], False),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, [], False),
    ({"FORCE_COLOR": "1", "TERM": "dumb"}, [], False),
    ({"FORCE_COLOR": "1"}, ["--no-color"], False),
])
def test_colour(
    cli: Callable[..., Result], demo: mogplex.DemoServer, environment: Dict[str, str],
    flags: List[str], coloured: bool,
) -> None:
    env = {"TERM": "xterm", **service(demo.url, demo.token), **environment}
    result = cli("runs", "get", mogplex.DEMO_RUNS[0]["id"], *flags, env=env)
    assert ("\x1b[32msuccess\x1b[0m" in result.out) is coloured and result.code == 0
    assert result.out.count("\x1b") == (2 if coloured else 0)


def verdict(**fields: Any) -> mogplex.Verdict:
    """A Verdict with something in it."""
    known = mogplex.Verdict("r", "failed", "", "", "", False, None, {})
    return known._replace(**fields)


def test_the_last_line_of_a_followed_run_as_json() -> None:
    line = mogplex.ndjson(mogplex.verdict_json(verdict(status="success")))
    assert line == '{"runId":"r","status":"success"}'
    full = verdict(error="boom", working_branch="b", pull_request_url="u", truncated=True)
    assert mogplex.verdict_json(full) == {
        "runId": "r", "status": "failed", "error": "boom", "pullRequestUrl": "u",
        "workingBranch": "b", "truncated": True}


def test_what_is_worth_knowing_at_the_end() -> None:
    assert mogplex.outcome_notes(mogplex.outcome_of_verdict(verdict())) == []
    full = verdict(error="boom", working_branch="b", pull_request_url="u", duration_s=125.0)
    assert mogplex.outcome_notes(mogplex.outcome_of_verdict(full)) == [
        "run error: boom", "branch: b", "pull request: u", "duration: 2m 05s"]


@pytest.mark.parametrize("statuses, line", [
    (["success"], "1 run: 1 success"),
    (["new", "failed", "success", "failed"], "4 runs: 1 success, 2 failed, 1 new"),
    (["\x1b[2Jstreaming"] * 2, "2 runs: 2 streaming"),
])
def test_several_runs_are_counted_by_how_they_ended(statuses: List[str], line: str) -> None:
    assert mogplex.tally(statuses) == line


def test_signs_of_life_as_text() -> None:
    progress = mogplex.Progress("connected", "streaming", 0.0, 100.0, None, 0, "", 84.0, {})
    assert mogplex.status_line(progress, 245.0) == (
        "streaming 4m 05s | last event 2m ago | connected")
    assert mogplex.silence_line(progress, 245.0) == "still streaming, last event 2m ago"
    limited = progress._replace(connection="limited", retry_at=300.0)
    assert mogplex.status_line(limited, 245.0).endswith("| limited, retrying in 55s")
    assert mogplex.status_line(limited, 300.0).endswith("| limited")
    assert mogplex.silence_line(progress._replace(status="", connection="connecting"), 160.0) == (
        "still connecting, last event 1m ago")


# ---------------------------------------------------------------- 7. Cockpit

NOW = 1795608000.0  # 2026-11-25T12:00:00Z
RUN_ID = "7f2c41aa-0000-4000-8000-000000000001"
SHOWN = {
    "runId": RUN_ID, "harness": "codex", "status": "streaming", "repoId": "r1",
    "createdAt": "2026-11-25T11:47:19Z", "updatedAt": "2026-11-25T11:59:00Z",
    "branch": {"base": "main"},
}
FAILED_RUN = {**SHOWN, "status": "failed", "error": "Agent run exited with code 1."}
EVENTS: List[Dict[str, Any]] = [
    {"type": "started", "message": "External Mogplex run accepted",
     "createdAt": "2026-11-25T11:47:20.1Z"},
    {"type": "log", "message": "Synchronized mogplex/agent-7f2c41aa",
     "createdAt": "2026-11-25T11:47:24Z",
     "payload": {"stage": "git_sync", "working_branch": "mogplex/agent-7f2c41aa"}},
    {"type": "tool_started", "toolName": "apply_patch", "message": "src/session.ts",
     "createdAt": "2026-11-25T11:58:00+00:00"},
]
HOSTILE_DELIVERY = {
    "type": "log", "payload": {
        "stage": "git_delivery", "changed": True, "working_branch": "a\x1b[2Jb",
        "pull_request_url": "https://x.example/\x1b[2J\x9b31m\u202e"},
}
HOSTILE_EVENT = {
    "type": "\x1b]0;owned\x07log", "createdAt": ["never"],
    "payload": {"stage": "git_sync", "working_branch": {}},
    "message": "\x1b[2J\x9b31m::error::\rfirst\nse\u0301cond \u202e日本語\u200d👩\u200d👧 \x85\x00 "
               + "very " * 3000 + "long",
}
SANDBOXES = [
    {"id": "s1000000-1", "status": "running", "working_branch": "main", "repo_id": "r1",
     "preview_url": "https://s1.preview.example"},
    {"id": "s2000000-2", "status": "error", "base_branch": "fix/tax",
     "error": "out of\x1b[0m memory"},
]
WEB_REPO = {"id": "r1", "full_name": "acme/web", "default_branch": "main"}
API_REPO = {"id": "r2", "full_name": "acme/api", "default_branch": "trunk"}
TWO_REPOS = [WEB_REPO, API_REPO]
DELIVERY = {
    "type": "log", "message": "Pull request ready", "payload": {
        "stage": "git_delivery", "changed": True, "working_branch": "mogplex/a",
        "pull_request_url": "https://github.com/acme/web/pull/1"},
}
Client = mogplex.Client
Desk = mogplex.Desk
Shell = mogplex.Shell
WIDE = mogplex.Window(120, 40)


def remembered(number: int, task: str, status: str = "", **facts: Any) -> mogplex.KnownRun:
    return mogplex.KnownRun(
        f"{number:04x}0000-0000-4000-8000-000000000000", "acme/web", task, NOW - 480, status,
        **facts)


def played(*messages: Any, **facts: Any) -> mogplex.State:
    """The state after these messages."""
    state = mogplex.State(now=NOW, next=mogplex.Next(session="session"))
    return then(state._replace(**facts), *messages)


def then(state: mogplex.State, *messages: Any) -> mogplex.State:
    for message in messages:
        state = mogplex.update(state, message)
    return state


def later(state: mogplex.State, seconds: float, *messages: Any) -> mogplex.State:
    return then(state._replace(now=state.now + seconds), *messages)


def keys(*names: str) -> List[Any]:
    return [mogplex.Key(name) for name in names]


def typed(text: str) -> List[Any]:
    return [mogplex.Text(text), mogplex.Key("enter")]


def pasted(text: str) -> mogplex.Text:
    return mogplex.Text(text, pasted=True)


def fetched(job: Any, data: Any, *arguments: Any) -> mogplex.Told:
    return told(job, data, *arguments)._replace(latency_ms=84.0)


def told(job: Any, data: Any, *arguments: Any) -> mogplex.Told:
    """What a desk tells without an answer of the service."""
    return mogplex.Told(mogplex.Ask(job, arguments), data)


def failed(error: mogplex.MogplexError, job: Any, *arguments: Any) -> mogplex.Failed:
    return mogplex.Failed(mogplex.Ask(job, arguments), error)


def arrived(event: Dict[str, Any], run_id: str = RUN_ID) -> mogplex.Told:
    return told(Desk.watch, event, run_id)


def progressed(connection: str = "connected", run: Any = None, **facts: Any) -> mogplex.Told:
    blank: Dict[str, Any] = dict.fromkeys(mogplex.Progress._fields, 0)
    blank.update(connection=connection, message="", run=run or SHOWN, latency_ms=84.0)
    wait_s = facts.pop("wait_s", 0.0)
    run_id = facts.pop("run_id", RUN_ID)
    return told(Desk.report, mogplex.Progress(**{**blank, **facts}), run_id, wait_s)


def run_over(
    run: Dict[str, Any], truncated: bool = False, run_id: str = RUN_ID,
) -> mogplex.Told:
    verdict = mogplex.Verdict(run_id, run["status"], "", "", "", truncated, 1.0, run)
    return told(Desk.watch, verdict, run_id)


def asked(state: mogplex.State) -> List[Any]:
    """What the last message asked for: (job, arguments...)."""
    return [(ask.job, *ask.arguments) for ask in state.asks]


def jobs(state: mogplex.State) -> List[Any]:
    return [ask.job for ask in state.asks]


FIRST_LISTS = [fetched(Desk.repos, TWO_REPOS), fetched(Client.sandboxes, SANDBOXES)]
AIMED = [*FIRST_LISTS, *typed("/repo web")]
ATTACHED = [*AIMED, *typed(f"/attach {RUN_ID}"), fetched(Desk.find_run, SHOWN, RUN_ID)]
BUSY = [
    *ATTACHED, *(arrived({**event, "id": str(number)}) for number, event in enumerate(EVENTS)),
    progressed()]
ENDED_BADLY = [
    *BUSY, arrived({"type": "failed", "message": "Harness run failed", "payload": {},
                    "createdAt": "2026-11-25T11:59:00Z"}),
    run_over(FAILED_RUN, truncated=True)]
NASTY = [
    fetched(Desk.repos, [{"id": 7, "full_name": "acme/\x1b[31mweb\x07", "default_branch": None},
                         {"x": []}]),
    fetched(Client.sandboxes, [{"status": {}}, {"id": None, "status": "\x1b[5mnew", "error": ["?"]}]),
    fetched(Desk.find_run, {"status": "\x1b[2Jodd"}, "nope\x1b"),
    *(arrived(event, "nope\x1b") for event in (
        HOSTILE_EVENT, {}, {**HOSTILE_EVENT, "type": 7, "message": ["no", "text"]})),
    progressed(run={"status": "\x1b[2Jodd", "createdAt": 7, "branch": "x"}, failures=3,
               message="no\x1b answer", run_id="nope\x1b")]
RUNS = (
    remembered(0x7e9a, "bump deps", "streaming"), remembered(0x7d10, "docs", "success"),
    remembered(0x7c02, "e2e tests for the checkout", "failed"), remembered(0x7b01, "not asked"))
RAIL = mogplex.Rail(RUNS)
LIMITED = failed(mogplex.RateLimitedError("slow down", retry_after_s=43.0), Client.sandboxes)
STATES = {
    "empty": played(),
    "busy": played(*BUSY, rail=RAIL),
    "failed": played(*ENDED_BADLY, rail=RAIL),
    "hostile": played(*NASTY),
    "hostile end": played(
        *NASTY, arrived(HOSTILE_DELIVERY, "nope\x1b"),
        run_over({"status": "failed", "error": "\x1b[2J"}, run_id="nope\x1b")),
    "signed out": played(fetched(Desk.sign_out, "not signed in"), mogplex.Text("mog_secret")),
    "waiting": played(
        fetched(Desk.sign_out, ""), told(Desk.tell_url, "https://www.mogplex.com/api/auth?" + "x" * 300)),
    "drawer": played(*BUSY, *keys("^p"), mogplex.Text("sbx"), rail=RAIL),
    "runs": played(*BUSY, *typed("/runs"), rail=RAIL),
    "event": played(*NASTY, *keys("tab", "up", "up", "enter")),
    "details": played(*BUSY, *keys("tab", "enter"), rail=RAIL),
    "paused": played(*BUSY, *keys("tab", "up"), rail=RAIL),
    "wrapped": played(*NASTY, *keys("tab"), mogplex.Text("w")),
    "limited": played(*BUSY, LIMITED),
    "many lines": played(pasted("日本語 text\n" * 400)),
    "rail": played(*BUSY, *keys("btab", "down"), rail=RAIL, window=WIDE),
    "question": played(*BUSY, *keys("tab"), mogplex.Text("x"), rail=RAIL),
}
SCREEN_WIDTHS = (*range(30, 131, 9), 59, 60, 79, 80, 99, 100, 119, 120)
SIZES = [(width, height) for width in SCREEN_WIDTHS for height in range(8, 46, 6)]


@pytest.fixture(autouse=True, scope="session")
def utc() -> Iterator[None]:
    """Times on the cockpit's screen are local."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        if hasattr(time, "tzset"):  # Windows reads the variable by itself
            time.tzset()
        yield
    if hasattr(time, "tzset"):
        time.tzset()


def resized(state: mogplex.State, width: int, height: int) -> List[Any]:
    return mogplex.view(then(state, mogplex.Resize((width, height))), width, height)


def drawn(state: mogplex.State, width: int = 120, height: int = 40) -> str:
    rows = resized(state, width, height)
    return "\n".join("".join(text for text, _ in row).rstrip() for row in rows)


GOLDEN = {  # each row after a |
    ("busy", 120, 40): """
| mogplex │ acme/web ⎇ mogplex/agent-7f2c41aa │ codex │ ▶ STREAMING 12:41                               │ ● nominal 84ms
| RUNS 5 · 2 active                     │ TIMELINE 7f2c41aa  FOLLOW · all types · 3 events
| ▸▶ 7f2c web (task not know… streaming │ 11:47:20  started           External Mogplex run accepted
|  ▶ 7e9a web bump deps    streaming 8m │ 11:47:24  log               Synchronized mogplex/agent-7f2c41aa
|  ✓ 7d10 web docs           success 8m │ 11:58:00  tool_started      apply_patch  src/session.ts
|  ✗ 7c02 web e2e tests for … failed 8m │           … agent working, last event 2m ago
|  … 7b01 web not asked              8m │
| SANDBOXES 2 · 1 running               │
|  ● web main                   running │
|  ○ fix/tax                      error │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
|                                       │
| 7f2c41aa acme/web · streaming 12m ·   │
| (task not known)                      │
|───────────────────────────────────────┴────────────────────────────────────────────────────────────────────────────────
| next: acme/web ⎇ main · codex
| ›
| Enter send · Tab pane · ^P palette · ^F filter · F1 help · ^C ^C quit
""",
    ("failed", 80, 24): """
| mogplex │ acme/web ⎇ mogplex/agent… │ codex │ ✗ FAILED 11:41 │ ○ degraded 84ms
| !! run 7f2c41aa failed: Agent run exited with code 1.             [Enter] open
| RUNS 5 ▸✗ 7f2c failed (task not known)  ▶ 7e9a streaming bump dep… SANDBOXES 2
| TIMELINE 7f2c41aa  FOLLOW · all types · 4 events
| 11:47:20  started           External Mogplex run accepted
| 11:47:24  log               Synchronized mogplex/agent-7f2c41aa
| 11:58:00  tool_started      apply_patch  src/session.ts
| 11:59:00  failed            Harness run failed
|           ✗ failed: Agent run exited with code 1. · the service lists no later…
|
|
|
|
|
|
|
|
|
|
|
|────────────────────────────────────────────────────────────────────────────────
| next: acme/web ⎇ main · codex
| ›
| Enter send · Tab pane · ^P palette · ^F filter · F1 help · ^C ^C quit
""",
    ("hostile", 59, 20): """
| mogplex │ ○ ODD                               │ ✗ offline
| !! Offline, retrying: nonswer
| RUNS 1 ▸○ nope odd (task not known)
| TIMELINE nope  FOLLOW · all types · 3 events
| log    : :error:: ⏎ first ⏎ sécond 日本語👩👧  ⏎  very ve…
| event
| 7
| … no news from the service
|
|
|
|
|
|
|
|
|───────────────────────────────────────────────────────────
| next: no repository, choose one with /repo · codex
| ›
| Enter send · Tab pane · ^P palette · ^F filter · F1 help
""",
    ("busy", 30, 8): """
| ▶ STREAMING │ ● nominal 84ms
| TIMELINE 7f2c41aa  FOLLOW
| log    Synchronized mogplex/…
| tool   apply_patch  src/sess…
| … agent working, last event …
|─ next: acme/web ⎇ m… · codex
| ›
| Enter send · Tab pane
""",
    ("signed out", 60, 12): """
| mogplex                                     │ ○ signed out
| RUNS 0                                         SANDBOXES 0
|   Sign in to Mogplex
|   https://www.mogplex.com
|
|   Enter            opens your browser, and comes back here…
|   paste a token    then Enter; create tokens at
|                    https://www.mogplex.com/settings/api-ke…
|
|─ next: no repository, choose one with /repo · codex ───────
| › ••••••••••
| Enter opens the browser · or paste a token · ^C ^C quit
""",
    ("drawer", 100, 16): """
| mogplex │ acme/web ⎇ mogplex/agent-7f2c41aa │ codex │ ▶ STREAMING 12:41           │ ● nominal 84ms
| RUNS 5 · 2 active              │ PALETTE  /sbx                                    1/3 · Esc closes
| ▸▶ 7f2c (task not k… streaming │   /sandboxes                the sandboxes in the cloud
|  ▶ 7e9a bump deps    streaming │   /logs [SANDBOX]           the logs of a sandbox
|  ✓ 7d10 web docs    success 8m │   /branch [NAME]            choose the branch that the next task …
|  ✗ 7c02 e2e tests for … failed │
|  … 7b01 web not asked       8m │
| SANDBOXES 2 · 1 running        │
|  ● web main            running │
|  ○ fix/tax               error │
|                                │
| 7f2c41aa acme/web · streaming  │
| 12m · (task not known)         │
|─ next: acme/web ⎇ main · codex ┴───────────────────────────────────────────────────────────────────
| ›
| ↑ ↓ move · Enter open · Esc close · type to search
""",
    ("runs", 120, 14): """
| mogplex │ acme/web ⎇ mogplex/agent-7f2c41aa │ codex │ ▶ STREAMING 12:41                               │ ● nominal 84ms
| RUNS 5 · 2 active                     │ RUNS  type to search                                          1/5 · Esc closes
| ▸▶ 7f2c web (task not know… streaming │   RUN       STATUS       REPO              STARTED       TASK
|  ▶ 7e9a web bump deps    streaming 8m │ ▸ 7f2c41aa  ▶ streaming  acme/web          Nov 25 11:47  (task not known)
|  ✓ 7d10 web docs           success 8m │   7e9a0000  ▶ streaming  acme/web          Nov 25 11:52  bump deps
|  ✗ 7c02 web e2e tests for … failed 8m │   7d100000  ✓ success    acme/web          Nov 25 11:52  docs
|  … 7b01 web not asked              8m │   7c020000  ✗ failed     acme/web          Nov 25 11:52  e2e tests for the che…
| SANDBOXES 2 · 1 running               │   7b010000  …            acme/web          Nov 25 11:52  not asked
|  ● web main                   running │
|  ○ fix/tax                      error │
| 7f2c41aa acme/web · streaming 12m ·   │
|─ next: acme/web ⎇ main · codex ───────┴────────────────────────────────────────────────────────────────────────────────
| ›
| ↑ ↓ move · Enter open · Esc close · x kill · o open · y copy · type to search
""",
    ("details", 80, 24): """
| mogplex │ acme/web ⎇ mogplex/age… │ codex │ ▶ STREAMING 12:41 │ ● nominal 84ms
| RUNS 5 ▸▶ 7f2c streaming (task not known)  ▶ 7e9a streaming bump … SANDBOXES 2
| EVENT  type to search                                         1/9 · Esc closes
| Nov 25 11:58:00  tool_started  apply_patch
| src/session.ts
|
| {
|   "type": "tool_started",
|   "toolName": "apply_patch",
|   "createdAt": "2026-11-25T11:58:00+00:00",
|   "id": "2"
| }
|
|
|
|
|
|
|
|
|────────────────────────────────────────────────────────────────────────────────
| next: acme/web ⎇ main · codex
| ›
| ↑ ↓ move · Esc close · y copy · type to search
""",
    ("rail", 100, 16): """
| mogplex │ acme/web ⎇ mogplex/agent-7f2c41aa │ codex │ ▶ STREAMING 12:41           │ ● nominal 84ms
| RUNS 5 · 2 active              │ TIMELINE 7f2c41aa  FOLLOW · all types · 3 events
| ▸▶ 7f2c (task not k… streaming │ 11:47:20  started           External Mogplex run accepted
|  ▶ 7e9a bump deps    streaming │ 11:47:24  log               Synchronized mogplex/agent-7f2c41aa
|  ✓ 7d10 web docs    success 8m │ 11:58:00  tool_started      apply_patch  src/session.ts
|  ✗ 7c02 e2e tests for … failed │           … agent working, last event 2m ago
|  … 7b01 web not asked       8m │
| SANDBOXES 2 · 1 running        │
|  ● web main            running │
|  ○ fix/tax               error │
|                                │
| 7e9a0000 acme/web · streaming  │
| 8m · bump deps                 │
|─ next: acme/web ⎇ main · codex ┴───────────────────────────────────────────────────────────────────
| ›
| j k move · Enter show · x kill · o open · ? keys · Tab composer · y copy
""",
    ("question", 30, 8): """
| ▶ STREAMING │ ● nominal 84ms
| TIMELINE 7f2c41aa  FOLLOW
| … agent working, last event …
|─ next: acme/web ⎇ m… · codex
| ›
| Cancel run 7f2c41aa, (task
| not known)?  y yes · any
| other key no
""",
    ("empty", 80, 24): """
| mogplex                                                         │ ◌ connecting
| RUNS 0                                                             SANDBOXES 0
|
|
|
|
|   Type a task and press Enter to start a run.
|
|   /repo     choose the repository
|   /attach   watch a run started elsewhere
|   /help     every key and command
|
|
|
|
|
|
|
|
|
|────────────────────────────────────────────────────────────────────────────────
| next: no repository, choose one with /repo · codex
| ›
| Enter send · Tab pane · ^P palette · ^F filter · F1 help · ^C ^C quit
""",
}


@pytest.mark.parametrize("name, width, height", list(GOLDEN), ids=str)
def test_a_screen_looks_so(name: str, width: int, height: int) -> None:
    screen = drawn(STATES[name], width, height)
    assert "\n|" + screen.replace("\n", "\n|") + "\n" == GOLDEN[name, width, height]


@pytest.mark.parametrize("name", sorted(STATES))
@pytest.mark.slow
def test_every_size_is_filled_exactly_and_by_printable_text(name: str) -> None:
    for width, height in SIZES:
        rows = resized(STATES[name], width, height)
        widths = [sum(mogplex.text_width(text) for text, _ in row) for row in rows]
        assert widths == [width] * height, (width, height)
        for text, style in (segment for row in rows for segment in row):
            assert text.isprintable() and style in {*mogplex.STYLES, "cursor"}


class Emulator(pyte.Screen):
    """A terminal of pyte; CSI with a private mark and what it has no name for is no text."""

    def report_device_status(self, mode: int, **_: Any) -> None:
        pass

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        super().select_graphic_rendition(*attributes)


def emulated(rows: Sequence[Any]) -> List[str]:
    """The rows as pyte has them."""
    text = "\n".join("".join(part for part, _ in row).rstrip() for row in rows)
    return unicodedata.normalize("NFC", text).split("\n")


@pytest.mark.parametrize("colours, allowed", [
    (256, r"0|1|2|7|38;5;\d+|48;5;\d+"), (8, r"0|1|2|7|3[0-7]|4[0-7]"), (0, r"0|1|2|7")])
@pytest.mark.parametrize("name", ["empty", "busy", "failed", "hostile", "paused", "runs"])
def test_a_screen_reads_the_same_in_all_colours(name: str, colours: int, allowed: str) -> None:
    screen = Emulator(80, 24)
    rows = resized(STATES[name], 80, 24)
    output = mogplex.repaint([], rows, mogplex.sgr_styles(colours))
    pyte.Stream(screen).feed(output)
    assert [line.rstrip() for line in screen.display] == emulated(rows)
    for parameters in re.findall("\x1b\\[([0-9;]*)m", output):
        assert re.match(f"(?:(?:{allowed})(?:;|$))+$", parameters), parameters
    assert not re.search("[\x80-\x9f]", output)
    ours = "\x1b\\[(?:[0-9;]+[Hm]|K|\\?(?:25|2026)[hl])"
    assert set(re.findall("\x1b.[?0-9;]*.", output)) <= set(re.findall(ours, output))


PLAIN = {**dict.fromkeys(mogplex.STYLES, ""), "cursor": ""}
STYLED = {**dict.fromkeys(mogplex.STYLES, "\x1b[0;38;5;245m"), "cursor": ""}


@pytest.mark.parametrize("width", [60, 80, 99])
def test_a_change_behind_the_edge_writes_nothing(width: int) -> None:
    runs = [remembered(number, "a task of some length", "success") for number in range(5)]
    first = played(rail=mogplex.Rail((*runs, remembered(9, "last", "streaming"))))
    second = played(rail=mogplex.Rail((*runs, remembered(9, "last", "success"))))
    before = mogplex.view(first, width, 24)
    after = mogplex.view(second, width, 24)
    assert before != after and mogplex.repaint(before, after, PLAIN) == ""


def test_the_cursor_is_hidden_where_no_row_has_it() -> None:
    first = [(("a", ""), ("", "cursor"), ("b", ""))]
    second = [(("ab", ""), ("", "cursor"))]
    none = [(("a", ""), ("b", ""))]
    assert mogplex.repaint(first, first, PLAIN) == ""
    assert "\x1b[1;3H\x1b[?25h" in mogplex.repaint(first, second, PLAIN)
    assert "\x1b[1;2H\x1b[?25h" in mogplex.repaint(none, first, PLAIN)
    hidden = mogplex.repaint(first, none, PLAIN)
    assert "\x1b[?25l" in hidden and "\x1b[?25h" not in hidden


def test_a_frame_over_an_unknown_one_leaves_nothing_of_it() -> None:
    """Not even where the terminal draws a heart narrower than it is taken to be."""
    screen = Emulator(20, 1)
    stream = pyte.Stream(screen)
    stream.feed("x" * 20)
    blank = types.SimpleNamespace(number_of_colors=256, clear="\x1b[H\x1b[2J")
    canvas = mogplex.Canvas({}, blank)
    stream.feed(canvas.frame([(("\u2764\ufe0f", ""), ("|", "line"), (" " * 17, ""))]))
    assert "x" not in screen.display[0] and "|" in screen.display[0]


def test_a_text_that_a_terminal_draws_wider_than_we_think_hides_nothing() -> None:
    """pyte takes four columns for a flag, where we, and most terminals, take two."""
    styles = {"": "", "line": "\x1b[0;36m", "cursor": ""}
    screen = Emulator(20, 1)
    shown: Sequence[mogplex.Row] = ()
    for text in ("ab  ", "\U0001f1e9\U0001f1ea  ", "xy  ", "\u65e5\u672c", "    "):
        rows = [((text, ""), ("|", "line"), ("cd", ""), (" " * 13, ""))]
        pyte.Stream(screen).feed(mogplex.repaint(shown, rows, styles))
        shown = rows
        drawn_there = "".join(screen.buffer[0][column].data for column in range(4, 20))
        assert drawn_there.rstrip() == "|cd", text


def test_an_ascii_screen_is_as_wide_as_the_other() -> None:
    family = "\U0001f469\u200d\U0001f467"
    flag = "\U0001f1e9\U0001f1ea"
    for text in (family, flag, "\u65e5\u672c", "e\u0301\u2026", "\u25b8 ok"):
        assert mogplex.to_ascii(text).isascii()
        assert len(mogplex.to_ascii(text)) == mogplex.text_width(text)


ANY_KEYS = [
    "tab", "btab", "esc", "enter", "up", "down", "pgup", "home", "end", "^p", "^f", "f1",
    "backspace", "newline", "left", "alt+b", "ctrl+right", "^k", "^w", "^t"]


def any_message(chance: random.Random, width: int, height: int) -> Any:
    run = {**SHOWN, "status": chance.choice(["success", "failed", "streaming"])}
    sandboxes = SANDBOXES[:chance.randrange(3)]
    cell = (chance.randrange(width), chance.randrange(height))
    return chance.choice([
        mogplex.Key(chance.choice(ANY_KEYS)), mogplex.Text(chance.choice("jkfwxoyr?/日a ")),
        mogplex.Tick(), arrived(chance.choice(EVENTS)), mogplex.Mouse(chance.choice([3, -3]), *cell),
        mogplex.Mouse(0, *cell), fetched(Client.sandboxes, sandboxes),
        fetched(Client.run, run, RUNS[0].id), fetched(Desk.repos, TWO_REPOS), LIMITED,
        pasted("two\nlines\t日本語"), progressed(failures=chance.randrange(4))])


@pytest.mark.parametrize("width, height", [(120, 24), (80, 20), (50, 15), (30, 8)])
@pytest.mark.slow
def test_frames_add_up_to_the_screen(width: int, height: int) -> None:
    """Whatever is done in whatever order: what was written in pieces shows what the last state is."""
    chance = random.Random(7)
    state = played(mogplex.Resize((width, height)), *BUSY, rail=RAIL)
    shown: List[Any] = []
    screen = Emulator(width, height)
    for number in range(80):
        state = later(state, 1, any_message(chance, width, height))
        rows = mogplex.view(state, width, height)
        pyte.Stream(screen).feed(mogplex.repaint(shown, rows, STYLED))
        shown = rows
        assert [line.rstrip() for line in screen.display] == emulated(rows), number


def test_ascii_has_a_sign_for_every_glyph() -> None:
    text = mogplex.to_ascii(drawn(STATES["busy"], 100, 16))
    assert text.isascii() and "?" not in text
    for sign in (">> 7f2c", "x 7c02", "+ 7d10", "* nominal"):
        assert sign in text


def many_events(count: int) -> List[Any]:
    return [arrived({**EVENTS[1], "message": f"event {number} " + "x" * 60})
            for number in range(count)]


FULL = played(mogplex.Resize((120, 40)), *BUSY, *many_events(5000))
SCROLLED = then(FULL, *keys("tab"), *[mogplex.Text("k")] * 50, *[mogplex.Text("j")] * 9)


@pytest.mark.parametrize("state, most, message, seconds", [
    (FULL, 0, told(Desk.client, None), 0), (FULL, 250, mogplex.Tick(), 1),
    (FULL, 400, mogplex.Text("w"), 0), (FULL, 6000, arrived(EVENTS[0]), 0),
    (SCROLLED, 400, mogplex.Text("k"), 0), (SCROLLED, 400, mogplex.Text("j"), 0)])
def test_a_frame_writes_only_what_differs(
    state: mogplex.State, most: int, message: Any, seconds: int,
) -> None:
    """The bars on bytes, at 120x40 with 5,000 events."""
    before = mogplex.view(state, 120, 40)
    after = mogplex.view(later(state, seconds, message), 120, 40)
    output = mogplex.repaint(before, after, STYLED)
    assert bool(output) == bool(most) and len(output.encode()) <= most
    screen = Emulator(120, 40)
    pyte.Stream(screen).feed(mogplex.repaint([], before, STYLED) + output)
    assert [line.rstrip() for line in screen.display] == emulated(after)


# -- What comes next: the target


def test_the_header_is_the_shown_run_s_and_the_next_line_is_the_target_s() -> None:
    state = played(*BUSY, *typed("/repo api"), *typed("/harness claude-code"))
    lines = drawn(state).split("\n")
    assert "acme/web ⎇ mogplex/agent-7f2c41aa │ codex" in lines[0] and "api" not in lines[0]
    assert lines[-3] == " next: acme/api ⎇ trunk · claude-code"


def started(state: mogplex.State, **facts: Any) -> mogplex.State:
    """After the service's answer to the start that is under way."""
    new = state.next.starts[-1]
    run = {**SHOWN, "runId": "b" * 8, "status": "pending", **facts}
    return then(state, told(Desk.tell_started, run, new), fetched(Desk.start, run, new))


def delivered(state: mogplex.State) -> mogplex.State:
    return then(state, arrived(DELIVERY, state.shown.run_id))


def body_of(state: mogplex.State, task: str = "more") -> Dict[str, Any]:
    """The request that a task would make now."""
    new = then(state, *keys("esc"), *typed(task)).next.starts[-1]
    return mogplex.body_for(new.target, new.task)


def test_the_header_cuts_the_branch_alone_and_only_where_it_must() -> None:
    assert "⎇ mogplex/age… │ codex │ ▶ STREAMING 12:41 │ ●" in drawn(STATES["busy"], 80)
    for width in SCREEN_WIDTHS:
        line = drawn(STATES["busy"], width).split("\n")[0]
        assert "▶ STREAMING" in line and "STREAMING…" not in line and "nominal" in line


def test_a_conversation_continues_on_the_branch_that_its_run_delivered() -> None:
    state = delivered(started(played(*AIMED, *typed("first"))))
    body = body_of(state)
    assert (body["repoId"], body["baseBranch"], body["workingBranch"], body["createBranch"]) == (
        "r1", "main", "mogplex/a", False)
    again = delivered(started(then(state, *typed("more"))))
    assert body_of(again)["workingBranch"] == "mogplex/a"
    assert "workingBranch" not in body_of(then(again, *typed("/new")))


@pytest.mark.parametrize("touch", ["/repo api", "/repo web", "/branch dev", "/new",
                                   "/harness claude-code"])
def test_a_target_that_was_touched_is_moved_by_no_delivery(touch: str) -> None:
    """Also when it was changed to what it was before."""
    state = started(played(*AIMED, *typed("first")))
    state = then(state, *typed(touch))
    assert delivered(state).next.target == state.next.target
    assert "workingBranch" not in body_of(delivered(state))


@pytest.mark.parametrize("replay", [False, True])
def test_a_run_that_was_attached_moves_no_target(replay: bool) -> None:
    state = played(*BUSY)
    if replay:
        state = then(state, *typed("/repo api"))
    after = delivered(state)
    assert after.shown.delivery.branch == "mogplex/a" and after.next.target == state.next.target
    assert "workingBranch" not in body_of(after)


def test_a_run_of_here_that_is_attached_again_moves_no_target() -> None:
    state = played(*AIMED, *typed("first"), rail=RAIL)
    state = then(started(state), *typed("/attach 7e9a"), *typed("/attach bbbbbbbb"))
    assert state.shown.run_id == "bbbbbbbb" and delivered(state).next.target == state.next.target


def test_attaching_to_the_shown_run_leaves_it_as_it_is() -> None:
    state = started(played(*AIMED, *typed("first")))
    again = then(state, *typed("/attach bbbbbbbb"))
    assert jobs(again) == [] and again.shown == state.shown


# -- Starts


def test_a_start_whose_answer_was_lost_keeps_its_key() -> None:
    state = played(*AIMED, *typed("fix it"))
    assert asked(state)[0][0] is Desk.start
    first = state.next.starts[-1]
    lost = mogplex.UnavailableError("the connection was lost", delivered=True)
    state = then(state, failed(lost, Desk.start, first))
    assert state.composer.text == "fix it" and "may have started" in drawn(state)
    state = then(state, *keys("enter"))
    assert asked(state) == [(Desk.start, first)] and len(state.next.starts) == 1


def test_a_start_that_an_earlier_cockpit_lost_is_told(tmp_path: Any) -> None:
    home = mogplex.Home(str(tmp_path))
    (new,) = played(*AIMED, *typed("fix it")).next.starts
    answers = steps(ok({**SHOWN, "replayed": False}))
    with RawServer(answers) as server:
        body = mogplex.body_for(new.target, new.task)
        home.record_start(mogplex.start_record(server.url, body, "lost-key", "acme/web"))
        connect = functools.partial(client, server.url)
        posted: List[Any] = []
        desk = Desk(posted.append, mogplex.Facts(connect, server.url, home, bool, ""))
        desk.asks.put(mogplex.Ask(Desk.start, (new,)))
        desk.asks.put(None)
        assert comes_true(lambda: any(message.ask.job is Desk.start for message in posted))
        assert comes_true(lambda: desk.connection is None)
    (said,) = [message.data for message in posted if message.ask.job is Desk.say]
    assert "--idempotency-key lost-key" in said


def test_a_delivery_in_the_meantime_does_not_move_a_start_whose_answer_was_lost() -> None:
    first = played(*AIMED, *typed("one"))
    state = then(first, told(Desk.tell_started, SHOWN, first.next.starts[0]))
    state = then(state, fetched(Desk.start, SHOWN, first.next.starts[0]), *typed("two"))
    (ask,) = state.asks
    lost = mogplex.UnavailableError("the connection was lost", delivered=True)
    state = then(state, arrived(DELIVERY), failed(lost, Desk.start, *ask.arguments))
    assert "next: acme/web ⎇ main" in drawn(state)
    (again,) = then(state, arrived(DELIVERY), *keys("enter")).asks
    assert again == ask


def test_a_start_that_was_refused_gives_the_task_back_and_forgets_its_key() -> None:
    state = played(*AIMED, *typed("fix it"))
    refused = mogplex.MogplexError("Prompt is too long", status=400)
    state = then(state, failed(refused, Desk.start, state.next.starts[-1]))
    assert state.composer.text == "fix it" and not state.next.starts
    assert "Prompt is too long" in drawn(state) and "may have started" not in drawn(state)


def test_a_start_that_is_rate_limited_holds_nothing_else() -> None:
    state = played(*AIMED, *typed("fix it"))
    limited = mogplex.RateLimitedError("too many runs", status=429, retry_after_s=3000.0)
    state = then(state, failed(limited, Desk.start, state.next.starts[-1]))
    assert "retry in 50m" in drawn(state) and "nominal" in drawn(state)
    assert ticked(state, 31, good)


def test_another_task_or_target_has_a_key_of_its_own() -> None:
    lost = mogplex.UnavailableError("lost", delivered=True)
    state = played(*AIMED, *typed("fix it"))
    state = then(state, failed(lost, Desk.start, state.next.starts[-1]), *keys("^c"))
    state = then(state, *typed("another"), *typed("/repo api"), *typed("fix it"))
    assert len({new.key for new in state.next.starts}) == 3


def test_a_start_that_is_under_way_says_so_whatever_is_typed() -> None:
    state = later(played(*AIMED, *typed("fix it")), 30, mogplex.Tick(), mogplex.Key("esc"))
    assert "Starting a run…" in drawn(state)
    again = then(state, *typed("fix it"))
    assert jobs(again) == [] and "still under way" in drawn(again)
    assert "Starting" not in drawn(started(again))


def test_a_start_that_is_answered_with_a_failed_run_says_why() -> None:
    state = played(*AIMED, *typed("fix it"))
    state = started(state, status="failed", error="Could not queue", replayed=True)
    assert "The run failed to start: Could not queue" in drawn(state)


def test_the_same_task_once_more_is_a_run_of_its_own() -> None:
    state = started(played(*AIMED, *typed("fix it")))
    state = then(state, *typed("fix it"))
    assert [ask.job for ask in state.asks] == [Desk.start]
    assert state.next.starts[-1].key == "session-2"


# -- Words and keys


@pytest.mark.parametrize("messages, expected", [
    (typed("/frobnicate"), "/frobnicate is unknown; /help lists the commands. Nothing was sent."),
    (typed("/atach 7"), "did you mean /attach?"),
    (typed("/pause"), "/pause is not offered by the hosted API."),
    (typed("/quit now"), "/quit takes no argument."),
    (typed("fix it"), "Choose the repository first"),
    (typed("/run"), "A run needs a task"),
    (typed("/kill"), "No run is shown"),
    (typed("/branch dev"), "no repository"),
    (typed("/harness CLAUDE-code"), "claude-code"),
    (keys("^c"), "Ctrl+C again within 1.5 s"),
    ([mogplex.Text("/ex")], "/exit"),
    ([mogplex.Text("/repo")], "/repo [NAME]"),
    (typed("/logs"), "SANDBOXES"),
    (keys("f1"), "HELP"),
    ([mogplex.Key("^f"), mogplex.Text("zzz")], "/ zzz"),
    (typed("/mcp"), "loading…"),
    (typed("/harness gpt"), "unknown harness 'gpt'"),
    (typed("/harness") + keys("down", "enter"), "· claude-code"),
    (typed("/clear"), "Enter send"),
])
def test_what_words_and_keys_show(messages: List[Any], expected: str) -> None:
    assert expected in drawn(played(*messages))


PANE = [*BUSY, *keys("tab")]


@pytest.mark.parametrize("messages, expected", [
    (typed("/kill") + [mogplex.Text("y")], [(Desk.cancel, RUN_ID)]),
    (typed("/kill") + [mogplex.Text("n")], []),
    (typed("/open"), [(Desk.open, "https://www.mogplex.com")]),
    (typed("/quit"), [(Shell.leave,)]),
    (keys("^c", "^c"), [(Shell.leave,)]),
    ([mogplex.Key("^c"), mogplex.Text("a"), mogplex.Key("^c")], [(Shell.stop_sign_in,)]),
    ([mogplex.Key("tab"), mogplex.Text("q")], [(Shell.leave,)]),
    ([mogplex.Key("tab"), mogplex.Text("quit")], [(Client.run, RUN_ID)][:0]),
    ([mogplex.Text("half"), mogplex.Key("tab"), mogplex.Text("q")], []),
    ([mogplex.Key("f1"), mogplex.Text("q")], []),
    ([pasted("/quit\n/kill\ny\n")], []),
    ([pasted("q")], []),
    ([mogplex.Key("tab"), pasted("q")], []),
    ([mogplex.Key("tab"), mogplex.Text("y")],
     [(mogplex.Screen.write, "\x1b]52;c;YXBwbHlfcGF0Y2ggIHNyYy9zZXNzaW9uLnRz\x07")]),
    (typed("/mcp"), [(Client.mcp_servers,)]),
    (keys("^z"), [(mogplex.Screen.suspend,)]),
    (keys("^t"), [(mogplex.Screen.switch_mouse, False)]),
    (keys("^l"), [(mogplex.Screen.repaint,)]),
    ([mogplex.Mouse(-3, 60, 5)], []),
    (typed("/login") + keys("enter"), [(Desk.sign_in,)]),
    (typed("/login") + typed("mog_x"), [(Shell.stop_sign_in,), (Desk.try_token, "mog_x")]),
    (typed("/login") + keys("esc"), [(Desk.try_stored,)]),
    (typed("/logout"), [(Desk.sign_out,)]),
])
def test_what_is_asked_of_the_desks_and_the_shell(messages: List[Any], expected: List[Any]) -> None:
    assert asked(played(*BUSY, *messages)) == expected


@pytest.mark.parametrize("text, name, expected, cursor", [
    ("fix the test", "^w", "fix the ", 8), ("fix the test ", "^w", "fix the ", 8),
    ("one\ntwo", "^w", "one\n", 4), ("fix the test", "^u", "", 0),
    ("fix the test", "alt+b", "fix the test", 8), ("fix the test", "ctrl+left", "fix the test", 8),
    ("one\ntwo", "^a", "one\ntwo", 4), ("one\ntwo", "home", "one\ntwo", 4),
    ("abc", "backspace", "ab", 2), ("abc", "left", "abc", 2), ("abc", "^k", "abc", 3),
])
def test_the_composer_s_keys(text: str, name: str, expected: str, cursor: int) -> None:
    composer = played(pasted(text), mogplex.Key(name)).composer
    assert (composer.text, composer.cursor) == (expected, cursor)


@pytest.mark.parametrize("names, expected, cursor", [
    (["^a", "^k"], "", 0), (["^a", "alt+f"], "fix the test", 3),
    (["^a", "ctrl+right", "ctrl+right"], "fix the test", 7), (["^a", "delete"], "ix the test", 0),
    (["^a", "^e"], "fix the test", 12), (["alt+b", "^k"], "fix the ", 8),
    (["left", "left", "right"], "fix the test", 11),
])
def test_the_composer_s_keys_from_its_start(names: List[str], expected: str, cursor: int) -> None:
    composer = played(mogplex.Text("fix the test"), *keys(*names)).composer
    assert (composer.text, composer.cursor) == (expected, cursor)


def test_tabs_in_a_paste_are_kept_and_controls_are_not() -> None:
    state = played(pasted("a:\n\tb\x1b[31m\tc"))
    assert state.composer.text == "a:\n\tb\tc"
    assert "\t" not in drawn(state)


def test_the_history_keeps_what_is_being_typed() -> None:
    state = played(*typed("/branch one"), *typed("/branch two"), mogplex.Text("half"))
    texts = []
    for name in ("up", "up", "up", "down", "down"):
        state = then(state, mogplex.Key(name))
        texts.append(state.composer.text)
    assert texts == ["/branch two", "/branch one", "/branch one", "/branch two", "half"]


@pytest.mark.parametrize("typed_text, expected", [
    ("/att", "/attach "), ("/attach 7d", f"/attach {RUNS[1].id}"), ("/repo ACME/A", "/repo acme/api"),
    ("/repo we", "/repo acme/web"),
    ("/harness cl", "/harness claude-code"), ("/export js", "/export json"),
])
def test_tab_completes(typed_text: str, expected: str) -> None:
    state = played(*FIRST_LISTS, mogplex.Text(typed_text), mogplex.Key("tab"), rail=RAIL)
    assert state.composer.text == expected


def test_what_comes_in_one_read_means_what_it_means_apart() -> None:
    watching = played(*PANE)
    assert then(watching, mogplex.Text("/log")).window.filter == "log"
    palette = then(watching, mogplex.Text(":rep")).drawer
    assert palette and palette.listing is mogplex.PALETTE and palette.query == "rep"
    assert then(played(), *keys("esc"), mogplex.Text("/kill")).composer.text == "/kill"


def test_letters_typed_in_one_go_cancel_nothing() -> None:
    watching = played(*PANE)
    for text in ("xylophone", "xy", "quick"):
        state = then(watching, mogplex.Text(text))
        assert not state.attention.killing
        assert Desk.cancel not in jobs(state) and Shell.leave not in jobs(state)
    question = then(watching, mogplex.Text("x"))
    assert question.attention.killing == RUN_ID
    assert Desk.cancel not in jobs(then(question, mogplex.Text("yes")))
    assert Desk.cancel not in jobs(then(question, pasted("y")))
    assert Shell.leave in jobs(then(question, *keys("^c", "^c")))


def test_the_question_names_the_run_and_its_task_at_every_size() -> None:
    runs = (remembered(0x7E9A, "bump the dependencies of the shop and its tests", "streaming"),)
    state = played(*BUSY, *keys("btab"), window=WIDE, rail=mogplex.Rail(runs))
    state = then(state, *keys("down"), mogplex.Text("x"))
    assert state.attention.killing == runs[0].id
    alert = mogplex.Notice("run 7c02f9d4 failed", run_id="7c02f9d4")
    alarmed = state.attend(alerts=(alert,))._replace(composer=mogplex.Composer("half a task " * 30))
    for width, height in ((120, 40), (80, 24), (59, 20), (30, 8)):
        for asking in (state, alarmed):
            words = " ".join(drawn(asking, width, height).split())
            assert "7e9a0000" in words and "y yes" in words and "other key no" in words
            assert "bump the dependencies" in words


@pytest.mark.parametrize("width, height", [(120, 40), (80, 24), (59, 20)])
def test_an_error_is_read_to_its_end(width: int, height: int) -> None:
    first = played(*AIMED, *typed("fix it"))
    lost = mogplex.UnavailableError("no answer within 30 s", code="UNAVAILABLE", delivered=True)
    state = then(first, failed(lost, Desk.start, *first.asks[0].arguments))
    words = " ".join(drawn(state, width, height).split())
    assert "no answer within 30 s; press Enter to send the same request again" in words


def test_no_key_is_a_yes_in_a_window_that_cannot_show_the_question() -> None:
    question = played(*PANE, mogplex.Text("x"))
    small = then(question, mogplex.Resize((25, 6)))
    assert "enlarge the window" in drawn(small, 25, 6)
    assert jobs(then(small, mogplex.Text("y"))) == []


def test_x_o_y_and_enter_act_on_the_selected_row_of_the_rail() -> None:
    state = played(*BUSY, *keys("btab", "down"), rail=RAIL, window=WIDE)
    other = RUNS[0].id
    assert then(state, mogplex.Text("x")).attention.killing == other
    assert base64.b64encode(other.encode()).decode() in asked(then(state, mogplex.Text("y")))[0][1]
    assert asked(then(state, *keys("enter"))) == [(Desk.watch, other)]
    assert "Enter shows this run" in drawn(then(state, mogplex.Text("o")))
    sandbox = then(state, mogplex.Text("G"), *keys("up"))
    assert asked(then(sandbox, mogplex.Text("o"))) == [(Desk.open, "https://s1.preview.example")]
    assert asked(then(sandbox, *keys("enter"))) == [(Client.sandbox_logs, "s1000000-1")]
    assert not then(sandbox, mogplex.Text("x")).attention.killing


def test_x_o_y_and_enter_act_on_the_selected_row_of_a_drawer() -> None:
    state = played(*BUSY, *typed("/runs"), *keys("down"), rail=RAIL)
    other = RUNS[0].id
    assert then(state, mogplex.Text("x")).attention.killing == other
    assert base64.b64encode(other.encode()).decode() in asked(then(state, mogplex.Text("y")))[0][1]
    assert asked(then(state, *keys("enter"))) == [(Desk.watch, other)]
    sandboxes = played(*BUSY, *typed("/sandboxes"))
    assert asked(then(sandboxes, mogplex.Text("o"))) == [(Desk.open, "https://s1.preview.example")]


def test_a_search_takes_every_letter() -> None:
    state = played(*BUSY, *typed("/runs"), mogplex.Text("/"), mogplex.Text("x"), rail=RAIL)
    assert state.drawer and state.drawer.query == "x" and not state.attention.killing
    state = played(*BUSY, *typed("/runs"), mogplex.Text("d"), mogplex.Text("o"), rail=RAIL)
    assert state.drawer and state.drawer.query == "do"


def test_a_backspace_in_an_empty_search_ends_it() -> None:
    state = played(*BUSY, *typed("/runs"), mogplex.Text("/"), *keys("backspace"), rail=RAIL)
    assert then(state, mogplex.Text("x")).attention.killing == RUN_ID


def test_question_mark_shows_the_keys_of_this_pane() -> None:
    timeline = drawn(played(*PANE, mogplex.Text("?")))
    assert "wrap long lines" in timeline and "/export" not in timeline
    for shown in ("Enter  ", "Up k", "PgDn", "Home g", "Shift+Tab", "^P"):
        assert shown in timeline, shown
    rail = drawn(played(*BUSY, *keys("btab"), mogplex.Text("?"), rail=RAIL, window=WIDE))
    assert "cancel the selected run" in rail and "cancel the shown run" not in rail


def row_of(state: mogplex.State, text: str) -> int:
    """The row of the screen with this text."""
    lines = drawn(state, state.window.width, state.window.height).split("\n")
    return next(number for number, line in enumerate(lines) if text in line)


def test_a_click_selects_and_a_second_one_opens() -> None:
    state = played(mogplex.Resize((120, 40)), *BUSY, rail=RAIL)
    click = mogplex.Mouse(0, 5, row_of(state, "7e9a"))
    once = then(state, click)
    assert once.window.focus == "rail" and once.rail.at == 1 and Desk.watch not in jobs(once)
    assert asked(then(once, click)) == [(Desk.watch, RUNS[0].id)]
    click = mogplex.Mouse(0, 60, row_of(state, "Synchronized"))
    once = then(state, click)
    assert mogplex.selected_entry(once) == 1 and once.drawer is None
    twice = then(once, click)
    assert twice.drawer and twice.drawer.data["message"].startswith("Synchronized")
    runs = then(state, *typed("/runs"))
    click = mogplex.Mouse(0, 60, row_of(runs, "Nov 25 11:52  docs"))
    assert asked(then(runs, click, click)) == [(Desk.watch, RUNS[1].id)]
    assert then(state, *keys("tab"), mogplex.Mouse(0, 60, 38)).window.focus == "composer"


def test_the_wheel_scrolls_what_is_under_it() -> None:
    state = played(mogplex.Resize((120, 40)), *BUSY, *typed("/runs"), rail=RAIL)
    over_rail = then(state, mogplex.Mouse(3, 5, 10))
    assert over_rail.rail.at == 3 and over_rail.drawer == state.drawer
    over_drawer = then(state, mogplex.Mouse(3, 60, 10))
    assert over_drawer.drawer and over_drawer.drawer.at == 3 and over_drawer.rail == state.rail


@pytest.mark.parametrize("width", [40, 59, 80, 100])
def test_the_drawer_of_runs_has_room_for_tasks_at_every_width(width: int) -> None:
    text = drawn(STATES["runs"], width, 24)
    drawer = text[text.index("TASK"):]
    assert "e2e tests f" in drawer and "✗ failed" in drawer


def selected_texts(state: mogplex.State, width: int = 120) -> List[str]:
    rows = resized(state, width, 24)
    return [text.strip() for row in rows for text, style in row if style == "select" and text.strip()]


def test_one_line_is_marked_as_selected_and_only_where_the_focus_is() -> None:
    rail = played(mogplex.Resize((120, 24)), *BUSY, *keys("btab"), rail=RAIL)
    assert "7f2c" in " ".join(selected_texts(rail))
    assert selected_texts(played(*BUSY, rail=RAIL)) == []
    assert "External" not in " ".join(selected_texts(rail))
    over_it = then(rail, *keys("^p"))
    assert [text for text in selected_texts(over_it) if "/" not in text] == []


def test_a_window_without_a_run_says_whose_it_is() -> None:
    assert drawn(played(), 30, 8).startswith(" mogplex ")


def test_the_title_of_a_drawer_does_not_touch_its_count() -> None:
    state = played(*BUSY).open(mogplex.LOGS, "b1c2d3e4-5f60-4718-829a-3b4c5d6e7f80")
    for width in range(30, 100):
        assert re.search(r" \d+/\d+ · Esc closes", drawn(state, width, 24)), width


@pytest.mark.parametrize("height, most", [(12, 3), (24, 6), (45, 8)])
def test_a_long_task_leaves_room_for_the_rest(height: int, most: int) -> None:
    state = played(*BUSY).write("line\n" * 40 + "line")
    assert drawn(state, 80, height).count("   line\n") == most
    asking = state.attend(killing=RUN_ID)
    assert drawn(asking, 80, height).count("   line\n") == 1


def test_a_drawer_that_is_searched_offers_no_keys_that_are_letters_now() -> None:
    state = played(*BUSY, *typed("/runs"), rail=RAIL)
    assert "x kill · o open · y copy" in drawn(state)
    assert "x kill" not in drawn(then(state, mogplex.Text("/"), mogplex.Text("w")))


def test_a_start_that_was_answered_is_not_said_to_be_starting() -> None:
    state = played(*AIMED, *typed("fix it"))
    assert "Starting a run…" in drawn(state)
    (new,) = state.next.starts
    answered = state.plan(starts=(new._replace(run_id="R"),))
    assert "Starting a run…" not in drawn(answered)


def test_an_entry_taller_than_the_pane_is_shown_as_far_as_it_goes() -> None:
    long = arrived({"type": "log", "message": "word " * 200})
    state = played(mogplex.Resize((50, 9)), *BUSY, long, *keys("tab"), mogplex.Text("w"))
    assert "word word" in drawn(state, 50, 9)


RECORDS: Dict[str, List[Dict[str, Any]]] = {
    "/agents": [{"name": "Test writer", "model": "anthropic/claude-sonnet-4.5",
                 "category": "quality", "description": "Adds the tests that a change needs"}],
    "/model": [{"id": "openai/gpt-5-codex", "provider": "openai", "contextLength": 400000,
                "pricing": {"input": "0.00000125", "output": "0.00001"}}],
    "/mcp": [{"name": "github", "enabled": True, "kind": "http"},
             {"name": "sentry", "enabled": False, "kind": "stdio"}],
}


@pytest.mark.parametrize("call", ["/runs", "/sandboxes", "/repo", "/help", *RECORDS])
def test_a_column_of_a_drawer_has_room_or_is_left_out(call: str) -> None:
    state = played(*BUSY, *typed(call), rail=RAIL).shift(data=RECORDS.get(call, ()))
    if call == "/help":
        state = played(*keys("f1"))
    for width in range(30, 100):
        text = drawn(state, width, 24)
        rows = text[text.index("Esc closes"):text.index("────")]
        assert not re.search("(  |…)…$", rows, re.MULTILINE), text


@pytest.mark.parametrize("call, width, row", [
    ("/mcp", 30, "github  ● enabled   http"),
    ("/mcp", 80, "github                          ● enabled     http"),
    ("/model", 59, "openai/gpt-5-codex  openai    400,000  $1.25   $10.00"),
    ("/model", 50, "openai/gpt-5-codex  openai    400,000  $10.00"),
    ("/agents", 50, "Test writer  Adds the tests that a change needs"),
    ("/agents", 40, "Test writer  Adds the tests that a c…"),
    ("/runs", 40, "7e9a0000  ▶ streaming  bump deps"),
    ("/runs", 34, "7e9a0000  bump deps"),
])
def test_a_narrow_drawer_says_what_it_can(call: str, width: int, row: str) -> None:
    state = played(*BUSY, *typed(call), rail=RAIL)
    if call in RECORDS:
        state = then(state.shift(data=RECORDS[call]), mogplex.Tick())
    assert f"\n   {row}\n" in drawn(state, width, 24)


@pytest.mark.parametrize("name", ["busy", "paused", "runs"])
def test_titles_are_whole_words(name: str) -> None:
    for width in range(30, 130):
        lines = drawn(STATES[name], width, 11).split("\n")
        (title,) = [line for line in lines if "TIMELINE" in line or "Esc closes" in line]
        assert "…" not in title


def test_hints_are_whole_words_and_the_panes_have_their_own() -> None:
    for width in range(30, 130):
        line = drawn(played(*PANE), width, 24).split("\n")[-1]
        assert "…" not in line and line.strip().split(" · ")[-1] in mogplex.PANE_HINTS["timeline"]
    rail = drawn(played(*BUSY, *keys("btab"), rail=RAIL, window=WIDE))
    assert rail.split("\n")[-1].startswith(" j k move · Enter show · x kill")


def test_the_palette_s_run_keeps_a_half_typed_task() -> None:
    palette = [mogplex.Key("^p"), mogplex.Text("run task"), mogplex.Key("enter")]
    for text in ("fix it", "/run fix it"):
        state = played(mogplex.Text(text), *palette)
        assert state.composer.text == "/run fix it" and state.drawer is None


def test_names_are_known_in_any_case_and_in_part() -> None:
    repos = [{"id": "1", "full_name": "a/web", "default_branch": "main"},
             {"id": "2", "full_name": "a/webhooks"}]
    known = fetched(Desk.repos, repos)
    for name in ("web", "WEB", "A/Web"):
        assert played(known, *typed(f"/repo {name}")).next.target.repo.id == "1"
    assert played(known, *typed("/repo hook")).next.target.repo.id == "2"
    picker = played(known, *typed("/repo we")).drawer
    assert picker and picker.listing is mogplex.REPOS and len(picker.found) == 2


# -- Attaching


def test_a_run_is_attached_by_its_whole_id_though_another_begins_with_it() -> None:
    runs = (RUNS[0]._replace(id="7e9a-2"), RUNS[1]._replace(id="7e9a"))
    state = played(*typed("/attach 7e9a"), rail=mogplex.Rail(runs))
    assert asked(state) == [(Desk.watch, "7e9a")]


def test_an_ambiguous_run_opens_the_picker_and_the_shown_run_stays() -> None:
    state = played(*BUSY, *typed("/attach 7"), rail=RAIL)
    assert state.shown.run_id == RUN_ID and len(state.shown.entries) == 3
    assert state.drawer and state.drawer.listing is mogplex.RUNS


def test_an_unknown_run_is_an_error_and_the_shown_run_stays() -> None:
    state = played(*BUSY, *typed("/attach zzz"))
    assert asked(state) == [(Desk.find_run, "zzz")] and state.shown.run_id == RUN_ID
    missing = mogplex.MogplexError("Run not found", code="NOT_FOUND", status=404)
    state = then(state, failed(missing, Desk.find_run, "zzz"))
    assert state.shown.run_id == RUN_ID and len(state.shown.entries) == 3
    assert "Run not found" in drawn(state)


def test_a_run_that_is_found_is_shown_and_remembered() -> None:
    found = {**SHOWN, "runId": "elsewhere"}
    state = played(*BUSY, *typed("/attach elsewhere"), fetched(Desk.find_run, found, "elsewhere"))
    assert asked(state) == [(Desk.watch, "elsewhere"), (Desk.remember, "acme/web", found)]
    assert state.rail.runs[0].id == "elsewhere"


@pytest.mark.parametrize("wanted, shown, drawer", [
    ("7d10", "7d10-a", False), ("7", "", True), ("@last", "7d10-a", False), ("zzz", "zzz", False)])
def test_a_run_of_the_command_line_is_found_among_the_known_ones(
    tmp_path: Any, wanted: str, shown: str, drawer: bool,
) -> None:
    home = mogplex.Home(str(tmp_path / "home"))
    for run_id in ("7c02-b", "7d10-a"):
        body = {"repoId": "r1", "prompt": "fix it"}
        start = mogplex.start_record("https://x.example", body, f"k-{run_id}", "acme/web")
        home.record_run(start, {"runId": run_id})
    state = mogplex.first_state(home, {}, "https://x.example", "", wanted)
    assert [run.id for run in state.rail.runs] == ["7d10-a", "7c02-b"]
    assert (state.shown.run_id, state.drawer is not None) == (shown, drawer)


# -- Signing in

WRONG = mogplex.UnauthorizedError("Unauthorized", code="UNAUTHORIZED", status=401)


def test_the_token_field_stays_one_until_the_service_has_accepted_a_token() -> None:
    state = played(fetched(Desk.sign_out, "not signed in"), *typed("mog_wrong"))
    assert asked(state)[-1] == (Desk.try_token, "mog_wrong")
    assert "Trying the token" in drawn(state)
    for message in (failed(WRONG, Desk.try_token, "mog_wrong"), fetched(Client.sandboxes, []),
                    progressed(), told(Desk.client, None), *keys("esc")):
        state = then(state, message)
        text = drawn(then(state, mogplex.Text("mog_right")))
        assert "mog_" not in text and "•••••••••" in text and "Signed in" not in text
    assert asked(then(state, *typed("mog_right")))[-1] == (Desk.try_token, "mog_right")
    state = then(state, fetched(Desk.try_stored, "Signed in."))
    assert "Signed in." in drawn(state) and not state.is_signed_out


def test_no_key_brings_a_token_back_after_the_sign_in() -> None:
    state = played(*typed("/new"), fetched(Desk.sign_out, ""), mogplex.Text("mog_secret"), *keys("up"))
    state = then(state, fetched(Desk.try_stored, "Signed in."), *keys("down", "up", "down", "down"))
    assert "mog_secret" not in drawn(state)


def test_a_token_that_was_refused_is_not_said() -> None:
    state = played(fetched(Desk.sign_out, ""), *typed("mog_wrong"))
    state = then(state, failed(WRONG, Desk.try_token, "mog_wrong"))
    assert "mog_wrong" not in drawn(state) and "Not signed in" in drawn(state)
    assert state.composer.history == ()


def test_what_was_typed_before_a_sign_in_is_no_token_and_comes_back() -> None:
    state = played(*BUSY, mogplex.Text("half a task"), fetched(Desk.sign_out, "expired"))
    assert state.composer.text == ""
    state = then(state, fetched(Desk.try_stored, "Signed in."))
    assert state.composer.text == "half a task"
    assert (Shell.reconnect,) in asked(state) and (Desk.watch, RUN_ID) in asked(state)


def test_a_sign_out_takes_the_token_from_every_desk() -> None:
    state = played(*BUSY, fetched(Desk.sign_out, "Signed out."))
    assert (Shell.reconnect,) in asked(state)


# -- Truth: how the service answers, and what is known


@contextlib.contextmanager
def desk_of(credential: mogplex.Credential, posted: List[Any]) -> Iterator[mogplex.Desk]:
    """A desk that tells everything to a list."""
    connect = functools.partial(mogplex.Client, credential)
    desk = Desk(posted.append, mogplex.Facts(connect, "", mogplex.home_from({}), bool, ""))
    try:
        yield desk
    finally:
        desk.asks.put(None)


@pytest.mark.parametrize("refresh_token, lapses_at", [("", NOW), ("refresh", None)])
def test_a_sign_in_that_renews_itself_does_not_lapse(refresh_token: str, lapses_at: Any) -> None:
    credential = mogplex.Credential(TOKEN, expires_at=NOW, refresh_token=refresh_token)
    posted: List[Any] = []
    with desk_of(credential, posted) as desk:
        desk.client()
    assert posted == [told(Desk.client, lapses_at)]


def test_how_a_tail_stands_is_told_once() -> None:
    posted: List[Any] = []
    first = progressed().data
    with desk_of(mogplex.Credential(TOKEN), posted) as desk:
        for progress in (first, first, first._replace(failures=1)):
            desk.report(RUN_ID, progress)
    assert [message.data.failures for message in posted] == [0, 1]


@pytest.mark.parametrize("status, kind", [
    (401, mogplex.UnauthorizedError), (403, mogplex.ForbiddenError)])
@pytest.mark.parametrize("job", [Client.sandboxes, Desk.watch])
def test_a_refusal_is_never_nominal(status: int, kind: Any, job: Any) -> None:
    error = kind("Unauthorized", status=status)
    arguments = [RUN_ID] if job is Desk.watch else []
    state = played(*BUSY, failed(error, job, *arguments))
    assert "nominal" not in drawn(state) and "Unauthorized" in drawn(state)
    state = then(state, fetched(Client.sandboxes, SANDBOXES))
    assert "nominal" in drawn(state) and "!!" not in drawn(state)


@pytest.mark.parametrize("job", [Desk.repos, Client.sandboxes])
def test_an_answer_that_is_an_error_is_not_nominal(job: Any) -> None:
    broken = mogplex.MogplexError("Internal server error", status=500)
    state = played(*BUSY, failed(broken, job))
    assert "reconnect" in drawn(state) and "nominal" not in drawn(state)
    wrong_id = failed(broken, Desk.find_run, "zzz")
    assert "nominal" in drawn(played(*BUSY, wrong_id))


@pytest.mark.parametrize("error, again", [
    (mogplex.MogplexError("Run not found", status=404), False),
    (mogplex.UnavailableError("gave up", code="GAVE_UP"), True),
    (mogplex.RateLimitedError("gave up"), True),
    (mogplex.UnauthorizedError("no", status=401), True)])
def test_a_tail_that_an_outage_ended_is_begun_again(error: Any, again: bool) -> None:
    state = played(*BUSY, failed(error, Desk.watch, RUN_ID))
    watched = []
    for _ in range(130):
        state = later(state, 1, mogplex.Tick())
        watched += [ask for ask in asked(state) if ask[0] is Desk.watch]
    assert watched == [(Desk.watch, RUN_ID)] * again
    entries = then(state, arrived(EVENTS[0])).shown.entries
    assert len(entries) == (1 if again else len(EVENTS) + 1)


def test_a_run_that_cannot_be_followed_does_not_seem_to_work() -> None:
    missing = mogplex.MogplexError("Run not found", status=404)
    state = played(*BUSY, failed(missing, Desk.watch, RUN_ID))
    assert "cannot be followed: Run not found" in drawn(state)
    assert "agent working" not in drawn(state)
    refused = mogplex.UnauthorizedError("Unauthorized", status=401)
    lost = mogplex.UnavailableError("no route", delivered=False)
    for message in (failed(refused, Desk.watch, RUN_ID), failed(lost, Client.sandboxes)):
        assert "… no news from the service, last event" in drawn(played(*BUSY, message))


def ticked(state: mogplex.State, seconds: int, answer: Any = None) -> List[Any]:
    """(second, job, arguments...) of what is asked in that time; ``answer`` makes the answers."""
    seen = []
    for second in range(1, seconds + 1):
        state = later(state, 1, mogplex.Tick())
        for ask in state.asks:
            seen.append((second, ask.job, *ask.arguments))
            if answer:
                state = then(state, answer(ask))
    return seen


def good(ask: mogplex.Ask) -> Any:
    """A healthy service's answer."""
    data: Any = SANDBOXES
    if ask.job is Desk.repos:
        data = TWO_REPOS
    elif ask.job is Client.run:
        data = {**SHOWN, "runId": ask.arguments[0]}
    return mogplex.Told(ask, data, 84.0)


def test_what_could_not_be_fetched_at_the_start_is_fetched_again() -> None:
    away = mogplex.UnavailableError("no answer", transient=True)
    state = mogplex.poll(played(), 2)
    assert jobs(state) == [Desk.repos, Client.sandboxes]
    state = then(state, failed(away, Desk.repos), failed(away, Client.sandboxes))
    assert not state.attention.notice_until
    asks = [job for _, job, *_ in ticked(state, 31)]
    assert asks.count(Desk.repos) >= 2 and Client.sandboxes in asks
    assert "!!" not in drawn(then(state, fetched(Desk.repos, TWO_REPOS)))


@pytest.mark.parametrize("count", [1, 4, 12])
def test_active_runs_are_asked_at_least_every_30_s_within_the_budget(count: int) -> None:
    runs = tuple(remembered(number, "work", "streaming") for number in range(count))
    state = played(*BUSY, rail=mogplex.Rail(runs))
    seen = ticked(state, 240, good)
    for run in runs:
        moments = [second for second, *ask in seen if ask == [Client.run, run.id]]
        gaps = [after - before for before, after in zip([0, *moments], moments)]
        assert max(gaps) <= 30
    for start in range(0, 180, 7):
        within = [second for second, *_ in seen if start < second <= start + 60]
        assert len(within) <= 30
    assert (Client.run, RUN_ID) not in [tuple(ask) for _, *ask in seen]  # which its tail says


def test_runs_that_nobody_knows_delay_none_that_is_known_to_be_active() -> None:
    active = remembered(99, "work", "streaming")
    unknown = tuple(remembered(number, "old") for number in range(45))
    state = played(*FIRST_LISTS, rail=mogplex.Rail((*unknown, active)))

    def refused(ask: mogplex.Ask) -> Any:
        if ask.arguments == (active.id,):
            return good(ask)
        return mogplex.Failed(ask, mogplex.ForbiddenError("no", status=403))

    seen = ticked(state, 120, refused)
    moments = [second for second, *ask in seen if ask == [Client.run, active.id]]
    gaps = [after - before for before, after in zip([0, *moments], moments)]
    assert moments and max(gaps) <= 30


@pytest.mark.parametrize("status, again", [("cancelled", True), ("success", False)])
def test_a_cancelled_run_that_comes_back_is_followed_again(status: str, again: bool) -> None:
    state = played(*BUSY, run_over({**SHOWN, "status": status}))
    seen = [ask for _, *ask in ticked(state, 31, good)]
    assert ([Client.run, RUN_ID] in seen) == again
    state = then(state, fetched(Client.run, SHOWN, RUN_ID))
    assert asked(state) == [(Desk.watch, RUN_ID)] and not state.shown.verdict


def test_the_tail_takes_24_requests_a_minute() -> None:
    assert 60 / mogplex.TAIL_INTERVAL_S <= 24


def test_unknown_statuses_are_asked_and_known_ends_are_not() -> None:
    seen = [ask for _, *ask in ticked(played(*BUSY, rail=RAIL), 60, good)]
    assert [Client.run, RUNS[3].id] in seen and [Client.run, RUNS[1].id] not in seen


def test_of_500_runs_those_around_the_selected_one_are_asked_as_well() -> None:
    runs = tuple(remembered(number, "task", "success") for number in range(300))
    old = tuple(remembered(number, "task") for number in range(300, 500))
    new = tuple(remembered(number, "task") for number in range(500, 550))
    state = played(rail=mogplex.Rail((*new, *runs, *old), at=450))
    seen = [ask for _, *ask in ticked(state, 20, good)]
    assert [Client.run, old[100].id] in seen


def test_nothing_is_asked_during_the_wait_of_a_429() -> None:
    held = played(*BUSY, LIMITED)
    assert "reconnect 43s" in drawn(held)
    assert [second for second, *_ in ticked(held, 60)][0] == 43
    assert "Rate limited" in drawn(then(held, *typed("/refresh")))


def test_a_service_that_hangs_is_not_asked_more_and_more() -> None:
    runs = tuple(remembered(number, "work", "streaming") for number in range(40))
    assert len(ticked(played(*FIRST_LISTS, rail=mogplex.Rail(runs)), 600)) <= 12


@pytest.mark.parametrize("messages", [typed("/refresh"), [*keys("tab"), mogplex.Text("r")]])
def test_refresh_asks_now(messages: List[Any]) -> None:
    state = played(*BUSY, rail=RAIL)
    state = then(state, *messages)
    for ask in ((Desk.repos,), (Client.sandboxes,), (Client.run, RUN_ID), (Client.run, RUNS[0].id)):
        assert ask in asked(state)


def test_a_status_that_is_old_says_so() -> None:
    run = remembered(1, "work", "streaming", heard_at=NOW - 45)
    assert "45s old" in drawn(played(rail=mogplex.Rail((run,))))
    done = remembered(1, "work", "success", heard_at=NOW - 45)
    assert "old" not in drawn(played(rail=mogplex.Rail((done,))))


@pytest.mark.parametrize("error", [
    mogplex.MogplexError("gone", status=404), mogplex.ForbiddenError("no", status=403),
    mogplex.MogplexError("broken", status=500, transient=True)])
def test_a_poll_that_is_refused_takes_no_status_away(error: Any) -> None:
    done = {**SHOWN, "status": "success"}
    state = played(*BUSY, run_over(done), failed(error, Client.run, RUN_ID))
    assert "SUCCESS" in drawn(state) and "UNKNOWN" not in drawn(state)
    state = played(rail=RAIL)
    state = then(state, failed(error, Client.run, RUNS[0].id))
    assert state.rail.runs[0].status == "streaming"


def test_why_a_run_failed_is_said_also_when_it_is_attached_later() -> None:
    state = played(*AIMED, *typed(f"/attach {RUN_ID}"), fetched(Desk.find_run, FAILED_RUN, RUN_ID))
    assert "✗ failed: Agent run exited with code 1." in drawn(state)
    state = then(state, *(arrived(event) for event in EVENTS), run_over(FAILED_RUN))
    assert "✗ failed: Agent run exited with code 1." in drawn(state)


def test_a_run_in_the_background_that_fails_is_an_alert_that_leads_to_it() -> None:
    state = played(*BUSY, rail=RAIL)
    broken = {"runId": RUNS[0].id, "status": "failed", "error": "Sandbox launch failed"}
    state = then(state, fetched(Client.run, broken, RUNS[0].id))
    assert "!! run 7e9a0000 failed: Sandbox launch failed" in drawn(state)
    assert "!!" not in drawn(then(state, *keys("esc")))
    assert asked(then(state, *keys("enter"))) == [(Desk.watch, RUNS[0].id)]
    assert "!!" not in drawn(played(fetched(Client.run, broken, RUNS[3].id), rail=RAIL))


def test_an_alert_says_its_keys_only_where_they_are_its_own() -> None:
    alert = mogplex.Notice("run 7c02f9d4 failed", run_id="7c02f9d4")
    state = played(*BUSY).attend(alerts=(alert,))
    assert "[Enter] open  [Esc] dismiss" in drawn(state)
    for message in (mogplex.Text("half"), mogplex.Key("tab"), mogplex.Key("f1")):
        assert "[Enter]" not in drawn(then(state, message))


def test_an_alert_of_the_shown_run_is_opened_and_gone_as_well() -> None:
    state = played(*ENDED_BADLY)
    alert = drawn(state, 80, 24).split("\n")[1]
    assert "failed: Agent run exited with code 1. " in alert and alert.endswith("[Enter] open")
    opened = then(state, *keys("enter"))
    assert "!!" not in drawn(opened) and "code 1." in drawn(opened)
    assert opened.window.focus == "composer" and opened.asks == ()


def test_a_run_that_fails_twice_has_one_alert() -> None:
    run_id = RUNS[3].id
    state = played(rail=RAIL)
    for status in ("streaming", "failed", "streaming", "failed"):
        state = then(state, fetched(Client.run, {"runId": run_id, "status": status}, run_id))
    assert len(state.attention.alerts) == 1


def test_alerts_leave_with_their_cause() -> None:
    lost = played(*BUSY, progressed("lost", failures=3, message="no route"))
    assert "Offline, retrying: no route" in drawn(lost)
    found = then(lost, progressed())
    assert "!!" not in drawn(found) and "Connected again." in drawn(found)
    assert "Offline" in drawn(then(lost, told(Desk.client, None)))  # it may be offline still
    assert "lapses in 5m" in drawn(played(told(Desk.client, NOW + 300)))


def test_tool_names_are_in_the_timeline_and_found_by_the_filter() -> None:
    state = played(*BUSY, *keys("^f"), mogplex.Text("apply_pat"))
    assert "apply_patch  src/session.ts" in drawn(state) and "1 event" in drawn(state)
    for kind in ("assistant_message", "cancel_requested", "tool_finished"):
        state = played(*BUSY, arrived({**EVENTS[0], "type": kind}))
        for width in (100, 120, 80, 60):
            assert kind in drawn(state, width, 24)


def test_no_key_is_bound_twice_where_it_is_heard() -> None:
    for pane in (*mogplex.PANES.values(), mogplex.DRAWER_PANE):
        keys_of_it = " ".join(action.call for action in (*mogplex.ANYWHERE, *pane)).split()
        assert [key for key in set(keys_of_it) if keys_of_it.count(key) > 1] == []


GUARDED = """
import types
import mogplex
screen = types.SimpleNamespace(restore=lambda: print("restored"))
guard = mogplex.guarded(screen, print)
guard.__enter__()
"""


def test_the_terminal_is_restored_at_the_latest_when_the_interpreter_ends() -> None:
    assert python(GUARDED).communicate()[0] == "restored\n"


def test_a_filter_that_nothing_passes_can_be_moved_in() -> None:
    state = played(*BUSY, *keys("tab"), *map(mogplex.Text, "w/q"), *keys("enter"))
    for message in (*keys("up", "end", "pgup", "home"), mogplex.Mouse(-3, 40, 6)):
        state = then(state, message)
        assert "filter: q · 0 events" in drawn(state)
    state = then(state, *keys("^f"), *keys("esc"))
    assert "src/session.ts" in drawn(state) and "· 3 events" in drawn(state)


@pytest.mark.posix
def test_times_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert "20:47:20" in drawn(played(*BUSY))
        assert "Nov 25 20:52" in drawn(played(*typed("/runs"), rail=RAIL))
        assert "Nov 25 20:58:00" in drawn(played(*PANE, *keys("enter")))
        logs = {"lifecycle_events": [{"created_at": "2026-11-25T11:00:00Z", "event_type": "made"}]}
        state = played(*BUSY, *typed("/logs s1"), fetched(Client.sandbox_logs, logs, "s1000000-1"))
        assert "Nov 25 20:00:00  made" in drawn(state)
    finally:
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()


@pytest.mark.parametrize("height", [16, 24, 40])
def test_runs_and_sandboxes_each_keep_a_third_of_the_rail(height: int) -> None:
    runs = tuple(remembered(number, "task", "success") for number in range(500))
    sandboxes = tuple(mogplex.KnownSandbox(f"{number}", "r1", f"b{number}", "running")
                      for number in range(500))
    for rail in (mogplex.Rail(runs, sandboxes[:2]), mogplex.Rail(runs, sandboxes)):
        lines = mogplex.rail_lines(played(rail=rail), 39, height - 5)
        for first, last in ((0, 500), (500, 1000)):
            shown = [position for _, position in lines if position in range(first, last)]
            assert len(shown) >= min((height - 10) // 3, 2 if rail.sandboxes is not sandboxes
                                     and first else 500)


def test_a_narrow_rail_gives_up_the_age_then_the_repository_then_the_word() -> None:
    run = remembered(0x7E9A, "fix the login redirect", "streaming")
    lines = {}
    for width in (26, 32, 36, 40, 60):
        row = mogplex.run_line(played(rail=mogplex.Rail((run,))), run, width)
        lines[width] = "".join(text for text, _ in row)
        assert "fix the logi" in lines[width].replace("…", "i") or "fix the log" in lines[width]
    assert "streaming" not in lines[26]
    assert "streaming" in lines[32] and "web" not in lines[32]
    assert "web" in lines[36] and "8m" not in lines[36]
    assert "8m" in lines[40]


def test_the_rail_s_last_line_says_the_selected_row_in_full() -> None:
    run = remembered(0x7E9A, "a task that is much longer than the rail is wide", "streaming")
    text = drawn(played(rail=mogplex.Rail((run,))))
    words = " ".join(" ".join(line.split("│")[0].split()) for line in text.split("\n")[-8:])
    assert "7e9a0000 acme/web · streaming 8m · a task that is much longer than the rail" in words


# -- Drawers


def test_scrolling_up_pauses_and_end_follows_again() -> None:
    state = played(mogplex.Resize((80, 24)), *BUSY, *many_events(100))
    assert "event 99" in drawn(state, 80, 24)
    for _ in range(20):
        state = then(state, mogplex.Mouse(-3, 10, 10))
    state = then(state, arrived({"message": "late"}))
    screen = drawn(state, 80, 24)
    assert "PAUSED" in screen and "newer (End)" in screen and "late" not in screen
    assert "late" in drawn(then(state, *keys("end")), 80, 24)


def test_no_row_is_left_blank_below_the_last_event() -> None:
    state = played(mogplex.Resize((80, 15)), *BUSY, *many_events(100), *keys("tab", "up"))
    assert drawn(state, 80, 15).count("  event ") == 8
    assert drawn(state, 80, 40).count("  event ") == 32
    filtered = then(state, *keys("^f"), mogplex.Text("event 9"))
    assert drawn(filtered, 80, 24).count("  event ") == 16


def test_long_lines_are_wrapped_or_cut() -> None:
    message = " ".join(f"word{number}" for number in range(60))
    state = played(*BUSY, arrived({**EVENTS[0], "message": message}), *keys("tab"))
    assert "word59" not in drawn(state)
    wrapped = then(state, mogplex.Text("w"))
    for number in range(60):
        assert f"word{number}" in drawn(wrapped)
    assert "word59" not in drawn(then(wrapped, mogplex.Text("w")))


def test_the_details_of_an_event_begin_with_its_message() -> None:
    event = {**EVENTS[1], "message": "first line\nsecond " + "x" * 200}
    lines = drawn(played(*BUSY, arrived(event), *keys("tab", "enter")), 80, 24).split("\n")
    assert lines[3].split() == ["Nov", "25", "11:47:24", "log"] and lines[4].strip() == "first line"
    assert lines[5].strip().startswith("second xxx") and len(lines[6].strip()) > 70
    assert "{" in [line.strip() for line in lines]


def test_a_drawer_says_that_the_network_is_dead_and_recovers() -> None:
    away = mogplex.UnavailableError("no answer")
    state = played(*typed("/agents"), failed(away, Client.agents))
    assert "no answer · retrying" in drawn(state, 80, 24)
    assert (Client.agents,) in asked(later(state, 5, mogplex.Tick()))
    state = then(state, fetched(Client.agents, [{"name": "Reviewer", "model": "gpt"}]))
    assert "Reviewer" in drawn(state, 80, 24) and "no answer" not in drawn(state, 80, 24)


def test_a_drawer_of_mcp_servers_never_shows_a_config() -> None:
    servers = [{"name": "db", "enabled": True, "kind": "stdio", "config": {"k": "s3cret"}}]
    state = played(*typed("/mcp"), fetched(Client.mcp_servers, servers))
    assert "● enabled" in drawn(state) and "stdio" in drawn(state)
    assert state.drawer and "s3cret" not in repr(state.drawer.lines)


def test_models_have_their_context_and_their_prices_per_million() -> None:
    models = [{"id": "gpt", "provider": "openai", "contextLength": 400000,
               "pricing": {"input": 0.00001, "output": 0.0000125}},
              {"id": "odd", "contextLength": "?", "pricing": {"input": [], "output": "x"}}]
    text = drawn(played(*typed("/model"), fetched(Client.models, models)))
    assert "400,000" in text and "$10.00" in text and "$12.50" in text and "IN $/M" in text


@pytest.mark.parametrize("messages, present", [
    (typed("/harness"), "▸ codex"), (typed("/repo"), "▸ acme/web"), (typed("/branch"), "▸ main"),
    (typed("/runs"), "▸ 7f2c41aa")])
def test_a_picker_marks_the_present_choice_under_a_title(messages: List[Any], present: str) -> None:
    assert present in drawn(played(*BUSY, *messages))


def test_a_list_that_shrinks_keeps_a_row_selected() -> None:
    many = [{"id": f"{number:04}-s", "status": "running"} for number in range(60)]
    state = played(fetched(Client.sandboxes, many), *typed("/sandboxes"), *keys("end"),
                   fetched(Client.sandboxes, many[:1]))
    assert "0000-s" in drawn(state)
    assert (Client.sandbox_logs, "0000-s") in asked(then(state, *keys("enter")))


def test_a_rail_that_a_narrower_window_hides_keeps_no_focus() -> None:
    state = played(mogplex.Resize((120, 40)), *BUSY, *keys("btab"), rail=RAIL)
    assert state.window.focus == "rail"
    narrow = then(state, mogplex.Resize((80, 24)))
    assert narrow.window.focus == "timeline"
    assert then(narrow, mogplex.Text("x")).attention.killing == RUN_ID


@pytest.mark.parametrize("line", ["=====", "a" * 78, "é" * 78, "(.*?)+" * 13, "日本語" * 13])
def test_a_search_over_10_000_lines_of_any_content_finds_the_one(line: str) -> None:
    items = [mogplex.Item((line,))] * 9999 + [mogplex.Item(("the needle",))]
    assert mogplex.searched(items, "needle")[0].cells == ("the needle",)
    assert len(mogplex.searched(items, line[:30])) >= 9999
    assert mogplex.searched(items, "=" * 400) == ()


def test_a_search_finds_letters_in_order_and_the_closest_first() -> None:
    lines = [mogplex.Item((text,)) for text in ("s a n d b o x", "/sandboxes", "/sbx", "box s")]
    apart = [mogplex.Item(("s_b_x",)), mogplex.Item(("sand sbx",))]
    assert mogplex.searched(apart, "sbx")[0] == apart[1]  # from the last s on, not the first
    found = mogplex.searched(lines, "s bx")
    assert [item.cells[0] for item in found] == ["/sbx", "/sandboxes", "s a n d b o x"]


def test_at_the_end_of_a_page_its_last_line_is_selected() -> None:
    state = played(mogplex.Resize((80, 24)), *BUSY, *keys("tab", "enter", "end"))
    assert state.drawer and state.drawer.at == len(state.drawer.found) - 1
    assert mogplex.Screen.write in jobs(then(state, mogplex.Text("y")))
    assert then(state, *keys("up")) != then(state, *keys("down"))


def test_a_page_is_made_anew_for_another_window_and_another_answer() -> None:
    message = "x" * 100 + "END"
    state = played(mogplex.Resize((80, 24)), *BUSY, arrived({**EVENTS[0], "message": message}))
    details = then(state, *keys("tab", "enter"))
    assert message not in drawn(details, 80, 24) and message in drawn(details, 160, 24)
    logs = then(state, *typed("/logs s1000000-1"))
    for line in ("first", "second"):
        answer = {"sandbox": {"dev_log": line}}
        logs = then(logs, fetched(Client.sandbox_logs, answer, "s1000000-1"))
        assert logs.drawer and line in repr(logs.drawer.lines)


def test_the_details_of_a_megabyte_are_wrapped_once() -> None:
    event = {**EVENTS[0], "message": "a line of text, and more of it; " * 32768}
    state = played(mogplex.Resize((120, 40)), *BUSY, arrived(event), *keys("tab", "enter"))
    assert state.drawer and len(state.drawer.lines) > 1000
    assert "/export writes all events" in drawn(then(state, *keys("end")))
    moved = later(state, 1, mogplex.Tick(), *keys("down"))
    assert moved.drawer and moved.drawer.lines is state.drawer.lines


# -- Exports

SURROGATE = {**EVENTS[0], "message": "lone \ud800 surrogate \x9b31m \u202e bidi \x1b[2J"}


@pytest.mark.parametrize("form", ["json", "jsonl", "markdown"])
def test_an_export_holds_every_event_and_no_raw_control(form: str) -> None:
    state = played(*BUSY, arrived(SURROGATE), *typed(f"/export {form}"))
    (job, path, content), = asked(state)
    endings = {"json": "json", "jsonl": "jsonl", "markdown": "md"}
    assert job is Desk.export and path == f"mogplex-7f2c41aa.{endings[form]}"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", content)
    if form == "json":
        messages = [event["message"] for event in json.loads(content)["events"]]
    elif form == "jsonl":
        messages = [json.loads(line)["message"] for line in content.splitlines()]
    else:
        assert "src/session.ts" in content
        return
    assert messages == [event["message"] for event in [*EVENTS, SURROGATE]]


def test_an_unknown_form_keeps_the_name_of_the_file() -> None:
    state = played(*BUSY, *typed("/export pdf my report.md"))
    assert "unknown format 'pdf': choose one for my report.md" in drawn(state)
    state = then(state, *keys("down", "down", "enter"))
    assert asked(state)[0][:2] == (Desk.export, "my report.md")
    state = played(*BUSY, *typed("/export report.md"), *keys("down", "down", "enter"))
    assert asked(state)[0][:2] == (Desk.export, "report.md")


@pytest.mark.posix
@pytest.mark.posix
def test_a_file_that_cannot_be_written_leaves_nothing_and_none_is_replaced(tmp_path: Any) -> None:
    path = str(tmp_path / "run.md")
    mogplex.write_new_file(path, "lone \ud800")
    with open(path, "rb") as file:
        assert file.read() == b"lone ?"
    with pytest.raises(FileExistsError):
        mogplex.write_new_file(path, "other")
    code = (
        "import resource, mogplex\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # as a full disk does it
        f"mogplex.write_new_file({path + '2'!r}, 'x' * 10000)")
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60)
    assert b"OSError" in done.stderr and not os.path.exists(path + "2")


# -- The terminal

NAMED_BY_BLESSED = {"\x1b[A": "up", "\x1bOB": "down", "\x1bOP": "f1"}


def sliced(*reads: str, final: bool = True) -> List[Any]:
    """What the terminal sent, in so many reads; nothing follows the last."""
    messages: List[Any] = []
    rest = ""
    for number, sent in enumerate(reads, 1):
        last = final and number == len(reads)
        found, rest = mogplex.sliced(rest + sent, last, lambda part: NAMED_BY_BLESSED.get(part, ""))
        messages += found
    return messages


def joined(messages: Sequence[Any]) -> List[Any]:
    """With texts that stand side by side as one."""
    output: List[Any] = []
    for one in messages:
        beside = [one, *output[-1:]]
        if len(beside) == 2 and all(isinstance(each, Text) and not each.pasted for each in beside):
            one = Text(output.pop().text + one.text)
        output.append(one)
    return output


Key, Text = mogplex.Key, mogplex.Text
SENT: List[Tuple[str, List[Any]]] = [
    ("abc", [Text("abc")]),
    ("\u00e9\u65e5", [Text("\u00e9\u65e5")]),
    ("a\r", [Text("a"), Key("enter")]),
    ("\x03\x10\x7f\t", [Key("^c"), Key("^p"), Key("backspace"), Key("tab")]),
    ("\x01\x05\x0b\x15", [Key("home"), Key("end"), Key("^k"), Key("^u")]),
    ("\x1b[A\x1bOB", [Key("up"), Key("down")]),
    ("\x1bOP\x1b[4~\x1b[[A", [Key("f1"), Key("end"), Key("f1")]),
    ("\x1b[1;5D\x1b[1;5C", [Key("ctrl+left"), Key("ctrl+right")]),
    ("\x1bb\x1bf", [Key("alt+b"), Key("alt+f")]),
    ("\x1b\r\x1b[13;2u\x1b[13;3u\x1b[27;2;13~", [Key("newline")] * 4),
    # Bytes that come together mean what they mean apart.
    ("\x1b/kill\r", [Key("esc"), Text("/kill"), Key("enter")]),
    ("\x1b:rep", [Key("esc"), Text(":rep")]),
    ("\x1bOK", [Key("esc"), Text("OK")]),
    ("\x1b\x03", [Key("esc"), Key("^c")]),
    ("\x1b\x1b[A", [Key("esc"), Key("up")]),
    ("\x1b\x1b[200~a\x1b[201~", [Key("esc"), pasted("a")]),
    ("\x1b[107;3u", [Key("esc"), Text("k")]),
    # Keys with modifiers, as xterm's modifyOtherKeys and CSI-u send them.
    ("\x1b[99;5u\x1b[27;5;99~\x1b[67;6u", [Key("^c")] * 3),
    ("\x1b[112;5u\x1b[27;5;122~", [Key("^p"), Key("^z")]),
    ("\x1b[91;5u\x1b[27u", [Key("esc")] * 2),
    ("\x1b[9;2u\x1b[Z", [Key("btab")] * 2),
    ("\x1b[127;2u\x1b[98;3u", [Key("backspace"), Key("alt+b")]),
    ("\x1b[97;2u\x1b[32;2u\x1b[233u", [Text("A "), Text("\u00e9")]),
    ("\x1b[99;9u\x1b[57358u\x1b[9999999u\x1b[55296u", []),
    # Pastes, bracketed or not.
    ("\x1b[200~a\rb\x1b[201~c", [pasted("a\nb"), Text("c")]),
    ("\x1b[200~\ta\r\n\x1b[31m\x03\x1b[201~", [pasted("\ta\n\x1b[31m\x03")]),
    ("rm x\nls\n", [pasted("rm x\nls\n")]),
    # The mouse.
    ("\x1b[<64;10;5M\x1b[<65;1;1M", [mogplex.Mouse(-3, 9, 4), mogplex.Mouse(3, 0, 0)]),
    ("\x1b[<68;10;5M", [mogplex.Mouse(-3, 9, 4)]),
    ("\x1b[<0;10;5M\x1b[<0;10;5m\x1b[<2;1;1M", [mogplex.Mouse(0, 9, 4)]),
    ("\x1b[M !!", []),
    # What the terminal says by itself.
    ("\x1b[?62;c\x1b]11;rgb:0/0/0\x07\x1b]11;rgb:0/0/0\x1b\\\x1b[24;80R\x1b[I", []),
]


@pytest.mark.parametrize("sent, messages", SENT, ids=ascii)
def test_what_a_terminal_sends(sent: str, messages: List[Any]) -> None:
    assert joined(sliced(sent)) == joined(messages)


@pytest.mark.parametrize("sent, messages", SENT, ids=ascii)
def test_what_a_terminal_sends_in_two_reads(sent: str, messages: List[Any]) -> None:
    if sent.startswith("rm x"):
        return  # a paste without marks is known only by its coming in one go
    for cut in range(1, len(sent)):
        assert joined(sliced(sent[:cut], sent[cut:])) == joined(messages), cut


def test_esc_and_a_word_in_one_read_are_no_alt_and_a_letter() -> None:
    assert sliced("\x1bfix it") == [Key("esc"), Text("fix it")]
    assert sliced("\x1bbump\r") == [Key("esc"), Text("bump"), Key("enter")]
    assert sliced("\x1bfx\x1bb") == [Key("alt+f"), Text("x"), Key("alt+b")]
    assert sliced("\x1b\rfix") == [Key("newline"), Text("fix")]


@pytest.mark.parametrize("half", ["\x1b_Gi=1;OK", "\x1bPabc", "\x1bXabc"])
def test_half_an_answer_of_the_terminal_waits_for_the_rest(half: str) -> None:
    assert sliced(half, final=False) == []


def test_a_sequence_whose_end_does_not_come_is_esc_and_letters() -> None:
    assert sliced("\x1b[12", final=False) == []
    assert sliced("\x1b[12", "") == [Key("esc"), Text("[12")]
    assert sliced("\x1b]0;x", "") == [Key("esc"), Text("]0;x")]
    assert sliced("\x1b[200~half", "") == []


@pytest.mark.parametrize("unit", [
    "\x1b", "\x1b[", "\x1b[200~", "\x1b[<0;1", "\x1b]", "\x1bO", "\x1b[1;", "\x1b[27;5;9",
    "ab\r\n", "\x1bP;", "0;", " ", "\x1b[M", "\x1b[99;5u",
    "\x1b[200~x\x1b[201", "\x80", "\x1bb", "\x1b[<0;1;1M", "\x1b[ ",
], ids=ascii)
@pytest.mark.slow
def test_slicing_is_linear(unit: str) -> None:
    for start in ("", "\x1b[", "\x1b]"):
        assert is_linear(lambda size: sliced(start + unit * (size // len(unit)), "")), ascii(start)


COCKPIT = """
import os, sys, threading, mogplex
url, token, attach = sys.argv[1:4]
def crash(*_):
    1 / 0
def hooked(*_):
    try:
        crash()
    except ZeroDivisionError:
        sys.excepthook(*sys.exc_info())
        sys.excepthook(*sys.exc_info())
        os._exit(1)
def torn(*_):  # as a disk does it
    raise OSError(5, "ZeroDivisionError it is not")
def spin(*_):
    os.write(1, b"spinning")
    while True:
        pass
if os.environ.get("CRASH") == "spin":
    mogplex.Keyboard.read = spin
if os.environ.get("CRASH") == "loop":
    mogplex.Keyboard.read = crash
crashes = {"job": crash, "torn": lambda *_: threading.Thread(target=torn).start(),
            "thread": lambda *_: threading.Thread(target=crash).start(), "hook": hooked}
given = token if "SIGNED_OUT" not in os.environ else ""
home = mogplex.home_from(os.environ)
def connect(credential=None):
    stored = credential or given or mogplex.resolve_credential(os.environ, url, home)
    return mogplex.Client(stored, url)
def missing(*_):
    raise FileNotFoundError(2, "no such program")
crashes["missing"] = missing
mogplex.TAIL_INTERVAL_S = 0.25
mogplex.START_WAIT_S = float(os.environ.get("START_WAIT_S", mogplex.START_WAIT_S))
mogplex.LOCK_WAIT_S = float(os.environ.get("LOCK_WAIT_S", mogplex.LOCK_WAIT_S))
sys.exit(mogplex.run_cockpit(connect, base_url=url, home=home, environ=os.environ, attach=attach,
                             text=" ".join(sys.argv[4:]),
                             run_browser=crashes.get(os.environ.get("CRASH"), lambda url: True)))
"""


def adopt(ignored: Sequence[int] = ()) -> None:
    """In a child, before it begins: the head of a session on the terminal that is its stdin.

    Signals are as a shell leaves them, whatever the tests were started with.
    """
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


class Terminal:
    """The real cockpit on a pseudo-terminal, read by pyte.

    It waits for what is on the screen, with a deadline.
    """

    def __init__(
        self, argv: Sequence[str], width: int = 100, height: int = 24, ignored: Sequence[int] = (),
        **environ: str,
    ) -> None:
        self.screen = Emulator(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.output = b""
        self.lock = threading.Lock()
        self.fd, child = pty.openpty()
        self.child = child  # kept open, to be read and asked for its modes after the end
        self.resize(width, height)
        self.modes = termios.tcgetattr(child)
        variables = {
            **os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environ}
        self.process = subprocess.Popen(
            argv, stdin=child, stdout=child, stderr=child, env=variables,
            preexec_fn=functools.partial(adopt, ignored))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = os.read(self.fd, 65536)
                with self.lock:
                    self.output += data
                    self.stream.feed(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.child)
        os.close(self.fd)

    def resize(self, width: int, height: int) -> None:
        with self.lock:
            self.screen.resize(height, width)
            fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def text(self) -> str:
        with self.lock:
            return "\n".join(line.rstrip() for line in self.screen.display)

    def send(self, text: str) -> Terminal:
        data = text.encode()
        while data:
            data = data[os.write(self.fd, data):]
        return self

    def until(self, condition: Union[str, Callable[[], object]], seconds: float = 60.0) -> Terminal:
        """Wait for a text on the screen, or for anything else to be true."""
        def is_met() -> object:
            if isinstance(condition, str):
                return condition in self.text()
            return condition()

        deadline = time.monotonic() + seconds
        while not is_met():
            late = f"not within {seconds} s: {condition}\n{self.text()}"
            assert time.monotonic() < deadline, late
            time.sleep(0.01)
        return self

    def ended(self, code: int) -> str:
        """What the program leaves: its exit code, sane modes, and the text of the screen."""
        assert self.process.wait(60) == code, self.text()
        end = b"\x1b[?9999l"  # means nothing, and comes behind all that the program wrote
        os.write(self.child, end)
        self.until(lambda: end in self.output)  # an echo may follow it
        assert termios.tcgetattr(self.child) == self.modes
        assert self.on() == set()
        return self.text()

    def on(self) -> Set[str]:
        """The private modes that are set now, and "hidden" for a cursor that is not shown."""
        modes = set()
        for mode, letter in re.findall(rb"\x1b\[\?(\d+)([hl])", self.output):
            name = mode.decode()
            is_set = letter == b"h"
            if name == "25":
                name = "hidden"
                is_set = not is_set
            modes.discard(name)
            if is_set and name not in ("1", "12"):
                modes.add(name)
        return modes


@pytest.fixture
def cockpit(demo: mogplex.DemoServer, tmp_path: Any) -> Iterator[Callable[..., Terminal]]:
    """cockpit(words..., attach="", width=, height=, VARIABLE="..."): one that runs, signed in."""
    with contextlib.ExitStack() as stack:
        def start(*words: str, attach: str = "", url: str = demo.url, **how: Any) -> Terminal:
            how.setdefault("MOGPLEX_REPO", "acme/web")
            how.setdefault("MOGPLEX_HOME", str(tmp_path / "home"))
            argv = [sys.executable, "-c", COCKPIT, url, demo.token, attach, *words]
            return stack.enter_context(Terminal(argv, **how))
        yield start


def seeded(demo: mogplex.DemoServer, status: str) -> str:
    """The id of a run of the demo service that stands so."""
    with mogplex.Client(demo.token, demo.url) as client:
        for run in demo.seeded_runs:
            if client.run(run["id"])["status"] == status:
                return str(run["id"])
    raise AssertionError(f"no run of the demo is {status}")


@pytest.mark.posix
@pytest.mark.slow
def test_a_run_is_started_followed_exported_and_left(
    cockpit: Callable[..., Terminal], tmp_path: Any,
) -> None:
    terminal = cockpit().until("acme/web ⎇ main").send("fix the flaky test\r").until("Run started.")
    terminal.until("SUCCESS").until("Pull request ready").until("FOLLOW")
    terminal.until("success · o opens https://github.com")
    path = tmp_path / "run.jsonl"
    terminal.send(f"/export jsonl {path}\r").until("Exported to ").send(f"/export jsonl {path}\r")
    terminal.until("Cannot write")
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()][-1] == "finished"
    terminal.send("/open\r").until("Opened https://github.com")
    terminal.send("\x03").until("again within 1.5 s").send("\x03")
    assert "mogplex runs events" in terminal.ended(0) and "--follow" in terminal.text()


@pytest.mark.posix
def test_panes_filter_palette_and_drawers(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    terminal = cockpit(attach=seeded(demo, "success"), width=120, height=30).until("SUCCESS")
    terminal.until("Harness run finished")
    terminal.send("\t").until("j k move").send("kk").until("PAUSED").send("\r").until("EVENT")
    terminal.until('"payload"')
    terminal.send("\x1b").until("PAUSED").send("f").until("FOLLOW").send("/")
    terminal.until("type to filter").send("synchron")
    terminal.until("filter: synchron · 1 event").send("\x1b").until("all types")
    terminal.send("\x10").until("PALETTE").send("models").until("1/1").send("\r").until("MODELS")
    terminal.until("openai")
    terminal.send("\x03").until("TIMELINE").send("/sandboxes\r").until("PREVIEW").send("\r")
    terminal.until("install_log")
    terminal.send("\x1b").until("TIMELINE").send("\x1b[<65;60;10M\x1b[<64;60;10M").until("PAUSED")
    terminal.send("/exit\r")
    assert "--follow" in terminal.ended(0)


@pytest.mark.posix
@pytest.mark.slow
def test_kill_asks_first(cockpit: Callable[..., Terminal], demo: mogplex.DemoServer) -> None:
    terminal = cockpit(attach=seeded(demo, "streaming")).until("STREAMING").send("/kill\r")
    terminal.until("y yes").send("n").until("Not cancelled")
    terminal.send("\t").until("j k move").send("x").until("y yes").send("y").until("CANCELLED")
    terminal.until("Mogplex run cancelled")
    terminal.send("q")
    terminal.ended(0)


@pytest.mark.posix
def test_a_large_paste_is_one_text_and_runs_nothing(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit().until("acme/web ⎇ main")
    terminal.send("\x1b[200~x" + "/quit\r\n" * 30000 + "the end\x1b[201~").until("the end")
    terminal.send("\r").until("at most 100,000")
    terminal.send("\x03").until("again").send("\x03")
    assert "--follow" not in terminal.ended(0)


@pytest.mark.posix
def test_every_resize_repaints_all(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit("bump", "the", "deps", width=120, height=40).until("Nothing was sent")
    terminal.until("› bump the deps")
    sizes = (
        (80, 24, "RUNS 0"), (59, 20, "› bump"), (29, 8, "enlarge the window"), (30, 8, "› bump"),
        (130, 45, "SANDBOXES"),
    )
    for width, height, sight in sizes:
        terminal.resize(width, height)
        terminal.until(sight)
        terminal.until(lambda: "mogplex" in terminal.text().split("\n")[0] or width < 40)
    terminal.send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
@pytest.mark.parametrize("how, code", [
    *ENDED_BY_SIGNAL, ("job", 1), ("torn", 1), ("thread", 1), ("loop", 1), ("hook", 1)], ids=str)
def test_however_it_ends_the_terminal_is_as_before(
    cockpit: Callable[..., Terminal], how: Any, code: int,
) -> None:
    terminal = cockpit(attach="nope", CRASH=str(how)).until("TIMELINE")
    assert {"1049", "2004", "1000"} < terminal.on()
    assert termios.tcgetattr(terminal.child) != terminal.modes
    if code == 1:
        terminal.send("/open\r")
    else:
        terminal.process.send_signal(how)
    last = terminal.ended(code)
    if code == 1:
        assert "ZeroDivisionError" in last
    else:
        assert "runs events nope --follow" in last


@pytest.mark.posix
@pytest.mark.parametrize("how, code", ENDED_BY_SIGNAL, ids=str)
def test_a_terminal_that_takes_nothing_holds_nobody(
    cockpit: Callable[..., Terminal], how: int, code: int,
) -> None:
    terminal = cockpit(attach="nope").until("TIMELINE")
    termios.tcflow(terminal.child, termios.TCOOFF)
    terminal.send("never seen")
    time.sleep(0.2)  # a moment for it to begin a frame; if it is late, the test only proves less
    terminal.process.send_signal(how)
    assert terminal.process.wait(60) == code
    assert termios.tcgetattr(terminal.child) == terminal.modes
    termios.tcflow(terminal.child, termios.TCOON)


@pytest.mark.posix
def test_a_loop_that_hangs_is_left_at_the_second_signal(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit(attach="nope", CRASH="spin").until("TIMELINE")
    terminal.send("a").until(lambda: b"spinning" in terminal.output)

    def ends_at_a_signal() -> bool:
        terminal.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(1.2)
        return terminal.process.returncode is not None

    terminal.until(ends_at_a_signal)
    assert terminal.process.returncode in (143, -signal.SIGTERM)  # a third one meets no handler
    terminal.ended(terminal.process.returncode)


@pytest.mark.posix
def test_a_signal_that_was_ignored_at_the_start_stays_so(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit(ignored=(signal.SIGINT, signal.SIGHUP)).until("acme/web")
    terminal.process.send_signal(signal.SIGINT)
    terminal.process.send_signal(signal.SIGHUP)
    terminal.send("still here").until("› still here").send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
@pytest.mark.parametrize("ignored", [(), ("SIGHUP",)], ids=["heard", "nohup"])
def test_closing_the_terminal_ends_it_quietly(
    demo: mogplex.DemoServer, tmp_path: Any, ignored: Sequence[str],
) -> None:
    numbers = [getattr(signal, name) for name in ignored]
    master, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {
        **os.environ, "TERM": "xterm-256color", "MOGPLEX_HOME": str(tmp_path)}
    with open(tmp_path / "stderr", "w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", COCKPIT, demo.url, demo.token, "nope"],
            stdin=child, stdout=child, stderr=stderr,
            env=environ, preexec_fn=functools.partial(adopt, numbers))
        os.close(child)
        shown = b""
        while b"TIMELINE" not in shown:
            shown += os.read(master, 65536)
        os.close(master)
        assert process.wait(60) == 129
        stderr.seek(0)
        assert stderr.read() == ""


def test_the_demo_s_browser_opens_the_demo_alone(demo: mogplex.DemoServer) -> None:
    """Also a page that is not there, as a browser would."""
    context = mogplex.Context(service(demo.url, demo.token), None, io.StringIO(), io.StringIO())
    context.in_demo = True
    before = demo.service.requests
    assert context.browse(demo.url) is True and demo.service.requests == before + 1
    assert context.browse("https://github.com/acme/web/pull/1") is False


@pytest.mark.posix
def test_suspended_the_shell_is_sane_and_fg_repaints(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    argv = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(argv, PS1="ready> ", MOGPLEX_REPO="acme/web") as terminal:
        terminal.until("ready>").send("stty -a | md5sum\r").until("  -\nready>")
        before = re.findall("[0-9a-f]{32}", terminal.text())
        command = f"{sys.executable} -c \"$COCKPIT\" {demo.url} {demo.token} ''"
        terminal.send("COCKPIT='" + COCKPIT.replace("\n", "\r") + "'\r").until("ready>")
        terminal.send(f"clear; {command}\r").until("acme/web ⎇ main").send("half a task")
        terminal.until("› half a task")
        terminal.send("\x1a").until("Stopped").until("ready>").send("stty -a | md5sum\r")
        terminal.until("  -\nready>")
        assert re.findall("[0-9a-f]{32}", terminal.text())[-1:] == before[-1:]
        assert terminal.on() <= {"2004"}
        terminal.send("fg\r").until("› half a task").send("\x03\x03").until("ready>")


@pytest.mark.posix
def test_in_the_background_it_waits_for_fg(demo: mogplex.DemoServer, tmp_path: Any) -> None:
    with Terminal(["bash", "--norc", "--noprofile", "-i"], PS1="ready> ", MOGPLEX_REPO="acme/web",
                  MOGPLEX_HOME=str(tmp_path)) as terminal:
        program = tmp_path / "cockpit.py"
        program.write_text(COCKPIT)
        terminal.until("ready>")
        terminal.send(f"set -b; clear; {sys.executable} {program} {demo.url} {demo.token} ''\r")
        terminal.until("acme/web ⎇ main").send("half a task").until("› half a task")

        def stops(keys: str) -> None:
            """Once more, as the shell says at once because of ``set -b``."""
            before = terminal.output.count(b"Stopped")
            terminal.send(keys).until(lambda: terminal.output.count(b"Stopped") > before)

        for keys in ("\x1a", "bg\r", "kill -CONT %1\r", "kill -CONT %1\r"):
            stops(keys)
        terminal.send("stty -a | grep -c -- -icanon\r").until("\n0\n")
        terminal.send("fg\r").until("› half a task").send("\x03\x03").until("ready>")
        assert "Traceback" not in terminal.text() and b"Traceback" not in terminal.output


@pytest.mark.posix
def test_ended_in_the_background_it_gives_the_terminal_back(
    demo: mogplex.DemoServer, tmp_path: Any,
) -> None:
    argv = ["bash", "--norc", "--noprofile", "-i"]
    program = tmp_path / "cockpit.py"
    program.write_text("import os\nprint('pid', os.getpid(), flush=True)\n" + COCKPIT)
    with Terminal(argv, PS1="ready> ", MOGPLEX_HOME=str(tmp_path)) as terminal:
        terminal.until("ready>")
        terminal.send(f"set -b; clear; {sys.executable} {program} {demo.url} {demo.token} 'x'\r")
        terminal.until("TIMELINE")
        pid = int(re.findall(rb"pid (\d+)", terminal.output)[-1])
        os.kill(pid, signal.SIGSTOP)
        terminal.until(lambda: b"Stopped" in terminal.output)
        terminal.send("kill -TERM %1\r").until(lambda: b"Exit 143" in terminal.output)


@pytest.mark.posix
def test_a_rail_that_comes_with_a_resize_can_be_reached(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit(width=59, height=20).until("next: acme/web")
    terminal.resize(120, 40)
    terminal.until("SANDBOXES").send("\x1b[Z").until("Enter logs")
    terminal.send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
def test_after_a_stop_that_nobody_announced_all_is_drawn_anew(
    cockpit: Callable[..., Terminal],
) -> None:
    terminal = cockpit().until("acme/web ⎇ main").send("\x14").until("Mouse off")
    terminal.process.send_signal(signal.SIGSTOP)
    os.waitpid(terminal.process.pid, os.WUNTRACED)
    taken = terminal.output.count(b"\x1b[?1049h")
    termios.tcsetattr(terminal.child, termios.TCSANOW, terminal.modes)  # as a shell does
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until(lambda: terminal.output.count(b"\x1b[?1049h") > taken)
    terminal.send("half a task").until("› half a task")
    assert "1000" not in terminal.on()
    terminal.send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
def test_without_colour_and_in_an_ascii_locale(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit(NO_COLOR="1", LC_ALL="C", attach="nope").until("mogplex |").until("TIMELINE")
    terminal.send("\x03\x03")
    terminal.ended(0)
    parameters = b";".join(re.findall(rb"\x1b\[([0-9;]*)m", terminal.output)).split(b";")
    assert set(parameters) <= {b"", b"0", b"1", b"2", b"7"}
    assert terminal.output.isascii()


@pytest.mark.posix
def test_a_shell_s_terminal_is_not_left_in_another_mode(cockpit: Callable[..., Terminal]) -> None:
    """Writing without waiting is this program's own business: others share what is open."""
    terminal = cockpit().until("acme/web ⎇ main")
    assert os.get_blocking(terminal.child)
    terminal.send("\x03\x03")
    terminal.ended(0)
    assert os.get_blocking(terminal.child)


@pytest.mark.posix
def test_a_paste_whose_end_is_lost_eats_neither_esc_nor_ctrl_c(
    cockpit: Callable[..., Terminal],
) -> None:
    terminal = cockpit().until("acme/web ⎇ main").send("\x1b[200~half a paste")

    def pressing(key: str, condition: Callable[[], bool]) -> bool:
        """Again and again: what comes in one read with the paste is a part of it."""
        time.sleep(0.1)
        terminal.send(key)
        return condition()

    terminal.until(lambda: pressing("\x1b", lambda: "› half a paste" in terminal.text()))
    terminal.send(" and more").until("› half a paste and more").send("\x1b[200~lost")
    terminal.until(lambda: pressing("\x1b[99;5u", lambda: terminal.process.poll() is not None))
    terminal.ended(0)


@pytest.mark.posix
def test_what_a_hostile_service_says_is_never_obeyed(cockpit: Callable[..., Terminal]) -> None:
    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        run = {**SHOWN, "runId": "x", "harness": "\x1b[5mx", "error": "\x9b31m"}
        records = [{"id": "r\x1b1", "full_name": "acme/\x1b[2Jweb"}]
        sandbox = {"id": "s", "status": "\x1b]0;x\x07", "working_branch": "\x1bc\x9b2J"}
        events = [{**HOSTILE_EVENT, "id": "1"}]
        return ok({"run": run, "events": events, "repos": records, "sandboxes": [sandbox]})
    with RawServer(reply) as server:
        terminal = cockpit(attach="x", url=server.url, width=120).until("first").until("日本語")
        terminal.until("acme/web")
        terminal.send("\t\r").until("EVENT").send("\x1b").until("TIMELINE").send("q")
        terminal.ended(0)
    ours = re.compile(
        rb"\x1b\[[0-9;]*[Hm]|\x1b\[[JK]|\x1b\[2J|\x1b[=>]|\x1b\(B|\x1b\[2[23];0;0t"
        rb"|\x1b\[\?(?:25|12|1|1049|1000|1006|2004|2026|9999)[hl]")
    assert b"\x1b" not in ours.sub(b"", terminal.output)
    assert not re.search("[\x80-\x9f]", terminal.output.decode())


@pytest.mark.posix
def test_a_request_that_hangs_delays_no_key(cockpit: Callable[..., Terminal]) -> None:
    with RawServer(lambda *_: time.sleep(60)) as server:
        terminal = cockpit(attach="x", url=server.url).until("waiting for the first event")
        terminal.send("hello").until("› hello")
        terminal.send("\x03\x03")
        assert "runs events x --follow" in terminal.ended(0)


@pytest.mark.posix
def test_a_token_is_pasted_on_the_first_screen(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    terminal = cockpit(SIGNED_OUT="1").until("Sign in to Mogplex")
    terminal.send(f"\x1b[200~{demo.token}\n\x1b[201~").until("•••••")
    terminal.send("\r").until("acme/web ⎇ main").until("Signed in.").send("/logout\r")
    terminal.until("Sign in to Mogplex")
    assert demo.token not in terminal.text()
    terminal.send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
def test_words_that_wait_are_no_token_and_outlive_the_sign_in(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    terminal = cockpit("fix", "it", SIGNED_OUT="1").until("Sign in to Mogplex").until(" ›\n")
    terminal.send(demo.token).until("••••").send("\r").until("acme/web ⎇ main").until("› fix it")
    terminal.send("\x03\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
def test_a_sign_in_says_when_the_environment_goes_before_it(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    terminal = cockpit(SIGNED_OUT="1", MOGPLEX_API_KEY=demo.token).until("acme/web ⎇ main")
    terminal.send("/login\r")
    terminal.until("Sign in to Mogplex").send(f"{demo.token}\r")
    terminal.until("MOGPLEX_API_KEY is set and takes precedence")
    terminal.until("acme/web ⎇ main").send("\x03\x03")
    terminal.ended(0)


def test_without_a_terminal_it_does_not_start() -> None:
    kinds: Sequence[Dict[str, str]] = ({"TERM": "xterm"}, {"TERM": "dumb"}, {})
    for environ in kinds:
        with pytest.raises(mogplex.UsageError):
            mogplex.run_cockpit(
                lambda: mogplex.Client(TOKEN), base_url="", home=mogplex.home_from({}),
                environ=environ, run_browser=bool)


# -- The cockpit on a pseudo-terminal


def slow_start(answer_it: threading.Event) -> Callable[[int, str, socket.socket], Optional[bytes]]:
    """A service whose answer to a start comes when the event is set."""
    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        if request.startswith("POST"):
            answer_it.wait(60)
            return answer(202, {"ok": True, "data": {**SHOWN, "runId": "late-run"}})
        return ok({"run": SHOWN, "events": [], "repos": [WEB_REPO], "sandboxes": []})
    return reply


@pytest.mark.posix
def test_leaving_in_the_middle_of_a_start_waits_for_its_id(
    cockpit: Callable[..., Terminal], tmp_path: Any,
) -> None:
    answer_it = threading.Event()
    with RawServer(slow_start(answer_it)) as server:
        terminal = cockpit(url=server.url).until("next: acme/web").send("fix it\r")
        terminal.until("Starting a run…").until(lambda: "POST" in "".join(server.requests))
        terminal.send("\x03").until("again within").send("\x03")
        terminal.until(lambda: "1049" not in terminal.on())
        assert terminal.process.poll() is None
        answer_it.set()
        assert "mogplex runs events late-run --follow" in terminal.ended(0)
    with open(tmp_path / "home" / "runs.jsonl") as file:
        assert "late-run" in file.read()


@pytest.mark.posix
@pytest.mark.slow
def test_leaving_in_the_middle_of_a_start_tells_its_key(cockpit: Callable[..., Terminal]) -> None:
    never = threading.Event()
    with RawServer(slow_start(never)) as server:
        terminal = cockpit(url=server.url, width=150, START_WAIT_S="0.5").until("next: acme/web")
        terminal.send("fix it\r")
        terminal.until("Starting a run…").until(lambda: "POST" in "".join(server.requests))
        terminal.process.send_signal(signal.SIGTERM)
        screen = terminal.ended(143)
        post = next(request for request in server.requests if request.startswith("POST"))
        key = re.findall(r"(?i)idempotency-key: (\S+)", post)[0]
        assert f"--idempotency-key {key}" in screen and "'fix it'" in screen
        never.set()


@pytest.mark.posix
def test_a_start_that_hangs_holds_no_other(cockpit: Callable[..., Terminal]) -> None:
    never = threading.Event()
    late = slow_start(never)

    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        if "another task" in request:
            return answer(202, {"ok": True, "data": {**SHOWN, "runId": "late-run"}})
        return late(number, request, connection)
    with RawServer(reply) as server:
        terminal = cockpit(url=server.url).until("next: acme/web").send("fix it\r")
        terminal.until("Starting a run…").until(lambda: "POST" in "".join(server.requests))
        terminal.send("another task\r").until("Run started.")
        never.set()
        terminal.send("\x03\x03")
        terminal.ended(0)


@pytest.mark.posix
def test_a_history_that_is_locked_delays_no_kill(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer, tmp_path: Any,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with open(home / "runs.jsonl.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        terminal = cockpit(attach=seeded(demo, "streaming"), LOCK_WAIT_S="600").until("STREAMING")
        terminal.send("/kill\r").until("y yes").send("y").until("requested")
        terminal.send("\x03\x03")
        terminal.ended(0)


@pytest.mark.posix
def test_a_wrong_token_is_not_stored_and_the_next_one_is_hidden_too(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer, tmp_path: Any,
) -> None:
    terminal = cockpit(SIGNED_OUT="1").until("Sign in to Mogplex").send("mog_wrong\r")
    terminal.until("Not signed in: ")
    assert not (tmp_path / "home" / "auth.json").exists() and "mog_wrong" not in terminal.text()
    terminal.send(demo.token).until("••••••")
    assert demo.token[:8] not in terminal.text()
    terminal.send("\r").until("Signed in.").until("next: acme/web")
    assert demo.token in (tmp_path / "home" / "auth.json").read_text()
    terminal.send("\x03\x03")
    terminal.ended(0)


@pytest.mark.posix
def test_a_browser_that_is_missing_ends_nothing(cockpit: Callable[..., Terminal]) -> None:
    terminal = cockpit(CRASH="missing").until("next: acme/web").send("\t").until("j k move")
    terminal.send("o")
    terminal.until("Open this in a browser: http://127.0.0.1").send("q")
    terminal.ended(0)


@pytest.mark.posix
def test_esc_and_a_command_in_one_read_start_nothing(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer,
) -> None:
    terminal = cockpit().until("next: acme/web")
    runs = len(demo.service.runs)
    terminal.send("\x1b/kill\r").until("No run is shown")
    terminal.send("\t").until("j k move").send("/log").until("/ log").send("\x1b")
    terminal.until("Enter send").send("\x03\x03")
    terminal.ended(0)
    assert len(demo.service.runs) == runs


@pytest.mark.posix
def test_an_export_goes_to_the_home_directory(
    cockpit: Callable[..., Terminal], demo: mogplex.DemoServer, tmp_path: Any,
) -> None:
    terminal = cockpit(attach=seeded(demo, "success"), HOME=str(tmp_path)).until("SUCCESS")
    terminal.until("finished").send("/export json ~/run.json\r").until("Exported to ")
    assert json.loads((tmp_path / "run.json").read_text())["run"]["status"] == "success"
    terminal.send("\x03\x03")
    terminal.ended(0)


# ---------------------------------------------------------------- 8. Demo

FINISHED, LONG, CANCELLED, FAILED, UNCHANGED, RUNNING = (seed["id"] for seed in mogplex.DEMO_RUNS)
NOWHERE = "00000000-0000-4000-8000-000000000000"
DEMO_CALLBACK = "http://127.0.0.1:24816/auth/callback"
WEB = {"repoId": mogplex.DEMO_WEB, "prompt": "x"}


class Still:
    """A demo server whose clock only moves when told, and a plain HTTP client of it."""

    def __init__(self, **options: Any) -> None:
        self.now = 1_795_000_000.25
        self.server = mogplex.DemoServer(clock=lambda: self.now, **options)
        self.connection = http.client.HTTPConnection(self.server.url[7:], timeout=60)

    def __enter__(self) -> Still:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.server.__exit__()

    def ask(
        self, method: str, path: str, body: Any = None, token: str = mogplex.DEMO_TOKEN,
        **headers: str,
    ) -> Tuple[int, Any, http.client.HTTPMessage]:
        """(status, JSON or text, headers) of a path of the API, or of any path after ``..``."""
        if path.startswith(".."):
            path = path[2:]
        else:
            path = mogplex.API_PATH + path
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent.setdefault("Authorization", f"Bearer {token}")
        if body is not None and not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        self.connection.request(method, path, body, sent)
        response = self.connection.getresponse()
        text = response.read().decode()
        if response.headers["Content-Type"] == "application/json":
            return response.status, json.loads(text), response.headers
        return response.status, text, response.headers

    def data(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The ``data`` of a success."""
        status, answered, _ = self.ask(method, path, body, **headers)
        assert status in (200, 202) and answered["ok"] is True, answered
        return answered["data"]

    def run(self, run_id: str) -> Any:
        """A run as it is now."""
        return self.data("GET", f"/runs/{run_id}")["run"]

    def start(self, prompt: str = "Do it", **fields: Any) -> str:
        """The id of a new run."""
        body = {"repoId": mogplex.DEMO_WEB, "prompt": prompt, **fields}
        key = f"key {self.server.service.requests}"
        return str(self.data("POST", "/runs", body, Idempotency_Key=key)["runId"])

    def watch(self, run_id: str) -> Tuple[str, List[Tuple[str, str]]]:
        """Status of a run, and (type, message) of its events."""
        data = self.data("GET", f"/runs/{run_id}/events")
        events = [(event["type"], event["message"]) for event in data["events"]]
        return data["run"]["status"], events

    def form(self, **fields: str) -> Tuple[int, Any]:
        """A POST to the token endpoint."""
        fields.setdefault("client_id", "mogplex-cli")
        form = urllib.parse.urlencode(fields)
        return self.ask("POST", "../api/auth/mcp/token", form, token="")[:2]


@pytest.fixture
def still() -> Iterator[Still]:
    with Still() as served:
        yield served


@pytest.mark.parametrize("method, path, headers, status, code", [
    ("GET", "/repos", {"Authorization": f"bearer {mogplex.DEMO_TOKEN}"}, 307, ""),
    ("GET", "/repos", {"Authorization": f"Bearer  {mogplex.DEMO_TOKEN}"}, 307, ""),
    ("POST", "/runs", {"Authorization": "Bearer"}, 307, ""),
    ("GET", "/repos", {"Authorization": "Bearer mog_unknown"}, 401, "UNAUTHORIZED"),
    ("GET", f"/runs/{NOWHERE}", {"Authorization": "Bearer mog_unknown"}, 401, "UNAUTHORIZED"),
    ("GET", "/nothing", {"Authorization": "Bearer mog_unknown"}, 404, ""),
    ("GET", "/runs", {}, 405, ""),
    ("DELETE", f"/runs/{NOWHERE}", {}, 405, ""),
    ("GET", f"/repos/{mogplex.DEMO_WEB}", {}, 404, ""),
    ("PUT", "/automations/1", {}, 404, ""),
    ("GET", f"/sandboxes/{NOWHERE}", {}, 404, ""),
    ("POST", f"/sandboxes/{NOWHERE}/stop", {}, 404, ""),
    ("GET", "/runs/nope", {}, 500, "INTERNAL_ERROR"),
    ("POST", "/runs/nope/cancel", {}, 500, "INTERNAL_ERROR"),
    ("GET", "/runs/a%2Fb/events", {}, 500, "INTERNAL_ERROR"),
    ("GET", "/sandboxes?repo_id=nope", {}, 500, "INTERNAL_ERROR"),
    ("GET", "/sandboxes/sbx_w3bR7nq0/logs", {}, 500, "INTERNAL_ERROR"),
    ("GET", f"/runs/{NOWHERE}", {}, 404, "NOT_FOUND"),
    ("GET", f"/sandboxes/{NOWHERE}/logs", {}, 404, "NOT_FOUND"),
    ("POST", f"/runs/{NOWHERE}/cancel", {}, 404, "NOT_FOUND"),
])
def test_demo_refuses(
    still: Still, method: str, path: str, headers: Dict[str, str], status: int, code: str,
) -> None:
    got, body, answered = still.ask(method, path, **headers)
    assert got == status
    if code:
        assert body["error"]["code"] == code
    elif status == 404:
        assert body.startswith("<!DOCTYPE html>")
    else:
        assert body == ""
    if status == 307:
        there = urllib.parse.quote(mogplex.API_PATH + path, safe="")
        assert answered["Location"] == "/login?next=" + there


@pytest.mark.parametrize("method, path, scope", [
    ("GET", "/repos", ""),
    ("GET", "/sandboxes", ""),
    ("GET", f"/runs/{RUNNING}", ""),
    ("GET", f"/runs/{RUNNING}/events", ""),
    ("GET", "/sandboxes/" + mogplex.DEMO_SANDBOXES[0]["id"] + "/logs", "read"),
    ("GET", "/agents", "read"),
    ("GET", "/models", "read"),
    ("GET", "/mcp/servers", "read"),
    ("POST", "/sandboxes", "write"),
    ("POST", "/runs", "write"),
    ("POST", f"/runs/{RUNNING}/cancel", "write"),
])
def test_demo_asks_for_a_scope_only_where_the_service_does(
    still: Still, method: str, path: str, scope: str,
) -> None:
    for held in "read", "write":
        still.server.service.sign_in.tokens["mog_one_scope"] = held
        status, body, _ = still.ask(method, path, {}, token="mog_one_scope")
        if scope in ("", held):
            assert status != 403
        else:
            assert (status, body["error"]) == (403, {
                "code": "FORBIDDEN",
                "message": f"Missing required scope: {scope}. "
                           f"Issue a new token with the '{scope}' scope at /settings/api-keys.",
            })


def test_the_demo_s_read_token_cannot_start(still: Still) -> None:
    read = still.server.read_token
    assert still.ask("GET", "/mcp/servers", token=read)[0] == 200
    assert still.ask("POST", "/runs", WEB, token=read)[0] == 403


@pytest.mark.parametrize("key, body, status, message", [
    ("", WEB, 400, "Idempotency-Key is required"),
    ("  ", WEB, 400, "Idempotency-Key is required"),
    ("k" * 201, WEB, 400, "Idempotency-Key exceeds maximum length of 200 characters"),
    ("k", {"prompt": "x"}, 400, "repoId is required"),
    ("k", dict(WEB, prompt=" "), 400, "Prompt is required"),
    ("k", dict(WEB, prompt="\U0001f600" * 50_001), 400, "Prompt is too long"),
    ("k", dict(WEB, harness="vim"), 400, "Invalid harness"),
    ("k", dict(WEB, baseBranch="a b"), 400, "Invalid base branch"),
    ("k", dict(WEB, workingBranch="a;b"), 400, "Invalid working branch"),
    ("k", dict(WEB, rootDirectory="../x"), 400, "Invalid root directory"),
    ("k", dict(WEB, workingBranch="main", createBranch=True), 400,
     "Working branch must differ from base branch when createBranch is true"),
    ("k", dict(WEB, repoId=NOWHERE), 503, "External Mogplex run rate limit unavailable"),
    ("k", dict(WEB, repoId="nope"), 503, "External Mogplex run rate limit unavailable"),
    ("k", "{", 400, "repoId is required"),
    ("k", "[]", 400, "repoId is required"),
])
def test_demo_checks_what_a_run_is_started_with(
    still: Still, key: str, body: Any, status: int, message: str,
) -> None:
    got, answered, headers = still.ask("POST", "/runs", body, Idempotency_Key=key)
    assert (got, answered["error"]["message"]) == (status, message)
    assert headers["Retry-After"] == ("60" if status == 503 else None)
    assert len(still.server.service.runs) == len(still.server.seeded_runs)


def test_demo_makes_a_branch_where_none_is_named(still: Still) -> None:
    run_id = still.start(createBranch=True)
    made = f"mogplex/external/{run_id[:8]}"
    assert still.run(run_id)["branch"] == {"base": "main", "working": made, "createBranch": True}
    still.now += 2
    assert ("log", f"Synchronized {made}") in still.watch(run_id)[1]


@pytest.mark.parametrize("fields, root", [
    ({}, "website"), ({"rootDirectory": None}, None), ({"rootDirectory": "/srv/app"}, "/srv/app")])
def test_demo_tells_the_root_directory_left_out_from_null(
    still: Still, fields: Dict[str, Any], root: Optional[str],
) -> None:
    run_id = still.start(repoId=mogplex.DEMO_DOCS, **fields)
    assert still.run(run_id)["rootDirectory"] == root


@pytest.mark.parametrize("query, names", [
    ("q=ACME/web", ["acme/web", "acme/web-legacy"]),
    ("q=e_d", ["acme/docs"]),
    ("q=e_x", []),
    ("q=a%25legacy", ["acme/web-legacy"]),
    ("q=.", []),
    (f"id={mogplex.DEMO_API}", ["acme/api"]),
    (f"id={mogplex.DEMO_API.upper()}&q=web", ["acme/api"]),
    (f"id={NOWHERE}", []),
    ("id=nope", []),
    ("limit=1", ["acme/api"]),
    ("limit=-5", ["acme/api"]),
    ("limit=many", ["acme/api", "acme/docs", "acme/web", "acme/web-legacy"]),
])
def test_demo_lists_repos(still: Still, query: str, names: List[str]) -> None:
    repos = still.data("GET", "/repos?" + query)["repos"]
    assert [repo["full_name"] for repo in repos] == names


def fields_of(record: Dict[str, Any], *optional: str) -> Dict[str, Any]:
    """The names of a record's fields and their types; None for those that can be null."""
    return {name: None if name in optional else type(value) for name, value in record.items()}


def test_demo_s_records_have_the_service_s_fields_and_types(still: Still) -> None:
    for repo in still.data("GET", "/repos")["repos"]:
        nullable = ("installation_id", "default_branch", "root_directory")
        assert fields_of(repo, *nullable) == {
            "id": str, "full_name": str, "installation_id": None, "default_branch": None,
            "root_directory": None}
        assert isinstance(repo["installation_id"], (int, type(None)))
    for sandbox in still.data("GET", "/sandboxes")["sandboxes"]:
        nullable = ("sandbox_id", "root_directory", "preview_url", "error")
        assert fields_of(sandbox, *nullable) == {
            "id": str, "sandbox_id": None, "repo_id": str, "status": str, "base_branch": str,
            "working_branch": str, "root_directory": None, "preview_url": None, "created_at": str,
            "last_active_at": str, "error": None}
    for run_id in still.start(), RUNNING, FAILED:
        nullable = ("sandboxRecordId", "sandboxId", "rootDirectory", "error")
        assert fields_of(still.run(run_id), *nullable) == {
            "runId": str, "aiCallId": str, "sandboxRecordId": None, "sandboxId": None,
            "repoId": str, "harness": str, "status": str, "branch": dict, "rootDirectory": None,
            "eventsUrl": str, "cancelUrl": str, "createdAt": str, "updatedAt": str, "error": None,
            "runtime": dict}
    for agent in still.data("GET", "/agents")["agents"]:
        assert fields_of(agent, "slug") == {
            "id": str, "name": str, "slug": None, "model": str, "description": str,
            "category": str, "preset": bool}
        assert agent["id"].startswith("preset:") == (agent["slug"] is None)
    for model in still.data("GET", "/models")["models"]:
        assert fields_of(model) == {
            "id": str, "provider": str, "name": str, "contextLength": int, "capabilities": list,
            "pricing": dict}
        assert 0 < model["pricing"]["input"] < model["pricing"]["output"] < 0.001  # USD a token
    for server in still.data("GET", "/mcp/servers")["servers"]:
        assert fields_of(server) == {"name": str, "enabled": bool, "config": dict}
        assert mogplex.DEMO_SECRET in json.dumps(server["config"])


def test_demo_spells_times_in_both_ways(still: Still) -> None:
    run_id = still.start()
    data = still.data("GET", f"/runs/{run_id}/events")
    assert data["run"]["createdAt"] == "2026-11-18T11:06:40.25+00:00"
    assert data["events"][0]["createdAt"] == "2026-11-18T11:06:40.250Z"
    still.now += 0.75
    assert still.run(still.start())["createdAt"] == "2026-11-18T11:06:41+00:00"
    still.now += 0.123457
    assert still.run(still.start())["createdAt"] == "2026-11-18T11:06:41.123457+00:00"


def test_demo_sandboxes(still: Still) -> None:
    listed = still.data("GET", "/sandboxes")["sandboxes"]
    times = [mogplex.parse_time(one["last_active_at"]) for one in listed]
    assert None not in times and times == sorted(times, reverse=True)  # type: ignore[type-var]
    assert {"running", "paused", "error", "stopped"} <= {one["status"] for one in listed}
    for one in listed:
        assert bool(one["preview_url"]) == (one["status"] == "running")
        assert bool(one["error"]) == (one["status"] == "error")


def test_demo_starts_a_sandbox_for_a_run(still: Still) -> None:
    run_id = still.start()
    query = f"repo_id={mogplex.DEMO_WEB}&status=running&limit=1"
    (sandbox,) = still.data("GET", "/sandboxes?" + query)["sandboxes"]
    assert sandbox["base_branch"] == "main" and sandbox["sandbox_id"] == f"sbx_{sandbox['id'][:8]}"
    still.now += 3
    assert still.run(run_id)["sandboxRecordId"] == sandbox["id"]
    logs = still.data("GET", f"/sandboxes/{sandbox['id']}/logs")
    assert {"id", "install_log", "dev_log"} <= set(logs["sandbox"])
    assert logs["lifecycle_events"][0]["event_type"] == "sandbox_created"


def test_demo_creates_a_sandbox(still: Still) -> None:
    body = {"repoId": mogplex.DEMO_API, "workingBranch": "feat/x"}
    made = still.data("POST", "/sandboxes", body)["sandbox"]
    assert (made["repo_id"], made["working_branch"]) == (mogplex.DEMO_API, "feat/x")
    assert made in still.data("GET", f"/sandboxes?repo_id={mogplex.DEMO_API}")["sandboxes"]
    assert still.ask("POST", "/sandboxes", {"repoId": NOWHERE})[0] == 404


def test_a_pending_run_of_the_demo_has_no_sandbox_yet(still: Still) -> None:
    run_id = still.start()
    pending = still.run(run_id)
    assert (pending["status"], pending["sandboxRecordId"], pending["sandboxId"]) == (
        "pending", None, None)
    assert pending["runtime"]["provider"] == "trigger"
    still.now += 3
    streaming = still.run(run_id)
    assert streaming["status"] == "streaming" and streaming["sandboxId"].startswith("sbx_")
    assert streaming["runtime"]["provider"] == "vercel"


def test_demo_plays_a_run_that_delivers(still: Still) -> None:
    run_id = still.start()
    assert still.watch(run_id) == ("pending", [("started", "External Mogplex run accepted")])
    still.now += 3
    assert still.watch(run_id)[0] == "streaming"
    still.now += 6.2  # the event comes before the status
    status, events = still.watch(run_id)
    assert (status, events[-1]) == ("streaming", ("finished", "Harness run finished"))
    still.now += 0.6
    data = still.data("GET", f"/runs/{run_id}/events")
    assert data["run"] == still.run(run_id) and data["run"]["status"] == "success"
    assert data["run"]["branch"] == {"base": "main", "working": "main", "createBranch": False}
    payloads = {event["payload"].get("stage"): event["payload"] for event in data["events"]}
    delivery = payloads["git_delivery"]
    branch = f"mogplex/agent-{run_id[:8]}"
    assert payloads["git_sync"]["working_branch"] == delivery["working_branch"] == branch
    assert delivery["pull_request_url"].startswith("https://github.com/acme/web/pull/")
    assert [event["type"] for event in data["events"]] == [
        "started", "started", "log", "status_changed", "log", "log", "tool_started",
        "tool_finished", "log", "finished"]


def test_demo_has_no_other_types_of_events_than_the_service(still: Still) -> None:
    for word in ("Do it", "fail", "crash"):
        still.start(word)
    still.data("POST", f"/runs/{still.start()}/cancel")
    still.now += 60
    admitted = set((
        "started status_changed tool_started tool_finished cancel_requested cancelled finished "
        "failed log").split())
    types = {kind for run_id in still.server.service.runs for kind, _ in still.watch(run_id)[1]}
    assert types == admitted


@pytest.mark.parametrize("harness, loads", [("codex", False), ("claude-code", True)])
def test_demo_loads_mcp_servers_for_claude_code_alone(
    still: Still, harness: str, loads: bool,
) -> None:
    run_id = still.start(harness=harness)
    still.now += 5
    events = still.data("GET", f"/runs/{run_id}/events")["events"]
    found = [event for event in events if event["payload"].get("stage") == "mcp_config"]
    if not loads:
        assert found == []
        return
    (event,) = found
    assert event["message"] == "Loaded 2 MCP server(s) for Claude Code"
    assert event["payload"] == {
        "stage": "mcp_config", "outcome": "ok", "server_count": 2,
        "server_names": ["github", "sentry"]}


def test_a_failed_harness_of_the_demo_says_so_once_and_before_the_status(still: Still) -> None:
    run_id = still.start("Please FAIL now")
    still.now += 7.6
    status, events = still.watch(run_id)
    assert (status, events[-1]) == ("streaming", ("failed", "Harness run failed"))
    still.now += 60
    data = still.data("GET", f"/runs/{run_id}/events")
    assert (data["run"]["status"], data["run"]["error"]) == ("failed", "Agent run exited with code 1.")
    assert data["events"][-1]["payload"] == {"exit_code": 1, "failure_code": "command_failed"}
    assert [event["type"] for event in data["events"]].count("failed") == 1
    assert data["run"]["error"] not in json.dumps(data["events"])
    assert still.watch(still.start("Repair the failing test"))[0] == "pending"


def test_a_failed_launch_of_the_demo_says_why_after_the_status(still: Still) -> None:
    run_id = still.start("Crash, please")
    still.now += 1.6
    status, events = still.watch(run_id)
    assert (status, events[-1]) == ("failed", ("failed", "Harness execution failed"))
    still.now += 1
    data = still.data("GET", f"/runs/{run_id}/events")
    last = data["events"][-1]
    assert last["message"] == "External Mogplex run failed"
    assert last["payload"]["error"] == data["run"]["error"] == mogplex.DEMO_LAUNCH_ERROR
    assert data["run"]["sandboxId"] is None


def test_a_start_that_the_demo_s_queue_refuses_is_replayed_as_failed(still: Still) -> None:
    body = dict(WEB, prompt="refuse this")
    status, answered, _ = still.ask("POST", "/runs", body, Idempotency_Key="k")
    assert (status, answered["error"]["code"]) == (500, "INTERNAL_ERROR")
    run = still.data("POST", "/runs", body, Idempotency_Key="k")
    assert (run["replayed"], run["status"], run["error"]) == (
        True, "failed", mogplex.DEMO_QUEUE_ERROR)


def test_demo_cancels(still: Still) -> None:
    run_id = still.start()
    still.now += 4
    assert still.run(run_id)["status"] == "streaming"
    answered = still.data("POST", f"/runs/{run_id}/cancel")
    assert (answered["status"], answered["alreadyTerminal"]) == ("cancelled", False)
    assert answered["run"] == still.run(run_id)
    assert still.watch(run_id)[1][-1] == ("cancel_requested", "Cancellation requested")
    still.now += 60  # the late event is there, and nothing of what the agent would have done
    status, events = still.watch(run_id)
    assert status == "cancelled"
    assert [kind for kind, _ in events][-3:] == ["log", "cancel_requested", "cancelled"]


@pytest.mark.parametrize("run_id, status", [(CANCELLED, "cancelled"), (FAILED, "failed")])
def test_demo_cancels_no_run_that_has_ended(still: Still, run_id: str, status: str) -> None:
    before = still.watch(run_id)
    answered = still.data("POST", f"/runs/{run_id}/cancel")
    assert (answered["status"], answered["alreadyTerminal"]) == (status, True)
    assert still.watch(run_id) == before


def test_demo_replays_a_start(still: Still) -> None:
    body = dict(WEB, workingBranch="feat/x", createBranch=True)
    first = still.data("POST", "/runs", body, Idempotency_Key=" one ")
    assert first["replayed"] is False
    assert first["branch"] == {"base": "main", "working": "feat/x", "createBranch": True}
    still.now += 30
    again = still.data("POST", "/runs", body, Idempotency_Key="one")
    assert (again["runId"], again["replayed"]) == (first["runId"], True)
    assert again["status"] == "success"  # the present one
    status, other, _ = still.ask("POST", "/runs", dict(body, prompt="y"), Idempotency_Key="one")
    assert (status, other["error"]["code"]) == (409, "IDEMPOTENCY_CONFLICT")


def test_demo_lists_the_first_events_only(still: Still) -> None:
    path = f"/runs/{LONG}/events"
    everything = still.data("GET", path + "?limit=1000")["events"]
    assert len(everything) == 200
    assert everything[0]["message"] == "External Mogplex run accepted"
    for query, count in (("", 100), ("?limit=0", 1), ("?limit=7&offset=3&after=x", 7)):
        assert still.data("GET", path + query)["events"] == everything[:count]
    still.now += 1e6  # the run has ended, though no finished event is listed
    data = still.data("GET", path + "?limit=200")
    assert data["events"] == everything and data["run"]["status"] == "success"
    times = [mogplex.parse_time(event["createdAt"]) or 0.0 for event in everything]
    assert times == sorted(times) and times[0] > 0


def test_demo_finds_an_id_in_capitals(still: Still) -> None:
    assert still.run(RUNNING.upper())["runId"] == RUNNING
    run_id = still.start(repoId=mogplex.DEMO_DOCS.upper())
    assert still.run(run_id)["repoId"] == mogplex.DEMO_DOCS


def test_demo_seeds(still: Still) -> None:
    seeds = still.server.seeded_runs
    runs = [still.run(seed["id"]) for seed in seeds]
    assert [run["status"] for run in runs] == [
        "success", "success", "cancelled", "failed", "success", "streaming"]
    assert [seed["time"] for seed in seeds] == sorted(run["createdAt"] for run in runs)
    assert set(seeds[0]) == {"id", "service", "repo", "branch", "time", "task"}
    boxes = {box["id"]: box["status"] for box in still.data("GET", "/sandboxes")["sandboxes"]}
    assert [boxes[run["sandboxRecordId"]] for run in runs] == ["stopped"] * 5 + ["running"]
    before = still.watch(RUNNING)[1]
    still.now += 3600
    status, after = still.watch(RUNNING)
    assert status == "streaming" and len(after) > len(before)


def metered(server: Any) -> mogplex.DemoServer:
    """The server, with the service's limit: 60 requests of a token in any 60 s.

    What is refused does not count; ``service.refusals`` does.
    """
    service = server.service
    admit = service.sign_in.admit
    recent: Dict[str, List[float]] = {}
    service.refusals = 0

    def admit_within(token: str, scope: str) -> None:
        now = service.clock()
        times = recent[token] = [at for at in recent.get(token, []) if at > now - 60]
        if len(times) >= 60:
            service.refusals += 1
            raise mogplex.DemoRefusal(429, "RATE_LIMITED", "Rate limit exceeded", "60")
        times.append(now)
        admit(token, scope)
    service.sign_in.admit = admit_within
    return server  # type: ignore[no-any-return]


def authorize(still: Still, **changes: str) -> Dict[str, str]:
    """What the callback is given for a well-formed authorize request, changed a little."""
    digest = hashlib.sha256(b"verifier").digest()
    fields = {
        "response_type": "code",
        "client_id": "mogplex-cli",
        "redirect_uri": DEMO_CALLBACK,
        "state": "a b&c",
        "scope": "read write offline_access",
        "code_challenge": base64.urlsafe_b64encode(digest).decode().rstrip("="),
        "code_challenge_method": "S256",
        **changes,
    }
    path = "../api/auth/mcp/authorize?" + urllib.parse.urlencode(fields)
    status, _, headers = still.ask("GET", path, token="")
    target, _, query = (headers["Location"] or "?").partition("?")
    assert (status, target) in ((302, DEMO_CALLBACK), (401, ""))
    return dict(urllib.parse.parse_qsl(query))


def redeem(still: Still, code: str, **changes: str) -> Tuple[int, Any]:
    """What the token endpoint answers to a code, with a well-formed form changed a little."""
    fields = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": DEMO_CALLBACK,
        "code_verifier": "verifier",
        **changes,
    }
    return still.form(**fields)


def test_demo_signs_in(still: Still) -> None:
    answered = authorize(still)
    assert answered["state"] == "a b&c"
    status, pair = redeem(still, answered["code"])
    assert (status, pair["token_type"], pair["expires_in"]) == (200, "Bearer", 3600)
    assert not pair["access_token"].startswith("mog_")
    assert still.ask("GET", "/repos", token=pair["access_token"])[0] == 200
    assert redeem(still, answered["code"])[1]["error"] == "invalid_grant"  # a code works once


def test_demo_renews_a_sign_in_once_for_each_refresh_token(still: Still) -> None:
    pair = redeem(still, authorize(still)["code"])[1]
    renew = {"grant_type": "refresh_token", "refresh_token": pair["refresh_token"]}
    status, newer = still.form(**renew)
    assert status == 200 and newer["refresh_token"] != pair["refresh_token"]
    assert still.form(**renew)[1]["error"] == "invalid_grant"
    assert still.ask("POST", f"/runs/{RUNNING}/cancel", token=newer["access_token"])[0] == 200


def test_a_sign_in_of_the_demo_has_the_scopes_that_were_asked_for(still: Still) -> None:
    read = redeem(still, authorize(still, scope="read")["code"])[1]["access_token"]
    assert still.ask("POST", "/runs", {}, token=read)[0] == 403


@pytest.mark.parametrize("changes, error", [
    ({"code_verifier": "other"}, "invalid_request"),
    ({"code": "other"}, "invalid_grant"),
    ({"code": "", "grant_type": "refresh_token"}, "invalid_grant"),
])
def test_demo_refuses_an_exchange(still: Still, changes: Dict[str, str], error: str) -> None:
    code = authorize(still)["code"]
    status, body = redeem(still, **{"code": code, **changes})
    assert (status, body["error"]) == (401, error) and body["error_description"]
    if error == "invalid_request":
        assert redeem(still, code)[1]["error"] == "invalid_grant"  # the code is burnt


def test_demo_sends_nobody_elsewhere(still: Still) -> None:
    assert authorize(still, redirect_uri="http://127.0.0.1:1/auth/callback") == {}


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("LocalHost:{port}", 200),
    ("127.0.0.1", 421), ("127.0.0.1:1", 421), ("evil.example:{port}", 421), ("evil.example", 421),
    ("", 421),
])
def test_demo_answers_to_its_own_name_alone(still: Still, host: str, status: int) -> None:
    """A page whose name is bound to this machine (DNS rebinding) has a Host of its own."""
    before = still.server.service.requests
    port = still.server.url.rpartition(":")[2]
    for path in "/repos", "../api/auth/mcp/authorize":
        got, body, _ = still.ask("GET", path, Host=host.format(port=port))
        if status == 421:
            assert got == 421 and mogplex.DEMO_TOKEN not in str(body)
        else:
            assert got != 421
    assert (still.server.service.requests == before) == (status == 421)


def test_demo_keeps_connections_and_sends_chunks(still: Still) -> None:
    headers = still.ask("GET", f"/runs/{LONG}/events?limit=200")[2]
    assert headers["Transfer-Encoding"] == "chunked" and headers["Content-Length"] is None
    kept = still.connection.sock
    for path, status in (("/repos", 200), ("/nothing", 404), ("/runs", 405), ("/repos", 200)):
        assert still.ask("GET", path)[0] == status
    assert kept is not None and still.connection.sock is kept


def test_demo_speed_divides_every_duration() -> None:
    with Still(speed=20.0) as still:
        run_id = still.start()
        still.now += 0.5
        assert still.watch(run_id)[0] == "success"
        events = still.data("GET", f"/runs/{run_id}/events")["events"]
        assert max(mogplex.parse_time(event["createdAt"]) or 0.0 for event in events) <= still.now


def test_demo_starts_one_run_for_twenty_threads_with_one_key(still: Still) -> None:
    headers = {"authorization": f"Bearer {mogplex.DEMO_TOKEN}", "idempotency-key": "k"}

    def start(_: int) -> str:
        _, answered, _ = still.server.service.answer(
            "POST", mogplex.API_PATH + "/runs", headers, json.dumps(WEB).encode())
        assert isinstance(answered, dict)
        return str(answered["data"]["runId"])
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(start, range(20)))) == 1


def test_a_demo_says_which_port_it_cannot_have() -> None:
    with mogplex.DemoServer() as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(mogplex.UsageError, match=f"127.0.0.1:{port}"):
            mogplex.DemoServer(port)
    with pytest.raises(mogplex.UsageError, match="70000"):
        mogplex.DemoServer(70000)


def test_demo_ends_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    still = Still()
    still.ask("GET", "/repos")
    port = int(still.server.url.rpartition(":")[2])
    for nonsense in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /x HTTP/1.1\r\nContent-Length: no\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    still.__exit__()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=60)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- 9. Commands and main


@pytest.fixture
def run_demo(cli: Callable[..., Result], demo: mogplex.DemoServer) -> Callable[..., Result]:
    """``cli`` with the demo service in the environment."""
    def run(*argv: str, stdin: str = "", **env: str) -> Result:
        return cli(*argv, env={**service(demo.url, demo.token), **env}, stdin=stdin)
    return run


def posted(server: RawServer) -> List[Dict[str, Any]]:
    """The JSON bodies that a server was sent."""
    posts = [request for request in server.requests if request.startswith("POST")]
    return [json.loads(request.split("\r\n\r\n", 1)[1]) for request in posts]


@contextlib.contextmanager
def one_answer(data: bytes) -> Iterator[RawServer]:
    """A service that answers everything alike."""
    with RawServer(lambda *_: data) as server:
        yield server


RUN_IT = ["run", "--repo", "r"]
ONE_TASK = "run: give the task once: as arguments, as - for stdin, or with --prompt-file"
ONE_PORT = "--demo-server takes one port, 1 to 65535, or none for a free one"
TOO_LONG = "run: the task is longer than 100,000 UTF-16 units"
BAD_KEY = "an idempotency key has 1 to 200 printable ASCII characters"
NO_RUN = "no run is remembered for this service; give a run ID"


@pytest.mark.parametrize("argv, message", [
    (["rusn"], "unknown subcommand 'rusn', did you mean 'runs'?"),
    (["xyzzy"], "unknown subcommand 'xyzzy'"),
    (["runs", "gte"], "runs: unknown subcommand 'gte', did you mean 'get'?"),
    (["login", "staus"], "login: unknown subcommand 'staus', did you mean 'status'?"),
    (["runs"], "runs needs one of: list, get, events, cancel"),
    ([], "the cockpit needs a terminal"),
    (["--attach", "r"], "the cockpit needs a terminal"),
    (["--attach"], "--attach needs a run ID or @last"),
    (["--attach", " "], "--attach needs a run ID or @last"),
    (["--versoin"], "unknown option '--versoin', did you mean '--version'?"),
    (["--bogus"], "unknown option '--bogus'"),  # which is no more like --logout than its dashes
    (["--json", "repos", "list"], "--json goes after the subcommand"),
    (["--follow"], "--follow goes after the subcommand"),
    (["run", "x"], "run: --repo <id> is required (find IDs via `mogplex repos list`)"),
    (RUN_IT, ONE_TASK),
    ([*RUN_IT, "x", "--prompt-file", "f"], ONE_TASK),
    ([*RUN_IT, "-", "x"], ONE_TASK),
    ([*RUN_IT, " ", "\t"], "run: the task is empty"),
    ([*RUN_IT, "-"], "run: the task is empty"),
    ([*RUN_IT, "--prompt-file", "/nonexistent"], "run: /nonexistent: No such file or directory"),
    ([*RUN_IT, "--prompt-file", os.sep], f"run: {os.sep}: {OPENED_DIRECTORY}"),
    ([*RUN_IT, "x" * 100_001], TOO_LONG),
    ([*RUN_IT, "\U0001f600" * 50_001], TOO_LONG),
    ([*RUN_IT, "\udcff"], "run: the task is not valid UTF-8"),
    ([*RUN_IT, "x", "--harness", "codx"], "run: unknown --harness 'codx', did you mean 'codex'?"),
    ([*RUN_IT, "x", "--harness", "claude"],
     "run: unknown --harness 'claude', did you mean 'claude-code'?"),
    ([*RUN_IT, "x", "--timeout", "5"], "run: --timeout needs --follow"),
    ([*RUN_IT, "x", "--cancel-on-interrupt"], "run: --cancel-on-interrupt needs --follow"),
    (["runs", "events", "r", "--quiet"], "runs events: --quiet needs --follow"),
    (["runs", "events", "r", "--timeout", "5"], "runs events: --timeout needs --follow"),
    ([*RUN_IT, "x", "--folow"], "run: unknown option '--folow', did you mean '--follow'?"),
    (["runs", "events", "r", "--follow=no"],
     "runs events: argument --follow: ignored explicit argument 'no'"),
    (["runs", "list", "--demo=yes"],
     "runs list: argument --demo: ignored explicit argument 'yes'"),
    ([*RUN_IT, "x", "-hx"], "run: unknown option '-hx'"),
    (["api", "x", "--field", ""], "--field takes NAME=VALUE or NAME:=JSON, not ''"),
    (["run", "--repo", "--follow", "x"], "run: argument --repo: expected one argument"),
    (["run", "x", "--repo"], "run: argument --repo: expected one argument"),
    ([*RUN_IT, "x", "--idempotency-key", "k\u00e9y"], BAD_KEY),
    ([*RUN_IT, "x", "--idempotency-key", "k" * 201], BAD_KEY),
    ([*RUN_IT, "x", "--idempotency-key", ""], "run: --idempotency-key is empty"),
    ([*RUN_IT, "x", "--idempotency-key", "ci"],
     "run: --idempotency-key ci works in GitHub Actions and GitLab CI only; give a key"),
    (["runs", "events", "r", "--follow", "--timeout", "never"],
     "invalid duration 'never': give seconds, or a number with s, m or h, such as 90s or 30m"),
    (["runs", "get"], NO_RUN),
    (["runs", "get", "@last"], NO_RUN),
    (["runs", "cancel"], "runs cancel: the following arguments are required: RUN"),
    (["runs", "get", ".."], "invalid id '..'"),
    (["runs", "get", " "], "the run ID is empty"),
    (["runs", "get", ""], "the run ID is empty"),
    (["runs", "events", "", "--follow"], "the run ID is empty"),
    (["runs", "events", "a", "", "--follow"], "the run ID is empty"),
    (["runs", "events", "a", "..", "--follow"], "invalid id '..'"),
    (["runs", "events", "a", "@last", "--follow"], NO_RUN),
    (["runs", "events", "-", "--follow"], "there is no run ID on stdin"),
    (["runs", "events", "a", "b", "--follow", "--dotenv", "f"],
     "runs events: --dotenv is for one run"),
    (["runs", "cancel", ""], "the run ID is empty"),
    (["runs", "get", "a", "b"], "runs get: unrecognized arguments: b"),
    (["runs", "get", "a", "--", "b"], "runs get: nothing can follow --"),
    (["repos", "list", "--limit", "0"], "--limit takes a whole number from 1 to 200, not '0'"),
    (["repos", "list", "--limit", "201"], "--limit takes a whole number from 1 to 200, not '201'"),
    (["repos", "list", "--limit", "\u0663"],
     "--limit takes a whole number from 1 to 200, not '\u0663'"),
    (["sandboxes", "list", "--status", "runing"],
     "sandboxes list: unknown --status 'runing', did you mean 'running'?"),
    (["--demo-server", "7000000"], ONE_PORT),
    (["--demo-server", "99999"], ONE_PORT),
    (["--demo-server", "0"], ONE_PORT),
    (["--demo-server", "x"], ONE_PORT),
    (["--demo-server", ""], ONE_PORT),
])
def test_usage_errors_are_one_line_and_no_request(
    cli: Callable[..., Result], argv: List[str], message: str,
) -> None:
    with one_answer(ok({})) as server:
        result = cli(*argv, env=service(server.url))
        with_json = cli(*argv, "--json", env=service(server.url))
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == f"error: {message}"
    assert server.requests == []
    assert with_json.code == 2 or not argv or argv[0].startswith("-")


@pytest.mark.parametrize("argv, hint", [
    ([*RUN_IT, "x", "--harness", "codx"], "see: mogplex run --help"),
    (["runs"], "see: mogplex runs --help"),
    (["rusn"], "see: mogplex --help"),
    (["--follow"], "see: mogplex --help"),
    ([*RUN_IT, "x", "--quiet"], "see: mogplex run --help"),
    (["sandboxes", "list", "--status", "runing"], "see: mogplex sandboxes list --help"),
])
def test_a_usage_error_names_the_help_that_has_the_answer(
    cli: Callable[..., Result], argv: List[str], hint: str,
) -> None:
    assert cli(*argv).err.splitlines()[1:] == [hint]


def empty_options(name: str) -> List[str]:
    """Every option of a command that takes a value which may be empty, with an empty one."""
    options = [option for option in mogplex.command_row(name).options if option.may_be_empty]
    return [word for option in options if option.value for word in (option.flag, "")]


@pytest.mark.parametrize("name", ["sandboxes list", "repos list", "runs list"])
def test_an_empty_option_of_a_list_counts_as_not_given(
    run_demo: Callable[..., Result], name: str,
) -> None:
    words = name.split()
    assert run_demo(*words, "--json", *empty_options(name)) == run_demo(*words, "--json")


def test_an_empty_option_of_a_run_counts_as_not_given(cli: Callable[..., Result]) -> None:
    with one_answer(ok(RUN)) as server:
        with_repo = {**service(server.url), "MOGPLEX_REPO": "r"}
        assert cli("run", "x", "--follow", *empty_options("run"), env=service(server.url)).code == 2
        assert cli("run", "x", *empty_options("run"), env=with_repo).code == 0
    assert posted(server) == [{"repoId": "r", "prompt": "x"}]


@pytest.mark.parametrize("argv, flag, value", [
    (["run", "--repo", "r", "x"], "--harness", "newer-agent"),
    (["run", "--repo", "r", "x"], "--harness", "codex-cloud"),
    (["sandboxes", "list"], "--status", "hibernated"),
    (["sandboxes", "list"], "--status", "starting"),
])
def test_a_value_that_is_newer_than_this_version_is_passed_on(
    cli: Callable[..., Result], argv: List[str], flag: str, value: str,
) -> None:
    with RawServer(lambda *_: ok({**RUN, "sandboxes": [{"id": "s"}]})) as server:
        result = cli(*argv, flag, value, env=service(server.url))
    note = f"mogplex {mogplex.__version__} does not know {flag} {value}; passing it on\n"
    assert (result.code, result.err) == (0, note)
    assert len(server.requests) == 1 and value in server.requests[0]


def test_a_value_that_is_known_is_passed_on_without_a_word(cli: Callable[..., Result]) -> None:
    with one_answer(ok({"sandboxes": [{"id": "s"}]})) as server:
        for status in mogplex.SANDBOX_STATUSES:
            result = cli("sandboxes", "list", "--status", status, env=service(server.url))
            assert result.err == ""
    assert len(server.requests) == len(mogplex.SANDBOX_STATUSES)


@pytest.mark.parametrize("word, meant", [
    ("codx", "codex"), ("coedx", "codex"), ("claude", "claude-code"), ("claude_code", "claude-code"),
    ("newer-agent", ""), ("codex-2000", ""), ("c", "codex"),
    ("CODEX", "codex"), ("Claude-Code", "claude-code"),
])
def test_a_slip_is_told_from_a_newer_word(word: str, meant: str) -> None:
    assert mogplex.slip_of(word, list(mogplex.HARNESSES)) == meant


@pytest.mark.parametrize("words, told, untold", [
    ("run", "(default: MOGPLEX_REPO)", "(default: all)"),
    ("sandboxes list", "only sandboxes of this repo", "MOGPLEX_REPO"),
    ("runs events", "stop following after TIME", "for the browser"),
    ("login", "wait this long for the browser", "following"),
])
def test_a_command_s_help_speaks_of_that_command(
    cli: Callable[..., Result], words: str, told: str, untold: str,
) -> None:
    shown = " ".join(cli(*words.split(), "--help").out.split())
    assert told in shown and untold not in shown
    assert "--help show this help (also -h)" in shown.partition("options:")[2]


def test_the_help_has_arguments_before_options(cli: Callable[..., Result]) -> None:
    arguments, _, options = cli("run", "--help").out.partition("options:")
    assert "[TASK...]  " in arguments.partition("arguments:")[2] and "TASK..." not in options


@pytest.mark.parametrize("url, extra, problem", [
    ("http://example.com", {}, "http:// is only for"),
    ("http://127.0.0.1:1", {"MOGPLEX_DEV": "0"}, "MOGPLEX_DEV=1"),
    ("http://127.0.0.1:1", {"NODE_ENV": "production"}, "NODE_ENV"),
    ("ftp://x", {}, "https://"),
    ("https://u:p@h", {}, "user info"),
    ("https://h:65536", {}, "65536"),
])
def test_a_base_url_that_may_not_be_used(
    cli: Callable[..., Result], url: str, extra: Dict[str, str], problem: str,
) -> None:
    result = cli("repos", "list", env={**service(url), **extra})
    assert (result.code, result.out) == (2, "")
    assert "MOGPLEX_URL" in result.err and problem in result.err.partition(": ")[2]


@pytest.mark.parametrize("words", ["", "repos", "runs", "sandboxes", *mogplex.SUBCOMMANDS])
def test_help_at_every_level(cli: Callable[..., Result], words: str) -> None:
    result = cli(*words.split(), "--help")
    assert result == cli(*words.split(), "-h") and result.code == 0 and result.err == ""
    assert max(map(len, result.out.splitlines())) <= 80
    assert "exit codes: 0 success" in result.out and "examples:\n  mogplex" in result.out
    assert len(re.split("examples:\n", result.out)[1].split("\n\n")[0].splitlines()) == 2


def test_the_help_of_a_group_lists_its_commands_alone(cli: Callable[..., Result]) -> None:
    shown = cli("runs", "--help").out
    head, _, rest = shown.partition("commands:\n")
    assert head == "usage: mogplex runs <command> [options]\n\nCommands of mogplex runs.\n\n"
    rows, _, rest = rest.partition("\n\n")
    assert rows.splitlines() == [
        f"  {name:<18} {row.purpose}"
        for name, row in mogplex.SUBCOMMANDS.items() if name.startswith("runs ")]
    assert rest.startswith("examples:\n")


def test_the_options_that_all_commands_have_come_after_a_command_s_own(
    cli: Callable[..., Result],
) -> None:
    flags = re.findall("(?m)^  (--[a-z-]+)", cli("repos", "list", "--help").out)
    common = ["--json", "--get", "--demo", "--debug", "--no-color", "--help"]
    assert flags == ["--query", "--limit", *common]


def test_a_global_option_after_two_dashes_is_part_of_the_task(cli: Callable[..., Result]) -> None:
    with one_answer(ok(RUN)) as server:
        result = cli(*RUN_IT, "--", "fix", "--debug", env=service(server.url))
    assert (result.code, result.err) == (0, "")
    assert posted(server)[0]["prompt"] == "fix --debug"


@pytest.mark.parametrize("name", ["", "repos", "runs", *mogplex.SUBCOMMANDS])
def test_help_is_also_a_command(cli: Callable[..., Result], name: str) -> None:
    assert cli("help", *name.split()) == cli(*name.split(), "--help")


@pytest.mark.parametrize("topic", ["environment", "exit-codes"])
def test_help_on_a_topic_is_text_on_stdout(cli: Callable[..., Result], topic: str) -> None:
    result = cli("help", topic)
    assert (result.code, result.err) == (0, "")
    title, *rows = result.out.splitlines()
    assert title == topic.replace("-", " ") + ":" and max(map(len, rows)) <= 80
    assert all(re.match(r"  \S.{23}\S|  \S.* \S| {26}\S", row) for row in rows)
    assert json.loads(cli("help", topic, "--json").out) == {"help": topic, "text": result.out[:-1]}


@pytest.mark.parametrize("words, message", [
    ("runs evnts", "help: unknown command 'runs evnts', did you mean 'runs events'?"),
    ("environ", "help: unknown command 'environ', did you mean 'environment'?"),
    ("me with this", "help: unknown command 'me with this'"),
])
def test_help_on_what_is_no_command_is_a_usage_error(
    cli: Callable[..., Result], words: str, message: str,
) -> None:
    told = f"error: {message}\nsee: mogplex help --help\n"
    assert cli("help", *words.split()) == Result(2, "", told)


SHELL_FILES = [  # shell; where its completions go; what its script begins with
    ("bash", ".local/share/bash-completion/completions/mogplex", "# mkdir -p "),
    ("zsh", ".zfunc/_mogplex", "#compdef mogplex\n# mkdir -p "),
    ("fish", ".config/fish/completions/mogplex.fish", "# mkdir -p "),
]


def shtab_or_skip(name: str) -> Any:
    """shtab, of a version that knows the shell ``name``: 1.7, the last for Python 3.8, has no fish."""
    import shtab
    if name not in shtab.SUPPORTED_SHELLS:
        assert sys.version_info < (3, 9)
        pytest.skip(f"no shtab for this Python knows {name}")
    return shtab


@pytest.mark.parametrize("name, path, head", SHELL_FILES)
def test_completion_prints_the_script(
    cli: Callable[..., Result], name: str, path: str, head: str,
) -> None:
    script = shtab_or_skip(name).complete(mogplex.make_parser(), name)
    result = cli("completion", name)
    assert (result.code, result.err) == (0, "") and result.out.startswith(head)
    added = re.sub(r"(?m)\A(#compdef.*\n)?((?:# .*\n){2,3})", r"\1", result.out, count=1)
    assert added.split() == script.split()
    assert cli("completion", name, "--get", "shell").out == f"{name}\n"


@pytest.mark.posix
@pytest.mark.parametrize("name, path, head", SHELL_FILES)
def test_what_stands_at_the_head_of_a_completion_script_installs_it(
    cli: Callable[..., Result], shell_tools: str, tmp_path: Any, name: str, path: str, head: str,
) -> None:
    shtab_or_skip(name)
    script = cli("completion", name).out
    commands = re.findall(r"(?m)^# (mk.*|mogplex .*)$", script)[:2]
    environ = {**os.environ, "HOME": str(tmp_path), "PATH": shell_tools + os.pathsep + os.environ["PATH"]}
    subprocess.run(["bash", "-ec", "\n".join(commands)], env=environ, check=True, timeout=60)
    assert (tmp_path / path).read_text(encoding="utf-8") == script


def test_completion_without_shtab_says_how_to_install_it(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    told = "error: completion needs the package 'shtab': python3 -m pip install shtab\n"
    assert cli("completion", "bash") == Result(1, "", told)


def test_completion_for_a_shell_that_an_old_shtab_does_not_know(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shtab
    monkeypatch.setattr(shtab, "SUPPORTED_SHELLS", ["bash", "zsh"])
    result = cli("completion", "fish")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"error: shtab \S+ makes no script for fish\nupgrade it: .*\n", result.err)


@pytest.mark.parametrize("argv, message", [
    (["bsh"], "completion: unknown shell 'bsh', did you mean 'bash'?"),
    (["powershell"], "completion: unknown shell 'powershell'"),
    ([], "completion: the following arguments are required: SHELL"),
])
def test_completion_for_no_shell_that_it_knows_is_a_usage_error(
    cli: Callable[..., Result], argv: List[str], message: str,
) -> None:
    told = f"error: {message}\nsee: mogplex completion --help\n"
    assert cli("completion", *argv) == Result(2, "", told)


def test_version(cli: Callable[..., Result]) -> None:
    assert cli("--version") == Result(0, f"mogplex {mogplex.__version__}\n", "")


def test_repos_list(run_demo: Callable[..., Result]) -> None:
    table = run_demo("repos", "list")
    titles, *rows = table.out.splitlines()
    assert (table.code, table.err) == (0, "")
    assert titles.split()[:3] == ["ID", "REPO", "BRANCH"]
    assert f"{mogplex.DEMO_WEB}  acme/web " in "\n".join(rows)


def test_repos_list_by_a_part_of_the_name(run_demo: Callable[..., Result]) -> None:
    lines = run_demo("repos", "list", "--query", "API", "--json").out.splitlines()
    assert [json.loads(line)["full_name"] for line in lines] == ["acme/api"]
    assert run_demo("repos", "list", "--query", "zzz") == Result(0, "", "no repo matches 'zzz'\n")
    assert run_demo("repos", "list", "--query", "zzz", "--json") == Result(0, "", "")


def test_run_prints_exactly_these_lines_and_sends_only_what_was_asked(cli: Callable[..., Result]) -> None:
    run = {**RUN, "runId": "R-1", "status": "pending", "replayed": False, "new_field": {"x": [1]}}
    with one_answer(ok(run)) as server:
        shown = cli("run", "--repo", mogplex.DEMO_WEB, "Fix", "the", "--harness", "codex", "bug", env=service(server.url))
        flat = cli("run", "--repo", mogplex.DEMO_WEB, "--branch", "b", "--base-branch", "m", "--create-branch", "--root", "web",
                   "--idempotency-key", " key 1 ", "--json", "Fix", env=service(server.url))
    assert shown == Result(0, mogplex.started_text(run, False) + "\n", "")
    assert json.loads(flat.out) == run and flat.out.count("\n") == 1 and list(json.loads(flat.out)) == list(run)
    assert posted(server) == [
        {"repoId": mogplex.DEMO_WEB, "prompt": "Fix the bug", "harness": "codex"},
        {"repoId": mogplex.DEMO_WEB, "prompt": "Fix", "baseBranch": "m", "workingBranch": "b", "createBranch": True, "rootDirectory": "web"}]
    keys = [re.search(r"(?i)\nidempotency-key: (.*)\r", request).group(1) for request in server.requests]  # type: ignore
    assert mogplex.is_uuid(keys[0]) and keys[1] == "key 1"


@pytest.mark.parametrize("argv", [["run", "--repo", "r", "x"], ["run", "--repo", "r", "x", "--follow"], ["runs", "get", "R"]])
@pytest.mark.parametrize("data", [{}, {"runId": None, "run": None}, {"runId": "", "run": []}])
def test_an_answer_without_a_run_is_no_success(cli: Callable[..., Result], argv: List[str], data: Dict[str, Any]) -> None:
    with one_answer(ok(data)) as server:
        result = cli(*argv, env=service(server.url))
        assert (result.code, result.out) == (1, "") and len(server.requests) == 1
        assert ("add --idempotency-key" in result.err) is (argv[0] == "run")
        assert cli(*argv, "--json", env=service(server.url))[:2] == (1, "")


@pytest.mark.parametrize("argv", [
    ["repos", "list"], ["repos", "list", "--debug"], ["login", "status"], ["login", "--with-token"]])
@pytest.mark.parametrize("echo", [
    refusal(400, f"X {TOKEN}", f"bad Bearer {TOKEN}"),
    answer(302, "", Location=f"https://x.invalid/{TOKEN}"),
], ids=["message", "location"])
def test_a_token_that_the_service_echoes_is_not_shown(
    cli: Callable[..., Result], echo: bytes, argv: List[str],
) -> None:
    with one_answer(echo) as server:
        result = cli(*argv, env=service(server.url), stdin=TOKEN)
    assert result.code == 1 and "***" in result.err
    assert TOKEN not in result.out + result.err


@pytest.mark.parametrize("argv, stdin, prompt", [
    (["-"], "from stdin\nline 2\n", "from stdin\nline 2"), (["--prompt-file", "task.md"], "", "from a file"),
    (["--", "-x", "--follow"], "", "-x --follow"), (["a", "--", "-h", "--demo", "--debug"], "", "a -h --demo --debug"), (["a", "--branch", "b", "c"], "not read", "a c"),
    (["\U0001f600" * 50_000], "", "\U0001f600" * 50_000), (["-"], "\ufeffbom", "bom"),
], ids=short)
def test_where_a_task_comes_from(
    cli: Callable[..., Result], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, argv: List[str], stdin: str, prompt: str,
) -> None:
    (tmp_path / "task.md").write_text("from a file\n")
    monkeypatch.chdir(tmp_path)
    with one_answer(ok(RUN)) as server:
        assert cli("run", "--repo", "r", *argv, env=service(server.url), stdin=stdin).code == 0
    assert posted(server)[0]["prompt"] == prompt


@pytest.mark.posix
def test_stdin_that_never_ends_is_too_long(tmp_path: Any) -> None:
    with open("/dev/zero", "rb") as endless, one_answer(ok(RUN)) as server:
        done = subprocess.run([*PROGRAM, "run", "--repo", "r", "-"], stdin=endless, capture_output=True,
                              env={**os.environ, **service(server.url)}, timeout=60)
    assert done.returncode == 2 and done.stdout == b"" and b"longer than" in done.stderr and server.requests == []


def test_a_repo_by_its_name(run_demo: Callable[..., Result], cli: Callable[..., Result]) -> None:
    assert f"repo    {mogplex.DEMO_WEB}\n" in run_demo("run", "--repo", "ACME/Web", "x").out
    missing = run_demo("run", "--repo", "acme/w_b", "x")
    assert missing.code == 1
    assert "error: NOT_FOUND: the service lists no repo 'acme/w_b'" in missing.err
    with one_answer(ok({"repos": [{"id": "1", "full_name": "acme/web-2"}, {"id": "2", "full_name": None}]})) as server:
        assert cli("run", "--repo", "acme/web", "x", env=service(server.url)).code == 1
    assert "q=acme%2Fweb&limit=200" in server.requests[0].splitlines()[0] and len(server.requests) == 1
    assert f"repo    {mogplex.DEMO_WEB}\n" in run_demo("run", "x", MOGPLEX_REPO="acme/web").out


def test_an_unknown_repo_is_told_apart_from_an_outage(run_demo: Callable[..., Result], demo: mogplex.DemoServer) -> None:
    result = run_demo("run", "--repo", "nope", "x")
    assert result.code == 1 and "the service lists no repo 'nope'" in result.err and "--idempotency-key" not in result.err
    assert demo.service.requests == 2


def test_a_replayed_start(run_demo: Callable[..., Result]) -> None:
    first = run_demo("run", "--repo", mogplex.DEMO_WEB, "--idempotency-key", "k", "x")
    again = run_demo("run", "--repo", mogplex.DEMO_WEB, "--idempotency-key", "k", "x")
    assert first.out.startswith("started run ") and again.out.startswith("matched existing run ")
    assert first.out.splitlines()[1:] == again.out.splitlines()[1:]
    other = run_demo("run", "--repo", mogplex.DEMO_WEB, "--idempotency-key", "k", "y")
    assert other.code == 1 and "IDEMPOTENCY_CONFLICT" in other.err and "(HTTP 409)" in other.err


@pytest.mark.parametrize("answers, code, told", [
    (refusal(500, "INTERNAL_ERROR", "Oops"), 1, True), (answer(200, "<html>"), 1, True), (refusal(429, "RATE_LIMITED", "Slow", Retry_After="3000"), 75, False),
    (refusal(401, "UNAUTHORIZED", "Unauthorized"), 64, False), (refusal(403, "FORBIDDEN", "Scope"), 65, False),
    (refusal(400, "BAD_REQUEST", "Invalid"), 1, False),
])
def test_a_start_that_may_have_reached_the_service_gives_its_key(
    cli: Callable[..., Result], answers: bytes, code: int, told: bool,
) -> None:
    with one_answer(answers) as server:
        result = cli("run", "--repo", mogplex.DEMO_WEB, "x", env=service(server.url))
    assert (result.code, result.out) == (code, "") and ("add --idempotency-key" in result.err) is told
    keys = {re.search(r"(?i)\nidempotency-key: (.*)\r", request).group(1) for request in server.requests  # type: ignore
            if request.startswith("POST")}
    assert len(keys) == 1 and (not told or keys.pop() in result.err)


@pytest.mark.parametrize("repos", [
    ok({"repos": []}), ok({"repos": None}), refusal(500, "INTERNAL_ERROR", "Oops")])
@pytest.mark.slow
def test_a_start_whose_answer_was_lost_gives_its_key_whatever_follows(
    cli: Callable[..., Result], repos: bytes,
) -> None:
    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        if request.startswith("GET"):
            return repos
        return b"" if count == 1 else refusal(503, "SERVICE_UNAVAILABLE", "Limit")

    with RawServer(serve) as server:
        result = cli("run", "--repo", mogplex.DEMO_WEB, "x", env=service(server.url))
    assert (result.code, result.out) == (69, "") and "add --idempotency-key" in result.err


@pytest.mark.slow
def test_run_and_follow_end_with_the_run_s_verdict(run_demo: Callable[..., Result]) -> None:
    good = run_demo("run", "--repo", "acme/web", "--follow", "Refactor auth")
    run_id = good.out.split()[2]
    assert good.code == 0 and good.out.splitlines()[-1] == f"--- run {run_id} success ---"
    assert "\n" + "Pull request ready https://github.com/acme/web/pull/" not in good.out  # a message is on its event's line
    assert good.err.splitlines()[0] == f"branch: mogplex/agent-{run_id[:8]}"
    bad = run_demo("run", "--repo", "acme/web", "--follow", "--json", "please fail")
    lines = [json.loads(line) for line in bad.out.splitlines()]
    assert bad.code == 1 and lines[0]["status"] == "pending" and lines[-2]["message"] == "Harness run failed"
    assert lines[-1] == {"runId": lines[0]["runId"], "status": "failed", "error": mogplex.DEMO_ERROR,
                         "workingBranch": f"mogplex/agent-{lines[0]['runId'][:8]}"}


@pytest.mark.slow
def test_events_of_ended_runs(run_demo: Callable[..., Result]) -> None:
    for run_id, code, status in ((FINISHED, 0, "success"), (FAILED, 1, "failed"), (CANCELLED, 1, "cancelled")):
        listed, followed = run_demo("runs", "events", run_id), run_demo("runs", "events", run_id, "--follow")
        assert listed.code == 0 and followed.code == code
        assert followed.out == listed.out + f"--- run {run_id} {status} ---\n"
    with_json = run_demo("runs", "events", FINISHED, "--json")
    assert [mogplex.event_line(json.loads(line)) for line in with_json.out.splitlines()] == (
        run_demo("runs", "events", FINISHED).out.splitlines())


@pytest.mark.slow
def test_more_events_than_the_service_lists(run_demo: Callable[..., Result]) -> None:
    listed = run_demo("runs", "events", LONG)
    assert len(listed.out.splitlines()) == 200 and "only the first 200 events" in listed.err
    followed = run_demo("runs", "events", LONG, "--follow", "--json")
    assert json.loads(followed.out.splitlines()[-1])["truncated"] is True and followed.err.count("first 200 events") == 1
    followed = run_demo("runs", "events", LONG, "--follow", "--limit", "3")
    assert len(followed.out.splitlines()) == 3 + 1
    few = run_demo("runs", "events", LONG, "--limit", "3")
    assert len(few.out.splitlines()) == 3 and "only the first 3 events" in few.err


def test_hostile_text_stays_text(run_demo: Callable[..., Result]) -> None:
    shown = run_demo("runs", "events", CANCELLED).out
    assert "\x1b" not in shown and "\u202e" not in shown and "##vso" not in shown and ": :error::" in shown
    raw = run_demo("runs", "events", CANCELLED, "--json").out
    assert "\\u001b[2J" in raw and raw.isascii()


def test_a_timeout_says_that_the_run_is_still_running(cli: Callable[..., Result]) -> None:
    with one_answer(ok({"run": {"status": "streaming"}, "events": []})) as server:
        result = cli("runs", "events", "R", "--follow", "--timeout", "0.4", env=service(server.url))
    assert (result.code, result.out) == (1, "")
    timed_out = "error: --follow timed out after 0.4s waiting for terminal status\n"
    assert result.err == STILL_RUNNING.format("R") + timed_out


@pytest.mark.parametrize("error, code", [
    (refusal(403, "FORBIDDEN", "Scope"), 65), (refusal(404, "NOT_FOUND", "Gone"), 1)])
@pytest.mark.slow
def test_a_follow_that_ends_in_the_middle_says_that_the_run_is_still_running(
    cli: Callable[..., Result], error: bytes, code: int,
) -> None:
    with RawServer(lambda count, *_: STREAMING if count == 1 else error) as server:
        result = cli("runs", "events", "R", "--follow", env=service(server.url))
    assert result.code == code and result.err.startswith(STILL_RUNNING.format("R") + "error: ")


def test_a_wait_longer_than_the_timeout_ends_the_follow_at_once(
    cli: Callable[..., Result],
) -> None:
    busy = refusal(429, "RATE_LIMITED", "Slow down", Retry_After="3000")
    with RawServer(lambda count, *_: STREAMING if count == 1 else busy) as server:
        result = cli("runs", "events", "R", "--follow", "--timeout", "10m", env=service(server.url))
    assert result.code == 75 and STILL_RUNNING.format("R") in result.err and "3000 s" in result.err


def test_a_follow_that_never_had_an_answer_does_not_claim_that_the_run_is_running(
    cli: Callable[..., Result],
) -> None:
    with one_answer(refusal(404, "NOT_FOUND", "Run not found")) as server:
        result = cli("runs", "events", "R", "--follow", env=service(server.url))
    assert result.code == 1 and "is still running" not in result.err


@pytest.mark.parametrize("argv, code", [
    (["run", "--repo", "r", "x"], 0), (["runs", "events", "R"], 1)])
@pytest.mark.slow
def test_a_run_that_the_service_does_not_know_yet_is_waited_for_after_its_start_alone(
    cli: Callable[..., Result], argv: List[str], code: int,
) -> None:
    ended_run = ok({"run": {**RUN, "status": "success"}, "events": []})
    answers = [refusal(404, "NOT_FOUND", "Run not found"), ended_run]

    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        if request.startswith("POST"):
            return ok(RUN)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    with RawServer(serve) as server:
        assert cli(*argv, "--follow", env=service(server.url)).code == code


FAILED_AT_ONCE = {
    "runId": "R-1", "status": "failed", "error": "The queue is full", "replayed": True}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_start_that_the_service_could_not_queue_has_failed(
    cli: Callable[..., Result], flags: List[str],
) -> None:
    """It answers 500, and the try after that finds the run, failed: that of this very start."""
    answers = [refusal(500, "INTERNAL_ERROR", "Oops"), ok(FAILED_AT_ONCE)]
    with RawServer(lambda count, *_: answers[count - 1]) as server:
        result = cli("run", "--repo", "r", "x", *flags, env=service(server.url))
    assert (result.code, result.err) == (1, "run error: The queue is full\n")
    assert result.out.startswith('{"runId":"R-1",' if flags else "started run R-1 (failed)\n")


def test_a_failed_run_that_a_given_key_finds_is_an_existing_one(cli: Callable[..., Result]) -> None:
    with one_answer(ok(FAILED_AT_ONCE)) as server:
        result = cli("run", "--repo", "r", "x", "--idempotency-key", "K", env=service(server.url))
    assert (result.code, result.err) == (1, "run error: The queue is full\n")
    assert result.out.startswith("matched existing run R-1 (failed)\n")


def unread(pipe: int) -> int:
    """How many bytes in a pipe nobody has read yet."""
    (size,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"1234"))
    return int(size)


@pytest.mark.posix
def test_a_task_comes_whole_from_a_stdin_that_does_not_block() -> None:
    """As a pipe that is shared with Node."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_NONBLOCK)
    with one_answer(ok(RUN)) as server:
        process = run_file("run", "--repo", "r", "-", url=server.url, stdin=ours)
        for part in (b"first ", b"second ", b"third"):
            os.write(theirs, part)
            while process.poll() is None and unread(ours):
                time.sleep(0.01)
        os.close(theirs)
        _, err = process.communicate(timeout=60)
        os.close(ours)
    assert (process.returncode, err) == (0, b"")
    assert [body["prompt"] for body in posted(server)] == ["first second third"]


def test_an_empty_variable_is_no_run(cli: Callable[..., Result]) -> None:
    for command in ("get", "events"):
        for value in ("", " "):
            env = {**service("http://127.0.0.1:1"), "MOGPLEX_RUN_ID": value}
            result = cli("runs", command, env=env)
            assert result == Result(2, "", "error: MOGPLEX_RUN_ID is empty\n")


@pytest.mark.posix
def test_remembered_runs(run_demo: Callable[..., Result], tmp_path: Any, demo: mogplex.DemoServer) -> None:
    assert run_demo("runs", "list") == Result(0, "", "no runs started from here yet\n")
    ids = [json.loads(run_demo("run", "--repo", repo, "--json", f"task {repo}\n" + "y" * 100).out)["runId"]
           for repo in ("acme/web", mogplex.DEMO_API)]
    listed = [json.loads(line) for line in run_demo("runs", "list", "--json").out.splitlines()]
    assert [record["id"] for record in listed] == ids[::-1]
    assert listed[1]["task"] == "task acme/web " + "y" * 100 and listed[1]["repo"] == "acme/web"
    assert listed[1]["service"] == demo.url and listed[1]["branch"] == "main"
    assert run_demo("runs", "list", "--limit", "1").out.splitlines()[0].split() == ["ID", "REPO", "BRANCH", "STARTED", "TASK"]
    assert len(run_demo("runs", "list", "--limit", "1").out.splitlines()) == 2
    newest = run_demo("runs", "get")
    assert newest.out.startswith(f"run     {ids[1]}\n") and newest.err == f"run {ids[1]} (the newest started here)\n"
    assert run_demo("runs", "get", "@last", MOGPLEX_RUN_ID=ids[0]).out.splitlines()[0] == f"run     {ids[1]}"
    chosen = run_demo("runs", "events", MOGPLEX_RUN_ID=f" {ids[0]} ")
    assert chosen.err == f"run {ids[0]} (MOGPLEX_RUN_ID)\n" and chosen.code == 0
    assert ids[1] in run_demo("runs", "cancel", "@last").out
    assert run_demo("runs", "cancel", MOGPLEX_RUN_ID=ids[0]).code == 2
    for words in (["get", ""], ["events", ""], ["cancel", ""], ["cancel", " "]):  # "$RUN_ID", and nothing in it
        assert run_demo("runs", *words, MOGPLEX_RUN_ID=ids[0]).code == 2
    run_demo("run", "--repo", mogplex.DEMO_WEB, "x", MOGPLEX_NO_HISTORY="1")
    assert len(run_demo("runs", "list", "--json").out.splitlines()) == 2
    assert oct((tmp_path / "home" / "runs.jsonl").stat().st_mode & 0o777) == "0o600"


def test_another_service_has_other_runs(run_demo: Callable[..., Result], cli: Callable[..., Result]) -> None:
    run_demo("run", "--repo", mogplex.DEMO_WEB, "x")
    assert cli("runs", "list", "--json", env={"MOGPLEX_API_KEY": TOKEN}).out == ""


def test_runs_get(run_demo: Callable[..., Result]) -> None:
    flat = json.loads(run_demo("runs", "get", FAILED, "--json").out)
    delivery = mogplex.Delivery(branch=f"mogplex/agent-{FAILED[:8]}")
    text = mogplex.run_text(flat, False, delivery, "command_failed, exit code 1")
    shown = run_demo("runs", "get", FAILED)
    assert shown.out == text + "\n" and "\nerror   " in shown.out and "\npushed  " in shown.out
    assert "\npull    https://github.com/acme/" in run_demo("runs", "get", FINISHED).out
    unknown = run_demo("runs", "get", "00000000-0000-4000-8000-000000000000")
    assert unknown.code == 1 and "(HTTP 404)" in unknown.err
    malformed = run_demo("runs", "get", "nope/../x")
    assert malformed.code == 1 and "(HTTP 500)" in malformed.err and "does not look like an id" in malformed.err


@pytest.mark.parametrize("data, lines", [
    ({"run": {"status": "cancelled"}, "status": "cancelled", "alreadyTerminal": False},
     ["cancellation requested for run R", "status: cancelled"]),
    ({"run": {"status": "success"}, "status": "success", "alreadyTerminal": True}, ["run R is already success"]),
    ({"run": {"status": "streaming"}, "status": "cancellation_requested"},
     ["cancellation requested for run R", "status: streaming"]),
    ({"run": {"status": "failed"}, "status": "already_terminal"}, ["run R is already failed"]),
    ({"status": "cancellation_requested"}, ["cancellation requested for run R", "status: cancellation_requested"]),
])
def test_cancel_copes_with_both_spellings(cli: Callable[..., Result], data: Dict[str, Any], lines: List[str]) -> None:
    with one_answer(ok(data)) as server:
        assert cli("runs", "cancel", "R", env=service(server.url)) == Result(0, "\n".join(lines) + "\n", "")
        assert json.loads(cli("runs", "cancel", "R", "--json", env=service(server.url)).out) == data
    assert all(request.startswith("POST /api/v1/mogplex/runs/R/cancel ") for request in server.requests)


def test_sandboxes_list(run_demo: Callable[..., Result]) -> None:
    named = run_demo("sandboxes", "list", "--repo", "acme/web", "--status", "error")
    titles, row = named.out.splitlines()
    assert titles.split() == ["ID", "REPO", "BRANCH", "STATUS", "PREVIEW", "LAST", "ACTIVE", "ERROR"]
    assert "  acme/web  fix/tax   error  " in row and row.endswith("npm ci exited with 1")
    assert re.search(r"\d\d:\d\d\.\d{3}Z", row)


def test_sandboxes_list_by_an_id_and_by_a_status(run_demo: Callable[..., Result]) -> None:
    by_id = run_demo("sandboxes", "list", "--repo", mogplex.DEMO_WEB, "--status", "error")
    assert "  acme/web  " in by_id.out
    none = run_demo("sandboxes", "list", "--status", "pausing")
    assert none == Result(0, "", "no sandboxes\n")
    paused = run_demo("sandboxes", "list", "--status", "paused", "--json")
    assert json.loads(paused.out)["status"] == "paused"


REPO_ROW = {"id": "R1", "full_name": "acme/one"}
BOX = {"id": "B1", "sandbox_id": "sbx_1", "repo_id": "R1", "status": "running"}


def paths_asked(server: RawServer) -> List[str]:
    """The path and query of each request that a server got."""
    return [request.split()[1].replace("/api/v1/mogplex", "") for request in server.requests]


def repos_answering(repos: Any) -> RawServer:
    """A service with some sandboxes that answers ``repos``, bytes or None, for its repos."""
    boxes = [BOX, {**BOX, "id": "B2", "repo_id": "R2"}]

    def reply(number: int, request: str, connection: socket.socket) -> Any:
        if " /api/v1/mogplex/repos" in request:
            return repos
        return ok({"sandboxes": boxes})

    return RawServer(reply)


def test_sandboxes_list_names_repos_by_a_second_request_for_people_alone(
    cli: Callable[..., Result],
) -> None:
    with repos_answering(ok({"repos": [REPO_ROW, {"id": "R2", "full_name": None}, {}]})) as server:
        table = cli("sandboxes", "list", env=service(server.url))
        assert paths_asked(server) == ["/sandboxes?limit=200", "/repos?limit=200"]
        names = [line.split()[1] for line in table.out.splitlines()]
        assert (table.code, names, table.err) == (0, ["REPO", "acme/one", "R2"], "")
        for flags in (["--json"], ["--get", "repo_id"]):
            assert cli("sandboxes", "list", *flags, env=service(server.url)).code == 0
        assert len(server.requests) == 4


def test_sandboxes_of_a_repo_that_was_named_need_no_second_look(cli: Callable[..., Result]) -> None:
    with repos_answering(ok({"repos": [REPO_ROW]})) as server:
        named = cli("sandboxes", "list", "--repo", "acme/one", env=service(server.url))
        assert "acme/one" in named.out and len(server.requests) == 2


def test_the_name_of_a_single_repo_is_asked_for_by_its_id(cli: Callable[..., Result]) -> None:
    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        return ok({"sandboxes": [BOX], "repos": [REPO_ROW]})

    with RawServer(reply) as server:
        assert "acme/one" in cli("sandboxes", "list", "--repo", "R1", env=service(server.url)).out
        assert paths_asked(server)[1] == "/repos?id=R1&limit=200"


@pytest.mark.parametrize("repos", [
    refusal(429, "RATE_LIMITED", "slow down", Retry_After="60"), refusal(401, "UNAUTHORIZED", "no"),
    refusal(403, "FORBIDDEN", "no"), refusal(503, "SERVICE_UNAVAILABLE", "down"), answer(500),
    ok({"repos": None}), ok({"repos": ["odd", {"id": ["R1"], "full_name": {}}]}),
    answer(200, "<html>"), b"", None,
])
def test_sandboxes_list_does_without_names_that_cannot_be_had(
    cli: Callable[..., Result], repos: Optional[bytes],
) -> None:
    with repos_answering(repos) as server:
        result = cli("sandboxes", "list", env=service(server.url))
        assert len(server.requests) == 2  # which is not sent again
    repo_cells = [line.split()[1] for line in result.out.splitlines()]
    assert (result.code, repo_cells, result.err) == (0, ["REPO", "R1", "R2"], "")


def test_sandboxes_list_does_not_wait_long_for_names(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mogplex.REPO_NAMES_S <= 5.0
    monkeypatch.setattr(mogplex, "REPO_NAMES_S", 0.2)
    over = threading.Event()

    def reply(number: int, request: str, connection: socket.socket) -> Optional[bytes]:
        if number == 1:
            return ok({"sandboxes": [BOX]})
        over.wait(60)
        return None

    with RawServer(reply) as server:
        with ended_within(20):
            result = cli("sandboxes", "list", env=service(server.url))
        over.set()
    assert result.code == 0 and " R1 " in result.out


def test_an_empty_list_of_sandboxes_needs_no_names(cli: Callable[..., Result]) -> None:
    with one_answer(ok({"sandboxes": []})) as server:
        assert cli("sandboxes", "list", env=service(server.url)) == Result(0, "", "no sandboxes\n")
        assert len(server.requests) == 1


def remember_runs(home: Any, url: str, *repos: str) -> None:
    """Remembered runs, on these repos."""
    records = [{"id": f"run-{repo}", "service": url, "repo": repo, "task": "t",
                "time": "2026-11-24T04:25:54Z"} for repo in repos]
    home.mkdir(exist_ok=True)
    (home / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_runs_list_asks_for_names_only_where_an_id_was_remembered(
    cli: Callable[..., Result], tmp_path: Any,
) -> None:
    with one_answer(ok({"repos": [REPO_ROW]})) as server:
        env = service(server.url)
        remember_runs(tmp_path / "home", server.url, "acme/web", "acme/api")
        assert cli("runs", "list", env=env).code == 0 and server.requests == []
        remember_runs(tmp_path / "home", server.url, "acme/web", "R1")
        assert "R1" in cli("runs", "list", "--json", env=env).out and server.requests == []
        listed = cli("runs", "list", env=env)
        assert [line.split()[1] for line in listed.out.splitlines()] == ["REPO", "acme/one", "acme/web"]
        assert paths_asked(server) == ["/repos?id=R1&limit=200"]


@pytest.mark.parametrize("token", [TOKEN, "", "mog_\nx"])
def test_runs_list_works_offline_and_without_a_token(
    cli: Callable[..., Result], tmp_path: Any, token: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    remember_runs(tmp_path / "home", url, "R1")
    listed = cli("runs", "list", env=service(url, token))
    assert (listed.code, listed.err) == (0, "") and " R1 " in listed.out


def test_the_provider_s_id_of_a_sandbox_is_looked_up(
    run_demo: Callable[..., Result], demo: mogplex.DemoServer,
) -> None:
    box = mogplex.DEMO_SANDBOXES[0]
    by_record = run_demo("sandboxes", "logs", box["id"])
    assert run_demo("sandboxes", "logs", box["sandbox_id"]) == by_record and by_record.code == 0


def test_the_provider_s_id_of_a_sandbox_to_stop_is_looked_up(cli: Callable[..., Result]) -> None:
    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        if request.startswith("GET"):
            return ok({"sandboxes": [{"id": "B0", "sandbox_id": None}, BOX, {**BOX, "id": "old"}]})
        return ok({"sandbox": {"id": "B1", "status": "stopped"}})

    with RawServer(reply) as server:
        stopped = cli("sandboxes", "stop", "sbx_1", env=service(server.url))
        assert paths_asked(server) == ["/sandboxes?limit=200", "/sandboxes/B1/stop"]
    assert stopped == Result(0, "stop requested for sandbox sbx_1\nstatus: stopped\n", "")


@pytest.mark.parametrize("verb", ["logs", "stop"])
def test_a_provider_s_id_that_is_not_listed(run_demo: Callable[..., Result], verb: str) -> None:
    assert run_demo("sandboxes", verb, "sbx_nope\x1b[2J") == Result(
        1, "", "error: NOT_FOUND: the service lists no sandbox 'sbx_nope'\n"
        "find IDs via `mogplex sandboxes list`\n")


def test_stopping_a_sandbox_is_not_offered_until_it_is(
    run_demo: Callable[..., Result], cli: Callable[..., Result],
) -> None:
    now = run_demo("sandboxes", "stop", "s-1")
    assert (now.code, now.out) == (69, "")
    assert "cannot stop a sandbox yet" in now.err and "under Sandboxes: http" in now.err
    with one_answer(ok({"sandbox": {"id": "s-1", "status": "stopped"}})) as server:
        later = cli("sandboxes", "stop", "s-1", env=service(server.url))
    assert later == Result(0, "stop requested for sandbox s-1\nstatus: stopped\n", "")


def test_a_sandbox_to_stop_that_does_not_exist(cli: Callable[..., Result]) -> None:
    with one_answer(refusal(404, "NOT_FOUND", "Sandbox not found")) as server:
        result = cli("sandboxes", "stop", "s-1", env=service(server.url))
    assert result.code == 1 and "NOT_FOUND" in result.err


def test_sandbox_logs(run_demo: Callable[..., Result]) -> None:
    sandbox_id = mogplex.DEMO_SANDBOXES[0]["id"]
    shown = run_demo("sandboxes", "logs", sandbox_id)
    assert shown.code == 0 and shown.out.startswith("--- install_log ---\n")
    assert "sandbox_created" in shown.out
    flat = run_demo("sandboxes", "logs", sandbox_id, "--json")
    assert "lifecycle_events" in json.loads(flat.out)


@pytest.mark.parametrize("data, out, err", [
    ({"sandbox": {"install_log": "a\r\n\x1b[2Jb\n"}, "lifecycle_events": [{"event_type": "c\nd"}]},
     "--- install_log ---\na\nb\n  c \u23ce d\n", ""),
    ({"sandbox": {"id": "s"}, "lifecycle_events": []}, "", "no logs yet\n"),
])
def test_odd_sandbox_logs(cli: Callable[..., Result], data: Dict[str, Any], out: str, err: str) -> None:
    with one_answer(ok(data)) as server:
        result = cli("sandboxes", "logs", "s", env=service(server.url))
    assert result == Result(0, out, err)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_token_without_the_scope(
    run_demo: Callable[..., Result], demo: mogplex.DemoServer, flags: List[str],
) -> None:
    argv = ["run", "--repo", mogplex.DEMO_WEB, "x", *flags]
    result = run_demo(*argv, MOGPLEX_API_KEY=demo.read_token)
    assert (result.code, result.out) == (65, "")
    assert result.err.startswith("error: FORBIDDEN: Missing required scope: write.")
    assert "(HTTP 403)" in result.err


def test_no_credential_names_both_ways_to_give_one(cli: Callable[..., Result]) -> None:
    result = cli("repos", "list", env={"MOGPLEX_API_KEY": "  "})
    assert result.code == 64 and "mogplex login" in result.err and "MOGPLEX_API_KEY" in result.err


@pytest.mark.parametrize("token", ["mog_\nx", "mog_\x00", "mog x", "mog_\u00e9"])
def test_a_token_no_header_can_carry_is_not_printed(cli: Callable[..., Result], token: str) -> None:
    result = cli("repos", "list", env={"MOGPLEX_API_KEY": token.replace("\x00", "\x01")})
    assert result.code == 64 and "mog" not in result.err.replace("mogplex", "")


@pytest.mark.parametrize("argv, env", [
    (["--debug", "repos", "list"], {}),
    (["repos", "list", "--debug"], {}),
    (["repos", "list"], {"MOGPLEX_DEBUG": "1"}),
])
def test_debug_shows_requests_and_never_the_token(
    run_demo: Callable[..., Result], demo: mogplex.DemoServer, argv: List[str], env: Dict[str, str],
) -> None:
    result = run_demo(*argv, **env)
    path = re.escape(f"{demo.url}/api/v1/mogplex/repos")
    assert re.search(rf"debug: GET {path}\S* 200 \d+ ms \d+ bytes try 1", result.err)
    assert demo.token not in result.err + result.out


@pytest.mark.parametrize("argv", [
    ["--demo", "runs", "list", "--json"], ["runs", "list", "--json", "--demo"]])
def test_demo_before_and_after_the_subcommand(
    cli: Callable[..., Result], tmp_path: Any, argv: List[str],
) -> None:
    elsewhere = {**service("https://nowhere.invalid"), "NODE_ENV": "production"}
    result = cli(*argv, env=elsewhere)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0 and records[0]["id"] == RUNNING
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status, code", [
    (401, 64), (403, 65), (404, 1), (429, 75), (501, 69), (503, 69), (418, 1)])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_json_never_changes_an_exit_code(
    cli: Callable[..., Result], status: int, code: int, flags: List[str],
) -> None:
    with one_answer(refusal(status, "CODE", "text \x1b[2J", Retry_After="60")) as server:
        result = cli("repos", "list", *flags, env=service(server.url))
    assert (result.code, result.out) == (code, "")
    assert result.err.splitlines()[0] == f"error: CODE: text  (HTTP {status})"
    assert "asks to wait 60 s" in result.err


def test_a_refused_token_says_what_to_check(run_demo: Callable[..., Result]) -> None:
    assert run_demo("repos", "list", MOGPLEX_API_KEY=TOKEN) == Result(64, "", (
        "error: UNAUTHORIZED: Unauthorized (HTTP 401)\n"
        "the token was refused: check MOGPLEX_API_KEY, or sign in with `mogplex login`\n"))


@pytest.mark.posix
@pytest.mark.parametrize("location, code", [
    (None, 0),
    ("/api/v1/mogplex/repos?again", 1),
    ("http://localhost:{port}/api/v1/mogplex/repos", 1),
])
def test_a_netrc_entry_never_takes_the_token_s_place(
    cli: Callable[..., Result], tmp_path: Any, location: Optional[str], code: int,
) -> None:
    def reply(number: int, request: str, connection: socket.socket) -> bytes:
        if location is None:
            return ok({"repos": []})
        return answer(307, "", Location=location.format(port=server.url.rpartition(":")[2]))

    netrc = tmp_path / ".netrc"
    netrc.write_text(
        "default login someone password else\nmachine localhost login someone password else\n")
    netrc.chmod(0o600)
    with RawServer(reply) as server:
        result = cli("repos", "list", "--json", env=service(server.url))
    (request,) = server.requests
    assert result.code == code and "basic" not in request.lower()
    assert f"authorization: bearer {TOKEN}".lower() in request.lower()


def on_a_terminal(columns: int, *argv: str, env: Dict[str, str]) -> str:
    """What a command writes on a terminal so wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: os.environ[name] for name in os.environ if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*PROGRAM, *argv], stdin=slave, stdout=slave, stderr=slave,
        env={**inherited, "TERM": "xterm", **env})
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is how Linux says that the other side is closed
        while True:
            chunk = os.read(master, 65536)
            if not chunk:
                break
            shown += chunk
    os.close(master)
    assert process.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_a_command_goes_through_the_proxy_of_the_environment(cli: Callable[..., Result]) -> None:
    environ = {**service("https://nowhere.invalid"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    result = cli("repos", "list", env=environ)
    assert result.code == 69 and "proxy" in result.err.lower()


@pytest.mark.posix
@pytest.mark.parametrize("argv, env, sight", [
    (["bump", "the", "deps"], {}, "\u203a bump the deps"),
    (["--", "runs", "list"], {}, "\u203a runs list"),
    (["--logout", "bump", "it"], {}, "\u203a bump it"),
    (["--attach", FINISHED], {}, "SUCCESS"),
    (["--attach", FINISHED, "more"], {"MOGPLEX_ATTACH_RUN_ID": "nope"}, "SUCCESS"),
    ([], {"MOGPLEX_ATTACH_RUN_ID": FINISHED}, "SUCCESS"),
])
def test_what_the_cockpit_opens_on(
    demo: mogplex.DemoServer, argv: List[str], env: Dict[str, str], sight: str,
) -> None:
    """Words that are no command wait in the composer; the run is the option's, or the variable's."""
    environ = {**service(demo.url, demo.token), **env}
    with Terminal([*PROGRAM, *argv], **environ) as terminal:
        terminal.until(sight).send("\x03\x03")
        terminal.until(lambda: terminal.process.poll() is not None)
    assert demo.service.runs.keys() <= {seed["id"] for seed in mogplex.DEMO_RUNS}


@pytest.mark.posix
def test_a_table_on_a_terminal_has_ages_and_colours_and_keeps_its_ids(
    demo: mogplex.DemoServer,
) -> None:
    argv = ["sandboxes", "list", "--repo", "acme/web"]
    shown = on_a_terminal(100, *argv, env=service(demo.url, demo.token))
    plain = re.sub("\x1b\\[[0-9]*m", "", shown)
    assert "\x1b[32mrunning\x1b[0m" in shown
    assert re.search(r" \d+[smhd] ago", plain) and "\u2026" in plain
    assert max(map(len, plain.splitlines())) <= 100
    assert mogplex.DEMO_SANDBOXES[0]["id"] in plain


@pytest.mark.posix
def test_following_on_a_terminal_leaves_no_status_line_behind(demo: mogplex.DemoServer) -> None:
    argv = ["runs", "events", FINISHED, "--follow"]
    shown = on_a_terminal(100, *argv, env=service(demo.url, demo.token))
    screen = [line.split("\r")[-1] for line in shown.split("\n")]
    assert [line for line in screen if "| last event" in line] == [] and "duration: " in screen[-2]
    assert "success | last event" not in shown or "\r" in shown


def test_a_login_redirect_is_unauthorized_and_names_the_base_url(
    cli: Callable[..., Result],
) -> None:
    with one_answer(answer(307, "", Location="/login?next=%2Fx")) as server:
        result = cli("runs", "cancel", "R", env=service(server.url))
    assert result.code == 64 and "MOGPLEX_URL" in result.err and len(server.requests) == 1


def run_file(
    *argv: str, url: str = "", wrapper: Sequence[str] = (), program: Sequence[str] = PROGRAM,
    **settings: Any,
) -> "subprocess.Popen[bytes]":
    """The program as its user starts it, by itself or through a ``wrapper``."""
    env = {**os.environ, "PYTHONIOENCODING": "", **(service(url) if url else {}), **settings.pop("env", {})}
    settings.setdefault("stdin", subprocess.DEVNULL)
    settings.setdefault("stdout", subprocess.PIPE)
    settings.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([*wrapper, *program, *argv], env=env, **settings)


# The program, where it waits for the answer to what is under way but for a moment.
IMPATIENT = [sys.executable, "-c", "import mogplex, sys; mogplex.GRACE_S = 0.5; sys.exit(mogplex.main())"]


STREAMING = ok({
    "run": {"status": "streaming"}, "events": [{"id": "e", "type": "log", "message": "here"}]})
STILL_RUNNING = (
    "run {0} is still running\n"
    "follow: mogplex runs events {0} --follow\n"
    "cancel: mogplex runs cancel {0}\n"
)


def last_part(request: str) -> str:
    """The last part of the path that a request asks for."""
    path = request.split(" ")[1].partition("?")[0]
    return path.rpartition("/")[2]


def paths(server: RawServer) -> List[str]:
    """The last parts of the paths that a server was asked for."""
    return [last_part(request) for request in server.requests]


class Watched:
    """A command, and a service that can do something to it when it is asked for something.

    ``answer(path, process)`` gives the bytes to answer with.
    """

    def __init__(
        self, answer: Callable[[str, "subprocess.Popen[bytes]"], bytes], *argv: str,
        **settings: Any,
    ) -> None:
        started = threading.Event()

        def serve(count: int, request: str, connection: socket.socket) -> bytes:
            assert started.wait(60)
            return answer(last_part(request), self.process)

        with RawServer(serve) as self.server:
            self.process = run_file(*argv, url=self.server.url, **settings)
            started.set()
            out, err = self.process.communicate(timeout=60)
        self.code = self.process.returncode
        self.out = (out or b"").decode()
        self.err = err.decode()


@pytest.mark.posix
@pytest.mark.parametrize("number, code", ENDED_BY_SIGNAL)
@pytest.mark.parametrize("flags, cancelled", [([], False), (["--cancel-on-interrupt"], True)])
def test_interrupting_a_tail(number: int, code: int, flags: List[str], cancelled: bool) -> None:
    with RawServer(lambda *_: STREAMING) as server:
        process = run_file("runs", "events", "R", "--follow", *flags, url=server.url)
        assert process.stdout is not None and b"here" in process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert ("cancel" in paths(server)) is cancelled
    told = "cancellation requested for run R\n" if cancelled else STILL_RUNNING.format("R")
    assert err.decode() == told


@pytest.mark.posix
@pytest.mark.parametrize("number, code", ENDED_BY_SIGNAL)
@pytest.mark.parametrize("flags, cancelled", [
    (["--follow"], False), (["--follow", "--cancel-on-interrupt"], True), ([], False)])
def test_a_signal_during_the_start_waits_for_the_id(
    number: int, code: int, flags: List[str], cancelled: bool,
) -> None:
    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        if path == "runs":
            process.send_signal(number)
        return ok({"run": RUN, **RUN})

    done = Watched(answer, "run", "--repo", "r", "x", *flags)
    assert (done.code, done.out) == (code, mogplex.started_text(RUN, False) + "\n")
    assert paths(done.server) == ["runs", *(["cancel"] if cancelled else [])]
    told = STILL_RUNNING.format("run-uuid")
    if cancelled:
        told = "cancellation requested for run run-uuid\n"
    assert done.err == told


def test_ctrl_break_ends_a_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert "SIGBREAK" in mogplex.Interrupts.NAMES
    assert mogplex.Interrupted(21).exit == 130


PRINTS = """
import os, sys, mogplex
mogplex.Context(os.environ, sys.stdin, sys.stdout, sys.stderr).emit("\\u2713")
"""


@pytest.mark.parametrize("encoding, expected", [("", "\u2713"), ("ascii", "?")])
def test_a_pipe_gets_utf_8(encoding: str, expected: str) -> None:
    """Also on Windows, whose own code pages lack characters; PYTHONIOENCODING says otherwise."""
    environ = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], env=environ, stdout=subprocess.PIPE, timeout=60)
    assert done.stdout.decode("utf-8").rstrip("\r\n") == expected


def test_a_file_of_windows_obeys_no_sequences(tmp_path: Any) -> None:
    with open(tmp_path / "out", "w") as stream:
        assert mogplex.obeys_sequences(stream) == (os.name != "nt")


@pytest.mark.posix
def test_a_start_that_is_not_answered_does_not_hold_a_signal_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "GRACE_S", 0.01)
    waiting = threading.Event()
    interrupts = mogplex.Interrupts()
    interrupts.first = mogplex.Interrupted(signal.SIGTERM)
    with pytest.raises(mogplex.Interrupted):
        interrupts.outlast(lambda: {"answered": waiting.wait(60)})
    waiting.set()


def test_a_signal_that_python_discards_is_raised_again() -> None:
    """As inside a destructor, or the callback of a weak reference."""
    now = 100.0
    interrupts = mogplex.Interrupts(lambda: now)
    with contextlib.suppress(mogplex.Interrupted):
        interrupts.arrived(signal.SIGTERM, None)
    with pytest.raises(mogplex.Interrupted) as found:
        interrupts.check()
    assert found.value.exit == 143
    interrupts.arrived(signal.SIGTERM, None)  # the second of GNU timeout
    now += 2.0
    with pytest.raises(mogplex.Interrupted):
        interrupts.arrived(signal.SIGINT, None)
    with interrupts.postponed():
        interrupts.check()
        interrupts.arrived(signal.SIGINT, None)


@pytest.mark.parametrize("run_ids", [["R"], ["R", "S"]], ids=len)
def test_a_signal_that_python_discarded_ends_the_following(run_ids: List[str]) -> None:
    with RawServer(lambda *_: STREAMING) as server:
        environ = service(server.url, TOKEN)
        ctx = mogplex.Context(environ, sys.stdin, io.StringIO(), io.StringIO())
        ctx.interrupts.first = mogplex.Interrupted(signal.SIGTERM)
        options = {"follow": True, "cancel_on_interrupt": True}
        with pytest.raises(mogplex.Interrupted):
            mogplex.cmd_runs_events(ctx, *run_ids, **options)
    assert paths(server).count("cancel") == len(run_ids)
    cancelled = ctx.stderr.getvalue().splitlines()[:len(run_ids)]
    assert cancelled == [f"cancellation requested for run {run_id}" for run_id in run_ids]


def test_a_bug_in_the_look_at_one_of_several_runs_is_raised() -> None:
    class Broken(mogplex.Client):
        def open_events(self, *given: Any, **options: Any) -> Any:
            raise ZeroDivisionError

    with Broken(TOKEN, "https://mogplex.invalid") as one:
        with pytest.raises(ZeroDivisionError):
            list(mogplex.tail_many(one, ["R", "S"], timeout_s=60.0))


@pytest.mark.posix
@pytest.mark.slow
def test_an_interrupted_start_without_an_answer_tells_its_key() -> None:
    left = threading.Event()

    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        process.send_signal(signal.SIGINT)
        left.wait(60)  # longer than the command does
        return b""

    argv = ["run", "--repo", "r", "x", "--idempotency-key", "K-1"]
    done = Watched(answer, *argv, program=IMPATIENT)
    left.set()
    assert (done.code, done.out) == (130, "") and "add --idempotency-key K-1\n" in done.err


@pytest.mark.posix
def test_further_signals_do_not_end_the_cancellation() -> None:
    """GNU timeout sends two, CI runners an interrupt and then SIGTERM."""
    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if path == "cancel" or number == signal.SIGINT:
                process.send_signal(number)
        return ok({"run": {"status": "streaming"}, "events": [], **RUN})

    done = Watched(answer, "run", "--repo", "r", "x", "--follow", "--cancel-on-interrupt")
    assert done.code == 130 and paths(done.server)[-1] == "cancel"
    assert done.err == "cancellation requested for run run-uuid\n"


@pytest.mark.posix
def test_a_signal_does_not_end_the_cancellation_after_the_reader_of_stdout_has_gone() -> None:
    """Ctrl+C in ``mogplex ... | tee log`` is for both of them, and ``tee`` may go first."""
    ours, theirs = os.pipe()
    os.close(ours)

    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        if path == "cancel":
            process.send_signal(signal.SIGINT)
        return ok({"run": RUN, **RUN})

    argv = ["run", "--repo", "r", "x", "--follow", "--cancel-on-interrupt"]
    done = Watched(answer, *argv, stdout=theirs)
    os.close(theirs)
    assert (done.code, done.err) == (141, "cancellation requested for run run-uuid\n")


@pytest.mark.posix
def test_a_cancellation_is_tried_again_while_the_sandbox_is_not_ready() -> None:
    refused = [
        refusal(409, "CONFLICT", "Sandbox not ready"),
        refusal(503, "SERVICE_UNAVAILABLE", "Oops"),
    ]

    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        if path == "events":
            process.send_signal(signal.SIGTERM)
            return STREAMING
        return refused.pop() if refused else ok({"status": "cancellation_requested"})

    done = Watched(answer, "runs", "events", "R", "--follow", "--cancel-on-interrupt")
    assert (done.code, paths(done.server)) == (143, ["events", "cancel", "cancel", "cancel"])
    assert done.err == "cancellation requested for run R\n"


@pytest.mark.posix
@pytest.mark.parametrize("error, told", [
    (refusal(403, "FORBIDDEN", "Scope"), "FORBIDDEN: Scope (HTTP 403)"),
    (refusal(409, "CONFLICT", "Not ready"), "CONFLICT: Not ready (HTTP 409)"),  # till the end
])
@pytest.mark.slow
def test_a_cancellation_that_fails_says_that_the_run_is_still_running(
    error: bytes, told: str,
) -> None:
    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        if path == "events":
            process.send_signal(signal.SIGTERM)
            return STREAMING
        return error

    argv = ["runs", "events", "R", "--follow", "--cancel-on-interrupt"]
    done = Watched(answer, *argv, program=IMPATIENT)
    told = f"cannot cancel the run: {told}\n" + STILL_RUNNING.format("R")
    assert (done.code, done.err) == (143, told)


@pytest.mark.posix
def test_a_signal_that_is_ignored_at_the_start_stays_ignored() -> None:
    """As nohup and ``&`` in a script ask for."""
    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGHUP)
        return ok({"repos": []})

    shell = 'trap "" INT HUP; exec "$@"'
    done = Watched(answer, "repos", "list", "--json", wrapper=["sh", "-c", shell, "sh"])
    assert (done.code, done.out, done.err) == (0, "", "")


@pytest.mark.posix
def test_a_killed_start_is_remembered_as_one_in_doubt(cli: Callable[..., Result]) -> None:
    def kill(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        process.kill()
        process.wait()
        return b""

    done = Watched(kill, "run", "--repo", "r", "Fix it")
    key = re.findall(r"(?i)idempotency-key: (\S+)", done.server.requests[0])[0]
    env = service(done.server.url)
    listed = cli("runs", "list", env=env)
    assert listed.code == 0 and "--idempotency-key" in listed.err
    assert f"in doubt: key {key}" in listed.out
    records = [json.loads(line) for line in cli("runs", "list", "--json", env=env).out.splitlines()]
    (record,) = records
    assert (record["key"], record["task"], record.get("id")) == (key, "Fix it", None)
    assert cli("runs", "get", env=env).code == 2  # which has no id to ask for


@pytest.mark.parametrize("task, key, told", [
    ("Fix it", [], True), ("Fix it", ["--idempotency-key", "other"], True), ("Fix that", [], False),
    ("Fix it", ["--idempotency-key", "K-1"], False),
])
def test_a_start_in_doubt_is_told_to_the_next_of_the_same_request(
    cli: Callable[..., Result], task: str, key: List[str], told: bool,
) -> None:
    with one_answer(ok(RUN)) as server:
        start = mogplex.start_record(server.url, {"repoId": "r", "prompt": "Fix it"}, "K-1", "r")
        mogplex.Home(os.environ["MOGPLEX_HOME"]).record_start(start)
        result = cli("run", "--repo", "r", task, *key, env=service(server.url))
    assert result.code == 0
    assert ("may have gone through" in result.err) is told
    assert ("--idempotency-key K-1" in result.err) is told


@pytest.mark.parametrize("again", [
    refusal(409, "IDEMPOTENCY_CONFLICT", "Same key, other body"),
    refusal(401, "UNAUTHORIZED", "Unauthorized"),
])
def test_a_run_stays_remembered_when_its_key_is_used_again_in_vain(
    cli: Callable[..., Result], again: bytes,
) -> None:
    with RawServer(lambda count, *_: ok(RUN) if count == 1 else again) as server:
        env = service(server.url)
        argv = ["run", "--repo", "r", "--idempotency-key", "K"]
        assert [cli(*argv, task, env=env).code for task in ("x", "y")] != [0, 0]
        listed = cli("runs", "list", "--json", env=env)
    assert [json.loads(line)["id"] for line in listed.out.splitlines()] == ["run-uuid"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_a_start_that_is_refused_for_good_is_forgotten(
    cli: Callable[..., Result], status: int,
) -> None:
    with one_answer(refusal(status, "CODE", "No")) as server:
        assert cli("run", "--repo", "r", "x", env=service(server.url)).code != 0
        assert cli("runs", "list", "--json", env=service(server.url)) == Result(0, "", "")


def test_a_replay_is_remembered_once(cli: Callable[..., Result]) -> None:
    with one_answer(ok(RUN)) as server:
        argv = ["run", "--repo", "r", "x", "--idempotency-key", "K"]
        for _ in range(2):
            assert cli(*argv, env=service(server.url)).code == 0
        assert len(cli("runs", "list", "--json", env=service(server.url)).out.splitlines()) == 1


@pytest.mark.posix
def test_the_id_is_out_before_the_history_is_written(tmp_path: Any) -> None:
    (tmp_path / "home").mkdir()
    lock = open(tmp_path / "home" / "runs.jsonl.lock", "w", encoding="ascii")

    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return ok(RUN)

    with RawServer(serve) as server:
        process = run_file("run", "--repo", "r", "x", url=server.url)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"started run run-uuid ")
        lock.close()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.posix
def test_a_signal_before_a_start_is_sent_sends_none(tmp_path: Any) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with open(home / "runs.jsonl.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with RawServer(steps(ok(RUN))) as server:
            process = run_file("run", "--repo", "r", "x", url=server.url)
            assert process.stderr is not None
            assert b"waiting for another process" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)  # it has the signal before it has the lock
            fcntl.flock(lock, fcntl.LOCK_UN)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err, server.requests) == (130, b"", b"", [])
    assert (home / "runs.jsonl").read_text() == ""


@pytest.mark.parametrize("run_ids", [["R"], ["R", "S"]])
def test_a_time_out_cancels_no_run(cli: Callable[..., Result], run_ids: List[str]) -> None:
    with RawServer(lambda *_: STREAMING) as server:
        argv = ["runs", "events", *run_ids, "--follow", "--cancel-on-interrupt"]
        result = cli(*argv, "--timeout", "0.3", env=service(server.url))
    assert result.code == 1 and "run R is still running\n" in result.err
    assert "cancel" not in paths(server)


@pytest.mark.posix
def test_a_run_whose_stdout_is_gone_in_the_middle_is_cancelled_where_that_was_asked_for() -> None:
    """Ctrl+C in ``mogplex ... | tee log`` is for both of them."""
    polled = threading.Event()

    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        if count > 1:
            polled.wait(60)
        return STREAMING

    with RawServer(serve) as server:
        argv = ["runs", "events", "R", "--follow", "--cancel-on-interrupt"]
        with run_file(*argv, url=server.url) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline()
            process.stdout.close()
            polled.set()
            assert process.wait(60) == 141
            assert process.stderr.read() == b"cancellation requested for run R\n"
    assert paths(server)[-1] == "cancel"


@pytest.mark.posix
def test_a_reader_that_leaves_ends_a_silent_tail_at_once_and_quietly() -> None:
    served = threading.Event()

    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        if count > 1:
            served.wait(60)  # the silence in which the reader leaves
        return ok({"run": {"status": "streaming"}, "events": [{"id": "e", "type": "log", "message": "here"}]})

    with RawServer(serve) as server:
        process = run_file("runs", "events", "R", "--follow", url=server.url)
        assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141 and process.communicate()[1] == b""
        served.set()


@pytest.mark.posix
@pytest.mark.parametrize("redirection, code, told", [
    (">/dev/full", 1, "error: cannot write to stdout: No space left on device"),
    (">&-", 1, "error: stdout is closed"),
    ("2>&-", 0, ""),
    ("2>/dev/full", 0, ""),
])
def test_a_stream_that_takes_nothing(
    demo: mogplex.DemoServer, redirection: str, code: int, told: str,
) -> None:
    command = f"{shlex.join(PROGRAM)} repos list {redirection}"
    environ = {**os.environ, **service(demo.url, demo.token)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, env=environ)
    assert (done.returncode, done.stderr.decode().strip()) == (code, told)


@pytest.mark.posix
def test_a_reader_of_one_byte_ends_a_list_quietly(demo: mogplex.DemoServer) -> None:
    program = f"{shlex.join(PROGRAM)} repos list --json"
    command = f"{program} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    environ = {**os.environ, **service(demo.url, demo.token)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, env=environ)
    assert done.returncode in (0, 141) and done.stderr == b""


@pytest.mark.posix
@pytest.mark.parametrize("flags", [["--json"], []])
def test_a_stdout_that_does_not_block_is_waited_for(flags: List[str]) -> None:
    repos = [{"id": str(number), "full_name": "x" * 2000} for number in range(150)]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with one_answer(ok({"repos": repos})) as server:
        process = run_file("repos", "list", *flags, url=server.url, stdout=writing)
        os.close(writing)
        with open(reading, "rb") as pipe:
            while process.poll() is None and waiting_bytes(reading) < 32768:
                time.sleep(0.01)  # until the pipe is full, or at least nearly so
            lines = pipe.read().splitlines()
        assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0
    assert len(lines) == 150 + (not flags) and all(len(line) >= 2000 for line in lines[1:])


def waiting_bytes(descriptor: int) -> int:
    """How many bytes stand in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0])


@pytest.mark.posix
def test_a_browser_gets_neither_the_token_nor_our_streams(
    tmp_path: Any, capfd: pytest.CaptureFixture[str],
) -> None:
    seen = tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(
        f'#!/bin/sh\necho words of the browser; echo more >&2\n(echo "$1"; env) > "{seen}"\n')
    browser.chmod(0o755)
    ours = service("http://127.0.0.1:1")
    environ = {**os.environ, **ours, "BROWSER": f"{browser} %s", "KEPT": "yes"}
    context = mogplex.Context(environ, sys.stdin, sys.stdout, sys.stderr)
    assert context.browse("https://a.example/?a=1&b=2") is True
    url, *variables = seen.read_text().splitlines()
    assert url == "https://a.example/?a=1&b=2" and "KEPT=yes" in variables
    assert [line for line in variables if line.startswith("MOGPLEX_") or TOKEN in line] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.posix
def test_a_host_without_a_browser_says_so(tmp_path: Any) -> None:
    environ = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    context = mogplex.Context(environ, sys.stdin, sys.stdout, sys.stderr)
    assert context.browse("https://a.example/") is False


@pytest.mark.posix
def test_a_module_in_the_way_does_not_open_the_browser(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The working directory is a checkout, whose files are not to be trusted."""
    (tmp_path / "webbrowser.py").write_text("open('taken', 'w'); open = lambda url: True")
    monkeypatch.chdir(tmp_path)
    environ = {**os.environ, "BROWSER": "/bin/false", "PYTHONPATH": str(tmp_path)}
    context = mogplex.Context(environ, sys.stdin, sys.stdout, sys.stderr)
    context.browse("https://a.example/")
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("environ, trusted", [
    ({}, True),
    ({"SSL_CERT_FILE": "c", "CURL_CA_BUNDLE": "b", "REQUESTS_CA_BUNDLE": "a"}, "a"),
    ({"SSL_CERT_FILE": "c", "SSL_CERT_DIR": "{here}"}, "c"),
    ({"SSL_CERT_DIR": "{here}"}, "{here}"),
    ({"SSL_CERT_DIR": os.pathsep.join(["{here}/none", "{here}"])}, "{here}"),
    ({"SSL_CERT_DIR": "{here}/none"}, True),
    ({"SSL_CERT_DIR": ""}, True),
])
def test_the_certificates_that_the_environment_names(
    tmp_path: Any, environ: Dict[str, str], trusted: Union[bool, str],
) -> None:
    here = str(tmp_path)
    given = {name: value.replace("{here}", here) for name, value in environ.items()}
    expected = trusted.replace("{here}", here) if isinstance(trusted, str) else trusted
    assert mogplex.trusted_certificates(given) == expected


def test_the_certificates_of_the_environment_are_those_of_every_command(
    cli: Callable[..., Result],
) -> None:
    environ = {**service("https://127.0.0.1:9"), "SSL_CERT_FILE": "/nowhere.pem"}
    assert "CA certificates" in cli("repos", "list", env=environ).err


def test_the_token_is_on_no_stream(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where an escape sequence, which is taken out, had split it."""
    context = mogplex.Context({"MOGPLEX_API_KEY": TOKEN}, sys.stdin, sys.stdout, sys.stderr)
    context.emit(f"data {TOKEN}")
    context.note(f"note {TOKEN} {TOKEN[:9]}\x1b[0m{TOKEN[9:]}")
    assert capsys.readouterr() == ("data ***\n", "note *** ***\n")
    context.credential = mogplex.Credential("another-token-of-a-sign-in")
    context.emit("another-token-of-a-sign-in")
    assert capsys.readouterr().out == "***\n"


@pytest.mark.posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_the_id_of_a_run_is_not_lost_with_stdout() -> None:
    with one_answer(ok(RUN)) as server, open("/dev/full", "wb") as full:
        process = run_file("run", "--repo", "r", "x", url=server.url, stdout=full)
        told = process.communicate(timeout=60)[1].decode()
    failure = "error: cannot write to stdout: No space left on device\n"
    assert (process.returncode, told) == (1, STILL_RUNNING.format("run-uuid") + failure)


@pytest.mark.posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.slow
def test_a_run_that_has_ended_is_not_said_to_be_running_when_stdout_is_full() -> None:
    ended_run = ok({"run": {"status": "success"}, "events": []})
    with one_answer(ended_run) as server, open("/dev/full", "wb") as full:
        process = run_file("runs", "events", "R", "--follow", url=server.url, stdout=full)
        told = process.communicate(timeout=60)[1].decode()
    failure = "error: cannot write to stdout: No space left on device\n"
    assert (process.returncode, told) == (1, failure)


@pytest.mark.posix
@pytest.mark.parametrize("flags, told", [
    ([], STILL_RUNNING.format("run-uuid")),
    (["--follow"], STILL_RUNNING.format("run-uuid")),
    (["--follow", "--cancel-on-interrupt"], "cancellation requested for run run-uuid\n"),
])
def test_the_id_of_a_run_is_not_lost_with_the_reader_of_stdout(
    cli: Callable[..., Result], tmp_path: Any, flags: List[str], told: str,
) -> None:
    """As in ``mogplex run ... | true``. The history and CI have it too."""
    ours, theirs = os.pipe()
    os.close(ours)
    output = tmp_path / "output"
    output.touch()
    env = {"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(output)}
    with one_answer(ok({"run": RUN, **RUN})) as server:
        process = run_file("run", "--repo", "r", "x", *flags, url=server.url, stdout=theirs, env=env)
        os.close(theirs)
        err = process.communicate(timeout=60)[1].decode()
        listed = cli("runs", "list", "--json", env=service(server.url))
    assert process.returncode == 141 and err.startswith(told + "::error ")
    assert json.loads(listed.out)["id"] == "run-uuid"
    assert output.read_text().startswith("run_id=run-uuid\n")


def test_an_encoding_that_lacks_a_character_gets_a_replacement(demo: mogplex.DemoServer) -> None:
    ours = service(demo.url, demo.token)
    environ = {**os.environ, **ours, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = [*PROGRAM, "runs", "events", FINISHED]
    done = subprocess.run(argv, capture_output=True, timeout=60, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout and done.stdout.isascii()


def test_without_requests_a_command_says_how_to_install_it(
    run_demo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "requests", None)  # what Python itself does for "not there"
    result = run_demo("repos", "list")
    assert (result.code, result.out) == (1, "")
    assert "the package 'requests' is missing" in result.err
    assert "python3 -m pip install requests" in result.err


def test_without_tabulate_a_table_is_tab_separated(
    run_demo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tabulate", None)
    result = run_demo("repos", "list", "--query", "docs")
    titles, row = result.out.splitlines()
    assert titles.startswith("ID\tREPO\t") and "\tacme/docs\ttrunk\twebsite" in row
    assert result.err == "the package 'tabulate' is missing: the table is tab-separated\n"
    assert run_demo("repos", "list", "--query", "zzz", "--json") == Result(0, "", "")


API = "/api/v1/mogplex"


def api(server: RawServer, *argv: str, cli: Callable[..., Result]) -> Result:
    """``mogplex api`` with a service."""
    return cli("api", *argv, env=service(server.url))


@pytest.mark.parametrize("argv, line, body", [
    (["/repos"], f"GET {API}/repos", ""),
    (["repos"], f"GET {API}/repos", ""),
    ([f"{API}/repos"], f"GET {API}/repos", ""),
    (["get", "/repos?q=a%20b"], f"GET {API}/repos?q=a%20b", ""),
    (["GET", "/x?a=1", "--field", "q=a b&c", "--field", "limit:=5", "--field", "b:=true"],
     f"GET {API}/x?a=1&q=a+b%26c&limit=5&b=true", ""),
    (["/x", "--field", "a=5", "--field", "b:=[1, null]", "--field", "c=x=:=y"],
     f"POST {API}/x", '{"a": "5", "b": [1, null], "c": "x=:=y"}'),
    (["POST", "/x?y=1"], f"POST {API}/x?y=1", ""),
    (["PATCH", "/x", "--field", "a="], f"PATCH {API}/x", '{"a": ""}'),
    (["/x", "--field", "a=b\nc"], f"POST {API}/x", '{"a": "b\\nc"}'),
    (["delete", "/repos/r/env-vars"], f"DELETE {API}/repos/r/env-vars", ""),
])
def test_api_sends_what_it_is_told(
    cli: Callable[..., Result], argv: List[str], line: str, body: str,
) -> None:
    with one_answer(ok({"b": 1, "a": "\x9b2J"})) as server:
        result = api(server, *argv, cli=cli)
    assert result == Result(0, '{"b":1,"a":"\\u009b2J"}\n', "")
    head, _, sent = server.requests[0].partition("\r\n\r\n")
    assert head.splitlines()[0] == f"{line} HTTP/1.1"
    assert sent == body
    key = re.search(r"(?m)^Idempotency-Key: (.*)\r$", head + "\r")
    assert bool(key) is line.startswith("POST")
    assert key is None or mogplex.is_uuid(key.group(1))


@pytest.mark.parametrize("path", [
    "https://evil.example/x", "//evil.example/x", "///x", "/\\evil.example/x", "\\\\evil.example\\x",
    "/../x", "../x", "..", "/x/..", "/x/../../../admin", "/x/./y", "/x/%2e%2e/y", "/x/.%2E/y", "/x/%2e",
    "/x/%252e%252e/y", "/x/..;/y", "/x/%c0%ae%c0%ae/y%00", "/x%2f..%2fy", "/x%252fy", "/x%5Cy", "/x\\y",
    "/x#y", "/x%23/../y", "/x?y#z", "/x y", "/x%20y", "/x?y z", "/x\ny", "/x%0ay", "/x%0d%0aHost:evil",
    "/x?a=%0", "/x%zz", "/x%", "/x\x1by", "/x%c2%9by", "/x%e2%80%aey", "/caf\xe9", "/x\udcff",
    "", "/", "/x/", "/x//y", "@evil.example/", "http:/x//y",
    API, f"{API}/", f"{API}?a=1", f"{API}/../other", f"{API}//x", f"{API}x/y", "/api", "/api/v1/other",
    "/api/auth/mcp/token", "api/v1/mogplex/api/v1", f"{API}{API}/x",
])
def test_api_reaches_nothing_outside_the_api(cli: Callable[..., Result], path: str) -> None:
    with one_answer(ok({})) as server:
        result = api(server, path, cli=cli)
    assert (result.code, result.out, server.requests) == (2, "", [])
    assert result.err.startswith("error: api: invalid path '")


@pytest.mark.parametrize("argv, words", [
    (["/x", "--field", "a=1", "--input", "-"], "the body is made of --field or read by --input, not both"),
    (["GET", "/x", "--input", "-"], "a GET has no --input"),
    (["/x", "--idempotency-key", "k"], "a GET has no --idempotency-key"),
    (["POST", "/x", "--idempotency-key", " "], "an idempotency key has 1 to 200 printable ASCII characters"),
    (["POST", "/x", "--idempotency-key", "k\n"], "an idempotency key has 1 to 200 printable ASCII characters"),
    (["POST", "/x", "--idempotency-key", "ci:a"], "--idempotency-key ci is for `mogplex run` alone"),
    (["/x", "--field", "a"], "--field takes NAME=VALUE or NAME:=JSON, not 'a'"),
    (["/x", "--field", "=a"], "--field takes NAME=VALUE or NAME:=JSON, not '=a'"),
    (["/x", "--field", ":=1"], "--field takes NAME=VALUE or NAME:=JSON, not ':=1'"),
    (["/x", "--field", "a:={"], "--field a: '{' is not JSON"),
    (["/x", "--field", "a=1", "--field", "a=2"], "--field a is given twice"),
    (["HEAD", "/x"], "the method is one of GET, POST, PUT, PATCH, DELETE, not 'HEAD'"),
    (["/x", "--input", "no-such-file"], "--input no-such-file: No such file or directory"),
    (["/x", "--input", "a\0b"], "cannot be read"),
])
def test_api_refuses_what_it_cannot_send(
    cli: Callable[..., Result], argv: List[str], words: str,
) -> None:
    with one_answer(ok({})) as server:
        result = api(server, *argv, cli=cli)
    assert (result.code, result.out, server.requests) == (2, "", [])
    assert words in result.err.splitlines()[0]


@pytest.mark.parametrize("text, code", [
    ('\ufeff{"a": [1.5, "\\u00e9"]}\n', 0), ("", 2), ("{", 2), ("\udcff", 2), ('{"a": NaN}', 2), ("[1]", 2), ("null", 2)])
def test_api_sends_json_from_a_file(
    cli: Callable[..., Result], tmp_path: Any, text: str, code: int,
) -> None:
    file = tmp_path / "body.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with one_answer(ok({})) as server:
        result = api(server, "/x", "--input", str(file), cli=cli)
    assert result.code == code
    assert len(server.requests) == (code == 0)
    assert code or server.requests[0].endswith('{"a": [1.5, "\\u00e9"]}')


def test_api_hides_the_configs_of_mcp_servers_unless_the_envelope_is_asked_for(
    cli: Callable[..., Result],
) -> None:
    data = {"servers": [{"name": "a", "config": {"token": "s3"}}, {"name": "b", "config": None}]}
    hidden = '{"servers":[{"name":"a","config":"[hidden]"},{"name":"b","config":"[hidden]"}]}\n'
    for path in ("/mcp/servers", "/%6dcp/servers", "/MCP/servers", "mcp/servers?a=1"):
        with one_answer(ok(data)) as server:
            assert api(server, path, cli=cli) == Result(0, hidden, "")
    with one_answer(ok(data)) as server:
        result = api(server, "/mcp/servers", "--envelope", cli=cli)
    assert json.loads(result.out) == {"ok": True, "data": data}


MAY_BE_DONE = "the request may have been carried out: "


@pytest.mark.parametrize("path, tries, advice", [
    ("/automations/a/trigger", 3,
     "to find out without doing it twice, repeat it with --idempotency-key k-1"),
    ("/sandboxes", 1, "look before you send it again (its idempotency key: k-1)"),
    ("/automations/a/publish", 1, "look before you send it again (its idempotency key: k-1)"),
])
def test_api_says_what_to_do_when_a_post_may_have_been_carried_out(
    cli: Callable[..., Result], path: str, tries: int, advice: str,
) -> None:
    with RawServer(steps(b"")) as server:
        result = api(server, "POST", path, "--idempotency-key", "k-1", cli=cli)
    lost = "error: UNAVAILABLE: the connection was lost\n"
    assert result == Result(69, "", f"{MAY_BE_DONE}{advice}\n{lost}")
    assert len(server.requests) == tries
    with one_answer(refusal(403, "FORBIDDEN", "No scope")) as server:
        result = api(server, "POST", path, cli=cli)
    assert result == Result(65, "", "error: FORBIDDEN: No scope (HTTP 403)\n")


def test_api_repeats_a_trigger_under_the_random_key_of_its_first_try(
    cli: Callable[..., Result],
) -> None:
    with RawServer(steps(b"", ok({"a": 1}))) as server:
        assert api(server, "POST", "automations/a/trigger", cli=cli) == Result(0, '{"a":1}\n', "")
    first, again = [re.findall(r"Idempotency-Key: (\S+)", text) for text in server.requests]
    assert first == again and mogplex.is_uuid(first[0])


def test_api_tells_the_random_key_of_a_start_whose_answer_is_lost(
    cli: Callable[..., Result],
) -> None:
    with RawServer(steps(b"")) as server:
        result = api(server, "runs", "--field", "repoId=r", "--field", "prompt=x", cli=cli)
        listed = cli("runs", "list", "--get", "key", env=service(server.url))
    (key,) = set(re.findall(r"Idempotency-Key: (\S+)", "".join(server.requests)))
    assert f"--idempotency-key {key}\n" in result.err
    assert (result.code, listed.out) == (69, f"{key}\n")


@pytest.mark.posix
def test_api_tells_the_key_of_a_start_that_is_interrupted() -> None:
    asked = threading.Event()
    ended = threading.Event()

    def wait(_: socket.socket) -> None:
        asked.set()
        ended.wait(60)

    with RawServer(steps(wait)) as server:
        process = subprocess.Popen(
            [*PROGRAM, "api", "POST", "runs", "--idempotency-key", "k-1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **service(server.url)})
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
        ended.set()
    assert (process.returncode, out) == (-signal.SIGINT, b"") or process.returncode == 130
    assert b"--idempotency-key k-1\n" in told


@pytest.mark.parametrize("path, is_in_time", [("sandboxes", True), ("x", False)])
def test_api_waits_for_the_launch_of_a_sandbox_longer_than_for_anything_else(
    path: str, is_in_time: bool,
) -> None:
    sent = threading.Event()

    def late(connection: socket.socket) -> None:
        sent.wait(0.5)
        with contextlib.suppress(OSError):
            connection.sendall(ok({"sandbox": {}}))

    with RawServer(steps(late)) as server:
        with client(server.url, timeout_s=0.2, tries=1) as one:
            try:
                one.envelope("POST", "/" + path, body={})
            except mogplex.UnavailableError:
                assert not is_in_time
            else:
                assert is_in_time
            sent.set()


@pytest.mark.parametrize("reply, code, message", [
    (answer(307, b"", Location="/login?next=x"), 64, ""),
    (answer(307, b"", Location="https://evil.example/x"), 1, "evil.example"),
    (refusal(401, "UNAUTHORIZED", "Unauthorized"), 64, "Unauthorized"),
    (refusal(404, "NOT_FOUND", "Gone"), 1, "NOT_FOUND: Gone (HTTP 404)"),
    (refusal(429, "RATE_LIMITED", "Slow", Retry_After="60"), 75, "Slow"),
    (refusal(501, "SERVICE_UNAVAILABLE", "Not yet"), 69, "Not yet"),
    (answer(200, b"<html>"), 1, "unexpected response"),
    (answer(200, b'{"ok": true}'), 1, "unexpected response"),
    (answer(200, b'{"ok": true, "data": ' + b"[" * 99999), 1, "unexpected response"),
], ids=short)
def test_api_ends_with_the_exit_codes_of_every_command(
    cli: Callable[..., Result], reply: bytes, code: int, message: str,
) -> None:
    with one_answer(reply) as server:
        result = api(server, "POST", "x", cli=cli)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert len(server.requests) == 1


def test_api_shows_an_answer_of_any_depth_or_says_that_it_is_none(
    cli: Callable[..., Result],
) -> None:
    for depth in (800, 900, 1000, 2000, 5000):
        deep = b'{"ok":true,"data":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        with one_answer(answer(200, deep)) as server:
            for path in ("mcp/servers", "x"):
                result = api(server, "GET", path, cli=cli)
                assert result.code in (0, 1)
                assert result.out == "" or result.code == 0


def test_api_hides_our_token_in_an_answer(cli: Callable[..., Result]) -> None:
    with one_answer(ok({"echo": f"Bearer {TOKEN}"})) as server:
        for options in ([], ["--envelope"]):
            result = api(server, "x", *options, cli=cli)
            assert result.code == 0 and TOKEN not in result.out and "***" in result.out


@pytest.mark.posix
def test_api_reads_the_whole_of_a_stdin_that_does_not_block() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with one_answer(ok({})) as server:
        process = subprocess.Popen(
            [*PROGRAM, "api", "x", "--input", "-"], stdin=reading,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **service(server.url)})
        for piece in (b'{"a":', b' "b"', b"}"):
            os.write(writing, piece)
            while select.select([reading], [], [], 0)[0] and process.poll() is None:  # not yet read
                time.sleep(0.01)
        os.close(reading)
        os.close(writing)
        assert process.communicate(timeout=60)[0] == b"{}\n"
    assert server.requests[0].endswith('\r\n\r\n{"a": "b"}')


def test_api_refuses_an_input_that_is_too_large(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "MAX_BODY", 9)
    result = cli("api", "x", "--input", "-", env=service("http://127.0.0.1:9"), stdin='{"a": 123}')
    assert (result.code, result.out) == (2, "")
    assert "api: --input - is larger than" in result.err


def test_a_run_that_api_starts_is_remembered(cli: Callable[..., Result]) -> None:
    argv = ["/runs", "--field", "repoId=r", "--field", "prompt=Do it", "--idempotency-key", "k-1"]
    with RawServer(steps(b"")) as server:
        assert api(server, *argv, cli=cli).code == 69
        listed = cli("runs", "list", "--json", env=service(server.url))
    assert json.loads(listed.out)["key"] == "k-1"
    with one_answer(ok(RUN)) as server:
        result = api(server, *argv, "--get", "runId", cli=cli)
        assert result == Result(0, "run-uuid\n", "")
        listed = cli("runs", "list", "--json", env=service(server.url))
    assert json.loads(listed.out)["id"] == "run-uuid"


def test_api_serves_automations_which_have_no_command_of_their_own(
    cli: Callable[..., Result],
) -> None:
    with mogplex.DemoServer(speed=1e6) as demo:
        env = service(demo.url, demo.token)
        automation = cli("api", "/automations", "--get", "automations.0.id", env=env).out.strip()
        repo = cli("repos", "list", "--get", "id", env=env).out.splitlines()[0]
        trigger = ["api", f"/automations/{automation}/trigger", "--field", f"repoId={repo}",
                   "--idempotency-key"]
        other, first, again = [
            json.loads(cli(*trigger, key, env=env).out)["run"] for key in ("other", "k", "k")]
        assert [first["started"], again["started"]] == [True, False]
        assert [first["outcome"], again["outcome"]] == ["started", "duplicate"]
        runs = json.loads(cli("api", f"/automations/{automation}/runs", env=env).out)["runs"]
        assert [run["id"] for run in runs] == [first["jobRunId"], other["jobRunId"]]
        job = f"automations/{automation}/runs/{first['jobRunId']}"
        assert cli("api", job, "--get", "run.status", env=env).out == "success\n"
        made = cli("api", "/sandboxes", "--field", f"repoId={repo}", "--get", "sandbox.status",
                   env=env)
        assert made == Result(0, "running\n", "")


def test_a_real_bug_keeps_its_traceback(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mogplex, "DEFAULT_URL", None)
    with pytest.raises(AttributeError):
        cli("runs", "list")


# Of a run that has shown its last event at 1000.
SILENT = mogplex.Progress("connected", "streaming", 990.0, 1000.0, None, 0, "", 1.0, {})


def life_signs(
    stderr: Any, environ: Dict[str, str], now: List[float], quiet: bool = False,
) -> mogplex.LifeSigns:
    """What shows signs of life on ``stderr``, at the time that ``now`` holds."""
    ctx = mogplex.Context(environ, sys.stdin, io.StringIO(), stderr)
    return mogplex.LifeSigns(ctx, quiet, lambda: now[0])


@pytest.mark.parametrize("quiet, told", [
    (True, ""),
    (False, "still streaming, last event 1m ago\nstill streaming, last event 2m ago\n"),
])
def test_a_log_gets_a_sign_of_life_every_minute(quiet: bool, told: str) -> None:
    stderr, now = io.StringIO(), [1000.0]
    life = life_signs(stderr, {}, now, quiet)
    for now[0] in (1000.0, 1030.0, 1060.0, 1061.0, 1119.0, 1120.0, 1121.0):
        life.show(SILENT)
    assert stderr.getvalue() == told


class TerminalText(io.StringIO):
    """A screen that keeps what was written."""

    def isatty(self) -> bool:
        return True


def test_the_status_line_of_a_terminal_is_redrawn_at_most_once_a_second() -> None:
    screen, now = TerminalText(), [1000.0]
    life = life_signs(screen, {"TERM": "xterm"}, now)
    for now[0] in (1000.0, 1000.25, 1000.5, 1001.0, 1001.25):
        life.show(SILENT)
    life.ctx.note("here")
    lines = [
        "streaming 10s | last event 0s ago | connected",
        "streaming 11s | last event 1s ago | connected",
    ]
    shown = "".join(f"\r{line}\r" for line in [*lines, " " * len(lines[1])])
    assert screen.getvalue() == shown + "here\n"


def test_a_status_line_makes_room_for_data_and_for_the_end_of_the_command() -> None:
    screen = TerminalText()
    ctx = mogplex.Context({}, sys.stdin, io.StringIO(), screen)
    ctx.show_status("silent")
    ctx.emit("data")
    assert screen.getvalue() == "\rsilent\r\r      \r"
    with pytest.raises(BrokenPipeError), mogplex.attended(ctx, [], False):
        ctx.show_status("late")
        raise BrokenPipeError
    assert screen.getvalue() == "\rsilent\r\r      \r\rlate\r\r    \r"


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_a_run_that_is_over_is_neither_cancelled_nor_said_to_be_running(error: Any) -> None:
    ctx = mogplex.Context({}, sys.stdin, io.StringIO(), io.StringIO())
    attendant = mogplex.Attendant(mogplex.CiReport(ctx), "R")
    attendant.outcome = attendant.outcome._replace(status="success")
    with pytest.raises(error), mogplex.attended(ctx, [attendant], True):
        raise error
    assert ctx.stderr.getvalue() == ""


@pytest.mark.parametrize("environ", [{}, {"TERM": "dumb"}])
def test_a_terminal_that_cannot_go_back_gets_no_status_line(environ: Dict[str, str]) -> None:
    screen, now = TerminalText(), [1000.0]
    life_signs(screen, environ, now).show(SILENT)
    assert screen.getvalue() == ""


@pytest.mark.posix
@pytest.mark.slow
def test_the_specification_s_own_script(demo: mogplex.DemoServer, tmp_path: Any) -> None:
    script = r'''
set -u
mogplex() { "$PYTHON" -m mogplex "$@"; }
RUN_ID=$(mogplex run --repo acme/web --harness codex "Refactor auth to use bearer tokens" --json | jq -r .runId)
mogplex runs events "$RUN_ID" --follow
case $? in
  0)  echo "run completed cleanly" ;;
  64) echo "auth failed - refresh MOGPLEX_API_KEY"; exit 1 ;;
  65) echo "PAT lacks write scope" ; exit 1 ;;
  75) echo "rate limited - backing off" ; sleep 60 ; exec "$0" "$@" ;;
  *)  echo "unexpected failure (exit $?)" ; exit 1 ;;
esac
'''.replace("jq -r .runId", '"$PYTHON" -c "import json,sys; print(json.load(sys.stdin)[\'runId\'])"')
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, env={
        **os.environ, **service(demo.url, demo.token), "PYTHON": sys.executable})
    assert done.returncode == 0 and done.stdout.decode().endswith(" success ---\nrun completed cleanly\n")


def exported(process: "subprocess.Popen[bytes]") -> Dict[str, str]:
    """The variables that a ``--demo-server`` prints, once it has printed them all."""
    assert process.stdout is not None
    lines = list(iter(process.stdout.readline, b"unset NODE_ENV\n"))
    words = [line.decode().rstrip("\n").partition(" ") for line in lines]
    assert [word for word, _, _ in words] == ["export"] * 4
    return dict(setting.split("=", 1) for _, _, setting in words)  # type: ignore[misc]


@pytest.mark.posix
def test_demo_server_prints_what_a_shell_needs() -> None:
    process = run_file("--demo-server")
    with ended_at_last(process):
        lines = "".join(f"export {name}={value}\n" for name, value in exported(process).items())
        script = f'{lines}unset NODE_ENV\n"$PYTHON" -m mogplex repos list --json --limit 1'
        environ = {**os.environ, "PYTHON": sys.executable, "NODE_ENV": "production"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, env=environ)
        assert done.returncode == 0 and json.loads(done.stdout)["full_name"] == "acme/api"


@pytest.mark.posix
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_demo_server_takes_its_home_with_it(name: str, code: int) -> None:
    process = run_file("--demo-server")
    with ended_at_last(process):
        home = exported(process)["MOGPLEX_HOME"]
        assert sorted(os.listdir(home)) == ["runs.jsonl", "runs.jsonl.lock"]
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, b"") and b"Traceback" not in err
        assert not os.path.exists(home)


def test_a_demo_that_ends_says_that_its_runs_are_gone(cli: Callable[..., Result]) -> None:
    told = ("this demo service and its runs end with the command; "
            "use `mogplex --demo-server` to keep one running\n")
    assert cli("--demo", "run", "--repo", "acme/web", "x").err.endswith(told)
    assert told not in cli("--demo", "repos", "list").err


@pytest.mark.usefixtures("login_ports")
def test_login_in_the_demo_touches_no_file_of_ours(
    cli: Callable[..., Result], tmp_path: Any,
) -> None:
    result = cli("--demo", "login", env={"CI": "true"})  # whose browser the demo brings along
    assert result.code == 0
    assert re.fullmatch(r"signed in to http://127\.0\.0\.1:\d+\n", result.out)
    assert "/api/auth/mcp/authorize?response_type=code&" in result.err
    assert not (tmp_path / "home").exists()


def remote_login(url: str) -> Tuple["subprocess.Popen[str]", List[str]]:
    """``login`` over SSH, and the lines that it says before it waits."""
    environ = {**os.environ, **service(url, ""), "SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}
    process = subprocess.Popen(
        [*PROGRAM, "login"], env=environ, universal_newlines=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr
    return process, [process.stderr.readline() for _ in range(5)]


@pytest.mark.posix
@pytest.mark.usefixtures("login_ports")
def test_login_on_a_remote_host_takes_the_answer_of_a_browser_elsewhere(tmp_path: Any) -> None:
    with RawServer(Issuer()) as server:
        process, said = remote_login(server.url)
        Browser(CALLBACK)(said[1].strip())
        left = process.communicate(timeout=60)
    assert said[0] == f"to sign in to {server.url}, open this page:\n"
    assert re.search(r"ssh -L (2481[68]):127\.0\.0\.1:\1 ", said[2])
    assert "login --with-token" in said[3]
    assert said[4] == "waiting for up to 5m 00s; press Ctrl+C to stop\n"
    assert (process.returncode, *left) == (0, f"signed in to {server.url}\n", "")
    assert stored(tmp_path / "home")["mogplex"]["access_token"] == "access-1"


@pytest.mark.posix
@pytest.mark.usefixtures("login_ports")
def test_ctrl_c_ends_the_wait_for_a_browser(tmp_path: Any) -> None:
    with RawServer(Issuer()) as server:
        process, _ = remote_login(server.url)
        process.send_signal(signal.SIGINT)
        left = process.communicate(timeout=60)
    assert (process.returncode, *left) == (130, "", "")
    assert not (tmp_path / "home" / "auth.json").exists()


def accepts_one_token(number: int, request: str, connection: socket.socket) -> bytes:
    """A service that knows TOKEN and no other."""
    if TOKEN in request:
        return ok({"repos": []})
    return refusal(401, "UNAUTHORIZED", "Unauthorized")


@pytest.mark.parametrize("stdin, code", [("mog_wrong\n", 64), ("", 2), (" \n", 2), ("mog_\x1b[2J", 64)])
def test_login_stores_no_token_that_is_not_accepted(
    cli: Callable[..., Result], tmp_path: Any, stdin: str, code: int,
) -> None:
    with RawServer(accepts_one_token) as server:
        result = cli("login", "--with-token", env=service(server.url, ""), stdin=stdin)
    assert (result.code, result.out) == (code, "") and not (tmp_path / "home").exists()


def test_login_with_a_token(cli: Callable[..., Result], tmp_path: Any) -> None:
    with RawServer(accepts_one_token) as server:
        overruled = service(server.url, "mog_other")
        result = cli("login", "--with-token", "--json", env=overruled, stdin=f"{TOKEN}\n")
    path = str(tmp_path / "home" / "auth.json")
    assert result.code == 0 and json.loads(result.out) == {"service": server.url, "path": path}
    assert result.err == "MOGPLEX_API_KEY is set and takes precedence over this sign-in\n"
    assert stored(tmp_path / "home")["mogplex"] == {"token": TOKEN, "base_url": server.url}


@pytest.mark.parametrize("argv, env, said", [
    ([], {"CI": "true"}, "login: there is no browser in a CI job"),
    ([], {"CI": "1", "SSH_TTY": "/dev/tty"}, "login: there is no browser in a CI job"),
    (["--with-token"], {"CI": "true"}, "no token on stdin"),
])
def test_login_in_ci_does_not_wait_for_a_browser(
    cli: Callable[..., Result], argv: List[str], env: Dict[str, str], said: str,
) -> None:
    result = cli("login", *argv, env={**service("http://127.0.0.1:9", ""), **env})
    assert (result.code, result.out) == (2, "") and said in result.err.splitlines()[0]
    assert argv or result.err.splitlines()[1] == (
        "set MOGPLEX_API_KEY, or pipe a token to `mogplex login --with-token`")


@pytest.mark.posix
@pytest.mark.usefixtures("login_ports")
@pytest.mark.parametrize("flags, in_ci", [(["--no-browser"], "true"), ([], "false"), ([], "0")])
def test_login_waits_for_a_browser_elsewhere(
    cli: Callable[..., Result], flags: List[str], in_ci: str,
) -> None:
    environ = {**service("http://127.0.0.1:9", ""), "CI": in_ci, "SSH_TTY": "/dev/tty"}
    result = cli("login", *flags, "--timeout", "0.1", env=environ)
    assert result.code == 1 and "CI job" not in result.err


@pytest.mark.posix
@pytest.mark.usefixtures("login_ports")
@pytest.mark.parametrize("variable, way", [
    ("CODESPACES", r"with `gh codespace ports forward (?P<p>2481[68]):(?P=p)` on your own machine"),
    ("REMOTE_CONTAINERS", "in your editor's Ports view"),
    ("GITPOD_WORKSPACE_ID", "in your editor's Ports view"),
    ("DEVPOD", "in your editor's Ports view"),
])
@pytest.mark.parametrize("flags", [[], ["--no-browser"]])
def test_login_in_a_container_says_in_one_line_which_port_to_forward(
    cli: Callable[..., Result], tmp_path: Any, variable: str, way: str, flags: List[str],
) -> None:
    environ = {**service("http://127.0.0.1:9", ""), variable: "true", "PATH": str(tmp_path)}
    said = cli("login", *flags, "--timeout", "0.1", env={"SSH_TTY": "/dev/tty", **environ}).err
    hint = re.search(r"(?m)^your browser needs this container's port (2481[68]) .*$", said)
    assert hint and re.search(f"forward it {way}, or use `mogplex login --with-token`$", hint[0])
    assert "ssh -L" not in said and hint[1] in said.splitlines()[1]


@pytest.mark.posix
@pytest.mark.usefixtures("login_ports")
def test_login_on_a_host_without_a_browser_says_so_and_waits(tmp_path: Any) -> None:
    environ = {**service("http://127.0.0.1:9", ""), "HOME": str(tmp_path), "PATH": str(tmp_path)}
    command = [*PROGRAM, "login"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, b"")
        said = b"no browser could be started here; open the page in one yourself\n"
        assert said in lines
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.parametrize("argv", [["repos", "list"], ["sandboxes", "list"]])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_list_that_ends_at_its_limit_says_so(
    cli: Callable[..., Result], argv: List[str], flags: List[str],
) -> None:
    records = [{"id": str(number)} for number in range(3)]
    with one_answer(ok({"repos": records, "sandboxes": records})) as server:
        full = cli(*argv, *flags, "--limit", "3", env=service(server.url))
        whole = cli(*argv, *flags, "--limit", "4", env=service(server.url))
    assert (full.code, full.err) == (0, "only the first 3 are listed; there may be more\n")
    assert (whole.code, whole.err) == (0, "") and whole.out == full.out


@pytest.mark.posix
def test_login_asks_for_the_token_unseen_on_a_terminal(tmp_path: Any) -> None:
    ours, theirs = pty.openpty()
    with RawServer(lambda *_: ok({"repos": []})) as server:
        process = subprocess.Popen(
            [*PROGRAM, "login", "--with-token"],
            env={**os.environ, **service(server.url, "")},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        screen = b""
        while b"token: " not in screen:
            screen += os.read(ours, 1000)
        os.write(ours, TOKEN.encode() + b"\n")
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while process.poll() is None or screen.count(b"\n") < 2:
                screen += os.read(ours, 1000)
        os.close(ours)
    assert process.wait() == 0 and b"signed in to" in screen and TOKEN.encode() not in screen
    assert stored(tmp_path / "home")["mogplex"]["token"] == TOKEN


NO_REPOS = ok({"repos": []})
A_SIGN_IN = {"access_token": "0123456789abcdefg", "expires_at": 9e9}


@pytest.mark.parametrize("key, entry, said, code, expected", [
    (TOKEN, {}, NO_REPOS, 0,
     {"source": "MOGPLEX_API_KEY", "kind": "personal access token", "token": "mog_T0ke"}),
    (TOKEN, {}, NO_REPOS, 0, {"hides": None, "expires": None, "state": "accepted"}),
    (TOKEN, {"token": "t"}, NO_REPOS, 0, {"source": "MOGPLEX_API_KEY", "hides": "{path}"}),
    ("", A_SIGN_IN, NO_REPOS, 0, {"source": "{path}", "kind": "sign-in", "token": "01234567"}),
    ("", A_SIGN_IN, NO_REPOS, 0, {"hides": None, "expires": "2255-03-14T16:00:00Z"}),
    ("", {"token": "short"}, refusal(401, "UNAUTHORIZED", "Unauthorized"), 64,
     {"token": None, "state": "refused"}),
    (TOKEN, {}, refusal(403, "FORBIDDEN", "Missing"), 65,
     {"state": "accepted, without the scope read"}),
    (TOKEN, {}, answer(500, "", Retry_After="60"), 1, {"state": "unknown"}),
])
def test_login_status(
    cli: Callable[..., Result], tmp_path: Any, key: str, entry: Dict[str, Any], said: bytes,
    code: int, expected: Dict[str, Any],
) -> None:
    path = str(put(tmp_path / "home", {"mogplex": entry}))
    with one_answer(said) as server:
        result = cli("login", "status", "--json", env=service(server.url, key))
        human = cli("login", "status", env=service(server.url, key))
    record = json.loads(result.out)
    assert result.code == human.code == code
    for name, value in expected.items():
        assert record[name] == (path if value == "{path}" else value)
    assert human.out == "".join(f"{name:<7} {value}\n" for name, value in record.items() if value)
    assert TOKEN not in human.out + human.err + result.out


def test_login_status_of_nobody(cli: Callable[..., Result]) -> None:
    result = cli("login", "status", env=service("http://127.0.0.1:9", ""))
    assert (result.code, result.out) == (64, "") and "not signed in" in result.err


def test_logout(cli: Callable[..., Result], tmp_path: Any) -> None:
    put(tmp_path / "home", {"mogplex": {"token": "t"}, "other": 1})
    applies = "MOGPLEX_API_KEY is set and still applies\n"
    assert cli("logout", env={"MOGPLEX_API_KEY": "x"}) == (0, "signed out\n", applies)
    assert stored(tmp_path / "home") == {"version": 1, "other": 1}
    assert cli("logout") == (0, "not signed in\n", "")


@pytest.mark.parametrize("argv, out, err", [
    (["--logout"], "not signed in\n", ""),
    (["--logout", "--json"], '{"forgotten":false}\n', ""),
    (["logout", "--json"], '{"forgotten":false}\n', ""),
    (["--logout", "runs", "list", "--json"], "", "not signed in\n"),  # stdout is the command's
])
def test_logout_alone_and_before_a_command(
    cli: Callable[..., Result], argv: List[str], out: str, err: str,
) -> None:
    assert cli(*argv) == Result(0, out, err)


def test_logout_before_anything_else_can_print_one_value(cli: Callable[..., Result]) -> None:
    assert cli("--logout", "--get", "forgotten") == Result(0, "false\n", "")
    assert cli("--logout", "--get=forgotten", "--json") == Result(0, "false\n", "")


# -- One value of each record


@pytest.mark.parametrize("name", list(mogplex.SUBCOMMANDS))
def test_every_command_with_json_has_get(name: str) -> None:
    flags = mogplex.flags_of(name)
    assert ("--get" in flags) is ("--json" in flags)


@pytest.mark.parametrize("argv", [
    ["repos", "list"], ["runs", "list"], ["runs", "get", mogplex.DEMO_RUNS[0]["id"]],
    ["runs", "events", mogplex.DEMO_RUNS[0]["id"]], ["runs", "cancel", mogplex.DEMO_RUNS[0]["id"]],
    ["runs", "events", mogplex.DEMO_RUNS[0]["id"], "--follow"],
    ["sandboxes", "list"], ["sandboxes", "logs", mogplex.DEMO_SANDBOXES[0]["id"]],
    ["login", "status"], ["logout"],
])
def test_a_value_that_is_missing_is_an_empty_line_for_each_record(
    run_demo: Callable[..., Result], argv: List[str],
) -> None:
    flat = run_demo(*argv, "--json")
    got = run_demo(*argv, "--get", "no.such.value")
    assert (got.code, got.err) == (flat.code, flat.err)
    assert got.out == "\n" * len(flat.out.splitlines())


@pytest.mark.parametrize("argv, path, out", [
    (["repos", "list", "--query", "acme/docs"], "root_directory", "website\n"),
    (["repos", "list", "--query", "acme/"], "root_directory", "\n" "website\n" "\n\n"),
    (["repos", "list", "--query", "acme/api"], "installation_id", "51423907\n"),
    (["runs", "get", mogplex.DEMO_RUNS[0]["id"], "--json"], "status", "success\n"),
    (["runs", "get", mogplex.DEMO_RUNS[0]["id"]], "branch.createBranch", "false\n"),
    (["runs", "cancel", mogplex.DEMO_RUNS[0]["id"]], "run.status", "success\n"),
    (["sandboxes", "logs", mogplex.DEMO_SANDBOXES[0]["id"]], "lifecycle_events.0.event_type", "sandbox_created\n"),
    (["login", "status"], "state", "accepted\n"),
])
def test_get_prints_one_value_of_each_record(
    run_demo: Callable[..., Result], argv: List[str], path: str, out: str,
) -> None:
    assert run_demo(*argv, "--get", path) == Result(0, out, "")


def test_get_goes_before_json_wherever_it_stands(run_demo: Callable[..., Result]) -> None:
    argv = ["runs", "get", mogplex.DEMO_RUNS[0]["id"]]
    for flags in (["--json", "--get", "status"], ["--get=status", "--json"]):
        assert run_demo(*argv, *flags).out == "success\n"


def test_get_gives_a_script_the_id_of_the_run_that_it_starts(run_demo: Callable[..., Result]) -> None:
    started = run_demo("run", "--repo", "acme/web", "x", "--get", "runId")
    assert (started.code, started.err) == (0, "") and mogplex.is_uuid(started.out[:-1])
    assert run_demo("runs", "get", started.out.strip(), "--get", "runId") == started


def test_with_follow_events_and_the_verdict_are_lines_too(run_demo: Callable[..., Result]) -> None:
    argv = ["run", "--repo", "acme/web", "--follow", "--quiet", "x"]
    started, *events, verdict = run_demo(*argv, "--get", "runId").out.splitlines()
    assert mogplex.is_uuid(started) and verdict == started
    assert len(events) > 3 and set(events) == {""}
    statuses = run_demo(*argv, "--get", "status").out.splitlines()
    assert (statuses[0], statuses[-1]) == ("pending", "success")
    types = run_demo("runs", "events", started, "--follow", "--get", "type").out.splitlines()
    assert types[0] == "started" and types[-2:] == ["finished", ""]


def test_get_never_changes_the_exit_code(run_demo: Callable[..., Result]) -> None:
    failed = run_demo("run", "--repo", "acme/web", "--follow", "--quiet", "fail", "--get", "error")
    assert failed.code == 1 and failed.out.endswith("\nAgent run exited with code 1.\n")
    refused = run_demo("run", "--repo", "acme/web", "refuse", "--get", "status")
    assert (refused.code, refused.out) == (1, "failed\n")
    assert run_demo("runs", "get", "nope", "--get", "status").out == ""


def test_get_prints_no_command_to_a_ci_runner(cli: Callable[..., Result]) -> None:
    texts = ["::error::x", " ::add-mask::y", "z ##[group]", "\x1b[0Ksection_start:1:a\r\x1b[0Kb", "c\nd"]
    events = [{"type": "log", "message": text, "payload": {"logs": [text]}} for text in texts]
    with one_answer(ok({"run": {"runId": "r", "status": "success"}, "events": events})) as server:
        for follow in ([], ["--follow"]):
            argv = ["runs", "events", "r", *follow]
            out = cli(*argv, "--get", "message", env=service(server.url)).out.splitlines()
            assert out[:5] == [
                r"\u003a:error::x", r" \u003a:add-mask::y", r"z #\u0023[group]",
                r"\u001b[0Ksection_start:1:a\r\u001b[0Kb", r"c\nd"]
            in_lists = cli(*argv, "--get", "payload.logs", env=service(server.url)).out
            assert "##[" not in in_lists and "\x1b" not in in_lists


def test_get_never_prints_the_token(cli: Callable[..., Result]) -> None:
    with one_answer(ok({"run": {"runId": "r", "error": f"x {TOKEN} \n {TOKEN[:9]}\n{TOKEN[9:]}"}})) as server:
        got = cli("runs", "get", "r", "--get", "error", env=service(server.url))
    assert got == Result(0, "x *** \\n ***\n", "")


@pytest.mark.parametrize("path", [".runId", "runId.", "a..b", "."])
def test_a_path_with_an_empty_name_is_refused_before_a_run_is_paid_for(
    cli: Callable[..., Result], path: str,
) -> None:
    with one_answer(ok({"runId": "r"})) as server:
        refused = cli(*RUN_IT, "x", "--get", path, env=service(server.url))
        assert server.requests == []
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "error: --get takes names with dots between them, such as runId or branch.working, "
        f"not '{path}'\n")


def test_an_empty_path_is_a_script_s_lost_variable(cli: Callable[..., Result]) -> None:
    assert cli("repos", "list", "--get", "") == Result(
        2, "", "error: repos list: --get is empty\nsee: mogplex repos list --help\n")


# -- The repo of a checkout


@pytest.fixture
def checkout(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``checkout(url)``: the current directory is one in a repo with that origin; "" for none."""
    if UNDER_WINE:
        pytest.skip("there is no git under Wine")

    def make(url: str) -> None:
        below = tmp_path / "checkout" / "below"
        below.mkdir(parents=True)
        monkeypatch.chdir(below)
        subprocess.run(["git", "init", "-q", ".."], check=True)
        if url:
            subprocess.run(["git", "remote", "add", "origin", url], check=True)
    return make


@pytest.mark.parametrize("url, name", [
    ("https://github.com/o/r", "o/r"), ("https://github.com/o/r.git", "o/r"),
    ("https://github.com/o/r.git/", "o/r"), ("https://www.github.com/o/r", "o/r"),
    ("https://me:s3cret@github.com/o/r.git", "o/r"), ("https://x@y@GitHub.com:443/O/R.js", "O/R.js"),
    ("ssh://git@github.com/o/r.git", "o/r"), ("ssh://git@ssh.github.com:443/o/r", "o/r"),
    ("git@github.com:o/r.git", "o/r"), ("git@github.com:/o/r", "o/r"), ("github.com:o/.github", "o/.github"),
    ("org-12@github.com:o/r-_.x.git", "o/r-_.x"),
    ("https://gitlab.com/o/r", None), ("git@gitlab.com:o/r", None), ("../r.git", None),
    ("https://github.com.evil.example/o/r", None), ("https://evil.example/@github.com/o/r", None),
    ("https://evil.example/github.com:o/r", None), ("http://github.com/o/r", None),
    ("https://github.com/o", None), ("https://github.com/o/r/x", None), ("/github.com/o/r", None),
    ("file:///github.com/o/r", None), ("https://github.com/o/r?x", None), ("git@github.com:o/\u00e9", None),
    ("@" * 100_000, None), ("https://" + "a@" * 100_000, None), ("github.com:o/" + ".git" * 50_000 + "!", None),
], ids=short)
def test_the_repo_that_a_remote_names(url: str, name: Optional[str]) -> None:
    match = mogplex.GITHUB_URL.match(url)
    assert (match and match.group(1)) == name


@pytest.mark.parametrize("url", [
    "https://github.com/acme/web.git", "git@github.com:acme/web.git", "ssh://git@github.com/acme/web",
    "https://me:s3cretword@github.com/Acme/Web",
])
def test_a_dot_is_the_repo_of_this_checkout(
    run_demo: Callable[..., Result], checkout: Callable[[str], None], url: str,
) -> None:
    checkout(url)
    started = run_demo("run", "--repo", ".", "x", "--get", "repoId")
    assert (started.code, started.out) == (0, f"{mogplex.DEMO_WEB}\n")
    assert started.err.lower() == "repo acme/web (origin of this checkout)\n"
    assert run_demo("run", "x", "--get", "repoId", MOGPLEX_REPO=".") == started
    boxes = run_demo("sandboxes", "list", "--repo", ".", "--get", "repo_id")
    assert (boxes.code, set(boxes.out.split())) == (0, {mogplex.DEMO_WEB})


def test_a_checkout_s_origin_counts_as_git_would_use_it(
    run_demo: Callable[..., Result], checkout: Callable[[str], None],
) -> None:
    checkout("hub:acme/web")
    subprocess.run(["git", "config", "url.https://github.com/.insteadOf", "hub:"], check=True)
    assert run_demo("run", "--repo", ".", "x", "--get", "repoId").out == f"{mogplex.DEMO_WEB}\n"


def test_without_a_repo_a_run_in_a_checkout_is_still_a_usage_error(
    run_demo: Callable[..., Result], checkout: Callable[[str], None],
) -> None:
    checkout("https://github.com/acme/web.git")
    assert run_demo("run", "x").err.startswith("error: run: --repo <id> is required")


def test_a_checkout_of_a_repo_that_the_service_does_not_list(
    run_demo: Callable[..., Result], checkout: Callable[[str], None],
) -> None:
    checkout("https://github.com/no/such.git")
    result = run_demo("run", "--repo", ".", "x")
    assert result.code == 1 and "the service lists no repo 'no/such'" in result.err


CHECKOUT_HINT = "run this in a checkout whose remote 'origin' is on github.com, or give owner/name\n"


@pytest.mark.parametrize("url, problem", [
    ("https://me:s3cretword@gitlab.com/o/r.git", "the remote 'origin' is not on github.com"),
    ("", "git: No such remote 'origin'"),
])
def test_an_origin_that_is_not_on_github(
    run_demo: Callable[..., Result], checkout: Callable[[str], None], url: str, problem: str,
) -> None:
    checkout(url)
    for argv in (["run", "--repo", ".", "x"], ["sandboxes", "list", "--repo", "."]):
        assert run_demo(*argv) == Result(2, "", f"error: repo '.': {problem}\n{CHECKOUT_HINT}")


@pytest.mark.skipif(UNDER_WINE, reason="there is no git under Wine")
def test_a_dot_outside_a_checkout(
    run_demo: Callable[..., Result], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    result = run_demo("run", "--repo", ".", "x")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: repo '.': git: not a git repository")
    assert result.err.endswith(CHECKOUT_HINT)


def test_a_dot_without_git(run_demo: Callable[..., Result], tmp_path: Any) -> None:
    result = run_demo("run", "--repo", ".", "x", PATH=str(tmp_path))
    assert result == Result(2, "", f"error: repo '.': git is not installed\n{CHECKOUT_HINT}")


def test_a_git_in_the_checkout_itself_is_not_run(
    run_demo: Callable[..., Result], tmp_path: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(sys.executable, tmp_path / ("git.exe" if os.name == "nt" else "git"))
    monkeypatch.chdir(tmp_path)
    result = run_demo("run", "--repo", ".", "x", PATH=".")
    assert result.err.startswith("error: repo '.': git is not installed\n")


@pytest.mark.posix
def test_the_cockpit_opens_on_the_repo_of_the_checkout(
    demo: mogplex.DemoServer, checkout: Callable[[str], None],
) -> None:
    checkout("https://github.com/acme/docs.git")
    environ = {**service(demo.url, demo.token), "MOGPLEX_REPO": "."}
    with Terminal(PROGRAM, **environ) as terminal:
        terminal.until("next: acme/docs ").send("\x03\x03")
        terminal.until(lambda: terminal.process.poll() is not None)


@pytest.fixture
def false_git(tmp_path: Any) -> Callable[[str], str]:
    """``false_git(script)``: a PATH where git is a shell script."""
    def make(script: str) -> str:
        git = tmp_path / "git"
        git.write_text(f"#!/bin/sh\n{script}\n")
        git.chmod(0o755)
        return str(tmp_path)
    return make


@pytest.mark.posix
def test_git_gets_nothing_of_ours_and_cannot_ask(
    run_demo: Callable[..., Result], false_git: Callable[[str], str], tmp_path: Any,
) -> None:
    seen = tmp_path / "seen"
    path = false_git(f"{{ /usr/bin/env; /bin/cat; }} > '{seen}'; echo https://github.com/acme/web")
    before = os.dup(0)
    readable, writable = os.pipe()
    os.write(writable, b"typed")
    os.close(writable)
    os.dup2(readable, 0)
    try:
        assert run_demo("run", "--repo", ".", "x", PATH=path, MOGPLEX_X="1").code == 0
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(readable)
    given = seen.read_text()
    assert "GIT_TERMINAL_PROMPT=0\n" in given and f"PATH={path}\n" in given
    assert "MOGPLEX_" not in given and "typed" not in given


@pytest.mark.posix
@pytest.mark.parametrize("script, problem", [
    ("echo 'fatal: \x1b[2Jhttps://me:s3cretword@gitlab.com/x: bad' >&2; exit 128",
     "git: https://***@gitlab.com/x: bad"),
    ("echo odd >&2; exit 1", "git: it failed"), ("kill -9 $$", "git: it failed"),
    ("printf '\\377\\000\\n'", "the remote 'origin' is not on github.com"),
    ("exit 0", "the remote 'origin' is not on github.com"),
])
def test_a_git_that_fails(
    run_demo: Callable[..., Result], false_git: Callable[[str], str], script: str, problem: str,
) -> None:
    result = run_demo("run", "--repo", ".", "x", PATH=false_git(script))
    assert result == Result(2, "", f"error: repo '.': {problem}\n{CHECKOUT_HINT}")


@pytest.mark.posix
def test_a_git_that_cannot_be_started(
    run_demo: Callable[..., Result], tmp_path: Any,
) -> None:
    git = tmp_path / "git"
    git.write_text("#!/nonexistent/shell\n")
    git.chmod(0o755)
    result = run_demo("run", "--repo", ".", "x", PATH=str(tmp_path))
    assert result.code == 2 and result.err.startswith("error: repo '.': git cannot be started: ")


@pytest.mark.posix
def test_a_git_that_hangs_is_given_up(
    run_demo: Callable[..., Result], false_git: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert mogplex.GIT_S <= 10.0
    monkeypatch.setattr(mogplex, "GIT_S", 0.2)
    result = run_demo("run", "--repo", ".", "x", PATH=false_git("exec /bin/sleep 60"))
    assert result == Result(
        2, "", f"error: repo '.': git does not answer within 0.2 s\n{CHECKOUT_HINT}")


# Several runs at once

ENDED_SO = ok({"run": {"status": "failed", "error": "boom"}, "events": [
    {"id": "9", "type": "failed", "message": "boom", "createdAt": "2026-11-24T04:26:03.199Z"}]})
THREE_RUNS = {"aaaaaaaa-1": OVER, "bbbbbbbb-2": ENDED_SO, "c": OVER}


def test_several_runs_are_followed_to_their_ends(cli: Callable[..., Result]) -> None:
    with RawServer(of_runs(**THREE_RUNS)) as server:
        result = cli("runs", "events", *THREE_RUNS, "--follow", env=service(server.url))
    lines = result.out.splitlines()
    assert lines.pop() == "3 runs: 2 success, 1 failed"
    assert sorted(lines) == [
        "aaaaaaaa  --- run aaaaaaaa-1 success ---",
        "aaaaaaaa  finished        done",
        "bbbbbbbb  --- run bbbbbbbb-2 failed ---",
        "bbbbbbbb  2026-11-24T04:26:03.199Z  failed          boom",
        "c         --- run c success ---",
        "c         finished        done",
    ]
    assert (result.code, result.err) == (1, "bbbbbbbb  run error: boom\n")


def test_several_runs_as_json_have_a_run_id_in_each_line(cli: Callable[..., Result]) -> None:
    with RawServer(of_runs(**THREE_RUNS)) as server:
        argv = ["runs", "events", "--follow"]
        result = cli(*argv, *THREE_RUNS, "--json", env=service(server.url))
        ids = cli(*argv, "aaaaaaaa-1", "c", "--get", "runId", env=service(server.url))
    records = [json.loads(line) for line in result.out.splitlines()]
    assert len(records) == 6 and {record["runId"] for record in records} == set(THREE_RUNS)
    assert {"runId": "c", "status": "success"} in records
    assert {"runId": "c", **FINISHED_EVENT} in records
    assert result.err.splitlines()[-1] == "3 runs: 2 success, 1 failed"
    assert sorted(ids.out.splitlines()) == ["aaaaaaaa-1", "aaaaaaaa-1", "c", "c"]
    assert (result.code, ids.code) == (1, 0)


def test_a_run_id_of_an_event_is_not_taken_for_ours() -> None:
    assert mogplex.with_run_id("R", {"id": "1", "runId": "other"}) == {"runId": "R", "id": "1"}


def test_an_id_cannot_speak_to_a_terminal_or_to_ci() -> None:
    assert mogplex.label_of("::error::x").startswith(": :error")
    assert "\x1b" not in mogplex.label_of("\x1b[2Jabc")


@pytest.mark.parametrize("argv, stdin, asked", [
    (["R", "S", "R"], "", ["R", "S"]),
    (["-"], "R\nS\n", ["R", "S"]),
    (["-"], "R", ["R"]),
    (["-", "S"], " R \r\nR\r\n", ["R", "S"]),
    (["R", "@last"], "", ["R", "newest"]),
])
@pytest.mark.parametrize("follow", [["--follow"], []])
def test_which_runs_are_meant(
    cli: Callable[..., Result], tmp_path: Any, argv: List[str], stdin: str, asked: List[str],
    follow: List[str],
) -> None:
    with one_answer(OVER) as server:
        home = mogplex.Home(str(tmp_path / "home"))
        home.record_run({"key": "k", "service": server.url}, {"runId": "newest"})
        result = cli("runs", "events", *argv, *follow, stdin=stdin, env=service(server.url))
        assert sorted(map(run_asked, server.requests)) == sorted(asked)
    lines = result.out.splitlines()
    if follow:
        noun = "run" if len(asked) == 1 else "runs"
        assert lines.pop() == f"{len(asked)} {noun}: {len(asked)} success"
    assert result.code == 0 and {line[:8].strip() for line in lines} == set(asked)


def test_an_empty_line_among_the_ids_on_stdin_is_an_error(cli: Callable[..., Result]) -> None:
    """A script has lost an id."""
    with one_answer(OVER) as server:
        result = cli("runs", "events", "-", "--follow", stdin="R\n\nS\n", env=service(server.url))
    assert (result.code, result.err, server.requests) == (2, "error: the run ID is empty\n", [])


def test_ids_on_stdin_are_utf_8(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, told in ((io.TextIOWrapper(io.BytesIO(b"\xff")), " is not valid UTF-8"), (None, ": cannot be read")):
        ctx = mogplex.Context({}, stream, io.StringIO(), io.StringIO())
        with pytest.raises(mogplex.UsageError, match=f"stdin{told}"):
            mogplex.read_run_ids(ctx)


UNKNOWN_RUN = refusal(404, "NOT_FOUND", "no such run")
WITHOUT_SCOPE = refusal(403, "FORBIDDEN", "no")
TOO_MANY = limited(Retry_After="600")


@pytest.mark.parametrize("answers, code, count", [
    ([OVER, OVER], 0, "2 runs: 2 success"),
    ([OVER, ENDED_SO], 1, "2 runs: 1 success, 1 failed"),
    ([OVER, UNKNOWN_RUN], 1, "2 runs: 1 success, 1 given up"),
    ([OVER, refusal(401, "UNAUTHORIZED", "no")], 64, "2 runs: 1 success, 1 given up"),
    ([WITHOUT_SCOPE, ENDED_SO], 65, "2 runs: 1 failed, 1 given up"),
    ([WITHOUT_SCOPE, TOO_MANY, OVER], 75, "3 runs: 1 success, 2 given up"),
    ([WITHOUT_SCOPE, refusal(501, "SERVICE_UNAVAILABLE", "no")], 69, "2 runs: 2 given up"),
])
def test_the_exit_code_of_several_runs_is_the_highest(
    cli: Callable[..., Result], answers: List[bytes], code: int, count: str,
) -> None:
    runs = {f"R{number}": answer for number, answer in enumerate(answers)}
    with RawServer(of_runs(**runs)) as server:
        argv = ["runs", "events", *runs, "--follow", "--timeout", "30"]
        result = cli(*argv, env=service(server.url))
    assert (result.code, result.out.splitlines()[-1]) == (code, count)
    given_up = re.findall("([0-9]) given up", count)
    assert [str(result.err.count("  error: "))] == (given_up or ["0"])


def test_a_run_that_is_given_up_says_why_and_what_to_do(cli: Callable[..., Result]) -> None:
    with RawServer(of_runs(nope=refusal(500, "INTERNAL_ERROR", "oops"), R=OVER)) as server:
        result = cli("runs", "events", "nope", "R", env=service(server.url))
    assert result.code == 1 and result.out == "R         finished        done\n"
    assert result.err == (
        "nope      error: INTERNAL_ERROR: oops (HTTP 500)\n"
        "nope      'nope' does not look like an id of the service\n")


def test_lists_of_several_runs_say_where_they_end(cli: Callable[..., Result]) -> None:
    empty = ok({"run": {"status": "pending"}, "events": []})
    with RawServer(of_runs(R=OVER, S=empty)) as server:
        result = cli("runs", "events", "R", "S", "--limit", "1", "--json", env=service(server.url))
    assert json.loads(result.out) == {"runId": "R", **FINISHED_EVENT}
    assert (result.code, result.err) == (0, (
        "R         only the first 1 events are listed; there may be more\n"
        "S         no events yet\n"))


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_time_out_of_several_runs(cli: Callable[..., Result], flags: List[str]) -> None:
    with RawServer(of_runs(R=OVER, S=GOES_ON, T=GOES_ON)) as server:
        argv = ["runs", "events", "R", "S", "T", "--follow", "--timeout", "0.5", *flags]
        result = cli(*argv, env=service(server.url))
    count = "3 runs: 1 success, 2 not over\n"
    assert result.code == 1 and (result.err if flags else result.out).endswith(count)
    assert (
        "error: --follow timed out after 0.5s waiting for terminal status\n"
        "run S is still running\n"
        "run T is still running\n"
        "follow: mogplex runs events S T --follow\n"
        "cancel: mogplex runs cancel S\n"
        "cancel: mogplex runs cancel T\n"
    ) in result.err


def interrupted_followers(server: RawServer, **options: Any) -> Tuple[mogplex.Context, List[str]]:
    """A follow of R, S and T that SIGTERM ends as soon as R is over; and the runs cancelled."""
    ctx = mogplex.Context(service(server.url), sys.stdin, io.StringIO(), io.StringIO())
    following = mogplex.FollowOptions(follow=True, **options)
    followers = mogplex.Followers(ctx, ["R", "S", "T"], following)
    end = followers.end

    def end_and_hear(run_id: str, how: str, code: int) -> None:
        end(run_id, how, code)
        ctx.interrupts.first = mogplex.Interrupted(signal.SIGTERM)

    followers.end = end_and_hear  # type: ignore[method-assign]
    with pytest.raises(mogplex.Interrupted):
        followers.run()
    asked = [request for request in server.requests if "/cancel" in request.split("\r")[0]]
    return ctx, sorted(map(run_asked, asked))


def test_a_signal_cancels_all_runs_that_are_not_over() -> None:
    with RawServer(of_runs(R=OVER, S=GOES_ON, T=GOES_ON)) as server:
        ctx, cancelled = interrupted_followers(server, cancel_on_interrupt=True)
    told = ctx.stderr.getvalue().splitlines()
    assert cancelled == ["S", "T"] and told.pop() == "3 runs: 1 success, 2 not over"
    assert sorted(told) == [
        "cancellation requested for run S", "cancellation requested for run T"]


def test_without_cancel_on_interrupt_a_signal_says_what_is_still_running() -> None:
    with RawServer(of_runs(R=OVER, S=GOES_ON, T=GOES_ON)) as server:
        ctx, cancelled = interrupted_followers(server)
    assert cancelled == [] and "follow: mogplex runs events S T --follow\n" in ctx.stderr.getvalue()


def test_a_signal_before_the_first_request_cancels_several_runs_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = mogplex.Context.client
    signals = [mogplex.Interrupted(signal.SIGTERM)]

    def client(ctx: mogplex.Context, *args: Any, **settings: Any) -> mogplex.Client:
        if signals:
            raise signals.pop()
        return opened(ctx, *args, **settings)

    monkeypatch.setattr(mogplex.Context, "client", client)
    with RawServer(of_runs(S=GOES_ON, T=GOES_ON)) as server:
        ctx = mogplex.Context(service(server.url), sys.stdin, io.StringIO(), io.StringIO())
        with pytest.raises(mogplex.Interrupted):
            mogplex.cmd_runs_events(ctx, "S", "T", follow=True, cancel_on_interrupt=True)
    told = ctx.stderr.getvalue().splitlines()
    assert sorted(told[:2]) == [
        "cancellation requested for run S", "cancellation requested for run T"]
    assert told[2:] == ["2 runs: 2 not over"]


def test_a_429_that_the_timeout_has_no_room_for_gives_up_several_runs_at_once(
    cli: Callable[..., Result],
) -> None:
    with RawServer(of_runs(R=TOO_MANY, S=TOO_MANY, T=TOO_MANY)) as server:
        argv = ["runs", "events", "R", "S", "T", "--follow", "--timeout", "50s"]
        result = cli(*argv, env=service(server.url))
    assert (result.code, result.out) == (75, "3 runs: 3 given up\n")
    assert len(server.requests) == 1


def test_a_signal_while_an_error_is_told_ends_the_program_as_any_other(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Telling it waits where stderr is a pipe that nobody reads."""
    def be_interrupted(ctx: mogplex.Context, error: mogplex.MogplexError) -> None:
        raise mogplex.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(mogplex, "note_error", be_interrupted)
    assert cli("runs", "get", "..", env=service("http://127.0.0.1:9")) == Result(143, "", "")


def test_signals_are_ignored_once_the_process_only_has_to_exit() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupts = mogplex.Interrupts()
    interrupts.NAMES = ("SIGTERM",)  # type: ignore[misc]
    try:
        with interrupts.handled(to_the_end=True):
            assert signal.getsignal(signal.SIGTERM) == interrupts.arrived
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_api_refuses_an_empty_input(cli: Callable[..., Result]) -> None:
    result = cli("api", "PUT", "/automations/A", "--input", "", env=service("http://127.0.0.1:9"))
    assert (result.code, result.err.splitlines()[0]) == (2, "error: api: --input is empty")


def test_a_sandbox_that_is_listed_without_its_id_is_an_odd_answer(
    cli: Callable[..., Result],
) -> None:
    boxes = ok({"sandboxes": [{"sandbox_id": "sbx_1"}]})
    with RawServer(lambda *_: boxes) as server:
        result = cli("sandboxes", "logs", "sbx_1", env=service(server.url))
    assert (result.code, result.err) == (
        1, "error: the service lists no id of the sandbox 'sbx_1'\n")


def test_cancelling_several_runs_takes_the_time_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each run is told of, also one whose cancellation is never answered."""
    monkeypatch.setattr(mogplex, "GRACE_S", 0.1)
    over = threading.Event()

    def hang(connection: socket.socket) -> None:
        assert over.wait(30)

    with RawServer(of_runs(S=hang, T=hang, U=OVER)) as server:
        ctx = mogplex.Context(service(server.url), sys.stdin, io.StringIO(), io.StringIO())
        attendants = []
        for run_id in "STU":
            attendants.append(mogplex.Attendant(mogplex.CiReport(ctx), run_id))
        began = time.monotonic()
        mogplex.cancel_all(ctx, attendants)
        took_s = time.monotonic() - began
        over.set()
    assert [one.outcome.left for one in attendants] == [
        "; the run could not be cancelled",
        "; the run could not be cancelled",
        "; cancellation requested for run U",
    ]
    assert took_s < 10.0 and ctx.stderr.getvalue().count("cannot cancel the run: ") == 2


def test_github_is_told_of_each_run_and_gets_no_outputs_of_several(
    cli: Callable[..., Result], tmp_path: Any,
) -> None:
    job = Job(tmp_path)
    with RawServer(of_runs(R=OVER, S=ENDED_SO, T=WITHOUT_SCOPE)) as server:
        argv = ["runs", "events", "R", "S", "T", "--follow"]
        result = cli(*argv, env={**service(server.url), **job.env})
    assert re.findall("(?m)^::error title=(.*)$", result.err) == [
        "Mogplex run no longer followed::run T (status unknown): FORBIDDEN: no (HTTP 403)",
        "Mogplex run failed::boom",
    ]
    assert job.summary.read_text().count("### Mogplex run\n") == 3 and not job.output.exists()


def test_the_sign_of_life_of_several_runs_counts_them() -> None:
    ctx = mogplex.Context(service("http://127.0.0.1:9"), sys.stdin, io.StringIO(), io.StringIO())
    now = [0.0]
    followers = mogplex.Followers(ctx, "RST", mogplex.FollowOptions(follow=True))
    followers.life = mogplex.LifeSigns(ctx, False, clock=lambda: now[0])
    followers.end("R", "success", 0)
    well = mogplex.Progress("connected", "streaming", 0.0, 0.0, None, 0, "", 1.0, {})
    now[0] = 61.0
    followers.progress("S", well._replace(last_event_at=1.0))
    followers.progress("T", well._replace(connection="lost", status="", message="away"))
    assert followers.together().connection == "lost"
    assert ctx.stderr.getvalue() == (
        "still 2 runs: 1 success, 1 streaming, last event 1m ago\nT         away\n")
    followers.end("T", "failed", 1)
    assert followers.together().status == "3 runs: 1 success, 1 failed, 1 streaming"


def test_several_runs_that_nothing_was_asked_about_are_not_counted(
    cli: Callable[..., Result],
) -> None:
    result = cli("runs", "events", "R", "S", "--follow", env=service("http://127.0.0.1:9", ""))
    assert result.code == 64 and "2 runs" not in result.out + result.err


@pytest.mark.parametrize("texts", [["", ""], ["x" * 70_000]])
def test_events_are_held_back_only_while_they_are_few(texts: List[str]) -> None:
    ctx = mogplex.Context({}, sys.stdin, io.StringIO(), io.StringIO())
    attendant = mogplex.Attendant(mogplex.CiReport(ctx), "R")
    follower = mogplex.Follower(attendant, mogplex.FollowOptions())
    for text in texts:
        assert ctx.stdout.getvalue() == ""
        follower.show({"type": "log", "message": "here"}, text)
    assert ctx.stdout.getvalue().count("here\n") == len(texts)


def test_ci_is_told_the_status_that_a_cancellation_answers() -> None:
    ctx = mogplex.Context({}, sys.stdin, io.StringIO(), io.StringIO())
    attendant = mogplex.Attendant(mogplex.CiReport(ctx), "R")
    attendant.tell_cancellation({"run": {"status": "cancelled"}})
    assert attendant.outcome.status == "cancelled"


def test_work_is_done_also_where_the_system_has_no_thread_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(mogplex._thread, "start_new_thread", refuse)
    assert mogplex.in_background(int, "5").get_nowait() == 5


COLLECTOR = """
import atexit, gc, sys
import mogplex
before = gc.get_freeze_count()  # not 0 on Python 3.12
atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > before))
{call}
"""


def test_a_process_keeps_the_collector_from_what_is_loaded() -> None:
    out, _ = python(COLLECTOR.format(call="sys.exit(mogplex.main())"), "--version").communicate()
    assert out.splitlines()[-1] == "10000 True"


def test_a_command_in_the_process_of_another_leaves_its_collector_alone() -> None:
    call = "gc.set_threshold(77); mogplex.main(['--version'])"
    out, _ = python(COLLECTOR.format(call=call)).communicate()
    assert out.splitlines()[-1] == "77 False"


# ---------------------------------------------------------------- The contract

HERE = os.path.dirname(MODULE)
with open(MODULE, encoding="utf-8") as _module:
    SOURCE = _module.read()
EMBED_BANNER = re.compile(r"""(?mx)
    ^\#[ ]=+[ ]Everything[ ]above[ ]this[ ]line[ ]can[ ]be[ ]copied[ ]out[ ]and[ ]used[ ]as[ ]a[ ]library\.[ ]=+$
""")
BANNER = r"(?m)^# -{50,} (?:(\d)\. )?(.+)$"


def tree() -> ast.Module:
    return ast.parse(SOURCE)


def readme() -> str:
    """README.md, on which the tests of the documentation hang."""
    path = os.path.join(HERE, "README.md")
    assert os.path.exists(path), "README.md is missing: nothing tells users what these tests check"
    with open(path, encoding="utf-8") as file:
        return file.read()


def fenced(language: str) -> List[str]:
    """The README's fenced blocks in ``language``."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", readme())


def table_cells(header: str) -> List[List[str]]:
    """The rows of every table of the README whose first column is called ``header``."""
    tables = re.findall(rf"(?m)^\| *{header} *\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", readme() + "\n")
    assert tables, f"the README has no table that begins with | {header} |"
    lines = "".join(tables).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_sections_are_those_of_the_map() -> None:
    with open(__file__, encoding="utf-8") as file:
        tests = file.read()
    in_map = re.findall(r"(?m)^  ([1-9]) (\w+)  ", mogplex.__doc__ or "")
    banners = [(number, name.split()[0]) for number, name in re.findall(BANNER, SOURCE)]
    tested = [(number, name.split()[0]) for number, name in re.findall(BANNER, tests) if number]
    assert in_map == banners == tested and len(in_map) == 9


def names_defined(node: ast.stmt) -> List[str]:
    """What a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def names_used(code: types.CodeType) -> Iterator[str]:
    """The global names in compiled code, and in the functions inside it."""
    steps = list(dis.get_instructions(code))
    own = {step.argval for step in steps if step.opname == "STORE_NAME"}
    for step in steps:
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval not in own:
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_used(inner)


def test_no_name_of_the_tests_is_defined_twice() -> None:
    """The second would stand in for the first, in tests far above it."""
    with open(__file__, encoding="utf-8") as file:
        nodes = ast.parse(file.read()).body
    assigned = [node.targets[0] for node in nodes if isinstance(node, ast.Assign)]
    assigned += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    names = [node.id for node in assigned if isinstance(node, ast.Name)]
    names += [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_nothing_names_what_is_defined_below_it() -> None:
    """The file reads from top to bottom. From compiled code, where annotations are only text."""
    defined: Dict[str, int] = {}
    for node in tree().body:
        for name in names_defined(node):
            defined.setdefault(name, node.lineno)
    module = compile(SOURCE, MODULE, "exec", dont_inherit=True)
    looking_down = [
        f"{code.co_name} in line {code.co_firstlineno} names {name} of line {defined[name]}"
        for code in module.co_consts if isinstance(code, types.CodeType)
        for name in sorted(set(names_used(code)) - {code.co_name})
        if defined.get(name, 0) > code.co_firstlineno
    ]
    assert looking_down == []


HEAVY = {
    "asyncio", "blessed", "curses", "dataclasses", "datetime", "difflib", "email", "getpass", "http",
    "inspect", "requests", "secrets", "ssl", "tabulate", "tempfile", "webbrowser",
}


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys; sys.path.insert(0, {HERE!r}); import mogplex; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-W", "error", "-c", code]
    done = subprocess.run(argv, capture_output=True, timeout=60)
    assert done.returncode == 0 and HEAVY & set(done.stdout.decode().split()) == set()


def test_the_module_compiles_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(SOURCE, MODULE, "exec", dont_inherit=True)


NEEDS_38 = "mogplex needs Python 3.8 or newer; this is Python "
AS_37 = "import runpy, sys; sys.version_info = (3, 7, 16, 'final', 0); "


def zipapp_main() -> str:
    """__main__.py of mogplex.pyz, which .ci/zipapp writes."""
    with open(os.path.join(HERE, ".ci", "zipapp"), encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    texts = {name: node.value for node in body if isinstance(node, ast.Assign) for name in names_defined(node)}
    return ast.literal_eval(texts["MAIN"]).decode()


def old_pythons() -> Dict[str, str]:
    """The Pythons 3.6 and 3.7 of this machine, on PATH or of pyenv: version, program."""
    import glob
    found = {}
    for version in ("3.6", "3.7"):
        places = glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python"))
        for path in filter(None, [*places, shutil.which(f"python{version}")]):
            said = subprocess.run([path, "-V"], capture_output=True, timeout=60).stdout
            if said.startswith(f"Python {version}".encode()):  # a shim can be there without its Python
                found[version] = path
    return found


def refused_by(*command: str) -> Tuple[int, str, str]:
    """What a program says that is run with a Python too old for it."""
    done = subprocess.run(command, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode().rstrip()


def test_python_37_reads_the_module_which_says_what_it_needs() -> None:
    """What runs on any Python: its grammar of 3.7, and its word that it is one."""
    ast.parse(SOURCE, feature_version=(3, 7))
    script = f"{AS_37}runpy.run_path({MODULE!r}, run_name='__main__')"
    assert refused_by(sys.executable, "-c", script) == (1, "", f"{NEEDS_38}3.7")
    module = f"{AS_37}sys.path.insert(0, {HERE!r}); import mogplex"
    code, _, error = refused_by(sys.executable, "-c", module)
    assert code == 1 and error.splitlines()[-1] == f"ImportError: {NEEDS_38}3.7"


def test_the_zipapp_says_what_it_needs_to_a_python_that_cannot_read_the_module(tmp_path: Any) -> None:
    ast.parse(zipapp_main(), feature_version=(3, 4))
    with zipfile.ZipFile(tmp_path / "mogplex.pyz", "w") as archive:
        archive.writestr("__main__.py", zipapp_main())
        archive.writestr("mogplex.py", "this is no Python")
    script = f"{AS_37}runpy.run_path({str(tmp_path / 'mogplex.pyz')!r}, run_name='__main__')"
    assert refused_by(sys.executable, "-c", script) == (1, "", f"{NEEDS_38}3.7")
    for version, python in old_pythons().items():
        answer = refused_by(python, str(tmp_path / "mogplex.pyz"), "--version")
        assert answer == (1, "", NEEDS_38 + version)


def test_a_real_old_python_says_what_the_module_needs() -> None:
    """3.6 cannot read it, and shows the line at which it stops, with its comment."""
    for version, python in old_pythons().items():
        code, out, error = refused_by(python, MODULE, "--version")
        assert (code, out) == (1, "") and "mogplex needs Python 3.8 or newer" in error
        assert version == "3.6" or error == NEEDS_38 + version


@pytest.mark.posix
def test_the_file_itself_is_a_program(tmp_path: Any) -> None:
    """As it is, and through a link in PATH."""
    (tmp_path / "mogplex").symlink_to(MODULE)
    (tmp_path / "python3").symlink_to(sys.executable)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for name in (MODULE, "mogplex"):
        done = subprocess.run([name, "--version"], env=environ, capture_output=True, timeout=60)
        assert done.stdout.decode() == f"mogplex {mogplex.__version__}\n"


def test_the_dependency_lists_agree() -> None:
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCE)
    assert block
    script = dict(re.findall(r"(?m)^# ([\w-]+) = (.*)$", block.group(1)))
    config = configparser.ConfigParser()
    config.read(os.path.join(HERE, "setup.cfg"))
    needed = ast.literal_eval(script["dependencies"])
    assert needed == config["options"]["install_requires"].split()
    assert ast.literal_eval(script["requires-python"]) == config["options"]["python_requires"]
    with open(os.path.join(HERE, ".ci", "zipapp"), encoding="utf-8") as file:
        pinned = re.findall(r"(?m)^([a-z0-9-]+)==\S+ --hash=sha256:[0-9a-f]{64}$", file.read())
    assert {re.split("[<>=]", name)[0] for name in needed} <= set(pinned)


def codes_in(text: str) -> Dict[int, str]:
    """The exit codes in a text, and the first word on each."""
    return {int(code): word for code, word in re.findall(r"(\d+) +([A-Za-z]+)", text)}


def test_the_exit_codes_that_are_told_are_the_enum_s() -> None:
    codes = {int(code) for code in mogplex.Exit}
    told = re.search(r"Exit codes: ([^.]*)\.", mogplex.__doc__ or "")
    assert told
    in_map, in_help = codes_in(told.group(1)), codes_in(mogplex.exit_codes_summary())
    assert in_map == in_help and set(in_map) == codes
    cells = ", ".join(row[0] for row in table_cells("code"))
    assert codes == {int(code) for code in cells.split(", ")}


def test_the_environment_that_is_told_is_the_code_s() -> None:
    constants = [node.value for node in ast.walk(tree()) if isinstance(node, ast.Constant)]
    strings = {value for value in constants if isinstance(value, str)}
    ours = {text for text in strings if re.match(r"MOGPLEX_[A-Z_]+\Z", text)}
    cells = " ".join(row[0] for row in table_cells("variable"))
    rows = set(re.findall(r"`([A-Z][A-Z_]+)[^`]*`", cells))
    libraries = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "COLUMNS"}
    assert {name for name in rows if name.startswith("MOGPLEX_")} == ours
    assert ours <= set(re.findall(r"MOGPLEX_[A-Z_]+", mogplex.__doc__ or ""))
    assert rows == set(mogplex.ENVIRONMENT)
    assert {name for name in rows if name not in strings | libraries} == set()


def test_the_messages_that_the_readme_explains_are_the_program_s() -> None:
    for message, _ in table_cells("message"):
        quoted = re.findall("`([^`]+)`", message)[0]
        parts = [part.strip() for part in re.split("[0-9]+", quoted)]  # a number can be any
        is_code = quoted.isupper()  # a word of the service's
        is_said = all(part in SOURCE for part in parts)
        assert is_code or is_said, f"the program does not say {quoted}"


def test_the_flags_that_are_told_are_the_parser_s(cli: Callable[..., Result]) -> None:
    told = {flag for row in table_cells("flag") for flag in re.findall(r"--[a-z][a-z-]+", row[0])}
    known = set(re.findall(r"(?m)^  (--[a-z][a-z-]+)", cli("--help").out))
    for name in mogplex.SUBCOMMANDS:
        taken = {option.flag for option in mogplex.command_row(name).options}
        assert taken <= set(re.findall(r"--[a-z][a-z-]+", cli(*name.split(), "--help").out)), name
        known |= taken
    assert told == known


def command_lines() -> List[str]:
    """What follows ``mogplex`` wherever the README's shell blocks call it."""
    text = "\n".join(fenced("(?:sh|bash|console)")).replace("\\\n", " ")
    calls = re.findall(r"""(?mx)
        (?: ^ | [|;&(][ ]* | \$[ ] )                  # where a command begins
        (?: [A-Z_]+=\S+[ ] )*                         # its variables
        mogplex
        ( (?: [ ]+ (?: "[^"]*" | '[^']*' | [^|;&)\#<>\s] | <[\w-]+> )+ )* )
    """, text)
    assert calls, "the README shows no command"
    return calls


def test_every_command_in_the_readme_parses() -> None:
    anywhere = [option.flag for option in mogplex.GLOBAL_OPTIONS]
    for line in command_lines():
        words = [word for word in shlex.split(line) if word not in anywhere]
        if words and words[0] in mogplex.GROUPS and "--help" not in words:
            name = mogplex.command_named(words)
            ctx = mogplex.Context({}, None, io.StringIO(), io.StringIO())
            mogplex.parse_command(ctx, name, words[len(name.split()):])
            assert ctx.stderr.getvalue() == ""


def test_completions_know_commands_flags_statuses_and_harnesses() -> None:
    def walk(parser: Any, name: str) -> Iterator[Tuple[str, Any]]:
        for action in parser._actions:
            yield name, action
            if hasattr(action, "_name_parser_map"):
                for word, inner in action.choices.items():
                    yield from walk(inner, f"{name} {word}".strip())

    actions = list(walk(mogplex.make_parser(), ""))
    flags = {(name, flag): action for name, action in actions for flag in action.option_strings}
    assert set(mogplex.SUBCOMMANDS) <= {name for name, _ in actions}
    assert set(mogplex.GROUPS) == {name.split()[0] for name in mogplex.SUBCOMMANDS}
    assert {("", flag) for flag in ("--version", "--demo-server", "--attach")} <= set(flags)
    assert flags["run", "--harness"].choices == tuple(mogplex.HARNESSES)
    assert flags["sandboxes list", "--status"].choices == tuple(mogplex.SANDBOX_STATUSES)
    assert ("runs events", "--follow") in flags
    offered = {name: action.choices for name, action in actions if not action.option_strings}
    assert set(offered["help"]) == {*mogplex.GROUPS, *mogplex.HELP_TOPICS}
    assert offered["completion"] == ("bash", "zsh", "fish")
    for _, action in actions:  # shtab leaves out a word that has no help
        if hasattr(action, "_name_parser_map"):
            assert set(action.choices) == {shown.dest for shown in action._choices_actions}


def signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults of the parameters."""
    shown: List[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = getattr(parameter.default, "__name__", repr(parameter.default))
        shown.append(name if parameter.default is parameter.empty else f"{name}={default}")
    return f"({', '.join(shown)})"


def public_names() -> Iterator[Tuple[str, str, Any]]:
    """Everything that ``__all__`` promises: its name, how it is used, and the thing."""
    for name in mogplex.__all__:
        thing = getattr(mogplex, name)
        if not isinstance(thing, type):
            yield name, signature(thing), thing
        elif issubclass(thing, mogplex.Exit):
            yield name, " ".join(f"{code.name}={code.value}" for code in thing), thing
        elif issubclass(thing, tuple):
            yield name, f"({', '.join(thing._fields)})", thing
        elif issubclass(thing, dict):
            yield name, f"{{{', '.join(typing.get_type_hints(thing))}}}", thing
        elif issubclass(thing, Exception) and thing is not mogplex.MogplexError:
            yield name, f"{thing.__mro__[1].__name__} exit {int(thing.exit)}", thing  # type: ignore[attr-defined]
        else:
            yield name, signature(thing.__init__).replace("self, ", "", 1), thing  # type: ignore[misc]
            for method in sorted(vars(thing)):
                if not method.startswith("_") and callable(getattr(thing, method)):
                    yield f"{name}.{method}", signature(getattr(thing, method)), getattr(thing, method)


# Recorded: a line that is gone or another means a new major version.
STABLE = """\
Client (token, base_url='https://www.mogplex.com', *, session=None, timeout_s=30.0, connect_timeout_s=10.0, tries=3, trust_env=False, verify=True, log=None, sleep=sleep, random=random_unit)
Client.agents (self)
Client.cancel (self, run_id)
Client.close (self)
Client.create_sandbox (self, body)
Client.envelope (self, method, path, *, query='', body=None, idempotency_key='')
Client.events (self, run_id, limit=None)
Client.mcp_servers (self)
Client.models (self)
Client.open_events (self, run_id, tick, renew, limit, last_event_id, idle_s)
Client.open_run (self, run_id, tick, renew=True)
Client.post_form (self, url, form)
Client.repos (self, query='', repo_id='', limit=None)
Client.request (self, method, path, *, params=None, body=None, idempotency_key='')
Client.run (self, run_id)
Client.sandbox_logs (self, sandbox_id)
Client.sandboxes (self, repo_id='', status='', limit=None)
Client.start_run (self, body, idempotency_key)
Client.stop_sandbox (self, sandbox_id)
Credential (token, *, source='given', base_url='', refresh_token='', expires_at=None, home=None)
Credential.anonymous ()
Credential.current (self, post)
Credential.renew (self, refused, post)
Credential.settle (self, seconds=5.0)
Event {id, type, toolName, message, payload, createdAt}
Exit OK=0 FAILURE=1 USAGE=2 UNAUTHORIZED=64 FORBIDDEN=65 UNAVAILABLE=69 TEMPORARY=75 HANGUP=129 INTERRUPTED=130 BROKEN_PIPE=141 TERMINATED=143
ForbiddenError MogplexError exit 65
InvalidResponseError MogplexError exit 1
MogplexError (message, *, code='', status=0, hint='', retry_after_s=None, delivered=False, transient=False)
Progress (connection, status, started_at, last_event_at, retry_at, failures, message, latency_ms, run, branch, pull_request_url)
RateLimitedError MogplexError exit 75
Repo {id, full_name, installation_id, default_branch, root_directory}
Run {runId, aiCallId, sandboxRecordId, sandboxId, repoId, harness, status, branch, rootDirectory, eventsUrl, cancelUrl, createdAt, updatedAt, error, runtime, replayed}
SSEDecoder (last_event_id='')
SSEDecoder.feed (self, chunk)
Sandbox {id, sandbox_id, repo_id, status, base_branch, working_branch, root_directory, preview_url, created_at, last_active_at, error}
ServerSentEvent (event, id, data, retry)
TailTimeout MogplexError exit 1
UnauthorizedError MogplexError exit 64
UnavailableError MogplexError exit 69
UsageError MogplexError exit 2
Verdict (run_id, status, error, working_branch, pull_request_url, truncated, duration_s, run)
sanitize (text, newline=' ⏎ ')
tail (client, run_id, *, timeout_s=None, limit=200, on_progress=tell_nobody, interval_s=1.5, idle_s=30.0, just_started=False, clock=monotonic, sleep=sleep, random=random_unit)
tail_many (client, run_ids, *, timeout_s=None, limit=200, on_progress=tell_nobody_of_many, interval_s=1.5, idle_s=30.0, cancels=False, clock=monotonic, sleep=sleep, random=random_unit)
DemoServer (port=0, *, clock=time, speed=1.0)
DemoServer.has_started_runs (self)
"""


def test_what_embedders_use_is_as_recorded() -> None:
    assert "".join(f"{name} {use}\n" for name, use, _ in public_names()) == STABLE


def test_what_embedders_use_is_documented() -> None:
    assert [name for name, _, thing in public_names() if not (thing.__doc__ or "").strip()] == []


def public_functions() -> Iterator[Any]:
    """Everything that ``__all__`` promises, with the constructors and properties of its classes."""
    for _, _, thing in public_names():
        yield thing
        if isinstance(thing, type):
            if "__init__" in vars(thing) and not issubclass(thing, mogplex.Exit):
                yield vars(thing)["__init__"]
            properties = [value for value in vars(thing).values() if isinstance(value, property)]
            yield from (value.fget for value in properties)


def test_the_types_of_what_embedders_use_are_true_and_whole() -> None:
    for function in public_functions():
        hints = typing.get_type_hints(function)
        if inspect.isfunction(function):
            parameters = set(inspect.signature(function).parameters) - {"self"}
            assert {*parameters, "return"} <= set(hints), function


def is_a(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of the type that an annotation tells; its keys are those told."""
    if getattr(hint, "__origin__", None) is Union:
        return any(is_a(value, one) for one in hint.__args__)
    if hasattr(hint, "__total__"):
        hints = typing.get_type_hints(hint)
        return isinstance(value, dict) and all(
            key in hints and is_a(one, hints[key]) for key, one in value.items())
    if getattr(hint, "__origin__", None) is list:
        return isinstance(value, list) and all(is_a(one, hint.__args__[0]) for one in value)
    return isinstance(value, getattr(hint, "__origin__", hint))


def test_what_the_service_sends_is_of_the_types_that_the_client_tells(
    demo: mogplex.DemoServer,
) -> None:
    body = {"repoId": next(iter(mogplex.DEMO_REPOS)), "prompt": "p"}
    with mogplex.Client(demo.token, demo.url) as client:
        run = client.start_run(body, "k")
        calls = [
            (client.repos, ()), (client.sandboxes, ()), (client.start_run, (body, "k")),
            (client.run, (FINISHED,)), (client.events, (FINISHED,)), (client.cancel, (run["runId"],)),
        ]  # type: List[Tuple[Callable[..., Any], Tuple[Any, ...]]]
        for call, arguments in calls:
            answer = call(*arguments)
            assert answer and is_a(answer, typing.get_type_hints(call)["return"]), call.__name__
        assert set(client.repos()[0]) == set(typing.get_type_hints(mogplex.Repo))
        assert set(client.sandboxes()[0]) == set(typing.get_type_hints(mogplex.Sandbox))
        assert {*client.run(FINISHED), "replayed"} == set(typing.get_type_hints(mogplex.Run))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the module cut at its banner, in which only requests can be imported besides."""
    directory = tmp_path_factory.mktemp("library")
    upper, lower = EMBED_BANNER.split(SOURCE)
    assert "class Client" in upper and "def main" in lower
    (directory / "mogplex.py").write_text(upper, encoding="utf-8")
    for name in ("tabulate", "blessed"):
        (directory / f"{name}.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    return str(directory)


def test_the_upper_half_is_a_library(library: str) -> None:
    code = """if True:
        import mogplex, typing
        from mogplex import *
        for name in mogplex.__all__:
            typing.get_type_hints(getattr(mogplex, name))
        print(mogplex.__file__)
    """
    argv = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(argv, capture_output=True, timeout=60, cwd=library)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.decode().startswith(library)


def readme_program(name: str, directory: Any) -> str:
    """The path of a copy of the program of the README whose docstring begins with ``name``."""
    (text,) = [text for text in fenced("python") if text.startswith(f'"""{name}')]
    program = directory / name
    program.write_text(text, encoding="utf-8")
    return str(program)


@pytest.mark.slow
def test_the_readme_s_program_works_with_the_upper_half_and_requests_alone(library: str, tmp_path: Any) -> None:
    program = readme_program("delegate.py", tmp_path)
    cases = [
        (["Acme/WEB", "Fix the cookie test"], {}, 0,
         r"success https://github\.com/acme/web/pull/\d+\n", "Pull request ready"),
        (["acme/web", "fail at once"], {}, 1,
         re.escape(f"failed {mogplex.DEMO_ERROR}\n"), "Harness run failed"),
        (["acme/web", "Fix it", "0.01"], {}, 1, "cancelled: cancelled\n", ""),
        (["acme/we", "Fix it"], {}, 1, "", "no repo named acme/we is linked to this account\n"),
        (["acme/web", "Fix it"], {"MOGPLEX_API_KEY": TOKEN}, 64, "", "UNAUTHORIZED"),
        (["acme/web", ""], {}, 1, "", "BAD_REQUEST: Prompt is required (HTTP 400)"),
    ]
    with mogplex.DemoServer(speed=40.0) as demo:
        started = [subprocess.Popen(
            [*HURRIED, program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **service(demo.url, demo.token), "PYTHONPATH": library, **env})
            for argv, env, *_ in cases]
        for process, (argv, _, code, out, told) in zip(started, cases):
            stdout, stderr = (
                data.decode().replace(os.linesep, "\n") for data in process.communicate(timeout=60))
            assert process.returncode == code and re.fullmatch(out, stdout) and told in stderr, (argv, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("seconds, code, out, told", [
    ("60", 0, "success failed\n", ""),
    ("0.2", 1, "", "TimeoutError"),
])
def test_the_readme_s_asynchronous_program_ends_its_threads_at_a_time_out(
    library: str, tmp_path: Any, seconds: str, code: int, out: str, told: str,
) -> None:
    program = tmp_path / readme_program("follow_async.py", tmp_path)
    if sys.version_info < (3, 9):
        text = program.read_text(encoding="utf-8")
        in_executor = "asyncio.get_running_loop().run_in_executor(None, "
        program.write_text(text.replace("asyncio.to_thread(", in_executor), encoding="utf-8")
    with mogplex.DemoServer(speed=20.0 if code == 0 else 0.1) as demo:
        with mogplex.Client(demo.token, demo.url) as client:
            run_ids = [
                client.start_run({"repoId": next(iter(mogplex.DEMO_REPOS)), "prompt": task}, task)["runId"]
                for task in ("Fix it", "Please fail")]
        done = subprocess.run(
            [*HURRIED, str(program), seconds, *run_ids], capture_output=True, timeout=60,
            env={**os.environ, **service(demo.url, demo.token), "PYTHONPATH": library})
    said = done.stdout.decode().replace(os.linesep, "\n")
    assert (done.returncode, said) == (code, out) and told in done.stderr.decode()


@pytest.mark.slow
def test_the_readme_s_test_passes_against_the_demo_server(tmp_path: Any) -> None:
    readme_program("delegate.py", tmp_path)
    test = readme_program("test_delegate.py", tmp_path)
    (tmp_path / "conftest.py").write_text(f"import mogplex{HURRY_LIBRARY}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test], capture_output=True,
        timeout=60, cwd=tmp_path)
    assert done.returncode == 0 and b"1 passed" in done.stdout, done.stdout.decode()


def test_the_readme_s_copy_of_the_upper_half_is_the_upper_half(tmp_path: Any) -> None:
    pattern = re.search(r"`sed '/(.*)/,\$d' mogplex\.py > vendor/mogplex\.py`", readme())
    assert pattern
    kept = re.split(f"(?m){pattern.group(1)}", SOURCE)
    assert len(kept) == 2 and kept[0] == EMBED_BANNER.split(SOURCE)[0]


def test_a_client_with_a_session_of_the_embedder_s_on_two_threads(demo: mogplex.DemoServer) -> None:
    import requests

    class Session(requests.Session):
        closed = 0

        def close(self) -> None:
            self.closed += 1
            super().close()

    def ask(count: int) -> None:
        for _ in range(count):
            answers.append((client.repos(query="web", limit=1), client.run(FINISHED)["status"]))

    session, answers = Session(), []  # type: Tuple[Session, List[Tuple[Any, ...]]]
    with mogplex.Client(demo.token, demo.url, session=session) as client:
        threads = [threading.Thread(target=ask, args=(20,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(answers) == 40 and all(answer == answers[0] for answer in answers) and answers[0][1] == "success"
    assert session.closed == 0 and session.get(demo.url).status_code == 404
    session.close()


def test_the_library_never_reads_the_environment_prints_or_exits() -> None:
    upper = ast.parse(EMBED_BANNER.split(SOURCE)[0])
    named = {ast.dump(node.value) + node.attr for node in ast.walk(upper) if isinstance(node, ast.Attribute)}
    called = {node.func.id for node in ast.walk(upper) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not any("'os'" in name and name.endswith(("environ", "getenv")) for name in named)
    assert not any("'sys'" in name and name.endswith(("exit", "stdout", "stderr", "argv")) for name in named)
    assert called & {"print", "input", "exit", "quit"} == set()


# What a person at another time sees otherwise, and what is not compared: ids, times, durations, ages,
# the numbers of pull requests, the demo's port, and how many spaces stand between two columns.
NORMAL = [
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<id>"),
    (r"agent-[0-9a-f]{8}", "agent-<id>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+]00:00)", "<time>"),
    (r"/pull/\d+", "/pull/<n>"),
    (r"\b\d+ ms\b", "<ms>"),
    (r"\b\d+[dhms]( \d+[hms])?\b", "<age>"),
    (r"http://127\.0\.0\.1:\d+", "<service>"),
    (r" {2,}", "  "),
    (r"\((pending|streaming)\)", "(<active>)"),  # a demo so fast can be past the first
]


def normal(text: str) -> str:
    for pattern, word in NORMAL:
        text = re.sub(pattern, word, text)
    return text.rstrip()


def steps_of(block: str) -> List[Tuple[str, str]]:
    """The commands of a console block, each with what the README says that it prints."""
    parts = re.split(r"(?m)^\$ ((?:.*\\\n)*.*)\n?", block)
    assert parts[0] == "" and len(parts) > 1, f"a console block begins with a command: {block!r}"
    return list(zip(parts[1::2], parts[2::2]))


def agrees(expected: str, printed: str) -> bool:
    """Whether a command printed what it should; ``...`` is any lines, or in a line any text."""
    lines = [r"(?:.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
             for line in normal(expected).splitlines()]
    text = normal(printed) + "\n" if printed.strip() else ""
    return re.fullmatch("".join(lines), text) is not None


@pytest.fixture(scope="module")
def shell_tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PATH: the program as ``mogplex``, this Python as ``python3``, and of jq what the README uses."""
    directory = tmp_path_factory.mktemp("bin")
    scripts = {
        "mogplex": f'exec {shlex.join(PROGRAM)} "$@"', "python3": f'exec "{sys.executable}" "$@"',
        "jq": f'exec "{sys.executable}" -c "import json, sys\nfor line in sys.stdin:\n value = json.loads(line)\n'
              ' for key in sys.argv[-1].strip(\'.\').split(\'.\'): value = value[key]\n print(value)" "$@"'}
    for name, script in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (directory / name).chmod(0o755)
    return str(directory)


def shell(
    script: str, tools: str, home: str, demo: mogplex.DemoServer, **env: str,
) -> "subprocess.Popen[bytes]":
    """bash at work on ``script`` as a user of the demo service; stderr goes where stdout goes."""
    for record in demo.seeded_runs:
        mogplex.Home(home, lambda text: None).record_start(record)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    ours = {**service(demo.url, demo.token), "MOGPLEX_HOME": home, "PATH": path}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=home, env={**os.environ, **ours, **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def session_script(block: str, token: str) -> str:
    """A console block as a script that marks the end of what each command prints."""
    lines = ["mark() { status=$?; printf '\\036'; return $status; }"]
    for command, _ in steps_of(block):
        in_session = command.replace("mog_...", token).replace("mogplex --demo ", "mogplex ")
        lines.extend([in_session, "mark"])
    return "\n".join([*lines, ""])


@pytest.mark.posix
@pytest.mark.slow
def test_every_command_that_the_readme_shows_prints_what_it_says(
    shell_tools: str, tmp_path_factory: Any,
) -> None:
    """Each console block is a session with a demo service of its own."""
    wrong = []
    with contextlib.ExitStack() as stack:
        sessions = []
        for block in fenced("console"):
            demo = stack.enter_context(mogplex.DemoServer(speed=20.0))
            script = session_script(block, demo.token)
            home = str(tmp_path_factory.mktemp("home"))
            sessions.append((block, shell(script, shell_tools, home, demo)))
        for block, process in sessions:
            printed = process.communicate(timeout=60)[0].decode().split("\x1e")
            for (command, expected), text in zip(steps_of(block), printed):
                if not agrees(expected, text):
                    wrong.append(f"$ {command}\n{text}")
    assert sessions and "\n".join(wrong) == ""


class CiStep(NamedTuple):
    """A shell step of a CI example in the README."""

    when: str                  # its ``if:``; of GitLab's, "script" or "after_script"
    script: str
    variables: Dict[str, str]


def github_steps(block: str) -> List[CiStep]:
    """The steps of a workflow that run a script."""
    found: List[CiStep] = []
    for part in re.split(r"(?m)^(?= +- (?:uses|id|if):)", block):
        when = re.search(r"(?m)^ +- if: (.*)$", part)
        script = re.search(r"(?m)^( +)run: \|\n((?:\1 .*\n)+)", part)
        env = re.search(r"(?m)^( +)env:\n((?:\1 +.*\n)+)", part)
        if script:
            variables = dict(re.findall(r"(?m)^ +(\w+): (.*)$", env.group(2) if env else ""))
            found.append(CiStep(when.group(1) if when else "", textwrap.dedent(script.group(2)), variables))
    return found


def gitlab_steps(block: str) -> List[CiStep]:
    """The scripts of a job, each with the job's variables."""
    env = re.search(r"(?m)^  variables:\n((?:    .*\n)+)", block)
    assert env
    variables = dict(re.findall(r"(?m)^ +(\w+): (.*)$", env.group(1)))
    scripts = re.findall(r"(?m)^  (script|after_script):\n    - \|\n((?:      .*\n)+)", block)
    return [CiStep(when, textwrap.dedent(script), variables) for when, script in scripts]


class CiJob:
    """A CI job of the README, run as its CI runs it: each step is a script for bash."""

    def __init__(self, kind: str, task: str, tools: str, directory: Any, speed: float) -> None:
        (block,) = [block for block in fenced("yaml") if ("steps:" in block) is (kind == "github")]
        self.steps = github_steps(block) if kind == "github" else gitlab_steps(block)
        self.kind = kind
        self.directory = directory
        self.demo = mogplex.DemoServer(speed=speed)
        self.values = {"secrets.MOGPLEX_API_KEY": self.demo.token, "inputs.task": task}
        self.status = "success"
        self.environ = {
            **os.environ, **service(self.demo.url, self.demo.token), "TASK": task,
            "MOGPLEX_HOME": str(directory), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        with zipfile.ZipFile(directory / "mogplex.pyz", "w") as archive:  # PYTHONPATH has the module
            archive.writestr("__main__.py", f"import sys, mogplex{HURRY}sys.exit(mogplex.main())")

    def __enter__(self) -> CiJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.demo.__exit__()

    def settings(self, attempt: int) -> Dict[str, str]:
        """What its CI tells a job, in its first run and when it is run again."""
        if self.kind == "gitlab":
            return {
                **GITLAB, "GITLAB_CI": "true", "CI_JOB_ID": str(90 + attempt),
                "CI_JOB_STATUS": self.status,
            }
        return {
            **GITHUB, "GITHUB_ACTIONS": "true", "GITHUB_RUN_ATTEMPT": str(attempt),
            "GITHUB_OUTPUT": str(self.directory / "output"),
            "GITHUB_STEP_SUMMARY": str(self.directory / "summary"),
        }

    def due(self, step: CiStep) -> bool:
        """Whether the CI would run a step."""
        if step.when == "after_script":
            return True
        if step.when.startswith("cancelled()") and self.status != "canceled":
            return False
        if not step.when.startswith("cancelled()") and self.status != "success":
            return False
        outputs = re.findall(r"steps\.agent\.outputs\.\w+", step.when)
        return all(self.values.get(name) for name in outputs)

    def expanded(self, text: str) -> str:
        """``text`` with the values of the expressions in it."""
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: self.values[found.group(1)], text)

    def begin(self, step: CiStep, attempt: int) -> "subprocess.Popen[bytes]":
        """Start a step."""
        given = {name: self.expanded(value) for name, value in step.variables.items()}
        script = self.directory / "step.sh"
        script.write_text(step.script, encoding="utf-8")
        task = self.values["inputs.task"]
        env = {**self.environ, **self.settings(attempt), **given, "TASK": task}
        return subprocess.Popen(
            ["bash", "-e", str(script)], env=env, cwd=self.directory, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end(self, process: "subprocess.Popen[bytes]") -> str:
        """What a step prints until it ends; its outputs are known to those after it."""
        printed = process.communicate(timeout=60)[0].decode()
        with contextlib.suppress(FileNotFoundError):
            outputs = re.findall("(?m)^(.*?)=(.*)$", (self.directory / "output").read_text())
            self.values.update((f"steps.agent.outputs.{name}", value) for name, value in outputs)
        return printed

    def run(self, attempt: int) -> List[str]:
        """What each step prints that is due."""
        self.status = "success"
        printed: List[str] = []
        for step in self.steps:
            if self.due(step):
                process = self.begin(step, attempt)
                printed.append(self.end(process))
                if process.returncode:
                    self.status = "failed"
        return printed


@pytest.mark.posix
@pytest.mark.parametrize("kind", ["github", "gitlab"])
@pytest.mark.parametrize("task, status, words", [
    ("Fix the flaky cookie test", "success", ["started", "matched"]),
    ("Please fail", "failed", ["started", "started"]),
])
@pytest.mark.slow
def test_the_readme_s_ci_examples(
    shell_tools: str, tmp_path: Any, kind: str, task: str, status: str, words: List[str],
) -> None:
    """Run, and run again as a CI does on request."""
    with CiJob(kind, task, shell_tools, tmp_path, speed=100.0) as job:
        for attempt, word in enumerate(words, 1):
            first, *others = job.run(attempt)
            assert job.status == status, first
            assert re.search(rf"(?m)^{word} (existing )?run ", first)
            assert first.count("::error ") == (kind == "github" and status == "failed")
            markers = [first.count(f"\x1b[0Ksection_{edge}:") for edge in ("start", "end")]
            assert markers == [kind == "gitlab"] * 2
            if kind == "github" and status == "success":
                assert others[0].startswith("Please review https://github.com/acme/web/pull/")
            if kind == "gitlab":
                assert f"MOGPLEX_STATUS={status}\n" in (tmp_path / "agent.env").read_text()


@pytest.mark.posix
@pytest.mark.parametrize("kind, number", [("github", signal.SIGINT), ("gitlab", signal.SIGTERM)])
@pytest.mark.slow
def test_the_readme_s_ci_examples_cancel_the_run(
    shell_tools: str, tmp_path: Any, kind: str, number: int,
) -> None:
    """GitHub interrupts the shell of the step alone: what it becomes must end by that signal."""
    with CiJob(kind, "Fix the flaky cookie test", shell_tools, tmp_path, speed=0.1) as job:
        process = job.begin(job.steps[0], 1)
        assert process.stdout is not None
        while b"External Mogplex run accepted" not in process.stdout.readline():
            pass
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        job.end(process)
        (run_id,) = set(job.demo.service.runs) - {record["id"] for record in job.demo.seeded_runs}
        with mogplex.Client(job.demo.token, job.demo.url) as client:
            assert client.run(run_id)["status"] == "cancelled"
        job.status = "canceled"
        (last,) = [step for step in job.steps[1:] if job.due(step)]
        assert job.end(job.begin(last, 1)) == f"run {run_id} is already cancelled\n"


def ended(**changes: Any) -> mogplex.Outcome:
    """How a run ended, as a CI is told of it."""
    known = mogplex.Outcome(
        "r-1", "failed", "exit code 1: a, 50% done", "agent/x", "https://github.com/a/b/pull/1",
        "repo-1", 125.0)
    return known._replace(**changes)


@pytest.mark.parametrize("changes, annotation", [
    ({}, "::error title=Mogplex run failed::exit code 1: a, 50%25 done"),
    ({"error": "x" * 2000}, "::error title=Mogplex run failed::" + "x" * 1000),
    ({"error": "", "status": "can:c,%"},
     "::error title=Mogplex run can%3Ac%2C%25::run r-1 ended can:c,%25"),
    ({"status": "streaming", "left": "gave up"},
     "::error title=Mogplex run no longer followed::run r-1 (streaming): gave up"),
    ({"status": "", "left": "gave up"},
     "::error title=Mogplex run no longer followed::run r-1 (status unknown): gave up"),
    ({"run_id": "", "left": "Scope\n::x"}, "::error title=Mogplex run not started::Scope : :x"),
])
def test_github_s_annotation_says_what_ended(changes: Dict[str, str], annotation: str) -> None:
    assert mogplex.github_annotation(ended(**changes)) == annotation


def test_github_s_summary_and_outputs() -> None:
    assert mogplex.github_summary(ended(error="a|b\n# <i>"), "Fix `it` @all", ["12:00 log x|y"]) == (
        "### Mogplex run\n\n| | |\n| --- | --- |\n| task | Fix &#96;it&#96; &#64;all |\n| run | r&#45;1 |\n"
        "| repo | repo&#45;1 |\n| status | failed |\n| run error | a&#124;b &#35; &#60;i&#62; |\n| branch | agent&#47;x |\n"
        "| pull request | https://github.com/a/b/pull/1 |\n| duration | 2m 05s |\n"
        "\n| last events |\n| --- |\n| 12&#58;00 log x&#124;y |\n\n")
    assert mogplex.github_outputs(run_id="r", branch="a\nstatus=success\r\nb<<X") == (
        "run_id=r\nbranch=a status=success b<<X\n")


def test_a_dotenv_file_holds_nothing_that_a_shell_obeys() -> None:
    assert mogplex.dotenv_text(ended(branch="a b;$(rm -rf ~)\nX='1'`")) == (
        "MOGPLEX_RUN_ID=r-1\nMOGPLEX_STATUS=failed\nMOGPLEX_BRANCH=a_b___rm_-rf____X__1__\n"
        "MOGPLEX_PULL_REQUEST_URL=https://github.com/a/b/pull/1\n")


@pytest.mark.parametrize("url", [
    "https://x/a|b", "https://x/)[y](z", "javascript:alert(1)", "https://x/\n| a | b |", "https://x/<b>", "https://u@x/", "https://"])
def test_only_a_plain_url_is_a_link_in_the_summary(url: str) -> None:
    row = next(line for line in mogplex.github_summary(ended(pull_request_url=url), "", []).splitlines() if "pull" in line)
    assert re.fullmatch(r"\| pull request \| (?:[\w ]|&#\d+;)+ \|", row)


def test_gitlab_s_markers() -> None:
    assert mogplex.gitlab_marker("start", "r-1", 9.5) == "\x1b[0Ksection_start:9:mogplex_r_1\r\x1b[0KMogplex run r-1\n"
    assert mogplex.gitlab_marker("end", "r-1", 10.5) == "\x1b[0Ksection_end:10:mogplex_r_1\r\x1b[0K\n"
    hostile = mogplex.gitlab_marker("start", "\n::x::\x1b[0K\r" * 20, 1)
    assert (hostile.count("\n"), hostile.count("\r"), hostile.count("\x1b")) == (1, 1, 2) and "\n::" not in hostile
    assert len(mogplex.gitlab_marker("end", "r" * 200, 1)) < 120


GITHUB = {"GITHUB_RUN_ID": "7", "GITHUB_JOB": "agent", "GITHUB_REPOSITORY": "acme/web"}
GITLAB = {"CI_PIPELINE_ID": "7", "CI_JOB_NAME": "agent", "CI_PROJECT_ID": "3", "CI_JOB_ID": "90"}
BODY = {"repoId": "r", "prompt": "p"}


def test_a_ci_key_is_that_of_the_pipeline_s_run_the_job_the_label_and_the_request() -> None:
    requests = [
        (GITHUB, BODY, ""),
        ({**GITHUB, "GITHUB_JOB": "x"}, BODY, ""),
        ({**GITHUB, "GITHUB_RUN_ID": "8"}, BODY, ""),
        ({**GITHUB, "GITHUB_REPOSITORY": "x"}, BODY, ""),
        (GITHUB, {**BODY, "a": 1}, ""),
        (GITHUB, BODY, "0"),
        (GITHUB, BODY, "1"),
        (GITLAB, BODY, ""),
        ({**GITLAB, "CI_JOB_NAME": "agent 1/2"}, BODY, ""),
    ]
    keys = [mogplex.ci_idempotency_keys(*request)[0] for request in requests]
    assert len(set(keys)) == len(keys) and all(re.fullmatch("ci-[0-9a-f]{64}", key) for key in keys)
    reordered = dict(reversed(list(BODY.items())))
    assert mogplex.ci_idempotency_keys(GITHUB, reordered)[0] == keys[0]


def test_the_ci_keys_of_a_re_run_begin_with_those_before_it() -> None:
    def keys_of(environ: Dict[str, str], **changes: str) -> List[str]:
        return mogplex.ci_idempotency_keys({**environ, **changes}, BODY)

    attempts = [keys_of(GITHUB, GITHUB_RUN_ATTEMPT=number) for number in "123"]
    assert [len(keys) for keys in attempts] == [1, 2, 3]
    assert attempts[2][:2] == attempts[1] and attempts[1][:1] == attempts[0]
    assert len(set(attempts[2])) == 3
    for number in range(2, 30):  # a later attempt tries what an early one started, and its own
        keys = keys_of(GITHUB, GITHUB_RUN_ATTEMPT=str(number))
        assert keys[:2] == attempts[1] and len(set(keys)) == min(number, 1 + mogplex.MAX_RERUNS)
    first = keys_of(GITLAB, CI_JOB_ID="90")
    retry = keys_of(GITLAB, CI_JOB_ID="91")
    assert first[0] == retry[0] and first[1] != retry[1]


@pytest.mark.parametrize("task, env, again, word", [
    ("Please fail", GITHUB, {"GITHUB_RUN_ATTEMPT": "2"}, "started"),
    ("Please fail", GITHUB, {"GITHUB_RUN_ATTEMPT": "1"}, "matched"),
    ("Fix it", GITHUB, {"GITHUB_RUN_ATTEMPT": "2"}, "matched"),
    ("Please fail", GITLAB, {"CI_JOB_ID": "91"}, "started"),
    ("Fix it", GITLAB, {"CI_JOB_ID": "91"}, "matched"),
])
@pytest.mark.slow
def test_a_re_run_of_a_ci_job_starts_another_run_only_where_the_first_failed(
    run_demo: Callable[..., Result], task: str, env: Dict[str, str], again: Dict[str, str],
    word: str,
) -> None:
    argv = ["run", "--repo", "acme/web", "--idempotency-key", "ci", "--follow", task]
    first = run_demo(*argv, **env)
    second = run_demo(*argv, **{**env, **again})
    assert first.out.startswith("started run ") and second.out.startswith(f"{word} ")
    assert first.code == second.code == int(task == "Please fail")
    run_id = first.out.split()[2]
    told = f"run {run_id} of an earlier attempt is failed; starting another\n"
    assert second.err.startswith(told) is (word == "started")
    assert second.out.count("--- run ") == 1


def test_a_third_attempt_of_a_ci_job_finds_the_run_of_the_second(
    cli: Callable[..., Result],
) -> None:
    runs = [{"runId": "R-1", "status": "failed"}, {"runId": "R-2", "status": "success"}]
    with RawServer(lambda count, *_: ok({**runs[min(count, 2) - 1], "replayed": True})) as server:
        argv = ["run", "--repo", "r", "--idempotency-key", "ci", "x"]
        result = cli(*argv, env={**service(server.url), **GITHUB, "GITHUB_RUN_ATTEMPT": "3"})
    assert (result.code, len(server.requests)) == (0, 2)
    assert result.out.startswith("matched existing run R-2 (success)\n")


def test_a_start_of_this_attempt_that_failed_at_once_starts_no_other(
    cli: Callable[..., Result],
) -> None:
    with one_answer(ok({"runId": "R-1", "status": "failed", "replayed": False})) as server:
        argv = ["run", "--repo", "r", "--idempotency-key", "ci", "x"]
        result = cli(*argv, env={**service(server.url), **GITHUB, "GITHUB_RUN_ATTEMPT": "2"})
    assert (result.code, len(server.requests)) == (1, 1)


def test_a_label_tells_the_legs_of_a_matrix_apart(run_demo: Callable[..., Result]) -> None:
    def start(key: str) -> Result:
        argv = ["run", "--repo", "acme/web", "--json", "--idempotency-key", key, "x"]
        return run_demo(*argv, **GITHUB)

    ids = [json.loads(start(key).out)["runId"] for key in ("ci:0", "ci:1", "ci:0")]
    assert ids[0] != ids[1] and ids[0] == ids[2]
    assert start("ci:").code == 2


AGENT_TEXT = ("\n::error::a\r::set-output name=b::c\r\n \t::stop-commands::d\u2028::add-mask::e ##[group]f ##vso[task.complete]g ###[h\x1b[0K"
              "section_start:1:i\r\x1b[0Kj\nsection_end:1:i\r\x1b[0K %0A::warning::k | <img src=l> `m` [n](https://o) \x9b2J\x00")


@pytest.mark.posix
@pytest.mark.slow
def test_an_agent_s_text_is_never_a_command_to_a_ci(tmp_path: Any) -> None:
    event = {"id": "e", "type": AGENT_TEXT, "toolName": AGENT_TEXT, "message": AGENT_TEXT, "createdAt": AGENT_TEXT, "payload": {
        "working_branch": AGENT_TEXT, "pull_request_url": AGENT_TEXT, "error": AGENT_TEXT}}
    run = {"runId": "R", "status": "failed", "error": AGENT_TEXT, "repoId": AGENT_TEXT}
    files = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "GITHUB_OUTPUT": str(tmp_path / "output")}
    with one_answer(ok({"run": run, "events": [event]})) as server:
        jobs = [(kind, flags, run_file("runs", "events", "R", "--follow", *flags, url=server.url, env=env)) for kind, flags, env in (
            ("github", [], {"GITHUB_ACTIONS": "true", **files}), ("github", ["--json"], {"GITHUB_ACTIONS": "true"}),
            ("gitlab", [], {"GITLAB_CI": "true"}), ("gitlab", ["--json"], {"GITLAB_CI": "true"}))]
        done = [(kind, flags, *(data.decode() for data in process.communicate(timeout=60)), process.returncode)
                for kind, flags, process in jobs]
    for kind, flags, out, err, code in done:
        markers = re.findall("\x1b\\[0Ksection_(start|end):\\d+:mogplex_R\r\x1b\\[0K", err)
        assert (code, markers) == (1, ["start", "end"] if kind == "gitlab" else [])
        text = out + re.sub("\x1b\\[0Ksection_(start|end):\\d+:mogplex_R\r\x1b\\[0K", "", err)
        commands = [line for line in re.split("[\r\n\v\f\x85\u2028\u2029]", text) if line.lstrip().startswith("::")]
        assert [line.split("::")[1] for line in commands] == (["error title=Mogplex run failed"] if kind == "github" else [])
        assert not re.search(r"(?i)##(\[|vso\[)", text) and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
        assert not flags or json.loads(out.splitlines()[0]) == event
    summary, output = (tmp_path / "summary").read_text(encoding="utf-8"), (tmp_path / "output").read_text(encoding="utf-8")
    assert all(re.fullmatch(r"### Mogplex run|(\|[^|<>`\[\]()]*)+\||", line) for line in summary.splitlines())
    assert [line.partition("=")[0] for line in output.splitlines()] == ["run_id", "status", "branch", "pull_request_url"]


@pytest.mark.parametrize("name", ["GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"])
def test_a_report_that_cannot_be_written_is_a_line_on_stderr(
    run_demo: Callable[..., Result], tmp_path: Any, name: str,
) -> None:
    env = {"GITHUB_ACTIONS": "true", name: str(tmp_path)}
    result = run_demo("runs", "events", FINISHED, "--follow", **env)
    assert result.code == 0 and f"cannot write {name}: {OPENED_DIRECTORY}\n" in result.err


class Job:
    """The files in which GitHub Actions and GitLab look for what a step has to tell them."""

    def __init__(self, directory: Any) -> None:
        self.output = directory / "output"
        self.summary = directory / "summary"
        self.dotenv = directory / "run.env"
        self.env = {
            "GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def outputs(self) -> Dict[str, str]:
        """The outputs of a step."""
        return dict(re.findall("(?m)^(.*?)=(.*)$", self.output.read_text()))


@pytest.fixture
def job(tmp_path: Any) -> Job:
    """A CI job."""
    return Job(tmp_path)


def test_ci_knows_the_run_before_anything_else_can_fail(
    cli: Callable[..., Result], job: Job,
) -> None:
    seen: List[str] = []

    def serve(count: int, request: str, connection: socket.socket) -> bytes:
        if not request.startswith("POST"):
            seen.extend([job.output.read_text(), job.dotenv.read_text().splitlines()[0]])
        return ok({"run": {**RUN, "status": "success"}, "events": [], **RUN})

    with RawServer(serve) as server:
        argv = ["run", "--repo", "r", "x", "--follow", "--dotenv", str(job.dotenv)]
        assert cli(*argv, env={**service(server.url), **job.env}).code == 0
    assert seen[:2] == ["run_id=run-uuid\n", "MOGPLEX_RUN_ID=run-uuid"]


def test_ci_is_told_of_a_run_that_is_not_followed(cli: Callable[..., Result], job: Job) -> None:
    with one_answer(ok(RUN)) as server:
        argv = ["run", "--repo", "r", "x", "--dotenv", str(job.dotenv)]
        assert cli(*argv, env={**service(server.url), **job.env}).code == 0
    assert (job.outputs()["run_id"], job.outputs()["status"]) == ("run-uuid", "streaming")
    assert "MOGPLEX_RUN_ID=run-uuid\nMOGPLEX_STATUS=streaming\n" in job.dotenv.read_text()


@pytest.mark.parametrize("answers, argv, code, told", [
    ([STREAMING], ["--timeout", "0.3"], 1, "run R (streaming): --follow timed out after 0.3s"),
    ([STREAMING, refusal(403, "FORBIDDEN", "Scope")], [], 65, "run R (streaming): FORBIDDEN: Scope"),
    ([refusal(401, "UNAUTHORIZED", "No")], [], 64, "run R (status unknown): UNAUTHORIZED: No"),
    ([refusal(503, "AWAY", "Gone")], [], 69, "run R (status unknown): AWAY: Gone"),
])
@pytest.mark.slow
def test_ci_is_told_when_only_the_following_ends(
    cli: Callable[..., Result], job: Job, answers: List[bytes], argv: List[str], code: int,
    told: str,
) -> None:
    with RawServer(lambda count, *_: answers[min(count, len(answers)) - 1]) as server:
        argv = ["runs", "events", "R", "--follow", *argv, "--dotenv", str(job.dotenv)]
        result = cli(*argv, env={**service(server.url), **job.env})
    assert result.code == code
    assert f"\n::error title=Mogplex run no longer followed::{told}" in "\n" + result.err
    status = "streaming" if "streaming" in told else ""
    assert job.outputs() == {"run_id": "R", "status": status, "branch": "", "pull_request_url": ""}
    assert "| left | " in job.summary.read_text()
    assert f"MOGPLEX_STATUS={status}\n" in job.dotenv.read_text()


@pytest.mark.posix
def test_ci_is_told_of_a_signal(job: Job) -> None:
    def answer(path: str, process: "subprocess.Popen[bytes]") -> bytes:
        if path == "events":
            process.send_signal(signal.SIGTERM)
        return ok({"status": "cancellation_requested"}) if path == "cancel" else STREAMING

    done = Watched(answer, "runs", "events", "R", "--follow", "--cancel-on-interrupt", env=job.env)
    assert done.code == 143 and "interrupted; cancellation requested for run R\n" in done.err
    assert "interrupted" in job.summary.read_text() and job.outputs()["run_id"] == "R"


def test_the_token_is_in_no_report(cli: Callable[..., Result], job: Job) -> None:
    with one_answer(ok({**RUN, "status": "failed", "error": f"bad {TOKEN}"})) as server:
        result = cli("run", "--repo", "r", f"Use {TOKEN}", env={**service(server.url), **job.env})
    assert result.code == 1 and "::error title=Mogplex run failed::bad ***" in result.err
    assert TOKEN not in result.err + job.summary.read_text() + job.output.read_text()


def test_ci_is_told_of_a_run_that_could_not_be_started(
    cli: Callable[..., Result], job: Job,
) -> None:
    with one_answer(refusal(403, "FORBIDDEN", "No scope")) as server:
        result = cli("run", "--repo", "r", "x", env={**service(server.url), **job.env})
    assert result.code == 65 and not job.output.exists()
    assert "::error title=Mogplex run not started::FORBIDDEN: No scope (HTTP 403)\n" in result.err


def test_a_dotenv_file_that_cannot_be_written_is_known_before_a_run_is_paid_for(
    cli: Callable[..., Result], tmp_path: Any,
) -> None:
    with one_answer(ok(RUN)) as server:
        result = cli("run", "--repo", "r", "x", "--dotenv", str(tmp_path), env=service(server.url))
    assert (result.code, result.err) == (2, f"error: --dotenv {tmp_path}: {OPENED_DIRECTORY}\n")
    assert server.requests == []


@pytest.mark.posix
def test_a_dotenv_fifo_without_a_reader_does_not_hang(
    cli: Callable[..., Result], tmp_path: Any,
) -> None:
    fifo = tmp_path / "run.env"
    os.mkfifo(fifo)
    with one_answer(ok(RUN)) as server:
        result = cli("run", "--repo", "r", "x", "--dotenv", str(fifo), env=service(server.url))
    assert (result.code, server.requests) == (2, [])
    assert result.err == f"error: --dotenv {fifo}: {os.strerror(errno.ENXIO)}\n"
