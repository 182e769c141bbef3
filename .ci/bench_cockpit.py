#!/usr/bin/env python3
"""Measures the cockpit against its bars, on a real pseudo-terminal: each figure beside its limit.

    python .ci/bench_cockpit.py [WORD...]    # exit code 1 when a bar is missed

With words, only the parts whose function has one of them as its name. The terminal is 120x40 and
answers no query; the service is a small one in this process, with a run of 5,000 events. Needs
what the program needs, and Linux (/proc).
"""
from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import mogplex  # noqa: E402

TOKEN = "mog_" + "x" * 32
WIDTH = 120
HEIGHT = 40
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
import mogplex
def browse(url):
    if os.environ.get("CRASH"):
        1 / 0  # a bug in a job
    return True
sys.exit(mogplex.run_cockpit(
    lambda *given: mogplex.Client(*(given or (sys.argv[3],)), sys.argv[2]), base_url=sys.argv[2],
    home=mogplex.home_from(os.environ), environ=os.environ, attach="run", run_browser=browse))
"""
FRAME_START = b"\x1b[?2026h"
FRAME_END = b"\x1b[?2026l"
OURS = re.compile(  # all that the program itself may send
    rb"\x1b\[[0-9;]*[Hm]|\x1b\[[JK]|\x1b\[2J|\x1b\[\?(?:25|12|1|1049|1000|1006|2004|2026)[hl]"
    rb"|\x1b[=>]|\x1b\[2[23];0;0t")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e::error::\r\n\x1bPq\x1b\\ \x85 done"
LOG = "\n".join(  # 10,000 lines, with what makes a careless pattern backtrack
    "=" * 72 if number % 4 == 0 else f"npm warn {number} a=b==c \u65e5\u672c deprecated package@1.{number}"
    for number in range(10_000))
BIG_EVENT = {
    "id": "big", "type": "log", "createdAt": "2026-11-23T19:32:19Z",
    "message": "the largest of all " * 26_000,
    "payload": {"lines": ["some output of a tool"] * 20_000},
}


class Figure(NamedTuple):
    """One bar: what was measured, the figure, its limit and the unit of both."""

    name: str
    value: float
    limit: float
    unit: str

    def __str__(self) -> str:
        verdict = "ok" if self.value <= self.limit else "MISSED"
        return (
            f"{self.name:<58} {self.value:>9.2f} of at most {self.limit:>7g} "
            f"{self.unit:<6} {verdict}")


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands what it is asked to its server's Service."""

    protocol_version = "HTTP/1.1"
    service: Service

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        while self.service.hang:
            time.sleep(0.1)
        answer = {"ok": True, "data": self.service.data(self.path.partition("?")[0])}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.service.posts += 1
        self.do_GET()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A cockpit that left in the middle of an answer is no error."""


class Service:
    """Answers what the cockpit reads. ``hang`` stops all answers."""

    def __init__(self, status: str = "streaming", count: int = 5000, message: str = "") -> None:
        self.statuses = {"run": status}        # by run
        self.asked: Dict[str, float] = {}      # by run: when, on the monotonic clock
        self.count = count                     # of events, of every run
        self.message = message or (
            "a message of the usual length, such as an agent writes while it works, ")
        self.extra: List[Dict[str, Any]] = []  # events behind those
        self.hang = False
        self.posts = 0
        self.started = time.time() - 600
        handler = type("BoundHandler", (Handler,), {"service": self})
        server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def data(self, path: str) -> Dict[str, Any]:
        words = path.split("/mogplex/")[-1].split("/")
        if words[0] == "runs":
            return self.run_data(words[1], words[-1])
        if words[0] == "repos":
            return {"repos": [{"id": "r", "full_name": "acme/web", "default_branch": "main"}]}
        if words[-1] == "logs":
            return {"sandbox": {"id": "s0", "install_log": LOG}, "lifecycle_events": []}
        sandboxes = [
            {"id": f"s{number}", "status": "running", "working_branch": f"b{number}"}
            for number in range(6)]
        return {"sandboxes": sandboxes}

    def run_data(self, run_id: str, what: str) -> Dict[str, Any]:
        self.asked[run_id] = time.monotonic()
        status = self.statuses.get(run_id, "success")
        run = {
            "runId": run_id, "status": status, "harness": "codex", "repoId": "r",
            "error": "out of memory" if status == "failed" else None,
            "createdAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "updatedAt": "2026-11-23T19:32:19Z", "branch": {"base": "main"},
        }
        if what != "events":
            return {"run": run}
        events = [
            {"id": str(number), "type": "log", "message": f"{number} {self.message}",
             "payload": {}, "createdAt": "2026-11-23T19:32:19Z"}
            for number in range(self.count)]
        return {"run": run, "events": events + self.extra}


class Cockpit:
    """The program on a pseudo-terminal of 120x40."""

    def __init__(self, url: str, remembered: Sequence[str] = (), **environ: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(WIDTH, HEIGHT)
        self.modes = termios.tcgetattr(self.slave)
        self.output = b""
        self.home = tempfile.TemporaryDirectory()
        variables = {
            **os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8",
            "MOGPLEX_HOME": self.home.name, "MOGPLEX_REPO": "acme/web",
            "PYTHONPYCACHEPREFIX": os.path.join(tempfile.gettempdir(), "bench-pycache"), **environ}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed module is compiled once
        for run_id in remembered:
            self.remember(url, run_id, variables)
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, ROOT, url, TOKEN], stdin=self.slave,
            stdout=self.slave, stderr=self.slave, env=variables, preexec_fn=self._adopt)

    @staticmethod
    def remember(url: str, run_id: str, environ: Dict[str, str]) -> None:
        body = {"repoId": "r", "prompt": f"the task of {run_id}"}
        home = mogplex.home_from(environ)
        start = mogplex.start_record(url, body, f"key-{run_id}", "acme/web")
        home.record_run(start, {"runId": run_id})

    @staticmethod
    def _adopt() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __enter__(self) -> Cockpit:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)
        with contextlib.suppress(OSError):
            self.home.cleanup()

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, seconds: float) -> bytes:
        """What comes within so many seconds."""
        got = b""
        end = time.monotonic() + seconds
        while select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
            got += os.read(self.master, 1 << 16)
        self.output += got
        return got

    def until(self, condition: Callable[[bytes], object], seconds: float = 20.0) -> float:
        """The moment at which what came since the call satisfies ``condition``."""
        got = b""
        end = time.monotonic() + seconds
        while not condition(got):
            if time.monotonic() > end:
                last = self.output[-300:]
                raise SystemExit(f"bench: nothing came in {seconds} s; the last bytes: {last!r}")
            if select.select([self.master], [], [], 0.002)[0]:
                data = os.read(self.master, 1 << 16)
                got += data
                self.output += data
        return time.monotonic()

    def send(self, data: bytes) -> float:
        """Write all of it, reading what comes meanwhile; the moment before."""
        began = time.monotonic()
        while data:
            readable, writable, _ = select.select([self.master], [self.master], [])
            if writable:
                data = data[os.write(self.master, data[:4096]):]
            if readable:
                self.output += os.read(self.master, 1 << 16)
        return began

    def settled(self) -> Cockpit:
        """Wait until its events are there and nothing but the clock moves any more."""
        self.until(lambda got: b"events" in self.output)
        self.read(2.5)
        return self

    def key_ms(self, key: bytes) -> float:
        """From a key to the end of the first frame that it causes."""
        while self.read(0.01):
            pass
        began = self.send(key)
        return (self.until(lambda got: FRAME_END in got) - began) * 1000

    def cpu_s(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def state(self) -> str:
        """T while it is stopped."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]


def frames(output: bytes) -> List[bytes]:
    """What was written, frame by frame."""
    return output.split(FRAME_START)[1:]


def percentile_95(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


def typing_ms(cockpit: Cockpit) -> float:
    """The 95th percentile over 80 keys, some of which delete."""
    keys = [b"\x7f" if number % 20 == 19 else b"w" for number in range(80)]
    return percentile_95([cockpit.key_ms(key) for key in keys])


def first_frame_ms(answering: bool) -> float:
    with Cockpit(Service("success", 10).url) as cockpit:

        def is_drawn(got: bytes) -> bool:
            if answering and re.search(rb"\x1b\[c|\x1b\[\?\d+\$p", got):
                os.write(cockpit.master, b"\x1b[?62;22c")
            return b"mogplex" in got and FRAME_END in got

        return (cockpit.until(is_drawn) - cockpit.started) * 1000


def starts() -> Iterator[Figure]:
    for name, limit_ms, answering in (
            ("first frame", 400, True), ("first frame, the terminal answers no query", 1500, False)):
        times = [first_frame_ms(answering) for _ in range(6)][1:]  # the first may have to compile
        yield Figure(name, sorted(times)[2], limit_ms, "ms")


def written() -> Iterator[Figure]:
    service = Service()
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        yield Figure("bytes, clock tick", max(map(len, frames(cockpit.read(6.0)))), 250, "bytes")
        service.count += 1
        before = len(cockpit.output)
        cockpit.until(lambda got: b"5001 events" in got)
        cockpit.read(0.1)
        most = max(map(len, frames(cockpit.output[before:])))
        yield Figure("bytes, appended event", most, 6000, "bytes")
        before = len(cockpit.output)
        for _ in range(20):
            cockpit.read(0.05)
            cockpit.send(b"w")
        most = max(map(len, frames(cockpit.output[before:])))
        yield Figure("bytes, key", most, 400, "bytes")


def keys() -> Iterator[Figure]:
    service = Service()
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        yield Figure("key to bytes, 95th percentile", typing_ms(cockpit), 20, "ms")
        service.hang = True
        cockpit.read(2.0)
        yield Figure("the same while a request hangs", typing_ms(cockpit), 20, "ms")


def pastes() -> Iterator[Figure]:
    service = Service()
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        began = cockpit.send(b"\x1b[200~" + b"/quit\r\n" * 29000 + b"the very end\x1b[201~")
        took = (cockpit.until(lambda got: b"the very end" in got) - began) * 1000
        yield Figure("200 KB paste to the screen", took, 200, "ms")
        cockpit.read(0.5)
        done = service.posts + (cockpit.process.poll() is not None)
        yield Figure("runs started by it, or program ended", done, 0, "")


def searches() -> Iterator[Figure]:
    """In a drawer of 10,000 lines."""
    with Cockpit(Service("success", 10).url) as cockpit:
        cockpit.settled()
        cockpit.send(b"/logs s0\r")
        cockpit.until(lambda got: b"=====" in got)
        cockpit.read(0.5)
        typed = b"=========" + b"\x7f" * 9 + b"npmwarn9999" + b"\x7f" * 11
        times = [cockpit.key_ms(bytes([key])) for key in typed]
        yield Figure("drawer search over 10,000 lines, key to bytes", percentile_95(times), 50, "ms")


def details() -> Iterator[Figure]:
    """Of an event of 1 MB."""
    service = Service("streaming", 10)
    service.extra = [BIG_EVENT]
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        cockpit.send(b"\t")
        cockpit.read(0.5)
        began = cockpit.send(b"\r")
        took = (cockpit.until(lambda got: b"EVENT" in got and FRAME_END in got) - began) * 1000
        yield Figure("details of an event of 1 MB", took, 50, "ms")
        moves = (b"\x1b[B", b"\x1b[6~", b"\x1b[B", b"\x1b[A") * 5
        times = [cockpit.key_ms(key) for key in moves]
        yield Figure("moving in them, 95th percentile", percentile_95(times), 50, "ms")


def failures() -> Iterator[Figure]:
    """Of runs that are not shown, each right after it was asked for: the longest wait."""
    service = Service("streaming", 10)
    others = ["1111aaaa", "2222bbbb", "3333cccc"]
    service.statuses.update(dict.fromkeys(others, "streaming"))
    with Cockpit(service.url, remembered=["run", *others]) as cockpit:
        cockpit.until(lambda got: set(others) <= set(service.asked))
        cockpit.read(15.0)  # the pace of every day, not that of the start
        failed: Dict[str, float] = {}
        seen: Dict[str, float] = {}
        end = time.monotonic() + 150
        asked_before = dict(service.asked)
        while len(seen) < len(others) and time.monotonic() < end:
            cockpit.read(0.05)
            for run_id in others:
                if run_id not in failed and service.asked[run_id] != asked_before[run_id]:
                    service.statuses[run_id] = "failed"
                    failed[run_id] = time.monotonic()
                alert = f"run {run_id[:8]} failed".encode()
                if run_id in failed and run_id not in seen and alert in cockpit.output:
                    seen[run_id] = time.monotonic()
                    cockpit.send(b"\x1b")  # the next alert has the line for itself
        waits = [seen.get(run_id, end) - failed.get(run_id, end - 150) for run_id in others]
        yield Figure("a run that is not shown fails: on the screen after", max(waits), 30, "s")


def resizes() -> Iterator[Figure]:
    with Cockpit(Service("success").url) as cockpit:
        cockpit.settled()
        worst = 0.0
        for width, height in ((80, 24), (59, 20), (30, 8), (130, 45), (120, 40)):
            cockpit.read(0.05)
            began = time.monotonic()
            cockpit.resize(width, height)
            last_row = b"\x1b[%d;1H" % height
            until = cockpit.until(lambda got: last_row in got and got.endswith(FRAME_END))
            worst = max(worst, until - began)
        yield Figure("resize to a right screen, the slowest of 5", worst * 1000, 100, "ms")


def endings() -> Iterator[Figure]:
    """However it ends: how long until the terminal is as it was, and the exit code."""
    cases: Tuple[Tuple[str, int, bytes, int], ...] = (
        ("SIGTERM", signal.SIGTERM, b"", 143),
        ("SIGHUP", signal.SIGHUP, b"", 129),
        ("exception", 0, b"/open\r", 1),
        ("^C ^C", 0, b"\x03\x03", 0),
    )
    for name, number, sent, code in cases:
        crash = {"CRASH": "1"} if name == "exception" else {}
        with Cockpit(Service("success").url, **crash) as cockpit:
            cockpit.settled()
            began = time.monotonic()
            if number:
                cockpit.process.send_signal(number)
            else:
                cockpit.send(sent)
            until = cockpit.until(
                lambda got: b"\x1b[?1049l" in got
                and termios.tcgetattr(cockpit.slave) == cockpit.modes)
            yield Figure(f"{name} to a restored terminal", (until - began) * 1000, 200, "ms")
            off = abs(cockpit.process.wait(10) - code)
            yield Figure(f"{name}: exit code, off by", off, 0, "")


def suspends() -> Iterator[Figure]:
    with Cockpit(Service("success").url) as cockpit:
        cockpit.settled()
        # The program is the only one of its session, whose SIGTSTP the kernel drops as orphaned: a
        # shell is what stops jobs. SIGSTOP after the restore is what the program sees of it.
        began = cockpit.send(b"\x1a")
        until = cockpit.until(lambda got: b"\x1b[?1049l" in got)
        yield Figure("Ctrl+Z to a terminal given back", (until - began) * 1000, 200, "ms")
        cockpit.read(0.5)
        cockpit.process.send_signal(signal.SIGSTOP)
        while cockpit.state() != "T":
            time.sleep(0.001)
        began = time.monotonic()
        cockpit.process.send_signal(signal.SIGCONT)
        last_row = b"\x1b[%d;1H" % HEIGHT
        until = cockpit.until(
            lambda got: b"mogplex" in got and last_row in got and got.endswith(FRAME_END))
        yield Figure("fg to a whole screen", (until - began) * 1000, 200, "ms")


def hostile() -> Iterator[Figure]:
    with Cockpit(Service("streaming", 50, message=HOSTILE).url) as cockpit:
        cockpit.until(lambda got: b"50 events" in got)
        cockpit.send(b"\t\r")
        cockpit.read(1.5)
        left = OURS.sub(b"", cockpit.output)
        controls = re.findall("[\x80-\x9f]", cockpit.output.decode("utf-8", "replace"))
        escapes = left.count(b"\x1b") + len(controls)
    yield Figure("bytes of ESC or C1 that come from API text", escapes, 0, "bytes")


def idle() -> Iterator[Figure]:
    with Cockpit(Service("success").url) as cockpit:
        cockpit.settled()
        before = cockpit.cpu_s()
        began = time.monotonic()
        output = cockpit.read(20.0)
        share = (cockpit.cpu_s() - before) / (time.monotonic() - began) * 100
    yield Figure("CPU, nothing but the clock, 5,000 events", share, 0.5, "%")
    empty = sum(len(one) < 30 for one in frames(output))
    yield Figure("frames that were written and change nothing", empty, 0, "frames")


PARTS: Tuple[Callable[[], Iterator[Figure]], ...] = (
    starts, written, keys, pastes, searches, details, resizes, endings, suspends, hostile, idle,
    failures,
)


def main() -> int:
    missed = 0
    for part in PARTS:
        if not sys.argv[1:] or part.__name__ in sys.argv[1:]:
            for figure in part():
                print(figure, flush=True)
                missed += figure.value > figure.limit
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
