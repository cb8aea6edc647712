"""The server: LitServe with the OpenAI interface, readiness, Prometheus metrics, and an end at SIGTERM."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import uuid4

import litserve
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from litserve.utils import WorkerSetupStatus
from prometheus_client import CollectorRegistry, Counter, Histogram, make_asgi_app
from pydantic import AfterValidator

from antgmm_jax.errors import AntgmmError
from data.limits import BadRow
from experiments.run.host.console import say
from experiments.serving.batches import Answer, Model, ModelError, Question, load
from experiments.serving.requests import FORM, check_options, conversation, most_tokens, shallow

CHAT, METRICS = "/v1/chat/completions", "/metrics"
LARGEST = 256 << 20
"""Bytes of a request: its pictures have up to `MOST_PIXELS`, each of up to 4 bytes as PNG in base64."""
_POLL, _WATCH = 0.05, 1.0
"""Seconds between looks at the process that loads the model, and at all processes while they serve."""


class Answers(litserve.LitAPI):
    """Answers chat requests in batches.

    Args:
        directory: Hugging Face directory.
        name: name of the served model.
        max_new_tokens: maximum length of answers.
        most: most requests of a batch.
        wait: seconds that a batch waits for further requests; 0 makes an idle server of LitServe use a whole core.
    """

    def __init__(self, directory: Path, name: str, *, max_new_tokens: int, most: int, wait: float):
        super().__init__(max_batch_size=most, batch_timeout=wait, api_path=CHAT)
        self._directory, self._name, self._limits = directory, name, {"max_new_tokens": max_new_tokens, "most": most}
        self._model: Model | None = None

    def setup(self, device: str) -> None:
        """Loads the model, in the process that answers."""
        if multiprocessing.parent_process() is not None:
            # Ctrl-C reaches all processes of a terminal; this one answers open requests until its parent ends it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._model = load(self._directory, **self._limits)
        except Exception as error:
            say(f"the model cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}")
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # it would print the error's traceback
            raise

    def decode_request(self, request: Annotated[Mapping[str, Any], AfterValidator(shallow)]) -> Question | str:
        """Reads a request; one that the model cannot read becomes the reason, so that others of its batch go on."""
        assert self._model is not None
        try:
            check_options(request, self._name)
            return self._model.question(*conversation(request), most_tokens(request, self._limits["max_new_tokens"]))
        except (AntgmmError, BadRow) as error:
            return str(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # of processors, which raise many kinds; a panic of tokenizers is no Exception
            return f"the model cannot read the request: {' '.join(str(error).split()) or type(error).__name__}"

    def predict(self, questions: Sequence[Question | str]) -> list[Any]:
        """Answers the questions of a batch; a reason stays, as an error."""
        assert self._model is not None
        if isinstance(questions, Question | str):  # a server without batches
            return self.predict([questions])[0]
        answers = iter(self._model.answers([one for one in questions if isinstance(one, Question)]))
        return [next(answers) if isinstance(one, Question) else AntgmmError(one) for one in questions]

    def encode_response(self, output: Answer | AntgmmError) -> Any:
        """Writes an answer as a chat completion, or an error with status 400, 500 if it is the model's."""
        if isinstance(output, ModelError):
            return _failure(str(output), "server_error", 500)
        if isinstance(output, AntgmmError):
            return _refusal(str(output))
        message = {"role": "assistant", "content": output.text}
        choice = {"index": 0, "message": message, "finish_reason": "stop" if output.ended else "length"}
        counts = {"prompt_tokens": output.read, "completion_tokens": output.written}
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion",
            "model": self._name,
            "created": int(time.time()),
            "choices": [choice],
            "usage": {**counts, "total_tokens": sum(counts.values())},
        }


def _refusal(reason: str) -> JSONResponse:
    return _failure(reason, "invalid_request_error", 400)


def _failure(reason: str, kind: str, status: int) -> JSONResponse:
    return JSONResponse({"error": {"message": reason, "type": kind}}, status)


class Metrics:
    """ASGI middleware that counts chat requests by status and measures their seconds.

    Args:
        app: the application.
        registry: where the metrics are.
    """

    def __init__(self, app: Any, registry: CollectorRegistry):
        self._app = app
        self._count = Counter("antgmm_requests", "Chat requests by status.", ["status"], registry=registry)
        self._seconds = Histogram("antgmm_request_seconds", "Seconds of a chat request.", registry=registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on."""
        if scope.get("path") != CHAT:
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), ["500"]

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._count.labels(status[0]).inc()
            self._seconds.observe(time.perf_counter() - begin)


def check_port(host: str, port: int) -> None:
    """Checks that nobody else listens at a port.

    Args:
        host: address to listen at.
        port: the port.

    Raises:
        AntgmmError: somebody does, or the address is not one of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AntgmmError(f"cannot listen at {host}:{port} ({error.strerror}): choose another --port") from error


def serve(api: Answers, name: str, *, host: str, port: int, timeout: float) -> None:
    """Serves until SIGINT or SIGTERM, then ends all processes of the server.

    `/health` answers 200 when the model is loaded, `/metrics` in the format of Prometheus.

    Args:
        api: answers requests.
        name: name of the served model.
        host: address to listen at.
        port: port.
        timeout: seconds that a request may wait.

    Raises:
        AntgmmError: the model cannot be loaded, or its process died meanwhile.
    """
    server = application(api, name, timeout=timeout)
    signal.signal(signal.SIGTERM, partial(_stop, os.getpid()))
    try:
        server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
    except RuntimeError as error:
        raise AntgmmError(f"the server ends: {error}; the lines above say why") from error
    if server.died:
        raise AntgmmError(f"the server ends: {server.died}")


class _Server(litserve.LitServer):
    """LitServe, which would wait for a process that is killed: for ever while it loads the model or if it is that of
    the interface, and while requests are open if it is the one that answers.

    Attributes:
        died: which process has died, and what to do; "" if none has.
    """

    died = ""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._ending = threading.Event()

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: dict[str, Any]) -> None:
        """Ends the server when one of its processes dies."""
        assert self._shutdown_event is not None
        shutdown, processes = self._shutdown_event, (*self.inference_workers, *uvicorn_workers.values())

        def watch() -> None:
            while not self._ending.wait(_WATCH):  # LitServe's own event is in a process that a stop ends first
                if dead := [process for process in processes if not process.is_alive()]:
                    self.died = f"a process died {_end_of(dead[0])}"
                    self.uvicorn_graceful_timeout = 1  # nobody answers the open requests any more
                    shutdown.set()
                    return

        threading.Thread(target=watch, daemon=True).start()

    def _perform_graceful_shutdown(self, *arguments: Any, **options: Any) -> None:
        self._ending.set()
        super()._perform_graceful_shutdown(*arguments, **options)

    def verify_worker_status(self) -> None:
        """Waits until the model is loaded; ends all processes if it is not.

        Raises:
            AntgmmError: a process died before.
            RuntimeError: the model cannot be loaded.
        """
        try:
            self._wait()
        except BaseException:  # also at SIGTERM
            for process in self.inference_workers:
                process.kill()
            raise

    def _wait(self) -> None:
        while self._starting():
            for process in self.inference_workers:
                if not process.is_alive() and self._starting():  # it writes its status before it ends
                    raise AntgmmError(f"the worker died while it was loading the model {_end_of(process)}")
            time.sleep(_POLL)
        super().verify_worker_status()

    def _starting(self) -> bool:
        return all(status == WorkerSetupStatus.STARTING for status in self.workers_setup_status.values())


def _end_of(process: Any) -> str:
    """Exit code of a dead process, and what to do."""
    killed = process.exitcode == -signal.SIGKILL
    return f"(exit code {process.exitcode}): {'choose a machine with more memory' if killed else 'try again'}"


def application(api: Answers, name: str, *, timeout: float) -> _Server:
    """Returns the server with its routes, as for `serve`.

    Args:
        api: answers requests.
        name: name of the served model.
        timeout: seconds that a request may wait.
    """
    registry = CollectorRegistry()
    server = _Server(
        api,
        accelerator="cpu",
        timeout=timeout,
        middlewares=[(Metrics, {"registry": registry})],
        disable_openapi_url=True,
        max_payload_size=LARGEST,
    )
    server.app.add_exception_handler(RequestValidationError, lambda request, error: _refusal(FORM))
    server.app.mount(METRICS, make_asgi_app(registry))
    server.app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": name, "object": "model"}]})
    return server


def _stop(parent: int, number: int, frame: Any) -> NoReturn:
    """LitServe ends its processes at a KeyboardInterrupt only; those that it has forked end silently."""
    raise KeyboardInterrupt if os.getpid() == parent else SystemExit(0)
