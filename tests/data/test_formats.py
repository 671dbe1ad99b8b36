"""Every data format gives tokens and targets that can be written down by hand."""

import pytest
from support import templates
from support.bytes_tokenizer import bytes_tokenizer, read_segments

from hf_gradacc.data.formats import RowError, RowReader, encode_row
from hf_gradacc.data.lengths import Fate, fit_length

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
            [("Question: 2+2?\nAnswer: ", False), ("4" + END, True)],
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
