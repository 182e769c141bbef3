#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.25.1", "tabulate>=0.8", "blessed>=1.20"]
# ///
"""mogplex: start, follow, inspect and stop cloud coding-agent runs on Mogplex.

``mogplex repos|run|runs|sandboxes|api|login|logout|help|completion`` are headless commands for
CI, scripts and dashboards. ``mogplex`` alone, on a terminal, opens a full-screen cockpit.

Each section uses only those above it:

  1 Errors     exit codes, and which error ends in which of them
  2 Values     pure functions: statuses, times, hostile text, secrets, widths, back-off
  3 Home       the files in the home directory: sign-in, remembered runs; credentials
  4 Client     one method per route of the hosted API
  5 Tail       server-sent events, polling, de-duplication, the verdict on a run
  -            everything above this line can be copied out and used as a library
  6 Output     columns, tables, NDJSON, summaries: functions that return strings
  7 Cockpit    state, update, view, and the shell that owns the terminal
  8 Demo       an embedded stand-in for the service
  9 Commands   the commands, the tables of commands and options, and main()

Environment: MOGPLEX_API_KEY (token), MOGPLEX_URL (service), MOGPLEX_HOME (default
~/.mogplex), MOGPLEX_REPO, MOGPLEX_RUN_ID, MOGPLEX_ATTACH_RUN_ID, MOGPLEX_NO_HISTORY,
MOGPLEX_DEBUG, MOGPLEX_DEV with NODE_ENV (http:// to localhost), NO_COLOR, FORCE_COLOR.

Exit codes: 0 success, 1 failure, 2 usage, 64 unauthorized, 65 forbidden,
69 unavailable, 75 rate limited, 129 SIGHUP, 130 SIGINT, 141 closed pipe, 143 SIGTERM.

For embedders: everything in ``__all__`` is stable within a major version. It prints
nothing, never exits, and does not read ``os.environ``; every failure is a MogplexError.
"""

from __future__ import annotations  # mogplex needs Python 3.8 or newer

import sys

if sys.version_info < (3, 8):  # above all that an older one lacks
    too_old = (
        "mogplex needs Python 3.8 or newer; this is Python %d.%d" % sys.version_info[:2]
    )
    if __name__ == "__main__":
        raise SystemExit(too_old)
    raise ImportError(too_old)

import _thread
import argparse
import atexit
import base64
import collections
import contextlib
import enum
import errno
import functools
import gc
import hashlib
import hmac
import json
import math
import operator
import os
import queue
import re
import select
import signal
import socket
import stat
import threading
import time
import urllib.parse
# fmt: off
from typing import (
    TYPE_CHECKING, Any, BinaryIO, Callable, ContextManager, Deque, Dict, Generator, Iterable,
    Iterator, List, Mapping, Match, NamedTuple, NoReturn, Optional, Pattern, Sequence, Set,
    Tuple, Type, TypedDict, Union, cast,
)
# fmt: on

__version__ = "1.1.0"
# fmt: off
__all__ = [
    "Client", "Credential", "Event", "Exit", "ForbiddenError", "InvalidResponseError",
    "MogplexError", "Progress", "RateLimitedError", "Repo", "Run", "SSEDecoder", "Sandbox",
    "ServerSentEvent", "TailTimeout", "UnauthorizedError", "UnavailableError", "UsageError",
    "Verdict", "sanitize", "tail", "tail_many",
]
# fmt: on

Json = Dict[str, Any]  # an object of the service, as it came
# An object that is only read; a TypedDict (Run, Repo, ...) is one too.
Record = Mapping[str, Any]

DEFAULT_URL = "https://www.mogplex.com"
API_PATH = "/api/v1/mogplex"
# Agent programs, and their titles.
HARNESSES = {"codex": "Codex", "claude-code": "Claude Code"}
# fmt: off
GROUPS = (  # the first words of commands
    "repos", "run", "runs", "sandboxes", "api", "login", "logout", "help", "completion",
)
# fmt: on
MAX_LIMIT = 200  # the server lists no more of anything, and clamps silently
MAX_PROMPT_UNITS = 100_000  # of UTF-16, in a task


# ---------------------------------------------------------------- 1. Errors


@enum.unique
class Exit(enum.IntEnum):
    """Exit codes of the command line (sysexits.h where it has a word for it)."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNAUTHORIZED = 64
    FORBIDDEN = 65
    UNAVAILABLE = 69
    TEMPORARY = 75
    HANGUP = 129
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class MogplexError(Exception):
    """Base of every error raised here on purpose.

    ``code`` is the service's or our own word for it, ``status`` the HTTP status (0: no
    answer), ``hint`` one line of what to do, ``retry_after_s`` how long the service asks to
    wait, ``delivered`` whether the request may have reached the service, and ``transient``
    whether the same request may succeed later.
    """

    exit = Exit.FAILURE

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        status: int = 0,
        hint: str = "",
        retry_after_s: Optional[float] = None,
        delivered: bool = False,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.delivered = delivered
        self.transient = transient

    def __str__(self) -> str:
        text = self.message
        if self.code:
            text = f"{self.code}: {text}"
        if self.status:
            text = f"{text} (HTTP {self.status})"
        return text


class UsageError(MogplexError):
    """The arguments, the environment or a file given to us make no sense (exit 2)."""

    exit = Exit.USAGE


class UnauthorizedError(MogplexError):
    """No credential, or one that the service refuses: 401, or a redirect to /login (exit 64)."""

    exit = Exit.UNAUTHORIZED


class ForbiddenError(MogplexError):
    """The token lacks the scope: 403 (exit 65)."""

    exit = Exit.FORBIDDEN


class UnavailableError(MogplexError):
    """No answer, or a status of ``UNAVAILABLE_STATUSES`` (exit 69)."""

    exit = Exit.UNAVAILABLE


class RateLimitedError(MogplexError):
    """429 (exit 75); ``retry_after_s`` is the wait that the service asks for."""

    exit = Exit.TEMPORARY


class InvalidResponseError(MogplexError):
    """An answer that is not the service's: HTML, a cut body, JSON without the envelope (exit 1)."""


class UnwritableError(MogplexError):
    """A file of ours that cannot be written; the message names it, and says why (exit 1)."""


class TailTimeout(MogplexError):
    """The time given to a tail is over and the run is not (exit 1)."""


# The service says 502 to 504, and 501 for what it lacks; the CDN before it adds the others.
UNAVAILABLE_STATUSES = frozenset(
    [408, 425, 501, 502, 503, 504, 520, 521, 522, 523, 524, 527, 529, 530]
)
# The same request may succeed later.
TRANSIENT_STATUSES = (UNAVAILABLE_STATUSES - {501}) | {429, 500}


def error_class(status: int) -> Type[MogplexError]:
    """The error for an HTTP status; nothing else decides the exit code."""
    if status == 401:
        return UnauthorizedError
    if status == 403:
        return ForbiddenError
    if status == 429:
        return RateLimitedError
    if status in UNAVAILABLE_STATUSES:
        return UnavailableError
    return MogplexError


# ---------------------------------------------------------------- 2. Values


class Status(NamedTuple):
    """How the status of a run or a sandbox is shown, and what it means."""

    glyph: str
    style: str  # ok, bad, warn, run or dim: lists and the cockpit colour them
    terminal: bool = False  # of a run: it ends the run


RUN_STATUSES = {
    "pending": Status("\u25cc", "warn"),
    "streaming": Status("\u25b6", "run"),
    "success": Status("\u2713", "ok", terminal=True),
    "failed": Status("\u2717", "bad", terminal=True),
    "cancelled": Status("\u25a0", "warn", terminal=True),
}
SANDBOX_STATUSES = {
    "creating": Status("\u25cc", "warn"),
    "installing": Status("\u25cc", "warn"),
    "running": Status("\u25cf", "ok"),
    "pausing": Status("\u25cc", "warn"),
    "paused": Status("\u25cb", "dim"),
    "stopped": Status("\u25cb", "dim"),
    "error": Status("\u25cb", "bad"),
}
TERMINAL_STATUSES = tuple(
    name for name, status in RUN_STATUSES.items() if status.terminal
)
UNKNOWN_STATUS = Status("\u25cb", "dim")


def status_named(name: str) -> Status:
    """What is known of a status of a run or a sandbox, by the word that the service has for it."""
    return RUN_STATUSES.get(name) or SANDBOX_STATUSES.get(name) or UNKNOWN_STATUS


# The patterns of this module meet foreign text: each takes time in proportion to its length.
# ECMA-48 sequences. A string (OSC, DCS, ...) counts only when it is terminated: an unterminated
# one would swallow the rest of the text. No class crosses an ESC or a C1, so that no part of a
# text is searched from two places.
ESCAPE_SEQUENCES = re.compile(
    r"""
    (?: \x1b [\]PX^_] | [\x90\x98\x9d\x9e\x9f] )    # a string begins,
        [^\x07\x1b\x80-\x9f]*
        (?: \x07 | \x1b \\ | \x9c )                 # and is terminated
    | (?: \x1b \[ | \x9b ) [0-?]* [\ -/]* [@-~]?    # a control sequence
    | \x1b [\ -/]* [0-~]?                           # any other escape
    """,
    re.VERBOSE,
)
NEWLINES = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
INVISIBLES = re.compile(
    "["
    "\x00-\x08\x0e-\x1f\x7f-\x9f"  # C0 without white space, DEL, C1
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"  # soft hyphen, joiners, marks, fillers
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e"  # Mongolian selectors, zero width, bidi
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"  # invisible operators, fillers, annotations
    "\ufe00-\ufe0f\U000e0000-\U000e0fff"  # variation selectors and tag characters
    "]"
)
# GitHub's ``::error::`` and its like.
CI_COMMAND_AT_START = re.compile(r"^([^\S\n]*):(?=:)", re.MULTILINE)
# GitHub's and Azure's.
CI_COMMAND_ANYWHERE = re.compile(r"##(?=\[|vso\[)", re.IGNORECASE)


def sanitize(text: object, newline: str = " \u23ce ") -> str:
    """One harmless line of ``text``: no escape sequence, no control, no CI workflow command.

    Newlines become ``newline``. Taken out: ECMA-48 sequences, C0, C1, DEL, bidi and
    zero-width controls. ``::`` at a line's start and ``##[`` and ``##vso[`` anywhere,
    which CI runners obey, get a space inside.
    """
    if text is None:
        return ""
    line = str(text)
    if not line.isascii() or not line.isprintable():
        line = ESCAPE_SEQUENCES.sub("", line)
        line = NEWLINES.sub("\n", line)
        line = INVISIBLES.sub("", line).replace("\t", " ")
    if "::" in line:
        line = CI_COMMAND_AT_START.sub(r"\1: ", line)
    if "##" in line:
        line = CI_COMMAND_ANYWHERE.sub("# #", line)
    if "\n" in line:
        line = line.strip("\n").replace("\n", newline)
    return line


SHORTEST_SECRET = 8  # shorter ones would blot out plain words
SHORTEST_ENCODED = 16  # encoded or split, a shorter one could be any other text
# No white space and no backslash: a secret with one could not be told from its gaps in linear time.
SPELLABLE = re.compile(r"[!-\[\]-~]+\Z")
# What a secret can be broken with: white space, as JSON escapes it too, and our sign for a newline.
SECRET_GAP = r"(?:[\s\u23ce]|\\[nrt])*"


RARE_CHARACTERS = "QXJKVYWUHGqzBFNM"  # in what the service says, the rarest first


def _commonness(char: str) -> int:
    place = RARE_CHARACTERS.find(char)
    if place < 0:
        return len(RARE_CHARACTERS)
    return place


@functools.lru_cache(maxsize=128)
def _spelled(text: str) -> Pattern[str]:
    """``text``, split or not, with any of its odd characters percent-encoded."""
    parts = []
    for char in text:
        part = re.escape(char)
        if not char.isalnum() and char not in "-._~":
            part = f"(?:{part}|%(?i:{ord(char):02x}))"
        parts.append(part)
    return re.compile(SECRET_GAP.join(parts))


class SecretForm(NamedTuple):
    """One spelling of a secret: the whole, and two parts of it that are cheaper to look for."""

    rarest: str  # of its characters
    middle: str  # the four that begin with that one
    whole: str

    def hidden_in(self, text: str) -> str:
        """``text`` without it. A pattern is compiled when it is first needed, which few are."""
        if not _spelled(self.middle).search(text):
            return text
        return _spelled(self.whole).sub("***", text)


def _secret_form(spelling: str) -> SecretForm:
    letters = filter(str.isalnum, spelling[:-3])
    rarest = min(letters, key=_commonness, default=spelling[0])
    start = spelling.index(rarest)
    return SecretForm(rarest, spelling[start : start + 4], spelling)


# Bytes before a secret, and how many characters depend on them.
BASE64_ALIGNMENTS = {0: 0, 1: 2, 2: 3}
TO_URL_SAFE = str.maketrans("+/", "-_")


def _base64_cores(secret: str) -> Set[str]:
    """What base64 makes of ``secret`` inside a longer text: three alignments, two alphabets."""
    cores = set()
    for before, mixed in BASE64_ALIGNMENTS.items():
        data = bytes(before) + secret.encode("utf-8", "replace")
        encoded = base64.b64encode(data).decode("ascii")
        whole = len(data) * 8 // 6  # the character after these depends on what follows
        core = encoded[mixed:whole]
        cores.add(core)
        cores.add(core.translate(TO_URL_SAFE))
    return cores


@functools.lru_cache(maxsize=8)
def _secret_forms(secret: str) -> List[SecretForm]:
    """What is hidden besides the plain secret: percent-encoded, base64, and any of these split."""
    if len(secret) < SHORTEST_ENCODED or not SPELLABLE.match(secret):
        return []
    spellings = [secret, *sorted(_base64_cores(secret))]
    return [_secret_form(spelling) for spelling in spellings]


def redact(text: str, *secrets: str) -> str:
    """``text`` with ``***`` for each of ``secrets``, in time linear in ``text``.

    Found plain, URL-encoded, inside base64, and with line breaks or spaces between the
    characters. A secret of fewer than 8 characters is left: it would blot out plain words.
    """
    for secret in secrets:
        if len(secret) < SHORTEST_SECRET:
            continue
        text = text.replace(secret, "***")
        for form in _secret_forms(secret):
            if form.rarest in text:  # here, because a call costs more
                text = form.hidden_in(text)
    return text


def text_of(record: object, *keys: str) -> str:
    """The string or number at ``record[key][key]...``; "" where there is neither."""
    for key in keys:
        if not isinstance(record, dict):
            return ""
        record = record.get(key)
    if isinstance(record, bool) or not isinstance(record, (str, int, float)):
        return ""
    return str(record)


def dict_of(record: object, key: str) -> Json:
    """The object at ``record[key]``, or an empty one."""
    if isinstance(record, dict):
        value = record.get(key)
        if isinstance(value, dict):
            return value
    return {}


def dicts_of(record: object, key: str) -> List[Json]:
    """The objects in the list at ``record[key]``; anything else in it is passed over."""
    if not isinstance(record, dict):
        return []
    value = record.get(key)
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)]


MAX_DIGITS = 600  # of a whole number; Python itself refuses more than 4300


def _whole_number(digits: str) -> Union[int, str]:
    """A JSON integer; one that Python may refuse to show stays text."""
    if len(digits) > MAX_DIGITS:
        return digits
    return int(digits)


def _real_number(digits: str) -> Union[float, str]:
    """A JSON number; one too large for a float stays text."""
    number = float(digits)
    if math.isinf(number):
        return digits
    return number


def _refuse_constant(name: str) -> Any:
    """NaN and Infinity, which Python's json takes and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


_DECODER: Any = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_whole_number, parse_float=_real_number
)
_COMPACT_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def parse_json(text: str) -> Any:
    """The JSON in ``text``; ValueError for anything else, however deep or long."""
    try:
        # Half the time of decode() for an object with nothing around it.
        if text[:1] == "{":
            value, end = _DECODER.scan_once(text, 0)
            if end == len(text):
                return value
        return _DECODER.decode(text)
    except StopIteration:
        raise ValueError("JSON cut short") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def to_json(value: object, **style: Any) -> str:
    """``value`` as JSON text, in a ``style`` of json.dumps."""
    return json.dumps(value, **style)


def compact_json(value: object) -> str:
    """``value`` as one line of ASCII JSON without spaces; ValueError when nested too deeply."""
    try:
        return _COMPACT_ENCODER.encode(value)
    except RecursionError:
        raise ValueError("nested too deeply to be written as JSON") from None


UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


def is_uuid(text: str) -> bool:
    """Whether ``text`` is spelled as a UUID, which all ids of the service are today."""
    return UUID.match(text) is not None


def is_loopback(host: Optional[str]) -> bool:
    """Whether a URL's host is this machine, as the base-URL rules count it."""
    return host in ("localhost", "127.0.0.1", "::1")


BASE_URL = re.compile(
    r"""
    (https?)://
    ( [\w.-]+ | \[ [0-9a-f:.]+ \] )         # a host, or an IPv6 address
    (?: : ([1-9]\d{0,4}) )?                 # a port
    ( / [\w./~%!$&'()*+,;=:@-]* )? \Z       # a path; no query, no fragment
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)


def _base_url_problem(scheme: str, host: str, port: str, allow_http: bool) -> str:
    """Why a URL of these parts may not be the service's, "" for nothing."""
    if port and int(port) > 65535:
        return f"there is no port {port}"
    if scheme == "https":
        return ""
    if not is_loopback(host.strip("[]")):
        return "http:// is only for localhost, 127.0.0.1 and [::1]"
    if not allow_http:
        return "http:// needs MOGPLEX_DEV=1 and NODE_ENV other than production"
    return ""


def _without_user_info(url: str) -> str:
    """A URL, however malformed, without a name or password before its host."""
    scheme, slashes, rest = url.partition("//")
    user_info, at, address = rest.rpartition("@")
    if not at:
        return url
    return f"{scheme}{slashes}***@{address}"


def parse_base_url(
    text: str, allow_http: bool = False, source: str = "MOGPLEX_URL"
) -> str:
    """``text`` as the service's base URL, without a slash at its end.

    https only; http to this machine where ``allow_http``. A path prefix is kept. UsageError for
    one that may not be used, which names ``source``, where it came from.
    """
    problem = "give an https:// URL without user info, query and fragment"
    match = BASE_URL.match(text.strip())
    if match:
        scheme, host, port, path = match.groups("")
        problem = _base_url_problem(scheme.lower(), host.lower(), port, allow_http)
    if problem or not match:
        shown = _without_user_info(sanitize(text))
        raise UsageError(f"invalid {source} '{shown}': {problem}")
    address = f"{scheme}://{host}".lower()
    if port:
        address = f"{address}:{port}"
    return address + path.rstrip("/")


def utf16_units(text: str) -> int:
    """The length of ``text`` as JavaScript counts it: what the service's limits are in."""
    return len(text) + sum(1 for char in text if char > "\uffff")


TIME = re.compile(
    r"""
    (\d{4}-\d\d-\d\d T \d\d:\d\d:\d\d)      # to the second
    (?: \. (\d{1,6}) )?                     # a fraction
    ( Z | [+-]\d\d:\d\d ) \Z
    """,
    re.VERBOSE | re.ASCII,
)


def _moment(text: object) -> Any:
    """The datetime, in UTC, of an ISO 8601 time as the service spells it; None when it is none.

    Spelled anew for fromisoformat: before Python 3.11 that refuses ``Z`` and five-digit fractions.
    """
    if not isinstance(text, str):
        return None
    match = TIME.match(text)
    if not match:
        return None
    import datetime

    second, fraction, zone = match.groups("")
    if zone == "Z":
        zone = "+00:00"
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.datetime.fromisoformat(f"{second}.{fraction:0<6}{zone}")
        return moment.astimezone(datetime.timezone.utc)
    return None


def parse_time(text: object) -> Optional[float]:
    """Seconds since the epoch of a time of the service; None when it is none."""
    moment = _moment(text)
    if moment is None:
        return None
    return float(moment.timestamp())


def format_time(value: object) -> str:
    """A time of the service in UTC with milliseconds and ``Z``; any other text, sanitized."""
    moment = _moment(value)
    if moment is not None:
        return str(moment.isoformat(timespec="milliseconds")[:-6]) + "Z"
    if isinstance(value, str):
        return sanitize(value)
    return ""


def utc_time(moment: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, with microseconds and ``Z``."""
    second, microseconds = divmod(round(moment * 1_000_000), 1_000_000)
    to_the_second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{to_the_second}.{microseconds:06d}Z"


DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)\Z", re.ASCII)
SECONDS_IN = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Seconds in ``600``, ``90s``, ``30m`` or ``2h``; UsageError for anything else."""
    match = DURATION.match(text.strip())
    seconds = 0.0
    if match:
        number, unit = match.groups()
        seconds = float(number) * SECONDS_IN[unit]
    if seconds <= 0:
        raise UsageError(
            f"invalid duration '{text}': "
            "give seconds, or a number with s, m or h, such as 90s or 30m"
        )
    return seconds


def format_duration(seconds: float) -> str:
    """``8s``, ``2m 05s``, ``3h 10m`` or ``4d 2h``."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    if minute:
        return f"{minute}m {second:02d}s"
    return f"{second}s"


def format_age(seconds: float) -> str:
    """``8s``, ``2m``, ``3h`` or ``4d``: the largest unit alone."""
    return format_duration(seconds).split(" ")[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """The word of ``known`` with the same letters as ``word``, else a similar one; "" for none."""
    import difflib

    words = list(known)
    for one in words:
        if sorted(one) == sorted(word):
            return one
    for one in difflib.get_close_matches(word, words, 1, 0.7):
        return one
    return ""


def random_unit() -> float:
    """A number in [0, 1); the module behind it is slow to load and seldom needed."""
    import random

    return random.random()


def backoff_s(
    failures: int, random: float, base_s: float = 0.5, cap_s: float = 15.0
) -> float:
    """The wait after so many failures in a row (from 1): doubling from ``base_s``, with jitter."""
    doublings = min(failures - 1, 10)
    return min(cap_s, base_s * 2.0**doublings) * (1 + random / 2)


SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?\Z", re.ASCII)


def _http_date(text: str) -> Optional[float]:
    """Seconds since the epoch of a date in an HTTP header; None when it is none."""
    import email.utils

    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def parse_retry_after(value: Optional[str], date: Optional[str]) -> Optional[float]:
    """Seconds asked for by a ``Retry-After`` header, None when it is missing or invalid.

    An HTTP-date is measured against the same answer's ``Date``: the two clocks can differ.
    """
    text = (value or "").strip()
    if SECONDS.match(text):
        return float(text)
    then = _http_date(text)
    now = _http_date(date) if date else time.time()
    if then is None or now is None:
        return None
    return max(0.0, then - now)


JOINER = "\u200d"  # zero-width joiner: makes one emoji of two
EMOJI_STYLE = "\ufe0f"  # variation selector 16: the sign before it is drawn as an emoji
EMOJI_WITH_STYLE = "#*0123456789\xa9\xae"  # those of them below U+2000
FIRST_SYMBOL = "\u2000"
SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
FLAG_LETTERS = ("\U0001f1e6", "\U0001f1ff")
# Only where one of these is, a text can be narrower or wider than its characters.
SEQUENCE_PARTS = re.compile("[\u200d\ufe0f\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff]")


def _estimated_width(char: str) -> int:
    """Columns of one character by Python's own tables, where wcwidth is missing."""
    import unicodedata

    if unicodedata.category(char) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    if "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff":
        return 0  # Hangul jamo that complete the syllable before them
    if unicodedata.east_asian_width(char) in "WF":
        return 2
    return 1


@functools.lru_cache(maxsize=1)
def _width_table() -> Callable[[str], int]:
    """Columns of one character: wcwidth's table, which blessed brings along, where it is there."""
    try:
        import wcwidth
    except ImportError:
        return _estimated_width
    table: Callable[[str], int] = wcwidth.wcwidth
    return table


@functools.lru_cache(maxsize=4096)
def _char_width(char: str) -> int:
    return max(0, _width_table()(char))  # wcwidth has -1 for a control


def _is_within(char: str, ends: Tuple[str, str]) -> bool:
    return ends[0] <= char <= ends[1]


def _is_joined(before: str, char: str) -> bool:
    """Whether ``char`` is drawn in the columns of the character before it."""
    if char < "\u0300":
        return False
    if _char_width(char) == 0:
        return True
    if before == JOINER:
        return char >= FIRST_SYMBOL
    return _is_within(char, SKIN_TONES) and before >= FIRST_SYMBOL


def _completes_flag(cluster: str, char: str) -> bool:
    """Whether a cluster is the first of the two letters of a flag, and this the second."""
    if len(cluster) > 1:
        return False
    return _is_within(cluster, FLAG_LETTERS) and _is_within(char, FLAG_LETTERS)


def clusters(text: str) -> Iterator[str]:
    """The parts of ``text`` that a terminal never divides: a character, and what joins it."""
    cluster = ""
    for char in text:
        if not cluster:
            cluster = char
        elif _is_joined(cluster[-1], char) or _completes_flag(cluster, char):
            cluster += char
        else:
            yield cluster
            cluster = char
    if cluster:
        yield cluster


def _cluster_width(cluster: str) -> int:
    first = cluster[0]
    width = _char_width(first)
    if len(cluster) == 1:
        return width
    is_emoji = first >= FIRST_SYMBOL or first in EMOJI_WITH_STYLE
    if cluster[1] == EMOJI_STYLE and is_emoji:
        return 2
    if _is_within(cluster[1], FLAG_LETTERS):
        return 2
    return width


def text_width(text: str) -> int:
    """Terminal columns of ``text``: two for East Asian wide and emoji, none for combining marks."""
    if text.isascii():
        return len(text)
    if not SEQUENCE_PARTS.search(text):
        return sum(map(_char_width, text))
    return sum(map(_cluster_width, clusters(text)))


def fit(text: str, width: int, ellipsis: str = "\u2026") -> str:
    """``text`` in at most ``width`` columns, with an ``ellipsis`` where something was left out."""
    if text_width(text) <= width:
        return text
    room = width - text_width(ellipsis)
    if room < 0:
        return ""
    kept = []
    for cluster in clusters(text):
        room -= _cluster_width(cluster)
        if room < 0:
            break
        kept.append(cluster)
    return "".join(kept) + ellipsis


# ---------------------------------------------------------------- 3. Home and auth

Warn = Callable[[str], None]
Store = Callable[[Json], None]  # keeps a new sign-in
Records = List[Json]  # of runs.jsonl, oldest first
# POSTs a form to a URL of the service, answers (HTTP status, JSON object or {}). RateLimitedError
# for a 429, UnavailableError for no answer.
PostForm = Callable[[str, Dict[str, str]], Tuple[int, Json]]


def unheard(line: str) -> None:
    """A Warn that drops the line."""


# -- Files: read with bounds, swapped in whole, locked for a bounded time

MAX_FILE = 8 << 20  # bytes of a file that is read
RENEWAL_ROOM = 64 << 10  # bytes that a new sign-in may need
LOCK_NOTICE_S = 1.0  # a wait for a lock is mentioned after this,
LOCK_WAIT_S = 5.0  # and given up after this
LOCK_POLL_S = 0.05
SWAP_WAIT_S = (
    2.0  # Windows swaps no file that another process has open, as for a moment
)
LONGEST_PATH = 200  # characters of a directory of ours; with more, see long_path
# Flags of os.open; each system lacks some of them.
NOT_WAITING = getattr(os, "O_NONBLOCK", 0)
LOCKING = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
# How a lock is refused that another has: by POSIX, by Windows, and by Wine, which gives no reason.
BUSY = (errno.EAGAIN, errno.EACCES, 0)
# What forbids to rename another file to the place of one, but not to write into it.
UNSWAPPABLE = [errno.EBUSY]  # a file that is mounted by itself, as containers do
if os.name == "nt":
    UNSWAPPABLE.append(errno.EACCES)  # one that another process has open


def long_path(path: str) -> str:
    r"""An absolute path as Windows takes it beyond 260 characters: ``\\?\C:\...``."""
    if os.name != "nt" or len(path) <= LONGEST_PATH or path.startswith("\\\\?\\"):
        return path
    if path.startswith("\\\\"):
        return "\\\\?\\UNC" + path[1:]
    return "\\\\?\\" + path


def home_directory(environ: Mapping[str, str]) -> str:
    """The absolute path of ``$MOGPLEX_HOME`` or ``~/.mogplex``; creates nothing."""
    user = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(user):
        user = os.sep  # still "~": nothing names this user's home
    home = environ.get("MOGPLEX_HOME") or os.path.join(user, ".mogplex")
    return long_path(os.path.abspath(os.path.expanduser(home)))


def link_target(path: str) -> str:
    """Where a link leads in the end; a path that is none stays as it is, however long."""
    if os.path.islink(path):
        return os.path.realpath(path)
    return path


def make_private_directory(path: str) -> None:
    """Make ``path`` and its missing parents, each with mode 0700 whatever the umask is."""
    missing: List[str] = []
    while not os.path.isdir(path):
        if path in missing:
            break  # a root that does not exist, such as a drive of Windows
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue  # another process was faster, or a file is there, which the next step says
        os.chmod(path, 0o700)


def open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a FIFO."""
    return os.open(path, flags | NOT_WAITING, 0o666)


def read_regular_file(path: str) -> Tuple[bytes, int]:
    """The content of a file, and its mode bits.

    OSError for anything but a regular file of at most 8 MiB. Opened without waiting: a fifo that
    nobody writes to would hold us for ever.
    """
    if os.path.isdir(path):  # Windows calls it "Permission denied"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with open(path, "rb", opener=open_at_once) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise OSError(errno.EFBIG, f"Larger than {MAX_FILE >> 20} MiB")
    return data, stat.S_IMODE(mode)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _set_content(stream: BinaryIO, data: bytes) -> None:
    """Make ``data`` all that an open file holds, on the disk."""
    stream.seek(0)
    stream.write(data)
    stream.truncate()
    stream.flush()
    os.fsync(stream.fileno())


def _swap(new: str, path: str) -> None:
    """Rename a file to another's place, on Windows as soon as no other process has that open."""
    until = time.monotonic() + SWAP_WAIT_S
    while True:
        try:
            os.replace(new, path)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() >= until:
                raise
        # Take "read-only" off it: elsewhere it is no bar.
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IREAD | stat.S_IWRITE)
        time.sleep(LOCK_POLL_S)


@contextlib.contextmanager
def replacing(path: str, room: int = 0) -> Iterator[Callable[[bytes], None]]:
    """A function that swaps in the next content of a file: a kill leaves the old or the new one.

    A link is followed. For use under the file's lock, so that the temporary file can have a fixed
    name: what a killed process left there, tokens in it, is deleted by the next one. ``room``
    bytes are reserved on the disk at once, so that a full disk fails before the content is known.
    """
    path = link_target(path)
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    stream = open(temporary, "xb", opener=_open_private)

    def commit(data: bytes) -> None:
        _set_content(stream, data)
        stream.close()
        try:
            _swap(temporary, path)
        except OSError as error:
            if error.errno not in UNSWAPPABLE:
                raise
            with open(path, "r+b") as present:
                _set_content(present, data)

    try:
        _set_content(stream, b" " * room)
        yield commit
    finally:
        # Closing writes what could not be written before.
        with contextlib.suppress(OSError):
            stream.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def replace_file(path: str, data: bytes) -> None:
    """Make ``data`` the content of a file, under its lock; after an OSError it is as before."""
    with replacing(path) as commit:
        commit(data)


def _try_lock(descriptor: int) -> bool:
    """Whether the lock on an open file is ours now; OSError where there is no locking."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in BUSY:
            raise
        return False
    return True


def _release_lock(descriptor: int) -> None:
    """Let go of the lock, if it is ours, also where a fork has copied the descriptor meanwhile."""
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _wait_for_lock(descriptor: int, path: str, warn: Warn) -> None:
    """Take the lock; UnavailableError when somebody else keeps it for 5 s."""
    started = time.monotonic()
    told = False
    while not _try_lock(descriptor):
        waited_s = time.monotonic() - started
        if waited_s >= LOCK_WAIT_S:
            raise UnavailableError(  # not transient: another try would wait as long again
                f"another process holds {path}",
                hint="wait for it, or find it with `lsof` or `fuser`",
            )
        if waited_s >= LOCK_NOTICE_S and not told:
            warn(f"waiting for another process, which holds {path}")
            told = True
        time.sleep(LOCK_POLL_S)


@contextlib.contextmanager
def naming_file(verb: str, path: str) -> Iterator[None]:
    """Make of an OSError a MogplexError that says what could not be done with ``path``, and why."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(
            f"cannot {verb} {path}: {error.strerror or error}"
        ) from None


# -- Records that are kept

TOKEN_KEYS = ("token", "apiKey", "api_key", "accessToken", "access_token")
SIGN_IN_KEYS = ("mogplex", "refresh_token", "expires_at", "base_url", *TOKEN_KEYS)
EPOCH_SECONDS = re.compile(r"\d{1,11}(\.\d+)?\Z", re.ASCII)
TOKEN = re.compile(r"[!-~]+\Z")
HISTORY_SIZE = 500  # records in runs.jsonl
IN_DOUBT_S = 86400.0  # how long an earlier start of the same request matters


def check_token(token: str, place: str) -> str:
    """``token`` if a header can carry it; UnauthorizedError names ``place``, never the token."""
    if not TOKEN.match(token):
        raise UnauthorizedError(
            f"{place}: the token contains spaces, control or non-ASCII characters"
        )
    return token


class SignIn(NamedTuple):
    """What is known of one sign-in."""

    token: str
    refresh_token: str = ""
    expires_at: Optional[float] = None  # seconds since the epoch; None: it is not known

    def __repr__(self) -> str:
        return "SignIn(***)"  # it gets into tracebacks

    def ends_within(self, seconds: float) -> bool:
        """Whether it is known to have ended ``seconds`` from now."""
        if self.expires_at is None:
            return False
        return time.time() + seconds >= self.expires_at


def sign_in_of(entry: object) -> SignIn:
    """The sign-in in one object of auth.json, under any usual name; with the token "" for none."""
    token = ""
    for key in TOKEN_KEYS:
        token = token or text_of(entry, key).strip()
    expires_at = None
    expiry = text_of(entry, "expires_at")
    if EPOCH_SECONDS.match(expiry):
        expires_at = float(expiry)
    return SignIn(token, text_of(entry, "refresh_token"), expires_at)


def start_record(base_url: str, body: Json, key: str, repo: str) -> Json:
    """How a start of ``body`` (as for Client.start_run) is written down.

    ``repo`` is what people call it. ``digest`` tells equal requests: same service, repo and task.
    """
    request = {
        "service": base_url,
        "repo": text_of(body, "repoId"),
        "task": text_of(body, "prompt"),
    }
    canonical = to_json(request, sort_keys=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return {
        "key": key,
        "service": base_url,
        "repo": repo or request["repo"],
        "digest": digest[:32],
        "task": sanitize(request["task"], " ")[:200],
        "time": utc_time(time.time()),
    }


def _share(field: str, one: Json, other: Json) -> bool:
    """Whether two records are of one service and have the same ``field``, which is not empty."""
    value = text_of(one, field)
    if not value or value != text_of(other, field):
        return False
    return one.get("service") == other.get("service")


def _is_in_doubt(record: Json, now: float) -> bool:
    """Whether a record is of a start of the last day whose answer never came."""
    if text_of(record, "id"):
        return False
    started_at = parse_time(record.get("time")) or 0.0
    return now - started_at < IN_DOUBT_S


def with_start(records: Records, start: Json) -> Records:
    """The history when ``start`` is about to be sent.

    A key that was sent before keeps its record, in which there may be the id of its run.
    """
    for record in records:
        if _share("key", record, start):
            return records
    return [*records, start]


def with_run(records: Records, entry: Json) -> Records:
    """The history with ``entry`` as the one record of its start and of its run."""
    others = []
    for record in records:
        if not _share("key", record, entry) and not _share("id", record, entry):
            others.append(record)
    return [*others, entry]


def without_start(records: Records, start: Json) -> Records:
    """The history without ``start``, but with an earlier start under the same key."""
    return [record for record in records if record != start]


def newest_records(records: Records, now: float) -> Records:
    """Those that are kept: the newest, and each start that is still in doubt."""
    older = records[:-HISTORY_SIZE]
    doubts = [record for record in older if _is_in_doubt(record, now)]
    return doubts + records[-HISTORY_SIZE:]


class Home:
    """The directory of our files, and the only thing that knows what is in it.

    ``auth.json`` holds the sign-in, ``runs.jsonl`` what was started. ``warn`` gets one line about
    what is wrong without being an error. Nothing is created before it is written. Without
    ``keeps_history`` runs.jsonl is neither read nor written.
    """

    def __init__(
        self,
        directory: str,
        warn: Warn = unheard,
        keeps_history: bool = True,
    ) -> None:
        self.directory = directory
        self.warn = warn
        self.keeps_history = keeps_history
        self.auth_path = os.path.join(directory, "auth.json")
        self.history_path = os.path.join(directory, "runs.jsonl")
        self._warned_of_locks = False

    @contextlib.contextmanager
    def _lock(self, path: str) -> Iterator[None]:
        """Keep other threads and processes away from ``path``; UnavailableError when it is busy.

        UnwritableError when there can be no lock file. Where the file system has no locks it goes
        on without, with one warning.
        """
        lock_path = link_target(path) + ".lock"
        with naming_file("write", lock_path):
            make_private_directory(os.path.dirname(lock_path))
            if os.path.islink(lock_path):  # Windows has no O_NOFOLLOW
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            descriptor = os.open(lock_path, LOCKING, 0o600)
        try:
            self._take_lock(descriptor, lock_path)
            yield
        finally:
            _release_lock(descriptor)
            os.close(descriptor)

    def _take_lock(self, descriptor: int, lock_path: str) -> None:
        try:
            _wait_for_lock(descriptor, lock_path, self.warn)
        except OSError as error:  # ENOLCK, EOPNOTSUPP: NFS, some containers
            if not self._warned_of_locks:
                self._warned_of_locks = True
                self.warn(
                    f"{self.directory} does not support locks ({error.strerror}): "
                    "do not run two commands that sign in or start runs at once"
                )

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        with self._lock(path), naming_file("write", path):
            yield

    # -- auth.json

    def _document(self, warn: Warn) -> Json:
        """auth.json, {} for none; UnauthorizedError that names it when it cannot be read."""
        try:
            data, mode = read_regular_file(self.auth_path)
            document = parse_json(data.decode("utf-8-sig"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UnauthorizedError(
                f"cannot read {self.auth_path}: {error.strerror or error}"
            ) from None
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UnauthorizedError(
                f"{self.auth_path} is not valid JSON", hint="fix or delete it"
            )
        if mode & 0o077 and os.name != "nt":
            warn(
                f"{self.auth_path} is open to other users (mode {mode:04o}); "
                f"to close it: chmod 600 {self.auth_path}"
            )
        return document

    def sign_in_for(
        self, base_url: str, warn: Optional[Warn] = None
    ) -> Optional[SignIn]:
        """What auth.json has for the service at ``base_url``; None for nothing.

        Read generously, for it may be written by hand or by other programs: ours is under
        "mogplex", others' under "providers", a person's at the top. An entry that names
        another service is passed over, with a warning.
        """
        say = warn or self.warn
        document = self._document(say)
        providers = dict_of(document, "providers")
        for entry in (document.get("mogplex"), providers.get("mogplex"), document):
            found = sign_in_of(entry)
            service = text_of(entry, "base_url").rstrip("/")
            if not found.token:
                continue
            if service in ("", base_url):
                check_token(found.token, self.auth_path)
                return found
            say(
                f"ignored the sign-in in {self.auth_path}: it is for {sanitize(service)}, "
                f"not for {base_url}"
            )
        return None

    def _content_with(self, entry: Json) -> Tuple[bytes, bool]:
        """auth.json with ``entry`` as all that it has of ours ({}: nothing); whether it had any."""
        document = self._document(unheard)
        kept = {
            key: value for key, value in document.items() if key not in SIGN_IN_KEYS
        }
        providers = dict_of(document, "providers")
        if "mogplex" in providers:
            kept["providers"] = {
                name: value for name, value in providers.items() if name != "mogplex"
            }
        had_one = kept != document
        if entry:
            kept["mogplex"] = entry
        text = to_json({"version": 1, **kept}, indent=2)
        return f"{text}\n".encode(), had_one

    def store_sign_in(self, entry: Json) -> str:
        """Put ``entry`` into auth.json, whose path is the value; what others keep there stays.

        MogplexError that names the file when it cannot be written, or is held by another process.
        """
        with self._writing(self.auth_path):
            content, _ = self._content_with(entry)
            replace_file(self.auth_path, content)
        return self.auth_path

    def forget_sign_in(self) -> bool:
        """Take our sign-in, and nothing else, out of auth.json; whether there was one."""
        if not os.path.lexists(self.auth_path):
            return False
        with self._writing(self.auth_path):
            content, had_one = self._content_with({})
            if had_one:
                replace_file(self.auth_path, content)
        return had_one

    def sign_in_lock(self) -> ContextManager[None]:
        """For reading the sign-in and storing its successor; MogplexErrors as ``store_sign_in``."""
        return self._lock(self.auth_path)

    @contextlib.contextmanager
    def sign_in_successor(self) -> Iterator[Store]:
        """A function that stores an entry; for use under ``sign_in_lock``.

        UnwritableError when an entry could not be stored: known before a refresh token is spent.
        """
        with contextlib.ExitStack() as stack:
            with naming_file("write", self.auth_path):
                present, _ = read_regular_file(self.auth_path)
                # Only trying shows that it can be replaced.
                replace_file(self.auth_path, present)
                room = len(present) + RENEWAL_ROOM
                commit = stack.enter_context(replacing(self.auth_path, room))

            def store(entry: Json) -> None:
                content, _ = self._content_with(entry)
                try:
                    with naming_file("write", self.auth_path):
                        commit(content)
                except UnwritableError as error:
                    self.warn(f"{error}; the renewed sign-in serves this process only")

            yield store

    # -- runs.jsonl

    def record_start(self, start: Json) -> None:
        """Write a start down before it is sent; where that fails, a warning is all."""
        self._change_history(with_start, start)

    def record_run(self, start: Json, run: Record) -> None:
        """Add to a start what its answer says: the run's id, branch and time."""
        entry = {
            **start,
            "id": text_of(run, "runId"),
            "branch": text_of(run, "branch", "working"),
            "time": text_of(run, "createdAt") or text_of(start, "time"),
        }
        self._change_history(with_run, entry)

    def forget_start(self, start: Json) -> None:
        """Take a start away again that the service refused for good."""
        self._change_history(without_start, start)

    def history(self, base_url: str) -> List[Json]:
        """What was started here on the service at ``base_url``, newest first.

        A record without an ``id`` is of a start whose answer never came.
        """
        if not self.keeps_history:
            return []
        try:
            records = self._records()
        except OSError as error:
            self.warn(f"cannot read {self.history_path}: {error.strerror or error}")
            return []
        return [
            record for record in reversed(records) if record.get("service") == base_url
        ]

    def runs(self, base_url: str) -> List[Json]:
        """Those of the history whose id is known."""
        return [record for record in self.history(base_url) if text_of(record, "id")]

    def start_in_doubt(self, start: Json, now: float) -> Json:
        """A start of the same request, of the last day, whose answer never came; {} for none."""
        for record in self.history(text_of(start, "service")):
            if _share("key", record, start):
                continue  # the answer to this one is about to come
            if _share("digest", record, start) and _is_in_doubt(record, now):
                return record
        return {}

    def _records(self) -> Records:
        """All that runs.jsonl holds, oldest first; a torn line is passed over."""
        try:
            data, _ = read_regular_file(self.history_path)
        except (FileNotFoundError, NotADirectoryError):
            return []
        records = []
        for line in data.decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError):
                record = parse_json(line.strip())
                if isinstance(record, dict):
                    records.append(record)
        return records

    def _change_history(
        self, change: Callable[[Records, Json], Records], record: Json
    ) -> None:
        """Change runs.jsonl by one record, under its lock; where that fails, a warning is all."""
        if not self.keeps_history:
            return
        try:
            with self._writing(self.history_path):
                changed = change(self._records(), record)
                kept = newest_records(changed, time.time())
                lines = [to_json(one) + "\n" for one in kept]
                replace_file(self.history_path, "".join(lines).encode())
        except MogplexError as error:
            self.warn(f"this run is not recorded in the history: {error}")


def home_from(environ: Mapping[str, str], warn: Warn = unheard) -> Home:
    """The Home that the environment names: MOGPLEX_HOME, HOME and MOGPLEX_NO_HISTORY.

    MOGPLEX_NO_HISTORY empty or 0 keeps the history, as if it were not set.
    """
    keeps_history = environ.get("MOGPLEX_NO_HISTORY", "") in ("", "0")
    return Home(home_directory(environ), warn, keeps_history)


# -- Credentials

CLIENT_ID = "mogplex-cli"
TOKEN_PATH = "/api/auth/mcp/token"
# Fields of the forms that are sent to TOKEN_PATH.
SECRET_FIELDS = ("code", "code_verifier", "refresh_token")
REFRESH_EARLY_S = 60.0  # before its end a token is refreshed
SETTLE_S = (
    5.0  # the longest wait for a refresh that is under way when the program leaves
)


def _reason(answer: Json) -> str:
    """Why OAuth says no, as one harmless line."""
    reasons = [text_of(answer, "error"), text_of(answer, "error_description")]
    return sanitize(": ".join(filter(None, reasons))) or "no reason given"


def _token_error(
    base_url: str,
    status: int,
    answer: Json,
    form: Dict[str, str],
) -> MogplexError:
    """What an answer of the token endpoint without a token means."""
    if status >= 500:
        return UnavailableError(
            "the sign-in service is unavailable", status=status, transient=True
        )
    if status not in (400, 401, 403):
        message = f"unexpected response from {base_url}{TOKEN_PATH}: no token in it"
        return InvalidResponseError(message, status=status)
    reason = _reason(answer)
    for name in SECRET_FIELDS:
        reason = redact(reason, form.get(name, ""))
    return UnauthorizedError(
        f"the service refused the sign-in: {reason}",
        status=status,
        hint="run `mogplex login`",
    )


def _ask_for_token(post: PostForm, base_url: str, **form: str) -> Json:
    """Ask the token endpoint; the entry to store. An error has no secret in it, even when echoed.

    The service answers 401 with OAuth's error to a code or refresh token that is bad, used or
    expired, and an empty 500 in an outage.
    """
    status, answer = post(base_url + TOKEN_PATH, {"client_id": CLIENT_ID, **form})
    token = text_of(answer, "access_token")
    if status == 200 and token:
        lifetime_s = answer.get("expires_in")
        expires_at = None
        if isinstance(lifetime_s, (int, float)) and 0 < lifetime_s < 1e9:
            expires_at = int(time.time() + lifetime_s)
        return {
            "access_token": check_token(token, "the new token"),
            "refresh_token": text_of(answer, "refresh_token")
            or form.get("refresh_token", ""),
            "expires_at": expires_at,
            "base_url": base_url,
        }
    raise _token_error(base_url, status, answer, form)


def _not_stored(entry: Json) -> None:
    """The Store of a credential without a home: it keeps nothing."""


class Credential:
    """A token, refreshed when it must be; safe from several threads and processes.

    ``source``: "environment", "file" or "given". With a ``home`` it takes over what
    another process has stored there, and stores what it gets. UnauthorizedError for no token.
    """

    def __init__(
        self,
        token: Optional[str],
        *,
        source: str = "given",
        base_url: str = "",
        refresh_token: str = "",
        expires_at: Optional[float] = None,
        home: Optional[Home] = None,
    ) -> None:
        if not token:
            raise UnauthorizedError(
                "no token given", hint="is the variable that holds it set?"
            )
        self.source = source
        self._sign_in = SignIn(
            check_token(token, "given token"), refresh_token, expires_at
        )
        self._base_url = base_url
        self._home = home
        # A file that cannot be written holds an old one, which is no news.
        self._seen = {token}
        self._begin_in_this_process()

    def _begin_in_this_process(self) -> None:
        """No refresh is under way here: not even in a fork's child, whose parent may have one."""
        self._pid = os.getpid()
        self._renewing = threading.Lock()
        self._settled = threading.Event()
        self._settled.set()

    @classmethod
    def anonymous(cls) -> Credential:
        """The credential of nobody, for the requests of a sign-in: no token is sent."""
        credential = cls("nobody")
        credential._sign_in = SignIn("")
        return credential

    @property
    def token(self) -> str:
        """The token in force; "" for nobody's."""
        return self._sign_in.token

    @property
    def expires_at(self) -> Optional[float]:
        """When the token ends, in seconds since the epoch; None where that is not known."""
        return self._sign_in.expires_at

    @property
    def refreshable(self) -> bool:
        """Whether it can outlive its ``expires_at``."""
        return bool(self._sign_in.refresh_token)

    @property
    def secrets(self) -> Tuple[str, str]:
        """The tokens, which must not be shown."""
        return (self.token, self._sign_in.refresh_token)

    def current(self, post: PostForm) -> str:
        """The token to send, refreshed when it ends within 60 s.

        Where it cannot be refreshed it serves until its end, and then the errors are ``renew``'s.
        """
        sign_in = self._sign_in
        if self._is_due():
            try:
                self.renew(sign_in.token, post)
            except MogplexError:
                if self._sign_in.ends_within(0):
                    raise
        return self.token

    def renew(self, refused: str, post: PostForm) -> bool:
        """Whether another token than ``refused`` is in force now: a refreshed one, or the file's.

        UnauthorizedError when only a new sign-in helps, or when none could be stored here;
        UnavailableError in an outage, or while another process holds the lock; the file stays.
        """
        if self._pid != os.getpid():
            self._begin_in_this_process()
        with self._renewing:
            if self._home is None:
                if self._needs_refresh(refused):
                    self._refresh(post, contextlib.nullcontext(_not_stored))
                return self.token != refused
            try:
                with self._home.sign_in_lock():
                    return self._renew_stored(self._home, refused, post)
            except UnwritableError as problem:
                return self._renew_unstored(self._home, refused, problem)

    def settle(self, seconds: float = SETTLE_S) -> bool:
        """Wait for a refresh that is under way: its answer is the only copy of the new tokens."""
        if self._pid != os.getpid():
            return True  # it is the parent's
        return self._settled.wait(seconds)

    def _is_due(self) -> bool:
        return self.refreshable and self._sign_in.ends_within(REFRESH_EARLY_S)

    def _needs_refresh(self, refused: str) -> bool:
        return self.refreshable and (self.token == refused or self._is_due())

    def _renew_stored(self, home: Home, refused: str, post: PostForm) -> bool:
        if not self._take_over(home):
            return False  # signed out meanwhile, which a refresh must not undo
        if self._needs_refresh(refused):
            self._refresh(post, home.sign_in_successor())
        return self.token != refused

    def _renew_unstored(self, home: Home, refused: str, problem: MogplexError) -> bool:
        """Without writing: what another process has stored, or the old token until its end."""
        self._take_over(home)
        if self.token != refused or not self._sign_in.ends_within(0):
            return self.token != refused
        raise UnauthorizedError(
            f"the sign-in has ended and cannot be renewed here: {problem}",
            hint="run `mogplex login` where it can be stored, or set MOGPLEX_API_KEY",
        )

    def _take_over(self, home: Home) -> bool:
        """Adopt what the file has, if that is news; whether it has a sign-in at all."""
        stored = home.sign_in_for(self._base_url, unheard)
        if stored is None:
            return False
        if stored.token not in self._seen:
            self._adopt(stored)
        return True

    def _adopt(self, sign_in: SignIn) -> None:
        self._seen.add(sign_in.token)
        self._sign_in = sign_in

    def _refresh(
        self,
        post: PostForm,
        successor: ContextManager[Store],
    ) -> None:
        """Spend the refresh token, once ``successor`` is ready to store what comes for it."""
        with successor as store, self._under_way():
            entry = _ask_for_token(
                post,
                self._base_url,
                grant_type="refresh_token",
                refresh_token=self._sign_in.refresh_token,
            )
            self._adopt(sign_in_of(entry))
            store(entry)

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        """Let ``settle`` and the end of the interpreter wait for what is done meanwhile."""
        self._settled.clear()
        atexit.register(self.settle)
        try:
            yield
        finally:
            self._settled.set()
            atexit.unregister(self.settle)


def token_given(environ: Mapping[str, str]) -> Tuple[str, str]:
    """The variable that gives a token, and the token: it takes precedence over a sign-in.

    Both are "" where none does.
    """
    token = environ.get("MOGPLEX_API_KEY", "").strip()
    if not token:
        return "", ""
    return "MOGPLEX_API_KEY", token


def resolve_credential(
    environ: Mapping[str, str], base_url: str, home: Home
) -> Credential:
    """The token that the environment gives, else the sign-in; UnauthorizedError for none."""
    variable, token = token_given(environ)
    if variable:
        check_token(token, variable)
        return Credential(token, source="environment", base_url=base_url)
    stored = home.sign_in_for(base_url)
    if stored is None:
        raise UnauthorizedError(
            f"not signed in: {home.auth_path} has no token for {base_url}",
            hint=f"run `mogplex login`, or set MOGPLEX_API_KEY to a token from "
            f"{base_url}/settings/api-keys",
        )
    return Credential(
        stored.token,
        source="file",
        base_url=base_url,
        home=home,
        refresh_token=stored.refresh_token,
        expires_at=stored.expires_at,
    )


# -- Sign-in through a browser

LOGIN_PORTS = (24816, 24818)  # the only two that the service redirects to
LOGIN_TIMEOUT_S = 300.0
AUTHORIZE_PATH = "/api/auth/mcp/authorize"
CALLBACK_PATH = "/auth/callback"
SCOPES = "read write offline_access"  # without the last there is no refresh token
MAX_CALLBACK = 65536  # bytes of a request
# A space may stand in the target: the service does not escape those of an error.
CALLBACK_REQUEST = re.compile(r"GET ([^\r\n?]*)\?([^\r\n]*) HTTP/1\.[01]\Z")


def pkce_challenge(verifier: str) -> str:
    """What is told of a verifier before it is sent itself: its SHA-256 (PKCE's method S256)."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class Attempt:
    """One sign-in that waits for its browser."""

    def __init__(self, port: int) -> None:
        import secrets

        self.port = port
        self.redirect_uri = (
            f"http://127.0.0.1:{port}{CALLBACK_PATH}"  # where the browser ends up
        )
        # Tells the answer of our browser from another page's.
        self.state = secrets.token_urlsafe(32)
        self.verifier = secrets.token_urlsafe(64)  # proves that the code is ours (PKCE)

    def authorize_url(self, base_url: str) -> str:
        """The page that the person opens."""
        query = {
            "response_type": "code",
            "client_id": CLIENT_ID,
            "redirect_uri": self.redirect_uri,
            "scope": SCOPES,
            "state": self.state,
            "code_challenge": pkce_challenge(self.verifier),
            "code_challenge_method": "S256",
        }
        return f"{base_url}{AUTHORIZE_PATH}?{urllib.parse.urlencode(query)}"


# The answer to one request to the loopback port: the HTTP status; a text for the person who looks
# at the browser; what ends the wait ({}: nothing), a ``code`` or an ``error``.
Reply = Tuple[int, str, Json]

NOTHING_HERE: Reply = (404, "There is nothing here.", {})
WRONG_STATE: Reply = (400, "This is not the answer that the terminal waits for.", {})


def _hosts_named(head: str) -> List[str]:
    """The values of all Host fields of a request."""
    hosts = []
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "host":
            hosts.append(value.strip().lower())
    return hosts


def reply_to_callback(head: str, attempt: Attempt) -> Reply:
    """What a request's head means to a sign-in."""
    match = CALLBACK_REQUEST.match(head.partition("\r\n")[0])
    if not match or match.group(1) != CALLBACK_PATH:
        return NOTHING_HERE
    # A page of another site can reach this port under a name of its own, by DNS.
    ours = [f"127.0.0.1:{attempt.port}"], [f"localhost:{attempt.port}"]
    if _hosts_named(head) not in ours:
        return NOTHING_HERE
    values = dict(urllib.parse.parse_qsl(match.group(2)))
    state = values.get("state", "")
    is_ours = hmac.compare_digest(state.encode(), attempt.state.encode())
    # The service sends an error without the state.
    if "error" in values and (is_ours or "state" not in values):
        reason = _reason(values)
        text = f"The sign-in failed: {reason}. You can return to the terminal."
        return 200, text, {"error": reason}
    if not is_ours or "code" not in values:
        return WRONG_STATE
    text = "You can close this page and return to the terminal, which finishes the sign-in."
    return 200, text, {"code": values["code"]}


def _read_head(connection: socket.socket) -> str:
    """A request's head; "" when it never ends, or is too long."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(MAX_CALLBACK)
        head += data
        if not data or len(head) > MAX_CALLBACK:
            return ""
    return head.decode("latin-1")


def _send_page(connection: socket.socket, status: int, text: str) -> None:
    import html

    page = f"<!doctype html><title>Mogplex</title><p>{html.escape(text)}\n"
    lines = [
        f"HTTP/1.1 {status} Answer",
        "Content-Type: text/html; charset=utf-8",
        "Cache-Control: no-store",
        "Connection: close",
        "",
        page,
    ]
    connection.sendall("\r\n".join(lines).encode())


def _serve_callback(
    connection: socket.socket, attempt: Attempt, outcomes: List[Json]
) -> None:
    """Answer one connection; what ends the wait goes to ``outcomes`` after the browser's page."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(10.0)
        head = _read_head(connection)
        if not head:
            return
        status, text, outcome = reply_to_callback(head, attempt)
        try:
            _send_page(connection, status, text)
        finally:
            if outcome:
                outcomes.append(outcome)


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    names = " and ".join(map(str, ports))
    raise MogplexError(
        f"ports {names} of 127.0.0.1 are in use", hint="is another sign-in waiting?"
    )


def start_thread(function: Callable[..., object], *arguments: object) -> None:
    """Run ``function`` on a thread that ends with the process; MogplexError when there is none.

    Whoever starts it may be interrupted at any instruction, by Ctrl+C for one. So it is none of
    the module threading: an exception inside that can leave one of its locks locked for ever, or
    is discarded, in the callback of the weak reference that it keeps of each Thread.
    """
    try:
        _thread.start_new_thread(function, arguments)
    except RuntimeError as error:
        raise MogplexError(f"cannot start a thread: {error}", transient=True) from None


def never() -> bool:
    """A ``stopped`` that never ends the wait."""
    return False


def _await_callback(
    listener: socket.socket,
    attempt: Attempt,
    timeout_s: float,
    stopped: Callable[[], bool],
) -> Json:
    """What the browser brings; each visitor has a thread, so that a silent one holds up nobody."""
    outcomes: List[Json] = []
    deadline = time.monotonic() + timeout_s
    listener.settimeout(0.1)
    while not outcomes:
        if stopped():
            raise MogplexError("the sign-in was cancelled")
        if time.monotonic() >= deadline:
            raise MogplexError(
                f"the browser did not finish the sign-in within {format_duration(timeout_s)}"
            )
        with contextlib.suppress(OSError):  # the time-out among them: nobody came
            connection, _ = listener.accept()
            start_thread(_serve_callback, connection, attempt, outcomes)
    return outcomes[0]


def sign_in(
    base_url: str,
    post: PostForm,
    *,
    announce: Callable[[str], None],
    open_browser: Optional[Callable[[str], object]],
    timeout_s: float = LOGIN_TIMEOUT_S,
    stopped: Callable[[], bool] = never,
    ports: Sequence[int] = LOGIN_PORTS,
) -> Json:
    """Sign in through a browser: authorization code, PKCE S256.

    The value is the entry for ``Home.store_sign_in``. ``announce`` gets the URL to open.
    UnauthorizedError when the service refuses, MogplexError when ``timeout_s`` is over,
    ``stopped`` says so, or no port is free.
    """
    with _listen(ports) as listener:
        attempt = Attempt(listener.getsockname()[1])
        url = attempt.authorize_url(base_url)
        announce(url)
        if open_browser:
            # On a thread: a browser inside the terminal returns when the person leaves it.
            start_thread(open_browser, url)
        outcome = _await_callback(listener, attempt, timeout_s, stopped)
    if "error" in outcome:
        raise UnauthorizedError(f"the sign-in failed: {outcome['error']}")
    return _ask_for_token(
        post,
        base_url,
        grant_type="authorization_code",
        code=outcome["code"],
        redirect_uri=attempt.redirect_uri,
        code_verifier=attempt.verifier,
    )


# ---------------------------------------------------------------- 4. Client

Headers = Mapping[str, Union[str, bytes]]
Params = Mapping[str, object]
# Called at least every quarter of a second; may raise to end a wait.
OnWait = Callable[[], None]

MAX_BODY = 32 << 20  # bytes, after decompression
READ_SIZE = 1 << 18  # bytes read at once, at most
# Bytes decompressed at once, at most: half a MiB can hold half a GiB.
INFLATED_SIZE = 1 << 20
MAX_EVENT_ID = 4096  # bytes; a longer one is not sent back
LONGEST_WAIT_S = 0.25  # in one go: on Windows Ctrl+C does not wake a waiting lock
LONGEST_ASKED_S = 5.0  # the longest Retry-After that a one-shot command waits for
# The service closes an idle connection after 5 to 6 s; a reused one then fails on its first byte.
KEEP_ALIVE_S = 4.5
JSON_TYPE = "application/json"
STREAM_TYPE = "text/event-stream"
FORM_TYPE = "application/x-www-form-urlencoded"
REPEATABLE_METHODS = ("GET", "PUT", "DELETE")
# Where the service honours a key.
KEYED_PATH = re.compile(r"/runs|/automations/[^/]+/trigger")
LAUNCH_S = 600.0  # a sandbox is answered after its launch, which takes minutes
SERVICE_HOSTS = {"www.mogplex.com", "mogplex.com"}  # which may redirect to each other


# -- What the service sends, for editors and type checkers. Any key may be missing, and others
# may come. Code here reads it with text_of() and its like, as a value may be of an odd type.


class Repo(TypedDict, total=False):
    """A repository that is linked to the account."""

    id: str
    full_name: str  # owner/name
    installation_id: Optional[int]
    default_branch: Optional[str]
    root_directory: Optional[str]


class Sandbox(TypedDict, total=False):
    """A machine in the cloud, with a checkout of a repo."""

    id: str
    sandbox_id: Optional[str]  # the provider's; "pending" while it starts
    repo_id: str
    status: str  # one of SANDBOX_STATUSES, or a new one
    base_branch: str
    working_branch: str
    root_directory: Optional[str]
    preview_url: Optional[str]
    created_at: str  # ISO 8601, as are all times
    last_active_at: str
    error: Optional[str]


class RunBranch(TypedDict, total=False):
    """The branches that a run was asked for; its Verdict tells which one was pushed."""

    base: str
    working: str
    createBranch: bool


class RunRuntime(TypedDict, total=False):
    """Where a run is carried out."""

    provider: Optional[str]
    runId: Optional[str]


class Run(TypedDict, total=False):
    """One task of an agent."""

    runId: str
    aiCallId: str
    sandboxRecordId: Optional[str]  # the id of its Sandbox
    sandboxId: Optional[str]  # the provider's; "pending" while it starts
    repoId: str
    harness: str
    status: str  # pending, streaming, success, failed, cancelled, or a new one
    branch: RunBranch
    rootDirectory: Optional[str]
    eventsUrl: str
    cancelUrl: str
    createdAt: str
    updatedAt: str
    error: Optional[str]
    runtime: RunRuntime
    replayed: bool  # in the answer to a start: its key had started this run before


class Event(TypedDict, total=False):
    """One thing that happened in a run. ``message`` and ``payload`` hold what an agent wrote."""

    id: str
    type: (
        str  # an open set of words: started, log, status_changed, finished, failed ...
    )
    toolName: Optional[str]
    message: Optional[str]
    payload: Json
    createdAt: str


class RunEvents(TypedDict, total=False):
    """The answer of ``Client.events``."""

    run: Run
    events: List[Event]


class Cancellation(TypedDict, total=False):
    """The answer of ``Client.cancel``; already_ended() reads it."""

    run: Run
    status: str
    alreadyTerminal: bool


# -- Requests


class Shape(NamedTuple):
    """What the ``data`` of a good answer must hold; all else may be missing, or of an odd type."""

    lists: Tuple[str, ...] = ()
    objects: Tuple[str, ...] = ()
    run_id: str = ""  # the run that was asked for: another one's answer is not ours
    any_data: bool = False  # it need be no object, and a 204 has none


class Limits(NamedTuple):
    """How long one exchange may take, in seconds."""

    total_s: float
    connect_s: float
    idle_s: float = (
        0.0  # a stream may be silent for so long, if that is more than total_s
    )


class Request(NamedTuple):
    """One request: what is sent, and what may be done about its answer."""

    method: str
    url: str  # with its query
    headers: Headers
    limits: Limits
    body: Optional[bytes] = None
    authorized: bool = True  # our token is sent with it
    renews: bool = (
        True  # when the token is refused, it is renewed and the request sent again
    )
    repeatable: bool = False  # sending it twice does no more than sending it once
    expects: Shape = Shape()

    def expecting(self, **shape: Any) -> Request:
        """The same, for an answer of this Shape."""
        return self._replace(expects=Shape(**shape))

    @property
    def keyed(self) -> bool:
        """Whether an idempotency key makes it repeatable."""
        return "Idempotency-Key" in self.headers


def misfit(data: Any, shape: Shape) -> str:
    """Why ``data`` is not of that ``shape``; "" when it is."""
    for key in shape.lists:
        if not isinstance(data.get(key), list):
            return f"no list '{key}'"
    for key in shape.objects:
        if not isinstance(data.get(key), dict):
            return f"no object '{key}'"
    run_id = text_of(data, "run", "runId")
    if run_id and shape.run_id and run_id.lower() != shape.run_id.lower():
        return f"it is about another run, '{sanitize(run_id)[:100]}'"
    return ""


def request_headers(**more: Union[str, bytes]) -> Dict[str, Union[str, bytes]]:
    """Those of every request, and of ``more`` (``_`` for ``-`` in names) what is not empty."""
    headers: Dict[str, Union[str, bytes]] = {
        "Accept": JSON_TYPE,
        "Accept-Encoding": "identity",
        "User-Agent": f"mogplex/{__version__}",
    }
    for name, value in more.items():
        if value:
            headers[name.replace("_", "-")] = value
    return headers


def path_segment(identifier: str) -> str:
    """An id as one segment of a URL's path; UsageError for one that would name another path."""
    identifier = identifier.strip()
    if identifier in ("", ".", ".."):
        raise UsageError(f"invalid id '{sanitize(identifier)}'")
    return urllib.parse.quote(identifier, safe="", errors="replace")


def checked_path(path: str) -> str:
    """A route's ``path``, in its one spelling; UsageError for what may lead out of the API.

    No part of it is empty, begins with a dot, or is encoded twice, and none holds a slash, a
    backslash, a space or a control character, encoded or not.
    """
    first, *parts = path.split("/")
    spelled = first
    for part in parts:
        decoded = urllib.parse.unquote_to_bytes(part)
        text = decoded.decode("utf-8", "replace")
        odd = re.search(r"^(\.|$)|[/\\%\s]", text)
        if odd or not text.isprintable() or re.search(r"[?#\\]", part):
            raise UsageError(f"invalid path '{sanitize(path)}'")
        spelled += "/" + urllib.parse.quote(decoded, safe="")
    if first or not parts:
        raise UsageError(f"invalid path '{sanitize(path)}'")
    return spelled


def with_query(url: str, params: Params) -> str:
    """``url`` and those of ``params`` that are neither None nor empty.

    A surrogate, which an undecodable byte of an argument became, is replaced, as in a path.
    """
    given = {}
    for name, value in params.items():
        if value not in ("", None):
            given[name] = str(value)
    if not given:
        return url
    return f"{url}?{urllib.parse.urlencode(given, errors='replace')}"


def checked_key(key: str) -> str:
    """An idempotency key as the service sees it; UsageError for what can be none."""
    if not 1 <= len(key.strip()) <= 200 or re.search(r"[^ -~]", key):
        raise UsageError("an idempotency key has 1 to 200 printable ASCII characters")
    return key.strip()


def honours_key(method: str, path: str) -> bool:
    """Whether an idempotency key makes the request repeatable."""
    return method == "POST" and KEYED_PATH.fullmatch(path) is not None


def json_body(body: object) -> bytes:
    """``body`` as JSON; UsageError for what cannot be sent as such."""
    try:
        return to_json(body, allow_nan=False).encode()
    except RecursionError:
        raise UsageError("the request body is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the request body is not JSON: {error}") from None


def split_url(url: str, location: str = "") -> urllib.parse.SplitResult:
    """The URL that ``location`` names as seen from ``url``, in its parts; empty for nonsense."""
    try:
        return urllib.parse.urlsplit(urllib.parse.urljoin(url, location))
    except ValueError:
        return urllib.parse.urlsplit("")


def redirect_target(url: str, status: int, location: str) -> str:
    """Where the token may follow: a 307 or 308 between the service's two hosts; else ""."""
    if status not in (307, 308):
        return ""
    here = split_url(url)
    there = split_url(url, location)
    if not here.scheme == there.scheme == "https":
        return ""
    hosts = {here.netloc.lower(), there.netloc.lower()}
    if hosts != SERVICE_HOSTS:
        return ""
    return there.geturl()


def redirect_error(url: str, status: int, location: str) -> MogplexError:
    """The error for a redirect that is not followed."""
    here = split_url(url)
    there = split_url(url, location)
    if there.netloc == here.netloc and there.path.endswith("/login"):
        return UnauthorizedError(
            "the service asks for a sign-in",
            code="UNAUTHORIZED",
            status=status,
            hint="the token was not understood, or MOGPLEX_URL is not the service's base URL",
        )
    target = sanitize(there.geturl() or location)[:500]
    return InvalidResponseError(
        f"refused to follow a redirect to {target}",
        code="REDIRECT",
        status=status,
        hint="check MOGPLEX_URL: the token is sent to no other address",
    )


def unexpected_response(headers: Mapping[str, str], size: int) -> str:
    """What to say of an answer of so many characters that is not the service's."""
    content_type = sanitize(headers.get("Content-Type"))
    media_type = content_type.partition(";")[0].strip()
    if not media_type:
        media_type = "no content type"
    message = f"unexpected response ({media_type[:100]}, {size} characters)"
    if "html" in media_type.lower():
        message += ": is a proxy or login page in between?"
    return message


def malformed_id_hint(url: str) -> str:
    """A hint where the id in a URL of the service is not spelled as its ids are; else ""."""
    path = url.rpartition(API_PATH)[2]
    match = re.search(r"(?:/runs/|/sandboxes/|[?&](?:repo_)?id=)([^/?&]+)", path)
    if not match:
        return ""
    identifier = urllib.parse.unquote_plus(match.group(1))
    if is_uuid(identifier):
        return ""
    return f"'{sanitize(identifier)[:100]}' does not look like an id of the service"


def answer_error(
    url: str,
    status: int,
    headers: Mapping[str, str],
    answer: object,
    size: int,
) -> MogplexError:
    """The MogplexError for an answer that is no success in the service's envelope.

    ``answer`` is the JSON in it, None for none, and ``size`` how many characters came.
    """
    kind: Type[MogplexError] = InvalidResponseError
    if status >= 300:
        kind = error_class(status)
    code = text_of(answer, "error", "code")
    message = text_of(answer, "error", "message") or text_of(answer, "error")
    if not message:
        message = "no message" if code else unexpected_response(headers, size)
    error = kind(sanitize(message)[:1000], code=sanitize(code)[:100], status=status)
    if status == 500:  # what a malformed id is answered
        error.hint = malformed_id_hint(url)
    error.retry_after_s = parse_retry_after(
        headers.get("Retry-After"), headers.get("Date")
    )
    error.transient = status < 300 or status in TRANSIENT_STATUSES
    error.delivered = status < 300 or status >= 500 or status in UNAVAILABLE_STATUSES
    return error


def unknown_repo(name: str, status: int = 0) -> MogplexError:
    """The error for a repo that the service does not list, by its id or name."""
    return MogplexError(
        f"the service lists no repo '{sanitize(name)}'",
        code="NOT_FOUND",
        status=status,
        hint="find IDs via `mogplex repos list`",
    )


def should_retry(error: MogplexError, attempt: int, tries: int, keyed: bool) -> bool:
    """Whether a one-shot command sends its request again after ``error``."""
    if attempt >= tries or not error.transient:
        return False
    if isinstance(error, RateLimitedError):
        return False  # the caller is told how long to wait, and decides
    if isinstance(error, InvalidResponseError) and not keyed:
        return False  # it would come garbled again; with a key, the answer to a start is worth it
    asked_s = error.retry_after_s or 0.0
    return asked_s <= LONGEST_ASKED_S


def retry_delay_s(error: MogplexError, attempt: int, random: float) -> float:
    """How long to wait before the request is sent again."""
    asked_s = error.retry_after_s or 0.0
    return max(asked_s, backoff_s(attempt, random))


def tries_after(error: MogplexError, attempt: int, tries: int, keyed: bool) -> int:
    """How many tries there may be in all: after a 500 a start has one more.

    When the service's queue refuses a start, the same key finds the failed run at once, and
    each try uses up the user's budget of starts.
    """
    if keyed and error.status == 500:
        return min(tries, attempt + 1)
    return tries


# What an error behind a lost connection says by its name, and whether the request may have arrived.
LOST_CONNECTIONS = (
    ("gaierror", "the host name was not found", False),
    ("ConnectionRefusedError", "the connection was refused", False),
    ("NewConnectionError", "no connection", False),
    ("ConnectTimeoutError", "no connection", False),
    ("timeout", "no answer for {:g} s", True),
    ("TimeoutError", "no answer for {:g} s", True),
    ("BaseException", "the connection was lost", True),
)
BAD_URL_ERRORS = {"InvalidURL", "InvalidSchema", "LocationValueError", "UnicodeError"}
HTTP_ERRORS = {"RequestException", "HTTPError", "HTTPException", "OSError"}


class Cause:
    """What lies under an exception of the HTTP library, whose layers wrap each other's.

    Errors are told apart by their kinds: a URL in a text may have any words.
    """

    def __init__(self, error: BaseException) -> None:
        chain: List[Any] = []
        cause: Optional[BaseException] = error
        while cause is not None:  # some of urllib3's are only a "reason"
            chain += [getattr(cause, "reason", None), cause]
            cause = cause.__context__
        self.root: Any = chain[-1]
        self.text = " ".join(map(str, chain))
        self.kinds: Set[str] = set()
        for one in chain:
            self.kinds.update(kind.__name__ for kind in type(one).__mro__)

    def lost(self, limit_s: float) -> Tuple[str, bool]:
        """How the connection was lost, and whether the request may have arrived before that."""
        for kind, words, delivered in LOST_CONNECTIONS:
            if kind in self.kinds:
                return words.format(limit_s), delivered
        raise AssertionError("every exception is a BaseException")


def tls_error(cause: Cause) -> Optional[MogplexError]:
    """The error for a certificate that is not valid, or cannot be checked."""
    if cause.kinds & {"SSLCertVerificationError", "CertificateError"}:
        words = sanitize(getattr(cause.root, "verify_message", cause.root))
        hint = "behind a company proxy, name its CA in REQUESTS_CA_BUNDLE"
        return MogplexError(
            f"the TLS certificate is not valid: {words}", code="TLS", hint=hint
        )
    if re.search(r"CA certificate bundle|\[X509|PEM lib", cause.text):
        hint = "check REQUESTS_CA_BUNDLE, SSL_CERT_FILE and SSL_CERT_DIR"
        return MogplexError("cannot read the CA certificates", code="TLS", hint=hint)
    return None


def proxy_error(cause: Cause, limit_s: float, proxy: str) -> Optional[MogplexError]:
    """The error for a proxy that cannot be used, or refuses.

    urllib3 1.26 calls it a ProxyError too when a connection inside the tunnel is lost, and that
    request may have arrived.
    """
    if "ProxyError" in cause.kinds:
        words, delivered = cause.lost(limit_s)
        refused = re.search(r"Tunnel connection failed: (\d+ [\w ]+)", cause.text)
        if refused:
            words = refused.group(1)
            delivered = False
        return UnavailableError(
            f"no connection through the proxy {proxy}: {words}",
            code="PROXY",
            delivered=delivered,
            transient=True,
            hint="check HTTPS_PROXY and NO_PROXY",
        )
    if cause.kinds & (BAD_URL_ERRORS | {"ValueError"}):
        hint = "check HTTPS_PROXY; a SOCKS proxy needs PySocks"
        return UsageError(f"the proxy {proxy} cannot be used", hint=hint)
    return None


def transport_error(error: Exception, limit_s: float, proxy: str) -> Exception:
    """The MogplexError for an exception of the HTTP library; a bug's comes back as it is."""
    cause = Cause(error)
    found = tls_error(cause)
    if not found and proxy:
        found = proxy_error(cause, limit_s, proxy)
    if found:
        return found
    if cause.kinds & BAD_URL_ERRORS:
        return UsageError("MOGPLEX_URL cannot be used: it names no host that can exist")
    if type(error).__module__ == "zlib":
        return InvalidResponseError(
            "the compression of the response is broken", transient=True, delivered=True
        )
    # These are http.client's own limits.
    if re.search(r"got more than \d+ (headers|bytes)", cause.text):
        return InvalidResponseError(
            "the response has too many headers, or too long ones",
            transient=True,
            delivered=True,
        )
    if cause.kinds & HTTP_ERRORS:
        words, delivered = cause.lost(limit_s)
        return UnavailableError(
            words, code="UNAVAILABLE", delivered=delivered, transient=True
        )
    return error


def inflate(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Gzip undone, a bounded piece at a time."""
    import zlib

    inflater = zlib.decompressobj(31)
    for piece in pieces:
        full = False
        while (piece or full) and not inflater.eof:
            inflated = inflater.decompress(piece, INFLATED_SIZE)
            yield inflated
            piece = inflater.unconsumed_tail
            full = len(inflated) == INFLATED_SIZE
    if not inflater.eof:
        raise zlib.error("the end is missing")


class Answer:
    """An HTTP answer as requests gives it, with its body still to be read."""

    def __init__(self, response: Any) -> None:
        self.url: str = response.url
        self.status: int = response.status_code
        self.headers: Any = response.headers  # names in any case
        self._raw = response.raw
        # http.client's answer, under urllib3's; that of an embedder's adapter may have none.
        self._source = getattr(response.raw, "_fp", response.raw)

    def pass_over_interim(self) -> None:
        """Read on to the final answer; http.client itself passes over "100 Continue" alone."""
        while 100 <= self.status < 200 and self.status != 101:
            self._source.headers = None  # makes begin() read one more
            self._source.begin()
            self.status = self._source.status
            self.headers = self.headers.copy()
            self.headers.clear()
            self.headers.update(self._source.headers.items())

    def descriptor(self) -> int:
        """That of the socket; -1 when it has none."""
        try:
            return int(self._raw.fileno())
        except (AttributeError, OSError, ValueError):
            return -1

    def pieces(self) -> Iterator[bytes]:
        """The body, decompressed, as it arrives. We ask for no compression; a proxy may add it."""
        encoding = self.headers.get("Content-Encoding", "").strip()
        if encoding.lower() in ("", "identity"):
            return self._raw_pieces()
        if encoding.lower() == "gzip":
            return inflate(self._raw_pieces())
        message = f"unknown encoding of the response: {sanitize(encoding)}"
        raise InvalidResponseError(message, delivered=True)

    def _raw_pieces(self) -> Iterator[bytes]:
        """The body as it arrives; ConnectionResetError when it is cut short.

        Neither requests' ``iter_content`` nor urllib3's ``read``: they hold small pieces back,
        and lose at a reset what had come. http.client's ``read1`` has to be told where the body
        ends.
        """
        whole = self._length()
        left = whole
        while left:
            piece = self._source.read1(min(READ_SIZE, left))
            if not piece:
                break
            left -= len(piece)
            yield piece
        if 0 < left < float("inf") or (left == whole and self._head_is_cut()):
            raise ConnectionResetError("the response was cut short")

    def _head_is_cut(self) -> bool:
        """Whether the head ends within a line: http.client takes that for the end of the head."""
        head = getattr(self._source, "headers", None)
        return bool(getattr(head, "defects", None))

    def _length(self) -> Any:
        """The bytes of the body as announced, infinity when they are not."""
        encoding = self.headers.get("Transfer-Encoding", "")
        length = self.headers.get("Content-Length", "")
        if "chunked" in encoding.lower() or not re.match("[0-9]{1,18}\\Z", length):
            return float("inf")
        return int(length)

    def keep(self) -> None:
        """Give back the connection of an answer that was read to its end, for the next request."""
        # An answer that is none of http.client's has no such attribute.
        closes = getattr(self._source, "will_close", True)
        if closes or self.status == 101:  # after which it speaks another protocol
            self.close()
        else:
            self._source.close()  # tells http.client that this answer is over
            self._raw.release_conn()

    def close(self) -> None:
        """Close a connection not given back: nobody knows where on it a next answer begins."""
        self._raw.close()


class SocketHandle:
    """The socket on which a thread waits, by which another thread ends that wait.

    No time limit of a socket ends a wait for a peer that sends a byte now and then; shutting
    it down does. Held is a duplicate: urllib3 may wrap or close its own at any moment.
    """

    def __init__(self) -> None:
        self.is_cut = False
        # Whoever is interrupted while holding it may take it again.
        self._lock = threading.RLock()
        self._socket: Optional[socket.socket] = None
        self._pid = os.getpid()

    @property
    def is_held(self) -> bool:
        """Whether there is a socket."""
        return self._socket is not None

    def hold(self, descriptor: int) -> None:
        """Hold the socket of this descriptor, in place of the last."""
        self.let_go()
        with self._lock, contextlib.suppress(OSError):
            self._socket = socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)
        if self.is_cut:
            self.cut()

    def let_go(self) -> bool:
        """Hold nothing; whether it was never cut, so that the connection may be kept."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            return not self.is_cut

    def cut(self) -> None:
        """End all waiting on it, now and later."""
        if self._pid != os.getpid():
            return  # in a fork's child: it is the parent that waits
        with self._lock:
            self.is_cut = True
            if self._socket is None:
                return
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None


def release_frames(error: Optional[BaseException]) -> None:
    """Drop what the frames of a traceback hold, sockets among them.

    The libraries' frames and exceptions hold each other, which only the garbage collector ends,
    and until then a socket that failed in its TLS handshake stays open.
    """
    import traceback

    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


WORKING = threading.local()  # its "worker" is the Worker whose thread this is


class Worker:
    """The thread of one exchange: it sends the request, and reads a piece of the body when asked.

    It posts the Answer, then pieces, then None; or an exception instead of any of them. It shares
    only what is written in C with whoever waits, for the reason that ``start_thread`` gives.
    """

    def __init__(
        self,
        send: Callable[[], Answer],
        explain: Callable[[Exception], Exception],
    ) -> None:
        self.handle = SocketHandle()
        self.size = 0  # bytes of the body so far
        self.send_request = send
        self.explain = explain
        self.posted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_asked = True  # for the answer, at first

    def begin(self) -> None:
        """Start; MogplexError when the system has no thread to give."""
        start_thread(self.run)

    def take(self, wait_s: float) -> Any:
        """What it posts next, waited for so long; queue.Empty when nothing came."""
        if not self.is_asked:
            self.is_asked = True
            self.wanted.put(None)
        item = self.posted.get(timeout=wait_s)
        self.is_asked = False
        return item

    def leave(self) -> None:
        """End it, wherever it is; only a look-up of a host name cannot be ended."""
        self.handle.cut()
        self.wanted.put(None)

    def run(self) -> None:
        """The thread's own part."""
        WORKING.worker = self
        answer = None
        try:
            answer = self.send_request()
            # Those of a given session do not tell of their sockets themselves.
            if not self.handle.is_held:
                self.handle.hold(answer.descriptor())
            self.posted.put(answer)
            self._read(answer)
        except Exception as error:
            explained = self.explain(error)
            release_frames(error)
            self.posted.put(explained)
        finally:
            if answer is not None:
                answer.close()
            self.handle.let_go()

    def _read(self, answer: Answer) -> None:
        pieces = filter(None, answer.pieces())
        while True:
            self.wanted.get()
            if self.handle.is_cut:
                return
            piece = next(pieces, None)
            if piece is None:
                if self.handle.let_go():
                    answer.keep()
                self.posted.put(None)
                return
            self.size += len(piece)
            self.posted.put(piece)


def may_hide_secrets(text: str) -> bool:
    """Whether JSON can hold a text that is another one once it is decoded and sanitized."""
    return "\\u" in text or not text.isascii() or not text.isprintable()


def without_hidden_secrets(data: Any, clean: Callable[[str], str]) -> Any:
    """``data`` without what ``clean`` hides, also where invisible characters had split it.

    Colours in a log do that, and taking them out would join it again.
    """
    if isinstance(data, str):
        joined = INVISIBLES.sub("", ESCAPE_SEQUENCES.sub("", data))
        cleaned = clean(joined)
        return data if cleaned == joined else cleaned
    if isinstance(data, list):
        return [without_hidden_secrets(item, clean) for item in data]
    if isinstance(data, dict):
        shown = {}
        for key, value in data.items():
            shown[without_hidden_secrets(key, clean)] = without_hidden_secrets(
                value, clean
            )
        return shown
    return data


def do_nothing() -> None:
    """The tick of an exchange that nobody watches."""


def as_it_is(error: MogplexError) -> MogplexError:
    """The ``refusal`` of most requests: it knows no better error."""
    return error


class Exchange:
    """One request and its answer, on a thread of its own; used in a ``with`` statement.

    Whoever waits can leave at any moment: the HTTP library has no limit for a whole exchange,
    and a silent DNS look-up under it cannot be interrupted. ``tick`` is called before each
    wait, and at least every quarter of a second; it may raise. All text is redacted by ``clean``.
    """

    def __init__(
        self,
        request: Request,
        worker: Worker,
        tick: OnWait,
        clean: Callable[[str], str],
        report: Callable[[str, int, float, int], None],
    ) -> None:
        self.url = request.url
        self.status = 0
        self.headers: Any = {}
        self.clean = clean
        self._request = request
        self._worker = worker
        self._tick = tick
        self._report = report
        self._started = time.monotonic()

    def __enter__(self) -> Exchange:
        try:
            self._worker.begin()
            answer = self._in_time()
            self.url = answer.url
            self.status = answer.status
            self.headers = self._clean_headers(answer.headers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.leave()
        took_s = time.monotonic() - self._started
        self._report(self.url, self.status, took_s, self._worker.size)

    def _clean_headers(self, headers: Any) -> Any:
        together = "\n".join(headers.values())
        # Nearly always, and quicker than one by one.
        if without_hidden_secrets(together, self.clean) == together:
            return headers
        cleaned = headers.copy()
        for name, value in headers.items():
            cleaned[name] = without_hidden_secrets(value, self.clean)
        return cleaned

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        if self.status != 200:
            return False
        media_type: str = self.headers.get("Content-Type", "").partition(";")[0]
        return media_type.strip().lower() == STREAM_TYPE

    def text(self) -> str:
        """The whole body, invalid UTF-8 replaced, redacted; within the limits of time and size."""
        body = bytearray()
        while True:
            piece = self._in_time()
            if piece is None:
                return self.clean(body.decode("utf-8-sig", "replace"))
            body += piece
            if len(body) > MAX_BODY:
                message = f"refused a response of over {MAX_BODY >> 20} MiB"
                raise InvalidResponseError(message, code="TOO_LARGE", delivered=True)

    def data(self) -> Json:
        """The ``data`` of a good answer; the MogplexError that any other one means."""
        data: Json = self.envelope()["data"]
        return data

    def envelope(self) -> Json:
        """A good answer, whole: ``{"ok": true, "data": ...}``; else the MogplexError it means."""
        location = self.headers.get("Location") or ""
        url = self.clean(self.url)
        if 300 <= self.status < 400 and location:  # whose body nobody wants
            raise redirect_error(url, self.status, location)
        text = self.text()
        expected = self._request.expects
        if expected.any_data and self.status == 204:
            return {"ok": True, "data": None}
        answer: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = self._clean_joined(parse_json(text), text)
        data = None
        is_good = False
        if isinstance(answer, dict) and answer.get("ok") is True:
            data = answer.get("data")
            is_good = isinstance(data, dict) or (expected.any_data and "data" in answer)
        if not 200 <= self.status < 300 or not is_good:
            raise answer_error(url, self.status, self.headers, answer, len(text))
        problem = misfit(data, expected)
        if problem:
            message = f"unexpected response: {problem}"
            raise InvalidResponseError(
                message, status=self.status, delivered=True, transient=True
            )
        whole: Json = answer
        return whole

    def clean_json(self, text: str) -> str:
        """JSON that has passed ``clean``, without a token that escapes hide; "" for nonsense."""
        try:
            data = parse_json(text)
            shown = self._clean_joined(data, text)
            if shown == data:
                return text
            return to_json(shown)
        except (ValueError, RecursionError):
            return ""

    def _clean_joined(self, data: Any, text: str) -> Any:
        if not may_hide_secrets(text):
            return data
        return without_hidden_secrets(data, self.clean)

    def piece(self, idle_s: float) -> Optional[bytes]:
        """The next piece of the body, None at its end, b"" when nothing came for ``idle_s``.

        Not redacted: a token may stand across two pieces. Give what is made of them to ``clean``.
        """
        piece: Optional[bytes] = self._next(time.monotonic() + idle_s)
        return piece

    def _in_time(self) -> Any:
        limit_s = self._request.limits.total_s
        item = self._next(self._started + limit_s)
        if item == b"":
            message = f"no complete answer within {limit_s:g} s"
            raise UnavailableError(
                message, code="UNAVAILABLE", delivered=True, transient=True
            )
        return item

    def _next(self, until: float) -> Any:
        """What the thread posts next, b"" when that is nothing; an exception is raised."""
        while True:
            self._tick()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return b""
            with contextlib.suppress(queue.Empty):
                item = self._worker.take(min(LONGEST_WAIT_S, left_s))
                if isinstance(item, Exception):
                    raise item
                return item


class HeldConnection:
    """Mixed into urllib3's connections: tells the Worker that uses one which socket it waits on."""

    sock: Any

    def _new_conn(self) -> Any:
        """A new socket, before any TLS or tunnel is on it."""
        sock = super()._new_conn()  # type: ignore[misc]
        self._hold(sock)
        return sock

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        """Called first for each request; on a kept connection there is a socket already."""
        if self.sock is not None:
            self._hold(self.sock)
        super().putrequest(*args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _hold(sock: Any) -> None:
        worker = getattr(WORKING, "worker", None)
        if worker is not None:  # an embedder's session can be used elsewhere too
            worker.handle.hold(sock.fileno())


@functools.lru_cache(None)
def held_pool(kind: Any) -> Any:
    """A subclass of one of urllib3's pools, whose connections are HeldConnections."""
    if issubclass(kind.ConnectionCls, HeldConnection):
        return kind
    connection = type("Connection", (HeldConnection, kind.ConnectionCls), {})
    return type("Pool", (kind,), {"ConnectionCls": connection})


def hold_connections(manager: Any) -> Any:
    """Make one of urllib3's pool managers use held pools."""
    kinds = {}
    for scheme, kind in manager.pool_classes_by_scheme.items():
        kinds[scheme] = held_pool(kind)
    manager.pool_classes_by_scheme = kinds
    return manager


# Two threads that import a large package at once can each be given half of it (seen on Python 3.8).
IMPORTING = threading.Lock()


def import_requests() -> Any:
    """The package; MogplexError when it is missing."""
    try:
        with IMPORTING:
            import requests
            import requests.adapters
    except ImportError:
        hint = "install it: python3 -m pip install requests"
        raise MogplexError("the package 'requests' is missing", hint=hint) from None
    return requests


def new_session() -> Any:
    """A session that sends nothing of its own accord: no ~/.netrc, no cookie, no proxy."""
    import http.cookiejar

    requests = import_requests()

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc, name-defined]
        """The usual adapter, with HeldConnections."""

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            hold_connections(self.poolmanager)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            return hold_connections(super().proxy_manager_for(*args, **kwargs))

    session = requests.Session()
    session.trust_env = False
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    session.mount("https://", Adapter())
    session.mount("http://", Adapter())
    return session


class Stamp:
    """Puts our headers on a request of requests, and takes its answer as soon as it is there.

    As its "auth", even without a token: else requests asks ~/.netrc for one, and refuses some
    legal header values. With a hook, before requests parses a redirect's target and reads
    its whole body into memory, though redirects are not followed.
    """

    def __init__(self, headers: Headers) -> None:
        self.answer: Optional[Answer] = None
        self._headers = headers

    def __call__(self, prepared: Any) -> Any:
        # A given session may have one of its own.
        prepared.headers.pop("Authorization", None)
        prepared.headers.update(self._headers)
        prepared.register_hook("response", self.take)
        return prepared

    def take(self, response: Any, **_: Any) -> Any:
        """Called with the answer as it arrives."""
        self.answer = Answer(response)
        if "Location" in response.headers:
            response.headers = response.headers.copy()
            del response.headers["Location"]
        return response


class Transport:
    """Sends a Request, and hands back its Answer; blocks meanwhile. Keeps connections.

    ``session`` is the embedder's, whose proxies, certificates and adapters are its own affair,
    or None. After a fork the child begins with connections and a lock of its own.
    """

    def __init__(self, session: Any, verify: Union[bool, str], trust_env: bool) -> None:
        self.clock = time.monotonic
        self._given = session
        self._verify = verify
        self._trust_env = trust_env
        self._session = session
        self._lock = threading.Lock()
        self._used_at = 0.0
        self._pid = os.getpid()

    def send(self, request: Request, token: str) -> Answer:
        """The answer to ``request``, sent with ``token`` if any; any exception of requests."""
        headers = dict(request.headers)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        stamp = Stamp(headers)
        limits = request.limits
        read_s = max(limits.total_s, limits.idle_s + LONGEST_WAIT_S)
        response = self._take_session().request(
            request.method,
            request.url,
            data=request.body,
            auth=stamp,
            timeout=(limits.connect_s, read_s),
            allow_redirects=False,
            stream=True,
            **self._settings(request.url),
        )
        answer = stamp.answer or Answer(response)
        try:
            answer.pass_over_interim()
        except BaseException:
            answer.close()
            raise
        return answer

    def explain(self, request: Request, error: Exception) -> Exception:
        """The MogplexError that an exception of ``send``, or of reading the body, means."""
        if isinstance(error, MogplexError):
            return error
        limit_s = request.limits.total_s
        return transport_error(error, limit_s, self._proxy(request.url))

    def rest(self) -> None:
        """Note that an exchange is over: its connection is idle from now on."""
        self._used_at = self.clock()

    def close(self) -> None:
        """Close the kept connections; those of a given session are the giver's."""
        self._notice_fork()
        with self._lock:
            if self._given is None and self._session is not None:
                self._session.close()
                self._session = None

    def _take_session(self) -> Any:
        self._notice_fork()
        with self._lock:
            idle_s = self.clock() - self._used_at
            if self._session is None:
                self._session = new_session()
            elif self._given is None and idle_s > KEEP_ALIVE_S:
                self._session.close()  # its idle connections; the session goes on working
            self._used_at = self.clock()
            return self._session

    def _notice_fork(self) -> None:
        """Leave the connections to the parent: a child that used them too would get its answers."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._lock = threading.Lock()  # a thread that held it is the parent's
        self._session = self._given
        if self._given is not None:
            self._given.close()  # the child's copies of its idle connections

    def _settings(self, url: str) -> Json:
        """Proxies and certificates for requests; a given session has its own, unless asked."""
        settings: Json = {}
        if self._given is None or self._verify is not True:
            settings["verify"] = self._verify
        if self._trust_env:
            settings["proxies"] = self._proxies(url)
        return settings

    def _proxies(self, url: str) -> Dict[str, str]:
        """Those of the environment; none on the way to this machine."""
        if not self._trust_env or is_loopback(split_url(url).hostname):
            return {}
        return dict(import_requests().utils.get_environ_proxies(url))

    def _proxy(self, url: str) -> str:
        """The proxy on the way to ``url``, without its password; "" for none."""
        proxies = self._proxies(url)
        if self._given is not None:
            proxies = {**self._given.proxies, **proxies}
        proxy = import_requests().utils.select_proxy(url, proxies) or ""
        return sanitize(re.sub(r"(//|^)[^/]*@", r"\1", proxy))


def mcp_server_kind(config: Json) -> str:
    """How an MCP server is reached: "http", "stdio", or "" when its config does not tell."""
    if text_of(config, "url"):
        return "http"
    if text_of(config, "command"):
        return "stdio"
    return ""


class Client:
    """The hosted API: one method per route, each returning plain dicts as the service sent them.

    ``token`` is a string, or a Credential that renews itself. Every request sends it to
    ``base_url`` alone: https, or http to this machine. Failures are MogplexErrors: UsageError
    for such a URL, UnauthorizedError, ForbiddenError, RateLimitedError, UnavailableError (no
    answer, or one like 502 to 504), InvalidResponseError (which includes another run's answer,
    and one without its list or object), and the base class for the rest. No error and no
    answer holds the token. A request takes at most ``timeout_s`` in all, and up to ``tries``
    tries. ``trust_env`` lets proxies come from the environment; ``verify`` is a file or
    directory of CAs, as for requests; a ``session`` of requests keeps its own. ``log`` gets a
    line per request. It can be used from several threads, on both sides of a fork, and in a
    ``with`` statement.
    """

    def __init__(
        self,
        token: Union[str, Credential],
        base_url: str = DEFAULT_URL,
        *,
        session: Any = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        tries: int = 3,
        trust_env: bool = False,
        verify: Union[bool, str] = True,
        log: Optional[Callable[[str], None]] = None,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random_unit,
    ) -> None:
        self.base_url = parse_base_url(base_url, allow_http=True, source="base_url")
        if isinstance(token, Credential):
            self.credential = token
        else:
            self.credential = Credential(token)
        self.transport = Transport(session, verify, trust_env)
        self._limits = Limits(timeout_s, connect_timeout_s)
        self._tries = tries
        self._log = log
        self._sleep = sleep
        self._random = random

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that were kept; those of a session given to us are the giver's.

        Waits up to 5 s for a refresh of the credential that is under way.
        """
        self.credential.settle()
        self.transport.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Optional[Params] = None,
        body: Optional[Json] = None,
        idempotency_key: str = "",
    ) -> Json:
        """Any route, ``path`` being what follows ``/api/v1/mogplex``: the ``data`` of its answer.

        Sent again after a fault where that does no harm: a GET, PUT or DELETE, or a POST with a
        key to one of the two routes that honour it, ``/runs`` and ``/automations/{id}/trigger``.
        """
        request = self._api_request(
            method, checked_path(path), params, body, idempotency_key
        )
        return self._answered(request)

    def envelope(
        self,
        method: str,
        path: str,
        *,
        query: str = "",
        body: Optional[Json] = None,
        idempotency_key: str = "",
    ) -> Json:
        """As ``request``, but the answer whole, ``{"ok": true, "data": ...}``, with any data.

        ``query`` is percent-encoded already. ``data`` is None after a 204.
        """
        key = checked_key(idempotency_key) if idempotency_key else ""
        request = self._api_request(method, checked_path(path), None, body, key)
        if query:
            request = request._replace(url=f"{request.url}?{query}")
        return self._answered_whole(request.expecting(any_data=True))

    def repos(
        self,
        query: str = "",
        repo_id: str = "",
        limit: Optional[int] = None,
    ) -> List[Repo]:
        """GET /repos, by name; ``query`` is part of one, in which ``_`` and ``%`` are wildcards."""
        params = {"q": query, "id": repo_id, "limit": limit}
        return cast("List[Repo]", self._listed("repos", "/repos", params))

    def sandboxes(
        self,
        repo_id: str = "",
        status: str = "",
        limit: Optional[int] = None,
    ) -> List[Sandbox]:
        """GET /sandboxes, newest activity first."""
        params = {"repo_id": repo_id, "status": status, "limit": limit}
        return cast("List[Sandbox]", self._listed("sandboxes", "/sandboxes", params))

    def sandbox_logs(self, sandbox_id: str) -> Json:
        """GET /sandboxes/{id}/logs: ``{sandbox: {install_log, dev_log}, lifecycle_events}``."""
        request = self._api_request(
            "GET", f"/sandboxes/{path_segment(sandbox_id)}/logs"
        )
        expected = request.expecting(objects=("sandbox",), lists=("lifecycle_events",))
        return self._answered(expected)

    def create_sandbox(self, body: Json) -> Sandbox:
        """POST /sandboxes: the sandbox.

        ``body`` holds repoId, baseBranch, workingBranch, createBranch, rootDirectory. Never
        sent twice: the service takes no idempotency key for it.
        """
        request = self._api_request("POST", "/sandboxes", body=body)
        data = self._answered(request.expecting(objects=("sandbox",)))
        return cast(Sandbox, dict_of(data, "sandbox"))

    def stop_sandbox(self, sandbox_id: str) -> Json:
        """POST /sandboxes/{id}/stop, a route yet to come: InvalidResponse or 404 until then."""
        request = self._api_request(
            "POST", f"/sandboxes/{path_segment(sandbox_id)}/stop"
        )
        return self._answered(request._replace(repeatable=True))

    def start_run(self, body: Json, idempotency_key: str) -> Run:
        """POST /runs: the Run, and ``replayed``.

        ``body`` holds repoId and prompt, and harness, baseBranch, workingBranch, createBranch,
        rootDirectory where wanted. What failed may be repeated under the same key, and must
        not be under another one when the error says ``delivered``.
        """
        key = checked_key(idempotency_key)
        request = self._api_request("POST", "/runs", body=body, key=key)
        refusal = functools.partial(self._start_refusal, text_of(body, "repoId"))
        run = self._answered(request, refusal)
        if not text_of(run, "runId"):  # and asking again would not make one
            raise InvalidResponseError(
                "unexpected response: no 'runId'", delivered=True
            )
        return cast(Run, run)

    def run(self, run_id: str) -> Run:
        """GET /runs/{id}: the Run."""
        return cast(Run, dict_of(self._answered(self._run_request(run_id)), "run"))

    def events(self, run_id: str, limit: Optional[int] = None) -> RunEvents:
        """GET /runs/{id}/events: ``{run, events}``, the first ``limit`` (at most 200) events."""
        return cast(RunEvents, self._answered(self._events_request(run_id, limit)))

    def cancel(self, run_id: str) -> Cancellation:
        """POST /runs/{id}/cancel, safe to repeat: ``{run, status, alreadyTerminal}``."""
        request = self._api_request("POST", f"/runs/{path_segment(run_id)}/cancel")
        repeatable = request._replace(repeatable=True)
        return cast(
            Cancellation, self._answered(repeatable.expecting(run_id=run_id.strip()))
        )

    def agents(self) -> List[Json]:
        """GET /agents."""
        return self._listed("agents", "/agents")

    def models(self) -> List[Json]:
        """GET /models."""
        return self._listed("models", "/models")

    def mcp_servers(self) -> List[Json]:
        """GET /mcp/servers: name, enabled and kind ("http", "stdio" or "") of each.

        Its ``config`` holds live secrets, and is left here.
        """
        return [
            {
                "name": server.get("name"),
                "enabled": server.get("enabled"),
                "kind": mcp_server_kind(dict_of(server, "config")),
            }
            for server in self._listed("servers", "/mcp/servers")
        ]

    def post_form(self, url: str, form: Dict[str, str]) -> Tuple[int, Json]:
        """POST a form without our token: (HTTP status, JSON object or {}); errors as elsewhere."""
        request = Request(
            "POST",
            parse_base_url(url, allow_http=True, source="URL"),
            request_headers(Content_Type=FORM_TYPE),
            self._limits,
            body=urllib.parse.urlencode(form).encode(),
            authorized=False,
        )
        try:
            with self._open(request) as exchange:
                text = exchange.text()
        except MogplexError as error:
            error.delivered = False  # the request that waits for this one was not sent
            raise
        # Plain text, and its wait under another name than the API's.
        if exchange.status == 429:
            headers = exchange.headers
            asked_s = parse_retry_after(
                headers.get("X-Retry-After"), headers.get("Date")
            )
            raise RateLimitedError(
                "too many sign-ins", status=429, retry_after_s=asked_s, transient=True
            )
        with contextlib.suppress(ValueError):
            answer = parse_json(text)
            if isinstance(answer, dict):
                return exchange.status, answer
        return exchange.status, {}

    def open_run(self, run_id: str, tick: OnWait, renew: bool = True) -> Exchange:
        """One GET /runs/{id}, not sent again, for a tail; ``tick`` is called while it takes.

        A refused token is renewed where ``renew`` says so.
        """
        request = self._run_request(run_id)
        return self._open(request._replace(renews=renew), tick)

    def open_events(
        self,
        run_id: str,
        tick: OnWait,
        renew: bool,
        limit: int,
        last_event_id: str,
        idle_s: float,
    ) -> Exchange:
        """The same for a run's events, as a stream if the service offers one.

        That resumes after ``last_event_id``, and may be silent for ``idle_s``.
        """
        # A str would be sent as Latin-1.
        resume_at = last_event_id.encode("utf-8", "replace")
        if len(resume_at) > MAX_EVENT_ID:
            resume_at = b""
        request = self._events_request(run_id, limit)
        request = request._replace(
            headers=request_headers(
                Accept=f"{STREAM_TYPE}, {JSON_TYPE}", Last_Event_ID=resume_at
            ),
            limits=request.limits._replace(idle_s=idle_s),
            renews=renew,
        )
        return self._open(request, tick)

    def _api_request(
        self,
        method: str,
        path: str,
        params: Optional[Params] = None,
        body: Any = None,
        key: str = "",
    ) -> Request:
        """A request to the API, and whether it is repeatable by its method or its key."""
        limits = self._limits
        if (method, path) == ("POST", "/sandboxes"):
            limits = limits._replace(total_s=max(limits.total_s, LAUNCH_S))
        content = None
        content_type = ""
        if body is not None:
            content = json_body(body)
            content_type = JSON_TYPE
        return Request(
            method,
            with_query(self.base_url + API_PATH + path, params or {}),
            request_headers(Content_Type=content_type, Idempotency_Key=key),
            limits,
            body=content,
            repeatable=method in REPEATABLE_METHODS
            or (key != "" and honours_key(method, path)),
        )

    def _run_request(self, run_id: str) -> Request:
        request = self._api_request("GET", f"/runs/{path_segment(run_id)}")
        return request.expecting(objects=("run",), run_id=run_id.strip())

    def _events_request(self, run_id: str, limit: Optional[int]) -> Request:
        path = f"/runs/{path_segment(run_id)}/events"
        request = self._api_request("GET", path, params={"limit": limit})
        return request.expecting(lists=("events",), run_id=run_id.strip())

    def _listed(self, key: str, path: str, params: Params = {}) -> List[Json]:
        """The objects of the list that a route answers under ``key``."""
        request = self._api_request("GET", path, params)
        data = self._answered(request.expecting(lists=(key,)))
        return dicts_of(data, key)

    def _open(
        self, request: Request, tick: OnWait = do_nothing, attempt: int = 1
    ) -> Exchange:
        """An exchange, not begun yet. Its time includes a renewal of the credential."""
        send = functools.partial(self._send_renewing, request)
        explain = functools.partial(self._explain, request)
        worker = Worker(send, explain)
        report = functools.partial(self._report, request.method, attempt)
        clean: Callable[[str], str] = self._clean
        if not request.authorized:
            clean = str  # a sign-in's answer holds tokens, and is shown to nobody
        return Exchange(request, worker, tick, clean, report)

    # The four rules around the transport; the first three run on the worker's thread.

    def _token_for(self, request: Request) -> str:
        """Rule 1, the token: renewed first when it is about to end; "" for what sends none."""
        if not request.authorized:
            return ""
        return self.credential.current(self.post_form)

    def _send_redirected(self, request: Request, token: str) -> Answer:
        """Rule 2, redirects: one is followed, between the two hosts of the service."""
        answer = self.transport.send(request, token)
        location = answer.headers.get("Location") or ""
        target = redirect_target(answer.url, answer.status, location)
        if not target:
            return answer
        answer.close()
        return self.transport.send(request._replace(url=target), token)

    def _send_renewing(self, request: Request) -> Answer:
        """Rule 3, renewal: a refused token is renewed once, and the request sent again."""
        token = self._token_for(request)
        answer = self._send_redirected(request, token)
        if answer.status != 401 or not token or not request.renews:
            return answer
        try:
            renewed = self.credential.renew(token, self.post_form)
        except BaseException:
            answer.close()
            raise
        if not renewed:
            return answer
        answer.close()
        return self._send_redirected(request, self.credential.token)

    def _answered(
        self,
        request: Request,
        refusal: Callable[[MogplexError], MogplexError] = as_it_is,
    ) -> Json:
        """The data of the answer to ``request``, by rule 4."""
        data: Json = self._answered_whole(request, refusal)["data"]
        return data

    def _answered_whole(
        self,
        request: Request,
        refusal: Callable[[MogplexError], MogplexError] = as_it_is,
    ) -> Json:
        """Rule 4, retries: the first good answer; what is not repeatable is sent once.

        Errors are ``delivered`` when any try may have been. ``refusal`` may know a better error
        than that of the first try which may have arrived.
        """
        tries = self._tries if request.repeatable else 1
        arrived = False
        attempt = 1
        while True:
            try:
                with self._open(request, attempt=attempt) as exchange:
                    return exchange.envelope()
            except MogplexError as error:
                failure = error
            if not arrived:
                failure = refusal(failure)
            arrived = arrived or failure.delivered
            failure.delivered = arrived
            tries = tries_after(failure, attempt, tries, request.keyed)
            if not should_retry(failure, attempt, tries, request.keyed):
                raise failure
            self._sleep(retry_delay_s(failure, attempt, self._random()))
            attempt += 1

    def _start_refusal(self, repo_id: str, error: MogplexError) -> MogplexError:
        """A better error for a start than ``error``, where a 503 means that there is no such repo.

        The service answers so to an unknown id. An empty list is what suggests it: retrying a
        typing error for ever is the trap. It proves nothing where the start may have got through,
        as behind a proxy, whose own 503 is not in the service's envelope.
        """
        if error.status != 503 or not error.code:
            return error
        request = self._api_request("GET", "/repos", params={"id": repo_id})
        once = request._replace(repeatable=False)
        try:
            known = self._answered(once.expecting(lists=("repos",)))["repos"]
        except MogplexError:
            return error
        if known:
            return error
        return unknown_repo(repo_id, status=503)

    def _clean(self, text: str) -> str:
        """``text`` without our tokens: whatever comes from outside passes here before it is cut."""
        return redact(text, *self.credential.secrets)

    def _explain(self, request: Request, error: Exception) -> Exception:
        """The MogplexError for an exception of the worker, without our tokens."""
        explained = self.transport.explain(request, error)
        if isinstance(explained, MogplexError):
            explained.message = self._clean(explained.message)[:1000]
            explained.hint = self._clean(explained.hint)
            explained.args = (explained.message,)
        return explained

    def _report(
        self,
        method: str,
        attempt: int,
        url: str,
        status: int,
        took_s: float,
        size: int,
    ) -> None:
        """An exchange is over."""
        self.transport.rest()
        if self._log is None:
            return
        outcome = status or "no answer"
        line = f"{method} {url} {outcome} {took_s * 1000:.0f} ms {size} bytes try {attempt}"
        self._log(self._clean(line))


def start_recorded(
    client: Client,
    home: Home,
    body: Json,
    key: str,
    repo: str,
    announce: Callable[[Run], None],
    before_sending: Callable[[], None] = do_nothing,
    send: Optional[Callable[[], Run]] = None,
) -> Run:
    """Start a run so that no death of this process loses it.

    The start is written down, sent, told, and its id written down: ``announce`` gets the Run
    before anything that can wait or fail. A start that the service refuses for good is taken
    away again, and so is one that ``before_sending`` stops: writing it down may have taken 5 s.
    ``send`` stands in for ``Client.start_run``. Errors are those of what it calls.
    """
    start = start_record(client.base_url, body, key, repo)
    home.record_start(start)
    try:
        before_sending()
    except BaseException:
        home.forget_start(start)
        raise
    try:
        run = send() if send else client.start_run(body, key)
    except MogplexError as error:
        if not error.delivered:
            home.forget_start(start)
        raise
    try:
        announce(run)
    finally:
        home.record_run(start, run)
    return run


# ---------------------------------------------------------------- 5. Tail

POLL_S = 1.5  # between the starts of two polls of a run that has news
QUIET_POLL_S = 4.0  # of one without, in the end
SLOWEST_POLL_S = 30.0  # after 429s
IDLE_S = 30.0  # a stream that brings no event for so long is left, and the run asked
GOOD_STREAM_S = 10.0  # comments alone for so long are a good answer too
GIVE_UP_S = 300.0  # without a good answer
NEW_RUN_S = 10.0  # in which the service may not know a run that it has just started
LATE_EVENT_S = (
    5.0  # by which the event that says why a run failed may be behind its status
)
# One of these types comes at a run's end.
LAST_EVENTS = ("finished", "failed", "cancelled")
REMEMBERED_EVENTS = 50_000  # at least so many are recognized when they come again

Clock = Callable[[], float]
# The parts of a ServerSentEvent: event, id, data, retry.
_Block = Tuple[str, str, List[str], Optional[int]]


class ServerSentEvent:
    """One event of a stream.

    ``event`` is its type, ``id`` the last event id at that moment, ``retry`` the milliseconds
    that its own block asks for, if any.
    """

    # A NamedTuple takes twice the time to make.
    __slots__ = ("event", "id", "data", "retry")

    def __init__(self, event: str, id: str, data: str, retry: Optional[int]) -> None:
        self.event = event
        self.id = id
        self.data = data
        self.retry = retry

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __repr__(self) -> str:
        return f"ServerSentEvent({self.event!r}, {self.id!r}, {self.data!r}, {self.retry!r})"


class SSEDecoder:
    """Bytes of a ``text/event-stream`` to events, by section 9.2.6 of the WHATWG HTML standard.

    ``last_event_id`` is what to resume with, ``retry_ms`` the reconnection time in force as the
    server gave it, ``held`` the bytes of the unfinished last block, which is never given out.
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry_ms: Optional[int] = None
        self.held = 0
        self._line = bytearray()  # one without its end yet
        self._block: _Block = ("", last_event_id, [], None)
        self._after_cr = False  # a LF at the start of the next chunk belongs to that CR
        self._at_start = True  # where a byte order mark is dropped

    def feed(self, chunk: bytes) -> List[ServerSentEvent]:
        """The events that ``chunk`` completes."""
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        self.held += len(chunk)
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines, newline, rest = chunk.rpartition(b"\n")
        if not newline:
            self._line += chunk
            return []
        if self._line:
            lines = bytes(self._line) + lines
            self._line.clear()
        self._line += rest
        if self._at_start:
            self._at_start = False
            if lines.startswith(b"\xef\xbb\xbf"):
                lines = lines[3:]
        # Not splitlines, which on str splits at VT, FF, FS, NEL, U+2028 and more.
        return self._read(lines.decode("utf-8", "replace").split("\n"))

    def _read(self, lines: List[str]) -> List[ServerSentEvent]:
        events: List[ServerSentEvent] = []
        kind, identifier, data, retry = self._block
        for line in lines:
            name, space, value = line.partition(": ")
            if not space or ":" in name:
                name, _, value = line.partition(":")
            if name == "data":
                data.append(value)
            elif not line:
                self.last_event_id = identifier
                self.held = len(self._line)
                if data:
                    text = "\n".join(data)
                    events.append(
                        ServerSentEvent(kind or "message", identifier, text, retry)
                    )
                kind = ""
                data = []
                retry = None
            elif name == "id":
                if "\0" not in value:
                    identifier = value
            elif name == "event":
                kind = value
            elif name == "retry" and value.isascii() and value.isdigit():
                # Python refuses to convert thousands of digits; hundreds are for ever, too.
                retry = self.retry_ms = int(value.lstrip("0")[:600] or "0")
        self._block = (kind, identifier, data, retry)
        return events


class Delivery(NamedTuple):
    """What the events of a run tell of its branch, and of what it has delivered there."""

    branch: str = (
        ""  # the one really pushed; ``run.branch.working`` can still say "main"
    )
    pull_request_url: str = ""
    changed: bool = False  # the branch has something to continue from

    def then(self, later: Delivery) -> Delivery:
        """What both tell; the later one counts."""
        return Delivery(
            later.branch or self.branch,
            later.pull_request_url or self.pull_request_url,
            later.changed or self.changed,
        )


def delivery_of(event: Record) -> Optional[Delivery]:
    """The delivery told by a git_sync or git_delivery event; None for every other event."""
    payload = event.get("payload")
    if not isinstance(payload, dict) or "stage" not in payload:
        return None
    if text_of(payload, "stage") not in ("git_sync", "git_delivery"):
        return None
    url = text_of(payload, "pull_request_url")
    changed = bool(url) or payload.get("changed") is True
    return Delivery(text_of(payload, "working_branch"), url, changed)


def failure_of(event: Record) -> str:
    """Why a run failed, as a finished or failed event tells it; "" when it does not.

    The harness's error where there is one; else its failure code and exit code.
    """
    if event.get("type") not in ("finished", "failed"):
        return ""
    payload = event.get("payload")
    error = text_of(payload, "error")
    if error:
        return error
    reasons = [text_of(payload, "failure_code")]
    exit_code = text_of(payload, "exit_code")
    if exit_code not in ("", "0"):
        reasons.append(f"exit code {exit_code}")
    return ", ".join(filter(None, reasons))


def already_ended(answer: Cancellation) -> bool:
    """Whether the answer to a cancel says that the run had ended before.

    The service says ``alreadyTerminal``; its documents promise a ``status`` instead.
    """
    return (
        answer.get("alreadyTerminal") is True
        or answer.get("status") == "already_terminal"
    )


class Progress(NamedTuple):
    """How a tail stands: given before each wait, at least twice a second, and at each change.

    ``connection`` is connecting, connected, lost or limited (429). Times are of the tail's
    clock. ``message`` is a line worth saying, "" when there is nothing new.
    """

    connection: str
    status: str
    started_at: float
    last_event_at: float
    retry_at: Optional[float]
    failures: int
    message: str
    latency_ms: float
    run: Run
    branch: str = ""  # as of Delivery, so far
    pull_request_url: str = ""


OnProgress = Callable[[Progress], None]


class Verdict(NamedTuple):
    """How a run ended; ``truncated``: the service listed only its first events."""

    run_id: str
    status: str
    error: str
    working_branch: str
    pull_request_url: str
    truncated: bool
    duration_s: Optional[float]
    run: Run


# -- What is known of a run


class Seen:
    """The events seen so far: at least the last 50,000, so that memory has a bound.

    An event is known by its id. One without an id is known by its content and its number among
    the equal ones of an answer: two of them in one answer are two events, and the same two again
    in the next answer are not new.
    """

    def __init__(self) -> None:
        # Hashes: they take a third of the memory of the ids.
        self._recent: Set[int] = set()
        self._older: Set[int] = set()
        self._copies: Dict[bytes, int] = {}

    def begin_answer(self) -> None:
        """What comes from now on is of another answer."""
        self._copies.clear()

    def add(self, event: Json) -> bool:
        """Whether ``event`` is new; from now on it is not.

        InvalidResponseError when it has no id and is nested too deeply.
        """
        identifier = event.get("id")
        if not isinstance(identifier, str) or not identifier:
            identifier = self._key(event)
        key = hash(identifier)
        if key in self._recent or key in self._older:
            return False
        self._recent.add(key)
        if len(self._recent) >= REMEMBERED_EVENTS:
            self._older = self._recent
            self._recent = set()
            self._copies.clear()
        return True

    def _key(self, event: Json) -> object:
        """What tells an event apart whose id is no text."""
        identifier = event.get("id")
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            return str(identifier)
        try:
            text = to_json(event, sort_keys=True)
        except RecursionError:
            message = "an event is nested too deeply"
            raise InvalidResponseError(message, code="TOO_LARGE") from None
        content = hashlib.sha256(text.encode()).digest()
        copies = self._copies.get(content, 0) + 1
        self._copies[content] = copies
        return content, copies


class Ending:
    """Decides when a run with a terminal status has really ended.

    The last failed and cancelled events are written after the status, and a run that is cancelled
    while its sandbox starts can come alive again. So the end takes two terminal answers, an
    interval apart, and an event that says why the run failed, or 5 s more. A success whose
    finished event has come is complete at once.
    """

    def __init__(self, interval_s: float) -> None:
        self.is_near = False  # the last event is one of those that come at the end
        self.terminal_at: Optional[float] = None  # since when the status is terminal
        self._interval_s = interval_s
        self._status = ""
        self._confirmed_at: Optional[float] = None
        self._types: Set[str] = set()  # of LAST_EVENTS, those that have come
        # What may carry the run's error.
        self._texts: Deque[str] = collections.deque(maxlen=16)

    def hear_event(self, event: Json) -> None:
        """Take in a new event."""
        kind = event.get("type")
        self.is_near = kind in LAST_EVENTS
        if self.is_near:
            self._types.add(str(kind))
        message = event.get("message")
        if isinstance(message, str):
            self._texts.append(message[:4000])
        payload = event.get("payload")
        if isinstance(payload, dict) and "error" in payload:
            self._texts.append(text_of(payload, "error")[:4000])

    def hear_run(self, status: str, error: str, now: float) -> bool:
        """Take in what the run says of itself; whether that is its end."""
        if status not in TERMINAL_STATUSES:
            # Alive again: its events told of another end.
            if self.terminal_at is not None:
                self._types.clear()
            self.terminal_at = None
        elif status != self._status:
            self.terminal_at = now
            self._confirmed_at = None
        self._status = status
        if self.terminal_at is None:
            return False
        if status == "success" and "finished" in self._types:
            return True
        if self._confirmed_at is None:
            if now - self.terminal_at < 0.99 * self._interval_s:
                return False
            # A tail that shares its token with many may read again much later.
            self._confirmed_at = self.terminal_at + self._interval_s
        return (
            self._is_explained(error[:4000]) or now - self._confirmed_at >= LATE_EVENT_S
        )

    def _is_explained(self, error: str) -> bool:
        """Whether the events say why the run ended in ``error``, if it did."""
        if not error or "failed" in self._types or "cancelled" in self._types:
            return True
        return any(error in text for text in self._texts)


class Story:
    """What is known of one run, from its events and from what it says of itself.

    It alone decides what is new, when the run has ended, and the verdict. It does no I/O: it is
    told what was heard, and when.
    """

    def __init__(self, run_id: str, now: float, interval_s: float = POLL_S) -> None:
        self.run_id = run_id
        self.run: Json = {}  # as the service last told it
        self.delivery = Delivery()
        self.last_event_at = now
        self.truncated = False  # the service lists only its first events
        self.verdict: Optional[Verdict] = None
        self._seen = Seen()
        self._ending = Ending(interval_s)

    @property
    def status(self) -> str:
        """The run's last known status."""
        return text_of(self.run, "status")

    @property
    def is_terminal(self) -> bool:
        """Whether the run says that it has ended, which need not be the end."""
        return self._ending.terminal_at is not None

    @property
    def seems_over(self) -> bool:
        """Whether it is time to ask the run itself."""
        return self._ending.is_near or self.is_terminal

    def begin_answer(self) -> None:
        """What is heard from now on comes in another answer of the service."""
        self._seen.begin_answer()

    def hear_event(self, event: Json, now: float) -> bool:
        """Take in an event; whether it is new."""
        if not self._seen.add(event):
            return False
        self.last_event_at = now
        delivery = delivery_of(event)
        if delivery:
            self.delivery = self.delivery.then(delivery)
        self._ending.hear_event(event)
        return True

    def hear_run(self, run: Json, now: float) -> bool:
        """Take in what the run says of itself; whether its status is another one."""
        status = text_of(run, "status")
        if not status:
            return False
        changed = status != self.status
        self.run = run
        if self._ending.hear_run(status, text_of(run, "error"), now):
            self.verdict = self._conclude()
        return changed

    def hear_length(self, listed: int, limit: int) -> str:
        """Take in how many events of at most ``limit`` were listed; a line to say, or ""."""
        if self.truncated or listed < limit:
            return ""
        self.truncated = True
        if limit < MAX_LIMIT:
            return f"only the first {limit} events were asked for; later events are not shown"
        return (
            f"the service lists only the first {limit} events of a run; "
            "later events are not shown"
        )

    def _conclude(self) -> Verdict:
        started = parse_time(self.run.get("createdAt"))
        ended = parse_time(self.run.get("updatedAt"))
        duration_s = None
        if started is not None and ended is not None:
            duration_s = ended - started
        return Verdict(
            run_id=self.run_id,
            status=self.status,
            error=text_of(self.run, "error"),
            working_branch=self.delivery.branch,
            pull_request_url=self.delivery.pull_request_url,
            truncated=self.truncated,
            duration_s=duration_s,
            run=cast(Run, self.run),
        )


# -- How well the service answers


class Pace:
    """How long to wait between the starts of two polls.

    1.5 s; after 30 s without news a quarter more each time, up to 4 s, so that four tails of
    silent runs fit one token. After a 429 at least twice as long, and at least this tail's share
    of the token's 60 requests a minute, as far as its own requests in the last minute show it;
    then 2 % less with each success. With jitter, so that tails that share a token spread out.
    """

    def __init__(self, interval_s: float, now: float) -> None:
        self._base_s = interval_s
        self._quiet_s = interval_s  # grows while there is no news
        self._limited_s = 0.0  # 0 while the service refuses nothing
        self._news_at = now
        self._polls: List[float] = []

    def polled(self, now: float) -> None:
        """A request was sent."""
        self._polls = [at for at in self._polls if now - at < 60.0]
        self._polls.append(now)

    def refused(self) -> None:
        """It was answered 429."""
        share_s = 0.0
        if len(self._polls) > 4:  # fewer tell nothing
            share_s = 60.0 / (len(self._polls) - 1)
        slower_s = max(2 * self._limited_s, 2 * self._quiet_s, share_s)
        self._limited_s = min(SLOWEST_POLL_S, slower_s)

    def succeeded(self, news: bool, now: float) -> None:
        """It was answered."""
        self._limited_s *= 0.98
        if self._limited_s <= self._base_s:
            self._limited_s = 0.0
        if news:
            self._quiet_s = self._base_s
            self._news_at = now
        elif now - self._news_at >= 30.0:
            self._quiet_s = min(max(QUIET_POLL_S, self._base_s), self._quiet_s * 1.25)

    def interval_s(self, random: float) -> float:
        """The time from the start of the last poll to the next."""
        limited_s = self._limited_s * (1 + random / 4)
        return max(self._quiet_s, min(SLOWEST_POLL_S, limited_s))


def _wait_too_long(error: MogplexError, left_s: float) -> MogplexError:
    """The error for a wait that the service asks for and the time-out has no room for."""
    kind: Type[MogplexError] = UnavailableError
    if isinstance(error, RateLimitedError):
        kind = RateLimitedError
    asked = format_duration(error.retry_after_s or 0.0)
    message = (
        f"{error.message}; the service asks to wait {asked}, "
        f"and only {format_duration(left_s)} of the time-out is left"
    )
    return kind(
        message, code=error.code, status=error.status, retry_after_s=error.retry_after_s
    )


class Patience:
    """Decides when to give up on a service that gives no good answer.

    Before the first good answer there are three tries, for errors that may pass. After it, errors
    are ridden out for 300 s; time that the service asked to wait, or that the machine slept, does
    not count. Only a refusal in the service's own envelope is final then. A 401 is not: for a
    token that has worked, it is more likely an outage. Nor is a 404 within 10 s of our own start.
    """

    def __init__(self, now: float, just_started: bool) -> None:
        self._opened_at = now
        self._just_started = just_started
        self._good_at: Optional[float] = None  # moved on by time that does not count
        if just_started:
            self._good_at = now  # the start was answered
        self._failures = 0
        self._only_limited = True  # all failures since the last good answer were 429s

    def good(self, now: float) -> None:
        """A good answer came."""
        self._good_at = now
        self._failures = 0
        self._only_limited = True

    def excuse(self, seconds: float) -> None:
        """This time does not count."""
        if self._good_at is not None:
            self._good_at += seconds

    def check(self, error: MogplexError, now: float, left_s: float) -> None:
        """Return if the request is worth repeating after ``error``; else raise what ends the tail.

        ``left_s`` is what is left of the tail's time-out.
        """
        self._failures += 1
        if not isinstance(error, RateLimitedError):
            self._only_limited = False
        if self._is_final(error, now):
            raise error
        if (error.retry_after_s or 0.0) > left_s:
            raise _wait_too_long(error, left_s) from error
        if self._good_at is not None and now - self._good_at >= GIVE_UP_S:
            raise self._give_up(error, now - self._good_at) from error

    def _is_final(self, error: MogplexError, now: float) -> bool:
        if error.code == "TOO_LARGE":
            return True
        if self._good_at is None:
            return not error.transient or self._failures >= 3
        if isinstance(error, UnauthorizedError):
            # No request was sent: the sign-in itself has expired.
            return error.status == 0
        if error.status in (408, 425, 429):
            return False
        if (
            error.status == 404
            and self._just_started
            and now - self._opened_at < NEW_RUN_S
        ):
            return False
        has_envelope = bool(error.code)  # one without comes from a proxy, or a CDN
        return has_envelope and 400 <= error.status < 500

    def _give_up(self, error: MogplexError, waited_s: float) -> MogplexError:
        kind: Type[MogplexError] = UnavailableError
        if isinstance(error, UnauthorizedError):
            kind = UnauthorizedError
        elif self._only_limited:
            kind = RateLimitedError
        message = f"gave up after {waited_s:.0f} s without a good answer; the last error: {error}"
        return kind(message, code="GAVE_UP", retry_after_s=error.retry_after_s)


def trouble_of(error: MogplexError) -> str:
    """What kind of trouble ``error`` is, of those that a tail rides out."""
    if isinstance(error, RateLimitedError):
        return "rate limited"
    if isinstance(error, UnauthorizedError):
        return "token refused, though it worked before"
    return "request failed"


def setback_text(error: MogplexError, wait_s: float) -> str:
    """The line to say about ``error`` when the next try is in ``wait_s``."""
    wait = format_duration(max(1.0, wait_s))
    if error.retry_after_s:
        wait += ", as the service asks"
    return f"{trouble_of(error)}: {error}; retrying in {wait}"


class Setback(NamedTuple):
    """After a failed request: how long to wait, and what to report ("" if already reported)."""

    wait_s: float
    message: str


class Link:
    """How well the service answers one tail: failures, refusals, pace, and when to give up.

    It does no I/O: it is told what came, when, and a random number.
    """

    def __init__(
        self,
        now: float,
        interval_s: float = POLL_S,
        just_started: bool = False,
    ) -> None:
        self.connection = "connecting"  # or connected, lost, limited: as of Progress
        self.failures = 0  # in a row
        self.latency_ms = 0.0
        self.retry_at: Optional[float] = None
        self.renews = True  # a 401 is answered with a renewal of the token
        self.pace = Pace(interval_s, now)
        self._patience = Patience(now, just_started)
        # Troubles that were told, and the wait that each asked for.
        self._told: Dict[str, float] = {}
        self._alive_at = now

    def tick(self, now: float) -> None:
        """Time passes. After a gap the machine was suspended, which is no outage."""
        gap_s = now - self._alive_at
        if gap_s > 30.0:
            self._patience.excuse(gap_s)
        self._alive_at = now

    def good(self, now: float) -> str:
        """A good answer came; a line to say, or ""."""
        was_away = self.connection in ("lost", "limited")
        self.connection = "connected"
        self.failures = 0
        self.retry_at = None
        self.renews = True
        self._told.clear()
        self._patience.good(now)
        return "connected again" if was_away else ""

    def failed(
        self,
        error: MogplexError,
        now: float,
        random: float,
        left_s: float = float("inf"),
    ) -> Setback:
        """A request ended in ``error``: how to go on; raises what ends the tail instead."""
        self.failures += 1
        if isinstance(error, UnauthorizedError):
            self.renews = False  # once is enough until it has helped
        self._patience.check(error, now, left_s)
        asked_s = error.retry_after_s or 0.0
        wait_s = max(asked_s, backoff_s(self.failures, random))
        connection = "lost"
        if isinstance(error, RateLimitedError):
            connection = "limited"
            self.pace.refused()
            # Jitter, so that tails do not all retry at the same moment.
            wait_s += self.pace.interval_s(random) * random
        self._patience.excuse(asked_s)
        self.connection = connection
        self.retry_at = now + wait_s
        return Setback(wait_s, self._news_of(error, asked_s, wait_s))

    def _news_of(self, error: MogplexError, asked_s: float, wait_s: float) -> str:
        """The line to report; "" if the same trouble and wait were already reported."""
        trouble = trouble_of(error)
        told_s = self._told.get(trouble, -1.0)
        if asked_s <= told_s:
            return ""
        self._told[trouble] = asked_s
        return setback_text(error, wait_s)


# -- The loop


class Timing(NamedTuple):
    """How long a tail waits for what, and the clock, the sleep and the random numbers it uses."""

    timeout_s: Optional[float] = None
    interval_s: float = POLL_S
    idle_s: float = IDLE_S
    clock: Clock = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random_unit

    def left_s(self, started_at: float) -> float:
        """What is left of the time-out."""
        if self.timeout_s is None:
            return float("inf")
        return started_at + self.timeout_s - self.clock()

    def over(self) -> TailTimeout:
        """The error for a time-out that is over."""
        message = f"timed out after {self.timeout_s:.12g}s waiting for terminal status"
        return TailTimeout(message, code="TIMEOUT")


class Look:
    """What one look at the run has brought so far."""

    def __init__(self) -> None:
        self.news = False  # an event, or another status
        self.told_status = False
        self.requests = 1
        self.least_s = 0.0  # to wait before the next


class Resumption:
    """The state that lets a stream resume after a lost connection."""

    def __init__(self, reconnect_s: float) -> None:
        self.last_event_id = ""
        self.reconnect_s = reconnect_s  # as the server asks, within bounds
        self.complained = False  # of something in it that is no event


def cleaned(texts: List[str], exchange: Exchange) -> List[str]:
    """``texts`` with the token removed; searched together, since matches are rare."""
    # A line break would look like something that hides a secret.
    together = " ".join(texts)
    if exchange.clean(together) != together:
        texts = [exchange.clean(text) for text in texts]
    if may_hide_secrets(together):
        texts = [exchange.clean_json(text) for text in texts]
    return texts


TailItem = Tuple[Union[Json, Verdict], str]
TailItems = Iterator[TailItem]


class Tail:
    """One tail: a loop that reads, hands on, waits, and tells how it stands."""

    def __init__(
        self,
        client: Client,
        run_id: str,
        timing: Timing,
        limit: int,
        on_progress: OnProgress,
        just_started: bool = False,
    ) -> None:
        self.client = client
        self.limit = min(limit, MAX_LIMIT)
        self.on_progress = on_progress
        self.timing = timing
        self.started_at = timing.clock()
        self.story = Story(run_id, self.started_at, timing.interval_s)
        self.link = Link(self.started_at, timing.interval_s, just_started)
        self._resumption = Resumption(timing.interval_s)
        self._final: Optional[MogplexError] = (
            None  # an exception that ends the tail and did not come from the service
        )

    @property
    def run_id(self) -> str:
        """The run that it follows."""
        return self.story.run_id

    def items(self) -> TailItems:
        """The events, and last the verdict; with each its very text, where it came in a stream."""
        while self.story.verdict is None:
            wait_s = yield from self.look(Look())
            if self.story.verdict is None:
                self._wait(wait_s)
        yield self.story.verdict, ""

    def look(self, look: Look) -> Generator[TailItem, None, float]:
        """One look at the run; returns how long to wait for the next, also after a setback."""
        try:
            return (yield from self._look(look))
        except MogplexError as error:
            if error is self._final:
                raise
            return self._set_back(error)

    def _look(self, look: Look) -> Generator[TailItem, None, float]:
        sent_at = self.timing.clock()
        self.link.pace.polled(sent_at)
        yield from self._read_events(look)
        if not look.told_status:
            self._read_run(look)
        now = self.timing.clock()
        self.link.pace.succeeded(look.news, now)
        random = self.timing.random()
        interval_s = look.requests * self.link.pace.interval_s(random)
        if self.story.is_terminal:
            return interval_s  # two terminal answers are a whole interval apart
        return max(look.least_s, sent_at + interval_s - now)

    def _read_events(self, look: Look) -> TailItems:
        """The events, in whichever form the service gives them; a 204 says that no more come."""
        sent_at = self.timing.clock()
        exchange = self.client.open_events(
            self.run_id,
            tick=self._tick,
            renew=self.link.renews,
            limit=self.limit,
            last_event_id=self._resumption.last_event_id,
            idle_s=self.timing.idle_s,
        )
        with exchange:
            self.link.latency_ms = (self.timing.clock() - sent_at) * 1000
            if exchange.streams:
                yield from self._read_stream(exchange, look)
                look.least_s = self._resumption.reconnect_s
            elif exchange.status != 204:
                yield from self._read_list(exchange, look)

    def _read_list(self, exchange: Exchange, look: Look) -> TailItems:
        data = exchange.data()
        self._good()
        message = self.story.hear_length(len(data["events"]), self.limit)
        yield from self._read_snapshot(data, look)
        self._say(message)

    def _read_run(self, look: Look) -> None:
        """Ask the run itself."""
        exchange = self.client.open_run(
            self.run_id, tick=self._tick, renew=self.link.renews
        )
        with exchange:
            run = dict_of(exchange.data(), "run")
        self._good()
        look.requests += 1
        self._hear_run(run, look)

    def _read_snapshot(self, data: Json, look: Look) -> TailItems:
        """The new events of ``{run, events}``, and what the run says of itself."""
        self.story.begin_answer()
        for event in dicts_of(data, "events"):
            if self.story.hear_event(event, self.timing.clock()):
                look.news = True
                yield event, ""
        self._hear_run(dict_of(data, "run"), look)

    def _hear_run(self, run: Json, look: Look) -> None:
        if self.story.hear_run(run, self.timing.clock()):
            look.news = True
        if text_of(run, "status"):
            look.told_status = True

    def _read_stream(self, exchange: Exchange, look: Look) -> TailItems:
        """A stream, until it ends, brings no event for ``idle_s``, or the run seems to be over."""
        clock = self.timing.clock
        decoder = SSEDecoder(self._resumption.last_event_id)
        self.story.begin_answer()
        opened_at = clock()
        ask_at = self._ask_at(opened_at)
        while self.story.verdict is None:
            piece = exchange.piece(max(0.0, ask_at - clock()))
            if piece is None:
                return
            if not piece:
                look.told_status = False
                return
            texts = [message.data for message in decoder.feed(piece)]
            self._keep(decoder)
            now = clock()
            if texts or now - opened_at >= GOOD_STREAM_S:
                self._good()
            was_over = self.story.seems_over
            heard = yield from self._hand_on(cleaned(texts, exchange), look, now)
            if heard and not (was_over and self.story.seems_over):
                ask_at = self._ask_at(now)

    def _ask_at(self, now: float) -> float:
        """When to leave a stream that brings no more events, and ask the run itself."""
        if self.story.seems_over:
            return now + self.timing.interval_s
        return now + self.timing.idle_s

    def _hand_on(
        self,
        texts: List[str],
        look: Look,
        now: float,
    ) -> Generator[TailItem, None, bool]:
        """The new events among ``texts``; returns whether any of them was one, or the run."""
        story = self.story
        heard = False
        for text in texts:
            data = self._parse(text)
            if "type" not in data and ("run" in data or "events" in data):
                heard = True
                yield from self._read_snapshot(data, look)
            elif data:
                heard = True
                if story.hear_event(data, now):
                    look.news = True
                    yield data, text
        return heard

    def _parse(self, text: str) -> Json:
        """The object that a message of a stream holds; empty for anything else."""
        try:
            data = parse_json(text)
        except ValueError:
            data = None
        if isinstance(data, dict):
            return data
        if not self._resumption.complained:
            self._resumption.complained = True
            self._say("ignored data in the stream that is not an event")
        return {}

    def _keep(self, decoder: SSEDecoder) -> None:
        """Keep what the next connection needs of this one's stream."""
        if decoder.held > MAX_BODY:
            message = f"an event is larger than {MAX_BODY >> 20} MiB"
            raise InvalidResponseError(message, code="TOO_LARGE")
        self._resumption.last_event_id = decoder.last_event_id
        if decoder.retry_ms is not None:
            reconnect_ms = min(30_000, max(500, decoder.retry_ms))
            self._resumption.reconnect_s = reconnect_ms / 1000

    def _good(self) -> None:
        message = self.link.good(self.timing.clock())
        if message:
            self._say(message)

    def _set_back(self, error: MogplexError) -> float:
        """How long to wait after ``error``; raises what ends the tail."""
        now = self.timing.clock()
        random = self.timing.random()
        setback = self.link.failed(error, now, random, self._left_s())
        self._say(setback.message)
        return setback.wait_s

    def _wait(self, wait_s: float) -> None:
        until = self.timing.clock() + wait_s
        while True:
            self._tick()  # which ends the tail at its time-out
            wait_s = until - self.timing.clock()
            if wait_s <= 0:
                return
            nap_s = min(0.5, wait_s, self._left_s())
            self.timing.sleep(max(0.0, nap_s))

    def _left_s(self) -> float:
        """What is left of the time-out."""
        return self.timing.left_s(self.started_at)

    def _tick(self) -> None:
        """Called before every wait, at least twice a second."""
        self.link.tick(self.timing.clock())
        self._say("")
        if self._left_s() <= 0:
            self._final = self.timing.over()
            raise self._final

    def _say(self, message: str) -> None:
        """Tell how the tail stands, and ``message`` if there is one."""
        try:
            self.on_progress(self.progress(message))
        except MogplexError as error:
            self._final = error
            raise

    def progress(self, message: str = "") -> Progress:
        """How the tail stands."""
        story = self.story
        link = self.link
        return Progress(
            connection=link.connection,
            status=story.status,
            started_at=self.started_at,
            last_event_at=story.last_event_at,
            retry_at=link.retry_at,
            failures=link.failures,
            message=message,
            latency_ms=link.latency_ms,
            run=cast(Run, story.run),
            branch=story.delivery.branch,
            pull_request_url=story.delivery.pull_request_url,
        )


def tell_nobody(progress: Progress) -> None:
    """The OnProgress of a tail that nobody watches."""


def tail(
    client: Client,
    run_id: str,
    *,
    timeout_s: Optional[float] = None,
    limit: int = MAX_LIMIT,
    on_progress: OnProgress = tell_nobody,
    interval_s: float = POLL_S,
    idle_s: float = IDLE_S,
    just_started: bool = False,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    random: Callable[[], float] = random_unit,
) -> Iterator[Union[Event, Verdict]]:
    """Each event of a run once, as it comes, and last of all the Verdict.

    Polls every ``interval_s``, or reads a stream where the service offers one; when a stream brings
    no event for ``idle_s``, the run itself is asked. After the first good answer, errors are ridden
    out for 300 s, and waits that the service asks for are kept. ``just_started`` says that the run
    was started a moment ago: a 404 within 10 s is then no final answer.

    Raises TailTimeout after ``timeout_s``, RateLimitedError or UnavailableError as soon as the
    service asks for a wait that ``timeout_s`` has no room for, and other MogplexErrors when it
    refuses or stays away. ``on_progress`` may raise, to end it.
    """
    timing = Timing(timeout_s, interval_s, idle_s, clock, sleep, random)
    one = Tail(client, run_id, timing, limit, on_progress, just_started)
    items = (item for item, _ in one.items())
    return cast("Iterator[Union[Event, Verdict]]", items)


# -- Several runs at once

REQUESTS_A_MINUTE = (
    60  # that the service takes with a personal access token, in any 60 s
)
AT_ONCE = 4  # of them, after a rest
SPARE_REQUESTS = 8  # left for other programs
UNMETERED_GAP_S = (
    0.25  # between two requests with a sign-in, for which there is no such limit
)
PROBE_S = 2.0  # in which a first request may be answered before another one is sent
MOST_POSTED = 1000  # events that wait to be taken before the threads that read wait too


class Budget:
    """When several tails that share a token may send the next request.

    48 requests a minute, evenly, of which up to 4 at once after a rest; fewer where more than 8
    are ``reserved``. After a 429 all wait as long as the service asks, and then slow down together,
    as one Pace does. At first, and then, a single request goes ahead: others have used the token.
    """

    def __init__(self, now: float, metered: bool) -> None:
        self.reserved = 0  # requests per minute set aside for other uses
        self._metered = metered
        self._pace = Pace(0.0, now)
        self._paid_until = now  # each request pays for the time that follows it
        self._held_until = now  # by a 429
        self._is_sure = False  # whether the service has answered yet
        self._probing_until = now

    @property
    def free_at(self) -> float:
        """When the next request may be sent."""
        affordable_at = self._paid_until - (AT_ONCE - 1) * self._gap_s
        return max(self._held_until, self._probing_until, affordable_at)

    @property
    def _gap_s(self) -> float:
        if not self._metered:
            return UNMETERED_GAP_S
        a_minute = REQUESTS_A_MINUTE - AT_ONCE - max(SPARE_REQUESTS, self.reserved)
        return 60.0 / max(AT_ONCE, a_minute)

    def spend(self, requests: int, now: float, random: float) -> None:
        """So many requests are sent."""
        gap_s = max(self._gap_s, self._pace.interval_s(random))
        self._paid_until = max(self._paid_until, now) + requests * gap_s
        if requests and not self._is_sure:
            self._probing_until = now + PROBE_S
        for _ in range(requests):
            self._pace.polled(now)

    def refused(self, now: float, until: float) -> None:
        """One was answered 429, and may be sent again at ``until``."""
        if now >= self._held_until:  # else it was sent before all of them were held
            self._pace.refused()
        self._held_until = max(self._held_until, until)
        self._is_sure = False

    def answered(self, now: float) -> None:
        """The service answers."""
        if not self._is_sure and now >= self._held_until:
            self._is_sure = True
            self._probing_until = now

    def succeeded(self, now: float) -> None:
        """A look at a run went well."""
        self.answered(now)
        self._pace.succeeded(True, now)


ManyItem = Tuple[str, Union[Event, Verdict, MogplexError]]
OnManyProgress = Callable[[str, Progress], None]


class Tails:
    """Several tails in one loop, which decides whose run is looked at next.

    Each look has a thread of its own, so that neither a stream nor a slow answer holds up the
    others. What it brings is posted to the loop; a tail is the thread's until its look is over.
    """

    def __init__(
        self,
        client: Client,
        run_ids: Iterable[str],
        timing: Timing,
        limit: int,
        on_progress: OnManyProgress,
        cancels: bool = False,
    ) -> None:
        self.on_progress = on_progress
        self.cancels = cancels  # the budget leaves room for cancelling them all
        self.timing = timing
        self.started_at = timing.clock()
        self.budget = Budget(self.started_at, metered=not client.credential.refreshable)
        self.tails: Dict[str, Tail] = {}
        for run_id in run_ids:
            heard = functools.partial(self._heard, run_id)
            self.tails[run_id] = Tail(client, run_id, timing, limit, heard)
        # Tails, and until when each waits; all others are looking.
        self.waiting = dict.fromkeys(self.tails, self.started_at)
        self.posted: queue.SimpleQueue[Tuple[str, Any]] = queue.SimpleQueue()
        self.is_left = False

    def items(self) -> Iterator[ManyItem]:
        """The events, and last the verdict, or the error for which a run is given up."""
        try:
            while self.tails:
                self._begin_looks()
                yield from self._take()
        finally:
            self.is_left = True

    def _begin_looks(self) -> None:
        """Look at those runs whose time has come, as far as the budget goes."""
        now = self.timing.clock()
        while self._next_at() <= now:
            due = [run_id for run_id, at in self.waiting.items() if at <= now]
            run_id = min(due, key=self._urgency)
            del self.waiting[run_id]
            self.budget.reserved = len(self.tails) if self.cancels else 0
            self.budget.spend(1, now, self.timing.random())
            try:
                start_thread(self._look, run_id)
            except MogplexError as error:
                self.posted.put((run_id, error))

    def _next_at(self) -> float:
        """When the next look begins."""
        next_at = min(self.waiting.values(), default=float("inf"))
        return max(next_at, self.budget.free_at)

    def _urgency(self, run_id: str) -> Tuple[bool, float]:
        """First what has ended and is not confirmed yet, then what has waited longest."""
        return not self.tails[run_id].story.is_terminal, self.waiting[run_id]

    def _look(self, run_id: str) -> None:
        """One look at a run; runs on a worker thread."""
        look = Look()
        try:
            for item in self._posts(self.tails[run_id], look):
                while self.posted.qsize() > MOST_POSTED and not self.is_left:
                    time.sleep(0.01)
                self.posted.put((run_id, item))
        except Exception as error:
            self.posted.put((run_id, error))

    def _posts(self, tail: Tail, look: Look) -> Iterator[object]:
        """What a look brings: events, and last the look itself."""
        wait_s = yield from tail.look(look)
        look.least_s = wait_s
        yield look

    def _heard(self, run_id: str, progress: Progress) -> None:
        """Take a tail's progress report; called on its thread."""
        if self.is_left:
            raise MogplexError("nobody waits for it")
        if progress.message:
            self.posted.put((run_id, progress))

    def _take(self) -> Iterator[ManyItem]:
        """Wait for what is posted next, or until it is time to look at another run."""
        posted = self._next_posted()
        if posted is None:
            return
        run_id, item = posted
        if isinstance(item, Progress):
            self.on_progress(run_id, item)
        elif isinstance(item, Look):
            yield from self._end_look(run_id, item)
        elif isinstance(item, tuple):
            self.budget.answered(self.timing.clock())
            yield run_id, item[0]
        elif isinstance(item, MogplexError) and not isinstance(item, TailTimeout):
            yield from self._give_up(run_id, item)
        else:
            raise item  # the time is up, or it is a bug

    def _give_up(self, run_id: str, error: MogplexError) -> Iterator[ManyItem]:
        """Give up a run, and with it every run that would get the same 429 or too long a wait."""
        given_up = [run_id]
        if not isinstance(error, RateLimitedError):
            self.budget.answered(self.timing.clock())
        elif (error.retry_after_s or 0.0) > self.timing.left_s(self.started_at):
            given_up += self.waiting
            self.waiting.clear()
        for one in given_up:
            del self.tails[one]
            yield one, error

    def _end_look(self, run_id: str, look: Look) -> Iterator[ManyItem]:
        """A look is over: the verdict, or a wait for the next."""
        tail = self.tails[run_id]
        now = self.timing.clock()
        self.budget.spend(look.requests - 1, now, self.timing.random())
        if tail.link.connection == "limited":
            self.budget.refused(now, now + look.least_s)
        elif tail.link.connection == "connected":
            self.budget.succeeded(now)
        if tail.story.verdict is None:
            self.waiting[run_id] = now + look.least_s
        else:
            del self.tails[run_id]
            yield run_id, tail.story.verdict

    def _next_posted(self) -> Optional[Tuple[str, Any]]:
        """What is posted next; None when it is time to look at another run."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.posted.get_nowait()
            self._tick()
            wait_s = self._next_at() - self.timing.clock()
            if wait_s <= 0:
                return None
            nap_s = max(
                0.0, min(LONGEST_WAIT_S, wait_s, self.timing.left_s(self.started_at))
            )
            if len(self.waiting) == len(self.tails):
                self.timing.sleep(nap_s)
                continue
            with contextlib.suppress(queue.Empty):
                return self.posted.get(timeout=nap_s)

    def _tick(self) -> None:
        """Called before every wait, at least twice a second."""
        if self.timing.left_s(self.started_at) <= 0:
            raise self.timing.over()
        now = self.timing.clock()
        for run_id, tail in self.tails.items():
            if run_id in self.waiting:
                tail.link.tick(now)
            self.on_progress(run_id, tail.progress())


def tell_nobody_of_many(run_id: str, progress: Progress) -> None:
    """The OnManyProgress of tails that nobody watches."""


def tail_many(
    client: Client,
    run_ids: Iterable[str],
    *,
    timeout_s: Optional[float] = None,
    limit: int = MAX_LIMIT,
    on_progress: OnManyProgress = tell_nobody_of_many,
    interval_s: float = POLL_S,
    idle_s: float = IDLE_S,
    cancels: bool = False,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    random: Callable[[], float] = random_unit,
) -> Iterator[ManyItem]:
    """``tail`` for several runs at once: pairs of a run's id and what came of it.

    That is each event once, and last the Verdict, or the MogplexError for which this run is given
    up; the others go on. All share one budget of requests, 48 a minute unless the client has a
    sign-in: of 20 runs each verdict comes at most a minute late. ``cancels`` leaves room in it for
    cancelling them all. An id that is repeated counts once.

    Raises TailTimeout after ``timeout_s``. ``on_progress`` gets a run's id and its Progress, each
    run's at least twice a second, and may raise to end it all.
    """
    timing = Timing(timeout_s, interval_s, idle_s, clock, sleep, random)
    return Tails(client, run_ids, timing, limit, on_progress, cancels).items()


# ==== Everything above this line can be copied out and used as a library. ====


# ---------------------------------------------------------------- 6. Output

STYLE_COLOURS = {"ok": 32, "bad": 31, "warn": 33, "run": 36}  # SGR parameters


def paint(status: str, colour: bool) -> str:
    """A status word, coloured where wanted and known."""
    code = STYLE_COLOURS.get(status_named(status).style)
    if not colour or code is None:
        return status
    return f"\x1b[{code}m{status}\x1b[0m"


def has_all_characters(encoding: Optional[str]) -> bool:
    """Whether an encoding is one of Unicode."""
    name = (encoding or "").lower()
    return name.startswith("utf")


def newline_mark(encoding: Optional[str]) -> str:
    """What stands for a newline inside a line; only the encodings of Unicode have a sign for it."""
    if has_all_characters(encoding):
        return " \u23ce "
    return " | "


def ndjson(record: object) -> str:
    """One line of ASCII JSON, the record as it came.

    ``##`` is spelled so that a CI runner sees no ``##[`` in it.
    """
    try:
        return compact_json(record).replace("##", "#\\u0023")
    except ValueError:
        raise InvalidResponseError(
            "an object is nested too deeply to be printed"
        ) from None


def ndjson_lines(records: Sequence[object], texts: Sequence[str]) -> str:
    """A line for each record: the text that it came as, where all of these are lines of ASCII.

    A text is "" where it is not known.
    """
    lines = "\n".join(texts)
    is_line_each = lines.isascii() and lines.count("\n") < len(texts)
    if "" in texts or not is_line_each:
        return "\n".join(map(ndjson, records))
    return lines.replace("##", "#\\u0023")


# -- The value at a path


LIST_INDEX = re.compile(r"[0-9]{1,9}\Z")
LINE_BREAKERS = re.compile(f"{NEWLINES.pattern}|{INVISIBLES.pattern}|[\t\ud800-\udfff]")
NOT_ASCII_LINE = re.compile("[^ -~]")


def read_path(text: str) -> str:
    """The value of ``--get``."""
    if "" in text.split("."):
        example = "such as runId or branch.working"
        raise UsageError(
            f"--get takes names with dots between them, {example}, not '{text}'"
        )
    return text


def key_at(record: Json, path: str) -> str:
    """The key that ``path`` begins with: its first word, or more, as a key can have dots in it."""
    ended = f"{path}."
    keys = [key for key in record if ended.startswith(f"{key}.")]
    return min(keys, key=len, default=path)


def item_at(items: List[Any], place: str) -> object:
    """The item at a place, counted from 0; None where there is none."""
    if not LIST_INDEX.match(place):
        return None
    index = int(place)
    if index >= len(items):
        return None
    return items[index]


def value_at(value: object, path: str) -> object:
    """The value at a dotted path of keys, and of places in lists; None where there is none."""
    while path:
        if isinstance(value, dict):
            head = key_at(value, path)
            value = value.get(head)
        elif isinstance(value, list):
            head = path.partition(".")[0]
            value = item_at(value, head)
        else:
            return None
        path = path[len(head) + 1 :]
    return value


def _as_in_json(match: Match[str]) -> str:
    """A character as a string of JSON spells it."""
    quoted = to_json(match.group())
    return quoted[1:-1]


def bare(text: str, encoding: Optional[str]) -> str:
    """``text`` as one line; what would end it, or cannot be seen or written, as in JSON.

    So is a character of what a CI runner would obey.
    """
    escaped = NOT_ASCII_LINE
    if has_all_characters(encoding):
        escaped = LINE_BREAKERS
    line = escaped.sub(_as_in_json, text)
    line = CI_COMMAND_AT_START.sub(r"\1\\u003a", line)
    return CI_COMMAND_ANYWHERE.sub(r"#\\u0023", line)


def value_line(record: object, path: str, encoding: Optional[str]) -> str:
    """What ``--get`` prints of a record: a string bare, anything else as JSON, "" for null."""
    value = value_at(record, path)
    if value is None:
        return ""
    if isinstance(value, str):
        return bare(value, encoding)
    return ndjson(value)


def shown(record: Record, *keys: str) -> str:
    """The text at ``record[key][key]...``, harmless; "" for none."""
    return sanitize(text_of(record, *keys))


# -- Lists


class Setting(NamedTuple):
    """What the cells of a list depend on, besides its records."""

    colour: bool = False
    now: Optional[float] = None  # ages are shown instead of times where it is given
    width: Optional[int] = None  # of the terminal
    repo_names: Mapping[str, str] = {}  # by id
    json_line: Callable[[object], str] = ndjson


Cell = Callable[[Record, Setting], str]
Listed = Sequence[Record]


class Column(NamedTuple):
    """A column of a list: its title, its cell for a record, and whether that may be shortened."""

    title: str
    cell: Cell
    shrinks: bool = False


def plain(*keys: str) -> Cell:
    """The cell with the text at ``record[key][key]...``, harmless."""

    def cell(record: Record, setting: Setting) -> str:
        return shown(record, *keys)

    return cell


def when(key: str) -> Cell:
    """The cell with the time at ``key``, as an age where the setting says so."""

    def cell(record: Record, setting: Setting) -> str:
        moment = parse_time(record.get(key))
        if setting.now is None or moment is None:
            return format_time(record.get(key))
        return f"{format_age(setting.now - moment)} ago"

    return cell


def repo_at(key: str) -> Cell:
    """The cell with the name of the repo whose id is at ``key``; what is there if it has none."""

    def cell(record: Record, setting: Setting) -> str:
        repo_id = text_of(record, key)
        name = setting.repo_names.get(repo_id) or repo_id
        return sanitize(name)

    return cell


def status_cell(record: Record, setting: Setting) -> str:
    """The record's status."""
    status = shown(record, "status")
    return paint(status, setting.colour)


def branch_cell(sandbox: Record, setting: Setting) -> str:
    """The branch that a sandbox works on."""
    return shown(sandbox, "working_branch") or shown(sandbox, "base_branch")


def started_cell(record: Record, setting: Setting) -> str:
    """The id of a remembered run; for a start whose answer never came, the key that finds out."""
    run_id = shown(record, "id")
    if run_id:
        return run_id
    key = shown(record, "key")
    return f"in doubt: key {key}"


Columns = Sequence[Column]
ListFormat = Callable[[Listed, Columns, Setting], str]

REPO_COLUMNS = (
    Column("ID", plain("id")),
    Column("REPO", plain("full_name"), shrinks=True),
    Column("BRANCH", plain("default_branch"), shrinks=True),
    Column("ROOT", plain("root_directory"), shrinks=True),
)
SANDBOX_COLUMNS = (
    Column("ID", plain("id")),
    Column("REPO", repo_at("repo_id"), shrinks=True),
    Column("BRANCH", branch_cell, shrinks=True),
    Column("STATUS", status_cell),
    Column("PREVIEW", plain("preview_url"), shrinks=True),
    Column("LAST ACTIVE", when("last_active_at")),
    Column("ERROR", plain("error"), shrinks=True),
)
HISTORY_COLUMNS = (
    Column("ID", started_cell),
    Column("REPO", repo_at("repo"), shrinks=True),
    Column("BRANCH", plain("branch"), shrinks=True),
    Column("STARTED", when("time")),
    Column("TASK", plain("task"), shrinks=True),
)


def row_of(record: Record, columns: Columns, setting: Setting) -> List[str]:
    """The cells of a record."""
    return [column.cell(record, setting) for column in columns]


def shown_width(text: str) -> int:
    """The columns that ``text`` takes on a terminal, without its colours."""
    return text_width(ESCAPE_SEQUENCES.sub("", text))


def least_width(column: Column, cells: Sequence[str]) -> int:
    """How narrow a column can be made: ids are never shortened, nor titles."""
    least = text_width(column.title) + 2  # tabulate makes no column narrower
    for cell in cells:
        if is_uuid(cell) or not column.shrinks:
            least = max(least, shown_width(cell))
    return least


def shorten_columns(rows: List[List[str]], columns: Columns, width: int) -> None:
    """Shorten cells until the rows of a table fit in ``width``.

    The column with the most to spare is shortened first, until the rows fit or none has any.
    """
    widths = []
    spare = []
    for column, cells in zip(columns, zip(*rows)):
        least = least_width(column, cells)
        whole = max(least, *map(shown_width, cells))
        widths.append(whole)
        spare.append(whole - least)
    gaps = 2 * (len(widths) - 1)
    over = sum(widths) + gaps - width
    most_to_spare_first = sorted(range(len(spare)), key=spare.__getitem__, reverse=True)
    for index in most_to_spare_first:
        cut = min(spare[index], over)
        if cut <= 0:
            break
        over -= cut
        for row in rows:
            row[index] = fit(row[index], widths[index] - cut)


def table(records: Listed, columns: Columns, setting: Setting) -> str:
    """An aligned table, in the setting's width where it has one; ImportError without tabulate."""
    import tabulate

    rows = [row_of(record, columns, setting) for record in records]
    if setting.width is not None:
        shorten_columns(rows, columns, setting.width)
    titles = [column.title for column in columns]
    return tabulate.tabulate(
        rows, headers=titles, tablefmt="plain", disable_numparse=True
    )


def tab_separated(records: Listed, columns: Columns, setting: Setting) -> str:
    """The same for a host without tabulate."""
    rows = [[column.title for column in columns]]
    rows += [row_of(record, columns, setting) for record in records]
    return "\n".join(map("\t".join, rows))


def json_list(records: Listed, columns: Columns, setting: Setting) -> str:
    """The records as they came, one JSON object a line, or with --get one value."""
    return "\n".join(map(setting.json_line, records))


# A list in another format is one more function here.
LIST_FORMATS: Dict[str, ListFormat] = {
    "table": table,
    "tsv": tab_separated,
    "json": json_list,
}


# -- Runs


def block(rows: Iterable[Tuple[str, str]]) -> str:
    """Labels and values, one to a line; a row without a value is left out."""
    lines = []
    for label, value in rows:
        if value:
            lines.append(f"{label:<7} {value}")
    return "\n".join(lines)


def branch_text(run: Json) -> str:
    """``feat/x (base main, created)``."""
    branch = dict_of(run, "branch")
    working = shown(branch, "working")
    base = shown(branch, "base")
    notes = []
    if base:
        notes.append(f"base {base}")
    if branch.get("createBranch") is True:
        notes.append("created")
    if not working or not notes:
        return working
    return f"{working} ({', '.join(notes)})"


def started_text(run: Json, colour: bool) -> str:
    """What ``run`` prints."""
    run_id = shown(run, "runId")
    status = paint(shown(run, "status"), colour)
    first = "started run"
    if run.get("replayed") is True:
        first = "matched existing run"
    facts = block(
        [
            ("repo", shown(run, "repoId")),
            ("harness", shown(run, "harness")),
            ("branch", branch_text(run)),
        ]
    )
    lines = [
        f"{first} {run_id} ({status})",
        facts,
        f"tail events: mogplex runs events {run_id} --follow",
    ]
    return "\n".join(filter(None, lines))


def run_text(
    run: Json,
    colour: bool,
    delivery: Delivery = Delivery(),
    failure: str = "",
) -> str:
    """What ``runs get`` prints; ``delivery`` and ``failure`` as the run's events tell them."""
    status = shown(run, "status")
    created = format_time(run.get("createdAt"))
    updated = format_time(run.get("updatedAt"))
    return block(
        [
            ("run", shown(run, "runId")),
            ("status", paint(status, colour)),
            ("harness", shown(run, "harness")),
            ("repo", shown(run, "repoId")),
            ("branch", branch_text(run)),
            ("pushed", sanitize(delivery.branch)),
            ("pull", sanitize(delivery.pull_request_url)),
            ("root", shown(run, "rootDirectory")),
            ("sandbox", shown(run, "sandboxId")),
            ("record", shown(run, "sandboxRecordId")),
            ("events", shown(run, "eventsUrl")),
            ("cancel", shown(run, "cancelUrl")),
            ("created", created),
            ("updated", updated),
            ("error", shown(run, "error")),
            ("reason", sanitize(failure)),
        ]
    )


def verdict_json(verdict: Verdict) -> Json:
    """The last line of ``--follow --json``; what is not known is left out."""
    line = {
        "runId": verdict.run_id,
        "status": verdict.status,
        "error": verdict.error,
        "pullRequestUrl": verdict.pull_request_url,
        "workingBranch": verdict.working_branch,
        "truncated": verdict.truncated,
    }
    return {key: value for key, value in line.items() if value}


def trailer(verdict: Verdict, colour: bool) -> str:
    """The last line of ``--follow`` on a run."""
    status = paint(sanitize(verdict.status), colour)
    return f"--- run {sanitize(verdict.run_id)} {status} ---"


def label_of(run_id: str) -> str:
    """What the lines on one of several runs begin with: the first eight characters of its id."""
    return f"{sanitize(run_id)[:8]:<8}  "


def with_run_id(run_id: str, event: Record) -> Json:
    """An event of one of several runs."""
    record: Json = {"runId": run_id}
    record.update(event)
    record["runId"] = run_id
    return record


def tally(statuses: Sequence[str]) -> str:
    """``3 runs: 2 success, 1 failed``."""
    counts = collections.Counter(statuses)
    parts = []
    terminal_ones_first = dict.fromkeys([*TERMINAL_STATUSES, *counts])
    for status in terminal_ones_first:
        if status in counts:
            parts.append(f"{counts[status]} {sanitize(status)}")
    runs = "1 run"
    if len(statuses) != 1:
        runs = f"{len(statuses)} runs"
    return f"{runs}: {', '.join(parts)}"


# -- Events and logs


def event_text(event: Record, newline: str = " \u23ce ") -> str:
    """The message, and what the payload adds to it: a pull request's URL, why a run failed."""
    message = sanitize(text_of(event, "message"), newline)
    reason = sanitize(failure_of(event), newline)
    url = sanitize(text_of(event, "payload", "pull_request_url"), newline)
    if not message:
        return reason or url
    if reason and reason not in message:
        return f"{message}: {reason}"
    if url and url not in message:
        return f"{message} {url}"
    return message


def event_line(event: Record, newline: str = " \u23ce ") -> str:
    """Time, type, tool and text, two spaces between."""
    moment = format_time(event.get("createdAt"))
    kind = sanitize(text_of(event, "type"), newline)
    parts = [moment, f"{kind:<14}"]
    tool = sanitize(text_of(event, "toolName"), newline)
    if tool:
        parts.append(f"tool={tool}")
    parts.append(event_text(event, newline))
    line = "  ".join(filter(None, parts))
    return line.rstrip()


def logs_text(logs: Json, clock: Callable[[object], str] = format_time) -> str:
    """A sandbox's two logs, and the events of its life, with times as on ``clock``; "" for none."""
    lines: List[str] = []
    for name in ("install_log", "dev_log"):
        text = text_of(logs, "sandbox", name).rstrip("\r\n")
        if text:
            lines.append(f"--- {name} ---")
            lines += re.split(r"\r\n|[\r\n]", text)
    for event in dicts_of(logs, "lifecycle_events"):
        moment = clock(event.get("created_at"))
        kind = text_of(event, "event_type")
        decision = text_of(event, "decision_code")
        line = f"{moment}  {kind}  {decision}"
        lines.append(line.rstrip())
    return "\n".join(map(sanitize, lines))


# -- Signs of life


def status_line(progress: Progress, now: float) -> str:
    """One line for a terminal: status, elapsed, the last event's age, the connection."""
    status = sanitize(progress.status) or "waiting"
    elapsed = format_duration(now - progress.started_at)
    age = format_age(now - progress.last_event_at)
    connection = progress.connection
    wait_s = (progress.retry_at or now) - now
    if wait_s > 0:
        connection += f", retrying in {format_age(wait_s)}"
    return f"{status} {elapsed} | last event {age} ago | {connection}"


def silence_line(progress: Progress, now: float) -> str:
    """The same for a log."""
    state = sanitize(progress.status) or progress.connection
    age = format_age(now - progress.last_event_at)
    return f"still {state}, last event {age} ago"


# -- The end of a run, for people and for CI


class Outcome(NamedTuple):
    """What CI is told of a run: how it has ended, or how it stood when a command left it."""

    run_id: str  # "" where none was started
    status: str = ""
    error: str = ""  # the run's own
    branch: str = ""
    pull_request_url: str = ""
    repo_id: str = ""
    duration_s: Optional[float] = None
    left: str = ""  # why a command left it before its end


def outcome_of_run(run: Run) -> Outcome:
    """The Outcome of a run that has just been started."""
    return Outcome(
        run_id=text_of(run, "runId"),
        status=text_of(run, "status"),
        error=text_of(run, "error"),
        repo_id=text_of(run, "repoId"),
    )


def outcome_so_far(before: Outcome, progress: Progress) -> Outcome:
    """The Outcome, so far, of a run that is being followed."""
    repo_id = text_of(progress.run, "repoId")
    return before._replace(
        status=progress.status or before.status,
        branch=progress.branch or before.branch,
        pull_request_url=progress.pull_request_url or before.pull_request_url,
        repo_id=repo_id or before.repo_id,
    )


def outcome_of_verdict(verdict: Verdict) -> Outcome:
    """The Outcome of a run that has ended."""
    return Outcome(
        run_id=verdict.run_id,
        status=verdict.status,
        error=verdict.error,
        branch=verdict.working_branch,
        pull_request_url=verdict.pull_request_url,
        repo_id=text_of(verdict.run, "repoId"),
        duration_s=verdict.duration_s,
    )


def outcome_facts(outcome: Outcome) -> Dict[str, str]:
    """What is worth knowing when a run has ended, by label; "" where it is not known."""
    duration = ""
    if outcome.duration_s is not None:
        duration = format_duration(outcome.duration_s)
    return {
        "run error": outcome.error,
        "branch": outcome.branch,
        "pull request": outcome.pull_request_url,
        "duration": duration,
    }


def outcome_notes(outcome: Outcome) -> List[str]:
    """The same as lines."""
    facts = outcome_facts(outcome)
    return [f"{label}: {value}" for label, value in facts.items() if value]


def _title_character(match: Match[str]) -> str:
    """A character that would end the title of an annotation, as GitHub wants it spelled."""
    return f"%{ord(match.group()):02X}"


def github_annotation(outcome: Outcome) -> str:
    """The workflow command that marks the step: the only one that is ever written.

    Its title says what ended: the run, or only the following of it.
    """
    status = outcome.status or "status unknown"
    if not outcome.run_id:
        title = "run not started"
        text = outcome.left
    elif outcome.left:
        title = "run no longer followed"
        text = f"run {outcome.run_id} ({status}): {outcome.left}"
    else:
        title = f"run {status}"
        text = outcome.error or f"run {outcome.run_id} ended {status}"
    title = sanitize(title, " ")
    title = re.sub("[%:,]", _title_character, title)
    text = sanitize(text, " ")[:1000]
    text = text.replace("%", "%25")
    return f"::error title=Mogplex {title}::{text}"


PLAIN_URL = re.compile(r"https://[\w.-]+/[\w./-]*\Z", re.ASCII)
PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def _entity(match: Match[str]) -> str:
    """A character as an HTML entity."""
    return f"&#{ord(match.group())};"


def _markdown(text: str) -> str:
    """``text`` as a cell of a Markdown table that is nothing but text.

    Punctuation becomes entities; a plain URL stays.
    """
    line = sanitize(text, " ")[:300]
    if PLAIN_URL.match(line):
        return line
    return PUNCTUATION.sub(_entity, line)


def github_summary(outcome: Outcome, task: str, last_lines: Sequence[str]) -> str:
    """A short Markdown table on the run, and its last events."""
    values = {
        "task": task,
        "run": outcome.run_id,
        "repo": outcome.repo_id,
        "status": outcome.status,
        "left": outcome.left,
        **outcome_facts(outcome),
    }
    lines = ["### Mogplex run", "", "| | |", "| --- | --- |"]
    for label, value in values.items():
        if value:
            lines.append(f"| {label} | {_markdown(value)} |")
    if last_lines:
        lines += ["", "| last events |", "| --- |"]
    for line in last_lines:
        lines.append(f"| {_markdown(line)} |")
    return "\n".join(lines) + "\n\n"


def github_outputs(**values: str) -> str:
    """Values for later steps, one a line."""
    text = ""
    for name, value in values.items():
        line = sanitize(value, " ")
        text += f"{name}={line}\n"
    return text


def dotenv_text(outcome: Outcome) -> str:
    """The same values as variables for later jobs.

    What a shell that reads the file might obey becomes ``_``: an agent chooses the branch's name.
    """
    values = {
        "RUN_ID": outcome.run_id,
        "STATUS": outcome.status,
        "BRANCH": outcome.branch,
        "PULL_REQUEST_URL": outcome.pull_request_url,
    }
    text = ""
    for name, value in values.items():
        safe = re.sub("[^A-Za-z0-9_./:@-]", "_", value)
        text += f"MOGPLEX_{name}={safe}\n"
    return text


def gitlab_marker(edge: str, run_id: str, now: float) -> str:
    """What starts or ends the section of a GitLab job's log that holds a run's events.

    ``edge`` is "start" or "end".
    """
    name = re.sub("[^A-Za-z0-9]", "_", run_id)
    section = f"mogplex_{name[:64]}"
    title = ""
    if edge == "start":
        title = f"Mogplex run {sanitize(run_id)}"
    return f"\x1b[0Ksection_{edge}:{int(now)}:{section}\r\x1b[0K{title}\n"


# ---------------------------------------------------------------- 7. Cockpit

# State is a value: update() makes the next one, view() draws it, repaint() finds what differs. All
# three are pure. Only Screen touches the terminal, and only a Desk, a thread, touches the network.
Segment = Tuple[str, str]  # text, and the name of its style
Line = Sequence[Segment]  # of any width
Row = Tuple[Segment, ...]  # of exactly the width that is to be filled
Frame = Sequence[Row]  # all that is on the screen

STYLES = {  # SGR parameters with 256 colours, with 16, and without colour
    "": ("", "", ""),
    "dim": ("38;5;245", "2", "2"),
    "bold": ("1", "1", "1"),
    "line": ("38;5;239", "2", "2"),
    "brand": ("1;38;5;213", "1;35", "1"),
    "accent": ("38;5;117", "36", ""),
    "ok": ("38;5;114", "32", ""),
    "bad": ("1;38;5;210", "1;31", "1"),
    "warn": ("38;5;222", "33", "1"),
    "run": ("38;5;81", "36", "1"),
    "key": ("1;38;5;153", "1;36", "1"),
    "select": ("1;38;5;255;48;5;60", "7", "7"),
    "alert": ("1;38;5;231;48;5;124", "1;37;41", "1;7"),
}
GLYPHS = str.maketrans("│─┴▸▶●○◌✓✗■·…›⎇▼⏎•↑↓–—", "|-+>>*o.+x#-~>@v/*^v--")  # for ASCII
MOUSE = {False: "\x1b[?1006l\x1b[?1000l", True: "\x1b[?1000h\x1b[?1006h"}  # off, on
# Frames measure mostly what the last one did.
width_of = functools.lru_cache(8192)(text_width)
fitted = functools.lru_cache(8192)(fit)


def columns_of(line: Iterable[Segment]) -> int:
    """How wide a line is."""
    return sum(width_of(text) for text, _ in line)


def harmless(value: object, most: int = 500) -> str:
    """One short line of API text."""
    text = text_of(value)[: most * 4]
    return sanitize(text)[:most]


class Key(NamedTuple):
    """A key by its name: enter, newline, esc, tab, btab, up, pgup, f1, ^c, ctrl+left, alt+b."""

    name: str


class Text(NamedTuple):
    """Characters that were typed, as many as came together; or a paste, newlines and tabs kept."""

    text: str
    pasted: bool = False


class Mouse(NamedTuple):
    """The wheel turned ``step`` lines down, or up where negative; 0 is a click of the left button.

    The cell counts from 0.
    """

    step: int
    column: int
    row: int


Resize = os.terminal_size  # the new size in cells: columns, lines
Messages = List[Union[Key, Text, Mouse]]  # what a terminal sends


# -- The terminal: what it sends

PASTE_START = "\x1b[200~"
PASTE_END = "\x1b[201~"
MOUSE_STEPS = {0: 0, 64: -3, 65: 3}  # of the buttons that mean something
ESCAPE_DELAY_S = (
    0.05  # a key's bytes come together: after this long Esc is a key of its own
)

# fmt: off
SENT_KEYS = {  # what blessed has no name for, or not in every version
    "\r": "enter", "\n": "newline", "\t": "tab", "\x7f": "backspace", "\x08": "backspace",
    "\x01": "home", "\x05": "end", "\x1b": "esc", "\x1b[Z": "btab",
    "\x1b\r": "newline", "\x1b\n": "newline", "\x1b\x7f": "^w", "\x1bb": "alt+b", "\x1bf": "alt+f",
    "\x1b[1;5D": "ctrl+left", "\x1b[1;5C": "ctrl+right", "\x1b[1;3D": "ctrl+left",
    "\x1b[1;3C": "ctrl+right", "\x1bOd": "ctrl+left", "\x1bOc": "ctrl+right",
    "\x1b[1~": "home", "\x1b[4~": "end", "\x1b[7~": "home", "\x1b[8~": "end",
    "\x1b[11~": "f1", "\x1b[[A": "f1",
}
# fmt: on
# One thing that was sent, complete. Every repeat ends at a character that it does not take, so
# that no input is looked at more than a few times.
_SENT = re.compile(
    r"""
    (?P<paste>     \x1b\[200~ )
  | (?P<mouse>     \x1b\[<[0-9]{1,6};[0-9]{1,6};[0-9]{1,6}[Mm] )
  | (?P<ignored>   \x1b\[M[^\x1b]{3}                            # a mouse report of the old kind
                 | \x1b[\]P_^X][^\x07\x1b]*(?:\x07|\x1b\\)      # the terminal's answer to a query
                 | [\x80-\x9f] )
  | (?P<modified>  \x1b\[(?:[0-9]{1,7}(?:;[0-9]{1,3})?u         # CSI-u
                          | 27;[0-9]{1,3};[0-9]{1,7}~) )        # modifyOtherKeys
  | (?P<key>       \x1b\[\[[A-E]                                # F1 to F5 of the Linux console
                 | \x1b\[(?![\[M])[0-?]*[ -/]*[@-~]
                 | \x1bO[A-FHIMP-SXa-dj-y]
                 | [\x00-\x1a\x1c-\x1f\x7f] )
  | (?P<escape>    \x1b(?=\x1b|O[^A-FHIMP-SXa-dj-y]|[^\W_OPX]\w\w) )     # before a word
  | (?P<alt>       \x1b[^\x1b\[\]OP_^X] )
  | (?P<text>      [^\x00-\x1f\x7f-\x9f]+ )
""",
    re.VERBOSE,
)
# Where pastes are not bracketed.
_UNMARKED_PASTE = re.compile("[^\x00-\x1f]{2}[\r\n]+[^\r\n]")
Namer = Callable[[str], str]  # the name of the key that sends a sequence, "" for none
# Ctrl+C or Esc.
_INTERRUPTING = re.compile("(?:\x03|\x1b(?:\\[99;5u|\\[27;5;99~|\\[27u)?)+\\Z")


def pasted(text: str) -> Text:
    """A paste, with ``\\n`` at its lines' ends, which terminals send as ``\\r``."""
    text = text.replace("\r\n", "\n")
    return Text(text.replace("\r", "\n"), pasted=True)


def unmodified(code: int, modifiers: int) -> str:
    """The bytes by which a terminal sends a key that came as CSI-u or modifyOtherKeys.

    ``code`` is a Unicode code point; ``modifiers`` is 1, and 1 for Shift, 2 for Alt, 4 for Ctrl
    added. "" for a key that has no such bytes. Source: xterm's ctlseqs.
    """
    flags = modifiers - 1
    shift = flags & 1
    alt = flags & 2
    ctrl = flags & 4
    if code > sys.maxunicode or flags & 0b111000:  # Super, Hyper, Meta
        return ""
    if code == 13 and flags & 0b111:
        return "\x1b\r"
    if code == 9 and shift:
        return "\x1b[Z"
    char = chr(code)
    if shift or ctrl:
        char = char.upper()
    if ctrl and "@" <= char <= "_":
        char = chr(ord(char) - 64)
    elif not char.isprintable() and char not in "\t\r\x08\x1b\x7f":
        return ""  # such as the functional keys of the kitty protocol
    if alt:
        return "\x1b" + char
    return char


def modified_key(sequence: str) -> str:
    """``unmodified`` of a sequence ``ESC[code;modifiersu`` or ``ESC[27;modifiers;code~``."""
    code, *others = map(int, re.findall("[0-9]+", sequence))
    modifiers = 1
    if others:
        modifiers = others[0]
    if sequence.endswith("~"):
        code = others[1]
    return unmodified(code, modifiers)


def mouse_messages(report: str) -> Messages:
    """What an SGR mouse report means: a turn of the wheel, a left click, or nothing."""
    numbers = re.findall("[0-9]+", report)
    button, column, row = map(int, numbers)
    button &= ~0b11100  # Shift, Alt and Ctrl
    if button not in MOUSE_STEPS or report.endswith("m"):
        return []
    return [Mouse(MOUSE_STEPS[button], column - 1, row - 1)]


def key_messages(sequence: str, resolve: Namer) -> Messages:
    """The key that sends ``sequence``, if it has a name."""
    name = SENT_KEYS.get(sequence)
    if not name and len(sequence) == 1:
        letter = chr(ord(sequence) + 64)
        name = "^" + letter.lower()
    name = name or resolve(sequence)
    if not name:
        return []
    return [Key(name)]


def next_part(sent: str, at: int, final: bool) -> Optional[Tuple[str, str]]:
    """(kind, text) of what begins at ``at``; None if its end has not arrived."""
    match = _SENT.match(sent, at)
    if not match and not final:
        return None
    if not match:
        return "escape", "\x1b"
    kind = str(match.lastgroup)
    part = match.group()
    if kind == "paste":
        # A hundred times faster than a pattern.
        end = sent.find(PASTE_END, at)
        if end < 0:
            return None
        part = sent[at : end + len(PASTE_END)]
    if kind == "alt" and part not in SENT_KEYS:
        return "escape", "\x1b"  # and the letter by itself comes next
    return kind, part


def part_messages(kind: str, part: str, resolve: Namer) -> Messages:
    """What a part of one of the kinds of ``_SENT`` means."""
    if kind == "text":
        return [Text(part)]
    if kind == "paste":
        text = part[len(PASTE_START) : -len(PASTE_END)]
        return [pasted(text)]
    if kind == "mouse":
        return mouse_messages(part)
    if kind == "ignored":
        return []
    return key_messages(part, resolve)


def sliced(sent: str, final: bool, resolve: Namer) -> Tuple[Messages, str]:
    """(messages, what is not complete yet) of what the terminal sent.

    ``final`` says that nothing followed for a while: then the start of a sequence is Esc and
    letters, but the start of a paste still waits for its end. Bytes that come together mean what
    they mean apart; only text with a newline inside, in one go, is taken for a paste, because
    that runs nothing.
    """
    if "\x1b" not in sent and _UNMARKED_PASTE.search(sent):
        return [pasted(sent)], ""
    messages: Messages = []
    at = 0
    while at < len(sent):
        found = next_part(sent, at, final)
        if not found:
            break
        kind, part = found
        at += len(part)
        if kind == "modified":
            messages += sliced(modified_key(part), True, resolve)[0]
        else:
            messages += part_messages(kind, part, resolve)
    return messages, sent[at:]


# -- The terminal: what it shows


Placed = Tuple[int, str, str]  # a segment behind the column that it begins at, from 0
Styles = Mapping[str, str]  # the sequence that begins each style


def cells(row: Row) -> List[Placed]:
    """The segments of a row with their places."""
    placed = []
    column = 0
    for text, style in row:
        placed.append((column, text, style))
        column += width_of(text)
    return placed


def place(y: int, column: int) -> str:
    """The sequence that moves the cursor to a cell, counted from 0."""
    return f"\x1b[{y + 1};{column + 1}H"


def rewritten(before: Row, row: Row) -> List[Placed]:
    """The segments of ``row`` that must be written where ``before`` is on the screen.

    Terminals disagree on the width of what is not ASCII: where such text comes or goes, all
    that stands behind it is written anew.
    """
    new = cells(row)
    changed = set(new).symmetric_difference(cells(before))
    behind = sys.maxsize
    if not all(text.isascii() for _, text, _ in changed):
        behind, _, _ = min(changed)
    return [cell for cell in new if cell in changed or cell[0] > behind]


def repaint_row(y: int, before: Row, row: Row, styles: Styles) -> str:
    """What turns one row into another: each segment that differs, placed and styled."""
    output = ""
    column = -1  # where the cursor is, while that is certain
    worn = None  # the style that is in force
    end = columns_of(row)
    for start, text, style in rewritten(before, row):
        if start != column:
            output += place(y, start)
        if style != worn:
            output += styles[style]
            worn = style
        column = -1
        if text.isascii():
            column = start + len(text)
        is_last_blank = column == end and text.endswith(" ")
        if is_last_blank and style in ("", "dim"):
            output += text.rstrip(" ") + "\x1b[K"  # shorter than the blanks
        else:
            output += text
    return output


def cursor_place(rows: Frame) -> Optional[Tuple[int, int]]:
    """(row, column) of the cursor, which is an empty segment of style "cursor"."""
    for y, row in enumerate(rows):
        for column, _, style in cells(row):
            if style == "cursor":
                return y, column
    return None


def repaint(old: Frame, new: Frame, styles: Styles) -> str:
    """The characters that turn the screen ``old`` into ``new``; "" when nothing changed."""
    output = ""
    for y, row in enumerate(new):
        before: Row = ()
        if y < len(old):
            before = old[y]
        if row != before:
            output += repaint_row(y, before, row, styles)
    cursor_before = cursor_place(old)
    cursor = cursor_place(new)
    if not output and cursor == cursor_before:
        return ""
    if cursor:
        output += place(*cursor) + "\x1b[?25h"
    else:
        output += "\x1b[?25l"
    return (
        f"\x1b[?2026h{output}\x1b[?2026l"  # shown at once, where a terminal knows that
    )


def to_ascii(text: str) -> str:
    """Each glyph as its fallback, anything else as question marks of the same width."""
    if text.isascii():
        return text
    output = ""
    for sign in clusters(text.translate(GLYPHS)):
        if not sign.isascii():
            sign = "?" * width_of(sign)
        output += sign
    return output


def ascii_row(row: Row) -> Row:
    return tuple((to_ascii(text), style) for text, style in row)


def sgr_styles(colours: int) -> Styles:
    """The styles of a terminal of so many colours; 0 is none."""
    depth = 2
    if colours >= 256:
        depth = 0
    elif colours >= 8:
        depth = 1
    styles = {"cursor": ""}
    for name, parameters in STYLES.items():
        styles[name] = (
            f"\x1b[0;{parameters[depth]}m"  # where none follow it, that means 0 too
        )
    return styles


def is_ascii_locale(environ: Mapping[str, str]) -> bool:
    """Whether the terminal is set up for another encoding than UTF-8."""
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        locale = environ.get(name)
        if locale:
            return "utf" not in locale.lower()
    return False


class Canvas:
    """The frame that is on the screen, and how the next one is written over it."""

    def __init__(self, environ: Mapping[str, str], terminal: Any) -> None:
        colours = terminal.number_of_colors
        if environ.get("NO_COLOR"):
            colours = 0
        self.styles = sgr_styles(colours)
        self.ascii = is_ascii_locale(environ)
        self.clear = f"\x1b[0m{terminal.clear}\x1b[?25l"
        self.rows: Frame = ()  # none: what is on the screen is not known

    def frame(self, rows: Frame) -> str:
        """What turns the last frame into ``rows``; an unknown one is cleared first."""
        if self.ascii:
            rows = list(map(ascii_row, rows))
        output = repaint(self.rows, rows, self.styles)
        if not self.rows:
            output = self.clear + output
        self.rows = rows
        return output


# -- The terminal itself

GONE = (errno.EIO, errno.ENXIO, errno.EBADF)  # the errors of a terminal that was closed


class TerminalGone(Exception):
    """The terminal was closed: nothing can be read from it or written to it any more."""


def on_terminal(call: Callable[..., Any], *arguments: Any) -> Any:
    """``call(*arguments)``; raises TerminalGone if the terminal was closed.

    Any other error is a bug in this program and is raised as it is. EINTR, from a stop and ``fg``
    in the middle of the call, is tried again: Python does that itself, but not in ``termios``.
    """
    import termios

    while True:
        try:
            return call(*arguments)
        except (OSError, termios.error) as error:
            number = error.args[0]
            if number in GONE:
                raise TerminalGone from None
            if number != errno.EINTR:
                raise


class Signals:
    """The signals that the cockpit hears, while the ``with`` statement lasts.

    Handlers only note them, and the loop sees to them between two frames: a handler that raised
    would cut a frame in two, and leave half an escape sequence on the screen.
    """

    STUCK_S = 1.0  # a loop that has not come by for so long is not waited for

    def __init__(self) -> None:
        self.ending = 0  # the number of the first signal that ends the program
        self.ending_since = 0.0  # on the monotonic clock
        self.heard: List[int] = []  # the other signals
        self.previous: Dict[int, Any] = {}
        self.previous_wake = -1
        self.fatal = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        self.wake_in, self.wake_out = os.pipe()
        os.set_blocking(self.wake_out, False)

    def __enter__(self) -> Signals:
        for number in self.fatal:
            # What nohup or `&` has left ignored stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.end)
        for other in (signal.SIGWINCH, signal.SIGCONT, signal.SIGTSTP):
            self.previous[other] = signal.signal(other, self.note)
        # The kernel may hand a signal to a worker's thread, and then nothing else wakes the loop.
        self.previous_wake = signal.set_wakeup_fd(
            self.wake_out, warn_on_full_buffer=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self.previous_wake)
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def note(self, number: int, _: object) -> None:
        """Handler of the signals that the loop sees to."""
        self.heard.append(number)

    def end(self, number: int, _: object) -> None:
        """Handler of the signals that end the program; the second one works in a hung loop too."""
        if not self.ending:
            self.ending = number
            self.ending_since = time.monotonic()
        elif time.monotonic() - self.ending_since > self.STUCK_S:
            self.ignore_fatal()
            raise SystemExit(128 + self.ending)

    def ignore_fatal(self) -> None:
        """From now on no signal cuts the end short."""
        for number in self.fatal:
            signal.signal(number, signal.SIG_IGN)

    def take(self) -> List[int]:
        """The other signals since the last call."""
        heard = self.heard
        self.heard = []
        return heard

    def wake(self) -> None:
        """End the loop's wait. From any thread."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self.wake_out, b"\0")

    def stop_job(self) -> None:
        """Stop the whole job, as the shell expects of Ctrl+Z, until ``fg`` or ``bg``."""
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(0, signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)


class Tty:
    """The terminal as a device, on standard input and output: its modes, bytes and size."""

    def __init__(self) -> None:
        import codecs
        import termios

        self.saved = on_terminal(termios.tcgetattr, 0)
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.output = self.open_output()

    @staticmethod
    def open_output() -> int:
        """A descriptor for writing that does not block; standard output if there can be none.

        The terminal is opened again, because O_NONBLOCK on standard output would hold for the
        shell as well.
        """
        flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK
        try:
            return os.open(os.ttyname(1), flags)
        # It belongs to another user, or is from outside of this container.
        except OSError:
            return 1

    def set_raw(self) -> None:
        import termios
        import tty

        on_terminal(tty.setraw, 0, termios.TCSANOW)

    def set_saved(self) -> None:
        """Restore the modes, in the background too, where SIGTTOU would stop the job."""
        import termios

        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            on_terminal(termios.tcsetattr, 0, termios.TCSANOW, self.saved)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def size(self) -> Resize:
        size: Resize = on_terminal(os.get_terminal_size, 1)
        return size

    def is_foreground(self) -> bool:
        """Whether this job may use the terminal now."""
        try:
            return bool(on_terminal(os.tcgetpgrp, 0) == os.getpgrp())
        except OSError:  # a terminal without job control
            return True

    def writing(self, text: str) -> Iterator[None]:
        """Write all of ``text``. Yields while the terminal takes nothing."""
        data = text.encode("utf-8", "replace")
        while data:
            try:
                written = on_terminal(os.write, self.output, data)
            except BlockingIOError:
                yield
                select.select([], [self.output], [], 0.05)
            else:
                data = data[written:]

    def read(self) -> str:
        """What was sent, as much as there is."""
        sent = ""
        while len(sent) < 1 << 20 and self.has_more(0.0):
            data = on_terminal(os.read, 0, 1 << 16)
            if not data:
                raise TerminalGone
            sent += self.decode(data)
        return sent

    def has_more(self, within_s: float) -> bool:
        ready, _, _ = select.select([0], [], [], within_s)
        return bool(ready)


def blessed_terminal(kind: str) -> Any:
    """A Terminal of blessed that sends the terminal no query and reads nothing from it.

    It does neither if its stream is not sys.__stdout__. NO_COLOR is hidden from it, because it
    would drop every capability, cursor moves too.
    """
    hidden = {}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        if name in os.environ:
            hidden[name] = os.environ.pop(name)
    try:
        import blessed

        stream = os.fdopen(os.dup(1), "w")
        return blessed.Terminal(kind, stream, force_styling=True)
    except ImportError:
        hint = "python -m pip install 'blessed>=1.20'"
        raise MogplexError("the cockpit needs blessed", hint=hint) from None
    finally:
        os.environ.update(hidden)


class Keyboard:
    """What the terminal sends, as messages."""

    def __init__(self, tty: Tty, terminal: Any) -> None:
        self.tty = tty
        self.terminal = terminal  # of blessed
        self.pending = ""  # the start of a sequence or a paste whose end has not come

    def resolve(self, sequence: str) -> str:
        """The name of the key that sends it; "" if none does, as for a late answer to a query."""
        self.terminal.ungetch(sequence)
        key = self.terminal.inkey(timeout=0, esc_delay=0)
        while self.terminal.inkey(timeout=0, esc_delay=0):
            pass
        if key != sequence or not key.name:
            return ""
        name = str(key.name).lower()
        return name.replace("key_", "")

    def read(self) -> Messages:
        """The messages that are complete. Esc is a key of its own if nothing follows it."""
        sent = self.tty.read()
        if self.in_paste() and _INTERRUPTING.match(sent) and self.is_all():
            # Its end was lost, and it must not eat Esc or Ctrl+C.
            sent = PASTE_END + sent
        self.pending += sent
        messages, self.pending = sliced(self.pending, False, self.resolve)
        if self.pending and not self.in_paste() and self.is_all():
            rest, self.pending = sliced(self.pending, True, self.resolve)
            messages += rest
        return messages

    def in_paste(self) -> bool:
        return self.pending.startswith(PASTE_START)

    def is_all(self) -> bool:
        """Whether nothing follows for as long as the bytes of one key may take."""
        return not self.tty.has_more(ESCAPE_DELAY_S)


class Controls:
    """What to write to take this kind of terminal, and to give it back.

    From blessed, but for bracketed paste: it would ask the terminal, and some do not answer.
    """

    def __init__(self, terminal: Any) -> None:
        screen = terminal.exit_fullscreen or terminal.clear
        self.enter = f"{terminal.enter_fullscreen}{terminal.smkx}\x1b[?2004h\x1b[?25l"
        # CAN ends a sequence that was cut in two, by a crash or a terminal that takes no more.
        self.leave = (
            f"\x18\x1b[?2026l{MOUSE[False]}\x1b[?2004l{terminal.normal}{terminal.rmkx}"
            f"{terminal.normal_cursor}{screen}"
        )


class Screen:
    """The terminal while the cockpit uses it, from one thread alone."""

    def __init__(self, environ: Mapping[str, str], signals: Signals) -> None:
        terminal = blessed_terminal(environ["TERM"])
        self.signals = signals
        self.tty = Tty()
        self.keyboard = Keyboard(self.tty, terminal)
        self.controls = Controls(terminal)
        self.canvas = Canvas(environ, terminal)
        self.size = self.tty.size()
        self.mouse = True  # it is reported to this program; else the terminal selects
        self.active = False  # between enter() and restore()

    def enter(self) -> None:
        """Take the terminal, once this job is in the foreground, and forget what is on it."""
        while not self.tty.is_foreground() and not self.signals.ending:
            # SIGTTOU would not stop a job that no shell looks after.
            os.kill(0, signal.SIGSTOP)
        if self.signals.ending:
            return
        self.active = True
        self.tty.set_raw()
        self.write(self.controls.enter + MOUSE[self.mouse])
        self.repaint()

    def restore(self) -> None:
        """The terminal as it was. May be called twice, and when the terminal is gone or stuck."""
        if not self.active:
            return
        self.active = False
        with contextlib.suppress(TerminalGone):
            self.write_last(self.controls.leave)
            self.tty.set_saved()

    def suspend(self) -> None:
        """Ctrl+Z: the terminal goes back to the shell, until ``fg``."""
        self.restore()
        self.signals.stop_job()
        self.signals.take()  # SIGCONT, which this has seen to
        self.enter()

    def repaint(self) -> None:
        """Draw the next frame as a whole, in the size that the terminal has now."""
        self.canvas.rows = ()
        self.size = self.tty.size()

    def switch_mouse(self, on: bool) -> None:
        """Have the mouse reported here, or let it select text in the terminal."""
        self.mouse = on
        self.write(MOUSE[on])

    def write(self, text: str) -> None:
        """Write sequences of this program's own; waits for a stuck terminal until a signal."""
        if not self.active:
            return
        for _ in self.tty.writing(text):
            if self.signals.ending:
                return

    def write_last(self, text: str) -> None:
        """Write at the end: a terminal that is stuck or gone must not hold it up."""
        patience_s = 2.0  # a slow connection that misses it would keep the mouse's mode
        if self.signals.ending:
            patience_s = 0.1
        until = time.monotonic() + patience_s
        with contextlib.suppress(TerminalGone):
            for _ in self.tty.writing(text):
                if time.monotonic() >= until:
                    return

    def draw(self, rows: Frame) -> None:
        """One frame, in one write: what differs from the last."""
        self.write(self.canvas.frame(rows))

    def wait(self, seconds: float) -> Messages:
        """What was typed and what signals ask for; waits for it at most so many seconds.

        Raises SystemExit with the exit code after a signal that ends the program, and
        TerminalGone.
        """
        wake = self.signals.wake_in
        ready, _, _ = select.select([0, wake], [], [], seconds)
        if wake in ready:
            os.read(wake, 1 << 16)
        if self.signals.ending:
            raise SystemExit(128 + self.signals.ending)
        heard = self.signals.take()
        if signal.SIGCONT in heard:  # after a stop that nobody announced
            self.enter()
        elif signal.SIGWINCH in heard:
            self.repaint()
        messages: Messages = []
        if signal.SIGTSTP in heard:
            messages.append(Key("^z"))
        if 0 in ready:
            messages += self.keyboard.read()
        return messages


@contextlib.contextmanager
def guarded(screen: Screen, hear: Callable[[BaseException], None]) -> Iterator[None]:
    """While it lasts, whatever crashes leaves the screen before it is printed.

    Another thread's uncaught exception is heard instead: the screen is for one thread alone.
    """
    excepthook = sys.excepthook
    thread_excepthook = threading.excepthook

    def uncaught(*error: Any) -> None:
        screen.restore()
        excepthook(*error)

    def uncaught_in_thread(failure: Any) -> None:
        hear(failure.exc_value)

    atexit.register(screen.restore)
    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    try:
        yield
    finally:
        atexit.unregister(screen.restore)
        sys.excepthook = excepthook
        threading.excepthook = thread_excepthook


# -- What the workers are asked, and what they say


class KnownRepo(NamedTuple):
    """A repository as the service lists it, made harmless; its ``id`` is as it came."""

    id: str = ""
    name: str = ""  # owner/name
    default_branch: str = "main"

    def is_called(self, wanted: str) -> bool:
        names = (self.id.lower(), self.name.lower())
        return wanted.lower() in names


class KnownSandbox(NamedTuple):
    """A sandbox in the same way."""

    id: str
    repo_id: str
    branch: str
    status: str
    preview_url: str = ""  # https, or ""
    error: str = ""


class Target(NamedTuple):
    """Where and with what the next task runs. Nothing but a choice or a delivery moves it."""

    repo: KnownRepo = KnownRepo()
    branch: str = (
        ""  # to continue on, which a run has delivered; "" lets the service make one
    )
    base: str = ""  # to start from; "" is the repository's default
    harness: str = next(iter(HARNESSES))
    choices: int = (
        0  # how often somebody chose: an untouched target has the same number
    )


class NewRun(NamedTuple):
    """A start from Enter until its fate is known. Its key never starts a second run."""

    task: str
    target: Target
    key: str
    under_way: bool = True  # False: no answer came, and the run may have started
    run_id: str = ""  # once the service has said it


if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec

    Given = ParamSpec("Given")


Job = Callable[..., object]  # a method of Desk, Client, Shell or Screen


class Ask(NamedTuple):
    """A job for a Desk, or a call of the Shell or its Screen: the method and its arguments."""

    job: Job
    arguments: Tuple[Any, ...] = ()


class Tick:
    """Another second began."""


class Told(NamedTuple):
    """What a job has read or come to, or what a Desk has to tell meanwhile."""

    ask: Ask
    data: Any
    latency_ms: float = 0.0  # of the service's answer; 0 where it was not asked


class Failed(NamedTuple):
    """A job that ended in an error."""

    ask: Ask
    error: MogplexError


class Facts(NamedTuple):
    """What the desks work with, the same for all."""

    connect: Callable[..., Client]  # from a credential, or from the one in force
    base_url: str
    home: Home
    run_browser: Callable[[str], bool]  # False where there is none
    overruled: str  # that the environment takes precedence over a sign-in


class Left(Exception):
    """Raised inside a tail that is left for another job."""


TAIL_INTERVAL_S = 2.5  # 24 requests a minute of the 60 that a token has


def body_for(target: Target, task: str) -> Json:
    """The body of POST /runs."""
    body: Json = {
        "repoId": target.repo.id,
        "prompt": task,
        "harness": target.harness,
    }
    if target.base or target.branch:
        body["baseBranch"] = target.base or target.repo.default_branch
    if target.branch:
        body["workingBranch"] = target.branch
        body["createBranch"] = False
    return body


def write_new_file(path: str, text: str) -> None:
    """Write a file that does not exist yet; a failure leaves none behind. OSError, ValueError."""
    data = text.encode("utf-8", "replace")
    with open(path, "xb") as stream:
        try:
            stream.write(data)
            stream.flush()
        except BaseException:
            os.unlink(path)
            raise


class Desk:
    """A worker thread and its jobs, one after another, with a Client of its own.

    A job is a method of Desk, or one of Client that only reads. What it returns is posted as
    Told, unless it is None. An exception that is no MogplexError is a bug, and ends the cockpit.
    """

    def __init__(self, post: Callable[[Any], None], facts: Facts) -> None:
        self.post = post
        self.facts = facts
        self.asks: Any = queue.SimpleQueue()
        self.connection: Optional[Client] = None
        self.told: Optional[Progress] = None  # the last progress that the tail reported
        self.given_up = threading.Event()  # is set to end the wait for a browser
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Do what is asked, until None is."""
        for ask in iter(self.asks.get, None):
            self.do(ask)
        self.reconnect()

    def tell(self, job: Job, data: object, *arguments: object) -> None:
        """Post what is known without an answer of the service, or before a job has ended."""
        self.post(Told(Ask(job, arguments), data))

    def call(self, ask: Ask) -> object:
        """Do a job and return its result."""
        if ask.job in vars(Desk).values():
            return ask.job(self, *ask.arguments)
        return ask.job(self.client(), *ask.arguments)

    def do(self, ask: Ask) -> None:
        began = time.monotonic()
        try:
            data = self.call(ask)
        except Left:
            return
        except MogplexError as error:
            is_signed_out = isinstance(error, UnauthorizedError) and not self.connection
            has_own_words = ask.job in (Desk.try_token, Desk.sign_in, Desk.start)
            if is_signed_out and not has_own_words:
                self.tell(Desk.sign_out, str(error))
            else:
                self.post(Failed(ask, error))
            return
        if data is not None:
            latency_ms = (time.monotonic() - began) * 1000
            self.post(Told(ask, data, latency_ms))

    def client(self) -> Client:
        if self.connection is None:
            self.connection = self.facts.connect()
            credential = self.connection.credential
            lapses_at = credential.expires_at
            if credential.refreshable:
                lapses_at = None
            self.tell(Desk.client, lapses_at)
        return self.connection

    def reconnect(self) -> None:
        """The next job takes the credential that is in force then."""
        if self.connection is not None:
            self.connection.close()  # the garbage collector's warning would land on the screen
        self.connection = None

    def watch(self, run_id: str) -> None:
        """Follow a run until its verdict, or until there is another job."""
        self.told = None
        report = functools.partial(self.report, run_id)
        for item in tail(
            self.client(), run_id, on_progress=report, interval_s=TAIL_INTERVAL_S
        ):
            self.tell(Desk.watch, item, run_id)

    def report(self, run_id: str, progress: Progress) -> None:
        """How the tail of a run gets on, and how long until it asks again."""
        if progress != self.told:
            self.told = progress
            retry_at = progress.retry_at or 0.0
            wait_s = max(0.0, retry_at - time.monotonic())
            self.tell(Desk.report, progress, run_id, wait_s)
        if not self.asks.empty():
            raise Left

    def repos(self) -> List[Repo]:
        return self.client().repos(limit=MAX_LIMIT)

    def find_run(self, run_id: str) -> Run:
        """``Client.run`` for a run that is shown once it is known to exist."""
        return self.client().run(run_id)

    def start(self, new: NewRun) -> Run:
        """The run is told as soon as it exists, before its id is written down."""
        home = self.facts.home
        repo = new.target.repo.name
        body = body_for(new.target, new.task)
        start = start_record(self.facts.base_url, body, new.key, repo)
        earlier = home.start_in_doubt(start, time.time())
        announce = functools.partial(self.tell_started, new)
        run = start_recorded(self.client(), home, body, new.key, repo, announce)
        if earlier:
            words = "An earlier start of this task may have gone through as well; to find out,"
            self.say(f"{words} use --idempotency-key {text_of(earlier, 'key')}", "bad")
        return run

    def tell_started(self, new: NewRun, run: Run) -> None:
        self.tell(Desk.tell_started, run, new)

    def say(self, text: str, style: str = "") -> None:
        self.tell(Desk.say, text, style)

    def cancel(self, run_id: str) -> None:
        answer = self.client().cancel(run_id)
        name = sanitize(run_id)[:8]
        words = f"Cancellation of run {name} requested."
        if already_ended(answer):
            words = f"Run {name} had already ended."
        self.say(words, "warn")

    def remember(self, repo: str, run: Record) -> None:
        """Write a run that was started elsewhere to the history."""
        start = {"service": self.facts.base_url, "repo": repo, "task": ""}
        self.facts.home.record_run(start, run)

    def export(self, path: str, content: str) -> None:
        full_path = os.path.abspath(os.path.expanduser(path))
        try:
            write_new_file(full_path, content)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or str(error)
            self.say(f"Cannot write {path}: {reason}", "bad")
        else:
            self.say(f"Exported to {full_path}", "ok")

    def open(self, url: str) -> None:
        opened = False
        with contextlib.suppress(OSError):
            opened = self.facts.run_browser(url)
        words = f"Opened {url}"
        if not opened:
            words = f"Open this in a browser: {url}"
        self.say(words)

    def check(self, credential: Credential) -> None:
        """MogplexError unless the service accepts the credential, as a real request shows."""
        with self.facts.connect(credential) as client:
            client.repos(limit=1)

    def try_token(self, token: str) -> str:
        """Store a pasted token once the service has accepted it."""
        self.check(Credential(check_token(token, "the token")))
        entry = {"token": token, "base_url": self.facts.base_url}
        self.facts.home.store_sign_in(entry)
        return f"Signed in. {self.facts.overruled}"

    def try_stored(self) -> str:
        """Sign in with what is stored."""
        self.reconnect()
        self.client().repos(limit=1)
        return "Signed in."

    def sign_in(self) -> Optional[str]:
        """Sign in through a browser."""
        self.given_up.clear()
        base_url = self.facts.base_url
        with self.facts.connect(Credential.anonymous()) as client:
            try:
                entry = sign_in(
                    base_url,
                    client.post_form,
                    announce=self.tell_url,
                    open_browser=self.facts.run_browser,
                    stopped=self.given_up.is_set,
                )
            except MogplexError:
                if self.given_up.is_set():
                    return None  # somebody gave up the wait, and knows it
                raise
        self.facts.home.store_sign_in(entry)  # first: its refresh token works only once
        self.check(Credential(text_of(entry, "access_token")))
        return f"Signed in. {self.facts.overruled}"

    def tell_url(self, url: str) -> None:
        self.tell(Desk.tell_url, url)

    def sign_out(self) -> Optional[str]:
        self.facts.home.forget_sign_in()
        if not self.facts.overruled:
            return "Signed out: the stored sign-in is deleted."
        self.say(self.facts.overruled, "warn")
        return None


class Shell:
    """Messages come in here from every thread; what the state asks for goes out."""

    def __init__(self, screen: Screen, facts: Facts) -> None:
        self.screen = screen
        self.facts = facts
        self.inbox: Any = queue.SimpleQueue()
        # A desk for each kind of work: what is prompt never waits behind what is not.
        self.reading = Desk(self.post, facts)  # for all that is not named below
        self.desks: Dict[Job, Desk] = {}
        self.place(Desk.watch)
        self.place(Desk.cancel)
        self.place(Desk.repos, Client.sandboxes, Client.run)
        self.place(Desk.remember, Desk.export, Desk.open)
        self.place(Desk.try_token, Desk.try_stored, Desk.sign_in, Desk.sign_out)

    def place(self, *jobs: Job) -> None:
        """Give these jobs a desk of their own."""
        desk = Desk(self.post, self.facts)
        self.desks.update(dict.fromkeys(jobs, desk))

    def post(self, message: Any) -> None:
        """Hand in a message, from any thread."""
        self.inbox.put(message)
        self.screen.signals.wake()

    def warn(self, line: str) -> None:
        """What the home has to say."""
        self.reading.say(line, "warn")

    def perform(self, ask: Ask) -> None:
        """Do what a state asks for: here, with the terminal, or at a desk."""
        if ask.job in vars(Shell).values():
            ask.job(self, *ask.arguments)
        elif ask.job in vars(Screen).values():
            ask.job(self.screen, *ask.arguments)
        elif ask.job is Desk.start:  # a start that hangs holds no other
            desk = Desk(self.post, self.facts)
            desk.asks.put(ask)
            desk.asks.put(None)
        else:
            desk = self.desks.get(ask.job, self.reading)
            desk.asks.put(ask)

    def reconnect(self) -> None:
        """Every desk takes the credential anew."""
        for desk in {self.reading, *self.desks.values()}:
            desk.asks.put(Ask(Desk.reconnect))

    def stop_sign_in(self) -> None:
        self.desks[Desk.sign_in].given_up.set()

    def leave(self) -> None:
        raise SystemExit(Exit.OK)


# -- State


class Entry(NamedTuple):
    """One event of the timeline, made harmless and short when it arrives."""

    time: str
    kind: str
    text: str
    event: Record


class Shown(NamedTuple):
    """The run in the header and the timeline, and how its events come in."""

    run_id: str = ""
    run: Record = {}
    origin: Optional[Target] = None  # of a run that was started here
    entries: Tuple[Entry, ...] = ()
    delivery: Delivery = Delivery()  # made harmless
    verdict: Optional[Verdict] = None
    lost: str = ""  # why the tail gave up
    again_at: float = 0.0  # when it is begun again; 0 for never
    stale: bool = False  # the tail was restarted: the next event replaces the old ones


class KnownRun(NamedTuple):
    """A run in the rail. Times are epoch seconds; 0 is never."""

    id: str
    repo: str = ""
    task: str = ""
    started_at: float = 0.0
    status: str = ""  # "" until the service has said it
    error: str = ""
    heard_at: float = 0.0
    asked_at: float = 0.0


class Rail(NamedTuple):
    """The runs that are known, newest first, and the sandboxes after them."""

    runs: Tuple[KnownRun, ...] = ()
    sandboxes: Tuple[KnownSandbox, ...] = ()
    at: int = 0  # the selected row, counted over both


class Polls(NamedTuple):
    """What is asked in the background, and when."""

    sent: Tuple[float, ...] = ()  # within the last minute
    unanswered: int = 0
    repos_due: float = 0.0
    sandboxes_due: float = 0.0


class Composer(NamedTuple):
    """What is being typed, and what was sent before."""

    text: str = ""
    cursor: int = 0
    history: Tuple[str, ...] = ()
    recalled: int = 0  # how far back in the history; 0 is the line being typed,
    draft: str = ""  # which is kept here meanwhile

    def start(self) -> int:
        return 0

    def char_before(self) -> int:
        return max(0, self.cursor - 1)

    def char_after(self) -> int:
        return min(len(self.text), self.cursor + 1)

    def word_start(self) -> int:
        """Where the word before the cursor begins."""
        before = self.text[: self.cursor].rstrip()
        word = re.split(r"\s", before)[-1]
        return len(before) - len(word)

    def word_end(self) -> int:
        """Where the word after the cursor ends."""
        after = self.text[self.cursor :]
        rest = re.sub(r"\s*\S*", "", after, count=1)
        return len(self.text) - len(rest)

    def line_start(self) -> int:
        return self.text.rfind("\n", 0, self.cursor) + 1

    def line_end(self) -> int:
        return (self.text + "\n").index("\n", self.cursor)


class Item(NamedTuple):
    """A row of a drawer: its cells, and the id of what it is about."""

    cells: Tuple[str, ...]
    id: str = ""
    style: str = ""
    present: bool = False  # it is the present choice


Items = List[Item]


class Heading(NamedTuple):
    """A column of a drawer; ``width`` in columns of the terminal."""

    title: str
    width: int
    cell: Cell = (
        status_cell  # of a record that was read, where the rows are such records
    )


class Listing(NamedTuple):
    """A kind of drawer.

    ``actions`` are the keys enter, x, o and y: functions of a state and the id of the selected
    row.
    """

    title: str
    rows: Callable[[State, Drawer], Items]
    columns: Tuple[Heading, ...] = ()  # none: a page of text
    actions: Mapping[str, Callable[[State, str], State]] = {}
    reads: Optional[Job] = None


class Drawer(NamedTuple):
    """An open listing, in place of the timeline."""

    listing: Listing
    subject: Tuple[str, ...] = ()  # what it is about, and the arguments of its read
    data: Any = None  # the last good answer, or what it was opened with
    query: str = ""
    searching: bool = False  # letters are no row actions
    at: int = 0
    error: str = ""
    lines: Tuple[Item, ...] = ()  # all; empty while they are to be made anew
    found: Tuple[Item, ...] = ()  # those that the query finds


NEVER = 9e9  # later than any other time


class SigningIn(NamedTuple):
    """The sign-in, on the screen until the service has accepted a credential."""

    needed: bool = False
    checking: bool = False
    url: str = ""  # while a browser is open for it
    waiting: str = ""  # what stood in the composer when it came up: no token
    lapses_at: float = NEVER


class Notice(NamedTuple):
    """A line for the person, and the run that it is about, if any."""

    text: str = ""
    style: str = ""
    run_id: str = ""


class Window(NamedTuple):
    """The terminal's window, what has its keys and mouse, and what it shows of the timeline."""

    width: int = 80
    height: int = 24
    focus: str = "composer"  # or "timeline", "rail", "filter"
    mouse: bool = True
    at: int = 0  # the selected entry, counted among those that pass the filter
    top: int = 0  # the first on the screen, while the newest are not followed
    follow: bool = True
    filter: str = ""
    wrap: bool = False


class Next(NamedTuple):
    """What the next task will use, and the tasks that were sent."""

    target: Target = Target()
    starts: Tuple[NewRun, ...] = ()  # sent, outcome not known yet
    session: str = ""  # what their keys begin with
    made: int = 0  # how many keys were made


class Service(NamedTuple):
    """What is known of the service, and how it answers."""

    base_url: str = DEFAULT_URL
    repos: Tuple[KnownRepo, ...] = ()
    polls: Polls = Polls()
    failures: int = 0  # in a row
    latency_ms: float = 0.0  # 0: nothing was answered yet
    trouble: str = ""  # why the last request failed
    refused: str = ""  # what a 401 or 403 said
    held_until: float = 0.0  # after a 429 nothing is asked before


class Attention(NamedTuple):
    """What is said to the person, and asked."""

    notice: Notice = Notice()  # a line at the bottom, until the next key
    notice_until: float = 0.0  # or until this
    alerts: Tuple[Notice, ...] = ()  # of runs that ended badly, until looked at
    killing: str = ""  # the run that is cancelled if the next key is y
    armed_until: float = 0.0  # a second Ctrl+C before this leaves


class State(NamedTuple):
    """All that the cockpit knows. Times are epoch seconds."""

    now: float = 0.0
    window: Window = Window()
    next: Next = Next()
    shown: Shown = Shown()
    composer: Composer = Composer()
    rail: Rail = Rail()
    drawer: Optional[Drawer] = None
    service: Service = Service()
    sign_in: SigningIn = SigningIn()
    attention: Attention = Attention()
    asks: Tuple[Ask, ...] = ()  # what the last message asks for

    @property
    def is_signed_out(self) -> bool:
        return self.sign_in.needed

    def ask(
        self,
        job: Callable[Concatenate[Any, Given], object],
        *arguments: Given.args,
        **named: Given.kwargs,
    ) -> State:
        """With a job of a Desk, or a call of the Shell, asked for; mypy checks its arguments."""
        return self._replace(asks=(*self.asks, Ask(job, arguments)))

    def say(self, text: str, style: str = "", for_s: float = 8.0) -> State:
        """With a line at the bottom for a while, until the next key; an error stays."""
        notice = Notice(harmless(text), style)
        until = self.now + for_s
        if style == "bad":
            until = NEVER
        return self.attend(notice=notice, notice_until=until)

    def write(self, text: str, cursor: int = -1) -> State:
        """With ``text`` in the composer, the cursor at its end if nothing else is said."""
        if cursor < 0:
            cursor = len(text)
        composer = self.composer._replace(text=text, cursor=cursor)
        return self._replace(composer=composer).look(focus="composer")

    def open(
        self, listing: Listing, *subject: str, data: Any = None, query: str = ""
    ) -> State:
        """With a drawer open, and what it shows asked for."""
        state = self._replace(drawer=Drawer(listing, subject, data, query))
        if state.window.focus == "filter":
            state = state.look(focus="composer")
        return state.read()

    def read(self) -> State:
        """With what the drawer shows asked for."""
        drawer = self.drawer
        if drawer and drawer.listing.reads:
            return self.ask(drawer.listing.reads, *drawer.subject)
        return self

    def choose(self, **changes: Any) -> State:
        """With another target, which earlier runs no longer change, and no drawer."""
        target = self.next.target._replace(**changes)
        target = target._replace(choices=target.choices + 1)
        return self.close().plan(target=target)

    # Each of these is the state with other values in one of its records.

    def look(self, **changes: Any) -> State:
        return self._replace(window=self.window._replace(**changes))

    def plan(self, **changes: Any) -> State:
        return self._replace(next=self.next._replace(**changes))

    def attend(self, **changes: Any) -> State:
        return self._replace(attention=self.attention._replace(**changes))

    def know(self, **changes: Any) -> State:
        return self._replace(service=self.service._replace(**changes))

    def show(self, **changes: Any) -> State:
        return self._replace(shown=self.shown._replace(**changes))

    def shift(self, **changes: Any) -> State:
        if self.drawer is None:
            return self
        return self._replace(drawer=self.drawer._replace(**changes))

    def with_rail(self, **changes: Any) -> State:
        return self._replace(rail=self.rail._replace(**changes))

    def admit(self, **changes: Any) -> State:
        return self._replace(sign_in=self.sign_in._replace(**changes))

    def close(self) -> State:
        """Without a drawer."""
        return self._replace(drawer=None)

    def go(self, pane: str) -> State:
        """With the focus there, and no drawer."""
        return self.close().look(focus=pane)


def clock_text(seconds: Optional[float], form: str) -> str:
    """A moment on the clock of this machine; "" for what is none."""
    if seconds is None or not 0 < seconds < 4e9:
        return ""
    moment = time.localtime(seconds)
    return time.strftime(form, moment)


def with_reason(status: str, error: str) -> str:
    """``failed: Agent run exited with code 1.``."""
    if error:
        return f"{status}: {error}"
    return status


def status_of(run: Record) -> str:
    """The status of a run, as far as the service has said it."""
    return harmless(run.get("status"), 20)


def sign_of(status: str) -> Status:
    """How a status is shown, known or not."""
    if not status:
        return Status("…", "dim")
    return status_named(status)


def status_label(status: str) -> Segment:
    """A status as it is shown: with a glyph and the word, never by colour alone."""
    sign = sign_of(status)
    return f"{sign.glyph} {status}".strip(), sign.style


def is_bad_end(status: str) -> bool:
    known = status_named(status)
    return known.terminal and known.style == "bad"


def is_active(run: KnownRun) -> bool:
    """Whether its status is known, and may change."""
    return run.status not in ("", "unknown", *TERMINAL_STATUSES)


def change_runs(state: State, ids: Sequence[str], **changes: Any) -> State:
    """With this changed in the runs of the rail that have these ids."""
    runs = []
    for run in state.rail.runs:
        if run.id in ids:
            run = run._replace(**changes)
        runs.append(run)
    return state.with_rail(runs=tuple(runs))


def change_start(state: State, key: str, *instead: NewRun) -> State:
    """With this in place of the start that has this key; with none where its fate is known."""
    others = [new for new in state.next.starts if new.key != key]
    return state.plan(starts=(*others, *instead))


def run_named(state: State, run_id: str) -> KnownRun:
    """What the rail has of a run."""
    for run in state.rail.runs:
        if run.id == run_id:
            return run
    return KnownRun(run_id)


def task_of(run: KnownRun) -> str:
    return run.task or "(task not known)"


def repo_of(state: State, repo_id: str) -> KnownRepo:
    """A listed repository; one without a name where it is not listed."""
    for repo in state.service.repos:
        if repo.id == repo_id:
            return repo
    return KnownRepo()


def branch_text_of(target: Target) -> str:
    """The branch that the next task continues on, or starts from."""
    return target.branch or target.base or target.repo.default_branch


def target_text(target: Target, width: int) -> str:
    """``acme/api ⎇ main · codex``; where there is no room for it, never without the last."""
    place = "no repository, choose one with /repo"
    if target.repo.id:
        branch = harmless(branch_text_of(target), 200)
        place = f"{target.repo.name} ⎇ {branch}"
    harness = f" · {target.harness}"
    room = max(0, width - len(harness))
    return fit(place, room) + harness


def passing(state: State) -> Sequence[Entry]:
    """The entries that have every word of the filter in their type or text."""
    words = state.window.filter.lower().split()
    if not words:
        return state.shown.entries
    found = []
    for entry in state.shown.entries:
        text = f"{entry.kind} {entry.text}".lower()
        if all(word in text for word in words):
            found.append(entry)
    return found


def selected_entry(state: State) -> int:
    """The position of the selected entry among those that pass; -1 when there is none."""
    last = len(passing(state)) - 1
    if state.window.follow:
        return last
    return min(state.window.at, last)


def selected_row(state: State) -> int:
    """The position of the selected row of the rail; -1 when there is none."""
    rail = state.rail
    count = len(rail.runs) + len(rail.sandboxes)
    return min(rail.at, count - 1)


def row_in_rail(state: State) -> Union[KnownRun, KnownSandbox, None]:
    """The run or the sandbox that is selected in the rail."""
    rail = state.rail
    rows: List[Union[KnownRun, KnownSandbox]] = [*rail.runs, *rail.sandboxes]
    if not rows:
        return None
    return rows[selected_row(state)]


def web_url(state: State) -> str:
    """The pull request of the shown run, else the preview of its sandbox, else the web page."""
    run = state.shown.run
    url = state.shown.delivery.pull_request_url
    if url.startswith("https://"):
        return url
    ids = (
        text_of(run, "sandboxRecordId"),
        text_of(run, "sandboxId"),
    )
    for sandbox in state.rail.sandboxes:
        if sandbox.id in ids and sandbox.preview_url:
            return sandbox.preview_url
    return state.service.base_url


def is_offline(service: Service) -> bool:
    return service.failures >= 3 or "host name" in service.trouble


def health(state: State) -> Segment:
    """How well the service answers."""
    service = state.service
    wait_s = service.held_until - state.now
    latency = f"{service.latency_ms:.0f}ms"
    verdict = state.shown.verdict
    if state.is_signed_out:
        return "○ signed out", "dim"
    if wait_s > 0:
        return f"◌ reconnect {wait_s:.0f}s", "warn"
    if is_offline(service):
        return "✗ offline", "bad"
    if service.refused:
        return "○ degraded refused", "warn"
    if service.failures:
        return "◌ reconnect", "warn"
    if not service.latency_ms:
        return "◌ connecting", "dim"
    is_partial = verdict is not None and verdict.truncated
    if is_partial or service.latency_ms > 2000:
        return f"○ degraded {latency}", "warn"
    return f"● nominal {latency}", "ok"


def alerts_of(state: State) -> Tuple[Notice, ...]:
    """What is wrong, the gravest first."""
    service = state.service
    alerts = state.attention.alerts
    if state.is_signed_out:
        return alerts
    texts = []
    wait_s = service.held_until - state.now
    if wait_s > 0:
        wait = format_duration(wait_s)
        texts.append(
            f"Rate limited: no requests for {wait}; runs continue in the cloud"
        )
    elif is_offline(service):
        texts.append(f"Offline, retrying: {service.trouble}")
    if service.refused:
        texts.append(f"{service.refused} · retrying; /login signs in again")
    left_s = state.sign_in.lapses_at - state.now
    if left_s < 600:
        left = format_duration(left_s)
        texts.append(f"The sign-in lapses in {left} · /login renews it")
    return (*alerts, *map(Notice, texts))


def rail_width(width: int) -> int:
    """The columns of the rail, its edge included; 0 where there is none."""
    if width < 100:
        return 0
    return max(27, min(48, width // 3))


def is_too_small(state: State) -> bool:
    """Whether the window shows nothing but that: no key is a yes then."""
    return state.window.width < 30 or state.window.height < 8


def without_alert(state: State, run_id: str) -> State:
    """Without the alert of this run."""
    alerts = [alert for alert in state.attention.alerts if alert.run_id != run_id]
    return state.attend(alerts=tuple(alerts))


def looked_at(state: State, run_id: str) -> State:
    """The same, and without a drawer over it."""
    return without_alert(state, run_id).close()


def watch(
    state: State, run_id: str, run: Record, origin: Optional[Target] = None
) -> State:
    """With this run shown, from its first event on."""
    shown = Shown(run_id, run, origin)
    state = looked_at(state, run_id)._replace(shown=shown)
    state = state.look(
        at=0,
        top=0,
        follow=True,
        filter="",
    )
    return state.ask(Desk.watch, run_id)


def watch_again(state: State) -> State:
    """Begin the tail of the shown run anew: its next event is the first once more."""
    state = state.show(
        verdict=None,
        lost="",
        again_at=0.0,
        stale=True,
    )
    return state.ask(Desk.watch, state.shown.run_id)


def watch_known(state: State, run_id: str) -> State:
    """Watch a run of the rail: what is known of it is shown at once."""
    if run_id == state.shown.run_id and not state.shown.lost:
        return looked_at(state, run_id).look(follow=True)
    known = run_named(state, run_id)
    run = {
        "runId": run_id,
        "status": known.status,
        "error": known.error,
    }
    return watch(state, run_id, run)


def ask_to_kill(state: State, run_id: str) -> State:
    """Ask whether this run shall be cancelled."""
    status = run_named(state, run_id).status
    if status not in TERMINAL_STATUSES:
        return state.attend(killing=run_id)
    name = harmless(run_id, 8)
    return state.say(f"Run {name} has ended: {status}.", "warn")


def open_for_run(state: State, run_id: str) -> State:
    """Open the pull request or the preview of a run, which only the shown one is known to have."""
    if run_id != state.shown.run_id:
        return state.say("Enter shows this run; then o opens its pull request.", "warn")
    return state.ask(Desk.open, web_url(state))


def open_preview(state: State, sandbox_id: str) -> State:
    """Open the preview of a sandbox."""
    for sandbox in state.rail.sandboxes:
        if sandbox.id == sandbox_id and sandbox.preview_url:
            return state.ask(Desk.open, sandbox.preview_url)
    return state.say("This sandbox has no preview.", "warn")


def take_repo(state: State, repo_id: str) -> State:
    """The next task runs in this repository, on its default branch."""
    repo = repo_of(state, repo_id)
    return state.choose(repo=repo, branch="", base="")


def take_branch(state: State, branch: str) -> State:
    """The next task starts from this branch."""
    return state.choose(branch="", base=branch)


def take_harness(state: State, harness: str) -> State:
    """The next task uses this agent program."""
    return state.choose(harness=harness)


# Forms, and how their files end.
EXPORTS = {"json": "json", "jsonl": "jsonl", "markdown": "md"}


def export_text(state: State, form: str) -> str:
    """The shown run and its events; JSON in ASCII, so that it holds no raw control character."""
    run = state.shown.run
    events = [entry.event for entry in state.shown.entries]
    if form == "json":
        document = {"run": run, "events": events}
        return to_json(document, indent=2) + "\n"
    if form == "jsonl":
        lines = [to_json(event) for event in events]
    else:
        lines = [
            f"# Mogplex run {harmless(state.shown.run_id)}",
            "",
            f"{status_of(run)}: {web_url(state)}",
            "",
        ]
        for event in events:
            lines.append(f"    {event_line(event)}")  # indented: it is no Markdown
    return "".join(f"{line}\n" for line in lines)


def export_as(state: State, form: str, path: str = "") -> State:
    """Write the shown run to a file: named before in the picker or here, else after its id."""
    if state.drawer:
        path = "".join(state.drawer.subject)
    if not path:
        name = re.sub("[^0-9A-Za-z-]", "", state.shown.run_id)
        path = f"mogplex-{name[:8]}.{EXPORTS[form]}"
    text = export_text(state, form)
    return state.close().ask(Desk.export, path, text)


def action_list(state: State, drawer: Drawer) -> Items:
    """Keys or commands, as the drawer was opened with."""
    return list(drawer.data)


def run_items(state: State, drawer: Drawer) -> Items:
    items = []
    for run in state.rail.runs:
        status, style = status_label(run.status)
        cells = (
            harmless(run.id, 8),
            status,
            run.repo,
            clock_text(run.started_at, "%b %d %H:%M"),
            task_of(run),
        )
        present = run.id == state.shown.run_id
        items.append(Item(cells, run.id, style, present))
    return items


def sandbox_items(state: State, drawer: Drawer) -> Items:
    items = []
    for sandbox in state.rail.sandboxes:
        status, style = status_label(sandbox.status)
        cells = (
            harmless(sandbox.id, 8),
            status,
            repo_of(state, sandbox.repo_id).name,
            sandbox.branch,
            sandbox.error or sandbox.preview_url,
        )
        items.append(Item(cells, sandbox.id, style))
    return items


def repo_items(state: State, drawer: Drawer) -> Items:
    target = state.next.target
    items = []
    for repo in state.service.repos:
        cells = (repo.name, repo.default_branch)
        present = repo.id == target.repo.id
        items.append(Item(cells, repo.id, present=present))
    return items


def branch_items(state: State, drawer: Drawer) -> Items:
    """The branches that are known: the service lists none."""
    target = state.next.target
    names = [target.branch, target.base, target.repo.default_branch]
    for sandbox in state.rail.sandboxes:
        if sandbox.repo_id == target.repo.id:
            names.append(sandbox.branch)
    chosen = branch_text_of(target)
    items = []
    for name in dict.fromkeys(names):
        if name:
            item = Item((name,), name, present=name == chosen)
            items.append(item)
    return items


def harness_items(state: State, drawer: Drawer) -> Items:
    items = []
    for cells in HARNESSES.items():
        name = cells[0]
        present = name == state.next.target.harness
        items.append(Item(cells, name, present=present))
    return items


def export_items(state: State, drawer: Drawer) -> Items:
    return [Item((form,), form) for form in EXPORTS]


def record_items(state: State, drawer: Drawer) -> Items:
    """The records that were read, in the cells of the columns."""
    items = []
    for record in drawer.data or ():
        cells = []
        for column in drawer.listing.columns:
            text = column.cell(record, Setting())
            cells.append(harmless(text))
        items.append(Item(tuple(cells)))
    return items


def per_million(key: str) -> Cell:
    """The cell with a price per million tokens; the service gives it per token."""

    def cell(model: Record, setting: Setting) -> str:
        with contextlib.suppress(ValueError):
            return f"${float(text_of(model, 'pricing', key)) * 1e6:,.2f}"
        return ""

    return cell


def context_cell(model: Record, setting: Setting) -> str:
    """The context length of a model, in tokens."""
    context = text_of(model, "contextLength")
    if context.isdigit():
        return f"{int(context[:15]):,}"
    return context


def enabled_cell(server: Record, setting: Setting) -> str:
    if server.get("enabled") is True:
        return "● enabled"
    return "○ disabled"


LONGEST_LOG = 1 << 20  # characters that a drawer shows
LONGEST_EVENT = 1 << 17  # it is wrapped while somebody waits for it
MOST_LINES = 20000
LONGEST_MEASURED = 10000


def cut(text: str, width: int, roughly: bool) -> str:
    """What of a text fits, but at least a character of it; fast if it may be only half as much."""
    if roughly:
        return text[: width // 2]  # no character is wider than two columns
    return fit(text, width, "") or text[:1]


def wrapped(text: str, width: int) -> List[str]:
    """The lines of ``text``, broken into pieces of at most ``width`` columns."""
    pieces = []
    for line in text.split("\n"):
        start = 0
        while start < len(line):
            piece = line[start : start + width]
            if not piece.isascii():
                piece = cut(piece, width, len(line) > LONGEST_MEASURED)
            pieces.append(piece)
            start += len(piece)
        if not line:
            pieces.append("")
    return pieces


def folded(text: str, width: int) -> List[str]:
    """One line broken between its words where that can be done."""
    lines: List[str] = []
    line = ""
    for word in text.split(" "):
        longer = word
        if line:
            longer = f"{line} {word}"
        if line and width_of(longer) > width:
            lines.append(line)
            longer = word
        *whole, line = wrapped(longer, width)
        lines += whole
    return [*lines, line]


def page_items(state: State, text: str, most: int) -> Items:
    """A text as wide as the window has room for, of at most so many characters."""
    lines = text[:most].split("\n")
    shown_text = "\n".join(lines[:MOST_LINES])
    if len(shown_text) < len(text):
        shown_text += "\n… cut here: /export writes all events to a file"
    side = rail_width(state.window.width)
    width = max(10, state.window.width - side - 3)
    pieces = wrapped(sanitize(shown_text, "\n"), width)
    return [Item((piece,), piece) for piece in pieces]


def local_time(value: object) -> str:
    """A time of the service, on the clock of this machine."""
    return clock_text(parse_time(value), "%b %d %H:%M:%S")


def log_items(state: State, drawer: Drawer) -> Items:
    """The two logs of a sandbox, and what happened to it."""
    if drawer.data is None:
        return []
    text = logs_text(drawer.data, local_time)
    return page_items(state, text, LONGEST_LOG)


def event_items(state: State, drawer: Drawer) -> Items:
    """An event: when and what, the message, then all the rest as JSON."""
    rest = dict(drawer.data)
    message = text_of(rest, "message")
    rest.pop("message", None)
    facts = (
        local_time(rest.get("createdAt")),
        harmless(rest.get("type"), 40),
        harmless(rest.get("toolName")),
    )
    title = "  ".join(filter(None, facts))
    details = to_json(rest, indent=2, ensure_ascii=False)
    text = f"{title}\n{message}\n\n{details}"
    return page_items(state, text, LONGEST_EVENT)


def copied(state: State, text: str) -> State:
    """With ``text`` on the terminal's clipboard (OSC 52)."""
    if not text:
        return state
    import base64

    data = text.encode("utf-8", "replace")
    code = base64.b64encode(data).decode()
    state = state.ask(Screen.write, f"\x1b]52;c;{code}\x07")
    return state.say("Copied to the clipboard.", "ok")


LOGS = Listing(
    "logs",
    log_items,
    actions={"y": copied},
    reads=Client.sandbox_logs,
)


def show_logs(state: State, sandbox_id: str) -> State:
    """The logs of a sandbox."""
    return state.open(LOGS, sandbox_id)


ACTION_COLUMNS = (
    Heading("", 24),
    Heading("", 90),
)
EVENT = Listing(
    "event",
    event_items,
    actions={"y": copied},
)
HELP = Listing("help", action_list, ACTION_COLUMNS)
RUNS = Listing(
    "runs",
    run_items,
    (
        Heading("RUN", 8),
        Heading("STATUS", 11),
        Heading("REPO", 16),
        Heading("STARTED", 12),
        Heading("TASK", 90),
    ),
    {
        "enter": watch_known,
        "x": ask_to_kill,
        "o": open_for_run,
        "y": copied,
    },
)
SANDBOXES = Listing(
    "sandboxes",
    sandbox_items,
    (
        Heading("SANDBOX", 8),
        Heading("STATUS", 12),
        Heading("REPO", 14),
        Heading("BRANCH", 18),
        Heading("PREVIEW OR ERROR", 90),
    ),
    {
        "enter": show_logs,
        "o": open_preview,
        "y": copied,
    },
    Client.sandboxes,
)
REPOS = Listing(
    "repos",
    repo_items,
    (
        Heading("REPO", 40),
        Heading("DEFAULT BRANCH", 30),
    ),
    {"enter": take_repo},
    Desk.repos,
)
BRANCHES = Listing(
    "branches",
    branch_items,
    (Heading("BRANCH", 80),),
    {"enter": take_branch},
)
HARNESS_PICKER = Listing(
    "harnesses",
    harness_items,
    (
        Heading("NAME", 16),
        Heading("AGENT PROGRAM", 60),
    ),
    {"enter": take_harness},
)
EXPORT_PICKER = Listing(
    "export",
    export_items,
    (Heading("FORMAT", 80),),
    {"enter": export_as},
)
AGENTS = Listing(
    "agents",
    record_items,
    (
        Heading("AGENT", 22, plain("name")),
        Heading("MODEL", 22, plain("model")),
        Heading("CATEGORY", 12, plain("category")),
        Heading("DOES", 90, plain("description")),
    ),
    reads=Client.agents,
)
MODELS = Listing(
    "models",
    record_items,
    (
        Heading("MODEL", 30, plain("id")),
        Heading("PROVIDER", 12, plain("provider")),
        Heading("CONTEXT", 9, context_cell),
        Heading("IN $/M", 9, per_million("input")),
        Heading("OUT $/M", 9, per_million("output")),
    ),
    reads=Client.models,
)
SERVERS = Listing(
    "mcp servers",
    record_items,
    (  # never a config, which holds live secrets
        Heading("SERVER", 30, plain("name")),
        Heading("STATUS", 12, enabled_cell),
        Heading("KIND", 20, plain("kind")),
    ),
    reads=Client.mcp_servers,
)


def act_on_row(state: State, key: str) -> State:
    """Enter, x, o or y on the selected row of the drawer, else of the rail."""
    drawer = state.drawer
    row: Union[Item, KnownRun, KnownSandbox, None] = row_in_rail(state)
    listing = SANDBOXES
    if isinstance(row, KnownRun):
        listing = RUNS
    if drawer:
        listing = drawer.listing
        row = None
        if drawer.found:
            row = drawer.found[drawer.at]
    action = listing.actions.get(key)
    if action and row and row.id:
        return action(state, row.id)
    return state


def closeness(text: str, letters: str) -> int:
    """How many characters of ``text`` hold ``letters`` in this order; -1 when it has them not.

    Forward to where they end, then back to where they begin: linear in the text.
    """
    end = -1
    for letter in letters:
        end = text.find(letter, end + 1)
        if end < 0:
            return -1
    start = end + 1
    for letter in reversed(letters):
        start = text.rfind(letter, 0, start)
    return end - start


def searched(lines: Sequence[Item], query: str) -> Tuple[Item, ...]:
    """The lines with the letters of ``query`` in this order, the closest first."""
    letters = "".join(query.lower().split())
    if not letters:
        return tuple(lines)
    ranked = []
    for position, item in enumerate(lines):
        text = " ".join(item.cells).lower()
        span = closeness(text, letters)
        if span >= 0:
            ranked.append((span, position))
    ranked.sort()
    return tuple(lines[position] for _, position in ranked)


def refreshed(before: State, state: State) -> State:
    """With the open drawer's lines rebuilt; a page is long, so only when necessary."""
    drawer = state.drawer
    if drawer is None:
        return state
    is_page = not drawer.listing.columns
    if is_page and drawer is before.drawer:
        return state
    lines = drawer.lines
    if not is_page or not lines:
        lines = tuple(drawer.listing.rows(state, drawer))
    found = searched(lines, drawer.query)
    last = max(0, len(found) - 1)
    at = min(drawer.at, last)
    return state.shift(lines=lines, found=found, at=at)


# -- Slash commands: what a line of the composer does


def begin(state: State, task: str) -> State:
    """``/run TASK``, and any other text: start a run for the target.

    A start whose answer was lost keeps its key, so that the same task asks for the same run.
    """
    if not task:
        return state.say("A run needs a task: /run fix the flaky cookie test", "bad")
    if utf16_units(task) > MAX_PROMPT_UNITS:
        state = state.write(task)
        return state.say(f"A task has at most {MAX_PROMPT_UNITS:,} characters.", "bad")
    target = state.next.target
    if not target.repo.id:
        state = state.write(task).open(REPOS)
        return state.say("Choose the repository first; the task is kept.", "warn")
    number = state.next.made + 1
    key = f"{state.next.session}-{number}"
    body = body_for(target, task)
    for earlier in state.next.starts:
        same = body_for(earlier.target, earlier.task) == body
        if earlier.run_id or not same:
            continue
        if earlier.under_way:
            state = state.write(task)
            return state.say("This start is still under way.", "warn")
        key = earlier.key
    new = NewRun(task, target, key)
    state = change_start(state, key, new)
    state = state.plan(made=number)
    return state.ask(Desk.start, new)


def choose_repo(state: State, name: str) -> State:
    """``/repo [NAME]``: a name, an id, or what only one name has in it; else a picker."""
    if not name:
        return state.open(REPOS)
    wanted = name.lower()
    without_owner = []
    partial = []
    for repo in state.service.repos:
        full_name = repo.name.lower()
        if repo.is_called(name):
            return take_repo(state, repo.id)
        if full_name.endswith("/" + wanted):
            without_owner.append(repo.id)
        if wanted in full_name:
            partial.append(repo.id)
    found = without_owner or partial
    if len(found) != 1:
        return state.open(REPOS, query=name)
    return take_repo(state, found[0])


def choose_branch(state: State, name: str) -> State:
    """``/branch [NAME]``: a picker of the known ones without a name."""
    if not name:
        return state.open(BRANCHES)
    return take_branch(state, name)


def choose_harness(state: State, name: str) -> State:
    """``/harness [NAME]``: a picker without a name."""
    if not name:
        return state.open(HARNESS_PICKER)
    wanted = name.lower()
    if wanted in HARNESSES:
        return take_harness(state, wanted)
    state = state.open(HARNESS_PICKER)
    return state.say(f"unknown harness '{name}'", "bad")


def choose_anew(state: State) -> State:
    """``/new``: the next task starts from the base branch again."""
    return state.choose(branch="")


def attach(state: State, wanted: str) -> State:
    """``/attach RUN``: watch a known run, or one that the service finds; else a picker."""
    start = wanted.lower()
    found = []
    for run in state.rail.runs:
        if run.id == wanted:
            return watch_known(state, wanted)
        if run.id.lower().startswith(start):
            found.append(run.id)
    if not wanted or len(found) > 1:
        return state.open(RUNS, query=wanted)
    if found:
        return watch_known(state, found[0])
    name = harmless(wanted, 40)
    state = state.say(f"Looking for run {name}…", for_s=60.0)
    return state.ask(Desk.find_run, wanted)


def kill(state: State) -> State:
    """``/kill`` and x: cancel the shown run, after a yes."""
    if not state.shown.run_id:
        return state.say("No run is shown.", "warn")
    return ask_to_kill(state, state.shown.run_id)


def choose_logs(state: State, name: str) -> State:
    """``/logs [SANDBOX]``: the only known one whose id begins so; else a picker."""
    found = []
    for sandbox in state.rail.sandboxes:
        if sandbox.id.startswith(name):
            found.append(sandbox.id)
    if not name or len(found) > 1:
        return state.open(SANDBOXES, query=name)
    if found:
        name = found[0]
    return show_logs(state, name)


def open_web(state: State) -> State:
    """``/open`` and o: what there is to see of the shown run."""
    url = web_url(state)
    return state.ask(Desk.open, url)


def export(state: State, words: str) -> State:
    """``/export [FORMAT] [FILE]``: a picker without a format, which keeps the file's name."""
    if not state.shown.run_id:
        return state.say("No run is shown.", "warn")
    form, _, path = words.partition(" ")
    path = path.strip()
    wanted = form.lower()
    if wanted in EXPORTS:
        return export_as(state, wanted, path)
    if path:
        state = state.open(EXPORT_PICKER, path)
        return state.say(f"unknown format '{form}': choose one for {path}", "bad")
    state = state.open(EXPORT_PICKER, form)
    if form:
        return state.say(f"Choose the format of {form}.")
    return state


def show_sign_in(state: State) -> State:
    """``/login``: the sign-in on the screen, and the composer free for a token."""
    waiting = state.composer.text
    if state.is_signed_out:
        waiting = state.sign_in.waiting
    sign_in = SigningIn(needed=True, waiting=waiting)
    state = state._replace(sign_in=sign_in)
    return state.close().write("")


POLLS_A_MINUTE = (
    30  # with the tail's 24, six are left of a token's 60 for what somebody asks for
)


def poll_order(run: KnownRun) -> Tuple[bool, float]:
    """What is known to be active comes first, and then what was asked longest ago."""
    return not run.status, run.asked_at


def run_interval_s(state: State, run: KnownRun, active: int) -> float:
    """Seconds between polls of a run when ``active`` runs are active; 0 for never.

    Up to 13 active runs are asked at most 30 s apart.
    """
    is_shown = run.id == state.shown.run_id
    if is_shown and not state.shown.verdict:
        return 0.0  # its tail says it
    if is_active(run):
        return max(20.0, 2.2 * active)
    if not run.status:
        return 30.0
    if is_shown and run.status == "cancelled":
        return 30.0  # it can come back
    return 0.0


def count_active(runs: Iterable[KnownRun]) -> int:
    """How many runs are known to be active."""
    return sum(map(is_active, runs))


def due_runs(state: State) -> List[KnownRun]:
    """The runs whose status is to be asked now: the newest, and those around the selected one."""
    rail = state.rail
    runs = rail.runs[:50]
    first = max(50, rail.at - 25)
    near = rail.runs[first : rail.at + 25]
    active = count_active(runs)
    due = []
    for run in (*near, *runs):
        interval_s = run_interval_s(state, run, active)
        age_s = state.now - run.asked_at
        if interval_s and age_s >= interval_s:
            due.append(run)
    return sorted(due, key=poll_order)


def poll(state: State, most: int) -> State:
    """Poll the runs that are due, at most ``most``, within the minute's remaining budget."""
    polls = state.service.polls
    now = state.now
    asks = []
    if now >= polls.repos_due:
        asks.append(Ask(Desk.repos))
        polls = polls._replace(repos_due=now + 10)
    if now >= polls.sandboxes_due:
        asks.append(Ask(Client.sandboxes))
        polls = polls._replace(sandboxes_due=now + 30)
    minute_ago = now - 60
    sent = [at for at in polls.sent if at > minute_ago]
    active = count_active(state.rail.runs)
    for_unknown = max(18, 3 * active + 6)  # the rest is for known ones
    ids = []
    for run in due_runs(state):
        limit = POLLS_A_MINUTE
        if not run.status:
            limit = min(limit, for_unknown)
        left = limit - len(sent) - len(asks)
        if left > 0 and len(asks) < most:
            ask = Ask(Client.run, (run.id,))
            asks.append(ask)
            ids.append(run.id)
    sent += [now] * len(asks)
    polls = polls._replace(
        sent=tuple(sent),
        unanswered=polls.unanswered + len(asks),
    )
    state = change_runs(state, ids, asked_at=now)
    state = state.know(polls=polls)
    return state._replace(asks=(*state.asks, *asks))


def refresh(state: State) -> State:
    """``/refresh`` and r: ask everything now that may have changed."""
    if state.service.held_until > state.now:
        return state.say("Rate limited: no requests until the wait is over.", "warn")
    ids = [run.id for run in state.rail.runs]
    state = change_runs(state, ids, asked_at=0.0)
    polls = state.service.polls
    polls = polls._replace(repos_due=0.0, sandboxes_due=0.0)
    state = state.know(polls=polls)
    state = state.read()
    if state.shown.again_at:
        state = watch_again(state)
    if state.shown.run_id:
        state = state.ask(Client.run, state.shown.run_id)
    state = poll(state, POLLS_A_MINUTE)
    return state.say("Asking the service…", for_s=2.0)


def clear(state: State) -> State:
    state = state.look(filter="")
    return state.attend(alerts=())


class Action(NamedTuple):
    """What a slash command or a key does, and how help says it."""

    call: str  # the command and what may follow it, or the names of the keys
    does: str
    act: Callable[..., State]
    given: Any = None  # what ``act`` is given besides the state

    @property
    def command(self) -> str:
        return self.call.partition(" ")[0]

    @property
    def takes_argument(self) -> bool:
        return " " in self.call

    def perform(self, state: State) -> State:
        if self.given is None:
            return self.act(state)
        return self.act(state, self.given)


HARNESS_NAMES = " or ".join(HARNESSES)
EXPORT_NAMES = ", ".join(EXPORTS)
# fmt: off
WORDS = (
    Action("run TASK", "start a run; typing the task alone does the same", begin),
    Action("repo [NAME]", "choose the repository of the next task", choose_repo),
    Action("branch [NAME]", "choose the branch that the next task starts from", choose_branch),
    Action("harness [NAME]", f"choose the agent program: {HARNESS_NAMES}", choose_harness),
    Action("new", "start the next task from the base branch again", choose_anew),
    Action("attach RUN", "watch a run, also one started elsewhere", attach),
    Action("kill", "cancel the shown run, after a question", kill),
    Action("runs", "the runs that this machine remembers", State.open, RUNS),
    Action("sandboxes", "the sandboxes in the cloud", State.open, SANDBOXES),
    Action("agents", "the agents of the account", State.open, AGENTS),
    Action("model", "the models, their context length and prices", State.open, MODELS),
    Action("mcp", "the MCP servers: name, whether enabled, kind", State.open, SERVERS),
    Action("logs [SANDBOX]", "the logs of a sandbox", choose_logs),
    Action("open", "open the pull request, else the preview, else the web page", open_web),
    Action("export [FORMAT] [FILE]", f"write the shown run to a file: {EXPORT_NAMES}", export),
    Action("login", "sign in", show_sign_in),
    Action("logout", "delete the stored sign-in", State.ask, Desk.sign_out),
    Action("refresh", "ask the service now", refresh),
    Action("clear", "clear the filter and the alerts", clear),
    Action("quit", "leave; runs continue in the cloud", State.ask, Shell.leave),
    Action("exit", "the same as /quit", State.ask, Shell.leave),
)
# fmt: on
NOT_OFFERED = (
    "pause",
    "resume",
    "approve",
    "reject",
    "memory",
    "diff",
    "cost",
    "undo",
    "compact",
    "plan",
)
COMMANDS = {word.command: word for word in WORDS}


def word_items(words: Iterable[Action]) -> Items:
    """Commands as rows: Enter on one performs it."""
    items = []
    for word in words:
        cells = (f"/{word.call}", word.does)
        items.append(Item(cells, f"/{word.command}"))
    return items


KEY_TITLES = {  # what is not the name of a key with its first letter in upper case
    "btab": "Shift+Tab",
    "newline": "Alt+Enter",
    "pgup": "PgUp",
    "pgdown": "PgDn",
}


def key_title(name: str) -> str:
    """How people call a key: ``^P``, ``Alt+B``, ``PgUp``; a letter as it is typed."""
    if len(name) == 1:
        return name
    if name.startswith("^"):
        return name.upper()
    return KEY_TITLES.get(name) or name.title()


def key_items(actions: Iterable[Action]) -> Items:
    """Keys as rows of help."""
    items = []
    for action in actions:
        names = map(key_title, action.call.split())
        cells = (" ".join(names), action.does)
        items.append(Item(cells))
    return items


GENERAL_KEYS = {
    "Enter": "send; in a pane or a drawer: open the selected row",
    "Shift+Enter Alt+Enter": "a new line in the task",
    "Up Down": "the history of what was sent",
    "Tab Shift+Tab": "complete a command, else go to the next pane",
    "^P": "palette: find a command or a run by a few letters",
    "^F": "filter the timeline",
    "?": "in a pane: its keys",
    "^T": "mouse on or off; when off, the terminal selects text",
    "^L ^Z": "repaint; suspend, fg comes back",
    "Esc": "close, clear, dismiss",
    "^C ^C": "leave, from anywhere; runs continue in the cloud",
}


def show_help(state: State) -> State:
    """``/help`` and F1: the keys, and every command."""
    keys = map(Item, GENERAL_KEYS.items())
    commands = word_items(WORDS)
    return state.open(HELP, data=[*keys, *commands])


COMMANDS["help"] = Action("help", "the keys and the commands", show_help)


def perform(state: State, line: str) -> State:
    """What a line does when it is sent: a slash command, else a task."""
    if not line.startswith("/"):
        return begin(state, line)
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    wanted = name.lower()
    word = COMMANDS.get(wanted)
    if word and word.takes_argument:
        return word.act(state.close(), argument)
    if word and not argument:
        return word.perform(state.close())
    if word:
        problem = "takes no argument."
    elif wanted in NOT_OFFERED:
        problem = "is not offered by the hosted API."
    else:
        near = nearest(wanted, COMMANDS)
        problem = "is unknown; /help lists the commands."
        if near:
            problem = f"is unknown; did you mean /{near}?"
    name = fit(name, 30)
    return state.write(line).say(f"/{name} {problem} Nothing was sent.", "bad")


def perform_item(state: State, command: str) -> State:
    """Enter in the palette: ``/run`` takes what was typed as its task."""
    text = state.composer.text
    state = state.close()
    if command != "/run":
        return perform(state, command)
    if text.startswith("/"):
        name, _, text = text.partition(" ")
        if name != command:
            text = ""
    return state.write(f"{command} {text}")


PALETTE = Listing("palette", action_list, ACTION_COLUMNS, {"enter": perform_item})


def show_palette(state: State) -> State:
    """Every command and run, to be found by a few letters."""
    items = word_items(COMMANDS.values())
    for run in state.rail.runs:
        name = harmless(run.id, 8)
        words = f"{run.status}  {task_of(run)}".strip()
        cells = (f"/attach {name}", words)
        items.append(Item(cells, f"/attach {run.id}"))
    return state.open(PALETTE, data=items)


def known_arguments(state: State, command: str) -> Iterable[str]:
    """What may follow a command, as far as it is known."""
    if command == "repo":
        return [repo.name for repo in state.service.repos]
    if command == "attach":
        return [harmless(run.id) for run in state.rail.runs]
    if command == "harness":
        return HARNESSES
    if command == "export":
        return EXPORTS
    return ()


def completions(state: State) -> List[str]:
    """What the composer's text could become: a command, or what may follow it."""
    text = state.composer.text
    if not text.startswith("/") or "\n" in text:
        return []
    name, space, argument = text[1:].partition(" ")
    found = []
    if space:
        wanted = "/" + argument.lower()
        for choice in known_arguments(state, name):
            if wanted in f"/{choice.lower()}":  # from its start, or behind the owner
                found.append(f"/{name} {choice}")
        return found
    for word in COMMANDS.values():
        if word.command.startswith(name):
            end = " " if word.takes_argument else ""
            found.append(f"/{word.command}{end}")
    return found


# -- View: the state as rows of styled text


# A line of a pane, and the position of what it shows; None for a line that shows nothing.
PaneLine = Tuple[Line, Optional[int]]
PaneLines = List[PaneLine]
BLANK: PaneLine = ((), None)


EVENT_TYPES = {  # style, and the tag for a narrow window
    "started": ("run", "start"),
    "stream_started": ("run", "start"),
    "log": ("dim", "log"),
    "status_changed": ("accent", "state"),
    "tool_started": ("accent", "tool"),
    "tool_finished": ("accent", "tool"),
    "tool_call": ("accent", "tool"),
    "tool_result": ("accent", "tool"),
    "assistant_message": ("bold", "agent"),
    "cancel_requested": ("warn", "stop?"),
    "cancelled": ("warn", "stop"),
    "finished": ("ok", "done"),
    "failed": ("bad", "fail"),
}
# The keys that are useful now, the most useful first.
PANE_HINTS = {
    "composer": "Enter send · Tab pane · ^P palette · ^F filter · F1 help · ^C ^C quit",
    "timeline": (
        "j k move · Enter details · o open · x kill · f follow · / filter · ? keys · q quit"
        " · w wrap · y copy · r refresh"
    ),
    "rail": "j k move · Enter show · x kill · o open · ? keys · Tab composer · y copy",
    "filter": "type to filter · Enter keep · Esc clear",
}
SANDBOX_HINTS = (
    "j k move · Enter logs · o open preview · ? keys · Tab composer · y copy"
)
SIGN_IN_HINTS = "Enter opens the browser · or paste a token · ^C ^C quit"
WAITING_HINTS = "Esc gives up the wait · ^C ^C quit"
ROW_HINTS = {"x": "x kill", "o": "o open", "y": "y copy"}


def drawer_hints(drawer: Drawer) -> str:
    """What can be done in a drawer."""
    actions = drawer.listing.actions
    hints = "↑ ↓ move"
    if "enter" in actions:
        hints += " · Enter open"
    hints += " · Esc close"
    for key, hint in ROW_HINTS.items():
        if key in actions and not drawer.searching:
            hints += f" · {hint}"
    return hints + " · type to search"


def hints_of(state: State) -> str:
    focus = state.window.focus
    if state.drawer:
        return drawer_hints(state.drawer)
    if state.is_signed_out and focus == "composer":
        return WAITING_HINTS if state.sign_in.url else SIGN_IN_HINTS
    if focus == "rail" and isinstance(row_in_rail(state), KnownSandbox):
        return SANDBOX_HINTS
    return PANE_HINTS[focus]


def whole_hints(hints: str, width: int) -> str:
    """As many of the hints as have room: what does not fit is left out, not cut."""
    separator = " · "
    line = fitted(f" {hints}{separator}", width + len(separator), "")
    return line.rpartition(separator)[0]


def fill(line: Line, width: int, style: str = "") -> Row:
    """A line cut and padded to exactly ``width`` columns; ``style``, if given, for all of it."""
    row = []
    room = width
    for text, own in line:
        text = fitted(text, room)
        row.append((text, style or own))
        room -= width_of(text)
    if room:
        row.append((" " * room, style))
    return tuple(row)


def padded(lines: PaneLines, width: int, rows: int, selected: int) -> List[Row]:
    """Exactly ``rows`` rows: the lines, the selected one as such, and blank ones."""
    filled = []
    for line, position in lines[:rows]:
        style = "select" if position == selected else ""
        filled.append(fill(line, width, style))
    blank = fill([], width)
    return filled + [blank] * (rows - len(filled))


def ends(left: Line, right: Line, width: int) -> Row:
    """``left`` cut and padded, and ``right`` at the end of the row, where there is room."""
    room = width - columns_of(right)
    if room <= 0:
        return fill(left, width)
    return (*fill(left, room), *right)


def run_clock(state: State) -> str:
    """How long the shown run has taken: `` 12:41``."""
    run = state.shown.run
    known = run_named(state, state.shown.run_id)
    since = parse_time(run.get("createdAt")) or known.started_at
    until = state.now
    if run.get("status") in TERMINAL_STATUSES:
        until = parse_time(run.get("updatedAt")) or 0.0
    if not since or not until:
        return ""
    seconds = max(0, int(until - since))
    return f" {seconds // 60}:{seconds % 60:02d}"


BAR = (" │ ", "line")  # between the facts of the header


def shown_place(state: State, room: int) -> Line:
    """The repository of the shown run, and of its branch what there is room for."""
    run = state.shown.run
    known = run_named(state, state.shown.run_id)
    listed = repo_of(state, text_of(run, "repoId"))
    repo = listed.name or known.repo
    branch = state.shown.delivery.branch
    for kind in ("working", "base"):
        branch = branch or harmless(text_of(run, "branch", kind), 200)
    if not repo and not branch:
        return []
    repo = fit(repo, 28)
    place = [BAR, (repo, "bold")]
    if branch:
        branch = fit(f" ⎇ {branch}", room - columns_of(place))
        place.append((branch, "accent"))
    return place


def header(state: State, width: int) -> Row:
    """The shown run, and how the service answers."""
    run = state.shown.run
    words, style = health(state)
    right = [BAR, (f"{words} ", style)]
    left: List[Segment] = []
    before_status = (" ", "")
    if width >= 40 or not state.shown.run_id:
        left.append((" mogplex", "brand"))
        before_status = BAR
    if not state.shown.run_id:
        return ends(left, right, width)
    facts: List[Segment] = []
    harness = harmless(run.get("harness"), 16)
    if width >= 80 and harness:
        facts += [BAR, (harness, "")]
    status, status_style = status_label(status_of(run))
    facts += [before_status, (status.upper(), status_style)]
    room = width - columns_of(left + facts + right)
    clock = run_clock(state)
    if len(clock) <= room:
        facts.append((clock, "dim"))
        room -= len(clock)
    if width >= 60:
        left += shown_place(state, room)
    return ends(left + facts, right, width)


def takes_alert_keys(state: State) -> bool:
    """Whether Enter and Esc are for the first alert."""
    if state.drawer or state.is_signed_out or state.attention.killing:
        return False
    if state.window.focus != "composer":
        return False
    return not state.composer.text.strip()


def alert_row(state: State, alerts: Sequence[Notice], width: int) -> Row:
    """The first alert, and how many there are beside it."""
    first = alerts[0]
    text = f" !! {first.text}"
    if len(alerts) > 1:
        text += f" (+{len(alerts) - 1})"
    keys = " "
    if first.run_id and takes_alert_keys(state):
        for words in (" [Enter] open ", " [Enter] open  [Esc] dismiss "):
            if width_of(text + words) <= width:
                keys = words
    left = [(text, "")]
    right = [(keys, "")]
    row = ends(left, right, width)
    return fill(row, width, "alert")


def run_age(state: State, run: KnownRun) -> str:
    """How old a run is; of an active one whose status is older than 30 s, how old that is."""
    unheard_s = state.now - run.heard_at
    if is_active(run) and run.heard_at and unheard_s > 30:
        return f"{format_age(unheard_s)} old"
    if run.started_at:
        return format_age(state.now - run.started_at)
    return ""


def short_repo(name: str) -> str:
    """A repository's name without its owner, and a blank; "" for none."""
    name = name.rpartition("/")[2]
    if not name:
        return ""
    return fit(name, 14) + " "


def run_line(state: State, run: KnownRun, width: int) -> Row:
    """A run in the rail. Where it is narrow the age goes first, then the repository, the word."""
    sign = sign_of(run.status)
    name = f"{harmless(run.id, 4)} "
    repo = short_repo(run.repo)
    task = task_of(run)
    word = f" {run.status}"
    age = f" {run_age(state, run)}".rstrip()
    # The glyph, the marks and the blank at the end take five columns.
    room = width - 5 - width_of(name)
    room -= min(12, width_of(task))
    if width_of(repo + word + age) > room:
        age = ""
    if width_of(repo + word) > room:
        repo = ""
    if len(word) > room:
        word = ""
    mark = " "
    task_style = ""
    if run.id == state.shown.run_id:
        mark = "▸"
        task_style = "bold"
    left = [
        (f" {mark}", "accent"),
        (f"{sign.glyph} ", sign.style),
        (name + repo, "dim"),
        (task, task_style),
    ]
    right = [
        (word, sign.style),
        (f"{age} ", "dim"),
    ]
    return ends(left, right, width)


def sandbox_line(state: State, sandbox: KnownSandbox, width: int) -> Row:
    """A sandbox in the rail."""
    sign = sign_of(sandbox.status)
    repo = repo_of(state, sandbox.repo_id)
    left = [
        (f"  {sign.glyph} ", sign.style),
        (short_repo(repo.name), "dim"),
        (sandbox.branch, ""),
    ]
    right = [(f" {sandbox.status} ", sign.style)]
    return ends(left, right, width)


def row_detail(state: State) -> str:
    """The selected row of the rail in full."""
    row = row_in_rail(state)
    if row is None:
        return ""
    name = harmless(row.id, 8)
    if isinstance(row, KnownRun):
        place = [name, row.repo]
        age = run_age(state, row)
        status = f"{row.status or '…'} {age}".rstrip()
        task = task_of(row)
    else:
        repo = repo_of(state, row.repo_id)
        place = [name, repo.name, row.branch]
        status = row.status
        task = ""
    words = " ".join(filter(None, place))
    facts = [words, status, row.error, task]
    return " · ".join(filter(None, facts))


def around(at: int, count: int, rows: int) -> range:
    """Which of ``count`` rows are on the screen, so that row ``at`` is among ``rows`` of them."""
    bottom = min(at, count - 1)
    top = max(0, bottom - rows + 1)
    return range(top, min(count, top + rows))


def whole(text: str, style: str, width: int, most: int) -> List[Line]:
    """A text that is to be read to its end, in at most so many lines."""
    pieces = folded(text, width - 2)
    return [[(f" {piece}", style)] for piece in pieces[:most]]


def counted(title: str, count: int, some: int, word: str, style: str) -> PaneLine:
    """`` RUNS 4 · 2 active``."""
    line = [(f" {title} {count}", style)]
    if some:
        line.append((f" · {some} {word}", "dim"))
    return line, None


def selected_in_rail(state: State) -> int:
    """The row of the rail that is selected; -1 while it has not the focus."""
    if state.drawer or state.window.focus != "rail":
        return -1
    return selected_row(state)


def rail_lines(state: State, width: int, rows: int) -> PaneLines:
    """Runs and sandboxes, each with at least a third of the rail, and the selected row in full."""
    runs = state.rail.runs
    sandboxes = state.rail.sandboxes
    at = selected_row(state)
    style = "bold"
    if selected_in_rail(state) >= 0:
        style = "key"
    most = 3
    if rows < 12:
        most = 1
    detail = whole(row_detail(state), "dim", width, most)
    room = max(2, rows - len(detail) - 2)
    for_sandboxes = max(room // 3, room - len(runs))
    for_sandboxes = min(len(sandboxes), for_sandboxes)
    for_runs = room - for_sandboxes
    active = count_active(runs)
    lines = [counted("RUNS", len(runs), active, "active", style)]
    for position in around(at, len(runs), for_runs):
        row = run_line(state, runs[position], width)
        lines.append((row, position))
    running = sum(sandbox.status == "running" for sandbox in sandboxes)
    lines.append(counted("SANDBOXES", len(sandboxes), running, "running", style))
    before = len(runs)
    for position in around(at - before, len(sandboxes), for_sandboxes):
        row = sandbox_line(state, sandboxes[position], width)
        lines.append((row, before + position))
    while len(lines) + len(detail) < rows:
        lines.append(BLANK)
    return lines + [(line, None) for line in detail]


def strip(state: State, width: int) -> Row:
    """The rail in one row, the shown run first."""
    runs = list(state.rail.runs)
    shown = run_named(state, state.shown.run_id)
    if shown in runs:
        runs.remove(shown)
        runs.insert(0, shown)
    left = [(f" RUNS {len(runs)} ", "bold")]
    for run in runs[:6]:
        sign = sign_of(run.status)
        mark = "▸" if run == shown else " "
        name = harmless(run.id, 4)
        label = f"{sign.glyph} {name} {run.status}".strip()
        task = fit(task_of(run), 16)
        left += [
            (mark, "accent"),
            (f"{label} ", sign.style),
            (f"{task} ", ""),
        ]
    right: List[Segment] = []
    if width >= 60:
        count = len(state.rail.sandboxes)
        right.append((f" SANDBOXES {count} ", "bold"))
    return ends(left, right, width)


def progress_text(state: State) -> str:
    """What a run does that has not ended, as far as is known."""
    shown = state.shown
    if not shown.entries:
        return "… waiting for the first event"
    words = "… agent working"
    service = state.service
    if service.failures or service.refused or shown.lost:
        words = "… no news from the service"
    newest = shown.entries[-1].event
    heard_at = parse_time(newest.get("createdAt"))
    if not heard_at:
        return words
    age = format_age(state.now - heard_at)
    return f"{words}, last event {age} ago"


def outcome(state: State) -> Line:
    """The line after the newest entry: that the run is at work, or how it ended and why."""
    shown = state.shown
    verdict = shown.verdict
    status = status_of(shown.run)
    if shown.lost and not shown.again_at:
        return [(f"✗ cannot be followed: {shown.lost}", "bad")]
    if not verdict and status not in TERMINAL_STATUSES:
        return [(progress_text(state), "dim")]
    label, style = status_label(status)
    error = harmless(shown.run.get("error"))
    words = with_reason(label, error)
    line = [(words, style)]
    url = web_url(state)
    if url != state.service.base_url:
        line.append((f" · o opens {url}", ""))
    if verdict and verdict.truncated:
        line.append((" · the service lists no later events of this run", "warn"))
    return line


def entry_lines(entry: Entry, width: int, wrap: bool) -> List[Line]:
    """An event: one line, or as many as its text needs."""
    style, tag = EVENT_TYPES.get(entry.kind, ("", entry.kind))
    loud = ""
    if style in ("ok", "bad", "warn"):
        loud = style
    if width >= 60:
        kind = fit(entry.kind, 17)
        lead = [
            (f" {entry.time:8}  ", "dim"),
            (f"{kind:17} ", style),
        ]
    else:
        tag = fit(tag, 6)
        lead = [(f" {tag:6} ", style)]
    if not wrap:
        return [[*lead, (entry.text, loud)]]
    indent = columns_of(lead)
    room = max(10, width - indent)
    lines: List[Line] = []
    for piece in folded(entry.text, room):
        lines.append([*lead, (piece, loud)])
        lead = [(" " * indent, "")]
    return lines


def page_above(
    state: State, entries: Sequence[Entry], at: int, width: int, rows: int
) -> int:
    """The first entry of a page that ends with entry ``at``."""
    first = at
    height = 0
    for position in range(at, -1, -1):
        lines = entry_lines(entries[position], width, state.window.wrap)
        height += len(lines)
        if height > rows:
            break
        first = position
    return first


def first_shown(state: State, width: int, rows: int) -> int:
    """The first entry on the screen, so that the selected one is; moved as little as needed."""
    window = state.window
    entries = passing(state)
    if not entries:
        return 0
    at = selected_entry(state)
    first = page_above(state, entries, at, width, rows)
    if window.follow:
        return first
    last = page_above(state, entries, len(entries) - 1, width, rows)
    return max(first, min(window.top, at, last))


def timeline_title(state: State, count: int, width: int) -> Line:
    """The shown run, whether its newest events are followed, and how many pass the filter.

    What does not fit is left out, but for the filter.
    """
    window = state.window
    name = harmless(state.shown.run_id, 8)
    style = "bold"
    if window.focus == "timeline":
        style = "key"
    mode = ("PAUSED", "warn")
    if window.follow:
        mode = ("FOLLOW", "ok")
    line = [
        (" TIMELINE ", style),
        (f"{name}  ", ""),
        mode,
    ]
    kinds = " · all types"
    if window.filter:
        kinds = f" · filter: {window.filter}"
    events = f" · {count} events"
    if count == 1:
        events = " · 1 event"
    for part in (kinds, events):
        columns = columns_of(line) + width_of(part)
        if columns <= width or window.filter:
            line.append((part, "dim"))
    return line


def timeline_lines(state: State, width: int, rows: int) -> PaneLines:
    """Title, entries, and a last line: the state of the run, or how many are newer."""
    entries = passing(state)
    window = state.window
    title = timeline_title(state, len(entries), width)
    lines: PaneLines = [(title, None)]
    top = first_shown(state, width, rows - 2)
    end = top
    while end < len(entries):
        entry = entry_lines(entries[end], width, window.wrap)
        if end > top and len(lines) + len(entry) >= rows:
            break
        lines += [(line, end) for line in entry]
        end += 1
    lines = lines[: rows - 1]
    if window.follow:
        indent = 11 if width >= 60 else 1
        lead = (" " * indent, "")
        last = [lead, *outcome(state)]
        return [*lines, (last, None)]
    newer = "▼ End follows "
    if end < len(entries):
        count = len(entries) - end
        newer = f"▼ {count} newer (End) "
    row = ends([], [(newer, "warn")], width)
    return [*lines, (row, None)]


def welcome(state: State, width: int) -> List[Segment]:
    """What the body says without a run, or while nobody is signed in; a segment a line."""
    blank = ("", "")
    url = state.sign_in.url
    base_url = state.service.base_url
    if url:
        pieces = wrapped(url, width - 6)
        return [
            (
                "Waiting for the browser. If none opened, open this address yourself:",
                "bold",
            ),
            blank,
            *((piece, "accent") for piece in pieces),
            blank,
            ("Esc gives up the wait.", "dim"),
        ]
    if state.is_signed_out:
        return [
            ("Sign in to Mogplex", "bold"),
            (base_url, "accent"),
            blank,
            ("Enter            opens your browser, and comes back here by itself", ""),
            ("paste a token    then Enter; create tokens at", ""),
            (f"                 {base_url}/settings/api-keys", "accent"),
            blank,
            ("Esc tries the stored sign-in again.", "dim"),
        ]
    return [
        ("Type a task and press Enter to start a run.", "bold"),
        blank,
        ("/repo     choose the repository", ""),
        ("/attach   watch a run started elsewhere", ""),
        ("/help     every key and command", ""),
    ]


def welcome_lines(state: State, width: int, rows: int) -> PaneLines:
    segments = welcome(state, width)[:rows]
    columns = min(3, width // 20)
    indent = (" " * columns, "")
    above = (rows - len(segments)) // 3
    lines = [BLANK] * above
    for segment in segments:
        lines.append(([indent, segment], None))
    return lines


def have_room(widths: Sequence[int], width: int) -> bool:
    """Whether columns fit, of which the last may be cut, but not below 12."""
    *others, last = widths
    return sum(others) + min(last - 2, 12) <= width


def column_widths(
    columns: Sequence[Heading],
    rows: Sequence[Sequence[str]],
    width: int,
) -> List[int]:
    """How wide the columns are, with the gap behind them; 0 for those that are left out.

    Where they have no room they are as wide as these rows need them, and if that is too much
    they are left out from the right, but the last one last.
    """
    widths = [column.width + 2 for column in columns]
    last = len(widths) - 1
    if not widths or have_room(widths, width):
        return widths
    for at, cells in enumerate(zip(*rows)):
        needed = max(map(width_of, cells)) + 2
        widths[at] = min(widths[at], needed)
    for at in (*range(last - 1, 0, -1), last):
        if not have_room(widths, width):
            widths[at] = 0
    return widths


def cells_text(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells of a row below each other's titles."""
    if not widths:
        return cells[0]
    line = ""
    for text, room in zip(cells, widths):
        if room:
            text = fitted(text, room - 2)
            line += text + " " * (room - width_of(text))
    return line.rstrip()


def drawer_title(drawer: Drawer, width: int) -> Row:
    """What it lists, what is searched for in it, and which row of how many is selected."""
    title = drawer.listing.title.upper()
    name = " ".join([title, *drawer.subject])
    name = harmless(name, 60)
    left = [(f" {name}  ", "key")]
    found = len(drawer.found)
    row = min(drawer.at + 1, found)
    count = f" {row}/{found} · Esc closes "
    hint = "type to search"
    if drawer.query or drawer.searching:
        left.append((f"/{drawer.query}", "accent"))
    elif columns_of(left) + len(hint + count) <= width:
        left.append((hint, "dim"))
    return ends(left, [(count, "dim")], width)


def drawer_remark(drawer: Drawer) -> Line:
    """What is said above the rows, or in their place."""
    if drawer.error:
        return [(f"   {drawer.error} · retrying", "bad")]
    if drawer.found:
        return []
    words = "nothing here"
    if drawer.query:
        words = "no match"
    elif drawer.listing.reads and drawer.data is None:
        words = "loading…"
    return [(f"   {words}", "dim")]


def drawer_lines(drawer: Drawer, width: int, rows: int) -> PaneLines:
    """Title, the columns' titles, and the rows around the selected one; the present is marked."""
    found = drawer.found
    columns = drawer.listing.columns
    titles = [column.title for column in columns]
    near = around(drawer.at, len(found), rows)
    cells = [found[position].cells for position in near]
    widths = column_widths(columns, [titles, *cells], width - 3)
    lines: PaneLines = [(drawer_title(drawer, width), None)]
    if any(titles):
        title = "   " + cells_text(titles, widths)
        below = [(title, "dim")]
        lines.append((below, None))
    remark = drawer_remark(drawer)
    if remark:
        lines.append((remark, None))
    room = rows - len(lines)
    for position in around(drawer.at, len(found), room):
        item = found[position]
        mark = "   "
        if item.present:
            mark = " ▸ "
        elif not columns:
            mark = " "
        text = cells_text(item.cells, widths)
        line = [
            (mark, "accent"),
            (text, item.style),
        ]
        lines.append((line, position))
    return lines


def body_lines(state: State, width: int, rows: int) -> PaneLines:
    """The drawer, the timeline, or what there is to do without them."""
    if state.drawer:
        return drawer_lines(state.drawer, width, rows)
    if state.shown.run_id and not state.is_signed_out:
        return timeline_lines(state, width, rows)
    return welcome_lines(state, width, rows)


def selected_in_body(state: State) -> int:
    """The position of the selected line of the body; -1 while it has not the focus."""
    if state.drawer:
        return state.drawer.at
    if state.window.focus != "timeline":
        return -1
    return selected_entry(state)


def is_token_field(state: State) -> bool:
    """Whether what is typed into the composer is a token, never to be shown."""
    return state.is_signed_out and not state.composer.text.startswith("/")


def composer_rows(text: str, room: int) -> List[str]:
    """The lines of a text, each with a place for the cursor behind its end."""
    text = text.replace("\n", " \n") + " "
    return wrapped(text, room)


def being_typed(state: State) -> Tuple[str, str, int]:
    """The mark before what is being typed, how that is shown, and where the cursor is in it."""
    if state.window.focus == "filter":
        text = state.window.filter
        return "/", text, len(text)
    text = state.composer.text.replace("\t", " ")
    if is_token_field(state):
        text = "•" * len(text)
    return "›", text, state.composer.cursor


def composer_lines(state: State, width: int, most: int) -> List[Line]:
    """What is being typed, as much as fits around the cursor: an empty segment of its own style."""
    mark, text, cursor = being_typed(state)
    room = width - 4
    reach = room * most
    start = max(0, cursor - reach)
    end = cursor + reach
    before = composer_rows(text[start:cursor], room)
    rows = composer_rows(text[start:end], room)
    at = len(before) - 1
    column = len(before[at]) - 1
    lines = [[(row, "")] for row in rows]
    style = "dim"
    focus = state.window.focus
    if focus in ("composer", "filter") and not state.drawer:
        style = "key"
        lines[at] = [
            (rows[at][:column], ""),
            ("", "cursor"),
            (rows[at][column:], ""),
        ]
    output: List[Line] = []
    for row in around(at, len(rows), most):
        lead = mark if row == 0 else " "
        line = [(f" {lead} ", style), *lines[row]]
        output.append(line)
    return output


def question_lines(state: State, width: int) -> List[Line]:
    """The question before a run is cancelled; whole, however narrow the window is."""
    run = run_named(state, state.attention.killing)
    name = harmless(run.id, 8)
    room = min(40, width - 5)
    task = fit(task_of(run), room)
    question = f"Cancel run {name}, {task}?  y yes · any other key no"
    return whole(question, "alert", width, 5)


def completion_hint(state: State, width: int) -> Line:
    """What the composer's text may become; nothing where it is no command."""
    found = completions(state)
    if not found:
        return []
    command = state.composer.text
    if len(found) == 1:
        command, _, _ = found[0].partition(" ")
    word = COMMANDS.get(command[1:])
    if word:
        return [
            (f" /{word.call}  ", "key"),
            (word.does, "dim"),
        ]
    names = " · ".join(map(str.strip, found))
    return [
        (" Tab", "dim"),
        (whole_hints(names, width - 5), "key"),
    ]


def hint_line(state: State, width: int) -> Line:
    """The last row: a start under way, what can be completed, else the keys."""
    for new in state.next.starts:
        if new.under_way and not new.run_id:
            return [(" Starting a run…", "run")]
    if state.sign_in.checking:
        return [(" Trying the token…", "run")]
    hint: Line = []
    if state.window.focus == "composer" and not state.drawer:
        hint = completion_hint(state, width)
    if hint:
        return hint
    hints = whole_hints(hints_of(state), width)
    return [(hints, "dim")]


def below_composer(state: State, width: int) -> List[Line]:
    """A question, a notice or the hints."""
    attention = state.attention
    notice = attention.notice
    if attention.killing:
        return question_lines(state, width)
    if attention.notice_until > state.now:
        return whole(notice.text, notice.style, width, 3)
    return [hint_line(state, width)]


def rule_rows(state: State, side: int, width: int, height: int) -> List[Row]:
    """The line above the composer, and what comes next: below it, in a low window upon it."""
    target = state.next.target
    rule = "─" * width
    if side:
        rule = rule[: side - 1] + "┴" + rule[side:]
    if height < 20:
        words = target_text(target, width - 9)
        text = f"─ next: {words} "
        rest = rule[width_of(text) :]
        line = [(text, "accent"), (rest, "line")]
        return [fill(line, width)]
    line = [(rule, "line")]
    words = target_text(target, width - 7)
    below = [(" next: ", "dim"), (words, "accent")]
    return [fill(line, width), fill(below, width)]


class Layout(NamedTuple):
    """What is above and below the body, how many rows that leaves, and the columns of the rail."""

    head: List[Row]
    foot: List[Row]
    rows: int
    side: int


def layout_of(state: State, width: int, height: int) -> Layout:
    side = rail_width(width)
    head = [header(state, width)]
    alerts = alerts_of(state)
    if alerts:
        head.append(alert_row(state, alerts, width))
    if not side and height >= 12:
        head.append(strip(state, width))
    most = max(1, min(height // 4, 8))
    if state.attention.killing:
        most = 1
    lines = composer_lines(state, width, most)
    lines += below_composer(state, width)
    foot = rule_rows(state, side, width, height)
    foot += [fill(line, width) for line in lines]
    rows = max(0, height - len(head) - len(foot))
    return Layout(head, foot, rows, side)


def view(state: State, width: int, height: int) -> List[Row]:
    """The whole screen: ``height`` rows, each of exactly ``width`` columns."""
    if width < 30 or height < 8:
        above = [BLANK] * (height // 2)
        words = [("enlarge the window", "warn")]
        lines = [*above, (words, None)]
        return padded(lines, width, height, -1)
    head, foot, rows, side = layout_of(state, width, height)
    at = selected_in_body(state)
    lines = body_lines(state, width - side, rows)
    body = padded(lines, width - side, rows, at)
    if side:
        at = selected_in_rail(state)
        lines = rail_lines(state, side - 1, rows)
        rail = padded(lines, side - 1, rows, at)
        edge = ("│", "line")
        body = [(*left, edge, *right) for left, right in zip(rail, body)]
    screen = head + body + foot
    return screen[:height]


# -- Keys


def insert(state: State, text: str) -> State:
    """With ``text`` typed into whatever takes words now."""
    if state.drawer:
        query = state.drawer.query + sanitize(text, " ")
        return state.shift(
            query=query[:200],
            searching=True,
            at=0,
        )
    if state.window.focus == "filter":
        words = state.window.filter + sanitize(text, " ")
        return state.look(filter=words[:200])
    lines = []
    for line in text.split("\n"):
        cells = map(sanitize, line.split("\t"))
        lines.append("\t".join(cells))
    composer = state.composer
    before = composer.text[: composer.cursor]
    after = composer.text[composer.cursor :]
    before += "\n".join(lines)
    return state.write(before + after, len(before))


Place = Callable[[Composer], int]


def go_to(state: State, place: Place) -> State:
    """With the cursor at a place of the composer's text."""
    cursor = place(state.composer)
    return state.write(state.composer.text, cursor)


def delete_to(state: State, place: Place) -> State:
    """Without what is between the cursor and that place."""
    composer = state.composer
    ends = (composer.cursor, place(composer))
    start = min(ends)
    before = composer.text[:start]
    after = composer.text[max(ends) :]
    return state.write(before + after, start)


def follow(state: State) -> State:
    """Follow the newest event, or stay at the selected one."""
    at = max(0, selected_entry(state))
    follow = not state.window.follow
    return state.look(follow=follow, at=at)


def select_entry(state: State, at: int, may_follow: bool) -> State:
    """With this entry selected; at the last one the newest may be followed again."""
    window = state.window
    layout = layout_of(state, window.width, window.height)
    width = window.width - layout.side
    rows = layout.rows - 2
    last = len(passing(state)) - 1
    at = max(0, min(at, last))
    top = first_shown(state, width, rows)
    state = state.look(
        at=at,
        top=top,
        follow=False,
    )
    top = first_shown(state, width, rows)
    follow = may_follow and at >= last
    return state.look(top=top, follow=follow)


FAR = 10**9  # more rows than anything has


def move_in_rail(state: State, step: int) -> State:
    at = selected_row(state) + step
    return state.with_rail(at=max(0, at))


def move(state: State, step: int) -> State:
    """By so many lines in the drawer, else in the rail where that has the focus, else in time."""
    if state.drawer:
        at = state.drawer.at + step
        return state.shift(at=max(0, at))  # the last row at the most
    if state.window.focus == "rail":
        return move_in_rail(state, step)
    at = selected_entry(state) + step
    return select_entry(state, at, may_follow=step > 0)


def turn_page(state: State, pages: int) -> State:
    rows = max(1, state.window.height - 9)
    return move(state, pages * rows)


def to_line_end(state: State) -> State:
    """The end of the line; with nothing typed, the newest event."""
    if not state.composer.text:
        return move(state, FAR)
    return go_to(state, Composer.line_end)


def recall(state: State, back: int) -> State:
    """With the text that was sent so many lines before; 0 is the one being typed."""
    composer = state.composer
    history = composer.history
    draft = composer.draft
    if not composer.recalled:
        draft = composer.text
    back = min(back, len(history))
    text = draft
    if back > 0:
        text = history[-back]
    composer = composer._replace(
        recalled=max(0, back),
        draft=draft,
    )
    state = state._replace(composer=composer)
    return state.write(text)


def typed_up(state: State) -> State:
    """Up by a line of the text, and from its first line into the history."""
    composer = state.composer
    start = composer.line_start()
    if start:
        return state.write(composer.text, start - 1)
    return recall(state, composer.recalled + 1)


def typed_down(state: State) -> State:
    """Down by a line of the text, and from its last line back through the history."""
    composer = state.composer
    end = composer.line_end()
    if end < len(composer.text):
        return state.write(composer.text, end + 1)
    return recall(state, composer.recalled - 1)


def complete(state: State) -> State:
    """Tab: as far as all completions agree; where there is nothing to complete, the next pane."""
    found = completions(state)
    if not found:
        return state.look(focus="timeline")
    text = state.composer.text
    common = os.path.commonprefix(found)
    if len(common) > len(text):
        return state.write(common)
    return state


def stop_sign_in(state: State) -> State:
    """Wait for no browser any more."""
    state = state.admit(url="")
    return state.ask(Shell.stop_sign_in)


def send_token(state: State, token: str) -> State:
    """Enter at the sign-in: try the token; without one, open the browser."""
    state = state.write("")
    if not token:
        return state.ask(Desk.sign_in)
    state = stop_sign_in(state)
    state = state.admit(checking=True)
    return state.ask(Desk.try_token, token)


def send(state: State) -> State:
    """Enter in the composer: a token while signed out, else a command or a task, else the alert."""
    line = state.composer.text.strip()
    if is_token_field(state):
        return send_token(state, line)
    if line:
        earlier = state.composer.history
        history = [old for old in earlier if old != line]
        history.append(line)
        newest = tuple(history[-200:])
        composer = Composer(history=newest)
        state = state._replace(composer=composer)
        return perform(state, line)
    alerts = state.attention.alerts
    if alerts and alerts[0].run_id:
        return watch_known(state, alerts[0].run_id)
    return state


def dismiss(state: State) -> State:
    """Esc in the composer: the wait for a browser, the sign-in, the first alert, the filter."""
    if state.sign_in.url:
        return stop_sign_in(state)
    if state.is_signed_out:
        state = state.write("")
        return state.ask(Desk.try_stored)
    alerts = state.attention.alerts
    if alerts:
        return state.attend(alerts=alerts[1:])
    return state.look(filter="")


def wrap(state: State) -> State:
    wrap = not state.window.wrap
    return state.look(wrap=wrap)


def open_event(state: State) -> State:
    """The selected event in full."""
    entries = passing(state)
    if not entries:
        return state
    entry = entries[selected_entry(state)]
    return state.open(EVENT, data=entry.event)


def copy_event(state: State) -> State:
    entries = passing(state)
    if not entries:
        return state
    entry = entries[selected_entry(state)]
    return copied(state, entry.text)


def quit_pane(state: State) -> State:
    """q: leave, but not with a half-typed task."""
    if state.composer.text:
        return state.say(
            "The composer holds a task: press Ctrl+C twice to leave.", "warn"
        )
    return state.ask(Shell.leave)


def drop_filter(state: State) -> State:
    return state.look(focus="composer", filter="")


def step_pane(state: State, step: int) -> State:
    """Tab, or Shift+Tab where ``step`` is -1: to the next of the panes that are there."""
    window = state.window
    panes = ["composer", "timeline"]
    if rail_width(window.width) and row_in_rail(state):
        panes.append("rail")
    at = 0
    if window.focus in panes:
        at = panes.index(window.focus)
    at = (at + step) % len(panes)
    return state.go(panes[at])


def shorten(state: State) -> State:
    """Without the last letter of the search, or of the filter; one of nothing ends."""
    drawer = state.drawer
    if drawer is None:
        words = state.window.filter
        return state.look(filter=words[:-1])
    query = drawer.query
    if not query:
        return state.shift(searching=False)
    return state.shift(query=query[:-1], at=0)


def interrupt(state: State) -> State:
    """Ctrl+C: closes a drawer or clears the composer; a second one within 1.5 s leaves."""
    if state.attention.armed_until > state.now:
        return state.ask(Shell.leave)
    if state.drawer or state.window.focus == "filter":
        state = state.go("composer")
    else:
        state = state.write("")
    state = stop_sign_in(state)
    state = state.attend(armed_until=state.now + 1.5)
    words = "Press Ctrl+C again within 1.5 s to leave; runs continue."
    return state.say(words, "warn", 1.5)


def switch_mouse(state: State) -> State:
    """The mouse on, or off so that the terminal selects text."""
    mouse = not state.window.mouse
    state = state.look(mouse=mouse)
    state = state.ask(Screen.switch_mouse, mouse)
    if mouse:
        return state.say("Mouse on: the wheel scrolls, a click selects.")
    return state.say("Mouse off: the terminal selects text.")


ANYWHERE = (
    Action("^c", "close or clear; twice: leave", interrupt),
    Action("^p", "palette", show_palette),
    Action("f1", "help", show_help),
    Action("^f", "filter the timeline", State.go, "filter"),
    Action("^l", "repaint", State.ask, Screen.repaint),
    Action("^z", "suspend", State.ask, Screen.suspend),
    Action("^t", "mouse on or off", switch_mouse),
)
MOVES = (
    Action("up k", "up", move, -1),
    Action("down j", "down", move, 1),
    Action("pgup", "a page up", turn_page, -1),
    Action("pgdown", "a page down", turn_page, 1),
    Action("home g", "the first", move, -FAR),
    Action("end G", "the last", move, FAR),
)
PANE = (
    *MOVES,
    Action("f", "follow the newest event, or stop", follow),
    Action("w", "wrap long lines, or cut them", wrap),
    Action("tab", "the next pane", step_pane, 1),
    Action("btab", "the pane before", step_pane, -1),
    Action("/", "filter the timeline", State.go, "filter"),
    Action(":", "palette", show_palette),
    Action("r", "ask the service now", refresh),
    Action("q", "leave", quit_pane),
    Action("esc", "the composer", State.go, "composer"),
)
TIMELINE_PANE = (
    Action("enter", "the event in full", open_event),
    Action("x", "cancel the shown run, after a question", kill),
    Action("o", "open the pull request, else the preview, else the web page", open_web),
    Action("y", "copy the event", copy_event),
    *PANE,
)
RAIL_PANE = (
    Action("enter", "show the run, or the sandbox's logs", act_on_row, "enter"),
    Action("x", "cancel the selected run, after a question", act_on_row, "x"),
    Action("o", "open its pull request or preview", act_on_row, "o"),
    Action("y", "copy its id", act_on_row, "y"),
    *PANE,
)
FILTER_PANE = (
    Action("enter tab", "keep the filter", State.go, "timeline"),
    Action("esc", "clear the filter", drop_filter),
    Action("backspace", "delete a letter", shorten),
    *MOVES,  # whose letters are typed here
)
DRAWER_PANE = (
    Action("enter", "open the selected row", act_on_row, "enter"),
    Action("esc", "close", State.close),
    Action("backspace", "delete a letter of the search", shorten),
    *MOVES,
)
COMPOSER_PANE = (
    Action("enter", "send", send),
    Action("newline ^j", "a new line", insert, "\n"),
    Action("tab", "complete, else the next pane", complete),
    Action("btab", "the pane before", step_pane, -1),
    Action("esc", "dismiss", dismiss),
    Action("backspace", "delete a character", delete_to, Composer.char_before),
    Action("delete ^d", "delete the next character", delete_to, Composer.char_after),
    Action("^w", "delete a word", delete_to, Composer.word_start),
    Action("^u", "delete all before the cursor", delete_to, Composer.start),
    Action("^k", "delete to the end of the line", delete_to, Composer.line_end),
    Action("left ^b", "a character left", go_to, Composer.char_before),
    Action("right", "a character right", go_to, Composer.char_after),
    Action("alt+b ctrl+left alt+left", "a word left", go_to, Composer.word_start),
    Action("alt+f ctrl+right alt+right", "a word right", go_to, Composer.word_end),
    Action("home ^a", "the start of the line", go_to, Composer.line_start),
    Action("end ^e", "the end of the line", to_line_end),
    Action("up", "up, then the history", typed_up),
    Action("down", "down, then the history", typed_down),
    Action("pgup", "the timeline a page up", turn_page, -1),
    Action("pgdown", "the timeline a page down", turn_page, 1),
)
PANES = {
    "timeline": TIMELINE_PANE,
    "rail": RAIL_PANE,
    "filter": FILTER_PANE,
    "composer": COMPOSER_PANE,
}


def bindings_of(state: State) -> Sequence[Action]:
    """The keys of the drawer, or of the pane that has the focus."""
    if state.drawer:
        return DRAWER_PANE
    return PANES[state.window.focus]


def takes_words(state: State) -> bool:
    """Whether letters are typed into something, rather than keys or an answer."""
    if state.attention.killing:
        return False
    if state.drawer:
        return True
    return state.window.focus in ("composer", "filter")


def touched(state: State, name: str = "") -> State:
    """What every key also does: dismiss the notice and disarm the second Ctrl+C."""
    if name != "^c":
        state = state.attend(armed_until=0.0)
    return state.attend(notice_until=0.0)


def answered(state: State, name: str) -> State:
    """The key after the question whether to cancel: a yes only where that could be read."""
    run_id = state.attention.killing
    is_yes = name in ("y", "Y")
    state = state.attend(killing="")
    if is_yes and not is_too_small(state):
        return state.ask(Desk.cancel, run_id)
    state = state.say("Not cancelled.")
    if name == "^c":
        return interrupt(state)
    return state


def on_key(state: State, message: Key) -> State:
    """A key does what the table of its pane says."""
    name = message.name
    state = touched(state, name)
    if state.attention.killing:
        return answered(state, name)
    bindings = bindings_of(state)
    if name == "?" and not takes_words(state):
        items = key_items((*bindings, *ANYWHERE))
        return state.open(HELP, data=items)
    for binding in (*ANYWHERE, *bindings):
        if name in binding.call.split():
            return binding.perform(state)
    return state


def on_text(state: State, message: Text) -> State:
    """What was typed: words where words are taken, else keys, one after another.

    Letters that arrive in one read never quit, cancel, answer a question or act on a row.
    """
    text = message.text
    # It is one text and runs nothing; from a pane it goes to the composer.
    if message.pasted:
        state = touched(state)
        state = state.attend(killing="")
        return insert(state, text)
    alone = len(text) == 1
    if state.attention.killing and not alone:
        return on_key(state, Key(""))
    while text and not takes_words(state):
        letter = text[0]
        text = text[1:]
        if alone or letter not in "qx":
            state = on_key(state, Key(letter))
    if not text:
        return state
    state = touched(state)
    drawer = state.drawer
    if alone and drawer and not drawer.searching:
        actions = drawer.listing.actions
        if text in actions:
            return act_on_row(state, text)
        # Letters are keys in this drawer until a search begins.
        if text == "/" and "y" in actions:
            return state.shift(searching=True)
    return insert(state, text)


def on_resize(state: State, message: Resize) -> State:
    """A rail that is no longer there keeps no focus."""
    width = message.columns
    state = state.look(
        width=width,
        height=message.lines,
    )
    state = state.shift(lines=())
    if state.window.focus == "rail" and not rail_width(width):
        return state.look(focus="timeline")
    return state


def turn_wheel(state: State, message: Mouse) -> State:
    """The wheel scrolls what is under it, wherever the focus is."""
    focus = state.window.focus
    if message.column < rail_width(state.window.width):
        return move_in_rail(state, message.step)
    state = state.look(focus="timeline")
    state = move(state, message.step)
    return state.look(focus=focus)


def click(state: State, in_rail: bool, at: int) -> State:
    """Select what is there; where that changes nothing, do what Enter does."""
    if in_rail:
        clicked = state.go("rail")
        clicked = clicked.with_rail(at=at)
    elif state.drawer:
        clicked = state.shift(at=at)
    else:
        clicked = state.look(focus="timeline")
        clicked = select_entry(clicked, at, may_follow=True)
    if clicked == state:
        return on_key(state, Key("enter"))
    return clicked


def on_mouse(state: State, message: Mouse) -> State:
    """A click selects what is under it; a click on what is selected opens it."""
    if message.step:
        return turn_wheel(state, message)
    state = touched(state)
    if is_too_small(state) or state.attention.killing:
        return state
    window = state.window
    layout = layout_of(state, window.width, window.height)
    side = layout.side
    row = message.row - len(layout.head)
    if row < 0:
        return state
    if row >= layout.rows:
        return state.go("composer")
    in_rail = message.column < side
    if in_rail:
        lines = rail_lines(state, side - 1, layout.rows)
    else:
        width = window.width - side
        lines = body_lines(state, width, layout.rows)
    if row >= len(lines):
        return state
    _, at = lines[row]
    if at is None:
        return state
    return click(state, in_rail, at)


# -- Answers of the workers


def put_first(state: State, known: KnownRun) -> State:
    """With a run at the head of the rail; what was selected there stays so."""
    at = 0
    if state.window.focus == "rail":
        at = state.rail.at + 1
    runs = (known, *state.rail.runs)
    return state.with_rail(runs=runs, at=at)


def added(state: State, known: KnownRun, run: Record) -> State:
    """With a run that was started elsewhere in the rail, and written to the history."""
    repo_id = text_of(run, "repoId")
    repo = repo_of(state, repo_id).name
    began = parse_time(run.get("createdAt")) or 0.0
    known = known._replace(repo=repo, started_at=began)
    state = put_first(state, known)
    return state.ask(Desk.remember, repo, run)


def alarmed(state: State, run_id: str, reason: str) -> State:
    """With an alert of a run that ended badly, in place of an earlier one."""
    name = harmless(run_id, 8)
    alert = Notice(f"run {name} {reason}", run_id=run_id)
    state = without_alert(state, run_id)
    alerts = (*state.attention.alerts, alert)
    return state.attend(alerts=alerts)


def heard(state: State, run_id: str, run: Record) -> State:
    """With what an answer says of a run: in the header, in the rail, and as an alert."""
    status = status_of(run)
    error = harmless(run.get("error"), 200)
    if not status:
        return state
    known = run_named(state, run_id)
    was = known.status
    if run_id == state.shown.run_id:
        was = was or text_of(state.shown.run, "status")
        state = state.show(run=run)
        if known not in state.rail.runs:
            state = added(state, known, run)
    if is_bad_end(status) and was and not is_bad_end(was):
        reason = with_reason(status, error)
        state = alarmed(state, run_id, reason)
    return change_runs(
        state,
        [run_id],
        status=status,
        error=error,
        heard_at=state.now,
    )


def delivered(state: State, delivery: Delivery) -> State:
    """With the branch and the pull request of the shown run.

    Of a run that was started here, from this very target, untouched since, the next task
    continues on the branch. No other run moves the target, live or replayed.
    """
    branch = harmless(delivery.branch, 200)
    url = harmless(delivery.pull_request_url, 2000)
    harmless_one = Delivery(branch, url)
    known = state.shown.delivery.then(harmless_one)
    state = state.show(delivery=known)
    target = state.next.target
    if state.shown.origin != target:
        return state
    if not delivery.changed or not known.branch:
        return state
    for new in state.next.starts:
        if new.target == target and not new.run_id:
            return state  # sent again, that task has to ask for the same run
    target = target._replace(branch=known.branch)
    state = state.plan(target=target)
    return state.show(origin=target)


def take_event(state: State, event: Event) -> State:
    """An event of the shown run; a delivery may move the target."""
    tool = harmless(event.get("toolName"), 100)
    text = event_text(event)[:2000]
    if tool and text:
        text = f"{tool}  {text}"
    moment = parse_time(event.get("createdAt"))
    clock = clock_text(moment, "%H:%M:%S")
    kind = harmless(event.get("type"), 40)
    entry = Entry(
        clock,
        kind or "event",
        text or tool,
        event,
    )
    earlier = state.shown.entries
    if state.shown.stale:
        earlier = ()
    entries = (*earlier, entry)
    state = state.show(entries=entries, stale=False)
    delivery = delivery_of(event)
    if delivery:
        return delivered(state, delivery)
    return state


def take_tail(state: State, item: Union[Event, Verdict], run_id: str) -> State:
    """An event of the shown run, or its verdict."""
    if not isinstance(item, Verdict):
        return take_event(state, item)
    state = state.show(
        verdict=item,
        lost="",
        again_at=0.0,
    )
    return heard(state, run_id, item.run)


def good_answer(state: State, latency_ms: float) -> State:
    """What failed before is forgotten."""
    was_offline = state.service.failures >= 3
    state = state.know(
        failures=0,
        trouble="",
        refused="",
        latency_ms=latency_ms or state.service.latency_ms,
    )
    if was_offline:
        return state.say("Connected again.", "ok")
    return state


def take_progress(
    state: State, progress: Progress, run_id: str, wait_s: float
) -> State:
    """How the tail of the shown run gets on; ``wait_s`` until it asks again."""
    if progress.failures:
        state = state.know(failures=progress.failures)
        if progress.message:
            trouble = harmless(progress.message)
            state = state.know(trouble=trouble)
    elif progress.connection == "connected":
        state = good_answer(state, progress.latency_ms)
    if progress.connection == "limited":
        held_until = state.now + wait_s
        state = state.know(held_until=held_until)
    return heard(state, run_id, progress.run)


def take_run(state: State, run: Record, run_id: str) -> State:
    """The present state of a run; a cancelled one can come back."""
    state = heard(state, run_id, run)
    if text_of(run, "status") in TERMINAL_STATUSES:
        return state
    if state.shown.verdict and state.shown.run_id == run_id:
        return watch_again(state)
    return state


def take_found(state: State, run: Record, wanted: str) -> State:
    """A run that was looked for: it is shown now."""
    run_id = text_of(run, "runId") or wanted
    state = state.attend(notice_until=0.0)
    state = watch(state, run_id, run)
    return heard(state, run_id, run)


def read_sandbox(record: Json) -> KnownSandbox:
    """A sandbox of the service."""
    branch = record.get("working_branch") or record.get("base_branch")
    url = harmless(record.get("preview_url"))
    if not url.startswith("https://"):
        url = ""
    return KnownSandbox(
        text_of(record, "id"),
        text_of(record, "repo_id"),
        harmless(branch),
        harmless(record.get("status"), 20),
        url,
        harmless(record.get("error")),
    )


def take_sandboxes(state: State, records: Sequence[Json]) -> State:
    sandboxes = tuple(map(read_sandbox, records))
    return state.with_rail(sandboxes=sandboxes)


def read_repo(record: Json) -> KnownRepo:
    """A repository of the service."""
    branch = harmless(record.get("default_branch"))
    return KnownRepo(
        text_of(record, "id"),
        harmless(record.get("full_name")),
        branch or "main",
    )


def take_repos(state: State, records: Sequence[Json]) -> State:
    """The repositories; the first time, the target's is chosen among them where that is clear."""
    repos = tuple(map(read_repo, records))
    polls = state.service.polls
    polls = polls._replace(repos_due=NEVER)
    state = state.know(repos=repos, polls=polls)
    target = state.next.target
    if target.repo.id:
        return state
    for repo in repos:
        is_only = len(repos) == 1
        if is_only or repo.is_called(target.repo.name):
            target = target._replace(repo=repo)
            return state.plan(target=target)
    return state


def take_url(state: State, url: str) -> State:
    """The URL that a browser has to open for a sign-in."""
    if not state.is_signed_out:
        return state
    url = harmless(url, 4000)
    return state.admit(url=url)


def take_lapse(state: State, lapses_at: Optional[float]) -> State:
    """When the credential in force ends, in epoch seconds; None when it renews itself."""
    return state.admit(lapses_at=lapses_at or NEVER)


def take_started(state: State, run: Record, new: NewRun) -> State:
    """A run that was just started: it is shown, and its delivery may move the target."""
    run_id = text_of(run, "runId")
    new = new._replace(run_id=run_id)
    state = change_start(state, new.key, new)
    state = watch(state, run_id, run, new.target)
    if run_named(state, run_id) not in state.rail.runs:
        began = parse_time(run.get("createdAt")) or state.now
        task = new.task.replace("\n", " ")
        known = KnownRun(
            run_id,
            new.target.repo.name,
            harmless(task, 200),
            began,
        )
        state = put_first(state, known)
    state = heard(state, run_id, run)
    if is_bad_end(text_of(run, "status")):
        error = harmless(run.get("error"), 200)
        return state.say(f"The run failed to start: {error}", "bad")
    if run.get("replayed") is True:
        return state.say("That run had already been started.", "ok")
    return state.say("Run started.", "ok")


def take_recorded(state: State, _: Record, new: NewRun) -> State:
    """A started run has been written to the history."""
    return change_start(state, new.key)


def take_sign_out(state: State, words: str) -> State:
    """There is no credential: the composer takes a token now, and no desk keeps an old one."""
    state = state.ask(Shell.reconnect)
    if not state.is_signed_out:
        state = show_sign_in(state)
    if words:
        return state.say(words, "warn")
    return state


def take_sign_in(state: State, words: str, *_: str) -> State:
    """The service accepted a credential: everything is asked for anew."""
    if state.is_signed_out:
        # No draft: it may hold a token.
        composer = Composer(history=state.composer.history)
        state = state._replace(composer=composer)
        state = state.write(state.sign_in.waiting)
    state = state._replace(sign_in=SigningIn())
    state = state.ask(Shell.reconnect)
    if state.shown.run_id:
        state = watch_again(state)
    state = refresh(state)
    return state.say(words, "ok", 60.0)


TAKEN: Dict[Job, Callable[..., State]] = {
    Desk.say: State.say,
    Desk.watch: take_tail,
    Desk.report: take_progress,
    Desk.client: take_lapse,
    Desk.tell_started: take_started,
    Desk.tell_url: take_url,
    Desk.start: take_recorded,
    Desk.try_token: take_sign_in,
    Desk.try_stored: take_sign_in,
    Desk.sign_in: take_sign_in,
    Desk.sign_out: take_sign_out,
    Desk.find_run: take_found,
    Desk.repos: take_repos,
    Client.run: take_run,
    Client.sandboxes: take_sandboxes,
}
POLLED = (Client.run, Client.sandboxes, Desk.repos)


def answered_poll(state: State, job: Job) -> State:
    if job not in POLLED:
        return state
    polls = state.service.polls
    left = max(0, polls.unanswered - 1)
    polls = polls._replace(unanswered=left)
    return state.know(polls=polls)


def is_for_drawer(state: State, ask: Ask) -> bool:
    drawer = state.drawer
    if drawer is None or drawer.listing.reads is not ask.job:
        return False
    return drawer.subject == ask.arguments


def on_told(state: State, message: Told) -> State:
    """What a desk has to tell: to the state, and to the drawer that waits for it."""
    ask = message.ask
    data = message.data
    if message.latency_ms:
        state = good_answer(state, message.latency_ms)
    state = answered_poll(state, ask.job)
    take = TAKEN.get(ask.job)
    if take:
        state = take(state, data, *ask.arguments)
    if is_for_drawer(state, ask):
        return state.shift(
            data=data,
            error="",
            lines=(),
        )
    return state


def felt(state: State, job: Job, error: MogplexError, text: str) -> State:
    """What an error says of the service; of a run it may say only that its id is wrong."""
    if isinstance(error, RateLimitedError):
        wait_s = error.retry_after_s or 60.0
        return state.know(held_until=state.now + wait_s)
    if isinstance(error, (UnauthorizedError, ForbiddenError)):
        return state.know(refused=text)
    lists = (Desk.repos, Client.sandboxes)
    if isinstance(error, UnavailableError) or job in lists:
        failures = state.service.failures + 1
        return state.know(failures=failures, trouble=text)
    return state


PASSING_ERRORS = (UnavailableError, RateLimitedError, UnauthorizedError, ForbiddenError)


def watch_failed(state: State, error: MogplexError, text: str) -> State:
    """A tail that an outage ended is begun again by itself; 401 and 403 can be one."""
    if error.transient or isinstance(error, PASSING_ERRORS):
        again_at = state.now + 10
        return state.show(lost=text, again_at=again_at)
    state = state.show(lost=text)
    return state.say(text, "bad")


def run_refused(state: State, error: MogplexError, run_id: str) -> State:
    """A poll that was refused takes no status away; one that was never known is unknown then."""
    status = run_named(state, run_id).status
    if error.status != 404 or status:
        return state
    return change_runs(state, [run_id], status="unknown")


def start_failed(state: State, error: MogplexError, text: str, new: NewRun) -> State:
    """A start that failed: the task comes back, with its key where the run may have started."""
    for known in state.next.starts:
        if known.key == new.key and known.run_id:
            return change_start(state, new.key)  # only the history failed
    if error.delivered:
        new = new._replace(under_way=False)
        state = change_start(state, new.key, new)
        text = f"The run may have started: {text}; press Enter to send the same request again"
    else:
        state = change_start(state, new.key)
        text = f"Not started: {text}"
    if error.retry_after_s:
        wait = format_duration(error.retry_after_s)
        text = f"{text}; retry in {wait}"
    if not state.composer.text:
        state = state.write(new.task)
    return state.say(text, "bad")


def on_failed(state: State, message: Failed) -> State:
    """A job that failed. What is asked in the background says so in the header alone."""
    error = message.error
    ask = message.ask
    job = ask.job
    text = harmless(str(error))
    if error.hint:
        hint = harmless(error.hint)
        text = f"{text} · {hint}"
    state = answered_poll(state, job)
    if job in (Desk.try_token, Desk.try_stored, Desk.sign_in):
        state = state.admit(checking=False, url="")
        return state.say(f"Not signed in: {text}", "bad")
    if job is Desk.start:  # whose 429 is a budget of its own, and holds nothing else
        return start_failed(state, error, text, *ask.arguments)
    state = felt(state, job, error, text)
    if job is Desk.watch:
        return watch_failed(state, error, text)
    if is_for_drawer(state, ask):
        return state.shift(error=text)
    if job is Client.run:
        return run_refused(state, error, *ask.arguments)
    if job in POLLED:
        return state
    return state.say(text, "bad")


def on_tick(state: State, _: Tick) -> State:
    """Once a second: what is due is asked, but nothing during a wait that a 429 asked for."""
    now = state.now
    if state.service.held_until > now or state.is_signed_out:
        return state
    drawer = state.drawer
    if drawer and drawer.error and int(now) % 5 == 0:
        state = state.read()
    again_at = state.shown.again_at
    if again_at and now >= again_at:
        state = watch_again(state)
    if state.service.polls.unanswered >= 6:
        return state
    return poll(state, 4)


HANDLERS: Dict[type, Callable[[State, Any], State]] = {
    Key: on_key,
    Text: on_text,
    Mouse: on_mouse,
    Resize: on_resize,
    Tick: on_tick,
    Told: on_told,
    Failed: on_failed,
}


def is_of_another_run(state: State, message: object) -> bool:
    """Whether a tail says this that has been left meanwhile."""
    if not isinstance(message, (Told, Failed)):
        return False
    ask = message.ask
    if ask.job not in (Desk.watch, Desk.report):
        return False
    run_id: str = ask.arguments[0]
    return run_id != state.shown.run_id


def update(state: State, message: object) -> State:
    """The state after one message; what it asks for stands in its ``asks``."""
    before = state
    state = state._replace(asks=())
    if is_of_another_run(state, message):
        return state
    handle = HANDLERS[type(message)]
    state = handle(state, message)
    return refreshed(before, state)


# -- The cockpit, from its first frame to its last words


START_WAIT_S = 5.0  # how long leaving waits for the answer to a start


class Cockpit:
    """The loop: messages in, states and frames out, and what they ask for done."""

    def __init__(self, shell: Shell, state: State) -> None:
        self.shell = shell
        self.state = state

    def run(self) -> NoReturn:
        """Until SystemExit is raised: draw, wait, take every message that there is."""
        screen = self.shell.screen
        while True:
            screen.draw(view(self.state, *screen.size))
            self.perform()  # after the frame: a desk's first job imports what takes longer
            window = self.state.window
            if screen.size != (window.width, window.height):
                self.take(screen.size)
                continue
            seconds = 1.0 - time.time() % 1.0  # until the clock shows the next one
            for message in screen.wait(seconds):
                self.take(message)
            now = int(time.time())
            if now != int(self.state.now):
                self.take(Tick())
            while not self.shell.inbox.empty():
                self.take(self.shell.inbox.get())

    def take(self, message: object) -> None:
        if isinstance(message, BaseException):  # a thread's crash ends the cockpit
            raise message
        self.perform()
        self.hear(message)

    def hear(self, message: object) -> None:
        now = self.state._replace(now=time.time())
        self.state = update(now, message)

    def perform(self) -> None:
        asks = self.state.asks
        self.state = self.state._replace(asks=())
        for ask in asks:
            self.shell.perform(ask)

    def started_late(self) -> List[str]:
        """Wait until the starts under way are written down, or it is late; their runs' ids."""
        run_ids: List[str] = []
        until = time.monotonic() + START_WAIT_S
        while any(new.under_way for new in self.state.next.starts):
            run_ids += [new.run_id for new in self.state.next.starts]
            left_s = until - time.monotonic()
            if left_s <= 0:
                break
            with contextlib.suppress(queue.Empty):
                message = self.shell.inbox.get(timeout=left_s)
                if not isinstance(message, BaseException):
                    self.hear(message)  # what it asks for is no longer done
        return run_ids

    def last_words(self) -> Iterator[str]:
        """What is left on the terminal: how to follow the runs on, and the keys of lost starts."""
        run_ids = [self.state.shown.run_id, *self.started_late()]
        for run_id in filter(None, dict.fromkeys(run_ids)):
            yield f"mogplex runs events {harmless(run_id)} --follow\n"
        for new in self.state.next.starts:
            if new.run_id:
                continue
            task = harmless(new.task.replace("\n", " "))
            yield (
                f"no answer to the start of '{fit(task, 60)}'; it may have started: "
                f"run it again with --idempotency-key {new.key}\n"
            )


def known_runs(home: Home, base_url: str) -> List[KnownRun]:
    """The runs that this machine remembers, newest first, each once."""
    runs: Dict[str, KnownRun] = {}
    for record in home.runs(base_url):
        run_id = text_of(record, "id")
        known = KnownRun(
            run_id,
            harmless(record.get("repo")),
            harmless(record.get("task"), 200),
            parse_time(record.get("time")) or 0.0,
        )
        runs.setdefault(run_id, known)
    return list(runs.values())


def attach_first(state: State, wanted: str) -> State:
    """``--attach RUN``: what it names is shown at once, known or not: nothing is lost by that."""
    attached = attach(state, wanted)
    if attached.shown.run_id or attached.drawer:
        return attached
    return watch(state, wanted, {"runId": wanted})


def unsent(text: str) -> str:
    """What is said of the words of a command line that may have been meant for a command."""
    first = text.partition(" ")[0]
    near = nearest(first, GROUPS)
    words = "Nothing was sent: press Enter to start a run with this task."
    if near:
        return f"Did you mean `mogplex {near}`? {words}"
    return words


def first_state(
    home: Home,
    environ: Mapping[str, str],
    base_url: str,
    text: str,
    run_id: str,
) -> State:
    """What is known before the first answer: the history, and the words of the command line."""
    runs = known_runs(home, base_url)
    wanted = environ.get("MOGPLEX_REPO", "")
    if not wanted and runs:
        wanted = runs[0].repo
    tasks = [run.task for run in reversed(runs)]
    history = filter(None, dict.fromkeys(tasks))
    repo = KnownRepo(name=wanted)
    target = Target(repo)
    session = os.urandom(16).hex()
    state = State(
        now=time.time(),
        next=Next(target, session=session),
        rail=Rail(tuple(runs)),
        composer=Composer(history=tuple(history)),
        service=Service(base_url),
    )
    state = insert(state, text)
    if run_id == "@last" and runs:
        run_id = runs[0].id
    if run_id:
        state = attach_first(state, run_id)
    if text:
        state = state.say(unsent(text), "warn", 60.0)
    return poll(state, 2)


def stay(screen: Screen, cockpit: Cockpit) -> int:
    """The cockpit until it is left; the exit code. The terminal is as it was before."""
    try:
        screen.enter()
        cockpit.run()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except TerminalGone:
        return Exit.HANGUP
    finally:
        screen.signals.ignore_fatal()  # a second one must not cut the restoring short
        screen.restore()


def run_cockpit(
    connect: Callable[..., Client],
    *,
    base_url: str,
    home: Home,
    environ: Mapping[str, str],
    text: str = "",
    attach: str = "",
    run_browser: Callable[[str], bool],
) -> int:
    """The cockpit, until it is left; the exit code. UsageError where there is no terminal for it.

    ``connect`` builds a Client, from the credential given or the one in force; UnauthorizedError
    when there is none.
    """
    kind = environ.get("TERM") or "dumb"
    is_terminal = os.isatty(0) and os.isatty(1)
    if kind == "dumb" or not is_terminal:
        raise UsageError(
            "the cockpit needs a terminal, and TERM that names its kind",
            hint="for scripts there are `mogplex run`, `mogplex runs` and the other commands",
        )
    overruled = ""
    variable, _ = token_given(environ)
    if variable:
        overruled = f"{variable} is set and takes precedence: unset it."
    with Signals() as signals:
        screen = Screen(environ, signals)
        facts = Facts(connect, base_url, home, run_browser, overruled)
        shell = Shell(screen, facts)
        home.warn = shell.warn  # standard error is the screen now
        state = first_state(home, environ, base_url, text, attach)
        cockpit = Cockpit(shell, state)
        with guarded(screen, shell.post):
            try:
                return stay(screen, cockpit)
            finally:
                for line in cockpit.last_words():
                    screen.write_last(line)


# ---------------------------------------------------------------- 8. Demo

# The data: what the demo's account has from the start, and what its runs show.

DEMO_TOKEN = "mog_" + "Demo" * 8
DEMO_READ_TOKEN = "mog_" + "Read" * 8
DEMO_SECRET = "not-a-real-secret-0123456789"  # in the MCP servers' config, which a client must drop
DEMO_ERROR = (
    "Agent run exited with code 1."  # the run's error; none of its events repeats it
)
DEMO_LAUNCH_ERROR = "Sandbox launch failed: no capacity in this region"
DEMO_QUEUE_ERROR = "The run queue refused this run"

DEMO_API = "2d6f0c7e-5b1a-4c3d-8e9f-0a1b2c3d4e5f"
DEMO_DOCS = "c41e9a70-8d2b-4f65-b3a7-6e5d4c3b2a19"
DEMO_WEB = "8f3a2b1c-1234-4abc-9def-1234567890ab"
DEMO_BARE = "5a7b9c1d-3e2f-4a80-91b4-d7c6b5a49382"


def demo_table(names: str, *rows: Sequence[Any]) -> List[Json]:
    """Objects with these fields, one a row."""
    return [dict(zip(names.split(), row)) for row in rows]


class DemoStep(NamedTuple):
    """A moment of a run: an event, a change of the run, or both; its ``$words`` are the run's."""

    at_s: float  # seconds into the run; of a run that has begun, since the epoch
    type: str = ""  # of the event; "" for none
    message: str = ""
    payload: Json = {}
    tool: Optional[str] = None
    status: str = ""  # what the run's status becomes; "" leaves it
    error: str = ""  # what the run's error becomes; "" leaves it
    harness: str = ""  # the only harness with this step; "" for all


# fmt: off
DEMO_REPOS = {repo["id"]: repo for repo in demo_table(  # by name, as the service lists them
    "id full_name installation_id default_branch root_directory",
    (DEMO_API, "acme/api", 51423907, "main", None),
    (DEMO_DOCS, "acme/docs", 51423907, "trunk", "website"),
    (DEMO_WEB, "acme/web", 51423907, "main", None),
    (DEMO_BARE, "acme/web-legacy", None, None, None),
)}

DEMO_SANDBOXES = demo_table(
    "id repoId workingBranch age_s sandbox_id status error",
    ("b1c2d3e4-5f60-4718-829a-3b4c5d6e7f80", DEMO_WEB, "main", 40,
     "sbx_w3bR7nq0", "running", None),
    ("b2d3e4f5-6071-4829-93ab-4c5d6e7f8091", DEMO_DOCS, "trunk", 5400,
     "sbx_d0c5Kx2p", "paused", None),
    ("b3e4f506-7182-493a-a4bc-5d6e7f8091a2", DEMO_WEB, "fix/tax", 7200,
     None, "error", "npm ci exited with 1"),
    ("b4f50617-8293-4a4b-b5cd-6e7f8091a2b3", DEMO_API, "feat/queue", 90000,
     "sbx_4p1Zt8vL", "stopped", None),
)

DEMO_RUNS = demo_table(  # oldest first; "ending" is a key of DEMO_ENDINGS
    "id repoId harness ending age_s task",
    ("79f0d3c7-6a2e-4b91-8c5d-1f3e5a7b9c0d", DEMO_WEB,
     "codex", "delivered", 259200, "Use bearer tokens"),
    ("7a44c0be-1d9f-4e37-a2b8-c6d4e2f0a1b3", DEMO_API,
     "codex", "long", 172800, "Give every handler types"),
    ("7b8e1a35-f0c2-4d64-9e7a-3b5c7d9e1f20", DEMO_API,
     "claude-code", "cancelled", 86400, "Move to Redis"),
    ("7c02f9d4-2e8b-4a15-b6c3-9d7f5e3c1a0b", DEMO_WEB,
     "codex", "failed", 18000, "Repair the e2e suite"),
    ("7d10b6e2-9c4a-4f83-8d1e-5a3b1c9f7e6d", DEMO_DOCS,
     "claude-code", "unchanged", 10800, "Look for dead links"),
    ("7f2c41aa-3b5e-4d18-9a60-5c1e8b7d2f04", DEMO_WEB,
     "codex", "running", 761, "Fix the login redirect loop"),
)
DEMO_AGENTS = demo_table(
    "id name slug model description category preset",
    ("a1f0e2d3-c4b5-4a69-8778-695a4b3c2d1e", "Reviewer", "reviewer", "openai/gpt-5-codex",
     "Says what a change would break", "quality", False),
    ("preset:test-writer", "Test writer", None, "anthropic/claude-sonnet-4.5",
     "Adds the tests that a change lacks", "quality", True),
)
# fmt: on

DEMO_MODELS = [
    {
        "id": "openai/gpt-5-codex",
        "provider": "openai",
        "name": "GPT-5 Codex",
        "contextLength": 400000,
        "capabilities": ["tools"],
        "pricing": {"input": 0.00000125, "output": 0.00001},  # USD per token
    },
]

DEMO_SERVERS = [
    {
        "name": "github",
        "enabled": True,
        "config": {
            "url": "https://mcp.example/github",
            "headers": {"Authorization": f"Bearer {DEMO_SECRET}"},
        },
    },
    {
        "name": "sentry",
        "enabled": False,
        "config": {"command": "sentry-mcp", "env": {"SENTRY_TOKEN": DEMO_SECRET}},
    },
]

DEMO_AUTOMATION_ID = "a1d0c7e2-64b5-4a90-8f13-2e7b9c05d6f8"
DEMO_AUTOMATIONS = {
    DEMO_AUTOMATION_ID: {
        "id": DEMO_AUTOMATION_ID,
        "name": "Nightly dependency update",
        "status": "published",
    },
}
DEMO_JOB_S = 8.0  # a run of it takes so long

# fmt: off
DEMO_ACCEPTED = [
    DemoStep(0.0, "started", "External Mogplex run accepted", {
        "external_run_id": "$id",
        "harness_id": "$harness",
        "working_branch": "$working",
    }),
]
# fmt: on
DEMO_STARTED = [
    *DEMO_ACCEPTED,
    DemoStep(
        0.3, "started", "Harness run started: $harness", {"harness_id": "$harness"}
    ),
]
# fmt: off
DEMO_AT_WORK = [
    *DEMO_STARTED,
    DemoStep(1.4, "log", "Synchronized $pushed", {
        "stage": "git_sync",
        "base_branch": "$base",
        "working_branch": "$pushed",
        "created_branch": True,
    }),
    DemoStep(1.9, "log", "Loaded 2 MCP server(s) for Claude Code", {
        "stage": "mcp_config",
        "outcome": "ok",
        "server_count": 2,
        "server_names": ["github", "sentry"],
    }, harness="claude-code"),
    DemoStep(2.6, "status_changed", "Harness run streaming", {
        "from": "pending",
        "to": "streaming",
        "runtime_command_id": "cmd_$id",
    }, status="streaming"),
    DemoStep(3.3, "log", "Installed @$package", {
        "stage": "install",
        "logs": "added 1 package in 2s",
    }),
    DemoStep(4.0, "log", "I read the code around it first."),
]
# fmt: on
DEMO_UNCHANGED = {
    "stage": "git_delivery",
    "changed": False,
    "pull_request_url": None,
    "base_branch": "$base",
    "working_branch": "$pushed",
    "auto_committed_files": [],
}
DEMO_FINISHED = [
    DemoStep(9.0, "finished", "Harness run finished", {"exit_code": 0}),
    DemoStep(9.6, status="success"),
]
# fmt: off
DEMO_CANCEL = [
    DemoStep(0.0, "cancel_requested", "Cancellation requested", {"external_run_id": "$id"},
             status="cancelled"),
    DemoStep(1.0, "cancelled", "External Mogplex run cancelled", {"external_run_id": "$id"}),
]
# fmt: on
DEMO_HOSTILE = DemoStep(
    95.0,
    "log",
    (  # agents write anything
        "Found:\n::error::\x1b[2J\x1b[31mthe cookie\x1b[0m "
        "\u202eis\u202c lost ##vso[task.complete]\rhere"
    ),
)


def demo_later(steps: Iterable[DemoStep], by_s: float) -> List[DemoStep]:
    """The same steps ``by_s`` seconds later."""
    return [step._replace(at_s=step.at_s + by_s) for step in steps]


# fmt: off
DEMO_ENDINGS: Dict[str, List[DemoStep]] = {
    "delivered": [
        *DEMO_AT_WORK,
        DemoStep(6.5, "tool_started", "src/session.ts", {"files": ["src/session.ts"]},
                 tool="apply_patch"),
        DemoStep(7.0, "tool_finished", "1 file changed, 148 tests pass \u2713", {"exit_code": 0},
                 tool="apply_patch"),
        DemoStep(8.2, "log", "Pull request ready", {
            **DEMO_UNCHANGED,
            "changed": True,
            "pull_request_url": "https://github.com/$repo/pull/$number",
        }),
        *DEMO_FINISHED,
    ],
    "unchanged": [
        *DEMO_AT_WORK,
        DemoStep(8.2, "log", "No code changes to deliver", DEMO_UNCHANGED),
        *DEMO_FINISHED,
    ],
    "failed": [
        *DEMO_AT_WORK,
        DemoStep(7.5, "failed", "Harness run failed", {
            "exit_code": 1,
            "failure_code": "command_failed",
        }),
        DemoStep(8.1, status="failed", error=DEMO_ERROR),
    ],
    "crashed": [  # the launch fails, and the last event comes after the status
        *DEMO_STARTED,
        DemoStep(1.4, "failed", "Harness execution failed", {"error": DEMO_LAUNCH_ERROR}),
        DemoStep(1.5, status="failed", error=DEMO_LAUNCH_ERROR),
        DemoStep(2.4, "failed", "External Mogplex run failed", {"error": DEMO_LAUNCH_ERROR}),
    ],
    "refused": [
        *DEMO_ACCEPTED,
        DemoStep(0.0, "failed", "External Mogplex run failed", {"error": DEMO_QUEUE_ERROR},
                 status="failed", error=DEMO_QUEUE_ERROR),
    ],
    "cancelled": [*DEMO_AT_WORK, DEMO_HOSTILE, *demo_later(DEMO_CANCEL, 97.0)],
    "running": [
        *DEMO_AT_WORK,
        DEMO_HOSTILE,
        DemoStep(640.0, "log", "A test now shows it."),
        DemoStep(790.0, "log", "The fix is in, two tests are red."),
    ],
    "long": [  # more events than the service lists
        *DEMO_AT_WORK,
        *[DemoStep(9.0 + 3 * number, "tool_started", f"npm test -- {number:03d}", tool="shell")
          for number in range(230)],
        *demo_later(DEMO_FINISHED, 900.0),
    ],
}
# fmt: on
DEMO_TASK_WORDS = {"fail": "failed", "crash": "crashed", "refuse": "refused"}
DEMO_PACKAGES = {"codex": "openai/codex", "claude-code": "anthropic-ai/claude-code"}
DEMO_BRANCH = re.compile(r"[A-Za-z0-9_./-]+\Z")
DEMO_404 = "<!DOCTYPE html><title>404: This page could not be found.</title>"


# The service: what it answers to a request, without a socket.


def demo_id(name: str) -> str:
    """A UUID, the same for the same ``name`` every time."""
    import uuid

    return str(uuid.uuid5(uuid.NAMESPACE_URL, "mogplex demo " + name))


def demo_body(data: bytes) -> Json:
    """The object in a request's body, be it JSON or a form; one without fields for anything else.

    It has a "repoId", in lower case, in any case.
    """
    text = data.decode("utf-8", "replace")
    try:
        body = parse_json(text)
    except ValueError:
        body = dict(urllib.parse.parse_qsl(text))
    if not isinstance(body, dict):
        body = {}
    body["repoId"] = text_of(body, "repoId").lower()
    return body


def demo_time(moment: float) -> str:
    """Seconds since the epoch as the service writes most times: no zeros end the fraction."""
    digits = utc_time(moment).rstrip("0Z")
    return digits.rstrip(".") + "+00:00"


# An HTTP answer: its status; an object, sent as JSON, or text, sent as HTML; its headers.
DemoAnswer = Tuple[int, Union[Json, str], Dict[str, str]]


class DemoRefusal(Exception):
    """Raised by a route for an answer in the error envelope."""

    def __init__(
        self, status: int, code: str, message: str, retry_after: str = ""
    ) -> None:
        headers = {}
        if retry_after:
            headers["Retry-After"] = retry_after
        error = {"code": code, "message": message}
        self.answer: DemoAnswer = (status, {"ok": False, "error": error}, headers)


class DemoRequest:
    """What a route is told of a request; the names of ``headers`` are in lower case."""

    def __init__(self, target: str, headers: Mapping[str, str], data: bytes) -> None:
        self.path, _, query = target.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query))
        self.id = ""  # the one in the path
        self.body = demo_body(data)
        self.key = headers.get("idempotency-key", "").strip()
        self.token = ""
        authorization = re.fullmatch(r"Bearer (\S+)", headers.get("authorization", ""))
        if authorization:
            self.token = authorization[1]


class DemoRun:
    """A run that has begun."""

    def __init__(self, run_id: str, body: Json, sandbox: Json) -> None:
        harness = body.get("harness", "codex")
        base = sandbox["base_branch"]
        working = sandbox["working_branch"]
        pushed = working
        if pushed == base:
            pushed = f"mogplex/agent-{run_id[:8]}"
        self.sandbox = sandbox
        self.steps: List[DemoStep] = []  # with times since the epoch
        self.words = {  # what the steps' ``$words`` stand for
            "id": run_id,
            "harness": harness,
            "package": DEMO_PACKAGES[harness],
            "repo": DEMO_REPOS[sandbox["repo_id"]]["full_name"],
            "base": base,
            "working": working,
            "pushed": pushed,
            "number": str(100 + int(run_id[:4], 16) % 900),
        }
        self.accepted = {
            "runId": run_id,
            "aiCallId": demo_id("call " + run_id),
            "sandboxRecordId": None,
            "sandboxId": None,
            "repoId": sandbox["repo_id"],
            "harness": harness,
            "status": "pending",
            "branch": {
                "base": base,
                "working": working,
                "createBranch": bool(body.get("createBranch")),
            },
            "rootDirectory": sandbox["root_directory"],
            "eventsUrl": f"{API_PATH}/runs/{run_id}/events",
            "cancelUrl": f"{API_PATH}/runs/{run_id}/cancel",
            "createdAt": sandbox["created_at"],
            "updatedAt": sandbox["created_at"],
            "error": None,
            "runtime": {"provider": "trigger", "runId": None},
        }

    def play(self, script: Sequence[DemoStep], began: float, speed: float) -> None:
        """Add the steps of a script that begins at ``began``, in the run's own words."""
        import string

        text = string.Template(to_json(script)).substitute(self.words)
        for at_s, *fields in parse_json(text):
            step = DemoStep(began + at_s / speed, *fields)
            if step.harness in ("", self.words["harness"]):
                self.steps.append(step)

    def shown(self, now: float) -> List[DemoStep]:
        """The steps that have come about by ``now``."""
        return [step for step in self.steps if step.at_s <= now]

    def record(self, now: float) -> Json:
        """The run as the service tells it at ``now``."""
        run: Json = dict(self.accepted)
        for step in self.shown(now):
            run["status"] = step.status or run["status"]
            run["error"] = step.error or run["error"]
            run["updatedAt"] = demo_time(step.at_s)
            if step.status == "streaming":
                sandbox_id = self.sandbox["sandbox_id"]
                run["sandboxRecordId"] = self.sandbox["id"]
                run["sandboxId"] = sandbox_id
                run["runtime"] = {"provider": "vercel", "runId": sandbox_id}
        return run


def demo_ending(prompt: str) -> str:
    """How the run of a task ends: as a word in the task asks for, else well."""
    for word in re.findall("[a-z]+", prompt.lower()):
        if word in DEMO_TASK_WORDS:
            return DEMO_TASK_WORDS[word]
    return "delivered"


def demo_find(records: Mapping[str, Any], record_id: str, name: str) -> Any:
    """The record with this id; the refusals are the service's."""
    if not is_uuid(record_id):  # the database refuses it, and nobody catches that
        raise DemoRefusal(500, "INTERNAL_ERROR", "Internal server error")
    if record_id not in records:
        raise DemoRefusal(404, "NOT_FOUND", f"{name} not found")
    return records[record_id]


def demo_first(records: Iterable[Any], request: DemoRequest) -> List[Any]:
    """As many as ``limit`` asks for: it is clamped and never refused."""
    limit = request.query.get("limit", "")
    count = 100
    if re.fullmatch(r"-?\d{1,9}", limit):
        count = max(1, min(MAX_LIMIT, int(limit)))
    return list(records)[:count]


def demo_branches(body: Json, name: str = "") -> Tuple[str, str]:
    """The branch that a StartRun starts from, and the one that it works on."""
    repo = DEMO_REPOS.get(body["repoId"])
    base = text_of(body, "baseBranch") or text_of(repo, "default_branch") or "main"
    working = text_of(body, "workingBranch")
    if body.get("createBranch") and not working:
        working = f"mogplex/external/{name}"
    return base, working or base


def demo_start_problem(key: str, body: Json) -> str:
    """What the service has against a StartRun; "" for nothing."""
    prompt = text_of(body, "prompt")
    if not key:
        return "Idempotency-Key is required"
    if len(key) > 200:
        return "Idempotency-Key exceeds maximum length of 200 characters"
    if not body["repoId"]:
        return "repoId is required"
    if not prompt.strip():
        return "Prompt is required"
    if utf16_units(prompt) > MAX_PROMPT_UNITS:
        return "Prompt is too long"
    if body.get("harness", "codex") not in HARNESSES:
        return "Invalid harness"
    base, working = demo_branches(body)
    if not DEMO_BRANCH.match(base):
        return "Invalid base branch"
    if not DEMO_BRANCH.match(working):
        return "Invalid working branch"
    if ".." in text_of(body, "rootDirectory").split("/"):
        return "Invalid root directory"
    if body.get("createBranch") and working == base:
        return "Working branch must differ from base branch when createBranch is true"
    return ""


class DemoSignIn:
    """The tokens in force, with their scopes, and the sign-in that issues them."""

    def __init__(self) -> None:
        self.tokens = {DEMO_TOKEN: "read write", DEMO_READ_TOKEN: "read"}
        # By code or refresh token: what authorize was asked.
        self.grants: Dict[str, Json] = {}

    def admit(self, token: str, scope: str) -> None:
        """Refuse a token that is unknown, or that lacks the scope."""
        if token not in self.tokens:
            raise DemoRefusal(401, "UNAUTHORIZED", "Unauthorized")
        if scope and scope not in self.tokens[token].split():
            raise DemoRefusal(
                403,
                "FORBIDDEN",
                (
                    f"Missing required scope: {scope}. "
                    f"Issue a new token with the '{scope}' scope at /settings/api-keys."
                ),
            )

    def authorize(self, query: Json) -> DemoAnswer:
        """The page that a browser opens: whoever asks is signed in, and is sent back at once."""
        import secrets

        target = query.get("redirect_uri", "")
        if not re.fullmatch(r"http://127\.0\.0\.1:2481[68]/auth/callback", target):
            return self._error("invalid_client", "invalid redirect")
        code = secrets.token_urlsafe(24)
        self.grants[code] = query
        fields = urllib.parse.urlencode({"code": code, "state": query.get("state", "")})
        return 302, "", {"Location": f"{target}?{fields}"}

    def exchange(self, form: Json) -> DemoAnswer:
        """Tokens for a code, whose verifier must fit, or for a refresh token; either works once."""
        import secrets

        grant = form.get("code") or form.get("refresh_token", "")
        asked = self.grants.pop(grant, None)
        if asked is None:
            return self._error("invalid_grant", "invalid grant")
        challenge = pkce_challenge(form.get("code_verifier", ""))
        if "code" in form and asked.get("code_challenge") != challenge:
            return self._error("invalid_request", "the code verifier does not fit")
        access = secrets.token_hex(24)
        refresh = secrets.token_hex(24)
        scope = asked.get("scope", "")
        self.tokens[access] = scope
        self.grants[refresh] = {"scope": scope}
        return (
            200,
            {
                "access_token": access,
                "token_type": "Bearer",
                "expires_in": 3600,
                "refresh_token": refresh,
                "scope": scope,
            },
            {},
        )

    def _error(self, error: str, description: str) -> DemoAnswer:
        return 401, {"error": error, "error_description": description}, {}


class DemoService:
    """What the demo knows and answers. ``clock`` gives seconds since the epoch.

    For tests: ``requests`` counts them; ``sign_in.tokens`` are those in force, with their scopes.
    """

    def __init__(self, clock: Callable[[], float], speed: float) -> None:
        self.clock = clock
        self.speed = speed
        self.lock = threading.Lock()
        self.requests = 0
        self.sign_in = DemoSignIn()
        # By idempotency key: the first body, and the run's id.
        self.keys: Dict[str, Tuple[Json, str]] = {}
        self.runs: Dict[str, DemoRun] = {}
        self.sandboxes: Dict[str, Json] = {}
        self.job_runs: Dict[str, float] = {}  # when each began
        now = clock()
        for box in DEMO_SANDBOXES:
            sandbox = self._add_sandbox(
                box, now - box["age_s"] / speed, box["id"], box["status"]
            )
            sandbox.update(sandbox_id=box["sandbox_id"], error=box["error"])
        for seed in DEMO_RUNS:
            run = self._add_run(
                seed["id"], seed, seed["ending"], now - seed["age_s"] / speed
            )
            if seed["ending"] != "running":
                run.sandbox.update(status="stopped", preview_url=None)

    def answer(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        data: bytes,
    ) -> DemoAnswer:
        """The answer to a request; the names of ``headers`` in lower case."""
        request = DemoRequest(target, headers, data)
        if request.path.startswith(API_PATH) and not request.token:
            login = "/login?next=" + urllib.parse.quote(request.path, safe="")
            return 307, "", {"Location": login}
        with self.lock:
            self.requests += 1
            try:
                return self._route(method, request)
            except DemoRefusal as refusal:
                return refusal.answer

    def _route(self, method: str, request: DemoRequest) -> DemoAnswer:
        if request.path == AUTHORIZE_PATH:
            return self.sign_in.authorize(request.query)
        if request.path == TOKEN_PATH:
            return self.sign_in.exchange(request.body)
        answer: DemoAnswer = (404, DEMO_404, {})
        for route, scope, status, handler in self.ROUTES:
            allowed, path = route.split()
            pattern = API_PATH + path.replace("{id}", "([^/]+)")
            match = re.fullmatch(pattern, request.path)
            if match and method == allowed:
                self.sign_in.admit(request.token, scope)
                request.id = "".join(match.groups()).lower()
                data = handler(self, request)
                return status, {"ok": True, "data": data}, {}
            if match:
                answer = (405, "", {})
        return answer

    def list_repos(self, request: DemoRequest) -> Json:
        """GET /repos: those with ``q`` in their name, or the one with the ``id``."""
        repos = DEMO_REPOS.values()
        wanted = request.query.get("id", "").lower()
        if wanted:
            found = [repo for repo in repos if repo["id"] == wanted]
        else:
            part = re.escape(request.query.get("q", ""))
            name = part.replace("%", ".*").replace("_", ".")  # SQL's wildcards
            found = [
                repo
                for repo in repos
                if re.search(name, repo["full_name"], re.IGNORECASE)
            ]
        return {"repos": demo_first(found, request)}

    def list_sandboxes(self, request: DemoRequest) -> Json:
        """GET /sandboxes: those of ``repo_id`` and with ``status``, newest activity first."""
        repo_id = request.query.get("repo_id", "").lower()
        status = request.query.get("status", "")
        if repo_id:
            # Refuses an id that is not a UUID.
            demo_find({repo_id: None}, repo_id, "Repo")
        found = [
            box
            for box in self.sandboxes.values()
            if repo_id in ("", box["repo_id"]) and status in ("", box["status"])
        ]
        # Of one zone: text sorts as time does.
        by_time = operator.itemgetter("last_active_at")
        found.sort(key=by_time, reverse=True)
        return {"sandboxes": demo_first(found, request)}

    def create_sandbox(self, request: DemoRequest) -> Json:
        """POST /sandboxes: a sandbox that runs."""
        demo_find(DEMO_REPOS, request.body["repoId"], "Repo")
        return {"sandbox": self._add_sandbox(request.body, self.clock())}

    def sandbox_logs(self, request: DemoRequest) -> Json:
        """GET /sandboxes/{id}/logs: what its commands wrote, and what became of it."""
        sandbox = demo_find(self.sandboxes, request.id, "Sandbox")
        created = {
            "id": demo_id("event " + request.id),
            "event_type": "sandbox_created",
            "decision_code": None,
            "worker_run_id": None,
            "payload": {},
            "created_at": sandbox["created_at"],
        }
        logs = {
            **sandbox,
            "install_log": "added 1208 packages in 31s\n",
            "dev_log": sandbox["error"],
        }
        return {"sandbox": logs, "lifecycle_events": [created]}

    def start_run(self, request: DemoRequest) -> Json:
        """POST /runs: a new run, or the one that was started with the same key."""
        body = request.body
        problem = demo_start_problem(request.key, body)
        if problem:
            raise DemoRefusal(400, "BAD_REQUEST", problem)
        if body["repoId"] not in DEMO_REPOS:
            raise DemoRefusal(
                503,
                "SERVICE_UNAVAILABLE",
                "External Mogplex run rate limit unavailable",
                "60",
            )
        replayed = request.key in self.keys
        if not replayed:
            run_id = demo_id(f"run {len(self.runs)}")
            self._add_run(
                run_id, body, demo_ending(text_of(body, "prompt")), self.clock()
            )
            self.keys[request.key] = (body, run_id)
        first_body, run_id = self.keys[request.key]
        if body != first_body:
            raise DemoRefusal(
                409,
                "IDEMPOTENCY_CONFLICT",
                "Idempotency-Key was used with another request body",
            )
        run = self.runs[run_id].record(self.clock())
        if run["error"] == DEMO_QUEUE_ERROR and not replayed:
            raise DemoRefusal(500, "INTERNAL_ERROR", "Internal server error")
        return {**run, "replayed": replayed}

    def get_run(self, request: DemoRequest) -> Json:
        """GET /runs/{id}."""
        run = demo_find(self.runs, request.id, "Run")
        return {"run": run.record(self.clock())}

    def run_events(self, request: DemoRequest) -> Json:
        """GET /runs/{id}/events: always the first ones."""
        run = demo_find(self.runs, request.id, "Run")
        now = self.clock()
        steps = [step for step in run.shown(now) if step.type]
        events = [
            {
                "id": demo_id(f"event {number} {request.id}"),
                "type": step.type,
                "toolName": step.tool,
                "message": step.message,
                "payload": step.payload,
                "createdAt": format_time(demo_time(step.at_s)),
            }
            for number, step in enumerate(steps)
        ]
        return {"run": run.record(now), "events": demo_first(events, request)}

    def cancel_run(self, request: DemoRequest) -> Json:
        """POST /runs/{id}/cancel: its agent does no more."""
        run = demo_find(self.runs, request.id, "Run")
        now = self.clock()
        had_ended = run.record(now)["status"] in TERMINAL_STATUSES
        if not had_ended:
            run.steps = run.shown(now)
            run.play(DEMO_CANCEL, now, self.speed)
        record = run.record(now)
        return {"run": record, "status": record["status"], "alreadyTerminal": had_ended}

    def list_automations(self, request: DemoRequest) -> Json:
        """GET /automations: all, on one page."""
        return {"automations": list(DEMO_AUTOMATIONS.values()), "nextCursor": None}

    def trigger_automation(self, request: DemoRequest) -> Json:
        """POST /automations/{id}/trigger: a job run, or the one that the same key has started."""
        demo_find(DEMO_AUTOMATIONS, request.id, "Automation")
        demo_find(DEMO_REPOS, request.body["repoId"], "Repo")
        if not request.key:
            raise DemoRefusal(400, "BAD_REQUEST", "Idempotency-Key is required")
        job_run_id = demo_id("job run " + request.key)
        started = job_run_id not in self.job_runs
        outcome = "duplicate"
        if started:
            outcome = "started"
            self.job_runs[job_run_id] = self.clock()
        return {
            "run": {
                "jobRunId": job_run_id,
                "outcome": outcome,
                "reason": None,
                "started": started,
                "status": "running",
            }
        }

    def _job_run(self, job_run_id: str) -> Json:
        began = self.job_runs[job_run_id]
        status = "running"
        if self.clock() - began > DEMO_JOB_S / self.speed:
            status = "success"
        return {
            "id": job_run_id,
            "automation_id": DEMO_AUTOMATION_ID,
            "status": status,
            "created_at": demo_time(began),
        }

    def list_job_runs(self, request: DemoRequest) -> Json:
        """GET /automations/{id}/runs, newest first."""
        demo_find(DEMO_AUTOMATIONS, request.id, "Automation")
        newest_first = reversed(list(self.job_runs))
        return {"runs": demo_first(map(self._job_run, newest_first), request)}

    def get_job_run(self, request: DemoRequest) -> Json:
        """GET /automations/{id}/runs/{jobRunId}."""
        demo_find(self.job_runs, request.id, "Run")
        return {"run": self._job_run(request.id)}

    def list_agents(self, request: DemoRequest) -> Json:
        """GET /agents."""
        return {"agents": DEMO_AGENTS}

    def list_models(self, request: DemoRequest) -> Json:
        """GET /models."""
        return {"models": DEMO_MODELS}

    def list_mcp_servers(self, request: DemoRequest) -> Json:
        """GET /mcp/servers: with their secrets, as the service does."""
        return {"servers": DEMO_SERVERS}

    ROUTES = (  # method and path below API_PATH, scope ("": any token will do), status, handler
        ("GET /repos", "", 200, list_repos),
        ("GET /sandboxes", "", 200, list_sandboxes),
        ("POST /sandboxes", "write", 202, create_sandbox),
        ("GET /sandboxes/{id}/logs", "read", 200, sandbox_logs),
        ("POST /runs", "write", 202, start_run),
        ("GET /runs/{id}", "", 200, get_run),
        ("GET /runs/{id}/events", "", 200, run_events),
        ("POST /runs/{id}/cancel", "write", 200, cancel_run),
        ("GET /automations", "read", 200, list_automations),
        ("POST /automations/{id}/trigger", "write", 202, trigger_automation),
        ("GET /automations/{id}/runs", "read", 200, list_job_runs),
        ("GET /automations/[^/]+/runs/{id}", "read", 200, get_job_run),
        ("GET /agents", "read", 200, list_agents),
        ("GET /models", "read", 200, list_models),
        ("GET /mcp/servers", "read", 200, list_mcp_servers),
    )

    def _add_sandbox(
        self,
        body: Json,
        created: float,
        record_id: str = "",
        status: str = "running",
    ) -> Json:
        """A sandbox as a StartRun or a POST /sandboxes asks for it."""
        name = record_id or demo_id(f"sandbox {len(self.sandboxes)}")
        base, working = demo_branches(body, name[:8])
        repo = DEMO_REPOS[body["repoId"]]
        created_at = demo_time(created)
        sandbox = {
            "id": name,
            "sandbox_id": f"sbx_{name[:8]}",
            "repo_id": repo["id"],
            "status": status,
            "base_branch": base,
            "working_branch": working,
            "root_directory": body.get("rootDirectory", repo["root_directory"]),
            "preview_url": None,
            "created_at": created_at,
            "last_active_at": created_at,
            "error": None,
        }
        if status == "running":
            sandbox["preview_url"] = f"https://{name[:8]}-3000.preview.example"
        self.sandboxes[name] = sandbox
        return sandbox

    def _add_run(self, run_id: str, body: Json, ending: str, began: float) -> DemoRun:
        """A run that was accepted at ``began``, in a sandbox of its own."""
        working = demo_branches(body, run_id[:8])[1]
        sandbox = self._add_sandbox({**body, "workingBranch": working}, began)
        run = DemoRun(run_id, body, sandbox)
        run.play(DEMO_ENDINGS[ending], began, self.speed)
        self.runs[run_id] = run
        return run


# The server: the same on a socket.


def demo_listener(service: DemoService, port: int, hosts: Set[str]) -> Any:
    """A server of 127.0.0.1 that answers to the names in ``hosts``; OSError, OverflowError."""
    import http.server
    import socketserver

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5.0  # an idle connection is closed, as the service does
        wbufsize = -1  # head and body leave in one packet

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def converse(self) -> None:
            """Read a request and answer it."""
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length)
            headers = {name.lower(): value for name, value in self.headers.items()}
            if headers.get("host", "").lower() in hosts:
                self.send(*service.answer(self.command, self.path, headers, data))
            else:
                self.send(
                    421, "This demo service answers to its own address alone.", {}
                )

        def send(
            self, status: int, body: Union[Json, str], headers: Dict[str, str]
        ) -> None:
            """Send an answer in chunks, as the service does."""
            kind = "text/html; charset=utf-8"
            if not isinstance(body, str):
                body = to_json(body, ensure_ascii=False)
                kind = "application/json"
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            data = body.encode("utf-8", "replace")
            if data:  # an empty chunk would end the answer early
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PUT = do_DELETE = converse

    # not an HTTPServer, which looks its own name up in the DNS
    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64
        allow_reuse_address = os.name != "nt"

        def handle_error(self, *_: Any) -> None:
            """Print nothing: clients may leave when they like."""

    return Listener(("127.0.0.1", port), Handler)


class DemoServer:
    """A stand-in for the hosted service on 127.0.0.1, for people and tests: no account, no network.

    It serves from its construction on, to the end of its ``with`` statement. Give a Client its
    ``url`` and ``token``; ``read_token`` lacks the scope ``write``. A run takes some 10 s, and
    every duration is divided by ``speed``; ``clock`` gives seconds since the epoch. A run whose
    task has the word fail, crash or refuse in it ends so. UsageError when the port (0: any free
    one) cannot be had.

    ``seeded_runs`` are the runs it begins with as Home.record_start takes them, oldest first. It
    answers to the Hosts in ``hosts`` alone: another name may be a web page's, bound to this
    machine. ``service`` has more for tests of this program.
    """

    token = DEMO_TOKEN
    read_token = DEMO_READ_TOKEN

    def __init__(
        self,
        port: int = 0,
        *,
        clock: Callable[[], float] = time.time,
        speed: float = 1.0,
    ) -> None:
        self.service = DemoService(clock, speed)
        self.hosts: Set[str] = set()
        try:
            self._listener = demo_listener(self.service, port, self.hosts)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"the demo cannot listen on 127.0.0.1:{port}: {error}"
            ) from None
        port = self._listener.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.hosts.update([f"127.0.0.1:{port}", f"localhost:{port}"])
        if port == 80:  # which clients leave out
            self.hosts.update(["127.0.0.1", "localhost"])
        self.seeded_runs = [self._remembered(seed) for seed in DEMO_RUNS]
        serve = self._listener.serve_forever
        threading.Thread(target=serve, args=(0.05,), daemon=True).start()

    def _remembered(self, seed: Json) -> Json:
        """A run of the start as the program remembers those that it started."""
        run = self.service.runs[seed["id"]]
        return {
            "id": seed["id"],
            "service": self.url,
            "repo": run.words["repo"],
            "branch": run.words["working"],
            "time": run.accepted["createdAt"],
            "task": seed["task"],
        }

    def has_started_runs(self) -> bool:
        """Whether it has runs besides the seeded ones."""
        return len(self.service.runs) > len(self.seeded_runs)

    def __enter__(self) -> DemoServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Accept no more; connections that are there end with their clients."""
        self._listener.shutdown()
        self._listener.server_close()


__all__ += ["DemoServer"]  # here, as a copy of the upper half has none


@contextlib.contextmanager
def demo_environment(port: int = 0) -> Iterator[Tuple[DemoServer, Dict[str, str]]]:
    """A demo service of one's own, and the variables that lead the program to it.

    Among them is a home that remembers its runs. Both end with the block.
    """
    import tempfile

    directory = tempfile.TemporaryDirectory(prefix="mogplex-demo-")
    with directory as home, DemoServer(port) as server:
        for record in server.seeded_runs:
            Home(home).record_start(record)
        yield server, {
            "MOGPLEX_URL": server.url,
            "MOGPLEX_API_KEY": server.token,
            "MOGPLEX_DEV": "1",
            "MOGPLEX_HOME": home,
        }


# ---------------------------------------------------------------- 9. Commands and main

DEFAULT_TIMEOUT_S = 1800.0
GRACE_S = 5.0  # for a start or a cancellation that is under way when a signal comes
# Set by GitHub Codespaces, VS Code's dev containers, Gitpod and DevPod.
CONTAINER_VARIABLES = (
    "CODESPACES",
    "REMOTE_CONTAINERS",
    "GITPOD_WORKSPACE_ID",
    "DEVPOD",
)
MAX_RERUNS = (
    8  # of a CI job, that are looked up: the service admits ten starts a minute
)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command: SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__()
        # Ctrl+Break, or its window was closed.
        if number == getattr(signal, "SIGBREAK", 0):
            number = signal.SIGINT
        self.exit = Exit(128 + number)


def in_background(
    work: Callable[..., object], *given: object
) -> queue.SimpleQueue[Any]:
    """Do ``work`` on a thread, or here where there is none.

    What it returns, or the exception that it raises, comes in the queue.
    """
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def do_work() -> None:
        try:
            outcomes.put(work(*given))
        except BaseException as error:
            outcomes.put(error)

    try:
        start_thread(do_work)
    except MogplexError:
        do_work()
    return outcomes


class Interrupts:
    """The one place that decides what SIGINT, SIGTERM and SIGHUP do.

    The first one is an exception. Those that follow it at once are passed over: what is still to
    be done by then is bounded, and both GNU ``timeout`` and CI runners send more than one. A
    signal that is ignored at the start (``nohup``, ``&`` in a script) stays ignored.

    Python discards an exception that is raised while a destructor or the callback of a weak
    reference runs. So the first one is raised again by ``check``, and by a signal that comes later.
    """

    # SIGHUP exists on POSIX alone, SIGBREAK on Windows alone.
    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    AT_ONCE_S = 2.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: Optional[Interrupted] = None
        self.first_at = 0.0
        self.held = False  # the first one waits too

    def arrived(self, number: int, frame: object) -> None:
        """The handler of all of them."""
        now = self.clock()
        if self.first is None:
            self.first = Interrupted(number)
            self.first_at = now
        elif now - self.first_at < self.AT_ONCE_S:
            return
        self.check()

    def check(self) -> None:
        """Raise the first signal, if one has come. What waits for long calls this repeatedly."""
        if self.first is not None and not self.held:
            raise self.first

    @contextlib.contextmanager
    def handled(self, to_the_end: bool = False) -> Iterator[None]:
        """Handle them here, and afterwards as before. Only the main thread can do that.

        Where the process ends afterwards, ``to_the_end``, they are ignored from then on: what
        it exits with stands, and Python has no traceback of its own to show.
        """
        before: Dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in self.NAMES:
                number = getattr(signal, name, 0)
                if number and signal.getsignal(number) not in (None, signal.SIG_IGN):
                    before[number] = signal.signal(number, self.arrived)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if to_the_end else handler)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Let no signal cut short what is done here, which must be bounded."""
        self.held = True
        try:
            yield
        finally:
            self.held = False

    def outlast(self, work: Callable[[], Run]) -> Run:
        """What ``work``, on a thread of its own, returns or raises.

        A signal does not cut it short: it is raised when the outcome is known, or ``GRACE_S``
        after it came.
        """
        outcome = None
        leave_at = float("inf")
        with self.postponed():
            outcomes = in_background(work)
            while outcome is None and time.monotonic() < leave_at:
                with contextlib.suppress(queue.Empty):
                    outcome = outcomes.get(timeout=0.1)  # in slices, for Windows
                if self.first is not None:
                    leave_at = min(leave_at, time.monotonic() + GRACE_S)
        if isinstance(outcome, BaseException):
            raise outcome
        self.check()
        return cast(Run, outcome)


def discard(stream: Any) -> None:
    """Point a stream that cannot be written to at nothing: Python flushes it again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())


def is_terminal(stream: Any) -> bool:
    """Whether a stream, which can be None or closed, is a terminal."""
    if stream is None or stream.closed:
        return False
    return bool(stream.isatty())


def prepare_stream(stream: Any, environ: Mapping[str, str]) -> None:
    """Make an output stream able to take any text.

    A console of Windows takes all of Unicode. A pipe or a file there gets UTF-8, as from git and
    other programs, instead of the code page of the system; PYTHONIOENCODING says otherwise.
    """
    if not hasattr(stream, "reconfigure"):
        return
    stream.reconfigure(errors="replace")  # what the encoding lacks becomes ?
    if (
        os.name == "nt"
        and not is_terminal(stream)
        and not environ.get("PYTHONIOENCODING")
    ):
        stream.reconfigure(encoding="utf-8", errors="replace")


def obeys_sequences(stream: Any) -> bool:
    """Whether a terminal obeys escape sequences; a console of Windows is asked to begin with it."""
    if sys.platform == "win32":
        import ctypes
        import msvcrt

        mode = ctypes.c_ulong()
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))
        if not ctypes.windll.kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
            return False
        # ENABLE_VIRTUAL_TERMINAL_PROCESSING
        return bool(ctypes.windll.kernel32.SetConsoleMode(handle, mode.value | 4))
    return True


def terminal_columns() -> int:
    """The width of the terminal."""
    import shutil

    return shutil.get_terminal_size().columns


def write_all(stream: Any, text: str) -> None:
    """Write all of ``text``, at once, waiting for a stream that does not block.

    A pipe shared with another program (Node, for one) can be non-blocking. Python's own
    buffers then drop what does not fit, so the bytes go to the descriptor itself.
    """
    if os.name == "nt" or not hasattr(stream, "buffer"):
        stream.write(text)
        stream.flush()
        return
    stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    left = memoryview(text.encode(stream.encoding, stream.errors))
    while left:
        written = raw.write(left)
        if written is None:  # full
            select.select([], [raw], [])
        else:
            left = left[written:]


def trusted_certificates(environ: Mapping[str, str]) -> Union[bool, str]:
    """The file or directory of certificates that the environment names; True for the usual ones.

    SSL_CERT_DIR can name several directories; OpenSSL passes over those that do not exist.
    """
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if environ.get(name):
            return environ[name]
    for directory in environ.get("SSL_CERT_DIR", "").split(os.pathsep):
        if os.path.isdir(directory):
            return directory
    return True


def without_ours(environ: Mapping[str, str]) -> Dict[str, str]:
    """The environment for another program: none of our variables, the token among them."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("MOGPLEX_")
    }


def open_browser(environ: Mapping[str, str], url: str) -> bool:
    """Open a page in the user's browser; whether there was one.

    It gets neither our variables, the token among them, nor our streams. The module webbrowser
    cannot be told so, and therefore runs in a process of its own, from which the browser inherits.
    """
    import subprocess

    program = "import sys, webbrowser; sys.exit(not webbrowser.open(sys.argv[1]))"
    nothing = subprocess.DEVNULL
    code = subprocess.call(
        [sys.executable, "-I", "-c", program, url],
        env=without_ours(environ),
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
    )
    return code == 0


def open_in_demo(base_url: str, url: str) -> bool:
    """Stand in for a browser, on the demo service's pages alone; whether this was one."""
    import urllib.error
    import urllib.request

    if not url.startswith(base_url):
        return False
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError):
        try:
            direct.open(url, timeout=10).close()
        except urllib.error.HTTPError as page:
            # One that is not there, which a browser would show; Python 3.14 warns of it open.
            page.close()
    return True


class Context:
    """What a command sees of the outside, and the one door through which it speaks.

    Data goes to stdout, everything else to stderr, and the token to neither.
    """

    def __init__(
        self, environ: Mapping[str, str], stdin: Any, stdout: Any, stderr: Any
    ) -> None:
        self.environ = environ
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.list_format = "table"  # of LIST_FORMATS
        self.get_path = ""  # of --get: the value that is printed of each JSON record
        self.debug = environ.get("MOGPLEX_DEBUG", "") not in ("", "0")
        self.in_demo = False
        self.credential: Optional[Credential] = None  # the one in use
        self.interrupts = Interrupts()
        self.status_line = ""  # which stderr shows now
        for stream in (stdout, stderr):
            prepare_stream(stream, environ)

    @property
    def base_url(self) -> str:
        """The service in force."""
        in_development = self.environ.get("MOGPLEX_DEV") == "1"
        allow_http = in_development and self.environ.get("NODE_ENV") != "production"
        url = self.environ.get("MOGPLEX_URL", "").strip() or DEFAULT_URL
        return parse_base_url(url, allow_http)

    @functools.cached_property
    def home(self) -> Home:
        """Our files; one Home, which gives each of its warnings once."""
        return home_from(self.environ, self.note)

    @property
    def colour(self) -> bool:
        """Whether status words on stdout are coloured."""
        if self.environ.get("NO_COLOR") or self.environ.get("TERM") == "dumb":
            return False
        if self.environ.get("FORCE_COLOR", "0") not in ("", "0"):
            return True
        return is_terminal(self.stdout) and obeys_sequences(self.stdout)

    @property
    def on_terminal(self) -> bool:
        """Whether a person can use the cockpit: stdin and stdout are a terminal."""
        return is_terminal(self.stdin) and is_terminal(self.stdout)

    @property
    def as_json(self) -> bool:
        """Whether data is JSON."""
        return self.list_format == "json"

    def client(
        self, credential: Optional[Credential] = None, **settings: Any
    ) -> Client:
        """A Client with ``credential``, or the one in force; UnauthorizedError for none."""
        self.credential = credential or resolve_credential(
            self.environ, self.base_url, self.home
        )
        return Client(
            self.credential,
            self.base_url,
            trust_env=True,
            verify=trusted_certificates(self.environ),
            log=self.note_request if self.debug else None,
            **settings,
        )

    def browse(self, url: str) -> bool:
        """Open a page in the user's browser, with --demo in a stand-in; whether there was one."""
        if self.in_demo:
            return open_in_demo(self.base_url, url)
        return open_browser(self.environ, url)

    def emit(self, text: str) -> None:
        """A line, or a block of lines, of data on stdout, at once.

        BrokenPipeError when the reader has gone, MogplexError when stdout takes nothing else.
        """
        if self.stdout is None:
            raise MogplexError("stdout is closed")
        self.clear_status()
        try:
            write_all(self.stdout, self.redacted(text) + "\n")
        except OSError as error:
            # Windows says EINVAL of a pipe whose reader has gone.
            is_windows_word = os.name == "nt" and error.errno == errno.EINVAL
            if is_windows_word or isinstance(error, BrokenPipeError):
                raise BrokenPipeError from None
            discard(self.stdout)
            raise MogplexError(f"cannot write to stdout: {error.strerror}") from None

    def json_line(self, record: object) -> str:
        """A record's line with --json; with --get, of its value at that path."""
        if self.get_path:
            return value_line(
                record, self.get_path, self.stdout and self.stdout.encoding
            )
        return ndjson(record)

    def emit_record(self, record: Record, text: str) -> int:
        """A record, with --json as it came and else as ``text``; the exit code."""
        if self.as_json:
            self.emit(self.json_line(record))
        else:
            self.emit(text)
        return Exit.OK

    def emit_list(
        self,
        records: Listed,
        empty: str,
        columns: Sequence[Column],
        limit: Optional[int] = None,
        repo_names: Mapping[str, str] = {},
    ) -> int:
        """Records in the format in force, and for none the sentence ``empty``; the exit code.

        A list as long as the ``limit`` that was asked for may have been cut off there, and says so.
        """
        if records:
            self.emit(self.list_text(records, columns, repo_names))
        elif not self.as_json:
            self.note(empty)
        if limit is not None and len(records) >= limit:
            self.note(f"only the first {limit} are listed; there may be more")
        return Exit.OK

    def list_text(
        self,
        records: Listed,
        columns: Sequence[Column],
        repo_names: Mapping[str, str],
    ) -> str:
        """Records in the format in force; a table is tab-separated where tabulate is missing."""
        setting = Setting(self.colour, repo_names=repo_names, json_line=self.json_line)
        if is_terminal(self.stdout):
            width = terminal_columns()
            setting = setting._replace(now=time.time(), width=width)
        try:
            return LIST_FORMATS[self.list_format](records, columns, setting)
        except ImportError:
            self.note("the package 'tabulate' is missing: the table is tab-separated")
            return LIST_FORMATS["tsv"](records, columns, setting)

    def redacted(self, text: str) -> str:
        """``text`` without the token in use, or the one in the environment."""
        _, token = token_given(self.environ)
        tokens = [token]
        if self.credential:
            tokens.append(self.credential.token)
        return redact(text, *tokens)

    def note(self, line: str) -> None:
        """One harmless line on stderr, without the token, which an error can echo."""
        # Twice: sanitizing joins what an escape sequence had split, and marks what a newline had.
        harmless = sanitize(self.redacted(line))
        self.say(self.redacted(harmless) + "\n")

    def note_request(self, line: str) -> None:
        """What --debug says of a request."""
        self.note(f"debug: {line}")

    def show_status(self, line: str) -> None:
        """Show a line on stderr, a terminal, until something else is written; "" for none."""
        rest = text_width(self.status_line) - text_width(line)
        self.status_line = ""
        # A key that the terminal echoes, ^C for one, has moved the cursor meanwhile.
        self.say("\r" + line + " " * rest + "\r")
        self.status_line = line

    def clear_status(self) -> None:
        """Take the status line away."""
        if self.status_line:
            self.show_status("")

    def say(self, text: str) -> None:
        """``text`` on stderr as it is; a stderr that is gone is no error."""
        self.clear_status()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            write_all(self.stderr, text)


def reader_left(stream: Any) -> bool:
    """Whether the reader of a pipe has gone, which writing would only tell at the next line."""
    # No file descriptor, or no poll() on this system.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(
            happened & (select.POLLERR | select.POLLHUP) for _, happened in poll.poll(0)
        )
    return False


def resolve_run_id(ctx: Context, given: Optional[str]) -> str:
    """The run that is meant: the id given, or ``@last``, the newest that is remembered.

    Without one it is MOGPLEX_RUN_ID, else the newest. An empty id is one that a script has
    lost, and means no run at all.
    """
    run_id = given
    source = ""
    if run_id is None:
        run_id = ctx.environ.get("MOGPLEX_RUN_ID", "@last").strip()
        source = "MOGPLEX_RUN_ID"
    if run_id == "@last":
        remembered = ctx.home.runs(ctx.base_url)
        if not remembered:
            raise UsageError("no run is remembered for this service; give a run ID")
        run_id = text_of(remembered[0], "id")
        source = "the newest started here"
    if not run_id.strip():
        raise UsageError(f"{source or 'the run ID'} is empty")
    if source:
        ctx.note(f"run {run_id} ({source})")
    return run_id


GIT_S = 10.0  # for what needs no network; a file system can be slow
GITHUB_URL = re.compile(
    r"""
    (?: (?:https|ssh):// (?:[^/]*@)? (?:www\.|ssh\.)? github\.com (?: :\d+)? /
      | (?:[^/@:]+@)? github\.com: /?              # as scp spells it
    )
    ( [\w.-]+ / [\w.-]+? ) (?:\.git)? /? \Z
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)


def git_output(environ: Mapping[str, str], *words: str) -> str:
    """What a git command that needs no network prints; UsageError where it does not end well.

    It never asks anything, and gets none of our variables.
    """
    import shutil
    import subprocess

    git = shutil.which("git", path=environ.get("PATH"))
    if git is None or not os.path.isabs(git):  # Windows looks in the checkout first
        raise UsageError("git is not installed")
    clean = {**without_ours(environ), "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [git, *words],
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_S,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"git does not answer within {GIT_S:g} s") from None
    except OSError as error:
        raise UsageError(f"git cannot be started: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace")
        match = re.search("^(?:fatal|error): (.*)", said, re.M)
        reason = match.group(1) if match else "it failed"
        raise UsageError(f"git: {_without_user_info(reason)}")
    return done.stdout.decode("utf-8", "replace")


def repo_meant(ctx: Context, given: str) -> str:
    """``given``, but for ``.`` the owner/name of the GitHub repo that this checkout came from.

    stderr tells it; UsageError for none. The URL is never shown: it can hold a password.
    """
    if given != ".":
        return given
    hint = "run this in a checkout whose remote 'origin' is on github.com, or give owner/name"
    try:
        url = git_output(ctx.environ, "remote", "get-url", "origin")
    except UsageError as error:
        raise UsageError(f"repo '.': {error.message}", hint=hint) from None
    match = GITHUB_URL.match(url.rstrip("\r\n"))
    if not match:
        raise UsageError(
            "repo '.': the remote 'origin' is not on github.com", hint=hint
        )
    name = match.group(1)
    ctx.note(f"repo {name} (origin of this checkout)")
    return name


MAX_RUN_IDS_SIZE = 1 << 20  # bytes


def read_all(stream: Any, most: int) -> bytes:
    """A binary stream up to its end, but at most ``most`` bytes; waits for one that does not block.

    Python's own buffers answer with a first part when such a stream has no more for now.
    """
    raw = getattr(stream, "raw", stream)
    data = bytearray()
    while len(data) < most:
        piece = raw.read(most - len(data))
        if piece is None:  # nothing yet
            select.select([raw], [], [])
            continue
        if not piece:
            break
        data += piece
    return bytes(data)


def read_source(ctx: Context, path: str, most: int, what: str) -> bytes:
    """At most ``most`` bytes of a file, or of stdin for ""; ``what`` is named in the UsageError."""
    try:
        if not path:
            return read_all(ctx.stdin.buffer, most)
        with open(path, "rb") as file:
            return file.read(most)
    except (OSError, ValueError, AttributeError) as error:
        # A stdin that is closed is None.
        reason = getattr(error, "strerror", "cannot be read")
        raise UsageError(f"{what}: {reason}") from None


def read_run_ids(ctx: Context) -> List[str]:
    """The run ids on stdin, one a line."""
    data = read_source(ctx, "", MAX_RUN_IDS_SIZE, "stdin")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("stdin is not valid UTF-8") from None
    if not text.strip():
        raise UsageError("there is no run ID on stdin")
    return text.splitlines()


def resolve_run_ids(ctx: Context, given: Iterable[str]) -> List[str]:
    """The runs that are meant, each once; ``-`` stands for those on stdin."""
    words: List[str] = []
    for word in given:
        if word == "-":
            words += read_run_ids(ctx)
        else:
            words.append(word)
    run_ids = [resolve_run_id(ctx, word.strip()) for word in words]
    for run_id in run_ids:
        path_segment(run_id)  # which refuses what is no id
    return list(dict.fromkeys(run_ids))


def resolve_repo(client: Client, given: str) -> Repo:
    """The repo meant by an id or by owner/name; only the latter needs a request. "" is none."""
    if "/" not in given:
        return {"id": given}
    for repo in client.repos(query=given, limit=MAX_LIMIT):
        if text_of(repo, "full_name").lower() == given.lower():
            return repo
    raise unknown_repo(given)


REPO_NAMES_S = 5.0  # for what a list can do without


def repo_names(ctx: Context, repo_ids: Iterable[str]) -> Dict[str, str]:
    """The names of repos by id, for people, in one short request; none where that fails.

    The service lists some 200 repos, but finds a single one among any number.
    """
    asked = set(filter(None, repo_ids))
    if ctx.as_json or not asked:
        return {}
    one = ""
    if len(asked) == 1:
        one = asked.pop()
    found: List[Repo] = []
    with contextlib.suppress(MogplexError):
        with ctx.client(
            ctx.credential,
            tries=1,
            timeout_s=REPO_NAMES_S,
            connect_timeout_s=REPO_NAMES_S,
        ) as client:
            found = client.repos(repo_id=one, limit=MAX_LIMIT)
    return {text_of(repo, "id"): text_of(repo, "full_name") for repo in found}


def resolve_sandbox(client: Client, given: str) -> str:
    """The id of the sandbox meant by that, or by the provider's, which is looked up."""
    if not given.startswith("sbx_"):
        return given
    for sandbox in client.sandboxes(limit=MAX_LIMIT):
        if text_of(sandbox, "sandbox_id") == given:
            record_id = text_of(sandbox, "id")
            if record_id:
                return record_id
            raise InvalidResponseError(
                f"the service lists no id of the sandbox '{given}'"
            )
    raise MogplexError(
        f"the service lists no sandbox '{given}'",
        code="NOT_FOUND",
        hint="find IDs via `mogplex sandboxes list`",
    )


def read_prompt(ctx: Context, words: Sequence[str], prompt_file: str) -> str:
    """The task, from exactly one of the three places where it can stand.

    UsageError for none, for two, and for one that the service would refuse.
    """
    both_or_none = bool(words) == bool(prompt_file)
    from_stdin = "-" in words[:1]
    if both_or_none or (from_stdin and len(words) > 1):
        raise UsageError(
            "run: give the task once: as arguments, as - for stdin, or with --prompt-file"
        )
    too_long = UsageError(
        f"run: the task is longer than {MAX_PROMPT_UNITS:,} UTF-16 units"
    )
    # Bytes: no allowed text is longer, and stdin may never end.
    most = 3 * MAX_PROMPT_UNITS + 4
    if from_stdin or prompt_file:
        data = read_source(ctx, prompt_file, most, f"run: {prompt_file or 'stdin'}")
    else:
        data = " ".join(words).encode("utf-8", "surrogateescape")
    if len(data) >= most:
        raise too_long
    try:
        prompt = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UsageError("run: the task is not valid UTF-8") from None
    if not prompt.strip():
        raise UsageError("run: the task is empty")
    if utf16_units(prompt) > MAX_PROMPT_UNITS:
        raise too_long
    return prompt


def ci_job(environ: Mapping[str, str]) -> Tuple[List[str], List[str]]:
    """What names the CI job that this is, in every re-run; and its re-runs up to this one.

    GitHub counts the attempts. In GitLab a retry is a job of its own, which cannot know the others.
    """
    reruns: List[str] = []
    if environ.get("GITHUB_RUN_ID"):
        names = ("GITHUB_REPOSITORY", "GITHUB_RUN_ID", "GITHUB_JOB")
        attempt = environ.get("GITHUB_RUN_ATTEMPT", "")
        last = 1
        if re.match(r"[0-9]{1,4}\Z", attempt):
            last = int(attempt)
        reruns += [str(number) for number in range(2, last + 1)]
        # The oldest, as the search ends at a run that has not failed, and this one.
        del reruns[MAX_RERUNS - 1 : -1]
    elif environ.get("CI_PIPELINE_ID"):
        names = ("CI_PROJECT_ID", "CI_PIPELINE_ID", "CI_JOB_NAME")
        if environ.get("CI_JOB_ID"):
            reruns.append(environ["CI_JOB_ID"])
    else:
        raise UsageError(
            "run: --idempotency-key ci works in GitHub Actions and GitLab CI only; give a key"
        )
    return [environ.get(name, "") for name in names], reruns


def ci_idempotency_keys(
    environ: Mapping[str, str], body: Json, label: str = ""
) -> List[str]:
    """The keys of one request of a CI job, to be tried in turn.

    The first is the same however often the job is re-run, so that a re-run finds the run that was
    started before. The others are for that run having failed: one for each re-run.
    """
    job, reruns = ci_job(environ)
    if label:
        job = [*job, label]
    requests = [[*job, body]]
    for rerun in reruns:
        requests.append([*job, body, rerun])
    keys = []
    for parts in requests:
        text = to_json(parts, sort_keys=True)
        keys.append("ci-" + hashlib.sha256(text.encode()).hexdigest())
    return keys


def random_key() -> str:
    """A new idempotency key."""
    import uuid  # which on Python 3.8 loads platform and subprocess

    return str(uuid.uuid4())


def idempotency_keys(
    environ: Mapping[str, str], body: Json, given: Optional[str]
) -> List[str]:
    """The keys to try in turn: a random one, the one given, or those of the CI job."""
    if given is None:
        return [random_key()]
    name, colon, label = given.strip().partition(":")
    if name != "ci":
        return [given.strip()]
    if colon and not label:
        raise UsageError("run: --idempotency-key ci: needs a label after the colon")
    return ci_idempotency_keys(environ, body, label)


def ended_badly(status: str) -> bool:
    """Whether a run of this status has ended without success."""
    return status != "success" and status_named(status).terminal


def is_spent(run: Run) -> bool:
    """Whether a start found a run of an earlier one that has failed or was cancelled."""
    status = text_of(run, "status")
    return run.get("replayed") is True and ended_badly(status)


def open_report(path: str, mode: str) -> Any:
    """A file that CI reads."""
    return open(path, mode, encoding="utf-8", errors="replace", opener=open_at_once)


class CiReport:
    """What a CI job is told of a run: as soon as the run exists, and however the command ends.

    GitHub Actions gets outputs for later steps, an annotation of what ended badly, and a job
    summary. The file that ``--dotenv`` names is for GitLab's ``artifacts:reports:dotenv``.
    """

    def __init__(
        self,
        ctx: Context,
        task: str = "",
        dotenv: str = "",
        has_outputs: bool = True,
    ) -> None:
        self.ctx = ctx
        self.task = task
        self.has_outputs = has_outputs  # which can only be those of one run
        self.dotenv = dotenv
        self.in_github = ctx.environ.get("GITHUB_ACTIONS") == "true"
        self.newest: Deque[Record] = collections.deque(maxlen=10)  # events
        if not dotenv:
            return
        try:
            open_report(dotenv, "w").close()  # or it is known before a run is paid for
        except OSError as error:
            raise UsageError(f"--dotenv {dotenv}: {error.strerror}") from None

    def begin(self, outcome: Outcome) -> None:
        """Tell the id of a run that exists, before anything else can fail."""
        self.write("--dotenv", self.dotenv, "w", dotenv_text(outcome))
        self.write_for_github("GITHUB_OUTPUT", github_outputs(run_id=outcome.run_id))

    def end(self, outcome: Outcome) -> None:
        """Tell how the run has ended, or how it stood when it was left."""
        self.write("--dotenv", self.dotenv, "w", dotenv_text(outcome))
        if self.in_github and (outcome.left or ended_badly(outcome.status)):
            annotation = self.ctx.redacted(github_annotation(outcome))
            self.ctx.say(f"{annotation}\n")
        if not outcome.run_id:
            return
        lines = [event_line(event)[:300] for event in self.newest]
        self.write_for_github(
            "GITHUB_STEP_SUMMARY", github_summary(outcome, self.task, lines)
        )
        if self.has_outputs:
            outputs = github_outputs(
                status=outcome.status,
                branch=outcome.branch,
                pull_request_url=outcome.pull_request_url,
            )
            self.write_for_github("GITHUB_OUTPUT", outputs)

    def write_for_github(self, variable: str, text: str) -> None:
        """Append to the file that an environment variable of GitHub Actions names."""
        if self.in_github:
            path = self.ctx.environ.get(variable, "")
            self.write(variable, path, "a", text)

    def write(self, name: str, path: str, mode: str, text: str) -> None:
        """Write a report; where that fails, a line on stderr is all."""
        if not path:
            return
        try:
            with open_report(path, mode) as file:
                file.write(self.ctx.redacted(text))
        except OSError as error:
            self.ctx.note(f"cannot write {name}: {error.strerror}")


def cancel_text(run_id: str, answer: Cancellation, colour: bool) -> List[str]:
    """What the answer to a cancellation says, in one line or two."""
    run = sanitize(run_id)
    word = sanitize(text_of(answer, "run", "status") or text_of(answer, "status"))
    status = paint(word, colour)
    if already_ended(answer):
        return [f"run {run} is already {status}"]
    return [f"cancellation requested for run {run}", f"status: {status}"]


def tell_still_running(ctx: Context, run_ids: Sequence[str]) -> None:
    """Say so, and what can be done about it."""
    for run_id in run_ids:
        ctx.note(f"run {run_id} is still running")
    ctx.note(f"follow: mogplex runs events {' '.join(run_ids)} --follow")
    for run_id in run_ids:
        ctx.note(f"cancel: mogplex runs cancel {run_id}")


class Attendant:
    """Stays with a run for a command: knows how it stands, and tells that to CI and to people."""

    def __init__(self, report: CiReport, run_id: str = "", label: str = "") -> None:
        self.ctx = report.ctx
        self.report = report
        self.outcome = Outcome(run_id)  # so far
        self.started = False  # this command has started it
        self.label = label  # which lines on one of several runs begin with

    def announce(self, run: Run, replayed: bool) -> None:
        """Tell the id of a run that was started: on stdout, then to CI."""
        self.outcome = outcome_of_run(run)
        self.started = True
        text = started_text({**run, "replayed": replayed}, self.ctx.colour)
        try:
            self.ctx.emit_record(run, text)
        finally:
            self.report.begin(self.outcome)

    def note(self, line: str) -> None:
        """A line on the run."""
        self.ctx.note(self.label + line)

    def heed(self, progress: Progress) -> None:
        """Keep how the run stands; raises a signal that was discarded, or BrokenPipeError."""
        self.ctx.interrupts.check()
        if reader_left(self.ctx.stdout):
            raise BrokenPipeError
        self.outcome = outcome_so_far(self.outcome, progress)
        if progress.message:
            self.note(progress.message)

    def finish(self, verdict: Verdict) -> int:
        """The trailer, and what is worth knowing; the exit code that the run deserves."""
        self.outcome = outcome_of_verdict(verdict)
        last_line = trailer(verdict, self.ctx.colour)
        self.ctx.emit_record(verdict_json(verdict), self.label + last_line)
        for line in outcome_notes(self.outcome):
            self.note(line)
        self.report.end(self.outcome)
        if verdict.status == "success":
            return Exit.OK
        return Exit.FAILURE

    def is_worth_telling(self, error: BaseException) -> bool:
        """Whether to say, at the end of the command, that the run is still running."""
        if self.started or isinstance(error, KeyboardInterrupt):
            return True
        if isinstance(error, BrokenPipeError):
            return False  # as `mogplex runs events ... | head` wants it
        return bool(self.outcome.status)  # the service knew the run a moment ago

    def request_cancellation(self, deadline: float) -> Cancellation:
        """The service's answer. A sandbox that is not ready yet is a 409, and worth another try."""
        while True:
            left_s = max(0.5, deadline - time.monotonic())
            try:
                with self.ctx.client(
                    timeout_s=left_s, connect_timeout_s=left_s, tries=1
                ) as client:
                    return client.cancel(self.outcome.run_id)
            except MogplexError as error:
                may_work = error.transient or error.status == 409
                if not may_work or deadline - time.monotonic() < 1.0:
                    raise
            time.sleep(0.5)

    def tell_cancellation(self, answer: Union[Cancellation, MogplexError]) -> None:
        """What came of that."""
        before = self.outcome
        status = before.status
        if isinstance(answer, MogplexError):
            told = "the run could not be cancelled"
            self.ctx.note(f"cannot cancel the run: {answer}")
            tell_still_running(self.ctx, [before.run_id])
        else:
            told = cancel_text(before.run_id, answer, False)[0]
            self.ctx.note(told)
            status = text_of(answer, "run", "status") or status
        reasons = f"{before.left}; {told}"
        self.outcome = before._replace(status=status, left=reasons)


def cancel_all(ctx: Context, attendants: Sequence[Attendant]) -> None:
    """Request the cancellation of runs in the time of one, and tell; no signal cuts it short."""
    deadline = time.monotonic() + GRACE_S
    with ctx.interrupts.postponed():
        asked = [
            in_background(one.request_cancellation, deadline) for one in attendants
        ]
        for attendant, outcomes in zip(attendants, asked):
            answer: Any = UnavailableError(f"no answer for {GRACE_S:g} s")
            wait_s = deadline + 1.0 - time.monotonic()  # for a last short try
            with contextlib.suppress(queue.Empty):
                answer = outcomes.get(timeout=max(0.0, wait_s))
            attendant.tell_cancellation(answer)


def settle(
    ctx: Context,
    attendants: Iterable[Attendant],
    error: BaseException,
    cancels: bool,
) -> None:
    """Settle what becomes of runs that a command leaves because of ``error``, and tell CI."""
    left = list(attendants)
    reason = str(error) or "stdout is closed"
    if isinstance(error, KeyboardInterrupt):
        reason = "interrupted"
    running = []
    for one in left:
        if status_named(one.outcome.status).terminal:
            continue
        one.outcome = one.outcome._replace(left=reason)
        if one.outcome.run_id:
            running.append(one)
    if cancels and isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
        cancel_all(ctx, running)
    elif any(one.is_worth_telling(error) for one in running):
        tell_still_running(ctx, [one.outcome.run_id for one in running])
    for one in left:
        one.report.end(one.outcome)


@contextlib.contextmanager
def attended(
    ctx: Context, attendants: Iterable[Attendant], cancels: bool
) -> Iterator[None]:
    """Stay with runs while a command does its work, and settle what becomes of those it leaves.

    A signal, or a reader of stdout that has gone, cancels them where that was asked for.
    Otherwise stderr says that they are still running, and how to follow and cancel them. CI is
    told in any case.
    """
    try:
        yield
    except (KeyboardInterrupt, MogplexError, OSError) as error:
        settle(ctx, attendants, error, cancels)
        raise
    finally:
        ctx.clear_status()


def warn_of_doubt(ctx: Context, start: Json) -> None:
    """Say so where an earlier start of the same task may have gone through, and how to find out."""
    earlier = ctx.home.start_in_doubt(start, time.time())
    if earlier:
        ctx.note(
            "an earlier start of this task may have gone through; to find out instead of "
            f"starting another, add --idempotency-key {text_of(earlier, 'key')}"
        )


def start_once(
    client: Client,
    body: Json,
    repo: str,
    key: str,
    announce: Callable[[Run], None],
    attendant: Attendant,
) -> Run:
    """Start a run under one key.

    Where that fails and the run may have started all the same, stderr says how to find out.
    """
    ctx = attendant.ctx
    sent = threading.Event()

    def before_sending() -> None:
        if ctx.interrupts.first is not None:  # held back by now, and not too late
            raise ctx.interrupts.first
        sent.set()

    work = functools.partial(
        start_recorded, client, ctx.home, body, key, repo, announce, before_sending
    )
    try:
        return ctx.interrupts.outlast(work)
    except (MogplexError, KeyboardInterrupt) as error:
        delivered = getattr(error, "delivered", True)
        if sent.is_set() and delivered and not attendant.started:
            ctx.note(
                "the run may have started; to find out without paying twice, "
                f"add --idempotency-key {key}"
            )
        raise


def start(
    client: Client,
    body: Json,
    repo: str,
    given_key: Optional[str],
    attendant: Attendant,
) -> None:
    """Start a run, or find the one of an earlier attempt of this CI job that has not failed.

    ``body`` is as for Client.start_run, ``repo`` what people call it.
    """
    ctx = attendant.ctx
    *earlier, last = idempotency_keys(ctx.environ, body, given_key)

    def announce(run: Run) -> None:
        replayed = run.get("replayed") is True
        # Under a random key that is an earlier try of our own.
        attendant.announce(run, replayed and given_key is not None)

    def announce_unspent(run: Run) -> None:
        if not is_spent(run):
            announce(run)

    for key in earlier:
        run = start_once(client, body, repo, key, announce_unspent, attendant)
        if attendant.started:
            return
        status = text_of(run, "status")
        ctx.note(
            f"run {text_of(run, 'runId')} of an earlier attempt is {status}; starting another"
        )
    warn_of_doubt(ctx, start_record(client.base_url, body, last, repo))
    start_once(client, body, repo, last, announce, attendant)


class LifeSigns:
    """What stderr shows of a silent run: a status line on a terminal, a line a minute in a log."""

    def __init__(
        self,
        ctx: Context,
        quiet: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ctx = ctx
        self.quiet = quiet
        self.clock = clock
        can_redraw = ctx.environ.get("TERM", "") not in ("", "dumb")
        self.on_terminal = can_redraw and is_terminal(ctx.stderr)
        self.next_at = clock()

    def show(self, progress: Progress) -> None:
        """Called at least twice a second."""
        now = self.clock()
        if self.quiet or now < self.next_at:
            return
        if self.on_terminal:
            line = status_line(progress, now)
            self.ctx.show_status(fit(line, terminal_columns() - 1))
            self.next_at = now + 1.0
        elif now - progress.last_event_at >= 60.0:
            self.ctx.note(silence_line(progress, now))
            self.next_at = now + 60.0


@contextlib.contextmanager
def log_section(ctx: Context, run_id: str) -> Iterator[None]:
    """In a GitLab job's log, a section of its own."""
    if ctx.environ.get("GITLAB_CI") != "true":
        yield
        return
    ctx.say(gitlab_marker("start", run_id, time.time()))
    try:
        yield
    finally:
        ctx.say(gitlab_marker("end", run_id, time.time()))


class FollowOptions(NamedTuple):
    """The options that go with ``--follow``, as the parser gives them."""

    follow: bool = False
    timeout: float = DEFAULT_TIMEOUT_S
    limit: int = MAX_LIMIT
    quiet: bool = False
    cancel_on_interrupt: bool = False
    dotenv: str = ""

    @property
    def timing(self) -> Timing:
        """How long the tail of each run waits for what."""
        return Timing(self.timeout)


def emit_events(
    ctx: Context,
    events: Sequence[Record],
    texts: Sequence[str] = ("",),
    run_id: str = "",
) -> None:
    """Events on stdout, in one write; of one of several runs with its ``run_id``.

    ``texts`` are the JSON that each event came as, "" where that is not known.
    """
    label = ""
    if run_id:
        label = label_of(run_id)
        events = [with_run_id(run_id, event) for event in events]
    if not events:
        return
    if ctx.get_path:
        ctx.emit("\n".join(map(ctx.json_line, events)))
    elif ctx.as_json:
        ctx.emit(ndjson_lines(events, texts))
    else:
        newline = newline_mark(ctx.stdout and ctx.stdout.encoding)
        lines = [label + event_line(event, newline) for event in events]
        ctx.emit("\n".join(lines))


def note_run_error(ctx: Context, run_id: str, error: MogplexError) -> None:
    """Say what went wrong with one of several runs."""
    label = label_of(run_id)
    ctx.note(f"{label}error: {error}")
    if error.hint:
        ctx.note(label + error.hint)


class Follower:
    """``--follow``: the events of a run as they come, signs of life, and the verdict."""

    def __init__(self, attendant: Attendant, options: FollowOptions) -> None:
        self.ctx = attendant.ctx
        self.attendant = attendant
        self.options = options
        self.life = LifeSigns(self.ctx, options.quiet)
        # What came together is written together: a write for each would cost more than the rest.
        self.events: List[Json] = []
        self.texts: List[str] = []
        self.held = 0  # characters, about

    def run(self, client: Client) -> int:
        """Follow to the end; the exit code that the run deserves."""
        run_id = self.attendant.outcome.run_id
        tail = Tail(
            client,
            run_id,
            self.options.timing,
            self.options.limit,
            self.progress,
            self.attendant.started,
        )
        with log_section(self.ctx, run_id):
            try:
                for item, text in tail.items():
                    if isinstance(item, Verdict):
                        verdict = item
                    else:
                        self.show(item, text)
            except TailTimeout as error:
                raise TailTimeout(f"--follow {error.message}") from None
            except MogplexError:
                self.flush()
                raise
            self.flush()
        return self.attendant.finish(verdict)

    def show(self, event: Json, text: str) -> None:
        """An event's line: it is out before the tail waits for more."""
        self.attendant.report.newest.append(event)
        self.events.append(event)
        self.texts.append(text)
        self.held += len(text) or 65536  # what came in a poll can be of any length
        if self.held > 65536:
            self.flush()

    def flush(self) -> None:
        """Write the events that have come."""
        emit_events(self.ctx, self.events, self.texts)
        self.events.clear()
        self.texts.clear()
        self.held = 0

    def progress(self, progress: Progress) -> None:
        """Called by the tail before each wait, at least twice a second, and at each change."""
        self.flush()
        self.attendant.heed(progress)
        self.life.show(progress)


class Followers:
    """``--follow`` of several runs: their lines as they come, a trailer for each, and a count."""

    def __init__(
        self, ctx: Context, run_ids: Sequence[str], options: FollowOptions
    ) -> None:
        self.ctx = ctx
        self.options = options
        self.life = LifeSigns(ctx, options.quiet)
        self.left: Dict[str, Attendant] = {}  # by run id, for runs not over yet
        for run_id in run_ids:
            report = CiReport(ctx, has_outputs=False)
            self.left[run_id] = Attendant(report, run_id, label_of(run_id))
        self.standing: Dict[str, Progress] = {}  # of these
        self.ends: List[str] = []  # of the others: the status, or "given up"
        self.code = 0  # the highest of all

    def run(self) -> int:
        """Follow them all to the end; the highest of the exit codes that they deserve."""
        try:
            cancels = self.options.cancel_on_interrupt
            stay = attended(self.ctx, self.left.values(), cancels)
            with stay, self.ctx.client() as client:
                self.follow(client)
        except (KeyboardInterrupt, MogplexError, OSError) as error:
            # With neither, nothing was asked of the service.
            if self.standing or isinstance(error, KeyboardInterrupt):
                self.ctx.note(self.count())
            raise
        if self.ctx.as_json:
            self.ctx.note(self.count())
        else:
            self.ctx.emit(self.count())
        return self.code

    def follow(self, client: Client) -> None:
        """Show what comes, until all are over or the time is up."""
        tails = Tails(
            client,
            self.left,
            self.options.timing,
            self.options.limit,
            self.progress,
            self.options.cancel_on_interrupt,
        )
        try:
            for run_id, item in tails.items():
                self.show(run_id, item)
        except TailTimeout as error:
            self.ctx.note(f"error: --follow {error.message}")
            self.code = max(self.code, error.exit)
            settle(self.ctx, self.left.values(), error, cancels=False)

    def count(self) -> str:
        """How many of them ended how."""
        return tally(self.ends + ["not over"] * len(self.left))

    def show(self, run_id: str, item: Union[Event, Verdict, MogplexError]) -> None:
        """What came of a run."""
        attendant = self.left[run_id]
        if isinstance(item, Verdict):
            code = attendant.finish(item)
            self.end(run_id, item.status, code)
        elif isinstance(item, MogplexError):
            note_run_error(self.ctx, run_id, item)
            settle(self.ctx, [attendant], item, cancels=False)
            self.end(run_id, "given up", item.exit)
        else:
            attendant.report.newest.append(item)
            emit_events(self.ctx, [item], run_id=run_id)

    def end(self, run_id: str, how: str, code: int) -> None:
        """A run is over, or at least the following of it."""
        self.ends.append(how)
        self.code = max(self.code, code)
        self.standing.pop(run_id, None)
        del self.left[run_id]

    def progress(self, run_id: str, progress: Progress) -> None:
        """Called before each wait, at least twice a second, and at each change."""
        self.left[run_id].heed(progress)
        self.standing[run_id] = progress
        self.life.show(self.together())

    def together(self) -> Progress:
        """How all those that are not over stand."""
        going_on = list(self.standing.values())
        statuses = [one.status or "waiting" for one in going_on]
        troubled = [one for one in going_on if one.connection != "connected"]
        last_event_at = max(one.last_event_at for one in going_on)
        shown = (troubled or going_on)[0]
        return shown._replace(
            status=tally(self.ends + statuses), last_event_at=last_event_at
        )


def cmd_repos_list(ctx: Context, *, query: str = "", limit: int = MAX_LIMIT) -> int:
    """``repos list``."""
    empty = "no repos; link one in the web app"
    if query:
        empty = f"no repo matches '{query}'"
    with ctx.client() as client:
        repos = client.repos(query=query, limit=limit)
    return ctx.emit_list(repos, empty, REPO_COLUMNS, limit)


BODY_FIELDS = {  # of POST /runs, by the option of ``run`` that sets them
    "harness": "harness",
    "base_branch": "baseBranch",
    "branch": "workingBranch",
    "create_branch": "createBranch",
    "root": "rootDirectory",
}


def report_start(ctx: Context, outcome: Outcome) -> int:
    """The exit code of a start; one that the service answers with a run already failed is none."""
    if not ended_badly(outcome.status):
        return Exit.OK
    ctx.note(f"run error: {outcome.error or outcome.status}")
    return Exit.FAILURE


def cmd_run(
    ctx: Context,
    *words: str,
    repo: str = "",
    prompt_file: str = "",
    idempotency_key: Optional[str] = None,
    **options: Any,
) -> int:
    """Read the task, find the repo, start, tell, follow."""
    fields: Json = {}  # what was not asked for is left to the service
    for option, field in BODY_FIELDS.items():
        if option in options:
            fields[field] = options.pop(option)
    following = FollowOptions(**options)
    repo = repo or ctx.environ.get("MOGPLEX_REPO", "").strip()
    if not repo:
        raise UsageError(
            "run: --repo <id> is required (find IDs via `mogplex repos list`)"
        )
    repo = repo_meant(ctx, repo)
    task = read_prompt(ctx, words, prompt_file)
    attendant = Attendant(CiReport(ctx, task, following.dotenv))
    stay = attended(ctx, [attendant], following.cancel_on_interrupt)
    with stay, ctx.client() as client:
        found = resolve_repo(client, repo)
        body = {"repoId": text_of(found, "id"), "prompt": task, **fields}
        start(client, body, text_of(found, "full_name"), idempotency_key, attendant)
        if following.follow:
            return Follower(attendant, following).run(client)
        attendant.report.end(attendant.outcome)
    return report_start(ctx, attendant.outcome)


def cmd_runs_list(ctx: Context, *, limit: int = MAX_LIMIT) -> int:
    """The runs that were started here, and the starts whose answer never came."""
    remembered = ctx.home.history(ctx.base_url)
    records = remembered[:limit]
    repos = [text_of(record, "repo") for record in records]
    names = repo_names(ctx, [repo for repo in repos if "/" not in repo])
    ctx.emit_list(
        records, "no runs started from here yet", HISTORY_COLUMNS, repo_names=names
    )
    if len(remembered) > limit:
        ctx.note(f"only the newest {limit} of {len(remembered)} are listed")
    if not all(text_of(record, "id") for record in records):
        ctx.note(
            "in doubt: no answer to the start ever came; to find out whether the run exists, "
            "repeat `mogplex run` with --idempotency-key and the key shown"
        )
    return Exit.OK


def told_run_text(answer: Record, colour: bool) -> str:
    """A run, and what its events tell: the branch pushed, the pull request, why it failed."""
    delivery = Delivery()
    failure = ""
    for event in dicts_of(answer, "events"):
        delivery = delivery.then(delivery_of(event) or Delivery())
        failure = failure_of(event) or failure
    run = dict_of(answer, "run")
    if failure == text_of(run, "error"):
        failure = ""
    return run_text(run, colour, delivery, failure)


def cmd_runs_get(ctx: Context, run_id: Optional[str] = None) -> int:
    """One run as it is now. People get what its events tell too, which come with the run."""
    run_id = resolve_run_id(ctx, run_id)
    with ctx.client() as client:
        if ctx.as_json:
            answer: Record = {"run": client.run(run_id)}
        else:
            answer = client.events(run_id)
    run = dict_of(answer, "run")
    if not run:
        raise InvalidResponseError("the response contains no run")
    return ctx.emit_record(run, told_run_text(answer, ctx.colour))


def follow_run(ctx: Context, run_id: str, options: FollowOptions) -> int:
    """Follow a run that was started elsewhere."""
    attendant = Attendant(CiReport(ctx, dotenv=options.dotenv), run_id)
    with attended(ctx, [attendant], options.cancel_on_interrupt):
        attendant.report.begin(attendant.outcome)
        with ctx.client() as client:
            return Follower(attendant, options).run(client)


def show_events(
    ctx: Context, events: Sequence[Json], limit: int, run_id: str = ""
) -> None:
    """Events as they are now; of one of several runs with its ``run_id``."""
    emit_events(ctx, events, run_id=run_id)
    label = ""
    if run_id:
        label = label_of(run_id)
    if not events:
        ctx.note(f"{label}no events yet")
    elif len(events) >= limit:
        ctx.note(
            f"{label}only the first {len(events)} events are listed; there may be more"
        )


def list_events(ctx: Context, run_ids: Sequence[str], limit: int) -> int:
    """The events of several runs, as they are now; the highest of the runs' exit codes."""
    code = 0
    with ctx.client() as client:
        for run_id in run_ids:
            try:
                events = dicts_of(client.events(run_id, limit=limit), "events")
            except MogplexError as error:
                note_run_error(ctx, run_id, error)
                code = max(code, error.exit)
                continue
            show_events(ctx, events, limit, run_id)
    return code


def several_events(ctx: Context, given: Sequence[str], following: FollowOptions) -> int:
    """The events of several runs: those of now, or all as they come."""
    if following.dotenv:
        raise UsageError("runs events: --dotenv is for one run")
    run_ids = resolve_run_ids(ctx, given)
    if not following.follow:
        return list_events(ctx, run_ids, following.limit)
    return Followers(ctx, run_ids, following).run()


def cmd_runs_events(ctx: Context, *given: str, **options: Any) -> int:
    """The events of a run, or of several: those of now, or all as they come."""
    following = FollowOptions(**options)
    if len(given) > 1 or "-" in given:
        return several_events(ctx, given, following)
    run_id = resolve_run_id(ctx, given[0] if given else None)
    if following.follow:
        return follow_run(ctx, run_id, following)
    with ctx.client() as client:
        events = dicts_of(client.events(run_id, limit=following.limit), "events")
    show_events(ctx, events, following.limit)
    return Exit.OK


def cmd_runs_cancel(ctx: Context, run_id: str) -> int:
    """Request a run's cancellation."""
    run_id = resolve_run_id(ctx, run_id)
    with ctx.client() as client:
        answer = client.cancel(run_id)
    return ctx.emit_record(answer, "\n".join(cancel_text(run_id, answer, ctx.colour)))


def cmd_sandboxes_list(
    ctx: Context,
    *,
    repo: str = "",
    status: str = "",
    limit: int = MAX_LIMIT,
) -> int:
    """``sandboxes list``: of one repo, or of all of them."""
    repo = repo_meant(ctx, repo)
    with ctx.client() as client:
        wanted = resolve_repo(client, repo)
        repo_id = text_of(wanted, "id")
        sandboxes = client.sandboxes(repo_id=repo_id, status=status, limit=limit)
    names = {repo_id: text_of(wanted, "full_name")}
    if not names[repo_id]:
        names = repo_names(ctx, [text_of(sandbox, "repo_id") for sandbox in sandboxes])
    return ctx.emit_list(sandboxes, "no sandboxes", SANDBOX_COLUMNS, limit, names)


def cmd_sandboxes_logs(ctx: Context, sandbox_id: str) -> int:
    """``sandboxes logs``."""
    with ctx.client() as client:
        logs = client.sandbox_logs(resolve_sandbox(client, sandbox_id))
    text = logs_text(logs)
    if not text and not ctx.as_json:
        ctx.note("no logs yet")
        return Exit.OK
    return ctx.emit_record(logs, text)


def cmd_sandboxes_stop(ctx: Context, sandbox_id: str) -> int:
    """``sandboxes stop``: sent, so that it works from the day that the service offers it."""
    with ctx.client() as client:
        record_id = resolve_sandbox(client, sandbox_id)
        try:
            answer = client.stop_sandbox(record_id)
        except MogplexError as error:
            if error.code or error.status not in (404, 405):
                raise
            raise UnavailableError(
                "the API cannot stop a sandbox yet",
                hint=f"stop it in the web app, under Sandboxes: {client.base_url}",
            ) from None
    status = sanitize(text_of(answer, "sandbox", "status") or text_of(answer, "status"))
    text = f"stop requested for sandbox {sanitize(sandbox_id)}\nstatus: {status}"
    return ctx.emit_record(answer, text)


# -- Any route

API_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# What follows the prefix and its slash, if they are there; "api" first names another prefix.
API_TARGET = re.compile(
    r"""
    /? (?:api/v1/mogplex/)? (?! api (?:[/?]|\Z))
    (?P<path> (?: [A-Za-z0-9._~!$&'()*+,;=:@/-] | %[0-9A-Fa-f]{2} )+ )
    (?: \? (?P<query> (?: [A-Za-z0-9._~!$&'()*+,;=:@/?-] | %[0-9A-Fa-f]{2} )* ))?
    \Z""",
    re.VERBOSE,
)


def read_field(text: str) -> Tuple[str, Any]:
    """The name and value of a --field: of NAME=VALUE the text, of NAME:=JSON what the JSON says."""
    match = re.match(r"(?!:=)([^=]+?)(:?)=(.*)\Z", text, re.DOTALL)
    if not match:
        raise UsageError(f"--field takes NAME=VALUE or NAME:=JSON, not '{text}'")
    name, is_json, value = match.groups()
    if not is_json:
        return name, value
    try:
        return name, parse_json(value)
    except ValueError:
        raise UsageError(f"--field {name}: '{value}' is not JSON") from None


def body_of_fields(fields: Iterable[Tuple[str, Any]]) -> Json:
    """The JSON object that the fields of a request make."""
    body: Json = {}
    for name, value in fields:
        if name in body:
            raise UsageError(f"api: --field {name} is given twice")
        body[name] = value
    return body


def query_of_fields(fields: Iterable[Tuple[str, Any]]) -> str:
    """The query that the fields of a GET make; what is no string stands there as JSON."""
    pairs = []
    for name, value in fields:
        if not isinstance(value, str):
            value = compact_json(value)
        pairs.append((name, value))
    return urllib.parse.urlencode(pairs, errors="replace")


def read_input(ctx: Context, source: str) -> Json:
    """The JSON object in a file, or on stdin for ``-``."""
    path = source
    if source == "-":
        path = ""
    data = read_source(ctx, path, MAX_BODY + 1, f"api: --input {source}")
    if len(data) > MAX_BODY:
        raise UsageError(f"api: --input {source} is larger than {MAX_BODY >> 20} MiB")
    body = None
    with contextlib.suppress(ValueError):
        body = parse_json(data.decode("utf-8-sig"))
    if not isinstance(body, dict):
        raise UsageError(f"api: --input {source} is not a JSON object")
    return body


class ApiCall(NamedTuple):
    """One request of ``mogplex api``."""

    method: str
    path: str  # what follows API_PATH
    query: str
    body: Optional[Json] = None
    key: str = ""


def api_method(words: Sequence[str], has_body: bool) -> str:
    """The method that is given before the path, or the one that is meant."""
    if len(words) == 1:
        return "POST" if has_body else "GET"
    method = words[0].upper()
    if method not in API_METHODS:
        known = ", ".join(API_METHODS)
        raise UsageError(f"api: the method is one of {known}, not '{words[0]}'")
    return method


def api_target(text: str) -> Tuple[str, str]:
    """The path below the API, and the query, that the argument PATH names."""
    target = API_TARGET.match(text)
    try:
        if not target:
            raise UsageError("no path")
        return checked_path("/" + target["path"]), target["query"] or ""
    except UsageError:
        raise UsageError(
            f"api: invalid path '{text}'",
            hint=f"PATH is below {API_PATH}, such as runs/ID; percent-encode what is special",
        ) from None


def api_key(method: str, given: Optional[str]) -> str:
    """The idempotency key of a request: a random one for a POST if none is given."""
    if given is None:
        return random_key() if method == "POST" else ""
    if method == "GET":
        raise UsageError("api: a GET has no --idempotency-key")
    key = checked_key(given)
    # Sent as it is, it would be the same in each job.
    if key == "ci" or key.startswith("ci:"):
        raise UsageError("api: --idempotency-key ci is for `mogplex run` alone")
    return key


def api_call(
    ctx: Context,
    words: Sequence[str],
    fields: Sequence[Tuple[str, Any]],
    source: str,
    key: Optional[str],
) -> ApiCall:
    """The request that the command line describes; ``source`` is what --input names."""
    if fields and source:
        raise UsageError(
            "api: the body is made of --field or read by --input, not both"
        )
    method = api_method(words, bool(fields or source))
    path, query = api_target(words[-1])
    key = api_key(method, key)
    if method == "GET":
        if source:
            raise UsageError("api: a GET has no --input")
        queries = filter(None, [query, query_of_fields(fields)])
        return ApiCall(method, path, "&".join(queries))
    body = None
    if source:
        body = read_input(ctx, source)
    elif fields:
        body = body_of_fields(fields)
    return ApiCall(method, path, query, body, key)


def hide_configs(data: Any) -> None:
    """Put ``"[hidden]"`` in the place of each config in ``data``."""
    pending = [data]
    while pending:  # not recursive: the service decides how deep it is
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        if isinstance(value, dict):
            for name in value:
                if name.lower() == "config":
                    value[name] = "[hidden]"
            pending.extend(value.values())


def api_advice(call: ApiCall) -> str:
    """What to do where the request may have been carried out, though it failed; "" for nothing."""
    if honours_key(call.method, call.path):
        return (
            "the request may have been carried out: to find out without doing it twice, "
            f"repeat it with --idempotency-key {call.key}"
        )
    if call.method in ("POST", "PATCH"):
        key = f" (its idempotency key: {call.key})" if call.key else ""
        return (
            f"the request may have been carried out: look before you send it again{key}"
        )
    return ""


def shown_answer(call: ApiCall, answer: Json, whole: bool) -> object:
    """What is printed of an answer: its data, or the whole, in which nothing is hidden."""
    if whole:
        return answer
    data = answer["data"]
    # Live secrets stand in the configs of MCP servers.
    if call.path.lower().startswith("/mcp"):
        hide_configs(data)
    return data


def send_api(ctx: Context, client: Client, call: ApiCall, whole: bool) -> None:
    """Send a request and print its answer. A start is written down first, as by ``run``."""
    answer: Json = {}

    def send() -> Run:
        answer.update(
            client.envelope(
                call.method,
                call.path,
                query=call.query,
                body=call.body,
                idempotency_key=call.key,
            )
        )
        return cast(Run, dict_of(answer, "data"))

    def announce(_: Run) -> None:
        ctx.emit(ctx.json_line(shown_answer(call, answer, whole)))

    # It costs money, and must not be lost.
    if call.method == "POST" and call.path == "/runs":
        start_recorded(
            client, ctx.home, call.body or {}, call.key, "", announce, send=send
        )
    else:
        announce(send())


def cmd_api(
    ctx: Context,
    *words: str,
    field: Sequence[Tuple[str, Any]] = (),
    input: str = "",
    idempotency_key: Optional[str] = None,
    envelope: bool = False,
) -> int:
    """Send any request, and show the data of its answer."""
    call = api_call(ctx, words, field, input, idempotency_key)
    with ctx.client() as client:
        try:
            send_api(ctx, client, call, envelope)
        except (MogplexError, KeyboardInterrupt) as error:
            advice = api_advice(call)
            if advice and getattr(error, "delivered", True):
                ctx.note(advice)
            raise
    return Exit.OK


def is_in_ci(environ: Mapping[str, str]) -> bool:
    """Whether this is a CI job, by the variable that GitHub, GitLab and nearly all others set."""
    value = environ.get("CI", "").lower()
    return value not in ("", "0", "false")


def forwarding_hint(environ: Mapping[str, str], port: str) -> str:
    """How the browser of a person who works in a container reaches a port of it."""
    way = "in your editor's Ports view"
    if environ.get("CODESPACES"):
        way = f"with `gh codespace ports forward {port}:{port}` on your own machine"
    return (
        f"your browser needs this container's port {port} as its own 127.0.0.1:{port}: forward it "
        f"{way}, or use `mogplex login --with-token`"
    )


def browser_entry(
    ctx: Context, client: Client, no_browser: bool, timeout_s: float
) -> Json:
    """Sign in through the browser of this machine, or whichever one the URL is taken to."""
    is_remote = bool(ctx.environ.get("SSH_CONNECTION") or ctx.environ.get("SSH_TTY"))

    def announce(url: str) -> None:
        ctx.note(f"to sign in to {ctx.base_url}, open this page:")
        ctx.note(url)
        port = url.partition("127.0.0.1%3A")[2][:5]
        if any(map(ctx.environ.get, CONTAINER_VARIABLES)):
            ctx.note(forwarding_hint(ctx.environ, port))
        elif no_browser or is_remote:
            forward = f"ssh -L {port}:127.0.0.1:{port} <this host>"
            tokens = f"{ctx.base_url}/settings/api-keys"
            ctx.note(
                f"if your browser is on another machine, first run this there: {forward}"
            )
            ctx.note(f"or pass a token from {tokens} to `mogplex login --with-token`")
        ctx.note(
            f"waiting for up to {format_duration(timeout_s)}; press Ctrl+C to stop"
        )

    def open_page(url: str) -> None:
        if not ctx.browse(url):
            ctx.note("no browser could be started here; open the page in one yourself")

    browser: Optional[Callable[[str], object]] = open_page
    if no_browser or (is_remote and not ctx.in_demo):
        browser = None
    return sign_in(
        ctx.base_url,
        client.post_form,
        announce=announce,
        open_browser=browser,
        timeout_s=timeout_s,
    )


def read_token(ctx: Context) -> str:
    """A token from stdin, or from a prompt that does not show it; UsageError for none."""
    token = ""
    with contextlib.suppress(OSError, EOFError, ValueError, AttributeError):
        if is_terminal(ctx.stdin):
            import getpass

            token = getpass.getpass("token: ", ctx.stderr).strip()
        else:
            token = ctx.stdin.read(65536).strip()
    if not token:
        hint = f"create one at {ctx.base_url}/settings/api-keys"
        raise UsageError("login --with-token: no token on stdin", hint=hint)
    return token


def token_entry(ctx: Context) -> Json:
    """What to store of a token that is read from stdin and that the service accepts."""
    credential = Credential(check_token(read_token(ctx), "login --with-token"))
    with ctx.client(credential) as client:
        client.repos(limit=1)
    return {"token": credential.token, "base_url": ctx.base_url}


def cmd_login(
    ctx: Context,
    *,
    with_token: bool = False,
    no_browser: bool = False,
    timeout: float = LOGIN_TIMEOUT_S,
) -> int:
    """``login``: get a credential, in a browser or from stdin, and store it."""
    if with_token:
        entry = token_entry(ctx)
    elif is_in_ci(ctx.environ) and not no_browser and not ctx.in_demo:
        hint = "set MOGPLEX_API_KEY, or pipe a token to `mogplex login --with-token`"
        raise UsageError("login: there is no browser in a CI job", hint=hint)
    else:
        with ctx.client(Credential.anonymous()) as client:
            entry = browser_entry(ctx, client, no_browser, timeout)
    path = ctx.home.store_sign_in(entry)
    ctx.emit_record(
        {"service": ctx.base_url, "path": path}, f"signed in to {ctx.base_url}"
    )
    variable, _ = token_given(ctx.environ)
    if variable:
        ctx.note(f"{variable} is set and takes precedence over this sign-in")
    return Exit.OK


def overruled_sign_in(ctx: Context, credential: Credential) -> str:
    """The path of a stored sign-in that ``credential`` takes precedence over; "" for none."""
    if credential.source != "environment":
        return ""
    with contextlib.suppress(UnauthorizedError):
        if ctx.home.sign_in_for(ctx.base_url, unheard):
            return ctx.home.auth_path
    return ""


def credential_rows(
    ctx: Context, credential: Credential, state: str
) -> List[Tuple[str, str]]:
    """What ``login status`` tells of a credential: labels and values."""
    variable, _ = token_given(ctx.environ)
    kind = "sign-in"
    if credential.token.startswith("mog_"):
        kind = "personal access token"
    beginning = credential.token[:8]
    if len(credential.token) <= 16:
        beginning = ""  # it would be too much of it
    expires = ""
    if credential.expires_at:
        expires = time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(credential.expires_at)
        )
    return [
        ("service", ctx.base_url),
        ("source", variable or ctx.home.auth_path),
        ("hides", overruled_sign_in(ctx, credential)),
        ("kind", kind),
        ("token", beginning),
        ("expires", expires),
        ("state", state),
    ]


def cmd_login_status(ctx: Context) -> int:
    """``login status``: the credential in force, and the service's error when it refuses it."""
    credential = resolve_credential(ctx.environ, ctx.base_url, ctx.home)
    problem: Optional[MogplexError] = None
    state = "accepted"
    with ctx.client(credential) as client:
        try:
            client.repos(limit=1)
        except MogplexError as error:
            problem = error
            states = {401: "refused", 403: "accepted, without the scope read"}
            state = states.get(error.status, "unknown")
    rows = credential_rows(ctx, credential, state)
    ctx.emit_record({label: value or None for label, value in rows}, block(rows))
    if problem:
        raise problem
    return Exit.OK


def log_out(ctx: Context) -> bool:
    """Forget the stored sign-in, which nothing can revoke; whether there was one."""
    forgotten = ctx.home.forget_sign_in()
    variable, _ = token_given(ctx.environ)
    if variable:
        ctx.note(f"{variable} is set and still applies")
    return forgotten


def logout_text(forgotten: bool) -> str:
    """What ``log_out`` did, in words."""
    return "signed out" if forgotten else "not signed in"


def cmd_logout(ctx: Context) -> int:
    """``logout``."""
    forgotten = log_out(ctx)
    return ctx.emit_record({"forgotten": forgotten}, logout_text(forgotten))


# -- The tables: the parser, the help and the shell completions are made of them.


class Argument(NamedTuple):
    """What follows a command without a flag: a row of its help."""

    name: str  # RUN; [RUN] may be left out; [TASK...] is any number
    meaning: str
    number: Union[int, str]  # how many there are, as argparse spells it
    known: Tuple[str, ...] = ()  # the values that completions offer


class Option(NamedTuple):
    """An option of a command or of the program: a row of its help, and how its text is read."""

    flag: str
    value: str  # what its value is called; "" for a switch
    meaning: str
    # Makes the value that the command gets; UsageError.
    read: Callable[[str], Any] = str
    # The values that this version knows; others are passed on.
    known: Tuple[str, ...] = ()
    needs: str = ""  # the keyword of the one without which it has no effect
    repeats: bool = False  # it may be given again: the command gets a list
    may_be_empty: bool = True  # "", a script's unset variable, counts as not given

    @property
    def keyword(self) -> str:
        """What the command's function calls it, and argparse too."""
        return self.flag.lstrip("-").replace("-", "_")

    def parsed(self, text: str) -> Any:
        """The value that ``text`` stands for; "" stays what it is."""
        if not text and not self.repeats:
            return ""
        return self.read(text)


class Subcommand(NamedTuple):
    """A command: a row of SUBCOMMANDS, under its name."""

    # Called with the Context, the arguments, the options as keywords.
    function: Callable[..., int]
    purpose: str
    examples: Tuple[str, str]
    arguments: Tuple[Argument, ...] = ()
    options: Tuple[Option, ...] = ()


def read_limit(text: str) -> int:
    """The value of --limit."""
    is_number = re.match(r"[0-9]{1,9}\Z", text)
    if not is_number or not 1 <= int(text) <= MAX_LIMIT:
        raise UsageError(
            f"--limit takes a whole number from 1 to {MAX_LIMIT}, not '{text}'"
        )
    return int(text)


RUN_ARGUMENT = Argument("RUN", "run ID; @last is the newest run started here", 1)
OPTIONAL_RUN_ARGUMENT = Argument(
    "[RUN]",
    "run ID; @last is the newest run started here (default: MOGPLEX_RUN_ID, then @last)",
    "?",
)
RUNS_ARGUMENT = Argument(
    "[RUN...]",
    "run IDs, of one run or of several at once; - reads them from stdin, one a line; @last is the "
    "newest run started here (default: MOGPLEX_RUN_ID, then @last)",
    "*",
)
SANDBOX_ARGUMENT = Argument(
    "SANDBOX", "sandbox ID, as listed, or the provider's, sbx_...", 1
)
TASK_ARGUMENT = Argument(
    "[TASK...]", "what the agent is to do; - reads it from stdin", "*"
)

LIMIT_OPTION = Option(
    "--limit",
    "N",
    f"list at most N, 1 to {MAX_LIMIT} (default: {MAX_LIMIT})",
    read_limit,
)
# The options of every list; each of LIST_FORMATS is a switch.
LIST_OPTIONS = (LIMIT_OPTION,)
# fmt: off
FOLLOW_OPTIONS = (
    Option("--follow", "", "print events as they come, until the run ends"),
    Option("--timeout", "TIME",
           "stop following after TIME: seconds, or 90s, 30m, 2h (default: 30m)",
           parse_duration, needs="follow"),
    Option("--quiet", "", "print no progress lines on stderr", needs="follow"),
    Option("--cancel-on-interrupt", "", "cancel the run on Ctrl+C, SIGTERM or SIGHUP",
           needs="follow"),
)
# fmt: on
DOTENV_OPTION = Option(
    "--dotenv",
    "FILE",
    "write the run's ID, status, branch and pull request to FILE, for GitLab CI",
)
GLOBAL_OPTIONS = (  # before a command or after it
    Option("--demo", "", "use a built-in demo service: no account, no network"),
    Option("--debug", "", "print a line per request on stderr"),
    Option("--no-color", "", "print no colour"),
)
HELP_OPTION = Option("--help", "", "show this help (also -h)")
# fmt: off
COMMON_OPTIONS = (  # of every command
    Option("--json", "", "print JSON, one object per line"),
    Option("--get", "PATH",
           "print only the value at PATH, such as runId or branch.working, of each object",
           read_path, may_be_empty=False),
    *GLOBAL_OPTIONS,
    HELP_OPTION,
)
# fmt: on
PROGRAM_OPTIONS = (  # without a command
    Option(
        "--demo-server", "[PORT]", "keep the demo service running for your own scripts"
    ),
    Option("--attach", "RUN", "open the cockpit on a run started elsewhere"),
    Option("--logout", "", "forget the stored sign-in before anything else"),
    *GLOBAL_OPTIONS,
    Option("--version", "", "print the version"),
    HELP_OPTION,
)

PURPOSE = """\
Start, follow, inspect and stop cloud coding-agent runs.
Without a command, on a terminal: the cockpit."""
SANDBOX_WORDS = ", ".join(SANDBOX_STATUSES)

# fmt: off
SUBCOMMANDS = {
    "repos list": Subcommand(
        cmd_repos_list, "List your cloud-linked repos.",
        ("repos list --query acme", "repos list --json | jq -r .id"),
        options=(
            Option("--query", "TEXT", "list only repos with TEXT in their name (default: all)"),
            *LIST_OPTIONS,
        ),
    ),
    "run": Subcommand(
        cmd_run, "Start an agent run.",
        ('run --repo acme/web "Fix the flaky cookie test"',
         "run --repo acme/web --follow - < task.md"),
        (TASK_ARGUMENT,),
        (
            Option("--repo", "REPO",
                   "run in this repo: an ID, owner/name, or . for this checkout's origin "
                   "(default: MOGPLEX_REPO)"),
            Option("--harness", "NAME",
                   f"agent program: {HARNESS_NAMES} (default: the service's)",
                   known=tuple(HARNESSES)),
            Option("--base-branch", "NAME", "start from this branch (default: the repo's)"),
            Option("--branch", "NAME", "work on this branch (default: the service's choice)"),
            Option("--create-branch", "", "create the working branch"),
            Option("--root", "DIR", "work in this directory of the repo (default: the repo's)"),
            Option("--idempotency-key", "KEY",
                   "start one run per KEY, however often it is used; "
                   "ci derives one from the CI job, ci:LABEL for a leg of a matrix "
                   "(default: random)",
                   may_be_empty=False),
            Option("--prompt-file", "FILE", "read the task from FILE"),
            *FOLLOW_OPTIONS,
            DOTENV_OPTION,
        ),
    ),
    "runs list": Subcommand(
        cmd_runs_list, "List the runs started from here, newest first.",
        ("runs list", "runs list --limit 1 --json | jq -r .id"),
        options=LIST_OPTIONS,
    ),
    "runs get": Subcommand(
        cmd_runs_get, "Get a run's current state.",
        ("runs get @last", "runs get --json | jq -r .status"),
        (OPTIONAL_RUN_ARGUMENT,),
    ),
    "runs events": Subcommand(
        cmd_runs_events, "List or follow the events of a run, or of several.",
        ("runs events @last --follow", 'runs events "$A" "$B" --follow --timeout 30m --json'),
        (RUNS_ARGUMENT,),
        (LIMIT_OPTION, *FOLLOW_OPTIONS, DOTENV_OPTION._replace(needs="follow")),
    ),
    "runs cancel": Subcommand(
        cmd_runs_cancel, "Request cancellation of a run.",
        ("runs cancel @last", 'runs cancel "$RUN_ID" --json'),
        (RUN_ARGUMENT,),
    ),
    "sandboxes list": Subcommand(
        cmd_sandboxes_list, "List cloud sandboxes, newest activity first.",
        ("sandboxes list --status running", "sandboxes list --repo acme/web --json"),
        options=(
            Option("--repo", "REPO",
                   "list only sandboxes of this repo: an ID, owner/name, or . for this "
                   "checkout's origin (default: all)"),
            Option("--status", "STATUS",
                   f"list only those with this status: {SANDBOX_WORDS} (default: all)",
                   known=tuple(SANDBOX_STATUSES)),
            *LIST_OPTIONS,
        ),
    ),
    "sandboxes logs": Subcommand(
        cmd_sandboxes_logs, "Print a sandbox's logs.",
        ('sandboxes logs "$ID"', 'sandboxes logs "$ID" --json | jq .lifecycle_events'),
        (SANDBOX_ARGUMENT,),
    ),
    "sandboxes stop": Subcommand(
        cmd_sandboxes_stop, "Stop a sandbox, once the API offers it.",
        ('sandboxes stop "$ID"', 'sandboxes stop "$ID" --json'),
        (SANDBOX_ARGUMENT,),
    ),
    "api": Subcommand(
        cmd_api, "Send any request to the API; print its data as JSON.",
        ("api automations --get automations.0.id",
         'api automations/"$ID"/trigger --field repoId="$REPO_ID"'),
        (
            Argument("[METHOD]",
                     "GET, POST, PUT, PATCH or DELETE (default: GET, or POST with a body)", "?"),
            Argument("PATH", f"below {API_PATH}, with its query if any", 1),
        ),
        (
            Option("--field", "NAME=VALUE",
                   "add a string to the JSON body, or to the query of a GET; NAME:=JSON "
                   "for other types; may be given again",
                   read_field, repeats=True),
            Option("--input", "FILE", "read the JSON body from FILE; - is stdin",
                   may_be_empty=False),
            Option("--idempotency-key", "KEY",
                   "send this key with a POST (default: random); it makes a repeat safe for "
                   "/runs and /automations/ID/trigger alone",
                   may_be_empty=False),
            Option("--envelope", "",
                   "print the whole answer, unchanged, with the configs of MCP servers"),
        ),
    ),
    "login": Subcommand(
        cmd_login, "Sign in with a browser; in CI set MOGPLEX_API_KEY instead.",
        ("login", "login --with-token < token.txt"),
        options=(
            Option("--with-token", "",
                   "read a token from stdin, or ask for it, instead of opening a browser"),
            Option("--no-browser", "", "print the address to open, and open nothing"),
            Option("--timeout", "TIME",
                   "wait this long for the browser: seconds, or 90s, 5m (default: 5m)",
                   parse_duration),
        ),
    ),
    "login status": Subcommand(
        cmd_login_status, "Show the credential in force and whether it is accepted.",
        ("login status", "login status --json | jq -r .expires"),
    ),
    "logout": Subcommand(
        cmd_logout, "Forget the stored sign-in.",
        ("logout", "logout --json"),
    ),
}
# fmt: on


def below(name: str) -> Dict[str, Subcommand]:
    """The commands of a group; all of them for ""."""
    if not name:
        return SUBCOMMANDS
    return {
        other: row for other, row in SUBCOMMANDS.items() if other.startswith(name + " ")
    }


def command_row(name: str) -> Subcommand:
    """The row of a command, with the options that all have.

    That of a group, such as ``runs``, or of the program (""), is made of its first command's.
    """
    if name in SUBCOMMANDS:
        row = SUBCOMMANDS[name]
        return row._replace(options=(*row.options, *COMMON_OPTIONS))
    first = next(iter(below(name).values()))
    if name:
        return first._replace(
            purpose=f"Commands of mogplex {name}.", arguments=(), options=()
        )
    return first._replace(purpose=PURPOSE, arguments=(), options=PROGRAM_OPTIONS)


def flags_of(name: str) -> List[str]:
    """The flags of the options of a command or of the program ("")."""
    return [option.flag for option in command_row(name).options]


# -- The parser


def see_help(name: str) -> str:
    """The hint that names the help of a command, a group, or the program ("")."""
    return " ".join(["see: mogplex", *name.split(), "--help"])


def unknown(what: str, word: str, known: Iterable[str], name: str = "") -> UsageError:
    """The error for a word that is not known, with the nearest that is, and the help to read."""
    near = nearest(word, known)
    message = f"{what} '{word}'"
    if near:
        message += f", did you mean '{near}'?"
    return UsageError(message, hint=see_help(name))


def slip_of(word: str, known: Sequence[str]) -> str:
    """The known word that ``word`` is a slip or the beginning of; "" for what may be a newer word.

    Stricter than a suggestion has to be: this refuses, and what it lets pass the service checks.
    """
    import difflib

    lowered = word.lower()
    for other in known:
        likeness = difflib.SequenceMatcher(None, lowered, other).ratio()
        if likeness >= 0.8 or other.startswith(lowered):
            return other
    return ""


class CommandParser(argparse.ArgumentParser):
    """The arguments and options of a command or of the program ("").

    Its errors are UsageErrors that suggest an option or name the help.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # the defaults are the command's function's
            **settings,
        )
        self.command = command
        row = command_row(command)
        for argument in row.arguments:
            self.add_argument(
                argument.name,
                metavar=argument.name.strip("[.]"),
                nargs=argument.number,
                choices=argument.known,
                help=argument.meaning,
            )
        for option in row.options:
            if option.value:
                self.add_argument(
                    option.flag,
                    action="append" if option.repeats else "store",
                    metavar=option.value,
                    type=option.parsed,
                    choices=option.known,
                    help=option.meaning,
                )
            elif option is not HELP_OPTION:  # argparse has its own, where it is wanted
                self.add_argument(option.flag, action="store_true", help=option.meaning)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse none: the choices are what completions offer."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls with its message."""
        stray = re.search(r"unrecognized arguments: (--?[^ =]+)", message)
        if stray:
            flags = flags_of(self.command)
            raise unknown(
                f"{self.command}: unknown option", stray.group(1), flags, self.command
            )
        raise UsageError(f"{self.command}: {message}", hint=see_help(self.command))


def pass_on(ctx: Context, parser: CommandParser, option: Option, value: str) -> None:
    """Refuse a slip; say that any other unknown value is sent: the service may be newer than we."""
    meant = slip_of(value, option.known)
    if meant:
        parser.error(f"unknown {option.flag} '{value}', did you mean '{meant}'?")
    ctx.note(
        f"mogplex {__version__} does not know {option.flag} {value}; passing it on"
    )


def check_options(ctx: Context, parser: CommandParser, values: Json) -> None:
    """Drop the empty ``values``; refuse those that may not be, have no effect, or are slips."""
    for option in command_row(parser.command).options:
        if option.keyword not in values:
            continue
        value = values[option.keyword]
        if value == "":
            if not option.may_be_empty:
                parser.error(f"{option.flag} is empty")
            del values[option.keyword]
        elif option.needs and option.needs not in values:
            parser.error(f"{option.flag} needs --{option.needs}")
        elif option.known and value not in option.known:
            pass_on(ctx, parser, option, value)


def split_at_dashes(argv: List[str]) -> Tuple[List[str], List[str]]:
    """``argv`` before the first ``--``, where options count, and from there on."""
    if "--" not in argv:
        return argv, []
    index = argv.index("--")
    return argv[:index], argv[index:]


def parse_command(ctx: Context, name: str, argv: List[str]) -> Tuple[List[str], Json]:
    """A command's arguments, and its options as keywords; ``--`` begins what is all task."""
    parser = CommandParser(name, add_help=False)
    arguments = command_row(name).arguments
    before, after = split_at_dashes(argv)
    verbatim = after[1:]
    if verbatim and TASK_ARGUMENT not in arguments:
        parser.error("nothing can follow --")
    values = vars(parser.parse_intermixed_args(before))
    words: List[str] = []
    for argument in arguments:
        found = values.pop(argument.name, [])
        if isinstance(found, str):
            found = [found]
        words.extend(found)
    check_options(ctx, parser, values)
    return [*words, *verbatim], values


# -- Help

EXIT_CODES = {  # and a word on each, and what more there is to say
    "0 success": "of the run too, with --follow",
    "1 failure": "also a run that failed or was cancelled, or --timeout",
    "2 usage": "bad arguments, an unknown subcommand",
    "64 unauthorized": "no token, or one that the service refuses (401)",
    "65 forbidden": "the token lacks the scope (403)",
    "69 unavailable": "the service is down (503), or there was no answer",
    "75 rate limited": "the service asks to try again later (429)",
    "129 SIGHUP": "the terminal was closed",
    "130 SIGINT": "Ctrl+C",
    "141 closed pipe": "the reader of the output left",
    "143 SIGTERM": "something asked the program to end",
}
ENVIRONMENT = {  # what the program reads of it
    "MOGPLEX_API_KEY": "the token; takes precedence over a stored sign-in",
    "MOGPLEX_URL": f"the service's base URL, https (default: {DEFAULT_URL})",
    "MOGPLEX_HOME": "the directory of auth.json and runs.jsonl (default: ~/.mogplex)",
    "MOGPLEX_REPO": "the repo of run without --repo, and of the cockpit",
    "MOGPLEX_RUN_ID": "the run of runs get and runs events without an ID",
    "MOGPLEX_ATTACH_RUN_ID": "the run that the cockpit opens on",
    "MOGPLEX_NO_HISTORY": "1: do not remember runs",
    "MOGPLEX_DEBUG": "1: same as --debug",
    "MOGPLEX_DEV": "1: allow http:// to localhost, 127.0.0.1 and [::1]",
    "NODE_ENV": "production: MOGPLEX_DEV does not allow it",
    "NO_COLOR": "print no colour",
    "FORCE_COLOR": "print colour even where stdout is not a terminal",
    "HTTPS_PROXY": "the proxy",
    "NO_PROXY": "the hosts reached without it; this machine always is",
    "REQUESTS_CA_BUNDLE": "the certificates to trust, a file or directory; before the next ones",
    "CURL_CA_BUNDLE": "the same",
    "SSL_CERT_FILE": "the same",
    "SSL_CERT_DIR": "the same",
}


def help_block(title: str, rows: Iterable[Tuple[str, str]], width: int = 23) -> str:
    """A part of the help: its title, and rows wrapped at 80 columns; "" where there are none."""
    import textwrap

    lines = []
    for what, meaning in rows:
        indent = " " * (width + 3)
        beginning = f"  {what:<{width}} "
        lines.append(
            textwrap.fill(
                meaning, 80, initial_indent=beginning, subsequent_indent=indent
            )
        )
    if not lines:
        return ""
    return "\n".join([f"{title}:", *lines])


def exit_codes_summary() -> str:
    """A word on each exit code, wrapped at 80 columns: the end of every help."""
    import textwrap

    # Each stays on one line.
    codes = ", ".join(code.replace(" ", "\xa0") for code in EXIT_CODES)
    text = textwrap.fill(f"exit codes: {codes}", 80, subsequent_indent=" " * 12)
    return text.replace("\xa0", " ")


def help_text(name: str) -> str:
    """The help of a command, of a group of commands such as ``runs``, or of the program ("")."""
    row = command_row(name)
    usage = ["usage: mogplex", *name.split()]
    commands: List[Tuple[str, str]] = []
    if name not in SUBCOMMANDS:
        usage.append("<command>")
        commands = [(other, command.purpose) for other, command in below(name).items()]
    usage.append("[options]")
    usage.extend(argument.name for argument in row.arguments)
    examples = [f"  mogplex {line}" for line in row.examples]
    parts = [
        " ".join(usage),
        row.purpose,
        help_block("commands", commands, 18),
        help_block("arguments", [(one.name, one.meaning) for one in row.arguments]),
        help_block(
            "options", [(f"{one.flag} {one.value}", one.meaning) for one in row.options]
        ),
        "\n".join(["examples:", *examples]),
        exit_codes_summary(),
    ]
    return "\n\n".join(filter(None, parts))


HELP_TOPICS = {"environment": ENVIRONMENT, "exit-codes": EXIT_CODES}


def cmd_help(ctx: Context, *words: str) -> int:
    """``help``: the help of the program, of a command or group of commands, or on a topic."""
    name = " ".join(words)
    known = [*GROUPS, *SUBCOMMANDS, *HELP_TOPICS]
    if name and name not in known:
        raise unknown("help: unknown command", name, known, "help")
    if name in HELP_TOPICS:
        text = help_block(name.replace("-", " "), HELP_TOPICS[name].items())
    else:
        text = help_text(name)
    return ctx.emit_record({"help": name, "text": text}, text)


# -- Completions

COMPLETION_PLACES = {  # shell: what stands at the head of its script
    "bash": """\
# mkdir -p ~/.local/share/bash-completion/completions
# mogplex completion bash > ~/.local/share/bash-completion/completions/mogplex
""",
    "zsh": """\
# mkdir -p ~/.zfunc
# mogplex completion zsh > ~/.zfunc/_mogplex
# In ~/.zshrc, above compinit: fpath+=(~/.zfunc)
""",
    "fish": """\
# mkdir -p ~/.config/fish/completions
# mogplex completion fish > ~/.config/fish/completions/mogplex.fish
""",
}
SHELLS = tuple(COMPLETION_PLACES)


def make_parser() -> argparse.ArgumentParser:
    """Every command in one parser, for tools that generate shell completions; it parses nothing."""
    root = CommandParser("", prog="mogplex")
    parsers = {"": root}
    groups: Dict[str, Any] = {}
    for name in dict.fromkeys((*GROUPS, *SUBCOMMANDS)):
        group, _, word = name.rpartition(" ")
        if group not in groups:
            groups[group] = parsers[group].add_subparsers()
        purpose = command_row(name).purpose  # without one, completions omit the word
        parsers[name] = groups[group].add_parser(word, command=name, help=purpose)
    return root


def completion_script(shell: str) -> str:
    """The completions for a shell, with the place to put them; MogplexError without shtab."""
    try:
        import shtab
    except ImportError:
        install = "python3 -m pip install shtab"
        raise MogplexError(f"completion needs the package 'shtab': {install}") from None
    if shell not in shtab.SUPPORTED_SHELLS:  # fish, before its 1.9
        hint = "upgrade it: python3 -m pip install --upgrade shtab, with Python 3.9 or newer"
        raise MogplexError(
            f"shtab {shtab.__version__} makes no script for {shell}", hint=hint
        )
    script = shtab.complete(make_parser(), shell).rstrip("\n")
    tag, newline, rest = script.partition("\n")
    if tag.startswith("#compdef"):  # zsh reads it in the first line alone
        return f"{tag}{newline}{COMPLETION_PLACES[shell]}{rest}"
    return f"{COMPLETION_PLACES[shell]}\n{script}"


def cmd_completion(ctx: Context, shell: str) -> int:
    """``completion``: the script for a shell."""
    if shell not in SHELLS:
        raise unknown("completion: unknown shell", shell, SHELLS, "completion")
    script = completion_script(shell)
    return ctx.emit_record({"shell": shell, "script": script}, script)


SUBCOMMANDS.update(
    {  # only here, for they speak of all the others
        "help": Subcommand(
            cmd_help,
            "Show the help of a command, or on: environment, exit-codes.",
            ("help runs events", "help environment"),
            (
                Argument(
                    "[COMMAND...]",
                    "a command, or environment or exit-codes (default: mogplex)",
                    "*",
                    (*GROUPS, *HELP_TOPICS),
                ),
            ),
        ),
        "completion": Subcommand(
            cmd_completion,
            "Print a script with which a shell completes commands.",
            ("completion bash", "completion zsh > ~/.zfunc/_mogplex"),
            (
                Argument(
                    "SHELL",
                    "bash, zsh or fish; the script says where to put it",
                    1,
                    SHELLS,
                ),
            ),
        ),
    }
)


# -- The command line


def demo_port(argv: List[str]) -> int:
    """The port that follows --demo-server; 0, for any free one, where none does; UsageError."""
    if not argv:
        return 0
    if (
        len(argv) > 1
        or not re.match(r"0*[1-9][0-9]{0,4}\Z", argv[0])
        or int(argv[0]) > 65535
    ):
        raise UsageError(
            "--demo-server takes one port, 1 to 65535, or none for a free one"
        )
    return int(argv[0])


def serve_demo(ctx: Context, argv: List[str]) -> int:
    """``mogplex --demo-server [PORT]``: keep a demo service running until a signal ends it."""
    with demo_environment(demo_port(argv)) as (_, variables):
        for name, value in variables.items():
            ctx.emit(f"export {name}={value}")
        ctx.emit("unset NODE_ENV")
        paste = "paste the lines above into another shell"
        ctx.note(f"demo service running; {paste}; press Ctrl+C to stop")
        while True:
            time.sleep(3600)


def needs_terminal(word: str) -> UsageError:
    """Why the cockpit does not open without a terminal; ``word`` may be a subcommand misspelt."""
    if word:
        return unknown("unknown subcommand", word, GROUPS)
    hint = "`mogplex --help` lists the commands that need none"
    return UsageError("the cockpit needs a terminal", hint=hint)


def stray_option(flag: str) -> UsageError:
    """The error for an option before a command that is none of the program's."""
    for name in SUBCOMMANDS:
        if flag in flags_of(name):
            return UsageError(f"{flag} goes after the subcommand", hint=see_help(""))
    return unknown("unknown option", flag, flags_of(""))


def open_cockpit(ctx: Context, argv: List[str]) -> int:
    """Anything that is no subcommand is the cockpit's, and that needs a terminal."""
    attach = ctx.environ.get("MOGPLEX_ATTACH_RUN_ID", "").strip()
    words = argv
    if argv[:1] == ["--attach"]:
        attach = "".join(argv[1:2]).strip()
        words = argv[2:]
        if not attach:
            raise UsageError("--attach needs a run ID or @last")
    first = "".join(words[:1])
    if first == "--":
        first = ""
        words = words[1:]
    if first.startswith("-"):
        raise stray_option(first)
    if not ctx.on_terminal:
        raise needs_terminal(first)
    repo = repo_meant(ctx, ctx.environ.get("MOGPLEX_REPO", "").strip())
    return run_cockpit(
        ctx.client,
        base_url=ctx.base_url,
        home=ctx.home,
        environ={**ctx.environ, "MOGPLEX_REPO": repo},
        text=" ".join(words),
        attach=attach,
        run_browser=ctx.browse,
    )


def asks_for_help(argv: List[str]) -> bool:
    """Whether -h or --help stands among the options."""
    before, _ = split_at_dashes(argv)
    return "-h" in before or "--help" in before


def command_named(argv: List[str]) -> str:
    """The command, or else the group of commands, that ``argv`` begins with."""
    name = " ".join(argv[:2])
    if name in SUBCOMMANDS:
        return name
    return argv[0]


def check_verb(name: str, rest: List[str]) -> None:
    """Refuse a group without one of its verbs, and a word after ``name`` that is none of them."""
    verbs = [other.split()[1] for other in below(name)]
    has_word = bool(rest) and not rest[0].startswith("-")
    if verbs and has_word:
        raise unknown(f"{name}: unknown subcommand", rest[0], verbs, name)
    if name not in SUBCOMMANDS:
        needed = ", ".join(verbs)
        raise UsageError(f"{name} needs one of: {needed}", hint=see_help(name))


def take_format(options: Json) -> str:
    """The format of LIST_FORMATS that one of the ``options`` is named for, which is taken out."""
    for name in LIST_FORMATS:
        if options.pop(name, False):
            return name
    return "table"


def run_command(ctx: Context, argv: List[str]) -> int:
    """The command that ``argv`` begins with, or its help."""
    name = command_named(argv)
    if asks_for_help(argv):
        ctx.emit(help_text(name))
        return Exit.OK
    rest = argv[len(name.split()) :]
    check_verb(name, rest)
    words, options = parse_command(ctx, name, rest)
    ctx.list_format = take_format(options)
    ctx.get_path = options.pop("get", "")
    if ctx.get_path:
        ctx.list_format = "json"
    return SUBCOMMANDS[name].function(ctx, *words, **options)


def run(ctx: Context, argv: List[str]) -> int:
    """A command or the cockpit; ``--logout`` comes before either, or alone means ``logout``."""
    if argv[:1] == ["--logout"]:
        argv = argv[1:]
        shapes = "".join(argv[:1]).partition("=")[0] in ("--json", "--get")
        if shapes or not (argv or ctx.on_terminal):
            return run_command(ctx, ["logout", *argv])
        ctx.note(logout_text(log_out(ctx)))  # stdout is for what comes after it
    if argv and argv[0] in GROUPS:
        return run_command(ctx, argv)
    return open_cockpit(ctx, argv)


def with_demo(ctx: Context, argv: List[str]) -> int:
    """Run a command line with a demo service in place of the caller's service, token and files."""
    with demo_environment() as (server, variables):
        ctx.environ = {**without_ours(ctx.environ), "NODE_ENV": "", **variables}
        try:
            return run(ctx, argv)
        finally:
            if server.has_started_runs():
                ctx.note(
                    "this demo service and its runs end with the command; "
                    "use `mogplex --demo-server` to keep one running"
                )


def take_flags(ctx: Context, argv: List[str]) -> List[str]:
    """``argv`` without the global options, which take effect here."""
    before, after = split_at_dashes(argv)
    flags = [option.flag for option in GLOBAL_OPTIONS]
    ctx.in_demo = "--demo" in before
    if "--debug" in before:
        ctx.debug = True
    if "--no-color" in before:
        ctx.environ = {**ctx.environ, "NO_COLOR": "1"}
    return [word for word in before if word not in flags] + after


def dispatch(ctx: Context, argv: List[str]) -> int:
    """Answer the options that stand alone, or run the rest."""
    words = take_flags(ctx, argv)
    first = "".join(words[:1])
    if first == "--version":
        ctx.emit(f"mogplex {__version__}")
        return Exit.OK
    if first in ("-h", "--help"):
        ctx.emit(help_text(""))
        return Exit.OK
    if first == "--demo-server":
        return serve_demo(ctx, words[1:])
    if ctx.in_demo:
        return with_demo(ctx, words)
    return run(ctx, words)


def note_error(ctx: Context, error: MogplexError) -> None:
    """Say what went wrong, how long to wait, and what to do about it."""
    ctx.note(f"error: {error}")
    if error.retry_after_s:
        ctx.note(f"the service asks to wait {error.retry_after_s:.0f} s")
    hint = error.hint
    if not hint and error.status == 401:
        hint = "the token was refused: check MOGPLEX_API_KEY, or sign in with `mogplex login`"
    if hint:
        ctx.note(hint)


def rescue(ctx: Context, work: Callable[[], int]) -> int:
    """Run ``work``; what a user, a network or a server can do becomes one line and an exit code."""
    try:
        return int(work())
    except MogplexError as error:
        note_error(ctx, error)
        return int(error.exit)
    except BrokenPipeError:
        discard(ctx.stdout)
        return Exit.BROKEN_PIPE
    except Interrupted as interrupt:
        return interrupt.exit
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OSError as error:
        ctx.note(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        return Exit.FAILURE


def run_whole(argv: Sequence[str], is_process: bool) -> int:
    """A command line from its first to its last signal; the exit code."""
    ctx = Context(os.environ, sys.stdin, sys.stdout, sys.stderr)
    # Around the rescue, which a second must not end.
    with ctx.interrupts.handled(is_process):
        try:
            return rescue(ctx, functools.partial(dispatch, ctx, list(argv)))
        except Interrupted as interrupt:  # while it told of an error
            return interrupt.exit


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Keep the garbage collector from what lives as long as this process.

    It would walk all of that several times while modules load, and once more at the end: a
    sixth of the time that a short command takes.
    """
    gc.set_threshold(10_000)
    try:
        yield
    finally:
        gc.freeze()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line, of ``argv`` or of this process; the exit code."""
    if argv is not None:
        return run_whole(argv, is_process=False)
    with collected_rarely():
        return run_whole(sys.argv[1:], is_process=True)


if __name__ == "__main__":
    sys.exit(main())
