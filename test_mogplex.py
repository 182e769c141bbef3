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

# ---------------------------------------------------------------- The contract
