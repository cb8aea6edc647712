"""Operations of traced programs."""

from collections.abc import Iterator

import jax
import jax.extend.core

Core = jax.extend.core


def equations(jaxpr) -> Iterator:
    """All operations of a program, including those in loops and branches."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Core.ClosedJaxpr)):
            if isinstance(inner, Core.ClosedJaxpr | Core.Jaxpr):
                yield from equations(inner.jaxpr if isinstance(inner, Core.ClosedJaxpr) else inner)
