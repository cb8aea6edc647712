"""The programs of a package answer as `generate` of transformers does, with and without padding."""

import json
import subprocess
import sys
from shutil import which

import numpy as np
import pytest
import torch

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.convert import load_hf
from antgmm_jax.presets import preset
from experiments.package.build import build
from experiments.package.programs import Next, Start, generating
from experiments.package.pytorch import Answerer, described, pytorch
from experiments.package.requests import Limits, Shape, fitted, taken
from experiments.run.export.in_torch import split, stop_at, torch_answers, torch_model, torch_tensors
from tests.experiments.package.prompts import prompts
from tests.experiments.tiny import save_gemma3, save_llava, save_smolvlm, save_teacher

TOKENS = 5
NEVER = 999_999  # no token of the models
ALONE = """
import sys
import torch
from torch._inductor.package import load_package

start, step = (load_package("student.pt2", part + "_2x24") for part in ("start", "next"))
inputs, tokens = torch.load("inputs.pt"), int(start.get_metadata()["tokens"])
shapes = ((name, str(x.dtype)[6:], "x".join(map(str, x.shape))) for name, x in inputs.items())
assert ", ".join(sorted(map(" ".join, shapes))) == start.get_metadata()["inputs"]
token, state = start(**dict(reversed(inputs.items())))
answer = [token]
while len(answer) < tokens:
    token, state = step(token, torch.tensor(len(answer)), state)
    answer.append(token)
assert not {"antgmm_jax", "experiments", "jax", "transformers"} & set(sys.modules)
print(torch.stack(answer, 1).tolist())
"""


@pytest.mark.parametrize("save", [save_teacher, save_llava, save_smolvlm, save_gemma3])
def test_programs_answer_as_generate(tmp_path, save):
    directory = save(tmp_path / "model")
    prompt, model = split(prompts(directory, TOKENS))[1], torch_model(directory)
    stop_at(model, eos=NEVER, pad=0)
    wanted = torch_answers(model, prompt, TOKENS, 0)
    left = not generating(model).config.is_encoder_decoder
    inputs = torch_tensors(model, fitted(prompt, prompt["input_ids"].shape[1] + 3, left=left))
    start, step = Start(model, TOKENS), Next(generating(model), TOKENS)
    with torch.no_grad():
        token, state = start(**inputs)
        answer = [token]
        while len(answer) < TOKENS:
            token, state = step(token, torch.tensor(len(answer)), state)
            answer.append(token)
    np.testing.assert_array_equal(torch.stack(answer, 1).numpy(), wanted)


@pytest.mark.long
@pytest.mark.skipif(not which("g++"), reason="AOTInductor compiles with g++")
def test_a_package_runs_without_this_project(tmp_path):
    directory = save_llava(tmp_path / "model")
    batch = prompts(directory, TOKENS)
    limits = Limits(TOKENS, (NEVER,), 0)
    form = pytorch(directory, *load_hf(directory), limits)
    result = build(tmp_path / "student.pt2", [batch], [Shape(2, 24)], form)
    assert (result.prompts, result.equal) == (3, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "student.pt2"}
    model = torch_model(directory)
    stop_at(model, eos=NEVER, pad=0)
    prompt = fitted(taken(split(batch)[1], np.arange(2)), 24, left=True)
    torch.save(torch_tensors(model, prompt), tmp_path / "inputs.pt")
    alone = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(alone.stdout) == torch_answers(model, prompt, TOKENS, 0).tolist()
    narrow = torch_tensors(model, fitted(taken(split(batch)[1], np.arange(1)), 24, left=True))
    with pytest.raises(
        AntgmmError, match=r"a \.pt2 program reads .*input_ids int64 2x24.* have .*input_ids int64 1x24"
    ):
        Answerer.load(tmp_path / "student.pt2", Shape(2, 24))(narrow)


def test_a_tensor_on_another_device_is_not_that_of_a_program():
    """A program compiled for the CPU would read the address of the other device's memory."""
    tensors = {"input_ids": torch.zeros((2, 3), dtype=torch.int64), "pixels": torch.zeros(4, device="meta")}
    assert described(tensors) == "input_ids int64 2x3, pixels float32 4 on meta"


def test_positions_of_three_axes_are_refused(tmp_path):
    with pytest.raises(AntgmmError, match="a qwen2_5_vl has no .pt2 package"):
        pytorch(tmp_path, preset("qwen2.5-vl-tiny"), {}, Limits(TOKENS, (NEVER,), 0))
