"""The checks that tests apply to every annotated function of the library."""

import re
from pathlib import Path

from beartype import BeartypeConf, BeartypeDecorPlace, beartype
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

_ROOT = Path(__file__).resolve().parents[1]
_LIBRARY = ("antgmm_jax", "pruning", "distill")
# An int is accepted where a float is annotated, as in pyright. Variables inside of functions are left to pyright. Other
# decorators get the checked function.
_FIRST = BeartypeDecorPlace.FIRST
_CONF = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, claw_decor_place_func=_FIRST)
checked = beartype(conf=_CONF)


def check() -> None:
    """Checks types, shapes and dtypes at every call of a module that is imported from now on.

    Shapes, which have to agree between the arguments of a call, are checked where a module names any: binding the
    arguments takes ten times as long as a check of types, most of the time of a search among millions of configs.
    """
    beartype_packages(_LIBRARY, conf=_CONF)
    files = [path for name in _LIBRARY for path in (_ROOT / name).rglob("*.py")]
    shaped = [path for path in files if re.search(r"^from jaxtyping ", path.read_text(), flags=re.MULTILINE)]
    names = [".".join(path.relative_to(_ROOT).with_suffix("").parts) for path in shaped]
    install_import_hook(names, f"{__name__}.checked")
