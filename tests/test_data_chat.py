"""Chats become the tokens of their template, with the assistant's words as targets, no others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import templates
from support.bytes_tokenizer import bytes_tokenizer, read_segments

from hf_gradacc.data.chat import ChatError, encode_chat, has_generation_tags

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, 4."},
]

# What each template makes of a chat, read off the template by hand: text, and whether a target.
CHATML_READING = [
    ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
    ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
    ("4<|im_end|>", True),
    ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Yes, 4.<|im_end|>", True),
    ("\n", False),
]
HEADERS_READING = [
    ("<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>", False),
    ("<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>", False),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
    ("4<|eot_id|>", True),
    ("<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>", False),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
    ("Yes, 4.<|eot_id|>", True),
]
NO_SYSTEM_READING = [
    ("<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n", False),
    ("4<end_of_turn>", True),
    ("\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n", False),
    ("Yes, 4.<end_of_turn>", True),
    ("\n", False),
]
# The first answer was thought about once; with the second question asked, that is gone.
THINKING_READING = [
    *CHATML_READING[:4],
    ("<think>\n\n</think>\n\nYes, 4.<|im_end|>", True),
    ("\n", False),
]


@pytest.mark.parametrize(
    ("template", "tokens", "messages", "reading"),
    [
        (templates.CHATML, templates.CHATML_TOKENS, [SYSTEM, *CHAT], CHATML_READING),
        (templates.TAGGED, templates.CHATML_TOKENS, [SYSTEM, *CHAT], CHATML_READING),
        (templates.HEADERS, templates.HEADERS_TOKENS, [SYSTEM, *CHAT], HEADERS_READING),
        (templates.NO_SYSTEM, templates.NO_SYSTEM_TOKENS, CHAT, NO_SYSTEM_READING),
        (templates.THINKING, templates.CHATML_TOKENS, [SYSTEM, *CHAT], THINKING_READING),
    ],
    ids=["chatml", "generation tags", "headers", "no system turn", "thinking"],
)
def test_a_chat_is_read_as_its_template_says(template, tokens, messages, reading):
    tokenizer = bytes_tokenizer(template, tokens)
    assert encode_chat(tokenizer, messages) == read_segments(tokenizer, reading)


def test_only_the_tagged_template_says_itself_what_the_assistant_wrote():
    tagged = bytes_tokenizer(templates.TAGGED, templates.CHATML_TOKENS)
    assert has_generation_tags(tagged)
    assert not has_generation_tags(bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS))


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<|>\r"), min_size=1, max_size=12)
SEARCHED = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
TAGGED = bytes_tokenizer(templates.TAGGED, templates.CHATML_TOKENS)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_searching_for_the_words_finds_what_the_tags_say(turns):
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert encode_chat(SEARCHED, messages) == encode_chat(TAGGED, messages)


def test_an_answer_that_repeats_the_question_is_still_the_only_target():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    messages = [{"role": "user", "content": "Yes"}, {"role": "assistant", "content": "Yes"}]
    messages = [*messages, {"role": "user", "content": "Yes"}]
    _, labels = encode_chat(tokenizer, messages)
    assert tokenizer.decode([label for label in labels if label != -100]) == "Yes<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (templates.NO_SYSTEM, [SYSTEM, *CHAT], "no system turn"),
        (templates.CHATML, [SYSTEM, CHAT[0]], "no assistant turn"),
        (templates.CHATML.replace("m.content", "m.content | upper"), CHAT[2:], "rewrites turn 2"),
        (templates.CHATML.replace("m.content", "m.content[:3]"), CHAT[2:], "rewrites turn 2"),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", CHAT, "refuses"),
    ],
    ids=["refused", "nothing to learn", "upper case", "cut", "broken template"],
)
def test_a_chat_whose_targets_are_uncertain_is_refused(template, messages, why):
    with pytest.raises(ChatError, match=why):
        encode_chat(bytes_tokenizer(template, templates.NO_SYSTEM_TOKENS), messages)
