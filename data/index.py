"""Index of encoded records: small numbers per record, kept in memory."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antgmm_jax.errors import AntgmmError
from antgmm_jax.io.files import check_regular


class Index(NamedTuple):
    """Sizes and types of encoded records, kept in memory.

    Attributes:
        prompt: number of prompt tokens, including image tokens, int32 [N].
        answer: number of tokens of the last answer, including the end token, int32 [N].
        earlier: number of tokens of the answers in the prompt, int32 [N].
        slots: number of image slots, int32 [N].
        types: type of the question as an index into `names`, int32 [N].
        names: names of the types.
        fingerprint: digest of all token ids and pixels, and of what scores are grouped by and compared with.
    """

    prompt: np.ndarray
    answer: np.ndarray
    earlier: np.ndarray
    slots: np.ndarray
    types: np.ndarray
    names: tuple[str, ...]
    fingerprint: str


_DAMAGED = (ValueError, EOFError, KeyError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a damaged file. A zip with another bit set is encrypted, or of another version."""
COLUMNS = ("prompt", "answer", "earlier", "slots", "types")
"""Fields of `Index` with a number for each record."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file of the cache, which has a checksum of each.

    Raises:
        AntgmmError: the file is damaged.
    """
    try:
        check_regular(path)
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (AntgmmError, OSError, *_DAMAGED) as error:
        reason = " ".join(str(error).split())[:200]
        raise AntgmmError(f"{path} is damaged ({reason}): remove {path.parent} and run it again") from error
