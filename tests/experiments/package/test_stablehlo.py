"""A .stablehlo package answers as JAX decodes, stores weights once, and is read without this project."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from antgmm_jax.decoding import generate
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import inputs as inputs_of
from antgmm_jax.io.convert import load_hf, save_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.presets import preset
from data.record import Record
from experiments.package import loader
from experiments.package.build import Form, build, example, longest
from experiments.package.requests import Limits, Shape, taken
from experiments.package.stablehlo import stablehlo
from experiments.run.export.in_torch import split, stop_at, torch_answers, torch_gap, torch_logits, torch_model
from experiments.run.rows.samples import Samples
from tests.experiments.package.prompts import QUESTION, prompts, shapes, tiled
from tests.experiments.tiny import save_llava, save_smolvlm, save_teacher
from tests.marks import long

TOKENS = 5
NEVER = 999_999  # no token of the models
LLAVA = (save_llava, prompts)
ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"antgmm_jax", "experiments", "torch", "flax"}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import loader, numpy

package = loader.Package("student.stablehlo")
print(json.dumps(package(dict(numpy.load("request.npz"))).tolist()))
"""


class Packaged(NamedTuple):
    """Folder of student.stablehlo, the Hugging Face directory, config and parameters, and a batch with prompts."""

    folder: Path
    directory: Path
    model: tuple[Any, Any]
    batch: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[
        long((save_teacher, prompts)),
        LLAVA,
        long((save_smolvlm, tiled)),
    ],
    ids=["blip2", "llava", "smolvlm"],
)
def packaged(request, tmp_path_factory):
    """A package for the shapes of some prompts."""
    (save, batch_of), folder = request.param, tmp_path_factory.mktemp("packaged")
    directory = save(folder / "model")
    model = load_hf(directory)
    batch = batch_of(directory, TOKENS)
    form = stablehlo(directory, *model, Limits(TOKENS, (NEVER,), 0))
    result = build(folder / "student.stablehlo", [batch], shapes(batch), form)
    assert (result.prompts, result.equal, result.ties) == (6, 6, 0)
    assert {path.name for path in folder.iterdir()} >= {"model", "student.stablehlo"}
    assert not [*folder.glob("*.tmp"), *folder.glob(".*")]
    return Packaged(folder, directory, model, batch)


def as_processed(directory, rows=1):
    """The Hugging Face processor's outputs for pictures with a question, and the same as prompts of JAX."""
    config, _ = load_hf(directory)
    processor = load_processor(directory)
    reads = inputs_of(config, processor)
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 40, 40, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": f"question: {QUESTION}"}]
    text = reads.chat([{"role": "user", "content": content}])
    pictures = [[Image.fromarray(one)] for one in pixels]
    out = processor(images=pictures, text=[text] * rows, return_tensors="np")
    ids, images = zip(*[reads(text, [one]) for one in pixels], strict=True)
    tree = jax.tree.map(lambda *leaves: np.stack(leaves), *images)
    tree["valid"] = np.ones(tree["pixels"].shape[:2], bool)
    prompt = {"images": tree, "input_ids": np.stack(ids), "attention_mask": np.ones((rows, len(ids[0])), np.int32)}
    return dict(out), prompt


def test_it_answers_the_processors_outputs_as_jax_does(packaged):
    folder, directory, (config, params), _ = packaged
    request, prompt = as_processed(directory)
    wanted = np.asarray(generate(config, params, prompt, max_new_tokens=TOKENS, eos=NEVER, pad=0))
    package = loader.Package(folder / "student.stablehlo")
    np.testing.assert_array_equal(package(request), wanted)
    assert package.about["side"] == ("right" if config.encoder_decoder else "left")


def test_answers_and_logits_are_those_of_pytorch(packaged):
    folder, directory, model, batch = packaged
    inputs, prompt = split(batch)
    form, reference = stablehlo(directory, *model, Limits(TOKENS, (NEVER,), 0)), torch_model(directory)
    stop_at(reference, eos=NEVER, pad=0)
    target = batch["targets"][:, :, None] != -100
    wanted = torch_logits(reference, inputs, batch)
    np.testing.assert_allclose(np.where(target, form.logits(batch), 0.0), wanted, rtol=1e-4, atol=1e-4)
    answer = form.load(folder / "student.stablehlo", shapes(batch)[0])
    given = answer(taken(prompt, np.arange(2)))
    np.testing.assert_array_equal(given, torch_answers(reference, prompt, TOKENS, 0)[:2])


def test_weights_are_stored_once_and_programs_hold_none(packaged):
    folder, _, (_, params), batch = packaged
    leaves = jax.tree.leaves(params)
    with safe_open(folder / "student.stablehlo", "numpy") as file:
        sizes = {name: file.get_tensor(name).size for name in file.keys()}  # noqa: SIM118
    weights = [size for name, size in sizes.items() if name.startswith(loader.WEIGHTS)]
    assert sorted(weights) == sorted(leaf.size for leaf in leaves)
    programs = {name for name in sizes if name.startswith(loader.PROGRAM)}
    assert programs == {f"program/{shape}" for shape in shapes(batch)}
    largest = max(leaf.nbytes for leaf in leaves)
    assert all(sizes[name] < largest + 100_000 for name in programs)


def test_a_process_without_this_project_loads_it(packaged, tmp_path):
    folder, directory, (config, params), _ = packaged
    request, prompt = as_processed(directory)
    (tmp_path / "student.stablehlo").symlink_to(folder / "student.stablehlo")
    shutil.copyfile(loader.__file__, tmp_path / "loader.py")
    np.savez(tmp_path / "request.npz", **{name: value for name, value in request.items() if value is not None})
    alone = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    wanted = np.asarray(generate(config, params, prompt, max_new_tokens=TOKENS, eos=NEVER, pad=0))
    assert json.loads(alone.stdout) == wanted.tolist()


def test_smaller_requests_are_padded_to_the_program(packaged):
    folder, directory, _, batch = packaged
    package = loader.Package(folder / "student.stablehlo")
    one, _ = as_processed(directory)
    three, _ = as_processed(directory, rows=3)
    two = {name: np.asarray(values)[: 2 * len(values) // 3] for name, values in three.items()}
    np.testing.assert_array_equal(package(one), package(two)[:1])
    only = ", ".join(f"{rows} x {width}" for rows, width in sorted(shapes(batch)))
    with pytest.raises(ValueError, match=rf"no program for 3 x \d+ tokens, only for {only}: .*--batch 3"):
        package(three)


def test_a_width_that_is_missing_is_one_line(packaged, tmp_path):
    folder, directory, model, batch = packaged
    package = loader.Package(folder / "student.stablehlo")
    needed = longest([batch])
    more = needed + 20
    wide = {name: np.ones((1, more), np.int32) for name in ("input_ids", "attention_mask")}
    with pytest.raises(
        ValueError, match=f"no program for 1 x {more} tokens, only for .*: package it with --batch 1 --width {more}"
    ):
        package(wide)
    form = stablehlo(directory, *model, Limits(TOKENS, (NEVER,), 0))
    with pytest.raises(AntgmmError, match=f"the longest prompt has {needed} tokens: add --width {needed}"):
        build(tmp_path / "a.stablehlo", [batch], [Shape(1, needed - 1)], form)
    with pytest.raises(AntgmmError, match="no prompt has at most 3 tokens: leave out --width 3"):
        build(tmp_path / "a.stablehlo", [batch], [Shape(1, needed), Shape(1, 3)], form)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("packaged", [LLAVA], indirect=True, ids=["llava"])
@pytest.mark.parametrize("place", [0, 9, 2000, -1])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_file_is_one_line(packaged, tmp_path, place, cut):
    content = bytearray((packaged[0] / "student.stablehlo").read_bytes())
    content[place] ^= 0x15
    (tmp_path / "a.stablehlo").write_bytes(content[:place] if cut else content)
    with pytest.raises(ValueError, match=r"a\.stablehlo is .*damaged.*: package it again$") as error:
        loader.Package(tmp_path / "a.stablehlo")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packaged", [LLAVA], indirect=True, ids=["llava"])
@pytest.mark.parametrize("word", [b"left", b"side", b"image_token"])
def test_changed_metadata_is_damage(packaged, tmp_path, word):
    content = (packaged[0] / "student.stablehlo").read_bytes()
    (tmp_path / "a.stablehlo").write_bytes(content.replace(word, b"m" + word[1:], 1))
    with pytest.raises(ValueError, match=r"a\.stablehlo is damaged at its metadata: package it again"):
        loader.Package(tmp_path / "a.stablehlo")


@pytest.mark.parametrize("sums", ["[]", "null", "5", "[" * 100_000, "{"])
def test_what_is_no_package_is_one_line(tmp_path, sums):
    save_file({}, tmp_path / "a.stablehlo", {loader.CHECKSUMS: sums})
    for file in (tmp_path / "a.stablehlo", tmp_path / "absent"):
        with pytest.raises(
            ValueError, match=r"(is no package, or damaged|is damaged at its metadata).*: package it again$"
        ):
            loader.Package(file)


@pytest.mark.parametrize("packaged", [LLAVA], indirect=True, ids=["llava"])
def test_a_request_without_pictures_is_one_line(packaged):
    package = loader.Package(packaged[0] / "student.stablehlo")
    request, _ = as_processed(packaged[1])
    del request["pixel_values"]
    with pytest.raises(ValueError, match="the request has no pixel_values"):
        package(request)


def test_a_request_of_words_alone_needs_no_pictures(packaged):
    folder, _, (config, params), batch = packaged
    prompt = split(batch)[1]
    words = {name: np.asarray(prompt[name])[1:2, -6:] for name in ("input_ids", "attention_mask")}
    bare = {**words, "images": {"valid": np.zeros((1, 0), bool)}}
    wanted = np.asarray(generate(config, params, bare, max_new_tokens=TOKENS, eos=NEVER, pad=0))
    np.testing.assert_array_equal(loader.Package(folder / "student.stablehlo")(words), wanted)


def test_more_images_in_a_row_than_a_program_has_room_for_are_one_line(packaged):
    folder, _, (config, _), batch = packaged
    prompt = split(batch)[1]
    used = (prompt["input_ids"] == config.image_token).sum(axis=1)
    ids, slots = np.array(prompt["input_ids"][[used.argmax()]]), used.max() // config.image_tokens
    ids[0, np.flatnonzero(ids[0] != config.image_token)[-config.image_tokens :]] = config.image_token
    sizes = (slots + 1,) if config.family != "idefics3" else (1, slots + 1)
    request = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": np.zeros((*sizes, 3, 32, 32))}
    with pytest.raises(ValueError, match=f"takes {slots} images in a row, the request has {slots + 1}: .*such$"):
        loader.Package(folder / "student.stablehlo")(request)


@pytest.mark.parametrize("packaged", [LLAVA], indirect=True, ids=["llava"])
def test_a_larger_program_that_has_room_for_the_images_is_taken(packaged, tmp_path):
    _, directory, (config, params), _ = packaged
    pictures = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    processor, texts = load_processor(directory), ("price " * 12, "price " * 24)

    def record(count, question):
        return Record(images=(*pictures[:count],), question=question, answer="yes")

    batches = [
        next(Samples([record(*one)], processor, config).in_order(1, prompts=True))
        for one in zip((1, 2), texts, strict=True)
    ]
    form = stablehlo(directory, config, params, Limits(TOKENS, (NEVER,), 0))
    shapes = [Shape(1, longest([batch])) for batch in batches]
    form.write({shape: example(batches[:row], shape, left=True) for row, shape in enumerate(shapes, 1)}, tmp_path / "a")
    reads = inputs_of(config, processor)
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": "price"}]
    text = reads.chat([{"role": "user", "content": content}])
    request = processor(images=[[*map(Image.fromarray, pictures)]], text=[text], return_tensors="np")
    ids, tree = reads(text, [*pictures])
    assert len(ids) <= min(shape.width for shape in shapes)
    images = {**{name: leaf[None] for name, leaf in tree.items()}, "valid": np.ones((1, 2), bool)}
    prompt = {"images": images, "input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int32)}
    wanted = np.asarray(generate(config, params, prompt, max_new_tokens=TOKENS, eos=NEVER, pad=0))
    np.testing.assert_array_equal(loader.Package(tmp_path / "a")(dict(request)), wanted)


def test_gaps_of_ties_are_those_of_pytorch(packaged):
    _, directory, model, batch = packaged
    prompt = split(batch)[1]
    form, reference = stablehlo(directory, *model, Limits(TOKENS, (NEVER,), 0)), torch_model(directory)
    for row, step in ((0, 0), (1, 3)):
        one = taken(prompt, np.array([row]))
        np.testing.assert_allclose(form.gap(one, step, (7, 9)), torch_gap(reference, one, step, (7, 9)), atol=1e-5)


@pytest.mark.parametrize("save", [save_llava, save_smolvlm])
def test_an_image_token_of_an_answer_is_a_word(tmp_path, save):
    config, params = load_hf(save(tmp_path / "model"))
    prompt = taken(split(prompts(tmp_path / "model", TOKENS))[1], np.arange(1))
    (first,) = np.asarray(generate(config, params, prompt, max_new_tokens=1, eos=NEVER, pad=0))[0]
    head = np.array(params["language"]["out"])
    head[:, [first, config.image_token]] = head[:, [config.image_token, first]]
    params["language"]["out"] = head
    directory = tmp_path / "swapped"
    save_hf(config, params, directory)
    form, reference = stablehlo(directory, config, params, Limits(TOKENS, (NEVER,), 0)), torch_model(directory)
    stop_at(reference, eos=NEVER, pad=0)
    assert form.answers(prompt)[0, 0] == config.image_token
    for step in range(1, TOKENS):
        wanted = torch_gap(reference, prompt, step, (7, 9))
        np.testing.assert_allclose(form.gap(prompt, step, (7, 9)), wanted, atol=1e-5)
    ended = stablehlo(directory, config, params, Limits(TOKENS, (config.image_token,), 0))
    assert (ended.gap(prompt, 0, (7, 9)) < np.inf) and ended.gap(prompt, 1, (7, 9)) == np.inf


@pytest.mark.parametrize(("gap", "equal"), [(0.0, True), (1.9e-5, True), (2.1e-5, False), (float("nan"), False)])
def test_answers_that_differ_pass_after_a_tie_only(tmp_path, gap, equal):
    text = {f"prompt/{name}": np.ones((2, 4), np.int32) for name in ("input_ids", "attention_mask")}
    batch = {"images": {"valid": np.ones((2, 1), bool)}, "input_ids": text["prompt/input_ids"], **text}
    batch["index"] = np.arange(2)
    form = Form(
        engine="reference",
        left=True,
        answers=lambda prompt: np.array([[5, 6, 0], [5, 7, 0]]),
        logits=lambda batch: np.full((2, 1, 8), 0.5),
        gap=lambda prompt, step, ids: gap if (step, ids) == (1, (9, 7)) else np.inf,
        write=lambda examples, file: file.write_bytes(b"programs"),
        load=lambda file, shape: lambda prompt: np.array([[5, 6, 0], [5, 9, 0]]),
        requests=lambda file, shape, prompt: {},
    )
    out = tmp_path / "a.stablehlo"
    if equal:
        assert build(out, [batch], [Shape(2, 4)], form)[:3] == (2, 2, 1)
        assert out.read_bytes() == b"programs"
        copied = {**batch, "index": np.array([3, 3])}  # the last row fills up a batch
        assert build(tmp_path / "b.stablehlo", [copied], [Shape(2, 4)], form)[:3] == (1, 1, 0)
    else:
        with pytest.raises(AntgmmError, match=r"not written: an answer differs: \[5, 9, 0\], reference: \[5, 7, 0\]"):
            build(out, [batch], [Shape(2, 4)], form)
        assert not [*tmp_path.iterdir()]


def test_the_example_of_a_shape_has_pictures_if_a_prompt_has():
    def batch(slots, used, lengths):
        mask = (np.arange(6)[None, :] < np.array(lengths)[:, None]).astype(np.int32)
        text = {"input_ids": np.arange(len(used), dtype=np.int32)[:, None] * mask, "attention_mask": mask}
        valid = np.arange(slots)[None, :] < np.array(used)[:, None]
        return {"images": {"valid": valid}, **text, **{f"prompt/{name}": rows for name, rows in text.items()}}

    batches = [batch(5, (0, 5), (3, 6)), batch(3, (0, 1, 3), (4, 4, 4))]
    narrow, wide = (example(batches, shape, left=False) for shape in (Shape(2, 4), Shape(1, 6)))
    assert narrow["images"]["valid"].sum(axis=1).tolist() == [3, 1]
    assert narrow["input_ids"].tolist() == [[2] * 4, [1] * 4]
    assert wide["images"]["valid"].tolist() == [[True] * 5]


@pytest.mark.parametrize(
    ("name", "servers"), [("qwen3-vl-tiny", "vLLM or antgmm serve"), ("instructblip-tiny", "antgmm serve")]
)
def test_a_family_with_places_or_text_is_refused_and_what_serves_it_is_named(name, servers, tmp_path):
    kind = preset(name)
    with pytest.raises(AntgmmError) as refused:
        stablehlo(tmp_path, kind, {}, Limits(TOKENS, (NEVER,), 0))
    assert str(refused.value) == (
        f"a {kind.family} has no .stablehlo package: its images have places or text of their own;"
        f" serve the files with {servers}"
    )
