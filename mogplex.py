#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.25.1", "tabulate>=0.8", "blessed>=1.20"]
# ///
"""mogplex: start, follow, inspect and stop cloud coding-agent runs on Mogplex.

One file, two faces. ``mogplex repos|run|runs|sandboxes|login|logout`` is a headless
command for CI, scripts and dashboards; ``mogplex`` alone on a terminal is a cockpit.

The sections, each using only those above it:

  1 Errors     exit codes, and which error ends in which of them
  2 Values     pure functions: times, durations, hostile text, back-off
  3 Auth       credentials, sign-in and remembered runs: all files in the home directory
  4 Client     one method per route of the hosted API
  5 Tail       server-sent events, polling, de-duplication, the verdict on a run
  -            everything above this line can be copied out and used as a library
  6 Output     rows, tables, NDJSON, summaries: functions that return strings
  7 Cockpit    state, update, view, and the shell that owns the terminal
  8 Demo       an embedded stand-in for the service
  9 Commands   the parser, the commands and main()

Environment: MOGPLEX_API_KEY (token), MOGPLEX_URL (service), MOGPLEX_HOME (default
~/.mogplex), MOGPLEX_REPO, MOGPLEX_RUN_ID, MOGPLEX_ATTACH_RUN_ID, MOGPLEX_NO_HISTORY,
MOGPLEX_DEBUG, MOGPLEX_DEV with NODE_ENV (http:// to localhost), NO_COLOR, FORCE_COLOR.

Exit codes: 0 success, 1 failure, 2 usage, 64 unauthorized, 65 forbidden,
69 unavailable, 75 rate limited, 129 SIGHUP, 130 SIGINT, 141 closed pipe, 143 SIGTERM.

For embedders: what ``__all__`` lists is stable within a major version. It prints
nothing, never exits, and does not read ``os.environ``; every failure is a MogplexError.
"""
from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import sys
import time
from typing import (
    TYPE_CHECKING, Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
    Optional, Sequence, Tuple, Union,
)

__version__ = "1.0.0"
__all__ = [
    "Client", "Credential", "Exit", "ForbiddenError", "InvalidResponseError", "MogplexError",
    "Progress", "RateLimitedError", "SSEDecoder", "ServerSentEvent", "TailTimeout",
    "UnauthorizedError", "UnavailableError", "UsageError", "Verdict", "sanitize", "tail",
]

Json = Dict[str, Any]
DEFAULT_URL = "https://www.mogplex.com"
API_PATH = "/api/v1/mogplex"
HARNESSES = ("codex", "claude-code")
SANDBOX_STATUSES = ("creating", "installing", "running", "pausing", "paused", "stopped", "error")
TERMINAL_STATUSES = ("success", "failed", "cancelled")
MAX_LIMIT = 200  # the server lists no more of anything, and clamps silently

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
        self, message: str, *, code: str = "", status: int = 0, hint: str = "",
        retry_after_s: Optional[float] = None, delivered: bool = False, transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.status, self.hint = message, code, status, hint
        self.retry_after_s, self.delivered, self.transient = retry_after_s, delivered, transient

    def __str__(self) -> str:
        code = f"{self.code}: " if self.code else ""
        return f"{code}{self.message}" + (f" (HTTP {self.status})" if self.status else "")


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
    """No answer, or 501, 502, 503, 504 (exit 69)."""

    exit = Exit.UNAVAILABLE


class RateLimitedError(MogplexError):
    """429 (exit 75); ``retry_after_s`` is the wait that the service asks for."""

    exit = Exit.TEMPORARY


class InvalidResponseError(MogplexError):
    """An answer that is not the service's: HTML, a cut body, JSON without the envelope (exit 1)."""


class TailTimeout(MogplexError):
    """The time given to a tail is over and the run is not (exit 1)."""


def error_class(status: int) -> type[MogplexError]:
    """The error for an HTTP status; the exit code hangs on nothing else."""
    if status in (501, 502, 503, 504):
        return UnavailableError
    return {401: UnauthorizedError, 403: ForbiddenError, 429: RateLimitedError}.get(status, MogplexError)


# ---------------------------------------------------------------- 2. Values

# Strings (OSC, DCS, ...) only when terminated: an unterminated one would swallow the rest of
# the text. Every class stops at ESC and at C1, so that the search stays linear on any input.
_ESCAPES = re.compile(
    "(?:\x1b[\\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\\\|\x9c)"
    "|(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]?"
    "|\x1b[ -/]*[0-~]?"
)
_NEWLINES = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_CI_LINE_START = re.compile(r"(?m)^(\s*):(?=:)")
_CI_ANYWHERE = re.compile(r"(?i)##(?=\[|vso\[)")
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))?\s*(Z|z|[+-]\d\d(?::?\d\d)?)?\Z"
)
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


def sanitize(text: object, newline: str = " \u23ce ") -> str:
    """One harmless line of ``text``: no escape sequence, no control, no CI workflow command.

    Newlines become ``newline``. Taken out: ECMA-48 sequences, C0, C1, DEL, bidi and
    zero-width controls. ``::`` at a line's start and ``##[`` and ``##vso[`` anywhere,
    which CI runners obey, get a space inside.
    """
    line = text if isinstance(text, str) else "" if text is None else str(text)
    if not line.isascii() or not line.isprintable():
        line = _CONTROLS.sub("", _NEWLINES.sub("\n", _ESCAPES.sub("", line)).replace("\t", " "))
    if "::" in line:
        line = _CI_LINE_START.sub(r"\1: ", line)
    if "##" in line:
        line = _CI_ANYWHERE.sub("# #", line)
    return line.strip("\n").replace("\n", newline) if "\n" in line else line


def redact(text: str, *secrets: str) -> str:
    """``text`` without any of ``secrets`` in it."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text


def text_of(record: object, *keys: str) -> str:
    """The string or number at ``record[key][key]...``; "" for what is missing or of another type."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, (str, int, float)):
        return ""
    return str(record)


def dict_of(record: object, key: str) -> Json:
    """The object at ``record[key]``, or an empty one."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, dict) else {}


def dicts_of(record: object, key: str) -> List[Json]:
    """The objects in the list at ``record[key]``; anything else in it is passed over."""
    value = record.get(key) if isinstance(record, dict) else None
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def is_uuid(text: str) -> bool:
    """Whether ``text`` is spelled as a UUID, which all ids of the service are today."""
    return bool(_UUID.match(text))


def is_loopback(host: Optional[str]) -> bool:
    """Whether a URL's host is this machine, as the base-URL rules count it."""
    return host in ("localhost", "127.0.0.1", "::1")


def parse_base_url(text: str, allow_http: bool = False) -> str:
    """``text`` as the service's base URL, without a slash at its end; UsageError for one that may not be used.

    https only; http to this machine where ``allow_http``. A path prefix is kept.
    """
    import urllib.parse
    try:
        url = urllib.parse.urlsplit(text.strip())
        port = url.port  # a property that raises on nonsense
    except ValueError:
        url, port = urllib.parse.urlsplit(""), None
    problem = ""
    if url.scheme not in ("https", "http") or not url.hostname or port == 0:
        problem = "give an https:// URL"
    elif url.username is not None or url.password is not None or "?" in text or "#" in text:
        problem = "user info, a query and a fragment are not allowed"
    elif re.search(r"[^!-~]|[\\^`{|}<>\"]", text.strip()):
        problem = "it has characters that no URL has"
    elif url.scheme == "http" and not is_loopback(url.hostname):
        problem = "http:// is only for localhost, 127.0.0.1 and [::1]"
    elif url.scheme == "http" and not allow_http:
        problem = "http:// needs MOGPLEX_DEV=1 and NODE_ENV other than production"
    if problem:
        shown = re.sub(r"//[^/@]*@", "//***@", sanitize(text))
        raise UsageError(f"MOGPLEX_URL '{shown}' cannot be used: {problem}")
    return urllib.parse.urlunsplit((url.scheme, url.netloc.lower(), url.path, "", "")).rstrip("/")


def utf16_units(text: str) -> int:
    """The length of ``text`` as JavaScript counts it: what the service's limits are in."""
    return len(text) + sum(1 for char in text if char > "\uffff")


def parse_time(text: object) -> Optional[float]:
    """Seconds since the epoch of an ISO 8601 time as the service spells it; None when it is none.

    Not datetime.fromisoformat: before Python 3.11 it refuses ``Z`` and five-digit fractions.
    """
    match = _TIME.match(text) if isinstance(text, str) else None
    if not match:
        return None
    import datetime
    *numbers, fraction, zone = match.groups()
    try:
        moment = datetime.datetime(*map(int, numbers), tzinfo=datetime.timezone.utc)  # type: ignore
    except ValueError:
        return None
    offset_s = 0
    if zone and zone not in "Zz":
        digits = zone[1:].replace(":", "") + "00"
        offset_s = (int(digits[:2]) * 3600 + int(digits[2:4]) * 60) * (-1 if zone[0] == "-" else 1)
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)).total_seconds() \
        - offset_s + float(f"0.{fraction or 0}")


def format_time(value: object) -> str:
    """A time of the service in UTC with milliseconds and ``Z``; what is no time comes back sanitized."""
    seconds = parse_time(value)
    if seconds is None or not 0 <= seconds < 253402300800:
        return sanitize(value) if isinstance(value, str) else ""
    whole, milliseconds = divmod(int(seconds * 1000 + 4e-4), 1000)  # cut, not rounded up into the future
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milliseconds:03d}Z"


def parse_duration(text: str) -> float:
    """Seconds in ``600``, ``90s``, ``30m`` or ``2h``; UsageError for anything else."""
    match = re.match(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)\Z", text.strip())
    seconds = float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[match.group(2)] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"'{text}' is no duration: seconds, or a number with s, m or h, such as 90s or 30m")
    return seconds


def format_duration(seconds: float) -> str:
    """``8s``, ``2m 05s``, ``3h 10m`` or ``4d 2h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def format_age(seconds: float) -> str:
    """``8s``, ``2m``, ``3h`` or ``4d``: the largest unit alone."""
    return format_duration(seconds).split(" ")[0]


def backoff_s(failures: int, random: float, base_s: float = 0.5, cap_s: float = 15.0) -> float:
    """The wait after so many failures in a row (from 1): doubling from ``base_s``, with jitter."""
    return min(cap_s, base_s * 2.0 ** min(failures - 1, 10)) * (1 + random / 2)


def parse_retry_after(value: Optional[str], date: Optional[str]) -> Optional[float]:
    """Seconds asked for by a ``Retry-After`` header, None when it is missing or senseless.

    An HTTP-date is measured against the same answer's ``Date``: the two clocks can differ.
    """
    text = (value or "").strip()
    if re.match(r"\d{1,9}(\.\d{1,9})?\Z", text):
        return float(text)
    import email.utils
    try:
        then = email.utils.parsedate_to_datetime(text).timestamp()
        now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return max(0.0, then - now)


def text_width(text: str) -> int:
    """Terminal columns of ``text``: two for East Asian wide and emoji, none for combining marks."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def fit(text: str, width: int, ellipsis: str = "\u2026") -> str:
    """``text`` in at most ``width`` columns, with an ``ellipsis`` where something was left out."""
    if text_width(text) <= width:
        return text
    room, kept = width - text_width(ellipsis), ""
    for char in text:
        room -= text_width(char)
        if room < 0:
            break
        kept += char
    return (kept + ellipsis) if width >= text_width(ellipsis) else ""


# ---------------------------------------------------------------- 3. Auth

Warn = Callable[[str], None]
# POSTs a form to a URL of the service, answers (HTTP status, JSON object or {}); UnavailableError.
PostForm = Callable[[str, Dict[str, str]], Tuple[int, Json]]
TOKEN_PATH = "/api/auth/mcp/token"
_TOKEN_KEYS = ("token", "apiKey", "api_key", "accessToken", "access_token")
_OUR_KEYS = ("mogplex", "refresh_token", "expires_at", "base_url") + _TOKEN_KEYS


def home_directory(environ: Mapping[str, str]) -> str:
    """The absolute path of ``$MOGPLEX_HOME`` or ``~/.mogplex``; creates nothing."""
    user = environ.get("HOME") or os.path.expanduser("~")  # still "~" for a user whom nothing names
    default = os.path.join(user if os.path.isabs(user) else os.sep, ".mogplex")
    return os.path.abspath(os.path.expanduser(environ.get("MOGPLEX_HOME") or default))


def check_token(token: str, place: str) -> str:
    """``token`` if a header can carry it, else UnauthorizedError: names the ``place``, not the token."""
    if not re.match(r"[!-~]+\Z", token):
        raise UnauthorizedError(f"{place}: no token has such characters (controls, spaces, not ASCII)")
    return token


@contextlib.contextmanager
def _locked(path: str) -> Iterator[str]:
    """Keep other threads and processes out of ``path``; the value is why that cannot be done, or ""."""
    problem, descriptor = "", -1
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        else:
            import fcntl
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        problem = error.strerror or str(error)
    try:
        yield problem
    finally:
        if descriptor >= 0:
            os.close(descriptor)  # which lets go of the lock


def _replace_file(path: str, text: str, problem: str) -> None:
    """Write so that a process killed at any instant leaves the old file or the new; MogplexError.

    For use under ``_locked``, whose value ``problem`` is. So the temporary name can be fixed:
    what a killed process left there, tokens in it, is taken away by the next one.
    """
    if problem or os.path.islink(path) or os.path.isdir(path):
        problem = problem or "a link or a directory stands in its place, remove that first"
        raise MogplexError(f"cannot write {path}: {problem}")
    temporary = path + ".tmp"
    try:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise MogplexError(f"cannot write {path}: {error.strerror or error}") from None


def _read_auth(path: str, warn: Warn) -> Json:
    """auth.json, {} for none; UnauthorizedError that names it when it cannot be read or understood."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            mode, document = os.fstat(stream.fileno()).st_mode & 0o777, json.load(stream)
        if not isinstance(document, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UnauthorizedError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UnauthorizedError(f"{path} holds no JSON object", hint="correct or remove it") from None
    if mode & 0o077 and os.name != "nt":
        warn(f"{path} is open to other users (mode {mode:04o}); to close it: chmod 600 {path}")
    return document


def _stored(path: str, base_url: str, warn: Warn) -> Json:
    """What auth.json has for the service at ``base_url``, as keywords of Credential; {} for nothing.

    Read generously: a token under any of its usual names, in any of three places.
    """
    document = _read_auth(path, warn)
    for entry in (document.get("mogplex"), dict_of(document, "providers").get("mogplex"), document):
        token = next(filter(None, (text_of(entry, key).strip() for key in _TOKEN_KEYS)), "")
        issuer, expiry = text_of(entry, "base_url").rstrip("/"), text_of(entry, "expires_at")
        if token and issuer and issuer != base_url:
            warn(f"the sign-in in {path} is for {sanitize(issuer)} and does not count for {base_url}")
        elif token:
            return {"token": check_token(token, path), "refresh_token": text_of(entry, "refresh_token"),
                    "expires_at": float(expiry) if expiry.isdigit() else parse_time(expiry)}
    return {}


def _put_entry(path: str, entry: Json, problem: str) -> bool:
    """Make ``entry`` all that auth.json has of ours ({}: nothing), under ``_locked``; whether it had any."""
    document = _read_auth(path, lambda text: None)
    kept = {key: value for key, value in document.items() if key not in _OUR_KEYS}
    if "mogplex" in dict_of(kept, "providers"):
        kept["providers"] = {key: value for key, value in kept["providers"].items() if key != "mogplex"}
    if entry or kept != document:
        ours = {"mogplex": entry} if entry else {}
        _replace_file(path, json.dumps({"version": 1, **kept, **ours}, indent=2) + "\n", problem)
    return kept != document


def store_credential(home: str, entry: Json) -> str:
    """Put ``entry`` into auth.json, whose path is the value; what others keep there stays."""
    path = os.path.join(home, "auth.json")
    with _locked(path) as problem:
        _put_entry(path, entry, problem)
    return path


def forget_credential(home: str) -> bool:
    """Take our credential, and nothing else, out of auth.json; whether there was one."""
    path = os.path.join(home, "auth.json")
    with _locked(path if os.path.lexists(path) else "") as problem:
        return _put_entry(path, {}, problem)


def _exchange(post: PostForm, base_url: str, **form: str) -> Json:
    """Ask the token endpoint; the entry to store. No secret gets into an error, not even when echoed."""
    status, answer = post(base_url + TOKEN_PATH, {"client_id": "mogplex-cli", **form})
    token, lifetime_s = text_of(answer, "access_token"), answer.get("expires_in")
    if status == 200 and token:
        entry: Json = {"access_token": check_token(token, "the new token"), "base_url": base_url}
        entry["refresh_token"] = text_of(answer, "refresh_token") or form.get("refresh_token", "")
        if isinstance(lifetime_s, (int, float)) and 0 < lifetime_s < 1e9:
            entry["expires_at"] = int(time.time() + lifetime_s)
        return entry
    if status >= 500:
        raise UnavailableError("the sign-in service is out of order", status=status, transient=True)
    if status == 429:
        raise RateLimitedError("too many sign-ins", status=status, transient=True)
    if status not in (400, 401, 403):
        raise InvalidResponseError(f"no token came from {base_url}{TOKEN_PATH}", status=status)
    words = sanitize(": ".join(text_of(answer, key) for key in ("error", "error_description")))
    words = redact(words, *(form.get(key, "") for key in ("code", "code_verifier", "refresh_token")))
    raise UnauthorizedError(f"sign in again, {words}", status=status, hint="run `mogplex login`")


class Credential:
    """A token, refreshed when it must be; safe from several threads and processes.

    ``source``: "environment", "file" or "given". With a ``path`` (auth.json) it takes over what
    another process has stored there, and stores what it gets.
    """

    def __init__(
        self, token: str, *, source: str = "given", base_url: str = "", refresh_token: str = "",
        expires_at: Optional[float] = None, path: str = "", warn: Warn = lambda text: None,
    ) -> None:
        import threading
        self.token, self.source, self.expires_at = token and check_token(token, "token"), source, expires_at
        self._base_url, self._refresh_token, self._path, self._warn = base_url, refresh_token, path, warn
        self._mutex, self._spent = threading.Lock(), {token}

    @property
    def refreshable(self) -> bool:
        """Whether it can outlive its ``expires_at``."""
        return bool(self._refresh_token)

    def _is_due(self) -> bool:
        return self.refreshable and self.expires_at is not None and time.time() > self.expires_at - 60

    def current(self, post: PostForm) -> str:
        """The token to send, refreshed first when it ends within 60 s; errors as those of ``renew``."""
        token = self.token
        if self._is_due():
            self.renew(token, post)
        return self.token

    def renew(self, refused: str, post: PostForm) -> bool:
        """Whether another token than ``refused`` is in force now: a refreshed one, or the file's.

        UnauthorizedError when only a new sign-in helps, UnavailableError in an outage; the file stays.
        """
        with self._mutex, _locked(self._path) as problem:
            if self._path:
                stored = _stored(self._path, self._base_url, lambda text: None)
                if not stored:
                    return False  # signed out meanwhile, which a refresh must not undo
                if stored["token"] not in self._spent:  # a file that cannot be written keeps its first
                    self._adopt(**stored)
            if self.token != refused and not self._is_due() or not self.refreshable:
                return self.token != refused
            entry = _exchange(
                post, self._base_url, grant_type="refresh_token", refresh_token=self._refresh_token)
            self._adopt(entry["access_token"], entry["refresh_token"], entry.get("expires_at"))
            try:
                if self._path:
                    _put_entry(self._path, entry, problem)
            except MogplexError as error:
                self._warn(f"{error}; the refreshed sign-in serves this process only")
                self._warn = lambda text: None  # once
            return True

    def _adopt(self, token: str, refresh_token: str, expires_at: Optional[float]) -> None:
        self._spent.add(token)
        self.token, self._refresh_token, self.expires_at = token, refresh_token, expires_at


def resolve_credential(environ: Mapping[str, str], base_url: str, warn: Warn) -> Credential:
    """MOGPLEX_API_KEY, else what auth.json has for ``base_url``; UnauthorizedError for none or nonsense."""
    token = environ.get("MOGPLEX_API_KEY", "").strip()
    if token:
        return Credential(check_token(token, "MOGPLEX_API_KEY"), source="environment", base_url=base_url)
    path = os.path.join(home_directory(environ), "auth.json")
    stored = _stored(path, base_url, warn)
    if not stored:
        raise UnauthorizedError(f"not signed in: {path} has no token for {base_url}", hint=(
            f"run `mogplex login`, or set MOGPLEX_API_KEY to a token from {base_url}/settings/api-keys"))
    return Credential(source="file", base_url=base_url, path=path, warn=warn, **stored)


def remember_run(home: str, record: Json, warn: Warn) -> None:
    """Append ``record`` to runs.jsonl, which keeps 500; where that cannot be done, a warning is all."""
    path = os.path.join(home, "runs.jsonl")
    line = json.dumps({**record, "task": text_of(record, "task")[:80]})
    with _locked(path) as problem:
        try:
            _replace_file(path, "\n".join([*_run_lines(path)[-499:], line, ""]), problem)
        except (MogplexError, OSError) as error:
            warn(f"this run will not be remembered: {error}")


def _run_lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return [line.strip() for line in stream if line.strip()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def remembered_runs(home: str, base_url: str) -> List[Json]:
    """The runs started here on the service at ``base_url``, newest first; a torn line is passed over."""
    found, lines = [], []  # type: Tuple[List[Json], List[str]]
    with contextlib.suppress(OSError):
        lines = _run_lines(os.path.join(home, "runs.jsonl"))
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if text_of(record, "id") and text_of(record, "service") == base_url:
                found.append(record)
    return found

# ---------------------------------------------------------------- 4. Client

# ---------------------------------------------------------------- 5. Tail

# ==== Everything above this line can be copied out and used as a library. ====

# ---------------------------------------------------------------- 6. Output

# ---------------------------------------------------------------- 7. Cockpit

# ---------------------------------------------------------------- 8. Demo

# ---------------------------------------------------------------- 9. Commands and main
