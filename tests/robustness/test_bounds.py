"""Numbers of config files have bounds, which every preset of this package keeps."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.bounds import check_model_config, check_processor_config, check_replacements
from antgmm_jax.io.convert import open_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import PRESETS, preset
from data.encoding import Encoder
from data.record import Record
from tests.experiments.tiny import save_llava


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_within_the_bounds(name):
    config = preset(name)
    check_model_config(Path("config.json"), family(config).to_hf(config))


def test_processors_of_released_models_are_within_the_bounds():
    pixels = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "merge_size": 2}
    squares = {"crop_size": {"height": 896, "width": 896}, "image_seq_length": 256, "image_mean": [0.5, 0.5, 0.5]}
    videos = {"video_processor": {"max_video_tokens": 128_000, "total_pixels": 90_316_800}}
    for content in (pixels, {"image_processor": pixels}, squares, videos, {"model_max_length": 10**30}):
        check_processor_config(Path("processor_config.json"), content)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"num_hidden_layers": 1e9}),
        ("config.json", {"vocab_size": 2**40}),
        ("config.json", {"rope_theta": float("inf")}),
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 32}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1 << 20}}),
        ("processor_config.json", {"image_seq_length": 10**8}),
    ],
)
def test_a_number_out_of_bounds_is_one_line_at_once(tmp_path, file, fields):
    directory = save_llava(tmp_path / "model")
    path = directory / file
    content = json.loads(path.read_text()) if path.exists() else {}
    inner = content["text_config"] if file == "config.json" else content
    inner.update(fields)
    path.write_text(json.dumps(content))
    begin = time.monotonic()
    with pytest.raises(AntgmmError, match=rf"{file}: .* is supported: correct it"):
        (open_hf if file == "config.json" else load_processor)(directory)
    assert time.monotonic() - begin < 20


def test_a_negative_size_is_one_line(tmp_path):
    directory = save_llava(tmp_path / "model")
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["intermediate_size"] *= -1
    path.write_text(json.dumps(content))
    with pytest.raises(AntgmmError, match=r"config\.json cannot be used .*shape"):
        open_hf(directory)


def with_tokenizer(directory, part):
    """Changes parts of tokenizer.json."""
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | part))
    return directory


@pytest.mark.parametrize("key", ["normalizer", "n\\u006Frmalizer", "decoder"])
def test_a_tokenizer_that_doubles_its_text_is_refused_before_it_is_loaded(tmp_path, key):
    double, plain = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, key.replace("\\u006F", "o")
    doubles = {"type": "Sequence", f"{plain}s": [double] * 40}
    directory = with_tokenizer(save_llava(tmp_path / "model"), {plain: doubles})
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"{plain}"', f'"{key}"'))
    with pytest.raises(AntgmmError, match=r"tokenizer\.json: its .* makes a text 1.1e\+12 times longer: correct it"):
        load_processor(directory)


def test_normalizers_of_released_tokenizers_are_accepted(tmp_path):
    path = tmp_path / "tokenizer.json"
    llama = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    siglip = [{"type": "Precompiled"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    digits = [{"type": "Replace", "pattern": {"Regex": r"(?<=\p{L})[0-9](?=[0-9]{2})"}, "content": "x"}] * 40
    for parts in (llama, siglip, digits, [{"type": "NFC"}]):
        path.write_text(json.dumps({"normalizer": {"normalizers": parts}, "model": {"vocab": {"normalizer": 7}}}))
        check_replacements(path)
    path.write_text(json.dumps({"normalizer": None}))
    check_replacements(path)


@pytest.mark.filterwarnings("ignore")
def test_a_pattern_that_never_ends_is_one_line(tmp_path, capfd):
    """Oniguruma gives up after ten million steps, and the Rust library panics."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    directory = with_tokenizer(save_llava(tmp_path / "model"), {"pre_tokenizer": split})
    encoder = Encoder(load_processor(directory), open_hf(directory)[0])
    record = Record(id="row 3", images=(np.zeros((32, 32, 3), np.uint8),), question="x" * 60, answer="red")
    with pytest.raises(AntgmmError, match=r"^row 3: the tokenizer fails .*: correct the patterns in its tokenizer"):
        encoder(record)


def test_a_config_with_a_hundred_thousand_lists_is_one_line(tmp_path):
    directory = save_llava(tmp_path / "model")
    path = directory / "config.json"
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "zz": [' + "[]," * 100_000 + "0]}")
    with pytest.raises(AntgmmError, match=r"config\.json has over 100000 lists and objects"):
        open_hf(directory)


def test_a_wavelength_must_be_positive(tmp_path):
    directory = save_llava(tmp_path / "model")
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content["text_config"]["rope_theta"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(AntgmmError, match=r"rope_theta = 0, it must be positive"):
        open_hf(directory)


def test_an_empty_unknown_token_is_one_line(tmp_path):
    """It is in no vocabulary, and transformers takes the id of the unknown token for it, without an end."""
    directory = save_llava(tmp_path / "model")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unk_token": ""}))
    with pytest.raises(AntgmmError, match="unk_token '' is not in the vocabulary: correct tokenizer_config"):
        load_processor(directory)
