"""Every data format gives tokens and targets that can be written down by hand."""

import json

import pytest
from support import templates
from support.bytes_tokenizer import bytes_tokenizer, read_segments

from hf_gradacc.data.formats import encode_row, encode_rows
from hf_gradacc.data.lengths import fit_length
from hf_gradacc.data.reader import RowError, RowReader
from hf_gradacc.data.report import Fate

PLAIN = bytes_tokenizer()
CHAT = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
END = "<|end|>"


def encode(tokenizer, row, format, **options):
    encoded = encode_row(RowReader(tokenizer, **options), row, format=format)
    return encoded["input_ids"], encoded["labels"]


@pytest.mark.parametrize(
    ("format", "row", "reading"),
    [
        (
            "prompt_completion",
            {"prompt": "Say: ", "completion": "hé"},
            [("Say: ", False), ("hé" + END, True)],
        ),
        (
            "question_answer",
            {"question": "2+2?", "answer": "4"},
            [("Question: 2+2?\nAnswer:", False), (" 4" + END, True)],
        ),
        (
            "instruction",
            {"instruction": "Add.", "input": "2 2", "output": "4"},
            [
                ("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n", False),
                ("4" + END, True),
            ],
        ),
        (
            "instruction",
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            [("### Instruction:\nGreet.\n\n### Response:\n", False), ("Hi" + END, True)],
        ),
        ("text", {"text": "All of it"}, [("All of it" + END, True)]),
    ],
    ids=["prompt", "question", "instruction", "instruction without input", "text"],
)
def test_a_plain_format_is_read_as_written(format, row, reading):
    assert encode(PLAIN, row, format) == read_segments(PLAIN, reading)


@pytest.mark.parametrize(
    ("format", "row", "asked", "answered"),
    [
        ("question_answer", {"question": "2+2?", "answer": "4"}, "2+2?", "4"),
        ("instruction", {"instruction": "Add.", "input": "2 2", "output": "4"}, "Add.\n\n2 2", "4"),
    ],
)
def test_a_question_becomes_a_chat_where_the_tokenizer_has_a_template(format, row, asked, answered):
    reading = [
        (f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", False),
        (f"{answered}<|im_end|>", True),
        ("\n", False),
    ]
    assert encode(CHAT, row, format) == read_segments(CHAT, reading)


def test_a_system_turn_is_put_before_rows_that_have_none():
    _, labels = encode(CHAT, {"question": "?", "answer": "!"}, "question_answer", system="Hm")
    ids, _ = encode(CHAT, {"question": "?", "answer": "!"}, "question_answer", system="Hm")
    assert CHAT.decode(ids).startswith("<|im_start|>system\nHm<|im_end|>\n<|im_start|>user")
    assert CHAT.decode([label for label in labels if label != -100]) == "!<|im_end|>"


def test_sharegpt_turns_are_read_as_roles():
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ids, labels = encode(CHAT, row, "chat", columns={"messages": "conversations"})
    assert CHAT.decode(ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert sum(label != -100 for label in labels) == 2


def test_seq2seq_has_its_own_target_sequence():
    ids, labels = encode(PLAIN, {"source": "long", "target": "s"}, "seq2seq", source_prefix="sum: ")
    assert PLAIN.decode(ids) == "sum: long" + END
    assert PLAIN.decode(labels) == "s" + END


def test_a_tool_call_is_written_without_the_nulls_that_arrow_fills_in():
    template = "{{ tools | tojson }}{% for m in messages %}{{ (m.tool_calls or []) | tojson }}"
    template += "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    turns = [
        {"role": "user", "content": "q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "x", "tool_calls": None},
    ]
    tokenizer = bytes_tokenizer(template)
    for tools in ([{"name": "add", "strict": None}], '[{"name": "add"}]'):
        ids, _ = encode(tokenizer, {"messages": turns, "tools": tools}, "chat")
        assert tokenizer.decode(ids) == (
            '[{"name": "add"}][]q[{"function": {"name": "add", "arguments": {"a": 1}}}][]x'
        )


def test_an_empty_document_is_left_out():
    encoded = encode_row(RowReader(PLAIN), {"text": ""}, format="text")
    assert fit(encoded, format="text")[1] is Fate.NO_TARGET


def test_a_template_reads_the_values_a_recipe_gives_it():
    template = "{{ date }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    tokenizer = bytes_tokenizer(template + "{% endfor %}")
    options = {"template_options": {"date": "1 May"}}
    ids, _ = encode(tokenizer, {"messages": CHAT_ROW}, "chat", **options)
    assert tokenizer.decode(ids) == "1 Mayab"


@pytest.mark.parametrize(("label", "expected"), [("b", 1), (0.25, 0.25), ("7", 7.0)])
def test_a_class_is_an_id_and_a_number_stays_one(label, expected):
    label_ids = {"a": 0, "b": 1} if label == "b" else None
    _, found = encode(PLAIN, {"text": "x", "label": label}, "classification", label_ids=label_ids)
    assert found == expected


CHAT_ROW = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("format", "row", "column", "why"),
    [
        ("question_answer", {"question": None, "answer": "a"}, "question", "is null"),
        ("question_answer", {"answer": "a"}, "question", "is missing"),
        ("question_answer", {"question": ["a"], "answer": "a"}, "question", "is a list, not text"),
        ("prompt_completion", {"prompt": "a", "completion": {}}, "completion", "is an object"),
        ("text", {"text": True}, "text", "is a boolean"),
        ("chat", {"messages": "hello"}, "messages", "is text, not a list of turns"),
        ("chat", {"messages": []}, "messages", "not a list of turns"),
        ("chat", {"messages": ["hello"]}, "messages", "text as turn 1"),
        ("chat", {"messages": [{"content": "a"}]}, "messages", "no role in turn 1"),
        ("chat", {"messages": [{"role": "user"}]}, "messages", "null as content of turn 1"),
        ("chat", {"messages": CHAT_ROW[:1]}, "messages", "no assistant turn"),
        (
            "chat",
            {"messages": [CHAT_ROW[0], {"role": "assistent", "content": "b"}]},
            "messages",
            "unknown role 'assistent' in turn 2; did you mean assistant",
        ),
        ("chat", {"messages": CHAT_ROW, "tools": "[{"}, "tools", "is not JSON"),
        ("chat", {"messages": CHAT_ROW, "tools": {"a": 1}}, "tools", "is an object, not a list"),
        ("question_answer", {"question": 1.5, "answer": "a"}, "question", "write it in quotes"),
        ("classification", {"text": "a", "label": None}, "label", "is null"),
        ("classification", {"text": "a", "label": "z"}, "label", "none of a, b"),
    ],
)
def test_a_malformed_row_names_its_column_and_fault(format, row, column, why):
    reader = RowReader(CHAT, label_ids={"a": 0, "b": 1})
    with pytest.raises(RowError, match=why) as caught:
        encode_row(reader, row, format=format)
    assert caught.value.column == column


def test_a_chat_without_a_template_says_how_to_get_one():
    with pytest.raises(RowError, match=r"tokenizer\.chat_template"):
        encode_row(RowReader(PLAIN), {"messages": CHAT_ROW}, format="chat")


def fit(encoded, format="chat", **options):
    settings = {"max_length": 5, "max_target_length": None, "too_long": "truncate"} | options
    return fit_length(encoded, format=format, **settings)


def test_an_assistant_turn_cut_by_max_length_keeps_the_targets_before_the_cut():
    ids, labels = encode(CHAT, {"messages": CHAT_ROW}, "chat")
    start = next(i for i, label in enumerate(labels) if label != -100)
    cut, fate = fit({"input_ids": ids, "labels": labels}, max_length=start + 1)
    assert fate is Fate.TRUNCATED
    assert CHAT.decode(cut["input_ids"]).endswith("assistant\nb")
    assert [label for label in cut["labels"] if label != -100] == CHAT("b")["input_ids"]


def test_a_row_whose_targets_are_all_cut_off_is_dropped():
    ids, labels = encode(CHAT, {"messages": CHAT_ROW}, "chat")
    start = next(i for i, label in enumerate(labels) if label != -100)
    _, fate = fit({"input_ids": ids, "labels": labels}, max_length=start)
    assert fate is Fate.NO_TARGET


def test_a_first_token_alone_is_no_target():
    _, fate = fit({"input_ids": [1, 2, 3], "labels": [1, -100, -100]})
    assert fate is Fate.NO_TARGET


@pytest.mark.parametrize("too_long", ["drop", "error"])
def test_a_long_row_is_marked_where_it_may_not_be_cut(too_long):
    row = {"input_ids": [1] * 6, "labels": [1] * 6}
    assert fit(row, too_long=too_long) == (row, Fate.TOO_LONG)
    assert fit(row, too_long=too_long, max_length=6)[1] is Fate.KEPT


def test_an_encoder_keeps_its_closing_token_and_a_cut_target_has_no_end():
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 9], "labels": [5, 6, 7, 9]}
    cut, fate = fit(row, format="seq2seq", max_target_length=3)
    assert fate is Fate.TRUNCATED
    assert cut == {"input_ids": [1, 2, 3, 4, 9], "labels": [5, 6, 7]}


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "WRONG"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "right"},
]


def learned(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded["labels"] if label != -100])


@pytest.mark.parametrize("value", [0, False, 0.0, "false", "0"])
@pytest.mark.parametrize("mark", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
def test_a_turn_marked_not_to_be_learned_is_no_target(mark, value):
    turns = [dict(turn) for turn in TURNS]
    turns[1][mark], turns[3][mark] = value, 1
    reader = RowReader(CHAT)
    (row,) = encode_rows(reader, {"messages": turns}, format="chat")
    assert learned(CHAT, row) == "right<|im_end|>"
    assert mark not in CHAT.decode(row["input_ids"])
    assert reader.notes["marked_off"] == 1


def test_a_conversation_with_every_turn_marked_off_is_left_out_and_no_error():
    turns = [{**turn, "train": False} for turn in TURNS]
    assert fit(encode_row(RowReader(CHAT), {"messages": turns}, format="chat"))[1] is Fate.NO_TARGET


def test_roles_to_train_decide_and_a_mark_beyond_them_is_counted():
    turns = [{**TURNS[0], "weight": 1}, *TURNS[1:]]
    reader = RowReader(CHAT)
    encoded = encode_row(reader, {"messages": turns}, format="chat")
    assert "a" not in learned(CHAT, encoded)
    assert reader.notes["mark_ignored"] == 1
    reader = RowReader(CHAT, roles_to_train=["user", "assistant"])
    encoded = encode_row(reader, {"messages": turns}, format="chat")
    assert learned(CHAT, encoded) == "a<|im_end|>WRONG<|im_end|>b<|im_end|>right<|im_end|>"
    assert reader.notes["mark_ignored"] == 0


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"weight": 0.5}, "weight = 0.5 in turn 2; a turn is learned"),
        ({"train": "maybe"}, "train = 'maybe' in turn 2"),
        ({"train": True, "weight": 0}, "contradicts itself in turn 2"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail in turn 2"),
        ({"content": [{"type": "image"}]}, "a part of type 'image' in turn 2"),
        ({"content": 1.5}, "a decimal number as content of turn 2"),
        ({"content": "", "tool_calls": [{"arguments": {}}]}, "a tool call without a name"),
    ],
)
def test_a_turn_that_cannot_be_heard_is_named(turn, why):
    turns = [TURNS[0], {**TURNS[1], **turn}]
    with pytest.raises(RowError, match=why):
        encode_row(RowReader(CHAT), {"messages": turns}, format="chat")


def test_pieces_of_text_are_one_turn():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turns = [TURNS[0], {"role": "assistant", "content": parts}]
    encoded = encode_row(RowReader(CHAT), {"messages": turns}, format="chat")
    assert learned(CHAT, encoded) == "one two<|im_end|>"


def test_sharegpt_calls_a_tool_in_a_turn_of_its_own():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    row = {"conversations": turns}
    reader = RowReader(tokenizer, columns={"messages": "conversations"})
    encoded = encode_row(reader, row, format="chat")
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>'
    assert learned(tokenizer, encoded).startswith(call)


SYSTEM_READING = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("chat", {"messages": CHAT_ROW}),
        ("question_answer", {"question": "a", "answer": "b"}),
        ("instruction", {"instruction": "a", "output": "b"}),
    ],
)
def test_a_system_column_is_a_turn_and_goes_before_the_recipes(format, row):
    for reader in (RowReader(CHAT), RowReader(CHAT, system="Be long.")):
        ids = encode_row(reader, {**row, "system": "Be brief."}, format=format)["input_ids"]
        assert CHAT.decode(ids).startswith(SYSTEM_READING)
    ids = encode_row(reader, {**row, "system": ""}, format=format)["input_ids"]
    assert CHAT.decode(ids).startswith(SYSTEM_READING.replace("brief", "long"))


def test_two_different_system_turns_are_refused():
    turns = [{"role": "system", "content": "Be brief."}, *CHAT_ROW]
    row = {"messages": turns, "system": "Be brief."}
    assert encode_row(RowReader(CHAT), row, format="chat")
    with pytest.raises(RowError, match="another system turn"):
        encode_row(RowReader(CHAT), {**row, "system": "Be long."}, format="chat")


@pytest.mark.parametrize("history", [[["q0", "a0"]], '[["q0", "a0"]]'])
def test_a_history_comes_before_its_question(history):
    row = {"instruction": "q1", "output": "a1", "history": history}
    encoded = encode_row(RowReader(CHAT), row, format="instruction")
    assert learned(CHAT, encoded) == "a0<|im_end|>a1<|im_end|>"
    encoded = encode_row(RowReader(PLAIN), row, format="instruction")
    assert PLAIN.decode(encoded["input_ids"]) == (
        "### Instruction:\nq0\n\n### Response:\na0\n\n"
        f"### Instruction:\nq1\n\n### Response:\na1{END}"
    )
    assert learned(PLAIN, encoded) == f"a1{END}"
    for broken in ([["q0"]], "[[", [["q0", 1]]):
        with pytest.raises(RowError, match="history"):
            encode_row(RowReader(CHAT), {**row, "history": broken}, format="instruction")


def test_a_null_that_a_tool_asks_for_is_an_argument_and_one_that_arrow_fills_in_is_not():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    parameters = {"type": "object", "properties": {}, "required": ["unit"]}
    tools = [{"type": "function", "function": {"name": "heat", "parameters": parameters}}]
    call = {"function": {"name": "heat", "arguments": {"city": "Bonn", "unit": None, "x": None}}}
    turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    encoded = encode_row(RowReader(tokenizer), {"messages": turns, "tools": tools}, format="chat")
    assert '"arguments": {"city": "Bonn", "unit": null}' in learned(tokenizer, encoded)


def test_a_row_brings_values_for_its_template():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    row = {"messages": CHAT_ROW, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    assert learned(tokenizer, encode_row(RowReader(tokenizer), row, format="chat")) == "b<|im_end|>"
    with pytest.raises(RowError, match="chat_template_kwargs"):
        encode_row(RowReader(tokenizer), {**row, "chat_template_kwargs": [1]}, format="chat")


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": None}, [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [-100, 6, 7]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "assistant_masks": [False, True, True]}, [-100, 6, 7]),
        (
            {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]},
            [-100, -100, 7],
        ),
        (
            {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "completion_mask": [0, 1, 1]},
            [-100, -100, 7],
        ),
    ],
)
def test_rows_of_tokens_are_taken_as_they_are(row, labels):
    encoded = encode_row(RowReader(PLAIN), row, format="tokens")
    assert encoded == {"input_ids": [5, 6, 7], "labels": labels}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"input_ids": [5, 999]}, "has token 999, and the vocabulary ends at"),
        ({"input_ids": [5, -1]}, "has token -1"),
        ({"input_ids": [5, 6], "labels": [5]}, "has 1 labels for 2 tokens"),
        ({"input_ids": [5, 6], "labels": [5, -1]}, "has -1, which is no token and not -100"),
        ({"input_ids": "5 6"}, "is text, not a list of whole numbers"),
        ({"input_ids": [5.0]}, "not a list of whole numbers"),
        ({"input_ids": None}, "is null"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "has 1 entries for 2 tokens"),
        ({"input_ids": [5, 6], "attention_mask": [[1, 0], [1, 1]]}, "not a list of 0 and 1"),
        ({"input_ids": [5, 6], "completion_mask": [1, 2]}, "not a list of 0 and 1"),
    ],
)
def test_rows_of_tokens_that_are_none_are_named(row, why):
    with pytest.raises(RowError, match=why):
        encode_row(RowReader(PLAIN), row, format="tokens")
    wide = RowReader(PLAIN, vocab_size=1000)
    if row["input_ids"] == [5, 999]:
        assert encode_row(wide, row, format="tokens")


@pytest.mark.parametrize(
    "mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [True, True, True, False, False]]
)
def test_rows_that_are_padded_already_lose_their_padding(mask):
    kept = iter([5, 6, 7])
    ids = [next(kept) if seen else 0 for seen in mask]
    labels = [-100 if token in (0, 5) else token for token in ids]
    row = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    encoded = encode_row(RowReader(PLAIN), row, format="tokens")
    assert encoded == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


FORMS = {
    "text of JSON": json.dumps,
    "indented text of JSON": lambda turns: json.dumps(turns, indent=1),
    "an object of lists": lambda turns: {
        "role": [turn["role"] for turn in turns],
        "content": [turn["content"] for turn in turns],
    },
    "an object of lists, of ShareGPT": lambda turns: {
        "from": [{"user": "human", "assistant": "gpt"}[turn["role"]] for turn in turns],
        "value": [turn["content"] for turn in turns],
    },
    "roles in capitals": lambda turns: [
        {"role": turn["role"].upper(), "content": turn["content"]} for turn in turns
    ],
    "roles of LangChain": lambda turns: [
        {"role": {"user": "human", "assistant": "ai"}[turn["role"]], "content": turn["content"]}
        for turn in turns
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_turns_are_read_in_whatever_form_a_cell_holds_them(form):
    write = FORMS[form]
    expected = encode_row(RowReader(CHAT), {"messages": TURNS}, format="chat")
    row = {"messages": write(TURNS)}
    assert encode_row(RowReader(CHAT), row, format="chat") == expected
    halves = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    expected = encode_row(RowReader(CHAT), halves, format="prompt_completion")
    assert learned(CHAT, expected) == "right<|im_end|>"
    row = {name: write(turns) for name, turns in halves.items()}
    assert encode_row(RowReader(CHAT), row, format="prompt_completion") == expected


@pytest.mark.parametrize("text", ["[1, 2]", "[", '{"role": 5}', '[{"a": 1}]', "[]", '["hi"]', "{}"])
def test_a_text_that_only_begins_as_turns_do_is_a_text(text):
    row = {"prompt": text, "completion": text}
    encoded = encode_row(RowReader(PLAIN), row, format="prompt_completion")
    assert PLAIN.decode(encoded["input_ids"]) == f"{text}{text}{END}"
    with pytest.raises(RowError, match="is text, not a list of turns"):
        encode_row(RowReader(CHAT), {"messages": text}, format="chat")


@pytest.mark.parametrize(
    "answer",
    [
        {"from": "Rome", "to": "Bern"},
        {"role": "engineer", "name": "Ann"},
        [{"role": "user", "email": "a@b.c"}],
        {"from": "EUR", "to": "CHF", "value": 12},
        {"from": ["Rome"], "to": ["Bern"]},
    ],
    ids=str,
)
def test_answers_in_json_are_texts_though_they_name_a_role_or_where_from(answer):
    text = json.dumps(answer)
    row = {"prompt": text, "completion": text}
    encoded = encode_row(RowReader(PLAIN), row, format="prompt_completion")
    assert PLAIN.decode(encoded["input_ids"]) == f"{text}{text}{END}"
    pair = {"prompt": "Which?", "chosen": text, "rejected": text + " "}
    encoded = encode_row(RowReader(PLAIN, task="dpo"), pair, format="preference")
    assert PLAIN.decode(encoded["chosen_ids"]) == text + END


def test_a_role_that_is_mistyped_in_json_is_named_and_not_trained_as_text():
    turns = [{"role": "assistent", "content": "4"}]
    row = {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(turns)}
    with pytest.raises(RowError, match="did you mean assistant"):
        encode_row(RowReader(CHAT), row, format="prompt_completion")


def test_a_prompt_and_a_completion_may_be_turns():
    row = {"prompt": [TURNS[0], TURNS[1], TURNS[2]], "completion": [TURNS[3]]}
    encoded = encode_row(RowReader(CHAT), row, format="prompt_completion")
    assert learned(CHAT, encoded) == "right<|im_end|>"
    assert "WRONG" in CHAT.decode(encoded["input_ids"])
    row = {"prompt": TURNS[:2], "completion": TURNS[2:3]}
    with pytest.raises(RowError, match="no assistant turn"):
        encode_row(RowReader(CHAT), row, format="prompt_completion")


def test_a_call_by_its_older_name_is_a_tool_call():
    tokenizer = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
    call = {"name": "add", "arguments": {"a": 2}}
    turns = [TURNS[0], {"role": "assistant", "content": None, "function_call": call}]
    encoded = encode_row(RowReader(tokenizer), {"messages": turns}, format="chat")
    assert '<tool_call>{"name": "add"' in learned(tokenizer, encoded)
