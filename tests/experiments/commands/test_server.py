"""`antgmm eval` with a running server: a small one with the OpenAI interface, here in a thread."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from antgmm_jax.errors import AntgmmError
from data.record import Record, Turn
from experiments.run.scores import server as client
from experiments.run.scores.server import Server, connect, request_messages
from tests.experiments.tiny import save_llava

ROWS = [
    {
        "image": f"{number}.png",
        "question": f"what is {number}?",
        "answer": f"Item {number}",
        "type": kind,
        "id": f"r{number}",
    }
    for number, kind in enumerate("aabbb")
]


class Fake(ThreadingHTTPServer):
    """Answers chat requests by `reply(body)`, a JSON value or bytes, with `status`."""

    daemon_threads = True

    def __init__(self, reply, names=("student",)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.reply, self.names = f"http://127.0.0.1:{self.server_port}/v1", reply, names
        self.location = self.key = ""
        self.status, self.bodies, self.active, self.most, self.lock = 200, [], 0, 0, threading.Lock()

    def handle_error(self, request, client_address):
        """Prints nothing: a client may hang up, and the thread of its request ends in another test."""


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        if self.path != "/v1/models":
            self._send({"detail": "Not Found"}, 404)
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._send({"error": "Unauthorized"}, 401)
        else:
            self._send({"object": "list", "data": [{"id": name} for name in self.server.names]}, 200)

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
        reply = self.server.reply(body)
        with self.server.lock:
            self.server.active -= 1
        self._send(reply, self.server.status)

    def _send(self, reply, status):
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(reply, names=("student",)):
    with Fake(reply, names) as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield fake
        fake.shutdown()
        thread.join()


def completion(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def question(body):
    return body["messages"][0]["content"][-1]["text"]


def number(body):
    return int(question(body).rstrip("?").split()[-1])


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for row in ROWS:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / row["image"])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return f"jsonl:{tmp_path / 'rows.jsonl'}"


def test_a_server_is_scored_and_its_answers_are_written(antgmm, data, tmp_path):
    with serving(lambda body: completion(" item  3" if number(body) == 3 else f"Item {number(body) % 2}\n")) as fake:
        words = ["eval", "--data", data, "--url", fake.url, "--max-new-tokens", "5", "--prompt", "Q {question}"]
        figures = json.loads(antgmm(*words, "--answers", "out/a.jsonl", "--json").stdout)
        shown = antgmm(*words).stdout
    assert figures["by_type"] == {"a": 1.0, "b": pytest.approx(1 / 3)}
    assert figures["exact_match"] == pytest.approx(2 / 3)
    assert (figures["url"], figures["count"]) == (fake.url, 5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, True, False]
    assert lines[2] == {
        "id": "r2",
        "question": "what is 2?",
        "answer": "Item 0",
        "expected": "Item 2",
        "correct": False,
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jsonl"]
    assert "0.3333" in shown

    (body,) = (body for body in fake.bodies[:5] if number(body) == 2)
    assert {name: body[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "student",
        "max_tokens": 5,
        "temperature": 0,
    }
    assert question(body) == "Q what is 2?"
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.array(sent), np.array(Image.open(tmp_path / "2.png")))


def test_a_server_is_compared_with_jax(antgmm, data, tmp_path):
    model = save_llava(tmp_path / "model")
    words = ["eval", model, "--data", data, "--max-new-tokens", "3", "--answers", "a.jsonl", "--json"]
    alone = json.loads(antgmm(*words).stdout)
    ours = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with serving(lambda body: completion("other" if number(body) == 1 else ours[number(body)])) as fake:
        figures = json.loads(antgmm(*words, "--url", fake.url).stdout)
        shown = antgmm(*words[:-1], "--url", fake.url).stdout
    assert figures["equal_answers"] == 4
    assert figures["jax"] == alone
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["jax"] for line in lines] == ours
    assert lines[1]["answer"] == "other"
    assert "equal answers of server and JAX: 4 of 5" in shown
    assert "answers: a.jsonl" in shown


def test_requests_are_concurrent_up_to_the_number_of_clients(antgmm, data):
    gate = threading.Barrier(2)

    def reply(body):
        if number(body) < 4:
            gate.wait(10)  # two at a time, or it breaks
        return completion("x")

    with serving(reply) as fake:
        assert antgmm("eval", "--data", data, "--url", fake.url, "--clients", "2").exit_code == 0
    assert fake.most == 2


@pytest.mark.parametrize(
    ("reply", "status", "message"),
    [
        ({"choices": []}, 200, "which is not the OpenAI interface: correct --url, which usually ends with /v1"),
        ([], 200, "which is not the OpenAI interface"),
        (b"<html>\x1b[2J", 200, r"answers '<html>\x1b[2J', which is not the OpenAI interface"),
        (b"[" * 100_000, 200, "which is not the OpenAI interface"),
        (b"\xff\xfe", 200, "which is not the OpenAI interface"),
        ({"error": "no chat\ntemplate"}, 400, r"refuses the request with status 400 ('{\"error\": \"no chat"),
        ({"error": "too long"}, 400, "longer context (--max-model-len), or give a smaller --max-new-tokens"),
        ({"error": "large"}, 413, "raise its limit of the size of a request, or make the pictures smaller"),
    ],
)
def test_rubbish_is_one_line(antgmm, data, reply, status, message, tmp_path):
    with serving(lambda body: reply) as fake:
        fake.status = status
        result = antgmm("eval", "--data", data, "--url", fake.url, "--answers", "a.jsonl", "--clients", "1")
        assert (result.exit_code, result.stdout) == (2, "")
        complaint = result.stderr.splitlines()[-1]
        assert complaint.startswith(f"error: record r0: {fake.url}/chat/completions ")
        assert len(fake.bodies) == 1  # it is not repeated: it would fail again; further ones are not sent
    assert message.replace('\\"', '"') in complaint
    assert len(complaint) < 400
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("status", "remedy"), [(429, "use fewer --clients, or give the command again later"), (500, "see the log")]
)
def test_a_server_that_stays_busy_or_broken_is_asked_some_times_and_named(antgmm, data, monkeypatch, status, remedy):
    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0, 0.0))
    with serving(lambda body: {"error": "later"}) as fake:
        fake.status = status
        result = antgmm("eval", "--data", data, "--url", fake.url, "--clients", "1")
        assert [number(body) for body in fake.bodies] == [0] * 4  # further ones are not sent
    assert (result.exit_code, result.stdout) == (2, "")
    complaint = result.stderr.splitlines()[-1]
    assert complaint.startswith(
        f"error: record r0: {fake.url}/chat/completions refuses the request with status {status} "
    )
    assert remedy in complaint


def test_a_fault_that_passes_loses_no_answers(monkeypatch):
    """One busy moment, one lost connection and one late reply among thousands ended the command."""
    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0, 0.0))
    faults, gate = {0: "busy", 1: "broken", 2: "hung up", 3: "late"}, threading.Event()

    def reply(body):
        fault = faults.pop(number(body), "")  # of the first request alone
        if fault == "hung up":
            raise ConnectionError
        if fault == "late":
            gate.wait(5)
        fake.status = {"busy": 429, "broken": 502}.get(fault, 200)
        return completion(f"Item {number(body)}")

    records = [Record(images=(), question=f"what is {row}?", answer="") for row in range(4)]
    with serving(reply) as fake:
        server = connect(fake.url, timeout=0.3)
        given = client.answers(server, records, "{question}", max_new_tokens=4, clients=1)
        gate.set()
    assert given == [f"Item {row}" for row in range(4)]
    assert faults == {}


def test_a_record_that_the_server_hangs_up_on_or_answers_late_is_named(antgmm, data, monkeypatch):
    """Servers hang up while they are sent more than they take, before their status is read."""
    monkeypatch.setattr(client, "PAUSES", (0.0,))
    gate = threading.Event()

    def reply(body):
        if number(body) == 2:
            raise ConnectionError
        return completion("x")

    with serving(reply) as fake:

        def complaint(*words):
            result = antgmm("eval", "--data", data, "--url", fake.url, "--clients", "1", *words)
            assert (result.exit_code, result.stdout) == (2, "")
            return result.stderr.splitlines()[-1].removeprefix(f"error: record r2: {fake.url}/chat/completions ")

        remedy = "see its log, or raise its limit of the size of a request, or make the pictures smaller"
        shown = complaint()
        assert shown.startswith("hung up (") and shown.endswith(f"): {remedy}")
        fake.reply = lambda body: (number(body) == 2 and gate.wait(5)) or completion("x")
        shown = complaint("--timeout", "0.5")
        gate.set()
    assert shown.startswith("has not answered in 0.5 s: use fewer --clients")


def test_a_url_without_the_end_of_the_interface_and_a_missing_key_are_named(refused, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: completion("a")) as fake:
        whole, fake.url = fake.url, fake.url.removesuffix("/v1")
        complaint = refused("eval", "--data", "jsonl:none.jsonl", "--url", fake.url)
        assert complaint.startswith(f"{fake.url}/models refuses the request with status 404 ")
        assert complaint.endswith(": correct --url, which usually ends with /v1")
        fake.key = "secret"
        complaint = refused("eval", "--data", "jsonl:none.jsonl", "--url", whole)
    assert complaint.startswith(f"{whole}/models refuses the request with status 401 ")
    assert complaint.endswith(": set OPENAI_API_KEY to the key of the server")


def test_answers_that_the_server_ended_at_its_own_limit_are_counted(antgmm, data):
    """They count as wrong although the model is right, as those at the limit that was asked for may do."""

    def reply(body):
        tokens = 2 if number(body) < 2 else body["max_tokens"]
        (choice,) = completion("Item")["choices"]
        return {"choices": [{**choice, "finish_reason": "length"}], "usage": {"completion_tokens": tokens}}

    with serving(reply) as fake:
        shown = antgmm("eval", "--data", data, "--url", fake.url, "--max-new-tokens", "5").stderr
    line = "2 of 5 answers were ended by the server after 2 tokens, before --max-new-tokens 5: start it with a higher"
    assert f"{line} limit\n" in shown
    assert "3 of 5 answers were cut at --max-new-tokens 5: give more if right ones are longer\n" in shown


def test_without_a_model_the_longest_right_answer_can_be_given(antgmm, data, tmp_path):
    """A tokenizer makes at most one token of a byte."""
    rows = [{**row, "answer": f"цена {'9' * 60}" if number else "a"} for number, row in enumerate(ROWS)]
    asked = {}
    with serving(lambda body: completion("x")) as fake:
        for name, some in (("long", rows), ("short", rows[:1])):
            (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, some)))
            result = antgmm("eval", "--data", data, "--url", fake.url)
            assert (result.exit_code, "were cut" in result.stderr) == (0, False)
            asked[name] = {body["max_tokens"] for body in fake.bodies}
            fake.bodies.clear()
    assert asked == {"long": {len(rows[1]["answer"].encode()) + 2}, "short": {32}}


def test_an_answer_without_content_is_empty(antgmm, data, tmp_path):
    """Servers that take thoughts apart send null for an answer that is no more than one."""
    with serving(lambda body: completion(None)) as fake:
        assert antgmm("eval", "--data", data, "--url", fake.url, "--answers", "a.jsonl").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows and {row["answer"] for row in rows} == {""}


def test_invalid_rows_and_places_are_named_before_the_first_request(antgmm, data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    valid = rows.read_text()
    with serving(lambda body: completion("a")) as fake:

        def complaint(*words):
            result = antgmm("eval", "--data", data, "--url", fake.url, *words)
            assert (result.exit_code, result.stdout) == (2, "")
            return next(line for line in result.stderr.splitlines() if line.startswith("error: "))

        (tmp_path / "file").touch()
        assert "file is no folder that can be written to" in complaint("--answers", "file/a.jsonl")
        assert "samples = 9: reduce samples" in complaint("--samples", "9")
        rows.write_text(valid.replace(ROWS[3]["image"], "none.png"))
        assert "1 of 5 rows are invalid; correct or remove them" in complaint()
        rows.write_text("")
        assert "rows.jsonl has no rows" in complaint()
    assert fake.bodies == []


def test_a_server_that_is_down_is_named_before_the_data_is_read(refused):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        complaint = refused("eval", "--data", "jsonl:none.jsonl", "--url", url)
    assert complaint.startswith(f"{url}/models cannot be reached (")
    assert complaint.endswith("): start the server, or correct --url")


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "file:///etc/passwd", "http:///v1", "http://a b/v1"])
def test_a_url_of_another_form_is_refused(url):
    with pytest.raises(AntgmmError, match=r"write it as http://HOST:PORT/v1"):
        connect(url)


@pytest.mark.parametrize("url", ["http://me:SECRET@a/v1", "http://a/v1?api_key=SECRET", "http://a/v1#SECRET"])
def test_a_secret_in_a_url_is_refused_and_not_printed(antgmm, data, url):
    result = antgmm("eval", "--data", data, "--url", url)
    assert result.exit_code == 2
    assert "without user, password or query" in result.stderr
    assert "SECRET" not in result.output


def test_a_redirect_is_not_followed():
    with serving(lambda body: completion("x")) as fake:
        server = connect(fake.url)
        fake.status, fake.location = 302, "http://elsewhere/v1"
        with pytest.raises(AntgmmError, match=r"status 302 \(it is at 'http://elsewhere/v1': name that as --url\)"):
            client.answer(server, request_messages(Record(images=(), question="q", answer="")), 4)
        assert len(fake.bodies) == 1


def test_the_model_of_a_server_with_several_must_be_named():
    with serving(lambda body: completion("x"), names=("a", "b")) as fake:
        assert connect(fake.url + "/", model="b") == Server(fake.url, "b", 120.0)
        for name in ("", "c"):
            with pytest.raises(AntgmmError, match=r"serves 'a', 'b': name one of them with --served-model"):
                connect(fake.url, model=name)
    with serving(lambda body: completion("x"), names=()) as fake, pytest.raises(AntgmmError, match="not the OpenAI"):
        connect(fake.url)


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://127.0.0.1:0/v1"])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(AntgmmError, match=r"cannot be reached|write it as http"):
        connect(url)


@pytest.mark.parametrize("begin", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 500 Oops\r\nX: "])
def test_a_server_that_writes_byte_by_byte_is_not_waited_for(begin):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(begin)
                with contextlib.suppress(OSError):  # the client has gone
                    for _ in range(40):
                        connection.sendall(b" ")
                        time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(AntgmmError, match=r"has not answered in 0.2 s"):
            connect(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.2)


def test_a_slow_server_is_not_waited_for():
    def slow(body):
        time.sleep(0.5)
        return completion("x")

    record = Record(images=(), question="what?", answer="")
    with serving(slow) as fake, pytest.raises(AntgmmError, match=r"has not answered in 0.2 s: use fewer --clients"):
        client.answer(Server(fake.url, "student", 0.2), request_messages(record), 1)


def test_a_conversation_keeps_its_turns_and_the_places_of_its_images():
    image = np.zeros((2, 3, 3), np.uint8)
    turns = (
        Turn("system", ("brief",)),
        Turn("user", ("see", None)),
        Turn("assistant", ("ok",)),
        Turn("user", ("so?",)),
    )
    messages = request_messages(Record(images=(image,), question="so?", answer="", turns=turns))
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in messages[1]["content"]] == ["text", "image_url"]


def test_eval_needs_a_model_or_a_server(refused, tmp_path):
    assert refused("eval", "--data", "jsonl:a") == "eval needs a checkpoint, --url with a running server, or both"
    words = ("eval", "m", "--data", "jsonl:a", "--answers", tmp_path)
    assert refused(*words) == f"--answers {tmp_path} is a folder: name a file"


def test_a_key_of_the_environment_is_sent_and_no_proxy_is_asked_for_this_machine(monkeypatch):
    seen = []

    class Noting(_Handler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            super().do_GET()

    fake = Fake(None)
    fake.RequestHandlerClass = Noting
    thread = threading.Thread(target=fake.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv(client.KEY, raising=False)
        connect(fake.url)
        monkeypatch.setenv(client.KEY, "secret")
        connect(fake.url)
    finally:
        fake.shutdown()
        fake.server_close()
        thread.join()
    assert seen == [None, "Bearer secret"]
    assert client._near(fake.url) and not client._near("http://127.0.0.2.example/v1")
    monkeypatch.setenv(client.KEY, "a\rb")
    with pytest.raises(AntgmmError, match="^OPENAI_API_KEY holds signs that no key has: set it again$"):
        connect(fake.url)
