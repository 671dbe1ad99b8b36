"""Chats become the tokens of their template, with the assistant's words as targets, no others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import templates
from support.bytes_tokenizer import bytes_tokenizer, read_segments

from hf_gradacc.data import train_tokenizer
from hf_gradacc.data.chat import encode_chat, split_chat
from hf_gradacc.data.rendering import ChatError, has_generation_tags

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
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", CHAT, "refuses"),
    ],
    ids=["refused", "nothing to learn", "broken template"],
)
def test_a_chat_that_cannot_be_rendered_or_learned_is_refused(template, messages, why):
    with pytest.raises(ChatError, match=why):
        encode_chat(bytes_tokenizer(template, templates.NO_SYSTEM_TOKENS), messages)


def read_rows(tokenizer, rows):
    """What each row holds, with the learned pieces in brackets."""
    found = []
    for row in rows:
        text, before = "", False
        for token, label in zip(row.input_ids, row.labels, strict=True):
            text += "[" * (label != -100 and not before) + "]" * (label == -100 and before)
            before = label != -100
            text += tokenizer.decode([token])
        found.append(text + "]" * before)
    return found


NO_THOUGHT = {"enable_thinking": False}
ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def test_each_turn_is_learned_behind_its_prompt_and_as_it_is_generated():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, CHAT, options=NO_THOUGHT)
    second = f"4<|im_end|>\n{ASKED.replace('2+2?', 'Sure?')}"
    assert read_rows(tokenizer, rows) == [
        f"{ASKED}{EMPTY}[4<|im_end|>]\n",
        f"{ASKED}{second}{EMPTY}[Yes, 4.<|im_end|>]\n",
    ]
    # Asked with thoughts, the model writes the empty one itself.
    rows = split_chat(tokenizer, CHAT)
    assert read_rows(tokenizer, rows)[0] == f"{ASKED}[{EMPTY}4<|im_end|>]\n"


@pytest.mark.parametrize("name", ["CHATML", "HEADERS", "CLOSED", "RETURNED", "TAGGED"])
def test_a_template_that_prompts_as_it_writes_history_makes_one_row(name):
    tokens = getattr(templates, f"{name}_TOKENS", templates.CHATML_TOKENS)
    tokenizer = bytes_tokenizer(getattr(templates, name), tokens)
    (row,) = split_chat(tokenizer, CHAT)
    assert (row.input_ids, row.labels) == encode_chat(tokenizer, CHAT)
    assert row.notes == {"turns": 2}


@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        ("each", [["4"], ["Yes, 4."]]),
        ("last", [["Yes, 4."]]),
        ("together", [["4", "Yes, 4."]]),
        ("auto", [["4", "Yes, 4."]]),
    ],
)
def test_a_recipe_says_which_turns_share_a_row(turns, learned):
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, CHAT, turns=turns)
    said = [
        tokenizer.decode([label for label in row.labels if label != -100]).split("<|im_end|>")[:-1]
        for row in rows
    ]
    assert said == learned


@pytest.mark.parametrize("answer", ["<b>hi</b>", "<answer>42</answer>", "<", "</think", "think>"])
@pytest.mark.parametrize("turns", ["auto", "together"])
def test_an_answer_may_begin_as_a_thought_does(answer, turns):
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    messages = [CHAT[0], {"role": "assistant", "content": answer}, *CHAT[2:]]
    rows = split_chat(tokenizer, messages, turns=turns, options=NO_THOUGHT)
    learned = "".join(
        tokenizer.decode([label for label in row.labels if label != -100]) for row in rows
    )
    assert learned == f"{answer}<|im_end|>Yes, 4.<|im_end|>"
    assert sum(row.notes["other_prefix"] for row in rows) == (1 if turns == "together" else 0)


def test_two_turns_in_a_row_are_both_learned():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    messages = [*CHAT[:2], {"role": "assistant", "content": "Or 5."}]
    rows = split_chat(tokenizer, messages, options=NO_THOUGHT)
    # Asked for another turn, the template writes the first as an answer, not as history.
    second = f"<|im_start|>assistant\n{EMPTY}[Or 5.<|im_end|>]"
    assert read_rows(tokenizer, rows) == [f"{ASKED}{EMPTY}[4<|im_end|>]\n{second}"]


def test_a_thought_is_left_out_behind_a_prompt_that_holds_an_empty_one():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    (row,) = split_chat(tokenizer, THOUGHTS[:2], options=NO_THOUGHT)
    assert read_rows(tokenizer, [row]) == [f"{ASKED}{EMPTY}[4<|im_end|>]\n"]
    assert row.notes["thought"] == 1
    (row,) = split_chat(tokenizer, THOUGHTS[:2])
    assert read_rows(tokenizer, [row]) == [f"{ASKED}[<think>\n2 and 2\n</think>\n\n4<|im_end|>]\n"]
    assert row.notes["thought"] == 0


def test_a_thought_that_later_turns_drop_is_learned_in_a_row_of_its_own():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, THOUGHTS)
    learned = [tokenizer.decode([t for t in row.labels if t != -100]) for row in rows]
    assert learned == [
        "<think>\n2 and 2\n</think>\n\n4<|im_end|>",
        "<think>\nyes\n</think>\n\nYes, 4.<|im_end|>",
    ]
    together = split_chat(tokenizer, THOUGHTS, turns="together")
    assert together[0].notes["thought"] == 1


@pytest.mark.parametrize("turns", ["auto", "each", "last", "together"])
def test_only_turns_that_are_to_be_learned_are_targets(turns):
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, CHAT, turns=turns, learned=[False, True, False, False])
    assert len(rows) == 1
    assert "[4<|im_end|>]" in read_rows(tokenizer, rows)[0]
    assert "[Yes" not in read_rows(tokenizer, rows)[0]
    (nothing,) = split_chat(tokenizer, CHAT, turns=turns, learned=[False] * 4)
    assert set(nothing.labels) == {-100}


@pytest.mark.parametrize("template", ["CHATML", "THINKING", "HEADERS", "CLOSED"])
def test_turns_of_other_roles_can_be_learned(template):
    tokens = getattr(templates, f"{template}_TOKENS", templates.CHATML_TOKENS)
    tokenizer = bytes_tokenizer(getattr(templates, template), tokens)
    (row,) = split_chat(tokenizer, CHAT, learned=[True, True, True, False])
    learned = tokenizer.decode([label for label in row.labels if label != -100])
    for words in ("2+2?", "4", "Sure?"):
        assert words in learned
    assert "Yes" not in learned


def test_a_turn_whose_tool_call_is_not_rendered_is_not_learned():
    deaf = templates.CLOSED.replace("{% for call in m.tool_calls or [] %}", "{% for call in [] %}")
    tokenizer = bytes_tokenizer(deaf, templates.CLOSED_TOKENS)
    (row,) = split_chat(tokenizer, TOOL_CHAT)
    assert row.notes["tool call"] == 1
    learned = tokenizer.decode([label for label in row.labels if label != -100])
    assert learned == "It is 3.<|done|>Bye.<|done|>\n<|end|>"


@pytest.mark.parametrize(
    ("change", "notes"),
    [("m.content | upper", 0), ("m.content | tojson", 0), ("m.content[:3]", 1), ("'x'", 1)],
)
def test_words_that_a_template_leaves_out_are_counted_and_those_it_rewrites_are_not(change, notes):
    template = templates.CHATML.replace("m.content", change)
    tokenizer = bytes_tokenizer(template, templates.CHATML_TOKENS)
    said = {"role": "assistant", "content": 'Yes, "4".'}
    (row,) = split_chat(tokenizer, [CHAT[2], said])
    assert row.notes["words"] == notes


def test_a_thought_of_its_own_field_that_the_template_does_not_know_is_counted():
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    thoughtful = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    (row,) = split_chat(tokenizer, [CHAT[0], thoughtful])
    assert row.notes["thought"] == 1


def test_a_template_whose_tags_mark_the_last_turn_only_teaches_that_one():
    last = "{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    template = templates.TAGGED.replace(
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
        last + "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    tokenizer = bytes_tokenizer(template, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, CHAT, turns="together")
    assert read_rows(tokenizer, rows)[0].endswith("assistant\n[Yes, 4.<|im_end|>]\n")
    assert "[4" not in read_rows(tokenizer, rows)[0]


def test_a_template_for_tools_is_used_where_there_are_tools():
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
    tagged = templates.TAGGED
    tokenizer.chat_template = {"default": templates.CHATML, "tool_use": "tools!" + tagged}
    assert tokenizer.decode(encode_chat(tokenizer, CHAT)[0]).startswith("<|im_start|>")
    with_tools = encode_chat(tokenizer, CHAT, tools=[{"name": "add"}])
    assert tokenizer.decode(with_tools[0]).startswith("tools!")
    assert (
        tokenizer.decode([t for t in with_tools[1] if t != -100]) == "4<|im_end|>Yes, 4.<|im_end|>"
    )


ALWAYS_PROMPTS = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LATE_SYSTEM = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("turns", ["auto", "together", "last"])
def test_a_prompt_that_a_template_writes_unasked_is_no_target(turns):
    tokenizer = bytes_tokenizer(ALWAYS_PROMPTS, templates.HEADERS_TOKENS)
    (row,) = split_chat(tokenizer, CHAT, turns=turns)
    said = tokenizer.decode([label for label in row.labels if label != -100])
    assert said == "4<|eot_id|>" * (turns != "last") + "Yes, 4.<|eot_id|>"


def test_a_system_turn_that_only_the_prompt_has_is_in_front_of_the_answer():
    tokenizer = bytes_tokenizer(LATE_SYSTEM, ["[INST]", "[/INST]"])
    rows = split_chat(tokenizer, [SYSTEM, *CHAT])
    assert read_rows(tokenizer, rows) == [
        "[INST]Be brief.\n\n2+2?[/INST][4<|end|>]",
        "[INST]2+2?[/INST]4<|end|>[INST]Be brief.\n\nSure?[/INST][Yes, 4.<|end|>]",
    ]


def test_a_prompt_that_begins_a_thought_is_not_answered_without_one():
    template = templates.CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = bytes_tokenizer(template, templates.CHATML_TOKENS)
    rows = split_chat(tokenizer, CHAT)
    assert [row.notes["other_prefix"] for row in rows] == [1, 1]
    assert read_rows(tokenizer, rows)[0] == f"{ASKED}[4<|im_end|>]\n"


def test_a_token_of_prompt_and_answer_belongs_to_the_prompt():
    tokenizer = train_tokenizer(["\n\n", "\n\n b"] * 30, vocab_size=262)
    tokenizer.add_special_tokens({"additional_special_tokens": templates.CHATML_TOKENS})
    tokenizer.chat_template = templates.CHATML
    messages = [CHAT[0], {"role": "assistant", "content": "\n\nfour"}]
    (row,) = split_chat(tokenizer, messages)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    assert tokenizer.decode([t for t in row.labels if t != -100]) == "\nfour<|im_end|>"
    assert row.notes["straddling"] == 1


def test_an_empty_answer_is_not_mistaken_for_one_that_thought():
    tokenizer = bytes_tokenizer(
        templates.THINKING, [*templates.CHATML_TOKENS, "<think>", "</think>"]
    )
    messages = [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:]]
    rows = split_chat(tokenizer, messages)
    assert read_rows(tokenizer, rows)[0] == f"{ASKED}[{EMPTY}<|im_end|>]\n"
    assert len(rows) == 2


def test_a_call_is_learned_from_its_beginning_where_nothing_opens_an_answer():
    call = "{% if m.tool_calls %}[CALLS]{{ m.tool_calls[0].function.name }}{% endif %}"
    template = LATE_SYSTEM.replace("{{ m.content }}{{ eos", call + "{{ m.content }}{{ eos")
    tokenizer = bytes_tokenizer(template, ["[INST]", "[/INST]", "[CALLS]"])
    tool = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    for turns in ("auto", "together"):
        rows = split_chat(tokenizer, [SYSTEM, CHAT[0], tool, *CHAT[2:]], turns=turns)
        assert "[/INST][[CALLS]add<|end|>" in "".join(read_rows(tokenizer, rows))
