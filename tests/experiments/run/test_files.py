"""Files that appear whole."""

import json
import math

import numpy as np
import pytest

from experiments.run.files import write_json


def test_numbers_that_json_lacks_are_null(tmp_path):
    value = {"loss": math.nan, "rates": [-math.inf, np.float32(0.5)], "sizes": {1: (True, None, "NaN")}}
    write_json(tmp_path / "figures.json", value)
    read = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert read == {"loss": None, "rates": [None, 0.5], "sizes": {"1": [True, None, "NaN"]}}
