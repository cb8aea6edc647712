"""The check that the tests run on every annotated function."""

from beartype import BeartypeConf, beartype

# An int is fine where a float is annotated, as for pyright.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
