"""Bad data files of every kind we could think of: one error each, naming file, line and column."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.data import prepare_data
from hf_gradacc.data.sources import load_source, locate_row
from hf_gradacc.errors import DataError
from hf_gradacc.recipe_data import DataSection, SourceSection

GOOD = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
TOKENIZER = bytes_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def prepare(path, **options):
    section = {"train": str(path), "format": "question_answer"} | options
    return prepare_data(DataSection.model_validate(section), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "place", "why"),
    [
        ("a.jsonl", "", "a.jsonl", "empty"),
        ("a.jsonl", "\n\n", "a.jsonl", "empty"),
        ("a.jsonl", lines(GOOD[0], '{"question": "x", "answer"'), "a.jsonl:2", "not a JSON"),
        ("a.jsonl", lines(GOOD[0], "[1, 2]"), "a.jsonl:2", "not a list"),
        ("a.jsonl", lines("hello"), "a.jsonl:1", "not a JSON"),
        ("a.jsonl", lines(GOOD[0], '"text"'), "a.jsonl:2", "not text"),
        (
            "a.jsonl",
            lines(GOOD[0], "", {"question": "x", "answer": None}),
            "a.jsonl:3",
            "column 'answer' is null",
        ),
        ("a.jsonl", lines(GOOD[0], {"question": "x"}), "a.jsonl:2", "column 'answer' is null"),
        (
            "a.jsonl",
            lines(GOOD[0], {"question": "x", "answer": {"text": "y"}}),
            "a.jsonl:2",
            "column 'answer'",
        ),
        ("a.json", '[{"question": "x", "answer": "y"}', "a.json:1", "not JSON"),
        ("a.json", '[{"question": "x", "answer": "y"}, 5]', "a.json: row 2", "JSON object"),
        ("a.jsonl", b'{"question": "\xff\xfe", "answer": "a"}\n', "a.jsonl:1", "UTF-8"),
        ("a.csv", "", "a.csv", "empty"),
        ("a.csv", "question,answer\n", "a.csv", "no rows"),
        ("a.csv", 'question,answer\n"two\nlines",2\nthird,\n', "a.csv:4", "'answer' is null"),
        ("a.csv", b"question,answer\n\xff\xfe,1\n", "a.csv:2", "UTF-8"),
        ("a.parquet", b"not a parquet file", "a.parquet", "cannot be read"),
        ("a.arrow", b"not an arrow file", "a.arrow", "cannot be read"),
        ("a.xlsx", b"PK\x03\x04", "a.xlsx", ".xlsx"),
    ],
)
def test_a_bad_file_is_reported_with_its_place(tmp_path, name, content, place, why):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        prepare(file)
    assert place in str(caught.value)
    assert why in str(caught.value)


def test_a_bad_row_in_the_second_file_of_a_folder_is_found(tmp_path):
    (tmp_path / "1.jsonl").write_text(lines(*GOOD))
    (tmp_path / "2.jsonl").write_text(lines(GOOD[0], {"question": None, "answer": "a"}))
    with pytest.raises(DataError, match=r"2\.jsonl:2: column 'question' is null"):
        prepare(tmp_path)


def test_a_bad_row_of_a_parquet_file_is_named_by_number(tmp_path):
    table = pa.table({"question": ["a", None], "answer": ["b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: column 'question' is null"):
        prepare(tmp_path / "a.parquet")


def test_a_bad_row_is_reported_from_a_worker_process_too(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD, {"question": "q", "answer": None}))
    with pytest.raises(DataError, match=r"a\.jsonl:5: column 'answer' is null"):
        prepare(tmp_path / "a.jsonl", num_proc=2)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"questions": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"no column 'question'.*\{question: questions\}"):
        prepare(tmp_path / "a.jsonl")


def test_a_folder_of_mixed_types_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    (tmp_path / "b.csv").write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match=r"\.csv, \.jsonl"):
        prepare(tmp_path)


def test_an_unknown_hub_set_says_what_to_check():
    with pytest.raises(DataError, match="online"):
        load_source(SourceSection(path="nobody/no-such-set"))


def test_a_row_too_long_is_an_error_where_the_recipe_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(GOOD[0], {"question": "q" * 90, "answer": "a"}))
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens exceed data\.max_length = 40"):
        prepare(tmp_path / "a.jsonl", max_length=40, too_long="error")


def test_a_policy_that_drops_every_row_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    with pytest.raises(DataError, match="no row left"):
        prepare(tmp_path / "a.jsonl", max_length=3, too_long="drop")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    table = pa.Table.from_pylist(GOOD)
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        file.write_text(lines(*GOOD))
    elif suffix == "json":
        file.write_text(json.dumps(GOOD))
    elif suffix in ("csv", "tsv"):
        separator = "," if suffix == "csv" else "\t"
        rows = [separator.join(row.values()) for row in GOOD]
        file.write_text("\n".join([separator.join(["question", "answer"]), *rows]))
    elif suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "plain.jsonl").write_text(lines(*GOOD))
    expected = list(prepare(tmp_path / "plain.jsonl").train)
    assert list(prepare(file).train) == expected
    assert list(prepare(file, streaming=True).train) == expected


def test_a_saved_dataset_and_a_pattern_are_sources_too(tmp_path):
    import datasets

    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    expected = list(prepare(tmp_path / "a.jsonl").train)
    assert list(prepare(tmp_path / "saved").train) == expected
    assert list(prepare(tmp_path / "*.jsonl").train) == expected


def test_a_row_of_a_csv_with_line_breaks_in_a_cell_is_located(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('question,answer\n"one\ntwo\nthree",1\nlast,2\n')
    assert locate_row(SourceSection(path=str(file)), 1) == f"{file}:5"
