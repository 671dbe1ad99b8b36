"""Preparing data: held-out rows, packing, mixing, reports, streams, caching."""

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import templates
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.data import encode_row, iter_texts, pack_blocks, prepare_data
from hf_gradacc.data.lengths import measure_lengths, measure_targets
from hf_gradacc.data.section import DataSection, ModelSection, TokenizerSection
from hf_gradacc.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, train_tokenizer
from hf_gradacc.errors import ConfigError, DataError

TOKENIZER = bytes_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write_rows(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write_rows


def prepare(train, **options):
    section = {"train": train, "format": "question_answer"} | options
    return prepare_data(DataSection.model_validate(section), tokenizer=TOKENIZER)


def questions(count, word="q"):
    return [{"question": f"{word}{i}", "answer": "a" * (1 + i)} for i in range(count)]


def texts(rows):
    return [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8),
    block_size=st.integers(2, 7),
)
def test_packing_makes_every_token_but_the_first_a_target_once(documents, block_size):
    corpus = list(itertools.chain.from_iterable(documents))
    blocks = list(pack_blocks(documents, block_size=block_size))
    assert all(1 < len(block) <= block_size for block in blocks)
    assert all(len(block) == block_size for block in blocks[:-1])
    assert [token for block in blocks for token in block[1:]] == corpus[1:]


def test_text_is_packed_with_an_end_after_each_document(write):
    data = prepare(write("t.jsonl", [{"text": "abc"}, {"text": "de"}]), format="text", max_length=4)
    end = TOKENIZER.eos_token_id
    a, b, c, d, e = TOKENIZER("abcde")["input_ids"]
    assert [row["input_ids"] for row in data.train] == [[a, b, c, end], [end, d, e, end]]
    assert all(row["labels"] == row["input_ids"] for row in data.train)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_blocks_do_not_depend_on_the_number_of_processes(write, num_proc):
    rows = [{"text": "x" * (i % 7)} for i in range(2100)]
    path = write("t.jsonl", [row for row in rows if row["text"]])
    blocks = prepare(path, format="text", max_length=16, num_proc=num_proc).train
    assert sum(len(row["input_ids"]) - 1 for row in blocks) == 1800 + 6300 - 1


def test_a_stream_of_text_is_packed_without_losing_a_token_too(write, monkeypatch):
    monkeypatch.setattr("hf_gradacc.data.prepare.STREAMED_DOCUMENTS", 3)
    path = write("t.jsonl", [{"text": "x" * n} for n in (1, 9, 4, 30, 2)])
    blocks = list(prepare(path, format="text", max_length=8, streaming=True).train)
    assert max(len(row["input_ids"]) for row in blocks) == 8
    # 46 characters and 5 ends; each of the two batches has a first token that is no target.
    assert sum(len(row["labels"]) - 1 for row in blocks) == 46 + 5 - 2


@pytest.mark.parametrize(("holdout", "expected"), [(3, 3), (0.25, 3)])
def test_rows_held_out_are_not_trained_on(write, holdout, expected):
    path = write("q.jsonl", questions(12))
    data = prepare(path, holdout=holdout)
    train, held = set(texts(data.train)), set(texts(data.eval))
    assert len(held) == expected
    assert not train & held
    assert train | held == set(texts(prepare(path).train))


def test_a_holdout_of_rows_that_are_all_too_long_names_the_rows_held_out(write):
    rows = [{"question": "q", "answer": "a" * length} for length in (1, 90, 90, 90)]
    with pytest.raises(DataError, match=r"rows.jsonl \(the rows held out\) has no row left: 1"):
        prepare(write("rows.jsonl", rows), holdout=1, max_length=40, too_long="drop")


def test_a_holdout_that_leaves_nothing_is_an_error(write):
    with pytest.raises(DataError, match=r"data\.holdout = 12 takes 12 of 12"):
        prepare(write("q.jsonl", questions(12)), holdout=12)


def test_a_mix_draws_its_sources_by_weight(write):
    sources = [
        {"path": write("a.jsonl", questions(300, "a")), "weight": 3.0},
        {"path": write("b.jsonl", questions(300, "b")), "weight": 1.0},
    ]
    mixed = texts(prepare(sources, mix="first_exhausted").train)
    share = sum("Question: a" in text for text in mixed) / len(mixed)
    assert share == pytest.approx(0.75, abs=0.05)


def test_a_mix_of_formats_is_one_set_of_rows(write):
    sources = [
        write("a.jsonl", questions(5)),
        {
            "path": write("b.jsonl", [{"in": "p", "out": "c"}] * 5),
            "format": "prompt_completion",
            "columns": {"prompt": "in", "completion": "out"},
        },
    ]
    data = prepare(sources)
    assert {"pc", "Question: q0\nAnswer: a"} <= set(texts(data.train))
    assert [report.name for report in data.reports] == [
        "data.train (a.jsonl)",
        "data.train (b.jsonl)",
    ]


def test_the_report_counts_what_was_cut_and_dropped(write):
    rows = [
        *questions(3),
        {"question": "q" * 60, "answer": "a"},
        {"question": "q", "answer": "b" * 60},
    ]
    path = write("q.jsonl", rows)
    (cut,) = prepare(path, max_length=40).reports
    assert (cut.num_rows, cut.num_truncated, cut.num_without_target) == (5, 1, 1)
    assert (cut.num_sequences, cut.longest) == (4, 40)
    (dropped,) = prepare(path, max_length=40, too_long="drop").reports
    assert (dropped.num_too_long, dropped.num_sequences) == (2, 3)
    assert "2 dropped as longer than max_length" in str(dropped)


def test_a_second_run_finds_its_rows_in_the_cache(write, monkeypatch):
    path = write("q.jsonl", questions(4))
    first = list(prepare(path).train)

    def fail(*_args, **_kwargs):
        raise AssertionError("prepared again")

    monkeypatch.setattr("hf_gradacc.data.encode.encode_rows", fail)
    assert list(prepare(path).train) == first
    with pytest.raises(AssertionError, match="prepared again"):
        prepare(path, max_length=5)


@pytest.mark.parametrize(
    "other",
    [
        train_tokenizer(["Question: q Answer: aaaa"] * 9, vocab_size=280),
        bytes_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"),
        bytes_tokenizer("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"),
    ],
    ids=["vocabulary", "template", "another template"],
)
def test_another_tokenizer_does_not_find_them(write, other):
    path = write("q.jsonl", questions(4))
    section = DataSection.model_validate({"train": path, "format": "question_answer"})
    tokenizers = [bytes_tokenizer(CHAT_TEMPLATE), other]
    rows = [list(prepare_data(section, tokenizer=each).train) for each in tokenizers]
    assert rows[0] != rows[1]


def test_classes_are_read_from_the_data(write):
    rows = [{"text": "t", "label": label} for label in ("good", "bad", "good")]
    data = prepare(write("c.jsonl", rows), format="classification")
    assert data.label_names == ["bad", "good"]
    assert [row["labels"] for row in data.train] == [1, 0, 1]


def test_decimal_labels_are_a_regression(write):
    rows = [{"text": "t", "label": label} for label in (0.5, 2.0)]
    data = prepare(write("c.jsonl", rows), format="classification")
    assert data.label_names == []
    assert [row["labels"] for row in data.train] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["10", "2", "1"], ["1", "2", "10"], [2, 1, 0]),
        (["1", "2.5", "3"], [], [1.0, 2.5, 3.0]),
        (["NA", "EU", "NA"], ["EU", "NA"], [1, 0, 1]),
    ],
)
def test_labels_of_a_csv_are_numbers_where_all_of_them_are(tmp_path, labels, names, expected):
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    data = prepare(str(tmp_path / "c.csv"), format="classification")
    assert data.label_names == names
    assert [row["labels"] for row in data.train] == expected


def test_labels_that_are_lists_are_an_error(write):
    with pytest.raises(DataError, match="holds lists or objects"):
        prepare(write("c.jsonl", [{"text": "t", "label": [0, 1]}] * 2), format="classification")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n<|end|>"]),
        ("paragraph", ["one\ntwo<|end|>three\n<|end|>"]),
        ("line", ["one<|end|>two<|end|>three<|end|>"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_file_is_one_document_unless_the_recipe_says_otherwise(
    tmp_path, document, expected, streaming
):
    (tmp_path / "t.txt").write_text("one\ntwo\n\nthree\n")
    options = {"format": "text", "document": document, "streaming": streaming}
    rows = prepare(str(tmp_path / "t.txt"), **options).train
    assert [TOKENIZER.decode(row["input_ids"]) for row in rows] == expected


def test_a_single_class_is_an_error(write):
    with pytest.raises(DataError, match="1 class in its label column"):
        prepare(write("c.jsonl", [{"text": "t", "label": 1}] * 3), format="classification")


def test_the_texts_of_a_tokenizer_are_those_of_the_format(write):
    section = DataSection.model_validate(
        {"train": write("q.jsonl", questions(2)), "format": "question_answer"}
    )
    assert list(iter_texts(section)) == ["q0", "a", "q1", "aa"]


@pytest.mark.parametrize("write_turns", [list, json.dumps], ids=["a list", "text of JSON"])
def test_a_tokenizer_is_trained_on_what_is_said_and_on_nothing_else(write, write_turns):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    file = write("c.jsonl", [{"messages": write_turns(turns)}])
    assert list(iter_texts(DataSection.model_validate({"train": file}))) == ["hi", "yo"]
    file = write("t.jsonl", [{"input_ids": [5, 6]}])
    assert not list(iter_texts(DataSection.model_validate({"train": file, "format": "tokens"})))


def test_a_trained_tokenizer_writes_any_text_and_survives_saving(tmp_path):
    import transformers

    tokenizer = train_tokenizer(["word problems about 217 plums"] * 5, vocab_size=300)
    text = "Zoë's 217 žlutých\nplums\t→ 3 + 4 = 7 …"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("217")["input_ids"]) == 3
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({}, ConfigError, r"tokenizer\.train\.vocab_size"),
        ({"name": "/no/such/folder"}, ConfigError, "cannot be loaded"),
        ({"train": {"vocab_size": 400}}, DataError, "no text"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_explained(options, error, why):
    model = ModelSection(config={"model_type": "llama"})
    with pytest.raises(error, match=why):
        load_tokenizer(TokenizerSection.model_validate(options), model=model)


def test_tokens_can_be_added_and_given_a_role(tmp_path):
    bytes_tokenizer().save_pretrained(tmp_path)
    model = ModelSection(name=str(tmp_path))
    section = TokenizerSection(add_tokens=["<stop>"], eos_token="<stop>", chat_template="{{ 1 }}")
    tokenizer = load_tokenizer(section, model=model)
    assert tokenizer.eos_token == "<stop>"
    assert tokenizer.chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match=r"tokenizer\.add_tokens"):
        load_tokenizer(TokenizerSection(eos_token="<halt>"), model=model)


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_rows_measured_by_columns_are_measured_right(task):
    import datasets

    rows = [
        {"input_ids": list(range(n)), "labels": [-100 if (i * n) % 3 else i for i in range(n)]}
        for n in (5, 0, 1, 9, 2, 7, 3)
    ]
    whole = datasets.Dataset.from_list(rows)
    views = [whole, whole.select([6, 1, 3]), whole.select(range(2, 5))]
    for view in [*views, datasets.concatenate_datasets(views)]:
        plain = list(view)
        assert measure_lengths(view).tolist() == measure_lengths(plain).tolist()
        first = 1 if task == "causal_lm" else 0
        by_hand = [sum(label != -100 for label in row["labels"][first:]) for row in plain]
        assert measure_targets(view, task=task).tolist() == by_hand


def test_blocks_of_text_are_found_in_the_cache_as_well(write, monkeypatch):
    import datasets

    path = write("t.jsonl", [{"text": "abc" * n} for n in range(1, 9)])
    first = list(prepare(path, format="text", max_length=8).train)

    def fail(*_args, **_kwargs):
        raise AssertionError("packed again")

    monkeypatch.setattr("hf_gradacc.data.prepare.pack_blocks", fail)
    assert list(prepare(path, format="text", max_length=8).train) == first
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        prepare(path, format="text", max_length=9)


def test_rows_are_read_in_as_many_processes_as_the_recipe_says(write, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradacc.data.encode.encode_rows", note_process)
    monkeypatch.setenv("NOTES", str(tmp_path))
    path = write("q.jsonl", questions(40))
    prepare(path, num_proc=2)
    processes = {file.name for file in tmp_path.glob("process-*")}
    assert len(processes) == 2
    assert f"process-{os.getpid()}" not in processes


def note_process(reader, row, *, format):
    (Path(os.environ["NOTES"]) / f"process-{os.getpid()}").touch()
    return [encode_row(reader, row, format=format)]


THINKING = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
BROKEN = {"question": None, "answer": "a"}


def prepare_chats(train, tokenizer=THINKING, **options):
    section = {"train": train, "format": "chat"} | options
    return prepare_data(DataSection.model_validate(section), tokenizer=tokenizer)


def test_a_conversation_of_several_sequences_is_counted_as_one_row(write):
    path = write("c.jsonl", [{"messages": TALK}] * 3)
    data = prepare_chats(path, template_options={"enable_thinking": False})
    (report,) = data.reports
    assert (report.num_rows, report.num_sequences, report.notes["split"]) == (3, 6, 3)
    assert "3 more sequences than rows" in str(report)
    together = prepare_chats(path, assistant_turns="together")
    assert len(together.train) == 3
    each = prepare_chats(path, assistant_turns="each")
    assert "3 more sequences than rows: one for each turn" in str(each.reports[0])
    again = prepare_chats(path, template_options={"enable_thinking": False})
    assert again.reports == data.reports  # from the cache


def test_all_sequences_of_a_row_are_held_out_together(write):
    rows = [{"messages": [{**turn, "content": f"{i:02}"} for turn in TALK]} for i in range(20)]
    path = write("c.jsonl", rows)
    data = prepare_chats(path, holdout=5, template_options={"enable_thinking": False})
    assert [report.num_rows for report in data.reports] == [15, 5]
    sides = []
    for side in (data.train, data.eval):
        said = [THINKING.decode([t for t in row["labels"] if t != -100])[:2] for row in side]
        assert all(said.count(name) == 2 for name in said)
        sides.append(set(said))
    assert not sides[0] & sides[1]


def test_unusable_rows_are_named_or_dropped_and_counted(write):
    path = write("q.jsonl", [*questions(2), BROKEN, *questions(1), BROKEN])
    with pytest.raises(DataError, match=r"q.jsonl:3: .* is null.* data.unusable to drop"):
        prepare(path)
    (report,) = prepare(path, unusable="drop").reports
    assert (report.num_rows, report.num_sequences, report.num_unusable) == (5, 3, 2)
    assert "2 dropped as unusable" in str(report)
    assert "q.jsonl:3: column 'question' is null" in str(report)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "options", "why", "not_said"),
    [
        ([BROKEN] * 2, {"unusable": "drop"}, "2 dropped as unusable.*is null", "max_length"),
        (
            questions(3),
            {"max_length": 4, "too_long": "drop"},
            "3 dropped as longer than max_length: raise data.max_length, or set data.too_long",
            "too_long to drop",
        ),
        (questions(3), {"max_length": 4}, "3 dropped as having no target", "truncate"),
    ],
)
def test_a_source_of_which_nothing_is_left_says_why_and_what_helps(
    write, rows, options, why, not_said, streaming
):
    with pytest.raises(DataError, match=why) as caught:
        list(prepare(write("q.jsonl", rows), streaming=streaming, **options).train)
    assert not_said not in str(caught.value)


def test_a_stream_tells_what_it_leaves_out_ever_more_seldom(write, caplog):
    rows = [*questions(40), *[{"question": "q" * 60, "answer": "a"}] * 60]
    options = {"max_length": 50, "too_long": "drop", "streaming": True}
    stream = prepare(write("q.jsonl", rows), **options).train
    counts = [len(list(stream)) for _ in range(2)]
    lines = [record.getMessage() for record in caplog.records]
    dropped = 100 - counts[0]
    assert counts[0] == counts[1]
    assert 60 < dropped < 100
    ends = [line for line in lines if "in this pass" in line]
    assert len(ends) == 2
    assert all(f"100 rows read in this pass, {dropped} dropped as longer" in line for line in ends)
    assert 2 * 5 < len(lines) - len(ends) < 2 * 9  # at 1, 2, 4, ... rows


def test_a_stream_without_rows_says_so(write):
    file = write("empty.csv", [])
    Path(file).write_text("question,answer\n")
    with pytest.raises(DataError, match=r"empty.csv has no rows"):
        prepare(file, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_a_format_does_not_read_are_named_once(write, streaming):
    rows = [{**row, "source": "x", "score": 1} for row in questions(3)]
    data = prepare(write("q.jsonl", rows), streaming=streaming)
    (remark,) = data.remarks
    assert remark.endswith("format 'question_answer' does not read the columns source, score")
    assert prepare(write("r.jsonl", questions(3)), streaming=streaming).remarks == []
