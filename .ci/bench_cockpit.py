#!/usr/bin/env python3
"""Measures the cockpit against its bars, on a real pseudo-terminal, and prints each figure beside its limit.

    python .ci/bench_cockpit.py            # exit code 1 when a bar is missed

The terminal is 120x40 and answers no query; the service is a small one in this process, with a run of 5,000
events. Needs what the program needs, and Linux (/proc).
"""
from __future__ import annotations

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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
import mogplex
if os.environ.get("CRASH"):
    mogplex.Desk.do_open = lambda *_: 1 / 0
sys.exit(mogplex.run_cockpit(lambda: mogplex.Client("mog_" + "x" * 32, sys.argv[2]), base_url=sys.argv[2],
                             home=os.environ["MOGPLEX_HOME"], environ=os.environ, attach="run"))
"""
OURS = re.compile(rb"\x1b\[[0-9;]*[Hm]|\x1b\[[JK]|\x1b\[2J|\x1b\[\?(?:25|12|1|1049|1000|1006|2004|2026)[hl]"
                  rb"|\x1b[=>]|\x1b\[2[23];0;0t")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e::error::\r\n\x1bPq\x1b\\ \x85 done"


class Figure(NamedTuple):
    """One bar: what was measured, the figure, its limit and the unit of both."""

    name: str
    value: float
    limit: float
    unit: str

    def __str__(self) -> str:
        verdict = "ok" if self.value <= self.limit else "MISSED"
        return f"{self.name:<58} {self.value:>9.2f} of at most {self.limit:>7g} {self.unit:<6} {verdict}"


class Service:
    """Answers what the cockpit reads: one run, with as many events as ``count`` says; ``hang`` stops all answers."""

    def __init__(self, status: str = "streaming", count: int = 5000, hang: bool = False, message: str = "") -> None:
        self.status, self.count, self.hang, self.message, self.posts = status, count, hang, message, 0
        self.started = time.time() - 600
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                while outer.hang:
                    time.sleep(0.1)
                body = json.dumps({"ok": True, "data": outer.data(self.path)}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                outer.posts += 1
                self.do_GET()

        http.server.ThreadingHTTPServer.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def data(self, path: str) -> Dict[str, Any]:
        run = {"runId": "run", "status": self.status, "harness": "codex", "repoId": "r", "error": None,
               "createdAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
               "updatedAt": "2026-11-23T19:32:19Z", "branch": {"base": "main"}}
        text = self.message or "a message of the usual length, such as an agent writes while it works, "
        events = [{"id": str(number), "type": "log", "message": f"{number} {text}", "payload": {},
                   "createdAt": "2026-11-23T19:32:19Z"} for number in range(self.count)] if "/events" in path else []
        records = [{"id": "r", "full_name": "acme/web", "default_branch": "main"}]
        sandboxes = [{"id": f"s{number}", "status": "running", "working_branch": f"b{number}"} for number in range(6)]
        return {"run": run, "events": events, "repos": records, "sandboxes": sandboxes}


class Cockpit:
    """The program on a pseudo-terminal of 120x40."""

    def __init__(self, url: str, **environ: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(120, 40)
        self.modes, self.output = termios.tcgetattr(self.slave), b""
        self.home = tempfile.TemporaryDirectory()
        variables = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "MOGPLEX_HOME": self.home.name,
                     "MOGPLEX_REPO": "acme/web", "PYTHONPYCACHEPREFIX": os.path.join(tempfile.gettempdir(), "bench-pycache"),
                     **environ}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed module is not compiled at each start
        self.started = time.monotonic()
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, ROOT, url], stdin=self.slave, stdout=self.slave,
                                        stderr=self.slave, env=variables, preexec_fn=self._adopt)

    @staticmethod
    def _adopt() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def __enter__(self) -> Cockpit:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)
        self.home.cleanup()

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def read(self, seconds: float) -> bytes:
        """What comes within so many seconds."""
        got, end = b"", time.monotonic() + seconds
        while select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]:
            got += os.read(self.master, 1 << 16)
        self.output += got
        return got

    def until(self, condition: Callable[[bytes], object], seconds: float = 20.0) -> float:
        """The moment at which what came since the call satisfies ``condition``."""
        got, end = b"", time.monotonic() + seconds
        while not condition(got):
            if time.monotonic() > end:
                raise SystemExit(f"bench: nothing came in {seconds} s; the last bytes: {self.output[-300:]!r}")
            if select.select([self.master], [], [], 0.002)[0]:
                data = os.read(self.master, 1 << 16)
                got, self.output = got + data, self.output + data
        return time.monotonic()

    def send(self, data: bytes) -> float:
        """Write all of it, reading what comes meanwhile; the moment before."""
        began = time.monotonic()
        while data:
            ready = select.select([self.master], [self.master], [])
            if ready[1]:
                data = data[os.write(self.master, data[:4096]):]
            if ready[0]:
                self.output += os.read(self.master, 1 << 16)
        return began

    def settled(self) -> Cockpit:
        """Wait until its events are there and nothing but the clock moves any more."""
        self.until(lambda got: b"5000 events" in self.output or b"events" in got)
        self.read(2.5)
        return self

    def cpu_s(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def frames(output: bytes) -> List[bytes]:
    """What was written, frame by frame."""
    return output.split(b"\x1b[?2026h")[1:]


def percentile_95(values: List[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


def key_latencies_ms(cockpit: Cockpit, count: int = 80) -> List[float]:
    """From a key to the first bytes that it causes."""
    latencies = []
    for number in range(count):
        while cockpit.read(0.01):
            pass
        began = cockpit.send(b"\x7f" if number % 20 == 19 else b"w")
        latencies.append((cockpit.until(lambda got: b"\x1b[?2026l" in got) - began) * 1000)
    return latencies


def idle(seconds: float) -> Iterator[Figure]:
    service = Service("success")
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        before, began = cockpit.cpu_s(), time.monotonic()
        written = cockpit.read(seconds)
        share = (cockpit.cpu_s() - before) / (time.monotonic() - began) * 100
    yield Figure("CPU, nothing but the clock, 5,000 events", share, 0.5, "%")
    yield Figure("frames that were written and change nothing", sum(len(one) < 30 for one in frames(written)), 0, "frames")


def written() -> Iterator[Figure]:
    service = Service()
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        yield Figure("bytes, clock tick", max(map(len, frames(cockpit.read(6.0)))), 250, "bytes")
        service.count += 1
        before = len(cockpit.output)
        cockpit.until(lambda got: b"5001 events" in got)
        cockpit.read(0.1)
        yield Figure("bytes, appended event", max(map(len, frames(cockpit.output[before:]))), 6000, "bytes")
        before = len(cockpit.output)
        for _ in range(20):
            cockpit.read(0.05)
            cockpit.send(b"w")
        yield Figure("bytes, key", max(map(len, frames(cockpit.output[before:]))), 400, "bytes")


def keys() -> Iterator[Figure]:
    service = Service()
    with Cockpit(service.url) as cockpit:
        cockpit.settled()
        yield Figure("key to bytes, 95th percentile", percentile_95(key_latencies_ms(cockpit)), 20, "ms")
        service.hang = True
        cockpit.read(2.0)
        yield Figure("the same while a request hangs", percentile_95(key_latencies_ms(cockpit)), 20, "ms")
        service.hang = False
        began = cockpit.send(b"\x1b[200~" + b"/quit\r\n" * 29000 + b"the very end\x1b[201~")
        took = (cockpit.until(lambda got: b"the very end" in got) - began) * 1000
        yield Figure("200 KB paste to the screen", took, 200, "ms")
        cockpit.read(0.5)
        yield Figure("runs started by it, or program ended", service.posts + (cockpit.process.poll() is not None), 0, "")


def starts(name: str, limit_ms: float, answering: bool) -> Iterator[Figure]:
    times = []
    for _ in range(6):
        with Cockpit(Service("success", 10).url) as cockpit:
            def ready(got: bytes) -> bool:
                if answering and re.search(rb"\x1b\[c|\x1b\[\?\d+\$p", got):
                    os.write(cockpit.master, b"\x1b[?62;22c")
                return b"mogplex" in got and b"\x1b[?2026l" in got
            times.append((cockpit.until(ready) - cockpit.started) * 1000)
    yield Figure(name, sorted(times[1:])[2], limit_ms, "ms")  # the first may have to compile


def resizes() -> Iterator[Figure]:
    with Cockpit(Service("success").url) as cockpit:
        cockpit.settled()
        worst = 0.0
        for width, height in ((80, 24), (59, 20), (30, 8), (130, 45), (120, 40)):
            cockpit.read(0.05)
            began = time.monotonic()
            cockpit.resize(width, height)
            last_row = b"\x1b[%d;1H" % height
            worst = max(worst, cockpit.until(lambda got: last_row in got and got.endswith(b"\x1b[?2026l")) - began)
        yield Figure("resize to a right screen, the slowest of 5", worst * 1000, 100, "ms")


def endings() -> Iterator[Figure]:
    """However it ends: how long until the terminal is as it was, and the exit code."""
    cases: Tuple[Tuple[str, Optional[int], bytes, int], ...] = (
        ("SIGTERM", signal.SIGTERM, b"", 143), ("SIGHUP", signal.SIGHUP, b"", 129), ("exception", None, b"/open\r", 1),
        ("^C ^C", None, b"\x03\x03", 0))
    for name, number, sent, code in cases:
        with Cockpit(Service("success").url, CRASH="1" if name == "exception" else "") as cockpit:
            cockpit.settled()
            began = time.monotonic()
            if number:
                cockpit.process.send_signal(number)
            else:
                cockpit.send(sent)
            until = cockpit.until(lambda got: b"\x1b[?1049l" in got
                                  and termios.tcgetattr(cockpit.slave) == cockpit.modes)
            yield Figure(f"{name} to a restored terminal", (until - began) * 1000, 200, "ms")
            yield Figure(f"{name}: exit code, off by", abs(cockpit.process.wait(10) - code), 0, "")


def suspends() -> Iterator[Figure]:
    def state(process: int) -> str:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    with Cockpit(Service("success").url) as cockpit:
        cockpit.settled()
        # The program is the only one of its session, whose SIGTSTP the kernel would drop as orphaned: a
        # shell is what stops jobs. SIGSTOP after the restore is what it sees of it.
        began = cockpit.send(b"\x1a")
        until = cockpit.until(lambda got: b"\x1b[?1049l" in got)
        yield Figure("Ctrl+Z to a terminal given back", (until - began) * 1000, 200, "ms")
        cockpit.read(0.5)
        cockpit.process.send_signal(signal.SIGSTOP)
        while state(cockpit.process.pid) != "T":
            time.sleep(0.001)
        began = time.monotonic()
        cockpit.process.send_signal(signal.SIGCONT)
        until = cockpit.until(lambda got: b"mogplex" in got and b"\x1b[40;1H" in got and got.endswith(b"\x1b[?2026l"))
        yield Figure("fg to a whole screen", (until - began) * 1000, 200, "ms")


def hostile() -> Iterator[Figure]:
    with Cockpit(Service("streaming", 50, message=HOSTILE).url) as cockpit:
        cockpit.until(lambda got: b"50 events" in got)
        cockpit.send(b"\t\r")
        cockpit.read(1.5)
        left = OURS.sub(b"", cockpit.output)
        escapes = left.count(b"\x1b") + len(re.findall("[\x80-\x9f]", cockpit.output.decode("utf-8", "replace")))
    yield Figure("bytes of ESC or C1 that come from API text", escapes, 0, "bytes")


def figures(seconds: float = 20.0) -> Iterator[Figure]:
    """All bars, one after another: about a minute."""
    yield from starts("first frame", 400, True)
    yield from starts("first frame, the terminal answers no query", 1500, False)
    yield from written()
    yield from keys()
    yield from resizes()
    yield from endings()
    yield from suspends()
    yield from hostile()
    yield from idle(seconds)


def main() -> int:
    missed = 0
    for figure in figures():
        print(figure, flush=True)
        missed += figure.value > figure.limit
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
