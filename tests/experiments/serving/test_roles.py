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
    given = [{"role": one, "content": "a"} for one in (role, "user")]
    messages, _ = conversation({"messages": given})
    assert messages == [{**one, "content": [{"type": "text", "text": "a"}]} for one in given]
    before = ["user"] if role == "assistant" else []
    roles = [*before, role, *NEXT[role]]
    row = parse({"messages": [{"role": one, "content": "a"} for one in roles]})
    assert [turn.role for turn in row.turns] == roles[:-1]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_request_ends_with_a_question(role):
    """Servers write an answer after any message, but the chat template is not rendered so in training."""
    with pytest.raises(AntgmmError, match="the last message is not the user's"):
        conversation({"messages": [{"role": one, "content": "a"} for one in ("user", role)]})


def test_requests_and_rows_refuse_another_role():
    with pytest.raises(AntgmmError, match=f"another role than {', '.join(ROLES)}"):
        conversation({"messages": [{"role": "tool", "content": "a"}]})
    with pytest.raises(BadRow, match="has role 'tool'"):
        parse({"messages": [{"role": "tool", "content": "a"}]})
