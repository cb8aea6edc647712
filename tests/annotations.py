"""The type check that tests apply to every annotated function."""

from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated, as in pyright.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
