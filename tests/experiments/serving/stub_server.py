"""A server as of `antgmm serve`, with a model that answers in capitals: it needs neither files nor PyTorch."""

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[3]


class Question:
    def __init__(self, messages, images, most):
        self.text = messages[-1]["content"][-1]["text"]


class ModelError(Exception):
    pass


def answers(questions):
    time.sleep(0.01)
    return [SimpleNamespace(text=question.text.upper(), ended=True, read=1, written=1) for question in questions]


def load(directory, **limits):
    return SimpleNamespace(question=Question, answers=answers)


# Also in the process that answers, which imports this file.
sys.path.insert(0, str(ROOT))
stub = sys.modules["experiments.serving.batches"] = ModuleType("experiments.serving.batches")
stub.Question, stub.Answer, stub.Model, stub.load = Question, SimpleNamespace, SimpleNamespace, load
stub.ModelError = ModelError

from antgmm_jax.errors import AntgmmError  # noqa: E402
from experiments.serving.server import Answers, serve  # noqa: E402

if __name__ == "__main__":
    api = Answers(Path("model"), "student", max_new_tokens=4, most=8, wait=0.01)
    try:
        serve(api, "student", host="127.0.0.1", port=int(sys.argv[1]), timeout=20)
    except AntgmmError as error:  # as the command line
        raise SystemExit(f"error: {error}") from None
