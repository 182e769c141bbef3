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

DEMO_TOKEN, DEMO_READ_TOKEN = "mog_" + "Demo" * 8, "mog_" + "Read" * 8
DEMO_FOREIGN_REPO = "f0e1d2c3-b4a5-4968-8776-655443322110"  # another user's: 404, where an unknown id is 503
DEMO_SECRET = "not-a-real-secret-0123456789"  # in the MCP servers' config, which a client must drop
DEMO_ERROR = "Harness exited with code 1: 3 of 148 tests failed"
DEMO_REDIRECTS = ("http://127.0.0.1:24816/auth/callback", "http://127.0.0.1:24818/auth/callback")
DEMO_REPOS: List[Json] = [
    dict(zip(("id", "full_name", "installation_id", "default_branch", "root_directory"), row)) for row in (
        ("8f3a2b1c-1234-4abc-9def-1234567890ab", "acme/web", "51423907", "main", None),
        ("2d6f0c7e-5b1a-4c3d-8e9f-0a1b2c3d4e5f", "acme/api", "51423907", "main", None),
        ("c41e9a70-8d2b-4f65-b3a7-6e5d4c3b2a19", "acme/docs", "51423907", "trunk", "website"),
        ("5a7b9c1d-3e2f-4a80-91b4-d7c6b5a49382", "acme/web-legacy", None, None, None))]
DEMO_RUNS = (  # id, repo, harness, ending, age in s, cancelled at s, task
    ("79f0d3c7-6a2e-4b91-8c5d-1f3e5a7b9c0d", 0, "codex", "success", 259200, None, "Refactor auth to bearer tokens"),
    ("7a44c0be-1d9f-4e37-a2b8-c6d4e2f0a1b3", 1, "codex", "long", 172800, None, "Give every handler typed errors"),
    ("7b8e1a35-f0c2-4d64-9e7a-3b5c7d9e1f20", 1, "claude-code", "running", 86400, 97.0, "Move the queue to Redis"),
    ("7c02f9d4-2e8b-4a15-b6c3-9d7f5e3c1a0b", 0, "codex", "failed", 18000, None, "Repair the flaky e2e suite"),
    ("7d10b6e2-9c4a-4f83-8d1e-5a3b1c9f7e6d", 2, "claude-code", "unchanged", 10800, None, "Look for dead links"),
    ("7f2c41aa-3b5e-4d18-9a60-5c1e8b7d2f04", 0, "codex", "running", 761, None, "Fix the login redirect loop"))
DEMO_SANDBOXES = (  # id, sandbox_id, repo, status, working_branch, age in s, error
    ("b1c2d3e4-5f60-4718-829a-3b4c5d6e7f80", "sbx_w3bR7nq0", 0, "running", "main", 40, None),
    ("b2d3e4f5-6071-4829-93ab-4c5d6e7f8091", "sbx_d0c5Kx2p", 2, "paused", "trunk", 5400, None),
    ("b3e4f506-7182-493a-a4bc-5d6e7f8091a2", None, 0, "error", "fix/tax", 7200, "npm ci exited with code 1"),
    ("b4f50617-8293-4a4b-b5cd-6e7f8091a2b3", "sbx_4p1Zt8vL", 1, "stopped", "feat/queue", 90000, None))
DEMO_AGENTS = {"agents": [{
    "id": "a1f0e2d3-c4b5-4a69-8778-695a4b3c2d1e", "name": "Reviewer", "slug": "reviewer", "model": None,
    "description": "Says what a change would break", "category": "quality", "preset": True}]}
DEMO_MODELS = {"models": [{
    "id": f"{provider}/{name}", "provider": provider, "name": name, "contextLength": 200000,
    "capabilities": ["tools"], "pricing": {"input": cost, "output": cost * 5}}
    for provider, name, cost in (("openai", "gpt-5-codex", 1.25), ("anthropic", "claude-sonnet-4.5", 3.0))]}
DEMO_SERVERS = {"servers": [
    {"name": "github", "enabled": True, "config": {"headers": {"Authorization": f"Bearer {DEMO_SECRET}"}}},
    {"name": "sentry", "enabled": False, "config": {"env": {"SENTRY_TOKEN": DEMO_SECRET}}}]}
DemoStep = Tuple[float, str, Optional[str], str, Json]  # seconds into the run, type, toolName, message, payload
DEMO_WORK: Dict[str, List[DemoStep]] = {  # what an agent does after its set-up, by how the run ends
    "success": [
        (6.5, "tool_call", "apply_patch", "src/session.ts", {"files": ["src/session.ts", "src/session.test.ts"]}),
        (7.0, "tool_result", "apply_patch", "2 files changed, all 148 tests pass \u2713", {"exit_code": 0})],
    "failed": [  # the lines that say why come after the status
        (7.5, "failed", None, "Harness run failed", {"exit_code": 1, "failure_code": "command_failed"}),
        (8.5, "failed", None, "Harness execution failed", {"error": DEMO_ERROR}),
        (9.1, "failed", None, "External Mogplex run failed", {"error": DEMO_ERROR})],
    "unchanged": [],
    "long": [(9.0 + 3 * i, "tool_call", "shell", f"npm test -- {i:03d}", {}) for i in range(230)],  # more than is listed
    "running": [(at, "assistant_message", None, text, {}) for at, text in (  # without an end; agents write what they like
        (95.0, "Found it:\n::error::\x1b[2J\x1b[31mthe cookie\x1b[0m \u202eis\u202c lost ##vso[task.complete]\rhere"),
        (640.0, "A test now shows it."), (790.0, "The fix is in."), (840.0, "Two tests are red, I look at them."))],
}


class DemoAnswer(Exception):
    """One HTTP answer, returned or raised: an object is sent as JSON in chunks, text as it is."""

    def __init__(self, status: int, body: Union[Json, str] = "", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def demo_refusal(status: int, code: str, message: str, **headers: str) -> DemoAnswer:
    """An answer in the error envelope."""
    return DemoAnswer(status, {"ok": False, "error": {"code": code, "message": message}}, **headers)


class DemoRequest(NamedTuple):
    """One HTTP request: header names in lower case, ``id`` the one in the path."""

    method: str
    path: str
    query: Dict[str, str]
    headers: Mapping[str, str]
    body: bytes
    id: str = ""

    def limited(self, items: List[Json]) -> List[Json]:
        """As many of ``items`` as ``limit`` says, which is clamped and never refused."""
        text = self.query.get("limit", "")
        return items[:max(1, min(MAX_LIMIT, int(text) if re.match(r"-?\d{1,9}\Z", text) else 100))]

    def json(self) -> Json:
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise demo_refusal(400, "BAD_REQUEST", "Invalid JSON body")
        return body


class DemoRun(NamedTuple):
    """What stays of a run; what it shows at a time follows from it alone (demo_shown)."""

    facts: Json  # the part of the run object that never changes
    repo: str  # full name
    pushed: str  # the branch of the payloads: the true one
    created: float
    ending: str
    cancelled_s: Optional[float] = None  # into the run


def demo_id(name: str) -> str:
    """A UUID, the same for the same ``name`` every time."""
    import uuid
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "mogplex demo " + name))


def demo_time(seconds: float, digits: int = 3) -> str:
    """Seconds since the epoch in one of the spellings that the service mixes."""
    whole, micros = divmod(int(seconds * 1_000_000 + 0.5), 1_000_000)
    fraction = "." + f"{micros:06d}"[:digits] if digits else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + fraction + ("Z" if digits == 3 else "+00:00")


def demo_steps(run: DemoRun) -> List[DemoStep]:
    """All that a run will ever show, oldest first, if nobody cancels it."""
    run_id, harness, branch = run.facts["runId"], run.facts["harness"], run.facts["branch"]
    name, package = ("Codex", "openai/codex") if harness == "codex" else ("Claude Code", "anthropic-ai/claude-code")
    branches = {"base_branch": branch["base"], "working_branch": run.pushed}
    steps: List[DemoStep] = [
        (0.0, "started", None, "External Mogplex run accepted",
         {"external_run_id": run_id, "harness_id": harness, "working_branch": branch["working"]}),
        (0.3, "started", None, f"Harness run started: {harness}", {"harness_id": harness}),
        (1.4, "log", None, f"Synchronized {run.pushed}",
         dict(branches, stage="git_sync", created_branch=run.pushed != branch["working"])),
        (1.9, "log", None, f"Loaded 2 MCP server(s) for {name}",
         {"stage": "mcp_config", "outcome": "loaded", "server_count": 2, "server_names": ["github", "sentry"]}),
        (2.6, "status_changed", None, "Harness run streaming",
         {"from": "pending", "to": "streaming", "runtime_command_id": f"cmd_{run_id[:8]}"}),
        (3.3, "log", None, f"Installed @{package}", {"stage": "install", "logs": "added 1 package in 2s"}),
        (4.0, "assistant_message", None, "I read the code around it first.", {}),
        (4.8, "tool_call", "shell", "rg -n session src", {"command": "rg -n session src"}),
        (5.2, "tool_result", "shell", "src/session.ts:14, and 6 more", {"exit_code": 0}),
    ] + DEMO_WORK[run.ending]
    if run.ending in ("failed", "running"):
        return steps
    changed, at = run.ending != "unchanged", steps[-1][0]
    url = f"https://github.com/{run.repo}/pull/{100 + int(run_id[:4], 16) % 900}" if changed else None
    return steps + [
        (at + 1.2, "log", None, "Pull request ready" if changed else "No code changes to deliver",
         dict(branches, stage="git_delivery", changed=changed, pull_request_url=url, auto_committed_files=[])),
        (at + 2.0, "finished", None, "Harness run finished", {"exit_code": 0})]


def demo_shown(run: DemoRun, elapsed_s: float) -> Tuple[str, List[DemoStep]]:
    """Status and events of a run so many seconds (at speed 1) after its start."""
    steps, status, stop_s = demo_steps(run), "pending", run.cancelled_s
    if stop_s is not None:
        payload = {"external_run_id": run.facts["runId"]}
        steps = [step for step in steps if step[0] <= stop_s] + [
            (stop_s, "cancel_requested", None, "Cancellation requested", payload),
            (stop_s + 1.0, "cancelled", None, "External Mogplex run cancelled", payload)]
    for at, kind, *_ in steps:
        if kind == "status_changed" and at <= elapsed_s:
            status = "streaming"
        elif kind in ("finished", "failed") and at + 0.6 <= elapsed_s:  # the status follows the event
            status = "success" if kind == "finished" else "failed"
    return "cancelled" if stop_s is not None else status, [step for step in steps if step[0] <= elapsed_s]


def demo_problem(key: str, body: Json, default_branch: str) -> str:
    """What the service has against a StartRun, or "" for nothing; in its own words and order."""
    prompt, root = body.get("prompt"), body.get("rootDirectory")
    base, working = body.get("baseBranch"), body.get("workingBranch")
    branch = re.compile(r"[A-Za-z0-9_./-]+\Z")
    problems = (
        (not key, "Idempotency-Key is required"),
        (len(key) > 200, "Idempotency-Key exceeds maximum length of 200 characters"),
        (not text_of(body, "repoId"), "repoId is required"),
        (not text_of(body, "prompt").strip(), "Prompt is required"),
        (utf16_units(str(prompt)) > 100_000, "Prompt is too long"),
        (body.get("harness", "codex") not in HARNESSES, "Invalid harness"),
        (base is not None and not branch.match(str(base)), "Invalid base branch"),
        (working is not None and not branch.match(str(working)), "Invalid working branch"),
        (root is not None and (str(root).startswith("/") or ".." in str(root)), "Invalid root directory"),
        (body.get("createBranch") and working == (base or default_branch),
         "Working branch must differ from base branch when createBranch is true"))
    return next((text for wrong, text in problems if wrong), "")


def demo_oauth_error(status: int, code: str) -> DemoAnswer:
    """An error as OAuth spells it."""
    return DemoAnswer(status, {"error": code, "error_description": code.replace("_", " ")})


class DemoService:
    """What the demo knows and answers, without a socket. ``clock`` gives seconds since the epoch.

    For tests: ``requests``, ``refusals`` (429s) and ``refreshes`` are counts, ``issued`` the OAuth access
    tokens in order, ``token_lifetime_s`` how long the next one lives; ``tokens.pop(token)`` revokes one.
    """

    def __init__(self, clock: Callable[[], float], speed: float, rate_limit: bool) -> None:
        import threading
        self.clock, self.speed, self.rate_limit, self.lock = clock, speed, rate_limit, threading.Lock()
        self.requests = self.refusals = self.refreshes = 0
        self.token_lifetime_s = 3600.0
        self.issued: List[str] = []
        self.tokens = {DEMO_TOKEN: (float("inf"), "read write"), DEMO_READ_TOKEN: (float("inf"), "read")}
        self.refresh_tokens: Dict[str, Tuple[float, str]] = {}  # as tokens: until when, and scopes
        self.codes: Dict[str, Tuple[float, Dict[str, str]]] = {}  # until when, and what authorize was asked
        self.recent: Dict[str, List[float]] = {}  # token -> when its requests of the last minute came
        self.keys: Dict[str, Tuple[Json, str]] = {}  # idempotency key -> body, run id
        self.runs: Dict[str, DemoRun] = {}
        self.sandboxes: Dict[str, Json] = {}
        for record_id, sandbox_id, repo, status, branch, age_s, error in DEMO_SANDBOXES:
            self._add_sandbox(DEMO_REPOS[repo], {"workingBranch": branch}, age_s, id=record_id,
                              sandbox_id=sandbox_id, status=status, error=error)
        for run_id, repo, harness, ending, age_s, cancelled_s, _ in DEMO_RUNS:
            run = self._add_run(run_id, DEMO_REPOS[repo], {"harness": harness}, ending, age_s)
            self.runs[run_id] = run._replace(cancelled_s=cancelled_s)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> DemoAnswer:
        """The answer to a request."""
        import urllib.parse
        path, mark, query = target.partition("?")
        with self.lock:
            self.requests += 1
            if path != "/" and (path.endswith("/") or "//" in path):
                return DemoAnswer(308, Location=re.sub("//+", "/", path).rstrip("/") + mark + query)
            fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            try:
                return self._route(DemoRequest(method, path, fields, headers, body))
            except DemoAnswer as answer:
                return answer

    def _route(self, request: DemoRequest) -> DemoAnswer:
        import urllib.parse
        bearer = request.headers.get("authorization", "")
        if request.path.startswith(API_PATH + "/") and not re.match(r"Bearer \S+\Z", bearer):
            return DemoAnswer(307, Location="/login?next=" + urllib.parse.quote(request.path, safe=""))
        answer = DemoAnswer(404, "<!DOCTYPE html><title>404: This page could not be found.</title>")
        for method, pattern, scope, status, handler in self.ROUTES:
            match = re.match(pattern + r"\Z", request.path)
            if match and method in ("", request.method):
                if scope:
                    self._admit(bearer[7:], scope)
                ids = [urllib.parse.unquote(text) for text in match.groups()]
                data = handler(self, request._replace(id="".join(ids)))
                return data if isinstance(data, DemoAnswer) else DemoAnswer(status, {"ok": True, "data": data})
            answer = DemoAnswer(405) if match else answer
        return answer

    def _admit(self, token: str, scope: str) -> None:
        now = self.clock()
        until, scopes = self.tokens.get(token, (0.0, ""))
        if until <= now:
            raise demo_refusal(401, "UNAUTHORIZED", "Unauthorized")
        if self.rate_limit and token.startswith("mog_"):
            recent = self.recent[token] = [at for at in self.recent.get(token, []) if at > now - 60]
            if len(recent) >= 60:
                self.refusals += 1
                raise demo_refusal(429, "RATE_LIMITED", "Rate limit exceeded", Retry_After="60")
            recent.append(now)
        if scope not in scopes.split():
            raise demo_refusal(403, "FORBIDDEN", f"Missing required scope: {scope}. Issue a new token with "
                               f"the '{scope}' scope at /settings/api-keys.")

    def _find(self, records: Mapping[str, Any], record_id: str, name: str) -> Any:
        if not is_uuid(record_id):  # the database refuses it, and nobody catches that
            raise demo_refusal(500, "INTERNAL_ERROR", "Internal server error")
        if record_id.lower() not in records:
            raise demo_refusal(404, "NOT_FOUND", f"{name} not found")
        return records[record_id.lower()]

    def _of(self, items: List[Json], name: str, wanted: str) -> List[Json]:
        if wanted and not is_uuid(wanted):
            self._find({}, wanted, "")
        return [item for item in items if wanted.lower() in ("", item[name])]

    def list_repos(self, request: DemoRequest) -> Json:
        like = "".join({"%": ".*", "_": "."}.get(char, re.escape(char)) for char in request.query.get("q", ""))
        repos = [repo for repo in DEMO_REPOS if re.search(like, repo["full_name"], re.I)]
        repos.sort(key=lambda repo: str(repo["full_name"]))
        return {"repos": request.limited(self._of(repos, "id", request.query.get("id", "")))}

    def list_sandboxes(self, request: DemoRequest) -> Json:
        newest = sorted(self.sandboxes.values(), key=lambda one: str(one["last_active_at"]), reverse=True)
        wanted = request.query.get("status", "")
        found = [one for one in map(self._sandbox, newest) if wanted in ("", one["status"])]
        return {"sandboxes": request.limited(self._of(found, "repo_id", request.query.get("repo_id", "")))}

    def sandbox_logs(self, request: DemoRequest) -> Json:
        sandbox = self._sandbox(self._find(self.sandboxes, request.id, "Sandbox"))
        logs = {"install_log": "added 1208 packages in 31s\n", "dev_log": sandbox["error"]}
        return {"sandbox": dict(sandbox, **logs), "lifecycle_events": [{
            "id": demo_id("created " + request.id), "event_type": "sandbox_created", "decision_code": None,
            "worker_run_id": None, "payload": {}, "created_at": sandbox["created_at"]}]}

    def create_sandbox(self, request: DemoRequest) -> Json:
        body = request.json()
        if not body.get("repoId"):
            raise demo_refusal(400, "BAD_REQUEST", "repoId is required")
        repo = self._find({repo["id"]: repo for repo in DEMO_REPOS}, str(body["repoId"]), "Repo")
        return {"sandbox": self._sandbox(self._add_sandbox(repo, body, 0.0))}

    def _add_sandbox(self, repo: Json, body: Json, age_s: float, **facts: Any) -> Json:
        base, at = body.get("baseBranch") or repo["default_branch"] or "main", self.clock() - age_s / self.speed
        sandbox: Json = {
            "id": demo_id(f"sandbox {len(self.sandboxes)}"), "sandbox_id": None, "repo_id": repo["id"], "status": None,
            "base_branch": base, "working_branch": body.get("workingBranch") or base,
            "root_directory": body.get("rootDirectory", repo["root_directory"]), "preview_url": None,
            "created_at": demo_time(at), "last_active_at": demo_time(at), "error": None, **facts}
        self.sandboxes[sandbox["id"]] = sandbox
        return sandbox

    def _sandbox(self, sandbox: Json) -> Json:
        """The object as it is now: those made by requests are set up within six seconds."""
        age_s = (self.clock() - (parse_time(sandbox["created_at"]) or 0.0)) * self.speed
        status = sandbox["status"] or ("creating" if age_s < 2 else "installing" if age_s < 6 else "running")
        name = sandbox["sandbox_id"] or (None if sandbox["error"] else "pending" if age_s < 2 else "sbx_" + sandbox["id"][:8])
        preview = f"https://{str(name)[4:].lower()}-3000.preview.example" if status == "running" else None
        return dict(sandbox, status=status, sandbox_id=name, preview_url=preview)

    def start_run(self, request: DemoRequest) -> Json:
        key, body = request.headers.get("idempotency-key", "").strip(), request.json()
        repos = {repo["id"]: repo for repo in DEMO_REPOS}
        repo = repos.get(str(body.get("repoId")).lower(), {})
        problem = demo_problem(key, body, repo.get("default_branch") or "main")
        if problem:
            raise demo_refusal(400, "BAD_REQUEST", problem)
        if body["repoId"] == DEMO_FOREIGN_REPO:
            raise demo_refusal(404, "BAD_REQUEST", "Repo not found")
        if not repo:
            raise demo_refusal(503, "SERVICE_UNAVAILABLE", "External Mogplex run rate limit unavailable", Retry_After="60")
        replayed = key in self.keys
        if not replayed:
            run_id = demo_id(f"run {len(self.runs)}")
            self._add_run(run_id, repo, body, "failed" if re.search(r"\bfail\b", body["prompt"], re.I) else "success", 0.0)
            self.keys[key] = (body, run_id)
        if self.keys[key][0] != body:
            raise demo_refusal(409, "IDEMPOTENCY_CONFLICT", "Idempotency-Key was used with a different request body")
        return dict(self._run(self.runs[self.keys[key][1]]), replayed=replayed)

    def _add_run(self, run_id: str, repo: Json, body: Json, ending: str, age_s: float) -> DemoRun:
        sandbox, pushed = self._add_sandbox(repo, body, age_s), f"mogplex/agent-{run_id[:8]}"
        base, working = sandbox["base_branch"], sandbox["working_branch"]
        working = pushed if body.get("createBranch") and working == base else working
        path, created = f"{API_PATH}/runs/{run_id}", self.clock() - age_s / self.speed
        facts = {
            "runId": run_id, "aiCallId": demo_id("call " + run_id), "sandboxRecordId": sandbox["id"], "repoId": repo["id"],
            "harness": body.get("harness") or "codex", "rootDirectory": sandbox["root_directory"],
            "branch": {"base": base, "working": working, "createBranch": bool(body.get("createBranch"))},
            "eventsUrl": path + "/events", "cancelUrl": path + "/cancel", "createdAt": demo_time(created)}
        run = DemoRun(facts, repo["full_name"], pushed if working == base else working, created, ending)
        self.runs[run_id] = run
        return run

    def _shown(self, run: DemoRun) -> Tuple[str, List[DemoStep]]:
        return demo_shown(run, (self.clock() - run.created) * self.speed)

    def _run(self, run: DemoRun) -> Json:
        """The run object as it is now."""
        status, steps = self._shown(run)
        ready = status != "pending"
        name = f"sbx_{run.facts['sandboxRecordId'][:8]}"
        return dict(
            run.facts, status=status, sandboxId=name if ready else "pending",
            updatedAt=demo_time(run.created + steps[-1][0] / self.speed), error=DEMO_ERROR if status == "failed" else None,
            runtime={"provider": "vercel" if ready else None, "runId": name if ready else None})

    def get_run(self, request: DemoRequest) -> Json:
        return {"run": self._run(self._find(self.runs, request.id, "Run"))}

    def run_events(self, request: DemoRequest) -> Json:
        run = self._find(self.runs, request.id, "Run")
        events = [
            {"id": demo_id(f"event {number} {run.facts['runId']}"), "type": kind, "toolName": tool, "message": message,
             "payload": payload, "createdAt": demo_time(run.created + at / self.speed, (3, 6, 0, 5, 4, 2, 1)[number % 7])}
            for number, (at, kind, tool, message, payload) in enumerate(self._shown(run)[1])]
        return {"run": self._run(run), "events": request.limited(events)}

    def cancel_run(self, request: DemoRequest) -> Json:
        run = self._find(self.runs, request.id, "Run")
        ended = self._shown(run)[0] in TERMINAL_STATUSES
        if not ended:
            run = run._replace(cancelled_s=(self.clock() - run.created) * self.speed)
            self.runs[run.facts["runId"]] = run
        answer = self._run(run)
        return {"run": answer, "status": answer["status"], "alreadyTerminal": ended}

    def authorize(self, request: DemoRequest) -> DemoAnswer:
        """The page that a browser opens: whoever asks is signed in, and is sent back at once."""
        import secrets
        import urllib.parse
        query, code = request.query, secrets.token_urlsafe(24)
        if query.get("client_id") != "mogplex-cli" or query.get("redirect_uri") not in DEMO_REDIRECTS:
            return demo_oauth_error(401, "invalid_client")
        fields = urllib.parse.urlencode({"code": code, "state": query.get("state", "")})
        if query.get("response_type") != "code":
            fields = "error=unsupported_response_type&error_description=unsupported response type"
        elif query.get("code_challenge_method") != "S256" or not query.get("code_challenge"):
            fields = "error=invalid_request&error_description=pkce is required"
        else:
            self.codes[code] = (self.clock() + 600, query)
        return DemoAnswer(302, Location=f"{query['redirect_uri']}?{fields}")

    def token(self, request: DemoRequest) -> DemoAnswer:
        """Tokens for a code, which works once, or for a refresh token, which is replaced."""
        import base64
        import hashlib
        import urllib.parse
        form = dict(urllib.parse.parse_qsl(request.body.decode("latin-1")))
        if form.get("client_id") != "mogplex-cli":
            return demo_oauth_error(401, "invalid_client")
        if form.get("grant_type") == "refresh_token":
            until, scope = self.refresh_tokens.pop(form.get("refresh_token", ""), (0.0, ""))
            self.refreshes += until > self.clock()
        elif form.get("grant_type") == "authorization_code":
            until, asked = self.codes.pop(form.get("code", ""), (0.0, {}))
            scope, digest = asked.get("scope", ""), hashlib.sha256(form.get("code_verifier", "").encode()).digest()
            if asked and form.get("redirect_uri") != asked["redirect_uri"]:
                return demo_oauth_error(401, "invalid_client")
            if asked and base64.urlsafe_b64encode(digest).decode().rstrip("=") != asked["code_challenge"]:
                return demo_oauth_error(401, "invalid_request")
        else:
            return demo_oauth_error(400, "unsupported_grant_type")
        return self._issue(scope) if until > self.clock() else demo_oauth_error(401, "invalid_grant")

    def _issue(self, scope: str) -> DemoAnswer:
        import secrets
        access, refresh, now = "oat_" + secrets.token_urlsafe(24), "ort_" + secrets.token_urlsafe(24), self.clock()
        self.issued.append(access)
        self.tokens[access] = (now + self.token_lifetime_s, scope)
        body = {"access_token": access, "token_type": "Bearer", "expires_in": int(self.token_lifetime_s), "scope": scope}
        if "offline_access" in scope.split():
            self.refresh_tokens[refresh] = (now + 30 * 86400, scope)
            body["refresh_token"] = refresh
        return DemoAnswer(200, body)

    RUN, SANDBOX = API_PATH + "/runs/([^/]+)", API_PATH + "/sandboxes/([^/]+)"
    ROUTES: Tuple[Tuple[str, str, str, int, Callable[[Any, DemoRequest], Union[Json, DemoAnswer]]], ...] = (
        ("GET", API_PATH + "/repos", "read", 200, list_repos),
        ("GET", API_PATH + "/sandboxes", "read", 200, list_sandboxes),
        ("POST", API_PATH + "/sandboxes", "write", 202, create_sandbox),
        ("GET", SANDBOX + "/logs", "read", 200, sandbox_logs),
        ("POST", API_PATH + "/runs", "write", 202, start_run),
        ("GET", RUN, "read", 200, get_run),
        ("GET", RUN + "/events", "read", 200, run_events),
        ("POST", RUN + "/cancel", "write", 200, cancel_run),
        ("GET", API_PATH + "/agents", "read", 200, lambda *_: DEMO_AGENTS),
        ("GET", API_PATH + "/models", "read", 200, lambda *_: DEMO_MODELS),
        ("GET", API_PATH + "/mcp/servers", "read", 200, lambda *_: DEMO_SERVERS),
        ("GET", "/api/auth/mcp/authorize", "", 200, authorize),
        ("POST", "/api/auth/mcp/token", "", 200, token),
        ("", "/login", "", 200, lambda *_: DemoAnswer(200, "<!DOCTYPE html><title>Sign in</title>")),
    )


def demo_listener(service: DemoService, port: int) -> Any:
    """The HTTP server in front of ``service``: bound, not yet serving."""
    import http.server
    import socketserver

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 5.0  # idle connections are closed, as the service does
        wbufsize = -1  # an answer leaves in one piece: two would wait for a delayed ACK

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def converse(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = service.answer(self.command, self.requestline.split()[1], headers, body)
            if server.closing:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if isinstance(answer.body, str):
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body.encode() if self.command != "HEAD" else b"")
                return
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            data = json.dumps(answer.body, ensure_ascii=False).encode("utf-8", "replace")
            for part in [data[at:at + 8192] for at in range(0, len(data), 8192)] + [b""]:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = converse

    class Server(socketserver.ThreadingTCPServer):  # an HTTPServer looks its own name up in the DNS
        daemon_threads, request_queue_size, allow_reuse_address = True, 64, os.name != "nt"
        closing = False

        def handle_error(self, *_: Any) -> None:
            """Print nothing: clients may leave when they like."""

        def serve(self) -> None:
            with self:
                while not self.closing:
                    self.handle_request()

    server = Server(("127.0.0.1", port), Handler)
    return server


class DemoServer:
    """A stand-in for the hosted service on 127.0.0.1, for people and tests: no account, no network.

    ``clock`` gives seconds since the epoch; every duration is divided by ``speed``. ``seeded_runs`` are
    its runs as remember_run() takes them, oldest first; ``service`` has more for tests. UsageError
    when the port (0: any free one) cannot be had.
    """

    def __init__(
        self, port: int = 0, *, clock: Callable[[], float] = time.time, speed: float = 1.0, rate_limit: bool = False,
    ) -> None:
        import threading
        self.token, self.read_token = DEMO_TOKEN, DEMO_READ_TOKEN
        self.service = DemoService(clock, speed, rate_limit)
        try:
            self._listener = demo_listener(self.service, port)
        except (OSError, OverflowError) as error:
            raise UsageError(f"the demo cannot listen on 127.0.0.1:{port}: {error}") from None
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve, daemon=True)
        self.seeded_runs: List[Json] = [
            {"id": seed[0], "service": self.url, "repo": run.repo, "branch": run.facts["branch"]["working"],
             "time": run.facts["createdAt"], "task": seed[-1]}
            for seed in DEMO_RUNS for run in [self.service.runs[seed[0]]]]

    def start(self) -> DemoServer:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop answering, at once and for good."""
        import socket
        if not self._thread.is_alive():
            self._listener.server_close()
            return
        self._listener.closing = True
        with socket.create_connection(self._listener.server_address, 1.0):  # wakes the accepting thread
            self._thread.join(1.0)

    def __enter__(self) -> DemoServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

# ---------------------------------------------------------------- 9. Commands and main
