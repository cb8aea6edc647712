"""Chat templates of checkpoints, rendered under a limit of time, memory and size.

A template is a program that comes with a checkpoint. The sandbox of transformers keeps it from files, but not from
endless loops or strings of gigabytes, not even while it is compiled. So a process of its own renders it.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any

from antgmm_jax.errors import AntgmmError

SECONDS = 8.0
"""Time for one conversation; real templates take less than a millisecond."""
_FORGET = 10.0
"""Seconds for which a template that could not render one conversation is not tried on another one."""
_PROBE = ({"role": "user", "content": [{"type": "text", "text": "a"}]},)
_PROBE_SECONDS = 2.0
_START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("template_worker.py")
_BLOCK = 1 << 16
DAY = date(2025, 1, 1)
"""The day of templates that write the date of today."""
CLOCK = "strftime_now"
_CALLS = re.compile(rf"{CLOCK}\(\s*(['\"])(.*?)\1\s*\)")
_FIXED = f"{{%- macro {CLOCK}(format) -%}}"


class _Ended(Exception):
    """The process took too long, or ended."""


class _Worker:
    """A process that renders templates. It starts within a second, on first use."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(_WORKER)]  # -P: its folder has modules named like others
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._line(_START_SECONDS)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, str]:
        """Returns the reply to a request. Raises _Ended if there is none in so many seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Ended("it ended its process") from error
        return json.loads(self._line(seconds))

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        place, end, line = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([place], [], [], max(0.0, end - time.monotonic()))[0]:
                raise _Ended(f"it takes more than {seconds:g} s")
            if not (block := os.read(place, _BLOCK)):
                raise _Ended("it ended its process")
            line += block
        return line

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass


class _Renderer:
    """The worker of this process, and the templates that it could not render with when they may be tried again."""

    def __init__(self) -> None:
        self._lock, self._worker = Lock(), None
        self._refused: dict[str, tuple[str, float]] = {}

    def render(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Returns the reply of the worker.

        A template that ended it is not tried again; one that did so with a long conversation only, after `_FORGET`: a
        server must go on, and rows that each take `SECONDS` would take days.
        """
        template = request["template"]
        with self._lock:
            reason, until = self._refused.get(template, ("", 0.0))
            if time.monotonic() < until:
                return {"error": reason}
            try:
                return self._asked(request, SECONDS)
            except _Ended as ended:
                reason = str(ended)
            try:
                self._asked({**request, "messages": _PROBE}, min(SECONDS, _PROBE_SECONDS))
            except _Ended:
                self._refused[template] = (reason, inf)
            else:
                self._refused[template] = (reason, time.monotonic() + _FORGET)
            return {"error": reason}

    def _asked(self, request: Mapping[str, Any], seconds: float) -> dict[str, str]:
        self._worker = self._worker or _Worker()
        try:
            return self._worker.ask(request, seconds)
        except _Ended:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


_RENDERERS: dict[int, _Renderer] = {}
"""By process id: a forked process must not use the worker of its parent."""


def render(template: Any, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any], *, generate: bool) -> str:
    """Renders a conversation as `apply_chat_template` of transformers does.

    Args:
        template: the template of a processor.
        messages: turns with `role` and `content`.
        tokens: special tokens by name.
        generate: whether the text ends where the answer begins.

    Returns:
        The text.

    Raises:
        AntgmmError: the template refuses the conversation, is no template, or exceeds a limit.
    """
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise AntgmmError("the chat template is not a text: correct chat_template.jinja")
    request = {"template": template, "messages": messages, "generate": generate, "tokens": tokens}
    reply = _RENDERERS.setdefault(os.getpid(), _Renderer()).render(request)
    if "error" in reply:
        raise AntgmmError(f"the chat template refuses the conversation: {reply['error']}")
    return reply["text"]


def with_fixed_day(template: str) -> str:
    """Returns a chat template that writes `DAY` where it would write the date of today; others stay as they are.

    With the date, a prompt would have other tokens when it is served than when it was trained, and so would rows that
    are encoded on different days. A macro of the name of transformers' function takes its place.

    Args:
        template: the template of a processor.
    """
    if CLOCK not in template or _FIXED in template:
        return template
    days = json.dumps({form: DAY.strftime(form) for _, form in _CALLS.findall(template)})
    # The empty text keeps a line break at the beginning of the template, which would be trimmed behind the macro.
    return f"{_FIXED}{{{{ {days}.get(format, '{DAY}') }}}}{{%- endmacro %}}{{{{ '' }}}}{template}"


@atexit.register
def _stop() -> None:
    if renderer := _RENDERERS.get(os.getpid()):
        renderer.stop()
