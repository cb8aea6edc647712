"""A chat template renders as in transformers, and under limits of time, memory and size."""

import os
import subprocess
import sys
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from antgmm_jax.errors import AntgmmError
from antgmm_jax.families.common.words import CHAT, user_turn
from antgmm_jax.io import templates
from antgmm_jax.io.templates import render, with_fixed_day

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURN = user_turn("what\u20ac?", 2)
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" * 99,
    "product": "{{ 'x' * 10**10 }}",
    "folded": "{% set a = ('x' * 10**10)|length %}{{ a }}",
    "doubling": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "long": "{{ 'x' * 10**7 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "syntax": "{% for %}",
    "brackets": "{{ " + "(" * 100_000 + " }}",
    "file": "{% include '/etc/passwd' %}",
    "number": 7,
    "unnamed": {"tool": "x"},
}


@pytest.mark.parametrize("generate", [True, False])
def test_a_template_renders_as_in_transformers(generate):
    (expected, *_), _ = render_jinja_template([[*TURN]], chat_template=CHAT, add_generation_prompt=generate, **TOKENS)
    assert render(CHAT, TURN, TOKENS, generate=generate) == expected
    assert render({"default": CHAT}, TURN, TOKENS, generate=generate) == expected


DATED = """
{%- set today = strftime_now("%Y-%m-%d") %}
{{- bos_token }}[{{ today }}, yesterday {{ today.split('-')[0] }}, {{ strftime_now( '%d %b' ) }}]
{{ messages[0]['content'][-1]['text'] }}"""


def test_a_template_with_the_date_of_today_writes_a_fixed_day():
    fixed = with_fixed_day(DATED)
    (expected, *_), _ = render_jinja_template(
        [[*TURN]],
        chat_template=DATED.replace('strftime_now("%Y-%m-%d")', '"2025-01-01"').replace(
            "strftime_now( '%d %b' )", "'01 Jan'"
        ),
        **TOKENS,
    )
    assert "[2025-01-01, yesterday 2025, 01 Jan]" in expected
    assert render(fixed, TURN, TOKENS, generate=True) == expected
    assert with_fixed_day(fixed) == fixed and with_fixed_day("{{ bos_token }}" + fixed) == "{{ bos_token }}" + fixed
    assert with_fixed_day(CHAT) == CHAT


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(name, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(AntgmmError) as caught:
        render(HOSTILE[name], TURN, TOKENS, generate=True)
    assert str(caught.value).startswith("the chat template") and "\n" not in str(caught.value)
    assert time.monotonic() - begin < 20
    assert render("{{ bos_token }}", TURN, TOKENS, generate=True) == "<s>"


def test_a_template_that_took_too_long_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(AntgmmError, match="more than 0.5 s"):
            render(HOSTILE["loops"] + "x", TURN, TOKENS, generate=True)
        monkeypatch.setattr(templates, "SECONDS", 100.0)


def test_a_template_that_took_too_long_with_one_conversation_is_tried_again(monkeypatch):
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages|length > 1 %}}{loop}{{% endif %}}{{{{ messages[0]['role'] }}}}"
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(AntgmmError, match="more than 0.5 s"):
        render(template, [*TURN, *TURN], TOKENS, generate=True)
    with pytest.raises(AntgmmError, match="more than 0.5 s"):
        render(template, TURN, TOKENS, generate=True)
    monkeypatch.setattr(templates, "_FORGET", 0.0)
    renderer = templates._Renderer()
    request = {"template": template, "generate": True, "tokens": TOKENS}
    assert "error" in renderer.render({**request, "messages": [*TURN, *TURN]})
    assert renderer.render({**request, "messages": [*TURN]}) == {"text": "user"}
    renderer.stop()


def test_the_renderer_ends_with_its_process():
    code = "from antgmm_jax.io.templates import render, _RENDERERS as r; render('x', [], {}, generate=True);"
    code += "print(*(one._worker._process.pid for one in r.values()), flush=True)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
