#!/usr/bin/env python3
"""Measures the tail's speed against its bars and against other decoders, and prints each figure beside its limit.

    python .ci/bench_tail.py            # exit code 1 when a bar is missed

The decoder alone is compared with the PyPI packages httpx-sse and sseclient-py, which are put into a directory
of .ci/venv for that, on 4 KiB chunks of 300-byte events, in turns. The rest runs the program as a user does,
with a server in another process: how many events a second go from a socket to ``--json`` on a pipe, and how long
after its last byte an event is there. Last, in virtual time, how late twenty runs on one token are told, against
the demo service with the limit of the real one: 60 requests in any 60 s.
"""
from __future__ import annotations

import codecs
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

CI = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(CI)
sys.path.insert(0, ROOT)
EVENTS = 100_000
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
OVER = json.dumps({"ok": True, "data": {"run": {"runId": "r", "status": "success"}, "events": []}}).encode()
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import bench_tail
bench_tail.serve(int(sys.argv[2]), float(sys.argv[3]))
"""


def event(number: int) -> bytes:
    """One event as the service might stream it, 300 bytes with its blank line."""
    record = {"id": f"{number:08d}-1234-4abc-9def-1234567890ab", "type": "tool_finished", "toolName": "shell",
              "message": "", "payload": {"exit_code": 0}, "createdAt": "2026-11-23T19:32:19.452Z"}
    empty = f"id: {number}\ndata: {json.dumps(record, separators=(',', ':'))}\n\n"
    record["message"] = "x" * (300 - len(empty))
    return f"id: {number}\ndata: {json.dumps(record, separators=(',', ':'))}\n\n".encode()


def ours(chunks: List[bytes]) -> Iterator[Any]:
    import mogplex
    decoder = mogplex.SSEDecoder()
    for chunk in chunks:
        yield from decoder.feed(chunk)


def httpx_sse(chunks: List[bytes]) -> Iterator[Any]:
    from httpx_sse._decoders import SSEDecoder, SSELineDecoder  # what its EventSource does, without the network
    text, lines, decoder = codecs.getincrementaldecoder("utf-8")("replace"), SSELineDecoder(), SSEDecoder()
    for chunk in chunks:
        for line in lines.decode(text.decode(chunk)):
            found = decoder.decode(line.rstrip("\n"))
            if found is not None:
                yield found


def sseclient_py(chunks: List[bytes]) -> Iterator[Any]:
    import sseclient
    yield from sseclient.SSEClient(iter(chunks)).events()


def packages() -> str:
    """A directory that has the other decoders."""
    home = os.path.join(CI, "venv", "sse")
    if not os.path.isdir(os.path.join(home, "httpx_sse")):
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
                        "--target", home, "httpx", "httpx-sse", "sseclient-py"], check=True)
    return home


def figure(name: str, value: float, bar: float, unit: str, least: bool, note: str = "") -> int:
    """Print a figure beside its bar; 1 when it is missed."""
    kept = value >= bar if least else value <= bar
    limit = f"of at {'least' if least else 'most'} {bar:g}"
    print(f"{name:<58} {value:>10.2f} {limit} {unit:<9} {'ok' if kept else 'MISSED'}  {note}".rstrip(), flush=True)
    return int(not kept)


def measure_decoders() -> int:
    """CPU time, in turns, so that whatever else the machine does hits all of them; the best of nine."""
    sys.path.append(packages())
    data = b"".join(map(event, range(20_000)))
    chunks = [data[at:at + 4096] for at in range(0, len(data), 4096)]
    decoders: Tuple[Callable[[List[bytes]], Iterator[Any]], ...] = (ours, httpx_sse, sseclient_py)
    taken: Dict[str, List[float]] = {decoder.__name__: [] for decoder in decoders}
    for _ in range(9):
        for decoder in decoders:
            started = time.process_time()
            count = sum(1 for _ in decoder(chunks))
            taken[decoder.__name__].append((time.process_time() - started) / count * 1e6)
            assert count == 20_000, (decoder, count)
    best = {name: min(times) for name, times in taken.items()}
    note = ", ".join(f"{name} {us:.2f} us" for name, us in best.items())
    return figure("SSE decoder, to the faster of the others", best["ours"] / min(best["httpx_sse"], best["sseclient_py"]),
                  0.75, "x", False, note)


def serve(count: int, pause_s: float) -> None:
    """A service whose run streams ``count`` events once, at once or with a pause after each, and has then ended."""
    data = [event(number) for number in range(count)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                asked = connection.recv(65536)
                if b"/events?" not in asked or not data:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                                       % (len(OVER), OVER))
                    continue
                connection.sendall(HEAD)
                for one in [b"".join(data)] if not pause_s else data:
                    time.sleep(pause_s)
                    if pause_s:
                        print(time.time(), flush=True)
                    connection.sendall(one)
                data = []


def follow(count: int, pause_s: float) -> Tuple[List[float], List[float], float]:
    """When the server sent each event, when its line was there, and the program's CPU seconds in all."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, CI, str(count), str(pause_s)], stdout=subprocess.PIPE)
    assert server.stdout
    port = int(server.stdout.readline())
    environ = {**os.environ, "MOGPLEX_URL": f"http://127.0.0.1:{port}", "MOGPLEX_DEV": "1", "MOGPLEX_API_KEY": "mog_x"}
    command = [sys.executable, os.path.join(ROOT, "mogplex.py"), "runs", "events", "r", "--follow", "--json"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ)
    assert program.stdout
    there: List[float] = []
    while len(there) < count:
        data = os.read(program.stdout.fileno(), 1 << 20)
        assert data, "the program ended early"
        there += [time.time()] * data.count(b"\n")
    sent = [float(server.stdout.readline()) for _ in range(count)] if pause_s else []
    program.stdout.close()
    _, _, usage = os.wait4(program.pid, 0)
    program.returncode = 0
    server.terminate()
    server.wait()
    server.stdout.close()
    return sent, there, usage.ru_utime + usage.ru_stime


def measure_throughput() -> int:
    """Of nine runs the best, from the first line to the last: whatever else the machine does only slows."""
    rates, cpu_us = [], []
    idle_s = follow(1, 0.0)[2]
    for _ in range(9):
        _, there, cpu_s = follow(EVENTS, 0.0)
        rates.append(EVENTS / (there[-1] - there[0]))
        cpu_us.append((cpu_s - idle_s) / EVENTS * 1e6)
    return figure("events from a socket to --json on a pipe", max(rates) / 1000, 100, "k a second", True,
                  f"{min(cpu_us):.1f} us of CPU each, median {statistics.median(rates) / 1000:.0f}")


def measure_latency() -> int:
    sent, there, _ = follow(200, 0.01)
    late_ms = [(seen - at) * 1000 for at, seen in zip(sent, there)]
    return figure("an event on stdout after its last byte, 95 of 100", sorted(late_ms)[190], 10, "ms", False,
                  f"median {statistics.median(late_ms):.2f} ms")


class Clock:
    """Time that passes only in ``sleep``, and then at once."""

    def __init__(self) -> None:
        self.now = 1.8e9

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def limit_requests(server: Any) -> List[float]:
    """Give the demo service the real one's limit; when it refused a request."""
    import mogplex
    service = server.service
    admit = service.sign_in.admit
    admitted: List[float] = []
    refused: List[float] = []

    def admit_within(token: str, scope: str) -> None:
        now = service.clock()
        if sum(at > now - 60 for at in admitted[-60:]) >= 60:
            refused.append(now)
            raise mogplex.DemoRefusal(429, "RATE_LIMITED", "Rate limit exceeded", "60")
        admitted.append(now)
        admit(token, scope)

    service.sign_in.admit = admit_within
    return refused


def follow_twenty(task: str, spread_s: float, cancels: bool) -> Tuple[List[float], List[float]]:
    """How late each verdict on twenty runs came that ended within ``spread_s``; and when a request was refused."""
    import mogplex
    clock = Clock()
    dice = random.Random(1)
    ends: Dict[str, float] = {}
    late_s = []
    with mogplex.DemoServer(clock=clock) as server, mogplex.Client(server.token, server.url) as client:
        for number in range(20):
            body = {"repoId": mogplex.DEMO_WEB, "prompt": task}
            run_id = client.start_run(body, str(number))["runId"]
            run = server.service.runs[run_id]
            late = mogplex.demo_later(run.steps[2:], 200 + dice.random() * spread_s)
            run.steps = run.steps[:2] + late
            ends[run_id] = max(step.at_s for step in run.steps if step.status)
        refused = limit_requests(server)
        for run_id, item in mogplex.tail_many(
                client, ends, clock=clock, sleep=clock.sleep, random=dice.random, cancels=cancels):
            if isinstance(item, mogplex.Verdict):
                late_s.append(clock.now - ends[run_id])
    assert len(late_s) == 20
    return late_s, refused


def measure_twenty_runs() -> int:
    """The worst of runs that end together or apart, well or badly, with and without room for cancellations."""
    late_s: List[float] = []
    in_a_minute = 0
    for task in "x", "fail", "crash":
        for spread_s in 0.0, 300.0:
            for cancels in False, True:
                late, refused = follow_twenty(task, spread_s, cancels)
                late_s += late
                in_a_minute = max([in_a_minute, *(sum(at <= other < at + 60 for other in refused) for at in refused)])
    missed = figure("20 runs on one token, the latest verdict", max(late_s), 60, "s", False,
                    f"median {statistics.median(late_s):.0f} s")
    return missed + figure("20 runs on one token, 429s in a minute", in_a_minute, 1, "", False)


def main() -> int:
    return min(1, measure_decoders() + measure_throughput() + measure_latency() + measure_twenty_runs())


if __name__ == "__main__":
    sys.exit(main())
