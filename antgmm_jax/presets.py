"""Named model configs of all families."""

from antgmm_jax.config import LMMConfig
from antgmm_jax.errors import AntgmmError
from antgmm_jax.families import FAMILIES

PRESETS: dict[str, LMMConfig] = {name: config for one in FAMILIES.values() for name, config in one.presets.items()}


def preset(name: str) -> LMMConfig:
    """Returns the config of a named model.

    Args:
        name: a key of `PRESETS`.

    Returns:
        Model config.

    Raises:
        AntgmmError: no such preset.
    """
    if name not in PRESETS:
        raise AntgmmError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
