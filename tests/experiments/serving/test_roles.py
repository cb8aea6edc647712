"""Requests to the server and rows of files know the same roles."""

import pytest

from antgmm_jax.errors import AntgmmError
from data.limits import BadRow
from data.record import ROLES
from data.rows import parse
from experiments.serving.requests import conversation

NEXT = {"system": ["user", "assistant"], "user": ["assistant"], "assistant": []}
"""Turns that must follow a role in a row."""


@pytest.mark.parametrize("role", ROLES)
def test_requests_and_rows_take_every_role(role):
    messages, _ = conversation({"messages": [{"role": role, "content": "a"}]})
    assert messages == [{"role": role, "content": [{"type": "text", "text": "a"}]}]
    before = ["user"] if role == "assistant" else []
    roles = [*before, role, *NEXT[role]]
    row = parse({"messages": [{"role": one, "content": "a"} for one in roles]})
    assert [turn.role for turn in row.turns] == roles[:-1]


def test_requests_and_rows_refuse_another_role():
    with pytest.raises(AntgmmError, match=f"another role than {', '.join(ROLES)}"):
        conversation({"messages": [{"role": "tool", "content": "a"}]})
    with pytest.raises(BadRow, match="has role 'tool'"):
        parse({"messages": [{"role": "tool", "content": "a"}]})
