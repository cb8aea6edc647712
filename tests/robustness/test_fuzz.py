"""A short round of the fuzzer: `make soak` does a long one."""

import random

import pytest

from tests.robustness.fuzzing import fuzz, targets

CASES = {"pictures": 40, "with decoder": 24, "with encoder": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("seed", [0])
def test_damaged_files_are_one_line(made, tmp_path, seed):
    for name, target in made.items():
        folder = tmp_path / name
        folder.mkdir()
        for case in range(CASES.get(name, 24)):
            fuzz(target, folder, random.Random(f"{seed} {name} {case}"))
