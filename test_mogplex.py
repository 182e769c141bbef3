"""Tests of mogplex.py, in its own order. Real sockets on 127.0.0.1, real pseudo-terminals, no mocks.

What works is driven against the embedded demo service; what breaks, against ``RawServer``,
which answers with exactly the bytes that a test gives it. Time is a parameter: no test
sleeps to be right.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
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

RUN_STREAMING = "7f2c41aa-3b5e-4d18-9a60-5c1e8b7d2f04"
RUN_LONG = "7a44c0be-1d9f-4e37-a2b8-c6d4e2f0a1b3"
RUN_FAILED = "7c02f9d4-2e8b-4a15-b6c3-9d7f5e3c1a0b"
NOWHERE = "00000000-0000-4000-8000-000000000000"
CALLBACK = "http://127.0.0.1:24816/auth/callback"


class Still:
    """A demo server whose clock only moves when told, and a plain HTTP client of it."""

    def __init__(self, **options: Any) -> None:
        self.now = 1_795_000_000.25
        self.server = mogplex.DemoServer(clock=lambda: self.now, **options).start()
        self.connection = http.client.HTTPConnection(self.server.url[7:], timeout=10)

    def __enter__(self) -> Still:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.server.close()

    def ask(self, method: str, path: str, body: Any = None, token: str = mogplex.DEMO_TOKEN,
            **headers: str) -> Tuple[int, Any, http.client.HTTPMessage]:
        """(status, JSON or text, headers) of an API path, or of any path that starts with two dots."""
        path = path[2:] if path.startswith("..") else mogplex.API_PATH + path
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent.setdefault("Authorization", f"Bearer {token}")
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        self.connection.request(method, path, data, sent)
        response = self.connection.getresponse()
        text = response.read().decode()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def data(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The ``data`` of a success."""
        status, answered, _ = self.ask(method, path, body, **headers)
        assert status in (200, 202) and answered["ok"] is True, answered
        return answered["data"]

    def start(self, prompt: str = "Do it", **fields: Any) -> str:
        """The id of a new run."""
        body = dict(repoId=mogplex.DEMO_WEB, prompt=prompt, **fields)
        return str(self.data("POST", "/runs", body, Idempotency_Key=f"key {self.server.service.requests}")["runId"])

    def watch(self, run_id: str) -> Tuple[str, List[Tuple[str, str]]]:
        """Status of a run, and (type, message) of its events."""
        data = self.data("GET", f"/runs/{run_id}/events")
        return data["run"]["status"], [(event["type"], event["message"]) for event in data["events"]]

    def form(self, **fields: str) -> Tuple[int, Any]:
        """A POST to the token endpoint."""
        fields.setdefault("client_id", "mogplex-cli")
        return self.ask("POST", "../api/auth/mcp/token", urllib.parse.urlencode(fields), token="")[:2]


@pytest.fixture
def still() -> Iterator[Still]:
    with Still() as served:
        yield served


@pytest.mark.parametrize("method, path, headers, status, code", [
    ("GET", "/repos", {"Authorization": f"bearer {mogplex.DEMO_TOKEN}"}, 307, ""),
    ("GET", "/repos", {"Authorization": f"Bearer  {mogplex.DEMO_TOKEN}"}, 307, ""),
    ("POST", "/runs", {"Authorization": "Bearer"}, 307, ""),
    ("GET", "/repos", {"Authorization": "Bearer mog_unknown"}, 401, "UNAUTHORIZED"),
    ("GET", "/nothing", {"Authorization": "Bearer mog_unknown"}, 404, ""),
    ("GET", "/runs", {}, 405, ""),
    ("DELETE", f"/runs/{RUN_LONG}", {}, 405, ""),
    ("GET", f"/repos/{mogplex.DEMO_WEB}", {}, 404, ""),
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
def test_demo_refuses(still: Still, method: str, path: str, headers: Dict[str, str], status: int, code: str) -> None:
    got, body, answered = still.ask(method, path, **headers)
    assert (got, body["error"]["code"] if code else "") == (status, code)
    if status == 307:
        assert answered["Location"] == "/login?next=" + urllib.parse.quote(mogplex.API_PATH + path, safe="")
    if not code:
        assert body == "" if status != 404 else body.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("path, location", [
    ("/repos/?q=a", "/repos?q=a"), ("//repos", "/repos"), ("/runs//x/", "/runs/x"),
    (f"/runs/{RUN_LONG}/", f"/runs/{RUN_LONG}"),
])
def test_demo_has_no_trailing_or_double_slashes(still: Still, path: str, location: str) -> None:
    status, body, headers = still.ask("GET", path, token="")
    assert (status, body, headers["Location"]) == (308, "", mogplex.API_PATH + location)


def test_demo_login_page_answers_a_followed_post(still: Still) -> None:
    status, body, _ = still.ask("POST", "../login?next=x", "{}", token="")
    assert status == 200 and "<title>" in body


def test_demo_scopes(still: Still) -> None:
    read = mogplex.DEMO_READ_TOKEN
    assert still.ask("GET", "/mcp/servers", token=read)[0] == 200
    for path in ("/runs", "/sandboxes", f"/runs/{RUN_STREAMING}/cancel"):
        status, body, _ = still.ask("POST", path, {}, token=read)
        assert (status, body["error"]) == (403, {
            "code": "FORBIDDEN", "message":
            "Missing required scope: write. Issue a new token with the 'write' scope at /settings/api-keys."})


WEB = {"repoId": mogplex.DEMO_WEB, "prompt": "x"}


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
    ("k", dict(WEB, repoId=mogplex.DEMO_FOREIGN_REPO), 404, "Repo not found"),
    ("k", dict(WEB, repoId=NOWHERE), 503, "External Mogplex run rate limit unavailable"),
    ("k", dict(WEB, repoId="nope"), 503, "External Mogplex run rate limit unavailable"),
    ("k", "{", 400, "repoId is required"),
    ("k", "[]", 400, "repoId is required"),
])
def test_demo_checks_what_a_run_is_started_with(still: Still, key: str, body: Any, status: int, message: str) -> None:
    got, answered, headers = still.ask("POST", "/runs", body, Idempotency_Key=key)
    assert (got, answered["error"]["message"]) == (status, message)
    assert headers["Retry-After"] == ("60" if status == 503 else None)
    assert len(still.server.service.runs) == len(still.server.seeded_runs)


def test_demo_lists(still: Still) -> None:
    repos = still.data("GET", "/repos")["repos"]
    names = [repo["full_name"] for repo in repos]
    assert names == sorted(names) and "acme/web" in names
    assert [repo for repo in repos if repo["full_name"] == "acme/web-legacy"] == [{
        "id": mogplex.DEMO_BARE, "full_name": "acme/web-legacy", "installation_id": None, "default_branch": None,
        "root_directory": None}]
    for query, found in (
        ("q=ACME/web", ["acme/web", "acme/web-legacy"]), ("q=e_d", ["acme/docs"]), ("q=e_x", []),
        ("q=a%25legacy", ["acme/web-legacy"]), ("q=.", []), (f"id={mogplex.DEMO_API}", ["acme/api"]),
        (f"id={NOWHERE}", []), ("limit=1", ["acme/api"]), ("limit=-5", ["acme/api"]), ("limit=many", names),
    ):
        assert [repo["full_name"] for repo in still.data("GET", "/repos?" + query)["repos"]] == found, query
    assert set(still.data("GET", "/agents")["agents"][0]) == {
        "id", "name", "slug", "model", "description", "category", "preset"}
    assert set(still.data("GET", "/models")["models"][0]) == {
        "id", "provider", "name", "contextLength", "capabilities", "pricing"}
    assert mogplex.DEMO_SECRET in json.dumps(still.data("GET", "/mcp/servers")["servers"][0]["config"])


def test_demo_sandboxes(still: Still) -> None:
    listed = still.data("GET", "/sandboxes")["sandboxes"]
    assert [one["last_active_at"] for one in listed] == sorted((one["last_active_at"] for one in listed), reverse=True)
    assert {"running", "paused", "error", "stopped"} <= {one["status"] for one in listed}
    for one in listed:
        assert bool(one["preview_url"]) == (one["status"] == "running")
        assert bool(one["error"]) == (one["status"] == "error")
    made = still.data("POST", "/sandboxes", {"repoId": mogplex.DEMO_DOCS})["sandbox"]
    assert (made["status"], made["sandbox_id"], made["base_branch"], made["root_directory"]) == (
        "creating", "pending", "trunk", "website")
    still.now += 6
    now = still.data("GET", f"/sandboxes?repo_id={mogplex.DEMO_DOCS}&status=running&limit=1")["sandboxes"]
    assert [one["id"] for one in now] == [made["id"]] and now[0]["preview_url"]
    logs = still.data("GET", f"/sandboxes/{made['id']}/logs")
    assert {"id", "install_log", "dev_log"} <= set(logs["sandbox"]) and logs["lifecycle_events"][0]["event_type"]
    assert still.ask("POST", "/sandboxes", {})[1]["error"]["message"] == "repoId is required"


def test_demo_plays_a_run_that_delivers(still: Still) -> None:
    run_id = still.start(harness="claude-code")
    assert still.watch(run_id) == ("pending", [("started", "External Mogplex run accepted")])
    still.now += 3
    assert still.watch(run_id)[0] == "streaming"
    still.now += 6.2
    status, events = still.watch(run_id)
    assert (status, events[-1]) == ("streaming", ("finished", "Harness run finished"))  # the event comes first
    still.now += 0.6
    data = still.data("GET", f"/runs/{run_id}/events")
    assert data["run"] == still.data("GET", f"/runs/{run_id}")["run"] and data["run"]["status"] == "success"
    assert data["run"]["branch"] == {"base": "main", "working": "main", "createBranch": False}
    payloads = {event["payload"].get("stage"): event["payload"] for event in data["events"]}
    branch = f"mogplex/agent-{run_id[:8]}"
    assert payloads["git_sync"]["working_branch"] == payloads["git_delivery"]["working_branch"] == branch
    assert payloads["git_delivery"]["pull_request_url"].startswith("https://github.com/acme/web/pull/")
    assert [event["type"] for event in data["events"]] == [
        "started", "started", "log", "log", "status_changed", "log", "assistant_message", "tool_call", "tool_result",
        "log", "finished"]


def test_demo_says_why_a_run_failed_after_the_status(still: Still) -> None:
    run_id = still.start("Please FAIL now")
    still.now += 8.2
    data = still.data("GET", f"/runs/{run_id}/events")
    assert data["run"]["status"] == "failed" and data["run"]["error"]
    assert data["events"][-1]["payload"] == {"exit_code": 1, "failure_code": "command_failed"}
    still.now += 1
    late = still.data("GET", f"/runs/{run_id}/events")["events"][-2:]
    assert [event["message"] for event in late] == ["Harness execution failed", "External Mogplex run failed"]
    assert {event["payload"]["error"] for event in late} == {data["run"]["error"]}
    assert still.watch(still.start("Repair the failing test"))[0] == "pending"


def test_demo_cancels(still: Still) -> None:
    run_id = still.start()
    still.now += 4
    assert still.data("GET", f"/runs/{run_id}")["run"]["status"] == "streaming"
    answered = still.data("POST", f"/runs/{run_id}/cancel")
    assert (answered["status"], answered["alreadyTerminal"]) == ("cancelled", False)
    assert answered["run"] == still.data("GET", f"/runs/{run_id}")["run"]
    assert still.watch(run_id)[1][-1] == ("cancel_requested", "Cancellation requested")
    still.now += 60  # the late event is there, and nothing of what the agent would have done
    status, events = still.watch(run_id)
    assert status == "cancelled" and [kind for kind, _ in events][-3:] == [
        "assistant_message", "cancel_requested", "cancelled"]
    answered = still.data("POST", f"/runs/{run_id}/cancel")
    assert (answered["status"], answered["alreadyTerminal"]) == ("cancelled", True)
    assert still.data("POST", f"/runs/{RUN_FAILED}/cancel")["status"] == "failed"


def test_demo_replays_a_start(still: Still) -> None:
    body = dict(WEB, workingBranch="feat/x", createBranch=True)
    first = still.data("POST", "/runs", body, Idempotency_Key=" one ")
    assert first["replayed"] is False and first["branch"] == {"base": "main", "working": "feat/x", "createBranch": True}
    still.now += 30
    again = still.data("POST", "/runs", body, Idempotency_Key="one")
    assert (again["runId"], again["replayed"], again["status"]) == (first["runId"], True, "success")
    status, other, _ = still.ask("POST", "/runs", dict(body, prompt="y"), Idempotency_Key="one")
    assert (status, other["error"]["code"]) == (409, "IDEMPOTENCY_CONFLICT")


def test_demo_lists_the_first_events_only(still: Still) -> None:
    path = f"/runs/{RUN_LONG}/events"
    everything = still.data("GET", path + "?limit=1000")["events"]
    assert len(everything) == 200 and everything[0]["message"] == "External Mogplex run accepted"
    for query, count in (("", 100), ("?limit=0", 1), ("?limit=7&offset=3&after=x", 7)):
        assert still.data("GET", path + query)["events"] == everything[:count]
    still.now += 1e6
    data = still.data("GET", path + "?limit=200")
    assert data["events"] == everything and data["run"]["status"] == "success"  # though no finished event is listed
    spellings = {re.sub(r".*:\d\d", "", event["createdAt"].replace("+00:00", "+")) for event in everything}
    assert {len(text) - 1 for text in spellings} - {0} == {2, 3, 4, 5, 6, 7} - {0} and "+" in spellings
    times = [mogplex.parse_time(event["createdAt"]) or 0.0 for event in everything]
    assert times == sorted(times) and times[0] > 0


def test_demo_seeds(still: Still) -> None:
    seeds = still.server.seeded_runs
    runs = [still.data("GET", f"/runs/{seed['id']}")["run"] for seed in seeds]
    assert [run["status"] for run in runs] == ["success", "success", "cancelled", "failed", "success", "streaming"]
    assert [seed["time"] for seed in seeds] == sorted(run["createdAt"] for run in runs)
    assert set(seeds[0]) == {"id", "service", "repo", "branch", "time", "task"}
    before = still.watch(RUN_STREAMING)[1]
    still.now += 3600
    status, after = still.watch(RUN_STREAMING)
    assert status == "streaming" and len(after) > len(before)


def test_demo_rate_limit() -> None:
    with Still(rate_limit=True) as still:
        assert [still.ask("GET", "/repos")[0] for _ in range(60)] == [200] * 60
        status, body, headers = still.ask("GET", "/repos")
        assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "RATE_LIMITED", "60")
        assert still.ask("GET", "/repos", token=mogplex.DEMO_READ_TOKEN)[0] == 200  # each token has its own
        still.now += 59.9
        assert still.ask("GET", "/repos")[0] == 429
        still.now += 0.1
        assert still.ask("GET", "/repos")[0] == 200  # refused ones did not count
        assert (still.server.service.refusals, still.server.service.requests) == (2, 64)


def sign_in(still: Still, **changes: str) -> Dict[str, str]:
    """What the callback is given for a well-formed authorize request, changed a little."""
    challenge = base64.urlsafe_b64encode(hashlib.sha256(b"verifier").digest()).decode().rstrip("=")
    fields = {"response_type": "code", "client_id": "mogplex-cli", "redirect_uri": CALLBACK, "state": "a b&c",
              "scope": "read write offline_access", "code_challenge": challenge, "code_challenge_method": "S256"}
    fields.update(changes)
    path = "../api/auth/mcp/authorize?" + urllib.parse.urlencode(fields)
    status, _, headers = still.ask("GET", path, token="")
    target, _, query = (headers["Location"] or "?").partition("?")
    assert (status, target) in ((302, CALLBACK), (401, ""))
    return dict(urllib.parse.parse_qsl(query))


def exchange(still: Still, code: str, **changes: str) -> Tuple[int, Any]:
    return still.form(**dict(dict(grant_type="authorization_code", code=code, redirect_uri=CALLBACK,
                                  code_verifier="verifier"), **changes))


def test_demo_signs_in() -> None:
    with Still(rate_limit=True) as still:
        still.server.service.token_lifetime_s = 100.0
        answered = sign_in(still)
        assert answered["state"] == "a b&c"
        status, pair = exchange(still, answered["code"])
        assert (status, pair["token_type"], pair["expires_in"]) == (200, "Bearer", 100)
        token = pair["access_token"]
        assert not token.startswith("mog_") and still.server.service.issued == [token]
        assert {still.ask("GET", "/repos", token=token)[0] for _ in range(61)} == {200}  # it has no rate limit
        assert exchange(still, answered["code"])[1]["error"] == "invalid_grant"  # a code works once
        still.now += 100
        assert still.ask("GET", "/repos", token=token)[0] == 401
        renew = {"grant_type": "refresh_token", "refresh_token": pair["refresh_token"]}
        status, newer = still.form(**renew)
        assert status == 200 and newer["refresh_token"] != pair["refresh_token"]
        status, used = still.form(**renew)
        assert (status, used["error"], still.server.service.refreshes) == (401, "invalid_grant", 1)
        assert still.ask("POST", f"/runs/{RUN_STREAMING}/cancel", token=newer["access_token"])[0] == 200
        still.now += 31 * 86400
        assert still.form(grant_type="refresh_token", refresh_token=newer["refresh_token"])[0] == 401


def test_demo_sign_in_scopes(still: Still) -> None:
    pair = exchange(still, sign_in(still, scope="read")["code"])[1]
    assert "refresh_token" not in pair
    assert still.ask("POST", "/sandboxes", {}, token=pair["access_token"])[0] == 403


@pytest.mark.parametrize("changes, error", [
    ({"code_verifier": "other"}, "invalid_request"), ({"redirect_uri": CALLBACK + "x"}, "invalid_client"),
    ({"client_id": "other"}, "invalid_client"), ({"code": "other"}, "invalid_grant"),
    ({"grant_type": "refresh_token"}, "invalid_grant"),
])
def test_demo_refuses_an_exchange(still: Still, changes: Dict[str, str], error: str) -> None:
    code = sign_in(still)["code"]
    status, body = exchange(still, **dict(dict(code=code), **changes))
    assert (status, body["error"]) == (401, error) and body["error_description"]
    burnt = error == "invalid_request"
    if burnt:
        assert exchange(still, code)[1]["error"] == "invalid_grant"


def test_demo_refuses_to_authorize(still: Still) -> None:
    assert sign_in(still, client_id="other") == sign_in(still, redirect_uri="http://127.0.0.1:1/auth/callback") == {}
    for changes in ({"code_challenge_method": "plain"}, {"code_challenge": ""}, {"response_type": "token"}):
        answered = sign_in(still, **changes)
        assert answered["error"] == "invalid_request" and " " in answered["error_description"]
        assert "state" not in answered
    code = sign_in(still)["code"]
    still.now += 601
    assert exchange(still, code)[1]["error"] == "invalid_grant"


def test_demo_keeps_connections_and_sends_chunks(still: Still) -> None:
    headers = still.ask("GET", f"/runs/{RUN_LONG}/events?limit=200")[2]
    assert headers["Transfer-Encoding"] == "chunked" and headers["Content-Length"] is None
    kept = still.connection.sock
    for path in ("/repos", "/nothing", "/runs", "/repos/"):
        still.ask("GET", path)
    assert kept is not None and still.connection.sock is kept


def test_demo_speed_divides_every_duration() -> None:
    with Still(speed=20.0) as still:
        run_id = still.start()
        still.now += 0.5
        assert still.watch(run_id)[0] == "success"
        times = [mogplex.parse_time(event["createdAt"]) or 0.0
                 for event in still.data("GET", f"/runs/{run_id}/events")["events"]]
        assert max(times) <= still.now


def test_demo_starts_one_run_for_twenty_threads_with_one_key(still: Still) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def start(_: int) -> str:
        answered = still.server.service.answer(
            "POST", mogplex.API_PATH + "/runs",
            {"authorization": f"Bearer {mogplex.DEMO_TOKEN}", "idempotency-key": "k"}, json.dumps(WEB).encode())
        assert isinstance(answered.body, dict)
        return str(answered.body["data"]["runId"])
    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(start, range(20)))) == 1


def test_demo_closes_at_once_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    still = Still()
    still.ask("GET", "/repos")
    port = int(still.server.url.rpartition(":")[2])
    with pytest.raises(mogplex.UsageError, match=f"127.0.0.1:{port}"):
        mogplex.DemoServer(port)
    for nonsense in (b"\x00\xff\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"POST /x HTTP/1.1\r\nContent-Length: no\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    still.server.close()
    with pytest.raises((OSError, http.client.HTTPException)):
        still.ask("GET", "/repos")  # on the connection that was kept
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))
    with mogplex.DemoServer(port) as second:
        assert second.url == still.server.url
    second.close()
    mogplex.DemoServer().close()  # never started
    still.connection.close()
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- 9. Commands and main

# ---------------------------------------------------------------- The contract
