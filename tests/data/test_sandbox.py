"""A chat template that computes without end is one error within moments."""

import time

import pytest
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc import ConfigError
from hf_gradacc.data.chat import encode_chat
from hf_gradacc.data.chat_templates import shipped_template
from hf_gradacc.data.rendering import ChatError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": LOOPS,
    "loops in tags": f"{{% generation %}}{LOOPS}{{% endgeneration %}}",
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "texts": "{{ 'a' * 10000000000 }}",
    "texts by a product": "{% set n = 100000 %}{{ (n * n) * 'a' }}",
    "lists": "{{ ['a'] * 10000000000 }}",
    "powers": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(n=9) %}{% for i in range(999) %}{% set n.n = n.n * n.n %}"
    "{% endfor %}",
    "doubling": "{% set n = namespace(n='aa') %}{% for i in range(999) %}{% set n.n = n.n ~ n.n %}"
    "{% endfor %}",
    "a filter": "{{ 'a'|center(10000000000) }}",
    "a filter of Transformers": "{{ [[1]]|tojson(indent=10000000000) }}",
    "a method": "{% set f = 'a'.ljust %}{{ f(10000000000) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a format with braces": "{{ '{:{}d}'.format(1, 10000000000) }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}",
    "join": "{{ (['a' * 1000000] * 100000)|map('upper')|join }}",
    "sum": "{{ ([[1] * 1000000] * 9999)|sum(start=[]) }}",
    "recursion": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_that_computes_without_end_is_one_error(bomb):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = BOMBS[bomb] + shipped_template("chatml")
    started = time.process_time()
    with pytest.raises((ConfigError, ChatError)) as caught:
        encode_chat(tokenizer, TURNS)
    assert time.process_time() - started < 2
    if isinstance(caught.value, ConfigError):  # so that `unusable: drop` does not wait row by row
        assert "tokenizer.chat_template" in str(caught.value)


def test_what_templates_do_with_numbers_and_texts_still_works():
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{{ '-' * 3 }}{{ 7 % 2 }}{{ 2 ** 8 }}{{ '%05d' % 7 }}{{ '{:>4}'.format(1) }}"
        "{{ ['a', 'b']|join(', ') }}{{ 'a'|center(3) }}{{ {'a': [1]}|tojson(indent=2) }}"
        "{{ 'a-b'.replace('-', '+') }}{{ 'x\\ny'|indent(2) }}{{ [1, 2]|sum }}"
        "{{ '{}'.format(123456) }}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    encode_chat(tokenizer, TURNS)  # by now, Transformers compiles in our sandbox
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == text
    assert text.startswith("---125600007   1a, b a {")
