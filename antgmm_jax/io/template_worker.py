"""Renders chat templates in a process of its own, which `antgmm_jax.io.templates` starts as a script.

Each line of standard input is a JSON object with the arguments of `_reply`, each line of output its reply.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEMORY = 512 << 20
"""Bytes that rendering may use."""
_TOO_LARGE = f"it needs more than {MEMORY >> 20} MiB"
SECONDS = 20
"""Time after which this process ends itself; its parent waits for less."""
LONGEST = 1 << 22
"""Characters of a rendered conversation."""


def _reply(template: str, messages: Sequence[Any], generate: bool, tokens: Mapping[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text, *_), _ = render_jinja_template(
            conversations=[[*messages]], chat_template=template, add_generation_prompt=generate, **tokens
        )
    except MemoryError:
        return {"error": _TOO_LARGE}
    except Exception as error:  # templates can raise any
        return {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    return {"error": f"it writes {len(text)} characters"} if len(text) > LONGEST else {"text": text}


def _limit_memory() -> None:
    """Limits the address space of this process to its present size and `MEMORY`, where the system can."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Answers requests until the end of standard input."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    print(json.dumps(_reply("", [], False, {})), file=replies, flush=True)  # it is ready: everything is imported
    _limit_memory()
    for line in sys.stdin:
        signal.alarm(SECONDS)  # ends this process, also if nobody waits for it any more
        try:
            reply = _reply(**json.loads(line))
        except MemoryError:
            reply = {"error": _TOO_LARGE}
        print(json.dumps(reply), file=replies, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
