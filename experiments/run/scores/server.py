"""Answers of a running server with the OpenAI interface, such as vLLM."""

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from antgmm_jax.errors import AntgmmError
from data.limits import short
from data.record import PROMPT, Record, turns_of
from experiments.run.host.console import say

KEY = "OPENAI_API_KEY"
"""Variable of the environment with the key that servers want, as clients of the OpenAI interface read it."""
_REMEDIES = {
    400: "if it is too long, start the server with a longer context (--max-model-len), or give a smaller"
    " --max-new-tokens; else see the log of the server",
    413: "raise its limit of the size of a request, or make the pictures smaller",
    429: "use fewer --clients, or give the command again later",
}
"""Status of a refused question -> what to do."""
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a request that failed for a reason that may pass is sent again."""
_LIMIT = 1 << 20
"""Bytes of the longest reply that is read."""


class Server(NamedTuple):
    """A server with the OpenAI interface.

    Attributes:
        url: URL of the interface, such as http://127.0.0.1:8000/v1.
        model: name of the served model.
        timeout: seconds until a reply must be complete.
    """

    url: str
    model: str
    timeout: float


def connect(url: str, *, model: str = "", timeout: float = 120.0) -> Server:
    """Returns the server at a URL, after asking it for its models.

    Args:
        url: URL of the interface, such as http://127.0.0.1:8000/v1.
        model: name of the served model; "" if there is only one.
        timeout: seconds until a reply must be complete.

    Raises:
        AntgmmError: there is no such server or model.
    """
    check_url(url)
    server = Server(url.rstrip("/"), model, timeout)
    reply = _reply(server, "models")
    try:
        names = [one["id"] for one in reply["data"]]
    except (KeyError, TypeError):
        names = []
    if not names or not all(isinstance(name, str) for name in names):
        raise _rubbish(server, "models", reply)
    if (model and model not in names) or (not model and len(names) > 1):
        raise AntgmmError(f"{url} serves {', '.join(map(ascii, names))}: name one of them with --served-model")
    return server._replace(model=model or names[0])


def check_url(url: str) -> None:
    """Checks the form of a URL, before it is printed: it could hold a password or a key.

    Args:
        url: URL of the interface.

    Raises:
        AntgmmError: it is no URL, or has a user, a password or a query.
    """
    if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url, re.IGNORECASE):
        raise AntgmmError("--url: write it as http://HOST:PORT/v1, without user, password or query")


class Reply(NamedTuple):
    """An answer of a server.

    Attributes:
        text: the answer, without white space around it.
        cut: tokens after which it was cut, by the requested limit or a lower one of the server; 0 if it
            ended by itself.
    """

    text: str
    cut: int


def answer(server: Server, messages: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Reply:
    """Returns the greedy answer of a server to a conversation.

    Args:
        server: the server.
        messages: the conversation, from `request_messages`.
        max_new_tokens: maximum length of the answer.

    Raises:
        AntgmmError: the server does not answer, or not with a chat completion.
    """
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": max_new_tokens,
        "temperature": 0,
    }
    reply = _reply(server, "chat/completions", body)
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, TypeError, IndexError):
        choice, text = {}, None
    else:
        text = "" if text is None else text  # a server that takes thoughts apart, of an answer that is no more than one
    if not isinstance(text, str):
        raise _rubbish(server, "chat/completions", reply)
    if choice.get("finish_reason") != "length":
        return Reply(text.strip(), 0)
    usage = reply.get("usage")
    taken = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return Reply(text.strip(), taken if isinstance(taken, int) and 0 < taken < max_new_tokens else max_new_tokens)


def answers(
    server: Server,
    records: Sequence[Record],
    template: str,
    *,
    max_new_tokens: int,
    clients: int,
    progress: Callable[[int, str], None] = lambda done, note="": None,
) -> list[str]:
    """Returns the answers of a server to all records, with several requests at a time.

    A request is repeated after `PAUSES` where the server is busy, fails, hangs up or is late. Messages say how many
    answers were cut, at `max_new_tokens` or at a limit of the server.

    Args:
        server: the server.
        records: records with images.
        template: prompt template of single questions.
        max_new_tokens: maximum length of answers.
        clients: number of concurrent requests.
        progress: called with the number of answered questions.

    Raises:
        AntgmmError: as in `answer`, with the name of the record, also after the last repetition; further requests are
            not sent.
    """
    failed = Event()

    def ask(record: Record, row: int) -> Reply:
        try:
            messages = request_messages(record, template)
            for pause in PAUSES:
                with suppress(_Passing):
                    return answer(server, messages, max_new_tokens)
                if failed.wait(pause):
                    return Reply("", 0)
            return answer(server, messages, max_new_tokens)
        except AntgmmError as error:
            raise AntgmmError(f"record {short(record.id) or row + 1}: {error}") from error

    def one(row: int) -> Reply:
        if failed.is_set():
            return Reply("", 0)
        try:
            return ask(records[row], row)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(one, row) for row in range(len(records))]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, "")
        except BaseException:
            failed.set()
            raise
        replies = [future.result() for future in futures]
    if early := [reply.cut for reply in replies if 0 < reply.cut < max_new_tokens]:
        say(
            f"{len(early)} of {len(replies)} answers were ended by the server after {max(early)} tokens, before"
            f" --max-new-tokens {max_new_tokens}: start it with a higher limit"
        )
    if number := sum(reply.cut == max_new_tokens for reply in replies):
        say(
            f"{number} of {len(replies)} answers were cut at --max-new-tokens {max_new_tokens}: give more if right ones"
            " are longer"
        )
    return [reply.text for reply in replies]


def request_messages(record: Record, template: str = PROMPT) -> list[dict[str, Any]]:
    """Returns a record as messages of a chat request, with images as data URLs of PNG files.

    Args:
        record: record with images.
        template: prompt template of single questions.
    """
    images = iter(record.images)
    return [{"role": turn.role, "content": [*_content(turn.parts, images)]} for turn in turns_of(record, template)]


def _content(parts: Sequence[str | None], images: Iterator[np.ndarray]) -> Iterator[dict[str, Any]]:
    for part in parts:
        if part is None:
            yield {"type": "image_url", "image_url": {"url": _data_url(next(images))}}
        else:
            yield {"type": "text", "text": part}


def _data_url(image: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


class _Passing(AntgmmError):
    """A request failed for a reason that may pass."""


def _reply(server: Server, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON of a reply to a GET request, or to a POST request with a body."""
    url, headers = f"{server.url}/{path}", {"Content-Type": "application/json"}
    if key := os.environ.get(KEY, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise AntgmmError(f"{KEY} holds signs that no key has: set it again")
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        content = _read(request, server.timeout)
    except _Refused as error:
        kind = _Passing if error.status == 429 or error.status >= 500 else AntgmmError
        raise kind(f"{url} refuses the request with status {error}: {_remedy(path, error.status)}") from error
    except TimeoutError as error:
        raise _Passing(
            f"{url} has not answered in {server.timeout:g} s: use fewer --clients, or give it more time with --timeout"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", "") or error
        reason = _shown(str(cause) or type(error).__name__)
        if body is not None and isinstance(cause, ConnectionResetError | BrokenPipeError):
            # Some servers hang up while they are sent more than they take, so that their status is never read.
            raise _Passing(f"{url} hung up ({reason}): see its log, or {_REMEDIES[413]}") from error
        raise _Passing(f"{url} cannot be reached ({reason}): start the server, or correct --url") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _rubbish(server, path, content.decode(errors="replace")) from error


def _remedy(path: str, status: int) -> str:
    """What to do about a request that a server refuses."""
    if status in (401, 403):
        return f"set {KEY} to the key of the server"
    if path == "models":
        return "correct --url, which usually ends with /v1"
    return _REMEDIES.get(status, "see the log of the server")


class _Refused(Exception):
    """A reply with the status of an error; the message is the status with the beginning of the text."""

    def __init__(self, status: int, details: str):
        super().__init__(f"{status} ({details})")
        self.status = status


def _read(request: urllib.request.Request, timeout: float) -> bytes:
    """Content of a reply, at most `_LIMIT` bytes. Raises TimeoutError, also if headers or content come drop by drop."""
    replies: SimpleQueue[bytes | Exception] = SimpleQueue()

    def work() -> None:
        try:
            replies.put(_content_of(request, time.monotonic() + timeout))
        except Exception as error:
            replies.put(error)

    # A socket's timeout is that of a single piece, so that another thread waits for the whole.
    Thread(target=work, daemon=True).start()
    try:
        reply = replies.get(timeout=timeout)
    except Empty:
        raise TimeoutError from None
    if isinstance(reply, Exception):
        raise reply
    return reply


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: a POST would become a GET without a question, and its reply would be scored."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
_NEAR = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
"""For servers on this machine, which no proxy can reach."""


def _near(url: str) -> bool:
    """Whether a URL is of this machine."""
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _content_of(request: urllib.request.Request, end: float) -> bytes:
    content = b""
    try:
        opener = _NEAR if _near(request.full_url) else _OPENER
        with opener.open(request, timeout=end - time.monotonic()) as reply:
            while part := reply.read1(_LIMIT - len(content)):
                content += part
                if time.monotonic() > end:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        raise _Refused(error.code, _details(error)) from error
    return content


def _details(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's text, or where a redirect leads."""
    try:
        with error:
            if place := error.headers.get("Location", ""):
                return f"it is at {_shown(place)}: name that as --url"
            return _shown(error.read1(500).decode(errors="replace"))  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, HTTPException, ValueError):
        return "no details"


def _rubbish(server: Server, path: str, reply: Any) -> AntgmmError:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return AntgmmError(
        f"{server.url}/{path} answers {_shown(text)}, which is not the OpenAI interface: correct --url, which usually"
        " ends with /v1"
    )


def _shown(text: str) -> str:
    """The beginning of a text of the server, without line breaks and control characters."""
    line = ascii(" ".join(text[:500].split()))
    return line if len(line) <= 120 else f"{line[:120]}..."
