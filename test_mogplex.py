"""Tests of mogplex.py, in its own order. Real sockets on 127.0.0.1, real pseudo-terminals, no mocks.

What works is driven against the embedded demo service; what breaks, against ``RawServer``,
which answers with exactly the bytes that a test gives it. Time is a parameter: no test
sleeps to be right.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
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


@pytest.mark.parametrize("status, code", [
    (400, 1), (401, 64), (403, 65), (404, 1), (405, 1), (409, 1), (418, 1), (429, 75), (500, 1), (501, 69), (502, 69),
    (503, 69), (504, 69), (599, 1),
])
def test_the_exit_code_follows_the_http_status(status: int, code: int) -> None:
    assert mogplex.error_class(status)("no").exit == code


def test_exit_codes_are_the_specification_s() -> None:
    assert {code.name: int(code) for code in mogplex.Exit} == {
        "OK": 0, "FAILURE": 1, "USAGE": 2, "UNAUTHORIZED": 64, "FORBIDDEN": 65, "UNAVAILABLE": 69, "TEMPORARY": 75,
        "HANGUP": 129, "INTERRUPTED": 130, "BROKEN_PIPE": 141, "TERMINATED": 143}


def test_an_error_shows_code_message_and_status() -> None:
    assert str(mogplex.ForbiddenError("No", code="FORBIDDEN", status=403)) == "FORBIDDEN: No (HTTP 403)"
    assert str(mogplex.UsageError("No")) == "No"


# ---------------------------------------------------------------- 2. Values


@pytest.mark.parametrize("raw, shown", [
    ("plain \u00fc \u6f22 \U0001f600 text", "plain \u00fc \u6f22 \U0001f600 text"),
    ("a\nb\r\nc\rd\x0be\x0cf\x85g\u2028h\u2029i", "a \u23ce b \u23ce c \u23ce d \u23ce e \u23ce f \u23ce g \u23ce h \u23ce i"),
    ("\n\nmiddle\n", "middle"), ("tab\there", "tab here"),
    ("\x1b[31mred\x1b[0m", "red"), ("\x1b]0;title\x07x", "x"), ("\x1b]8;;http://evil\x1b\\link", "link"),
    ("\x9b2Jx", "x"), ("\x9d0;title\x9cx", "x"), ("\x1bPdcs\x1b\\x", "x"), ("\x1b(Bx", "x"), ("\x1bcx", "x"),
    ("\x1b[", ""), ("\x1b", ""), ("a\x1b[31", "a"), ("\x1b]0;no end", "0;no end"), ("\x00\x07\x08\x7f\x80x", "x"),
    ("\x1b\x1b[31mx", "x"), ("\x1b[3\x1b[1mx", "x"),
    ("\u202egnp.exe\u202c\u2066\u2069\u200b\u200d\ufeff", "gnp.exe"),
    ("::error::x", ": :error::x"), ("  ::set-output name=a::b", "  : :set-output name=a::b"), ("a::b", "a::b"),
    ("a\n::warning::x", "a \u23ce : :warning::x"), ("\u200b::error::x", ": :error::x"), ("\x1b[0m::error::x", ": :error::x"),
    (":\x00:error::x", ": :error::x"), ("##[group]x", "# #[group]x"), ("x ##vso[task]", "x # #vso[task]"),
    ("#\x1b[0m#vso[x]", "# #vso[x]"), ("##VSO[x]", "# #VSO[x]"), ("## heading", "## heading"),
    (None, ""), (5, "5"), (["::error::"], "['::error::']"),
])
def test_sanitize(raw: object, shown: str) -> None:
    assert mogplex.sanitize(raw) == shown


def test_sanitize_takes_everything_out_that_a_terminal_obeys() -> None:
    every = "".join(map(chr, range(0x3000))) + "\x1b[31m\x1b]0;t\x07\x9b1m"
    left = mogplex.sanitize(every)
    assert not [char for char in left if char < " " or "\x7f" <= char <= "\x9f" or "\u202a" <= char <= "\u202e"]


@pytest.mark.parametrize("hostile", ["\x1b]" * 200_000, "\x1b[" * 200_000, "\x1b]0;" + "a" * 400_000, ":" * 400_000,
                                     " " * 400_000, "\x9d" * 400_000, "#" * 400_000, "\n" * 400_000])
def test_sanitize_is_linear(hostile: str) -> None:
    # Quadratic work on these would take hours: that this ends is the proof.
    assert len(mogplex.sanitize(hostile)) <= 3 * len(hostile)


@pytest.mark.parametrize("text, shown", [
    ("2026-05-17T10:14:00Z", "2026-05-17T10:14:00.000Z"), ("2026-05-17T10:14:00.1Z", "2026-05-17T10:14:00.100Z"),
    ("2026-11-23T19:32:19.45275+00:00", "2026-11-23T19:32:19.452Z"), ("2026-05-17T10:14:00.999999Z", "2026-05-17T10:14:00.999Z"),
    ("2026-05-17 10:14:00", "2026-05-17T10:14:00.000Z"), ("2026-05-17T12:14:00+02:00", "2026-05-17T10:14:00.000Z"),
    ("2026-05-17T04:44:00-05:30", "2026-05-17T10:14:00.000Z"), ("2026-05-17T12:14:00+0200", "2026-05-17T10:14:00.000Z"),
    ("2026-13-17T10:14:00Z", "2026-13-17T10:14:00Z"), ("yesterday\x1b[2J", "yesterday"), ("", ""), (None, ""), (7, ""),
    ("9999-12-31T23:59:59-23:00", "9999-12-31T23:59:59-23:00"), ("2026-02-30T00:00:00Z", "2026-02-30T00:00:00Z"),
])
def test_times(text: object, shown: str) -> None:
    assert mogplex.format_time(text) == shown


@pytest.mark.parametrize("text, seconds", [("600", 600), ("90s", 90), ("30m", 1800), ("2h", 7200), (" 1.5h ", 5400), ("0.5", 0.5)])
def test_durations(text: str, seconds: float) -> None:
    assert mogplex.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "abc", "5d", "1e9", "inf", "nan", "\u0665x", "9" * 40])
def test_senseless_durations(text: str) -> None:
    with pytest.raises(mogplex.UsageError):
        mogplex.parse_duration(text)


def test_shown_durations() -> None:
    assert [mogplex.format_duration(s) for s in (-1, 8.9, 125, 11400, 352800)] == ["0s", "8s", "2m 05s", "3h 10m", "4d 2h"]
    assert [mogplex.format_age(s) for s in (8, 125, 11400, 352800)] == ["8s", "2m", "3h", "4d"]


@pytest.mark.parametrize("value, date, seconds", [
    ("60", None, 60), (" 2.5 ", None, 2.5), ("0", None, 0), (None, None, None), ("", None, None), ("soon", None, None),
    ("-5", None, None), ("9" * 5000, None, None), ("1e3", None, None), ("nan", None, None),
    ("Tue, 24 Nov 2026 10:00:30 GMT", "Tue, 24 Nov 2026 10:00:00 GMT", 30),
    ("Tue, 24 Nov 2026 09:00:00 GMT", "Tue, 24 Nov 2026 10:00:00 GMT", 0),
    ("Tue, 24 Nov 2026 10:00:30 GMT", "nonsense", None), ("Tue, 99 Nov 2026 10:00:30 GMT", None, None),
])
def test_retry_after(value: Optional[str], date: Optional[str], seconds: Optional[float]) -> None:
    assert mogplex.parse_retry_after(value, date) == seconds


def test_backoff_doubles_with_jitter_to_a_cap() -> None:
    assert [mogplex.backoff_s(n, 0.0) for n in (1, 2, 3, 6, 5000)] == [0.5, 1.0, 2.0, 15.0, 15.0]
    assert mogplex.backoff_s(1, 1.0) == 0.75


@pytest.mark.parametrize("text, shown", [
    ("https://staging.mogplex.com", "https://staging.mogplex.com"), ("https://Host.example/", "https://host.example"),
    (" https://h.example/api/ ", "https://h.example/api"), ("https://h.example:8443", "https://h.example:8443"),
])
def test_base_urls(text: str, shown: str) -> None:
    assert mogplex.parse_base_url(text) == shown


@pytest.mark.parametrize("text", [
    "", "mogplex.com", "http://mogplex.com", "http://localhost:1", "ftp://h", "https://", "https://u:p@h", "https://u@h",
    "https://h?q", "https://h?", "https://h#", "https://h:abc", "https://h:99999", "https://h:0", "https://h/a b",
    "https://h\\@evil", "https://h\n.evil", "file:///etc/passwd", "https://h/\u00e4", "https://[::1", "//h",
])
def test_base_urls_that_may_not_be_used(text: str) -> None:
    with pytest.raises(mogplex.UsageError, match="MOGPLEX_URL"):
        mogplex.parse_base_url(text)


def test_plain_http_is_for_this_machine_in_development_only() -> None:
    for url in ("http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000"):
        assert mogplex.parse_base_url(url, allow_http=True) == url
        with pytest.raises(mogplex.UsageError):
            mogplex.parse_base_url(url)
    for url in ("http://mogplex.com", "http://127.0.0.1.evil.example", "http://localhost.evil", "http://127.0.0.2"):
        with pytest.raises(mogplex.UsageError):
            mogplex.parse_base_url(url, allow_http=True)


def test_a_password_in_the_base_url_is_not_shown() -> None:
    with pytest.raises(mogplex.UsageError) as caught:
        mogplex.parse_base_url("https://me:hunter2@h.example")
    assert "hunter2" not in str(caught.value)


def test_widths() -> None:
    assert [mogplex.text_width(text) for text in ("abc", "\u6f22\u5b57", "e\u0301", "\U0001f600")] == [3, 4, 1, 2]
    assert mogplex.fit("abcdef", 4) == "abc\u2026" and mogplex.fit("\u6f22\u5b57\u6f22", 4) == "\u6f22\u2026"
    assert mogplex.fit("abc", 3) == "abc" and mogplex.fit("abc", 0) == ""


def test_odd_records_are_read_without_complaint() -> None:
    odd = (None, 5, "x", [], {}, {"a": None}, {"a": True}, {"a": [1]}, {"a": {"b": None}})
    assert {mogplex.text_of(record, "a") for record in odd} == {""}
    assert [mogplex.text_of({"a": value}, "a") for value in ("x", 5, 1.5)] == ["x", "5", "1.5"]
    assert [mogplex.dict_of(record, "a") for record in odd[:-1]] == [{}] * 8 and mogplex.dicts_of({"a": [1, {}]}, "a") == [{}]


# ---------------------------------------------------------------- 3. Auth

REFRESHABLE = {"access_token": "access-0", "refresh_token": "refresh-0", "expires_at": 1}
CALLBACK = "GET /auth/callback?code=c0de&state={state} HTTP/1.1\r\nHost: {host}\r\n\r\n"


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
                return answer(401, {"error": "invalid_grant", "error_description": "Invalid refresh token"})
            self.count += 1
            return answer(200, {
                "access_token": f"access-{self.count}", "token_type": "bearer", "expires_in": 3600,
                "refresh_token": f"refresh-{self.count}", "scope": "read write offline_access"})


def post_form(url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
    """The simplest PostForm."""
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=20) as got:
            return got.status, json.load(got)
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError):
            return error.code, json.load(error)
        return error.code, {}
    except OSError:
        raise mogplex.UnavailableError("no answer") from None


def no_post(url: str, form: Dict[str, str]) -> Tuple[int, Dict[str, Any]]:
    raise AssertionError("nothing may be sent")


def signed_in(home: Any, base_url: str, warnings: Optional[List[str]] = None, **entry: Any) -> mogplex.Credential:
    """The credential of a home that has just been given an expired sign-in for ``base_url``."""
    mogplex.store_credential(str(home), {**REFRESHABLE, "base_url": base_url, **entry})
    warn = (warnings if warnings is not None else []).append
    return mogplex.resolve_credential({"MOGPLEX_HOME": str(home)}, base_url, warn)


def resolve(home: Any, warn: Callable[[str], Any] = print) -> mogplex.Credential:
    """The credential in force when only this home has one."""
    return mogplex.resolve_credential({"MOGPLEX_HOME": str(home)}, "https://a.example", warn)


def put(home: Any, content: Union[str, bytes, Dict[str, Any], List[Any]]) -> Any:
    """The path of an auth.json with just this in it."""
    home.mkdir(exist_ok=True)
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (home / "auth.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    (home / "auth.json").chmod(0o600)
    return home / "auth.json"


def stored(home: Any) -> Any:
    """What its auth.json says."""
    return json.loads((home / "auth.json").read_text())


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
    *[({name: "t1"}, "t1") for name in ("token", "apiKey", "api_key", "accessToken", "access_token")],
    ({"mogplex": {"apiKey": " t2\n"}}, "t2"),
    ({"providers": {"mogplex": {"token": "t3"}, "other": {"token": "no"}}}, "t3"),
    ({"token": "no", "mogplex": {"access_token": "t4"}}, "t4"),
    ({"mogplex": None, "token": "t5"}, "t5"),
    ({"mogplex": {"token": "no", "base_url": "https://b.example"}, "token": "t6"}, "t6"),
    ({"mogplex": {"token": "t7", "base_url": "https://a.example/"}}, "t7"),
    (b'\xef\xbb\xbf{"token": "t8"}', "t8"),
    ({}, ""), ({"version": 1, "openai": {"token": "no"}}, ""), ({"token": "", "mogplex": ["no"]}, ""),
    ({"mogplex": {"token": "no", "base_url": "https://b.example"}}, ""),
])
def test_auth_json_is_read_generously(tmp_path: Any, document: Any, token: str) -> None:
    path, warnings = put(tmp_path, document), []  # type: Tuple[Any, List[str]]
    with contextlib.ExitStack() as stack:
        if not token:
            refusal = stack.enter_context(pytest.raises(mogplex.UnauthorizedError, match="not signed in"))
        found = resolve(tmp_path, warnings.append)
        assert (found.token, found.source, found.expires_at) == (token, "file", None)
    if not token:
        assert str(path) in str(refusal.value)
        assert "mogplex login" in refusal.value.hint and "MOGPLEX_API_KEY" in refusal.value.hint
    assert warnings == [
        f"the sign-in in {path} is for https://b.example and does not count for https://a.example"
    ] * ("https://b.example" in str(document))


def test_the_environment_comes_first(tmp_path: Any) -> None:
    environ = {"MOGPLEX_HOME": str(put(tmp_path, "nonsense").parent), "MOGPLEX_API_KEY": f" {TOKEN}\n"}
    credential = mogplex.resolve_credential(environ, "https://a.example", print)
    assert (credential.token, credential.source, credential.refreshable) == (TOKEN, "environment", False)
    assert credential.current(no_post) == TOKEN and not credential.renew(TOKEN, no_post)
    put(tmp_path, {"token": "from-file"})
    environ["MOGPLEX_API_KEY"] = " \t"
    assert mogplex.resolve_credential(environ, "https://a.example", print).token == "from-file"


@pytest.mark.parametrize("token", [
    "s3cret\x1b[2J", "s3cret\r\nX: y", "s3 cret", "s3cret\u20ac", "s3cret\x7f"])
def test_a_token_that_no_header_can_carry_is_refused_unprinted(tmp_path: Any, token: str) -> None:
    put(tmp_path, {"token": token})
    for environ in {"MOGPLEX_API_KEY": token}, {"MOGPLEX_HOME": str(tmp_path)}:
        with pytest.raises(mogplex.UnauthorizedError) as refusal:
            mogplex.resolve_credential(environ, "https://a.example", print)
        assert "cret" not in f"{refusal.value!r} {refusal.value.hint}"
    with pytest.raises(mogplex.UnauthorizedError):
        mogplex.Credential(token)


@pytest.mark.parametrize("content", [
    "", "s3cret", "[1]", '"s3cret"', b"\xff\xfe{", "[" * 100000, '{"token": "s3cret"'])
def test_a_senseless_file_is_an_error_that_names_it(tmp_path: Any, content: Union[str, bytes]) -> None:
    path = put(tmp_path, content)
    for act in (
        lambda: resolve(tmp_path),
        lambda: mogplex.store_credential(str(tmp_path), {"token": "new"}),
        lambda: mogplex.forget_credential(str(tmp_path)),
    ):
        with pytest.raises(mogplex.UnauthorizedError, match="auth.json holds no JSON object") as refusal:
            act()
        assert "s3cret" not in repr(refusal.value)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path: Any) -> None:
    (tmp_path / "auth.json").mkdir()
    with pytest.raises(mogplex.UnauthorizedError, match="auth.json cannot be read: Is a directory"):
        resolve(tmp_path)


@pytest.mark.parametrize("mode, warned", [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1), (0o644, 1)])
def test_a_file_open_to_others_gives_one_warning(tmp_path: Any, mode: int, warned: int) -> None:
    path = put(tmp_path, {"token": "t", "refresh_token": "r"})
    path.chmod(mode)
    warnings: List[str] = []
    resolve(tmp_path, warnings.append).renew("other", no_post)
    expected = f"{path} is open to other users (mode {mode:04o}); to close it: chmod 600 {path}"
    assert warnings == [expected] * warned


def test_storing_keeps_what_others_keep_and_forgetting_takes_only_ours(tmp_path: Any) -> None:
    others: Dict[str, Any] = {"openai": {"key": "\xe9"}, "providers": {"x": {"token": "y"}}, "note": 1}
    home = tmp_path / "new" / "home"
    mask = os.umask(0)
    try:
        path = mogplex.store_credential(str(home), {"token": "t0"})
    finally:
        os.umask(mask)
    assert stored(home) == {"version": 1, "mogplex": {"token": "t0"}}
    assert [os.stat(name).st_mode & 0o777 for name in (home, path, path + ".lock")] == [0o700, 0o600, 0o600]
    providers = {**others["providers"], "mogplex": {"token": "old"}}
    put(home, {**others, "providers": providers, "api_key": "older"}).chmod(0o644)
    mogplex.store_credential(str(home), {"token": "t1"})
    assert stored(home) == {"version": 1, **others, "mogplex": {"token": "t1"}}
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert mogplex.forget_credential(str(home)) and not mogplex.forget_credential(str(home))
    assert stored(home) == {"version": 1, **others}
    assert sorted(os.listdir(home)) == ["auth.json", "auth.json.lock"]
    assert not mogplex.forget_credential(str(tmp_path / "nowhere")) and not (tmp_path / "nowhere").exists()


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
    mogplex.store_credential(home, new)
    sys.settrace(None)
    return steps[0]
store(0)
total, replaced, left = store(0), [], set()
for number in range(100):
    mogplex.store_credential(home, old)
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
        [sys.executable, "-c", script, *argv], cwd=os.path.dirname(MODULE), universal_newlines=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_process_killed_at_any_of_100_instants_leaves_the_old_or_the_new_file(tmp_path: Any) -> None:
    put(tmp_path, {"version": 1, "other": {"token": "c"}})
    out, err = python(KILLED, str(tmp_path)).communicate()
    assert (out, err) == ("True True auth.json auth.json.lock auth.json.tmp\n", "")


@contextlib.contextmanager
def full_disk(home: Any) -> Iterator[None]:
    """No file can grow beyond ten bytes: the kernel's own refusal, which holds for root too."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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


@pytest.mark.parametrize("obstacle, reason", [
    (full_disk, "File too large"),
    (lambda home: directory_at(home, "auth.json.lock"), "Is a directory"),
    (lambda home: directory_at(home, "auth.json.tmp"), "Is a directory"),
    (lambda home: link_at(home, "auth.json"), "a link or a directory stands in its place, remove that first"),
    (lambda home: link_at(home, "auth.json.lock"), "Too many levels of symbolic links"),
])
def test_a_home_that_cannot_be_written_to(tmp_path: Any, obstacle: Any, reason: str) -> None:
    issuer, warnings, home = Issuer(), [], tmp_path / "home"  # type: Tuple[Issuer, List[str], Any]
    with RawServer(issuer) as server:
        credential = signed_in(home, server.url, warnings)
        before = (home / "auth.json").read_bytes()
        with obstacle(home):
            with pytest.raises(mogplex.MogplexError) as refusal:
                mogplex.store_credential(str(home), {"token": "new"})
            assert refusal.value.message == f"cannot write {home / 'auth.json'}: {reason}"
            # Reading goes on, and the new tokens, refreshed twice, serve this process.
            assert credential.current(post_form) == credential.current(no_post) == "access-1"
            assert credential.renew("access-1", post_form) and credential.current(no_post) == "access-2"
            assert warnings == [f"{refusal.value}; the refreshed sign-in serves this process only"]
        assert (home / "auth.json").read_bytes() == before
        assert (home / "auth.json.tmp").is_dir() or not (home / "auth.json.tmp").exists()


def test_a_home_below_a_file(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    home, warnings = str(tmp_path / "file" / "home"), []  # type: Tuple[str, List[str]]
    with pytest.raises(mogplex.UnauthorizedError, match="not signed in"):
        mogplex.resolve_credential({"MOGPLEX_HOME": home}, "https://a.example", warnings.append)
    with pytest.raises(mogplex.MogplexError, match="cannot write .*auth.json: Not a directory"):
        mogplex.store_credential(home, {"token": "t"})
    assert not mogplex.forget_credential(home) and mogplex.remembered_runs(home, "https://a.example") == []
    mogplex.remember_run(home, {"id": "1"}, warnings.append)
    assert warnings == [f"this run will not be remembered: cannot write {home}/runs.jsonl: Not a directory"]


@pytest.mark.parametrize("left_s, refreshed", [(-5, True), (50, True), (80, False), (None, False)])
def test_the_token_is_refreshed_a_minute_early(tmp_path: Any, left_s: Optional[int], refreshed: bool) -> None:
    issuer = Issuer()
    with RawServer(issuer) as server:
        expires_at = int(time.time()) + left_s if left_s is not None else None
        credential = signed_in(tmp_path, server.url, expires_at=expires_at)
        assert credential.current(post_form) == ("access-1" if refreshed else "access-0")
        entry = stored(tmp_path)["mogplex"]
        assert entry["access_token"] == credential.token and entry["base_url"] == server.url
        assert credential.renew("access-0", post_form) and credential.token == "access-1"
        assert credential.expires_at and 3500 < credential.expires_at - time.time() <= 3600
    assert issuer.forms == [
        {"client_id": "mogplex-cli", "grant_type": "refresh_token", "refresh_token": "refresh-0"}]


ECHO = {"error": "invalid_grant", "error_description": "bad \x1b[31mrefresh-0\n::error::, c0de"}


@pytest.mark.parametrize("said, error, message", [
    (answer(401, ECHO), mogplex.UnauthorizedError,
     "sign in again, invalid_grant: bad *** \u23ce : :error::, {code} (HTTP 401)"),
    (answer(400, {}), mogplex.UnauthorizedError, "sign in again, no reason is given (HTTP 400)"),
    (answer(500, ""), mogplex.UnavailableError, "the sign-in service is out of order (HTTP 500)"),
    (answer(429, "slow down"), mogplex.RateLimitedError, "too many sign-ins (HTTP 429)"),
    (answer(200, {"access_token": []}), mogplex.InvalidResponseError, "no token came from {url} (HTTP 200)"),
    (answer(404, "<html>"), mogplex.InvalidResponseError, "no token came from {url} (HTTP 404)"),
    (answer(200, {"access_token": "a\nb"}), mogplex.UnauthorizedError,
     "the new token: no token has such characters (controls, spaces, not ASCII)"),
    (b"", mogplex.UnavailableError, "no answer"),
])
def test_a_refresh_that_fails_leaves_the_file_and_says_no_secret(
    tmp_path: Any, said: bytes, error: Any, message: str,
) -> None:
    with RawServer(lambda *_: said) as server:
        credential = signed_in(tmp_path, server.url)
        before = (tmp_path / "auth.json").read_bytes()
        expected = message.replace("{url}", server.url + "/api/auth/mcp/token")
        for act in lambda: credential.current(post_form), lambda: credential.renew("access-0", post_form):
            with pytest.raises(error) as refusal:
                act()
            assert str(refusal.value) == expected.replace("{code}", "c0de")
        assert (tmp_path / "auth.json").read_bytes() == before and credential.token == "access-0"
        with pytest.raises(error) as refusal:
            sign_in(server.url, Browser(CALLBACK))
        shown = expected.replace("***", "refresh-0").replace("{code}", "***")
        assert str(refusal.value) == shown and refusal.value.exit == error.exit


def test_what_another_process_did_to_the_file_counts(tmp_path: Any) -> None:
    credential = signed_in(tmp_path, "https://a.example")
    mogplex.store_credential(str(tmp_path), {**REFRESHABLE, "access_token": "theirs", "expires_at": 9e9})
    assert credential.current(no_post) == "theirs"
    mogplex.store_credential(str(tmp_path), {"token": "a-pat"})
    assert credential.renew("theirs", no_post) and credential.current(no_post) == "a-pat"
    assert not credential.renew("a-pat", no_post)
    credential = signed_in(tmp_path, "https://a.example")
    mogplex.forget_credential(str(tmp_path))  # a refresh must not bring the sign-in back
    assert not credential.renew("access-0", no_post) and credential.current(no_post) == "access-0"


TWENTY = """
import json, sys, urllib.parse, urllib.request, mogplex
def post(url, form):
    with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode()) as answer:
        return answer.status, json.load(answer)
print("ready", flush=True), sys.stdin.readline()
print(mogplex.resolve_credential({"MOGPLEX_HOME": sys.argv[1]}, sys.argv[2], print).current(post))
"""


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
        threads = [
            threading.Thread(target=lambda: tokens.append(credential.current(post_form))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tokens == ["access-1"] * 20 and issuer.count == 1


def talk(host: str, request: str) -> str:
    """All that ``host`` answers to these characters."""
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
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
                self.pages.append(talk(host, text))
        self.done.set()


def sign_in(base_url: str, browser: Browser, **options: Any) -> Dict[str, Any]:
    """The entry that a sign-in through ``browser`` ends with."""
    announced: List[str] = []
    options = {"post": post_form, "announce": announced.append, "timeout_s": 20.0, "ports": (0,), **options}
    try:
        return mogplex.sign_in(base_url, open_browser=browser, **options)
    finally:
        assert browser.done.wait(20)
        assert announced[0].startswith(f"{base_url}/api/auth/mcp/authorize?")


def test_the_whole_sign_in(tmp_path: Any) -> None:
    issuer, browser = Issuer(), Browser(CALLBACK)
    with RawServer(issuer) as server:
        entry = sign_in(server.url, browser)
        mogplex.store_credential(str(tmp_path), entry)
        credential = mogplex.resolve_credential({"MOGPLEX_HOME": str(tmp_path)}, server.url, print)
    assert (credential.token, credential.refreshable) == ("access-1", True)
    assert entry["base_url"] == server.url and 3500 < entry["expires_at"] - time.time() <= 3600
    verifier, query = issuer.forms[0].pop("code_verifier"), browser.query
    assert issuer.forms == [{"client_id": "mogplex-cli", "grant_type": "authorization_code", "code": "c0de",
                             "redirect_uri": query["redirect_uri"]}]
    assert len(base64.urlsafe_b64decode(verifier + "==")) == 64
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    assert len(base64.urlsafe_b64decode(query.pop("state") + "=")) == 32
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/auth/callback", query.pop("redirect_uri"))
    assert query == {
        "response_type": "code", "client_id": "mogplex-cli", "scope": "read write offline_access",
        "code_challenge": digest, "code_challenge_method": "S256"}
    assert browser.pages[0].startswith("HTTP/1.1 200 ") and "return to the terminal" in browser.pages[0]


NOISE = [
    ("GET /favicon.ico HTTP/1.1\r\nHost: {host}\r\n\r\n", "404"),
    (CALLBACK.replace("GET", "HEAD"), "404"), (CALLBACK.replace("GET", "POST"), "404"),
    (CALLBACK.replace("{host}", "evil.example"), "404"),
    (CALLBACK.replace("{host}", "localhost"), "404"),
    (CALLBACK.replace("\r\n\r\n", "\r\nHost: {host}\r\n\r\n"), "404"),
    ("GET /auth/callback?code=c0de&state={state} HTTP/1.0\r\n\r\n", "404"),
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


@pytest.mark.parametrize("target, message", [
    ("error=later&error_description=Not now, <b>please</b>\x1b[2J", "later: Not now, <b>please</b>"),
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
        with pytest.raises(mogplex.MogplexError, match=f"ports {taken[0]} and {taken[1]} of 127.0.0.1 are"):
            mogplex.sign_in(server.url, no_post, announce=print, open_browser=None, ports=taken)


@pytest.mark.parametrize("options", [{"timeout_s": 0.0}, {"stopped": lambda: True}])
def test_the_wait_ends_by_itself(options: Dict[str, Any]) -> None:
    with pytest.raises(mogplex.MogplexError, match="no answer came from the browser within"):
        mogplex.sign_in(
            "https://a.example", no_post, announce=print, open_browser=None, ports=(0,), **options)


def test_runs_are_remembered(tmp_path: Any) -> None:
    home, path = str(tmp_path / "h"), tmp_path / "h" / "runs.jsonl"
    warnings: List[str] = []
    assert mogplex.remembered_runs(home, "https://a.example") == []
    run = {"id": "0", "service": "https://a.example", "task": "\u20ac" * 99}
    mogplex.remember_run(home, run, warnings.append)
    mogplex.remember_run(home, {"id": "1", "service": "https://b.example"}, warnings.append)
    with path.open("ab") as stream:
        stream.write(b'5\n[]\n\xff\n{"id": "2", "service": "https://a.exam')  # torn, and without its newline
    mogplex.remember_run(home, {"id": "3", "service": "https://a.example"}, warnings.append)
    assert [run["id"] for run in mogplex.remembered_runs(home, "https://a.example")] == ["3", "0"]
    assert mogplex.remembered_runs(home, "https://a.example")[-1]["task"] == "\u20ac" * 80
    assert os.stat(str(path)).st_mode & 0o777 == 0o600 and warnings == []


def test_500_runs_are_kept_and_none_is_lost_between_processes(tmp_path: Any) -> None:
    (tmp_path / "runs.jsonl").write_text("".join(f'{{"id": "{n}", "service": "a"}}\n' for n in range(600)))
    script = (
        "import sys, mogplex\nfor n in range(5):\n"
        "    mogplex.remember_run(sys.argv[1], {'id': sys.argv[2] + str(n), 'service': 'a'}, print)\n")
    processes = [python(script, str(tmp_path), letter) for letter in "xyz"]
    assert [process.communicate() for process in processes] == [("", "")] * 3
    ids = [run["id"] for run in mogplex.remembered_runs(str(tmp_path), "a")]
    assert len(ids) == 500 and ids[-1] == "115"
    assert sorted(ids[:15]) == [letter + str(n) for letter in "xyz" for n in range(5)]


@pytest.mark.parametrize("obstacle", [
    full_disk, lambda home: directory_at(home, "runs.jsonl"),
    lambda home: directory_at(home, "runs.jsonl.lock"), lambda home: link_at(home, "runs.jsonl")])
def test_a_run_that_cannot_be_remembered_is_no_error(tmp_path: Any, obstacle: Any) -> None:
    warnings: List[str] = []
    with obstacle(tmp_path):
        mogplex.remember_run(str(tmp_path), {"id": "1", "service": "a"}, warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith("this run will not be remembered: ")
    assert mogplex.remembered_runs(str(tmp_path), "a") == []


# ---------------------------------------------------------------- 4. Client

# ---------------------------------------------------------------- 5. Tail

# ---------------------------------------------------------------- 6. Output

RUN = {
    "runId": "run-uuid", "status": "streaming", "harness": "codex", "repoId": "8f3a2b1c-...", "sandboxId": "vsb_abc",
    "branch": {"base": "main", "working": "feat/x", "createBranch": True}, "rootDirectory": None, "error": None,
    "eventsUrl": "/api/v1/mogplex/runs/run-uuid/events", "cancelUrl": "/api/v1/mogplex/runs/run-uuid/cancel",
    "createdAt": "2026-05-17T10:14:00Z", "updatedAt": "2026-05-17T10:15:30.0+00:00",
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
    shown = mogplex.run_text({**RUN, "error": "Sandbox\nlaunch \x1b[31mfailed", "rootDirectory": "web"}, False)
    assert "root    web\n" in shown and shown.endswith("error   Sandbox \u23ce launch failed")
    assert mogplex.run_text({"branch": {"working": "x", "createBranch": False}}, False) == "branch  x"


def test_a_started_run() -> None:
    run = {"runId": "R", "status": "pending", "repoId": "8f3a2b1c-1234-4abc-9def-1234567890ab", "harness": "codex",
           "branch": {"base": "main", "working": "mogplex/run/2026-05-17/refactor-auth", "createBranch": True}}
    assert mogplex.started_text(run, False) == """\
started run R (pending)
repo    8f3a2b1c-1234-4abc-9def-1234567890ab
harness codex
branch  mogplex/run/2026-05-17/refactor-auth (base main, created)
tail events: mogplex runs events R --follow"""
    assert mogplex.started_text({**run, "replayed": True, "status": "failed"}, False).startswith(
        "matched existing run R (failed)\n")


@pytest.mark.parametrize("event, line", [
    ({"createdAt": "2026-05-17T10:14:00.5Z", "type": "log", "message": "hi"}, "2026-05-17T10:14:00.500Z  log             hi"),
    ({"createdAt": "2026-05-17T10:14:00Z", "type": "tool_call", "toolName": "shell", "message": "ls"},
     "2026-05-17T10:14:00.000Z  tool_call       tool=shell  ls"),
    ({"type": "status_changed"}, "status_changed"), ({}, ""), ({"message": 5, "type": ["x"]}, "                5"),
    ({"type": "log", "message": "Pull request ready", "payload": {"pull_request_url": "https://g/1"}},
     "log             Pull request ready https://g/1"),
    ({"type": "log", "message": "No code changes", "payload": {"pull_request_url": None}}, "log             No code changes"),
    ({"type": "failed", "message": "Harness failed", "payload": {"error": "boom\nbang"}},
     "failed          Harness failed: boom \u23ce bang"),
    ({"type": "failed", "payload": {"error": "boom"}}, "failed          boom"),
    ({"type": "failed", "message": "it said boom", "payload": {"error": "boom"}}, "failed          it said boom"),
    ({"type": "::error::", "toolName": "\x1b[2J##[x]", "message": "\r::warning::x"},
     ": :error::      tool=# #[x]  : :warning::x"),
])
def test_events_as_lines(event: Dict[str, Any], line: str) -> None:
    assert mogplex.event_line(event) == line


def test_a_newline_has_a_spelling_for_every_encoding() -> None:
    assert [mogplex.newline_mark(name) for name in ("utf-8", "ascii", "latin-1", None, "no-such")] == [
        " \u23ce ", " | ", " | ", " | ", " | "]


def test_json_lines_are_ascii_and_as_they_came() -> None:
    record = {"b": "\u2028\u00fc\x1b::error::", "a": [None, 1.5], "\ud800": "\ud800"}
    line = mogplex.ndjson(record)
    assert line.isascii() and "\n" not in line and list(json.loads(line)) == ["b", "a", "\ud800"]


def test_a_table_is_shortened_only_on_a_terminal_and_never_in_its_ids() -> None:
    rows = [["8f3a2b1c-1234-4abc-9def-1234567890ab", "acme/web", "a-very-long-branch-name-indeed" * 3, ""]]
    headers = ("ID", "REPO", "BRANCH", "ROOT")
    whole = mogplex.table(headers, rows, None, ("REPO", "BRANCH", "ROOT"))
    assert rows[0][2] in whole
    for width in (100, 80, 70):
        narrow = mogplex.table(headers, rows, width, ("REPO", "BRANCH", "ROOT"))
        assert rows[0][0] in narrow and "\u2026" in narrow
        assert max(map(len, narrow.splitlines())) <= width
    assert rows[0][0] in mogplex.table(headers, rows, 20, ("REPO", "BRANCH", "ROOT"))


def test_numbers_and_blanks_in_a_table_stay_text() -> None:
    assert mogplex.table(("ID", "REPO"), [["0012", "1e5"], ["", "x"]], None, ()) == "ID    REPO\n0012  1e5\n      x"


@pytest.mark.parametrize("environment, flags, coloured", [
    ({}, [], False), ({"FORCE_COLOR": "1"}, [], True), ({"FORCE_COLOR": "0"}, [], False),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, [], False), ({"FORCE_COLOR": "1", "TERM": "dumb"}, [], False),
    ({"FORCE_COLOR": "1"}, ["--no-color"], False),
])
def test_colour(
    cli: Callable[..., Result], demo: mogplex.DemoServer, environment: Dict[str, str], flags: List[str], coloured: bool,
) -> None:
    env = {"TERM": "xterm", **service(demo.url, demo.token), **environment}
    result = cli("runs", "get", mogplex.DEMO_RUNS[0][0], *flags, env=env)
    assert ("\x1b[32msuccess\x1b[0m" in result.out) is coloured and result.code == 0
    assert result.out.count("\x1b") == (2 if coloured else 0)


def verdict(**fields: Any) -> mogplex.Verdict:
    """A Verdict with something in it."""
    known: Dict[str, Any] = {"run_id": "r", "status": "failed", "error": "", "working_branch": "", "pull_request_url": "",
                             "truncated": False, "duration_s": None, "run": {}}
    return mogplex.Verdict(**{**known, **fields})


def test_the_last_line_of_a_followed_run_as_json() -> None:
    assert mogplex.ndjson(mogplex.verdict_json(verdict(status="success"))) == '{"runId":"r","status":"success"}'
    full = verdict(error="boom", working_branch="b", pull_request_url="u", truncated=True)
    assert mogplex.verdict_json(full) == {"runId": "r", "status": "failed", "error": "boom", "pullRequestUrl": "u",
                                          "workingBranch": "b", "truncated": True}


def test_what_is_worth_knowing_at_the_end() -> None:
    assert mogplex.verdict_notes(verdict()) == []
    assert mogplex.verdict_notes(verdict(error="boom", working_branch="b", pull_request_url="u", duration_s=125.0)) == [
        "run error: boom", "branch: b", "pull request: u", "duration: 2m 05s"]


def test_signs_of_life_as_text() -> None:
    progress = mogplex.Progress("connected", "streaming", 0.0, 100.0, None, 0, "", 84.0, {})
    assert mogplex.status_line(progress, 245.0) == "streaming 4m 05s | last event 2m ago | connected"
    assert mogplex.silence_line(progress, 245.0) == "still streaming, last event 2m ago"
    limited = progress._replace(connection="limited", retry_at=300.0)
    assert mogplex.status_line(limited, 245.0).endswith("| limited, again in 55s")
    assert mogplex.silence_line(progress._replace(status="", connection="connecting"), 160.0) == (
        "still connecting, last event 1m ago")


# ---------------------------------------------------------------- 7. Cockpit

# ---------------------------------------------------------------- 8. Demo

# ---------------------------------------------------------------- 9. Commands and main


def test_login_in_the_demo_touches_no_file_of_ours(cli: Callable[..., Result], tmp_path: Any) -> None:
    result = cli("--demo", "login")
    assert result.code == 0 and re.fullmatch(r"signed in to http://127\.0\.0\.1:\d+\n", result.out)
    assert "/api/auth/mcp/authorize?response_type=code&" in result.err and not (tmp_path / "home").exists()


def test_login_on_a_remote_host(tmp_path: Any) -> None:
    """The URL is taken to a browser elsewhere; nothing is opened here, Ctrl+C leaves, and the rest is stored."""
    with RawServer(Issuer()) as server:
        environ = {**os.environ, **service(server.url, ""), "SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}
        for interrupted in True, False:
            process = subprocess.Popen(
                [sys.executable, MODULE, "login"], env=environ, universal_newlines=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stderr
            said = [process.stderr.readline() for _ in range(5)]
            assert said[0] == f"to sign in to {server.url}, open this page:\n"
            assert re.search(r"ssh -L (2481[68]):127\.0\.0\.1:\1 ", said[2]) and "login --with-token" in said[3]
            assert said[4] == "waiting for up to 5m 00s; Ctrl+C ends the wait\n"
            if interrupted:
                process.send_signal(signal.SIGINT)
            else:
                Browser(CALLBACK)(said[1].strip())
            left = (*process.communicate(), process.returncode)
            assert left == (("", "", 130) if interrupted else (f"signed in to {server.url}\n", "", 0))
    assert stored(tmp_path / "home")["mogplex"]["access_token"] == "access-1"


def test_login_with_a_token(cli: Callable[..., Result], tmp_path: Any) -> None:
    with RawServer(lambda number, request, _: ok({"repos": []}) if TOKEN in request else refusal(
            401, "UNAUTHORIZED", "Unauthorized")) as server:
        for stdin, code in (("mog_wrong\n", 64), ("", 2), (" \n", 2), ("mog_\x1b[2J", 64)):
            result = cli("login", "--with-token", env=service(server.url, ""), stdin=stdin)
            assert (result.code, result.out) == (code, "") and not (tmp_path / "home").exists(), result
        result = cli("login", "--with-token", "--json", env=service(server.url, "mog_other"), stdin=f"{TOKEN}\n")
    assert json.loads(result.out) == {"service": server.url, "path": str(tmp_path / "home" / "auth.json")}
    assert (result.code, result.err) == (0, "MOGPLEX_API_KEY is set, and goes before this sign-in\n")
    assert stored(tmp_path / "home")["mogplex"] == {"token": TOKEN, "base_url": server.url}


def test_login_asks_for_the_token_unseen_on_a_terminal(tmp_path: Any) -> None:
    import pty
    ours, theirs = pty.openpty()
    with RawServer(lambda *_: ok({"repos": []})) as server:
        process = subprocess.Popen(
            [sys.executable, MODULE, "login", "--with-token"], env={**os.environ, **service(server.url, "")},
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


@pytest.mark.parametrize("key, entry, said, code, expected", [
    (TOKEN, {}, ok({"repos": []}), 0, {
        "source": "MOGPLEX_API_KEY", "kind": "personal access token", "token": "mog_T0ke", "hides": None,
        "expires": None, "state": "accepted"}),
    (TOKEN, {"token": "t"}, ok({"repos": []}), 0, {"source": "MOGPLEX_API_KEY", "hides": "{path}"}),
    ("", {"access_token": "0123456789abcdefg", "expires_at": 9e9}, ok({"repos": []}), 0, {
        "source": "{path}", "kind": "sign-in", "token": "01234567", "hides": None, "expires": "2255-03-14T16:00:00Z"}),
    ("", {"token": "short"}, refusal(401, "UNAUTHORIZED", "Unauthorized"), 64, {"token": None, "state": "refused"}),
    (TOKEN, {}, refusal(403, "FORBIDDEN", "Missing"), 65, {"state": "accepted, without the scope read"}),
    (TOKEN, {}, answer(500, "", Retry_After="60"), 1, {"state": "unknown"}),
    ("", {}, b"", 64, {}),
])
def test_login_status(
    cli: Callable[..., Result], tmp_path: Any, key: str, entry: Dict[str, Any], said: bytes, code: int,
    expected: Dict[str, Any],
) -> None:
    path = str(put(tmp_path / "home", {"mogplex": entry}))
    with RawServer(lambda *_: said) as server:
        result = cli("login", "status", "--json", env=service(server.url, key))
        human = cli("login", "status", env=service(server.url, key))
    assert result.code == human.code == code
    record = json.loads(result.out or "{}")
    assert {name: record[name] for name in expected} == {
        name: path if value == "{path}" else value for name, value in expected.items()}
    rows = "".join(f"{name:<7} {value}\n" for name, value in record.items() if value)
    assert human.out == rows and TOKEN not in human.out + human.err + result.out


def test_logout(cli: Callable[..., Result], tmp_path: Any) -> None:
    put(tmp_path / "home", {"mogplex": {"token": "t"}, "other": 1})
    applies = "MOGPLEX_API_KEY is set, and still applies\n"
    assert cli("logout", env={"MOGPLEX_API_KEY": "x"}) == (0, "signed out\n", applies)
    assert cli("--logout") == (0, "there was no stored sign-in\n", "")
    assert cli("logout", "--json") == (0, '{"forgotten":false}\n', "")
    assert stored(tmp_path / "home") == {"version": 1, "other": 1}


# ---------------------------------------------------------------- The contract
