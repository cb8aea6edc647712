"""Shifted pictures: every pixel comes from its shifted position; pixels from outside repeat the edge."""

import numpy as np
from einops import rearrange

from antgmm_jax.blocks.grids import places
from data.shifting import drawn, shifted, shifted_squares


def test_shifted_by_hand():
    picture = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1)
    moves = {(0, 0): "012345678", (1, 0): "012012345", (0, -1): "122455788", (-2, 2): "666666666"}
    for move, expected in moves.items():
        moved = shifted(picture, np.array([move]))
        assert "".join(map(str, moved.reshape(-1))) == expected, move


def test_each_picture_has_its_own_shift_and_inputs_are_unchanged():
    rng = np.random.default_rng(0)
    images, by = (
        rng.integers(0, 256, (6, 5, 7, 3), np.uint8),
        np.array([[0, 0], [2, 1], [-1, 3], [4, -4], [0, 1], [9, 0]]),
    )
    before = images.copy()
    moved = shifted(images, by)
    np.testing.assert_array_equal(images, before)
    for picture, image, (down, right) in zip(moved, images, by, strict=True):
        for y, x in np.ndindex(5, 7):
            np.testing.assert_array_equal(picture[y, x], image[np.clip(y - down, 0, 4), np.clip(x - right, 0, 6)])


def test_shifts_cover_all_distances_in_both_directions():
    moves = drawn(np.random.default_rng(0), 2, (500,))
    assert moves.shape == (500, 2)
    for axis in (0, 1):
        assert {*moves[:, axis].tolist()} == {-2, -1, 0, 1, 2}


def test_squares_of_a_picture_are_shifted_as_one_picture():
    rng, moves = np.random.default_rng(1), np.array([2, -3])
    wholes = [rng.integers(0, 256, (1, 4 * high, 4 * wide, 3)).astype(np.uint8) for high, wide in ((2, 3), (1, 2))]

    def cut(picture):
        return rearrange(picture, "1 (gy y) (gx x) c -> (gy gx) y x c", y=4, x=4)

    place = np.concatenate([places(2, 3), places(1, 2)])
    moved = shifted_squares(np.concatenate([cut(whole) for whole in wholes]), place, moves)
    np.testing.assert_array_equal(moved, np.concatenate([cut(shifted(whole, moves[None])) for whole in wholes]))
