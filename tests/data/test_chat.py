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


CLOSED_READING = [
    ("<|user|>\n2+2?<|done|>\n<|assistant|>\n", False),
    ("4<|done|>", True),
    ("\n<|user|>\nSure?<|done|>\n<|assistant|>\n", False),
    ("Yes, 4.<|done|>\n<|end|>", True),
]
RETURNED_READING = [
    ("<|start|>user<|message|>2+2?<|done|><|start|>assistant<|message|>", False),
    ("4<|done|>", True),
    ("<|start|>user<|message|>Sure?<|done|><|start|>assistant<|message|>", False),
    ("Yes, 4.<|return|>", True),
]
GREETING = [{"role": "assistant", "content": "Hello!"}, *CHAT[:2]]
GREETING_READING = [
    ("<|im_start|>assistant\n", False),
    ("Hello!<|im_end|>", True),
    ("\n", False),
    *CHATML_READING[1:3],
    ("\n", False),
]
THOUGHTS = [
    CHAT[0],
    {"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\n4"},
    CHAT[2],
    {"role": "assistant", "content": "<think>\nyes\n</think>\n\nYes, 4."},
]
THOUGHTS_READING = [
    *CHATML_READING[1:4],
    ("<think>\nyes\n</think>\n\nYes, 4.<|im_end|>", True),
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
        (templates.THINKING, templates.CHATML_TOKENS, THOUGHTS, THOUGHTS_READING),
        (templates.CLOSED, templates.CLOSED_TOKENS, CHAT, CLOSED_READING),
        (templates.RETURNED, templates.RETURNED_TOKENS, CHAT, RETURNED_READING),
        (templates.CHATML, templates.CHATML_TOKENS, GREETING, GREETING_READING),
    ],
    ids=[
        "chatml",
        "generation tags",
        "headers",
        "no system turn",
        "thinking",
        "thoughts",
        "a token closes the conversation",
        "the last turn ends otherwise",
        "the assistant begins",
    ],
)
def test_a_chat_is_read_as_its_template_says(template, tokens, messages, reading):
    tokenizer = bytes_tokenizer(template, tokens)
    assert encode_chat(tokenizer, messages) == read_segments(tokenizer, reading)


def test_only_the_tagged_template_says_itself_what_the_assistant_wrote():
    tagged = bytes_tokenizer(templates.TAGGED, templates.CHATML_TOKENS)
    assert has_generation_tags(tagged)
    assert not has_generation_tags(bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS))


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<|>\r"), min_size=1, max_size=12)
# A template that trims turns leaves nothing of one that is all blanks, and such a turn is refused.
WORDS = WORDS.filter(str.strip)
SEARCHED = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
THINKING = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
TAGGED = bytes_tokenizer(templates.TAGGED, templates.CHATML_TOKENS)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_searching_for_the_words_finds_what_the_tags_say(turns):
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert encode_chat(SEARCHED, messages) == encode_chat(TAGGED, messages)
    # With a thought that the template prompts with, and drops from earlier turns.
    _, labels = encode_chat(THINKING, messages, enable_thinking=False)
    said = THINKING.decode([label for label in labels if label != -100])
    assert said == "".join(f"{text.lstrip(chr(10))}<|im_end|>" for _, text in turns)


ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOL_CHAT = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": ADD}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]


def test_a_tool_call_is_a_target_and_what_the_tool_answers_is_not():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    ids, labels = encode_chat(tokenizer, TOOL_CHAT, tools=[{"name": "add"}])
    reading = [
        ('<|im_start|>system\n[{"name": "add"}]<|im_end|>\n', False),
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>', True),
        ("\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 3.<|im_end|>", True),
        ("\n<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nBye.<|im_end|>", True),
        ("\n", False),
    ]
    assert (ids, labels) == read_segments(tokenizer, reading)


def test_a_tool_call_keeps_its_end_where_a_token_closes_the_conversation():
    tokenizer = bytes_tokenizer(templates.CLOSED, templates.CLOSED_TOKENS)
    _, labels = encode_chat(tokenizer, TOOL_CHAT[:4])
    said = tokenizer.decode([label for label in labels if label != -100])
    call = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    assert said == f"{call}<|done|>It is 3.<|done|>\n<|end|>"


def test_a_thought_the_template_prompts_with_is_no_target():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    _, labels = encode_chat(tokenizer, CHAT, enable_thinking=False)
    said = tokenizer.decode([label for label in labels if label != -100])
    assert said == "4<|im_end|>Yes, 4.<|im_end|>"


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused():
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(ChatError, match="use a fast one"):
        encode_chat(tokenizer, CHAT)


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
