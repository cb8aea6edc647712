"""Stored image features replace pictures; scores do not depend on the order of the questions."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import data.maad as maad
import pruning
from antgmm_jax.axes import sizes
from antgmm_jax.config import towers
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import family
from antgmm_jax.io.convert import load_hf
from antgmm_jax.io.loading import load_processor
from antgmm_jax.parallel import preemption
from antgmm_jax.presets import preset
from antgmm_jax.pure import functional
from data.encoding import decode
from data.shifting import shifted
from distill import LossConfig, StepConfig
from experiments.run import features as image_side
from experiments.run.cuts import reads_features, weighs_tokens
from experiments.run.features import VIEWS, ImageFeatures, feature_bytes, freezes_features, image_features
from experiments.run.rows.samples import Samples
from experiments.run.schema import Stage
from experiments.run.scores.evaluation import evaluate, token_loss
from experiments.run.student import Student
from tests.experiments.tiny import save_llava, save_teacher, taken
from tests.marks import long

ROWS = 10
STEP = StepConfig(learning_rate=0.1, batch_size=4)


@pytest.fixture(scope="module", params=[long(save_teacher), save_llava], ids=["blip2", "llava"])
def model(request, tmp_path_factory):
    directory = request.param(tmp_path_factory.mktemp("m") / "teacher")
    config, params = load_hf(directory)
    processor = load_processor(directory)
    return config, params, processor, Samples(maad.source("s", "val", ROWS), processor, config)


@pytest.fixture
def talkative(model):
    """The model with twice its initial weights, so that its answers depend on the question."""
    config, params, processor, samples = model
    return config, jax.tree.map(lambda leaf: 2 * leaf, params), processor, samples


def every(features, row):
    """The features of a row in all views, [V, M, N, D]."""
    return np.stack([features[row, view] for view in range(features.count)])


def whole(features):
    """The features of all rows, [N, V, M, N, D]."""
    return np.stack([every(features, row) for row in range(ROWS)])


def test_features_and_pictures_give_equal_logits(model, tmp_path):
    config, params, _, samples = model
    features = image_features(config, params, samples, tmp_path / "features", batch_size=4)
    assert whole(features).shape[:3] == (ROWS, 1, 1)
    pictures, cached = (next(samples.shuffled(5, 2, features=given)) for given in (None, features))
    assert set(cached["images"]) == {"valid"}
    np.testing.assert_array_equal(pictures["index"], cached["index"])
    expected, got = (functional(config).apply(params, batch)["logits"] for batch in (pictures, cached))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_shifted_views_have_the_features_of_shifted_pictures(model, tmp_path):
    config, params, _, samples = model
    about = {"shift": 1, "seed": 3, "batch_size": 4}
    features = whole(image_features(config, params, samples, tmp_path / "one", **about))
    assert features.shape[:3] == (ROWS, VIEWS, 1)
    every = np.array([(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)])
    images, known = taken(samples, np.arange(ROWS))["images"], []
    for by in every:
        moved = {**images, "pixels": shifted(images["pixels"][:, 0], by[None].repeat(ROWS, 0))[:, None]}
        known.append(np.asarray(functional(config).features(params, moved)))
    gaps = np.abs(np.stack(known)[:, :, None] - features[None]).max(axis=(3, 4, 5))
    assert gaps.min(axis=0).max() < 1e-4
    assert len({*gaps.argmin(axis=0).reshape(-1).tolist()}) > 4
    again = image_features(config, params, samples, tmp_path / "two", **about)
    np.testing.assert_array_equal(features, whole(again))


def test_features_are_kept_until_the_image_side_changes(model, monkeypatch, tmp_path):
    config, params, _, samples = model
    made, compute = [], image_side.image_features
    monkeypatch.setattr(
        image_side, "image_features", lambda *given, **more: made.append(more) or compute(*given, **more)
    )
    cache = ImageFeatures(samples, 5, tmp_path)

    def features(config, params, *more, of=cache):
        return of(Student(config, lambda: params, {}), *more)

    first = features(config, params)
    values = whole(first)
    other = {**params, "language": jax.tree.map(lambda leaf: leaf + 1, params["language"])}
    assert features(config, other) is first and len(made) == 1
    axis = f"{[*towers(config)][-1]}/mlp"
    keep = pruning.plan(pruning.magnitude(params, config), config, {axis: sizes(config)[axis] // 2})
    assert features(*pruning.shrink(config, params, keep)) is first and len(made) == 1
    # Features are also kept after a restart.
    np.testing.assert_array_equal(whole(features(config, params, of=ImageFeatures(samples, 5, tmp_path))), values)
    assert len(made) == 1
    moved = {**params, "vision": jax.tree.map(lambda leaf: leaf * 1.5, params["vision"])}
    assert np.abs(whole(features(config, moved)) - values).max() > 1e-3
    assert len([*tmp_path.iterdir()]) == 1
    np.testing.assert_array_equal(whole(features(config, params)), values)
    assert whole(features(config, params, 1)).shape[1] == VIEWS
    about = {"seed": 5, "dtype": "float32"}
    assert made == [{"shift": 0, **about}] * 3 + [{"shift": 1, **about}]
    cache.drop()
    assert not [*tmp_path.iterdir()]
    features(config, params, 1)
    assert made[4:] == [{"shift": 1, **about}]
    half = whole(features(config, params, 1, "bfloat16"))  # half the disk, nearly the same values
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(half.astype(np.float32), whole(features(config, params, 1)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("error", [preemption.Preempted, KeyboardInterrupt])
def test_an_interrupted_computation_goes_on_where_it_ended(model, monkeypatch, tmp_path, error):
    config, params, _, samples = model
    about = {"shift": 1, "seed": 5, "batch_size": 4}
    expected = whole(image_features(config, params, samples, tmp_path / "whole", **about))
    points, read, pictures = [], [], samples.pictures

    def leave():
        points.append(1)
        if len(points) == 2:
            raise error

    def noted(*arguments):
        for index, batch in pictures(*arguments):
            read.append(index.tolist())
            yield index, batch

    monkeypatch.setattr(image_side.preemption, "leave", leave)
    monkeypatch.setattr(samples, "pictures", noted)
    with pytest.raises(error):
        image_features(config, params, samples, tmp_path / "cut", **about)
    assert not (tmp_path / "cut").exists()
    again = image_features(config, params, samples, tmp_path / "cut", **about)
    np.testing.assert_array_equal(whole(again), expected)
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_a_full_disk_is_refused_with_its_remedy(model, monkeypatch, tmp_path):
    config, params, _, samples = model
    monkeypatch.setattr(image_side.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(AntgmmError, match='free: make room, or set features = "recompute"'):
        image_features(config, params, samples, tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_rows_with_several_pictures_and_none_have_their_features(model, tmp_path):
    config, params, processor, samples = model
    records = [*maad.source("s", "val", 3)]
    many = tuple(record.images[0] for record in records)
    rows = [replace(records[0], images=many[:2]), replace(records[1], images=()), records[2]]
    several = Samples(rows, processor, config)
    features = image_features(config, params, several, tmp_path / "several", batch_size=2)
    alone = image_features(config, params, samples, tmp_path / "alone", batch_size=4)
    assert [every(features, row).shape[1] for row in range(3)] == [2, 0, 1]
    assert feature_bytes(config, several, 0, "float32") == sum(every(features, row).nbytes for row in range(3))
    assert feature_bytes(config, several, 1, "bfloat16") == VIEWS / 2 * feature_bytes(config, several, 0, "float32")
    for row, pictures in ((0, (0, 1)), (2, (2,))):
        for slot, picture in enumerate(pictures):
            np.testing.assert_allclose(features[row, 0][slot], alone[picture, 0][0], atol=1e-5, rtol=1e-5)
    pictures, cached = (next(several.shuffled(3, 2, features=given)) for given in (None, features))
    np.testing.assert_array_equal(pictures["images"]["valid"], cached["images"]["valid"])
    expected, got = (functional(config).apply(params, batch)["logits"] for batch in (pictures, cached))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "frozen", "constant"),
    [
        ("antgmm-tiny", ("vision", "bridge/stack", "bridge/norm", "bridge/queries"), True),
        ("antgmm-tiny", ("vision", "bridge"), True),
        ("antgmm-tiny", ("vision", "bridge/stack", "bridge/norm"), False),
        ("antgmm-tiny", ("vision/stack", "bridge"), False),
        ("antgmm-tiny", ("vis", "bridge"), False),
        ("antgmm-tiny", (), False),
        ("llava-tiny", ("vision",), True),
        ("llava-tiny", ("bridge",), False),
    ],
)
def test_features_are_constant_if_their_parameters_are_frozen(name, frozen, constant):
    assert freezes_features(preset(name), frozen) is constant


@pytest.mark.parametrize(
    ("name", "cut", "reads"),
    [
        # The width of LLaVA's language model is that of its bridge too, which reads the features.
        ("llava-tiny", {"text/embed": 64}, True),
        ("llava-tiny", {"vision/mlp": 64}, False),
        ("antgmm-tiny", {"text/embed": 64}, True),
        ("antgmm-tiny", {"bridge/mlp": 64}, False),
    ],
)
def test_features_are_read_unless_what_computes_them_is_cut(name, cut, reads):
    config = preset(name)
    stage = Stage(name="cut", recover_steps=1, frozen=family(config).features, loss=LossConfig(), optimizer=STEP)
    assert reads_features(config, stage, cut) is reads
    # Other parameters of the image side make other features.
    assert not reads_features(config, stage.model_copy(update={"weights": "random"}), cut)
    for prefix, same in (("vision", False), ("vision/stack", False), ("language", reads)):
        assert reads_features(config, stage.model_copy(update={"adapters": {prefix: 4}}), cut) is same


@pytest.mark.parametrize(
    ("name", "tokens"), [("llava-tiny", "many"), ("qwen2.5-vl-tiny", "one"), ("qwen3-vl-tiny", "many")]
)
def test_a_single_image_token_needs_no_weight(name, tokens):
    weighted = LossConfig(bridge=1.0, bridge_tokens="sensitivity")
    stage = Stage(name="image", recover_steps=1, loss=weighted, optimizer=STEP)
    assert weighs_tokens(preset(name), stage) is (tokens == "many")
    assert not weighs_tokens(preset(name), stage.model_copy(update={"loss": LossConfig()}))


def test_a_cut_language_model_reads_the_features_of_the_whole_image_side(model, tmp_path):
    config, params, _, samples = model
    features = image_features(config, params, samples, tmp_path / "features", batch_size=4)
    targets = {"text/embed": sizes(config)["text/embed"] // 2}
    keep = pruning.plan(pruning.magnitude(params, config), config, targets)
    smaller, cut = pruning.shrink(config, params, keep)[:2]
    pictures, cached = (next(samples.shuffled(5, 2, features=given)) for given in (None, features))
    expected, got = (functional(smaller).apply(cut, batch)["logits"] for batch in (pictures, cached))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_answers_are_in_the_order_of_the_records(talkative):
    config, params, processor, samples = talkative
    lengths = samples.needs.answer
    visited = np.concatenate([batch["index"] for batch in samples.questions(lambda **_: 4)])[:ROWS]
    assert (np.diff(lengths[visited]) >= 0).all() and (visited != np.arange(ROWS)).any()
    np.testing.assert_array_equal(np.sort(visited), np.arange(ROWS))
    answers = [evaluate(config, params, samples, processor, max_new_tokens=3, batch_size=n)[1] for n in (1, 4)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


@pytest.mark.long
def test_rows_with_many_pictures_widen_only_their_own_batches(model, tmp_path):
    """Answers, losses, features and the teacher's targets are those of batches of one shape."""
    config, params, processor, samples = model
    shown = [samples.records[row] for row in range(6)]
    records = [replace(each, images=each.images * n) for each, n in zip(shown, (1, 9, 2, 1, 0, 1), strict=True)]
    several = Samples(records, processor, config)
    sizes = []

    def fits(**lengths):
        sizes.append(lengths["slots"])
        return 4

    questions, cached = [*several.questions(fits)], [*several.by_bucket(fits)]
    assert sizes == [9, 2] * 2
    for batches in (questions, cached):
        assert [each["images"]["valid"].shape[1] for each in batches] == [9, 2, 2]
        assert {*np.concatenate([each["index"] for each in batches])} == {*range(6)}
        assert batches[0]["input_ids"].shape[1] > batches[1]["input_ids"].shape[1] or config.encoder_decoder
    (first,) = several.questions(lambda **_: 4, 1)  # without the many pictures of the next one
    assert first["index"].tolist() == [0] and first["images"]["valid"].shape[1] == 1
    for name in ("prompt/input_ids", "input_ids"):
        assert first[name].shape[1] < min(each[name].shape[1] for each in questions) or config.encoder_decoder
    whole_shape = next(several.in_order(6, prompts=True))
    for each in cached:
        columns = each["input_ids"].shape[1]
        np.testing.assert_array_equal(each["input_ids"], whole_shape["input_ids"][each["index"], :columns])
    for about in ({"full": True}, {}):
        trained = [*islice(several.shuffled(2, 0, **about), 3)]
        assert sorted(each["images"]["valid"].shape[1] for each in trained) == [2, 2, 9]
        assert {*np.concatenate([each["index"] for each in trained])} == {*range(6)}
    scores, answers = evaluate(config, params, several, processor, max_new_tokens=3)
    assert token_loss(config, params, several, batch_size=4) == pytest.approx(scores["token_loss"], rel=1e-6)
    alone = [
        evaluate(config, params, Samples([each], processor, config), processor, max_new_tokens=3)[1][0]
        for each in records
    ]
    assert answers == alone
    features = image_features(config, params, several, tmp_path / "several", batch_size=4)
    for row, each in enumerate(records):
        kept, given = every(features, row), len(each.images)
        assert kept.shape[:2] == (1, given)
        if given:
            pixels = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], whole_shape["images"])
            expected = np.asarray(functional(config).features(params, pixels))[:, :given]
            np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5)


def test_questions_padded_like_longer_ones_get_the_same_answers(talkative):
    config, params, processor, _ = talkative
    records = [*maad.source("s", "val", 4)]
    short, long = (
        Samples(rows, processor, config) for rows in (records, [replace(r, text=3 * r.text) for r in records])
    )

    def answers():
        return [evaluate(config, params, each, processor, max_new_tokens=3)[1] for each in (short, long)]

    def shapes():
        return {next(each.in_order(4, prompts=True))["prompt/input_ids"].shape for each in (short, long)}

    before, apart = answers(), shapes()
    short.pad_prompts_like(long)
    assert shapes() == {max(apart)} != apart
    assert answers() == before and all(len({*rows}) > 1 for rows in before)


def test_the_end_token_is_part_of_the_answer(model):
    _, _, processor, samples = model
    rows = taken(samples, np.arange(ROWS))["targets"]
    for record, targets, length in zip(samples.records, rows, samples.needs.answer, strict=True):
        assert targets[length - 1] == processor.tokenizer.eos_token_id
        assert decode(processor, targets[None, :length]) == [record.answer]


def test_batches_can_be_limited_to_question_types(model):
    _, _, _, samples = model
    wanted = {samples.records[1].type, samples.records[4].type}
    rows = [i for i, record in enumerate(samples.records) if record.type in wanted]
    assert 2 <= len(rows) < ROWS
    np.testing.assert_array_equal(samples.rows_of((*wanted,)), rows)
    batch = next(samples.shuffled(len(rows), 0, rows=samples.rows_of((*wanted,))))
    for name in ("targets", "input_ids"):
        np.testing.assert_array_equal(batch[name], taken(samples, batch["index"])[name])
    assert sorted(batch["index"]) == rows
    with pytest.raises(
        AntgmmError, match=f"a batch of {len(rows) + 1} needs at least as many rows, but the data has {len(rows)}"
    ):
        samples.shuffled(len(rows) + 1, 0, rows=np.array(rows))
    with pytest.raises(AntgmmError, match="no question has type prize: the data has brand, "):
        samples.rows_of(("prize", "brand"))


def test_an_epoch_visits_repeated_types_as_often_as_requested(model):
    _, _, _, samples = model
    kind = samples.records[1].type
    often = [3 if record.type == kind else 1 for record in samples.records]
    epoch = next(samples.shuffled(sum(often), 0, rows=samples.repeated({kind: 3})))
    np.testing.assert_array_equal(np.bincount(epoch["index"], minlength=ROWS), often)
    np.testing.assert_array_equal(epoch["targets"], taken(samples, epoch["index"])["targets"])


def test_the_fingerprint_covers_data_and_processor(model, tmp_path):
    config, _, processor, samples = model
    config = replace(config, language=replace(config.language, vocab=512))  # room for one more word

    def fingerprint(change):
        processor.save_pretrained(tmp_path)
        other = load_processor(tmp_path)
        change(other)
        return Samples(maad.source("s", "val", ROWS), other, config).fingerprint

    def other_colours(other):
        other.image_processor.image_mean = [0.5, 0.4, 0.4]

    def other_resizing(other):
        other.image_processor.resample = 0  # nearest neighbour

    def other_words(other):
        other.tokenizer.add_tokens([samples.records[0].question.split()[-1]])  # a word with a token of its own

    assert fingerprint(lambda other: None) == samples.fingerprint
    distinct = {samples.fingerprint, *(fingerprint(change) for change in (other_colours, other_resizing, other_words))}
    assert len(distinct) == 4
    assert Samples(maad.source("s", "val", ROWS, seed=1), processor, config).fingerprint not in distinct
