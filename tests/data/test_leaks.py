"""A matching question cannot be answered from the text alone or from the picture alone."""

import numpy as np
import pytest

import data.maad as maad
from data.maad.answers import accompanying, answer
from data.maad.latents import draw
from data.maad.render import compose
from data.maad.tiers import products
from data.maad.vocab import TYPES

MATCHES = ("price_match", "product_match", "brand_match")
PERCEPTION = ("category", "product", "brand", "contact", "prohibited")


def rows(tier, kind, count):
    """Training latents of one question type."""
    return [draw(maad.tier(tier), "train", TYPES.index(kind) + len(TYPES) * k) for k in range(count)]


def accuracy(features, labels, *, held_out):
    """Held-out accuracy of a ridge classifier on one-hot targets, and the share of the most frequent class."""
    classes, target = np.unique(labels, return_inverse=True)
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    y = np.eye(len(classes))[target]
    fit, test = slice(None, -held_out), slice(-held_out, None)
    gram = x[fit].T @ x[fit] + 30.0 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[fit].T @ (y[fit] - y[fit].mean(axis=0)))
    guess = np.argmax(x[test] @ weights + y[fit].mean(axis=0), axis=1)
    majority = np.bincount(target[test]).max() / held_out
    return float(np.mean(guess == target[test])), float(majority)


def words(texts):
    """A 0/1 matrix [texts, words] of the words, numbers and marks in each text."""
    split = [set(text.replace(".", " ").replace(",", " ").replace(":", " ").split()) for text in texts]
    place = {word: at for at, word in enumerate(sorted(set().union(*split)))}
    holds_word = np.zeros((len(texts), len(place)))
    for row, inside in enumerate(split):
        holds_word[row, [place[word] for word in inside]] = 1
    return holds_word


def gradients(images):
    """Histograms of gradient directions in cells of 16 x 16 pixels (HOG without block norms)."""
    grey = np.stack(images).mean(axis=-1, dtype=np.float32)
    dy, dx = np.gradient(grey, axis=(1, 2))
    direction = (np.arctan2(dy, dx) % np.pi / np.pi * 6).astype(int) % 6
    count, side = len(grey), grey.shape[1] // 16
    row, y, x = np.indices(grey.shape, sparse=True)
    place = ((row * side + y // 16) * side + x // 16) * 6 + direction
    total = np.bincount(place.ravel(), weights=np.hypot(dx, dy).ravel(), minlength=count * side * side * 6)
    features = np.sqrt(total.reshape(count, -1))
    return (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)


@pytest.mark.parametrize("tier", ["s", "m"])
def test_the_text_alone_does_not_answer(tier):
    preset = maad.tier(tier)
    for kind in MATCHES + PERCEPTION:
        latents = rows(tier, kind, 2400)
        features = words([accompanying(preset, lat.text) for lat in latents])
        labels = [answer(preset, lat).split()[-1] for lat in latents]
        reached, majority = accuracy(features, labels, held_out=1000)
        assert reached < majority + 0.06, (kind, reached, majority)


@pytest.mark.parametrize("tier", ["s", "m"])
def test_phrasing_adds_no_evidence(tier):
    # These answers depend on text and picture, so the text's content is evidence; its phrasing must not be.
    preset = maad.tier(tier)
    for kind in ("claim", "risk_notice", "verdict"):
        latents = rows(tier, kind, 2400)
        categories = sorted({p.category for p in products(preset)})
        texts = [(lat.text, categories.index(products(preset)[lat.text.product].category)) for lat in latents]
        evidence = np.array([[4 * at + 2 * (text.claim > 0) + text.notice] for text, at in texts])
        evidence = np.eye(evidence.max() + 1)[evidence[:, 0]]
        labels = [answer(preset, lat).split()[-1] for lat in latents]
        allowed, majority = accuracy(evidence, labels, held_out=1000)
        features = words([accompanying(preset, lat.text) for lat in latents])
        reached, _ = accuracy(features, labels, held_out=1000)
        assert reached < allowed + 0.06, (kind, reached, allowed)
        assert allowed < majority + 0.3, (kind, allowed, majority)


@pytest.mark.long
@pytest.mark.parametrize("tier", ["s", "m"])
def test_the_picture_alone_does_not_answer(tier):
    preset = maad.tier(tier)
    for kind in MATCHES:
        latents = rows(tier, kind, 700)
        features = gradients([np.array(compose(preset, lat)[0]) for lat in latents])
        labels = [answer(preset, lat).split()[-1] for lat in latents]
        reached, majority = accuracy(features, labels, held_out=250)
        assert reached < majority + 0.07, (kind, reached, majority)


def test_the_classifier_detects_a_leak():
    # Control: the same classifier reads from the text what the text does contain.
    preset = maad.tier("s")
    latents = rows("s", "claim", 2400)
    features = words([accompanying(preset, lat.text) for lat in latents])
    reached, majority = accuracy(features, [lat.text.claim > 0 for lat in latents], held_out=800)
    assert reached > 0.95 > majority + 0.3
