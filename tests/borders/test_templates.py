"""Templates of strangers: what they render is what the libraries render, and none of them takes this process with it."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from roma_ray.borders.templates import Renderer, chat_text
from roma_ray.errors import ConfigError
from tests.questions.tokenizers_for_tests import CHAT_TEMPLATE, byte_level

CHATS = [
    [{"role": "user", "content": "Which?"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "±\n\ud800"}],
]


@pytest.fixture(
    scope="module", params=["roma_ray.borders.templates:render_chat", "roma_ray.benchmarks.task_files:render"]
)
def renderer(request: pytest.FixtureRequest) -> Any:
    made = Renderer(request.param, seconds=1, memory=1 << 28)
    values = {"conversations": [CHATS[0]]} if "chat" in request.param else {}
    yield lambda text: made.render(text, values, "the template")
    made.close()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ 'x'.ljust(10**12) }}",
        "{{ '%0999999999999d' % 1 }}",
        "{{ '{:999999999999}'.format(1) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x'|center(10**12) }}",
        "{% set n = namespace(x='xx') %}{% for a in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for a in range(50) %}{% set n.x = n.x|replace('a', n.x) %}{% endfor %}",
        "{{ 'x' * 10**7 }}",
    ],
)
def test_a_template_without_bound_ends_with_a_message(renderer: Any, template: str) -> None:
    with pytest.raises((ConfigError, TemplateError)) as caught:
        renderer(template)
    if isinstance(caught.value, ConfigError):
        assert str(caught.value).startswith("the template takes more than 1 s of a processor, 256 MiB of memory")
        assert "loops or grows without bound" in str(caught.value)
    else:
        # The sandbox or Python itself saw it before.
        assert str(caught.value).startswith(("OverflowError", "ValueError"))
    assert renderer("still {{ 1 + 1 }} here") == "still 2 here"


def test_a_fault_of_a_template_is_told(renderer: Any) -> None:
    for template in (
        "{{ x.y.z }}",
        "{% for %}",
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
    ):
        with pytest.raises(TemplateError):
            renderer(template)


@pytest.mark.parametrize("chat", CHATS, ids=["user", "system"])
@pytest.mark.parametrize("options", [{"add_generation_prompt": True}, {"continue_final_message": True}], ids=str)
def test_a_chat_is_rendered_as_the_tokenizer_renders_it(chat: list[dict[str, str]], options: dict[str, Any]) -> None:
    tokenizer = byte_level(bos=True, chat_template=CHAT_TEMPLATE)
    found = chat_text(tokenizer, chat, **options)
    assert found == tokenizer.apply_chat_template(chat, tokenize=False, **options)
    assert found


def test_a_function_that_is_not_there_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Renderer("roma_ray.borders.templates:nothing").render("x", {}, "it")
