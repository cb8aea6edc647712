"""The generator: determinism, balance, disjoint splits, answers that follow from the latents, clean layouts."""

import itertools
from collections import Counter

import numpy as np
import pytest

import data.maad as maad
from antgmm_jax.errors import AntgmmError
from data.maad.answers import CLASSES, accompanying, answer
from data.maad.latents import draw, share
from data.maad.tiers import brands, products
from data.maad.vocab import BANNED, CLAIMS, NEEDS_NOTICE, QUESTIONS

SPLITS = tuple(maad.SIZES)


def records(tier, split, count):
    """Latents with text and answer, without pixels."""
    preset = maad.tier(tier)
    drawn = (draw(preset, split, index) for index in range(count))
    return [(lat, accompanying(preset, lat.text), answer(preset, lat)) for lat in drawn]


def test_latents_and_pixels_are_deterministic():
    first, again = maad.source("m", "val"), maad.source("m", "val")
    for index in (0, 7, 999):
        assert first.latents(index) == again.latents(index)
        np.testing.assert_array_equal(first[index].images[0], again[index].images[0])
    assert first.latents(5) != maad.source("m", "val", seed=1).latents(5)


@pytest.mark.parametrize(
    ("tier", "expected"), [("s", "402aa9858084207b"), ("m", "43ba30fbc1f3a8ca"), ("full", "7d43b355c34ea257")]
)
def test_latents_are_the_same_on_every_machine(tier, expected):
    assert maad.fingerprint(maad.source(tier, "test")) == expected


@pytest.mark.parametrize("tier", ["s", "m"])
def test_splits_share_no_picture_and_no_text(tier):
    seen = {split: records(tier, split, 1500) for split in SPLITS}
    pictures = {split: {lat.picture for lat, _, _ in rows} for split, rows in seen.items()}
    texts = {split: {text for _, text, _ in rows} for split, rows in seen.items()}
    for one, two in itertools.combinations(SPLITS, 2):
        assert not pictures[one] & pictures[two]
        assert not texts[one] & texts[two]


def test_the_endless_stream_stays_in_the_training_share():
    preset = maad.tier("s")
    assert all(share(draw(preset, "train", 10**9 + k).picture) < 7 for k in range(500))


@pytest.mark.parametrize("tier", ["s", "m"])
@pytest.mark.parametrize("split", ["train", "test_hard"])
def test_types_and_answer_classes_are_balanced(tier, split):
    rows = records(tier, split, 3000)
    kinds = Counter(lat.type for lat, _, _ in rows)
    assert set(kinds) == set(QUESTIONS)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    for kind, classes in CLASSES.items():
        last = Counter(reply.split()[-1] for lat, _, reply in rows if lat.type == kind)
        assert set(last) == set(classes)
        assert max(last.values()) - min(last.values()) <= 6, (kind, last)


@pytest.mark.parametrize("tier", ["s", "m", "full"])
def test_answers_follow_from_the_latents(tier):
    preset = maad.tier(tier)
    names = [brand.name for brand in brands(preset)[0]]
    for lat, text, reply in records(tier, "train", 1200):
        picture, words, last = lat.picture, lat.text, reply.split()[-1]
        product = products(preset)[picture.product]
        assert f"${words.price}" in text
        assert names[words.brand] in text
        assert products(preset)[words.product].name in text
        match lat.type:
            case "price_match":
                assert reply == f"picture ${picture.price} text ${words.price} {last}"
                assert (last == "yes") == (picture.price == words.price)
            case "product_match":
                assert (last == "yes") == (picture.product == words.product)
            case "brand_match":
                assert (last == "yes") == (picture.brand == words.brand)
            case "prohibited":
                assert (last == "yes") == (product.category in BANNED)
            case "category":
                assert reply == f"{product.name} {product.category}"
            case "brand":
                assert reply == names[picture.brand]
            case "verdict":
                assert last == verdict(product, picture, words)


def verdict(product, picture, words):
    """The first rule that applies, written independently of the generator."""
    if product.category in BANNED:
        return "R1"
    if picture.claim in range(1, len(CLAIMS) + 1) or words.claim:
        return "R2"
    for rule, field in (("R3", "price"), ("R4", "product"), ("R5", "brand")):
        if getattr(picture, field) != getattr(words, field):
            return rule
    if product.category in NEEDS_NOTICE and not (picture.notice or words.notice):
        return "R6"
    return "R7" if picture.qr or picture.phone else "pass"


@pytest.mark.parametrize(("tier", "split"), [("s", "train"), ("m", "train"), ("m", "test_hard"), ("full", "train")])
def test_nothing_overlaps_or_is_clipped(tier, split):
    preset = maad.tier(tier)
    for index in range(300):
        image, boxes = maad.compose(preset, draw(preset, split, index))
        assert image.size == (preset.px, preset.px)
        for box in boxes.values():
            assert 0 <= box.left < box.right <= preset.px
            assert 0 <= box.top < box.bottom <= preset.px
        for a, b in itertools.combinations(boxes.values(), 2):
            assert a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top


def test_elements_are_drawn_where_the_latents_say():
    preset = maad.tier("s")
    for index in range(60):
        lat = draw(preset, "train", index)
        _, boxes = maad.compose(preset, lat)
        shown = {name: name in boxes for name in ("qr", "phone", "notice", "badge")}
        picture = lat.picture
        assert shown == {
            "qr": picture.qr,
            "phone": picture.phone,
            "notice": picture.notice,
            "badge": picture.claim > 0,
        }


def test_hard_slices_hold_styles_that_training_lacks():
    for tier in ("s", "m"):
        preset = maad.tier(tier)
        latents = [draw(preset, "test_hard", index) for index in range(720)]
        assert {lat.slice for lat in latents} == set(maad.SLICES)
        _, seen = brands(preset)
        for lat in latents:
            assert (lat.picture.brand >= seen) == (lat.slice == "brand")
            assert (lat.style.font in preset.hard_fonts) == (lat.slice == "font")
            assert (lat.style.icons == "fluent") == (lat.slice == "icons")
            assert (lat.style.layout in preset.hard_layouts) == (lat.slice == "layout")
        for lat in (draw(preset, "train", index) for index in range(720)):
            assert lat.picture.brand < seen
            assert lat.style.icons == "noto"
            assert lat.slice == ""
            assert lat.style.layout not in preset.hard_layouts
            assert lat.style.font not in preset.hard_fonts


def test_syllables_of_unseen_brands_occur_in_seen_brands():
    for tier in ("s", "m"):
        all_brands, seen = brands(maad.tier(tier))
        assert 16 <= seen < len(all_brands)
        for part in (0, 1):
            assert {b.parts[part] for b in all_brands[seen:]} <= {b.parts[part] for b in all_brands[:seen]}
        assert len({b.name for b in all_brands}) == len(all_brands)


@pytest.mark.parametrize("tier", ["s", "m"])
def test_latent_targets_fit_their_heads(tier):
    sizes, split = maad.latent_sizes(tier), maad.source(tier, "train")
    targets = [split[index].latents for index in range(200)]
    for name, classes in sizes.items():
        values = {target[name] for target in targets}
        assert min(values) >= 0
        assert max(values) < classes
        assert len(values) > 1
    assert all(list(target) == list(sizes) for target in targets)
    digits = "".join(str(targets[2][f"price_{k}"]) for k in range(len(str(split.latents(2).picture.price))))
    assert digits == str(split.latents(2).picture.price)


def test_records_are_plain_arrays_and_words():
    record = maad.source("s", "train", size=5)[4]
    assert record.images[0].shape == (96, 96, 3)
    assert record.images[0].dtype == np.uint8
    assert record.images[0].flags.writeable
    assert record.type == "price_match"
    assert record.question == QUESTIONS["price_match"]
    assert len([*maad.source("s", "train", size=5)]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "train"), "no tier 'x'"),
        (("s", "dev"), "no split 'dev'"),
        (("s", "test", 3001), "has 3000 records"),
        (("s", "train", 0), "records, not 0"),
    ],
)
def test_wrong_requests_are_refused(arguments, message):
    with pytest.raises(AntgmmError, match=message):
        maad.source(*arguments)


def test_contact_sheet_shows_every_record():
    sheet = maad.contact_sheet("s", "val", 7)
    assert sheet.mode == "RGB"
    first = np.asarray(sheet)[12 : 12 + 192, 12 + 20 : 12 + 20 + 192]
    np.testing.assert_array_equal(first[::2, ::2], maad.source("s", "val")[0].images[0])
