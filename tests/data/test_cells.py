"""The labels of a picture's cells name the element drawn there."""

import numpy as np
import pytest

import data.maad as maad
from data.maad.cell_grid import SIDE, cell_classes, cells
from data.maad.drawing import facts
from data.maad.latents import draw
from data.maad.layouts import Box
from data.maad.tiers import brands


@pytest.mark.parametrize("tier", ["s", "m", "full"])
def test_cells_are_labelled_where_elements_are_drawn(tier):
    preset, seen = maad.tier(tier), set()
    for index in range(150):
        lat = draw(preset, "train", index)
        image, boxes = maad.compose(preset, lat)
        labels = cells(preset, lat.picture, facts(preset, lat.picture), boxes)
        assert labels.max() < cell_classes(preset) <= 256
        middle = (np.arange(SIDE) + 0.5) * image.width / SIDE
        inside = np.zeros((SIDE, SIDE), bool)
        for box in boxes.values():
            rows, columns = (middle >= box.top) & (middle < box.bottom), (middle >= box.left) & (middle < box.right)
            inside |= rows[:, None] & columns
        np.testing.assert_array_equal(labels > 0, inside)
        seen |= set(np.unique(labels).tolist())
    assert len(seen) > 30


def test_cells_by_hand():
    preset = maad.tier("m")
    picture = draw(preset, "train", 0).picture
    # "kal" + "kin" are parts 5 and 6.
    brand = next(i for i, b in enumerate(brands(preset)[0]) if b.name == "KalKin")
    picture = picture._replace(price=57, claim=2, product=3, brand=brand)
    # Cells are 7 pixels wide: their centres are at 3.5, 10.5, 17.5 and so on.
    boxes = {
        "price": Box(0, 0, 21, 7),
        "icon": Box(0, 70, 14, 77),
        "badge": Box(0, 84, 7, 91),
        "brand": Box(0, 98, 42, 105),
        "slogan": Box(105, 0, 112, 7),
    }
    labels = cells(preset, picture, facts(preset, picture), boxes)
    # After background, currency and slogan: 48 products, 16 + 16 syllables, three places of 11, 9 badges.
    assert labels[0].tolist() == [1, 3 + 80 + 5, 3 + 91 + 7, *[0] * 12, 2]
    assert labels[10, :3].tolist() == [3 + 3, 3 + 3, 0]
    assert labels[12, :2].tolist() == [3 + 113 + 2, 0]
    assert labels[14, :7].tolist() == [*[3 + 48 + 5] * 3, *[3 + 64 + 6] * 3, 0]
    assert labels.astype(int).sum() == labels[[0, 10, 12, 14]].astype(int).sum()
