"""A small teacher and its cache."""

import jax

from distill.build import build_cache
from distill.cache import fingerprint
from tests.distill import toy

TEACHER = toy.toy(6, 3)
PARAMS = TEACHER.init(jax.random.key(1))
KEY = fingerprint(PARAMS, "data")
STATES = ("final", "text/states")


def batches():
    """Eight samples in two batches; the second is in a shorter bucket."""
    return [toy.batch(0), toy.batch(1, length=5, answers=2)]


def build(directory, *, batches=batches, samples=8, names=("final",), key=KEY, params=PARAMS, **options):
    build_cache(
        TEACHER, params, batches(), directory, samples=samples, like=toy.batch(0), key=key, names=names, **options
    )
