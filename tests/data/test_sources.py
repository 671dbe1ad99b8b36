"""Bad data files of every kind we could think of: one error each, naming file, line and column."""

import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import templates
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.data import prepare_data
from hf_gradacc.data.faults import locate_row
from hf_gradacc.data.section import DataSection, SourceSection
from hf_gradacc.data.sources import load_source
from hf_gradacc.errors import DataError

GOOD = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
TOKENIZER = bytes_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")  # beside the folders that are read, not in them
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def prepare(path, **options):
    train = path if isinstance(path, dict) else str(path)
    section = {"train": train, "format": "question_answer"} | options
    return prepare_data(DataSection.model_validate(section), tokenizer=TOKENIZER)


@pytest.mark.parametrize("indent", [None, 1], ids=["in a line", "over lines"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_rows_under_a_key_of_an_object_are_told_with_the_way_out(tmp_path, streaming, indent):
    file = tmp_path / "nested.json"
    file.write_text(json.dumps({"version": "1", "data": GOOD}, indent=indent))
    with pytest.raises(DataError) as caught:
        list(prepare(file, streaming=streaming).train)
    told = str(caught.value)
    assert f"{file}: is one JSON object, and rows lie in it under 'data'" in told
    assert """`jq -c '.["data"][]' nested.json > rows.jsonl`""" in told
    assert "data.columns" not in told
    file.write_text(json.dumps(GOOD, indent=indent))
    assert len(list(prepare(file, streaming=streaming).train)) == 4, "written alone, it is read"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"question": "q", "meta": [{"a": 1}]},
        {"data": [1, 2]},
        {"data": []},
    ],
    ids=str,
)
def test_one_row_is_no_object_of_rows(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"set data\.columns"):
        prepare(tmp_path / "a.json")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("name", "content", "place", "why"),
    [
        ("a.jsonl", "", "a.jsonl", "empty"),
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
        ("a.json", '[{"question": "x", "answer": "y"}', "a.json:1", "not a JSON"),
        ("a.json", '[{"question": "x", "answer": "y"}, 5]', "a.json:1", "JSON object"),
        (
            "a.json",
            json.dumps([*GOOD, {"question": "x"}], indent=1),
            "a.json:18",
            "'answer' is null",
        ),
        ("a.json", "5", "a.json:1", "not a number"),
        ("a.jsonl", "{}\n{}\n", "a.jsonl", "no rows"),
        ("a.jsonl", b"\x00" * 50, "a.jsonl:1", "not a JSON"),
        (
            "a.jsonl",
            b'{"question": "a\x00b", "answer": "c"}\n',
            "a.jsonl:1:16",
            "control character",
        ),
        ("a.jsonl", lines(*GOOD).encode("utf-16"), "a.jsonl:1", "UTF-8"),
        ("a.jsonl", "[" * 3000 + "\n", "a.jsonl", "nested too deeply"),
        ("a.jsonl", '{"question": ' + "[" * 3000 + "]" * 3000 + "}\n", "a.jsonl", "too deeply"),
        (
            "a.jsonl",
            '{"question": "a", "answer": "b", "answer": "c"}',
            ":1: column 'answer'",
            "twice",
        ),
        (
            "a.jsonl",
            '{"question": "\\ud800", "answer": "b"}\n',
            ":1: column 'question'",
            "surrogate",
        ),
        (
            "a.jsonl",
            lines({"question": "x", "answer": 10**30}),
            "a.jsonl:1: column 'answer'",
            "quotes",
        ),
        (
            "a.jsonl",
            lines({"question": "x", "answer": 1}, {"question": "x", "answer": 2.5}),
            "a.jsonl:1: column 'answer'",
            "a decimal number, not text; write it in quotes",
        ),
        (
            "a.jsonl",
            lines({"question": "x", "answer": "2020-01-01"}),
            ":1: column 'answer'",
            "a date",
        ),
        # Text in JSON may hold separators that Python takes for the end of a line.
        (
            "a.jsonl",
            lines({"question": "a\u2028b", "answer": "c"}, "{bad"),
            "a.jsonl:2:2",
            "not a JSON",
        ),
        ("a.jsonl", b'{"question": "\xff\xfe", "answer": "a"}\n', "a.jsonl:1", "UTF-8"),
        ("a.csv", "", "a.csv", "empty"),
        ("a.csv", 'question,answer\n"two\nlines",2\nthird,\n', "a.csv:4", "'answer' is null"),
        ("a.csv", b"question,answer\n\xff\xfe,1\n", "a.csv:2", "UTF-8"),
        ("a.csv", "question,answer\na,1,2\n", "a.csv:2", "3 cells, and the header 2 columns"),
        ("a.csv", "question,answer\na,1\nb,2,3\n", "a.csv:3", "3 cells, and the header 2 columns"),
        ("a.csv", "question,answer\na,1\nb\n", "a.csv:3", "'answer' is null"),
        ("a.csv", 'question,answer\na,1\nb,"2\nc,3\n', "a.csv:3", "close its quotes"),
        ("a.csv", "question,answer,answer\na,1,2\n", "a.csv:1: column 'answer'", "twice"),
        ("a.csv", "question;answer\na;1\n", "a.csv", "separated by commas"),
        ("a.tsv", "question\tanswer\na\tb\tc\n", "a.tsv:2", "3 cells"),
        ("a.csv", "question,answer\n".encode("utf-16"), "a.csv:1", "UTF-8"),
        ("a.parquet", b"", "a.parquet", "empty"),
        ("a.parquet", b"not a parquet file", "a.parquet", "not a whole parquet file"),
        ("a.arrow", b"not an arrow file", "a.arrow", "cannot be read"),
        ("a.xlsx", b"PK\x03\x04", "a.xlsx", ".xlsx"),
    ],
)
def test_a_bad_file_is_reported_with_its_place(
    tmp_path, capfd, name, content, place, why, streaming
):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(prepare(file, streaming=streaming).train)
    if "cannot be read" in str(caught.value) and int(datasets.__version__.split(".")[0]) < 5:
        place, why = name, ""  # its reader fails at whole files where later ones give null
    assert place in str(caught.value)
    assert why in str(caught.value)
    assert "Failed to" not in capfd.readouterr().err, "the reader said it, too"


def test_a_bad_row_in_the_second_file_of_a_folder_is_found(tmp_path):
    (tmp_path / "1.jsonl").write_text(lines(*GOOD))
    (tmp_path / "2.jsonl").write_text(lines(GOOD[0], {"question": None, "answer": "a"}))
    with pytest.raises(DataError, match=r"2\.jsonl:2: column 'question' is null"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", "[]", "no rows"),
        ("a.jsonl", "\n\n", "empty"),
        ("a.csv", "question,answer\n", "no rows"),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}.*{why}"):
        prepare(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "first", "second", "why"),
    [
        (
            "csv",
            "question,answer\na,b\n",
            "question,answr\na,b\n",
            "2.csv:1: has the columns question, answr, and 1.csv has question, answer",
        ),
        (
            "jsonl",
            lines(GOOD[0]),
            lines({"question": "a", "answr": "b"}),
            "2.jsonl:1: column 'answr' is not in the file before",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_files_whose_columns_differ_are_named(tmp_path, name, first, second, why, streaming):
    (tmp_path / f"1.{name}").write_text(first)
    (tmp_path / f"2.{name}").write_text(second)
    with pytest.raises(DataError) as caught:
        list(prepare(tmp_path, streaming=streaming).train)
    assert why in str(caught.value)


def broken_parquet(kind):
    good = pa.table({"question": ["a"] * 50, "answer": ["b"] * 50})
    sink = pa.BufferOutputStream()
    if kind == "twice":
        names = ["question", "answer", "answer"]
        good = pa.Table.from_arrays([pa.array(["a"])] * 3, names=names)
    elif kind == "no rows":
        good = good.slice(0, 0)
    elif kind == "not UTF-8":
        bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
        good = pa.table({"question": bad, "answer": ["b", "c"]})
    pq.write_table(good, sink)
    content = sink.getvalue().to_pybytes()
    return content[: len(content) // 2] if kind == "cut" else content


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("twice", "a.parquet: column 'answer' appears twice"),
        ("no rows", "a.parquet: has no rows"),
        ("not UTF-8", "a.parquet: row 2: column 'question' is not UTF-8"),
        ("cut", "a.parquet: is not a whole parquet file"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_broken_parquet_file_is_explained(tmp_path, kind, why, streaming):
    (tmp_path / "a.parquet").write_bytes(broken_parquet(kind))
    with pytest.raises(DataError) as caught:
        list(prepare(tmp_path / "a.parquet", streaming=streaming).train)
    assert why in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_bad_row_in_the_second_binary_file_is_named_in_that_file(tmp_path, suffix):
    for number, questions in (("1", ["a", "b"]), ("2", ["a", None])):
        table = pa.table({"question": questions, "answer": ["b", "c"]})
        file = str(tmp_path / f"{number}.{suffix}")
        if suffix == "parquet":
            pq.write_table(table, file)
        else:
            with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    with pytest.raises(DataError, match=rf"2\.{suffix}: row 2: column 'question' is null"):
        prepare(tmp_path)


def test_a_stream_that_explains_itself_can_still_seek(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    stream = prepare(tmp_path / "a.jsonl", streaming=True).train
    rows = iter(stream)
    next(rows)
    state, rest = stream.state_dict(), list(rows)
    stream.load_state_dict(state)
    assert len(rest) == 3
    assert list(stream) == rest


CELLS = ["007", "1.10", "1e5", "NA", "None", "null", "True", "2020-01-01", "9" * 40, " x "]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_cell_of_a_csv_is_the_text_that_stands_there(tmp_path, suffix, streaming):
    separator = "," if suffix == "csv" else "\t"
    rows = [separator.join(["question", "answer"]), *(f"q{separator}{cell}" for cell in CELLS)]
    (tmp_path / f"a.{suffix}").write_text("\ufeff" + "\r\n".join(rows) + "\r\n")
    read = list(prepare(tmp_path / f"a.{suffix}", streaming=streaming).train)
    said = [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in read]
    assert said == [f"Question: q\nAnswer: {cell}" for cell in CELLS]


def test_a_folder_is_read_by_split_where_its_files_are_named_so(tmp_path):
    named = tmp_path / "named"
    named.mkdir()
    for split in ("train", "test"):
        (named / f"{split}.jsonl").write_text(lines({"question": split, "answer": "a"}))
    (named / "README.md").write_text("# A card, as a clone from the hub has it")
    parts = {s: datasets.Dataset.from_list([{"question": s, "answer": "a"}]) for s in parts_of()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for folder in (named, tmp_path / "saved"):
        for split in parts_of():
            for streaming in (False, True):
                source = {"path": str(folder), "split": split}
                rows = list(prepare(source, streaming=streaming).train)
                said = [TOKENIZER.decode(row["input_ids"]) for row in rows]
                assert said == [f"Question: {split}\nAnswer: a<|end|>"], (folder, streaming)
        with pytest.raises(DataError, match=r"no split 'dev'.*it has"):
            prepare({"path": str(folder), "split": "dev"})


def parts_of():
    return ["train", "test"]


def test_a_slice_of_any_local_source_is_that_slice(tmp_path):

    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    whole = list(prepare(tmp_path / "a.jsonl").train)
    for path in ("saved", "a.jsonl"):
        source = {"path": str(tmp_path / path), "split": "train[1:3]"}
        assert list(prepare(source).train) == whole[1:3]
    with pytest.raises(DataError, match="has one split, called train, and no 'test'"):
        prepare({"path": str(tmp_path / "a.jsonl"), "split": "test"})


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

    datasets.Dataset.from_list(GOOD).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    expected = list(prepare(tmp_path / "a.jsonl").train)
    assert list(prepare(tmp_path / "saved").train) == expected
    assert list(prepare(tmp_path / "*.jsonl").train) == expected


def test_a_row_of_a_csv_with_line_breaks_in_a_cell_is_located(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('question,answer\n"one\ntwo\nthree",1\nlast,2\n')
    assert locate_row(SourceSection(path=str(file)), 1) == f"{file}:5"


WHOLE = {
    "a.jsonl": lines(*GOOD).encode(),
    "a.json": json.dumps(GOOD).encode(),
    "a.csv": b'question,answer\n"a ""b"", c",d\ne,f\n',
    "a.tsv": b"question\tanswer\na\tb\n",
    "a.txt": "Zeilen\nund Wörter\n".encode(),
    "a.parquet": broken_parquet("not broken"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(WHOLE)),
    cuts=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=3
    ),
    streaming=st.booleans(),
)
def test_a_spoilt_file_of_any_kind_is_read_or_is_one_sentence(tmp_path, name, cuts, streaming):
    content = WHOLE[name]
    for where, dropped, put in cuts:
        place = int(where * len(content))
        content = content[:place] + put + content[place + dropped :]
    file = tmp_path / f"{hashlib.md5(content).hexdigest()}{Path(name).suffix}"
    file.write_bytes(content)
    format = "text" if name == "a.txt" else "question_answer"
    rows, error = read_or_refuse(file, format=format, streaming=streaming)
    assert bool(rows) != bool(error)
    assert not error or (file.name in error and "Traceback" not in error)
    assert all(len(row["input_ids"]) == len(row["labels"]) > 0 for row in rows)


def read_or_refuse(file, **options):
    try:
        return list(prepare(file, **options).train), ""
    except DataError as error:
        return [], str(error)


@pytest.mark.parametrize("streaming", [True, False])
def test_json_that_crashes_a_reader_is_an_error(tmp_path, streaming):
    file = tmp_path / "rows.json"
    file.write_text("[" * 9999)
    with pytest.raises(DataError, match="nested too deeply"):
        load_source(SourceSection(path=str(file)), streaming=streaming)
    file.write_text("null")
    with pytest.raises(DataError, match="not null"):
        load_source(SourceSection(path=str(file)), streaming=streaming)
    row = {"text": "]{[" * 2000 + '"'}
    (tmp_path / "fine.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load_source(SourceSection(path=str(tmp_path / "fine.jsonl")))) == 1


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
TEXTS = {
    "rows.jsonl": lines(*GOOD),
    "rows.json": json.dumps(GOOD),
    "rows.ndjson": lines(*GOOD),
    "ROWS.JSONL": lines(*GOOD),
    "rows.csv": "question,answer\n" + "".join(",".join(row.values()) + "\n" for row in GOOD),
    "rows.tsv": "question\tanswer\n" + "".join("\t".join(row.values()) + "\n" for row in GOOD),
}


@pytest.mark.parametrize("ending", ["", *COMPRESS])
@pytest.mark.parametrize("name", TEXTS)
def test_a_compressed_file_holds_the_rows_of_the_plain_one(tmp_path, name, ending):
    (tmp_path / "plain.jsonl").write_text(lines(*GOOD))
    expected = list(prepare(tmp_path / "plain.jsonl").train)
    folder = tmp_path / "folder"
    folder.mkdir()
    content = TEXTS[name].encode()
    file = folder / (f"{name}.{ending}" if ending else name)
    file.write_bytes(COMPRESS[ending](content) if ending else content)
    for path in (file, folder):
        assert list(prepare(path).train) == expected
        assert list(prepare(path, streaming=True).train) == expected


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_fault_in_a_compressed_file_is_named_by_its_line(tmp_path, ending):
    file = tmp_path / f"rows.jsonl.{ending}"
    file.write_bytes(COMPRESS[ending]((lines(*GOOD) + '{"question": "q"}\n').encode()))
    with pytest.raises(DataError, match=rf"rows\.jsonl\.{ending}:5: column 'answer' is null"):
        prepare(file)
    file.write_bytes(COMPRESS[ending]((lines(*GOOD) + '{"question": 5\n').encode()))
    with pytest.raises(DataError, match=rf"rows\.jsonl\.{ending}:5:15: not a JSON object"):
        prepare(file)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_that_is_cut_off_or_none_is_named(tmp_path, ending, name, streaming):
    file = tmp_path / f"{name}.{ending}"
    whole = COMPRESS[ending](TEXTS[name].encode() + b"9,9\n" * 9)
    for content in (whole[: len(whole) - 5], TEXTS[name].encode()):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"{file.name}: is not a whole \.{ending} file"):
            list(prepare(file, streaming=streaming).train)


FORMATTED = {
    "question_answer": [{"question": f"{i}?", "answer": str(i)} for i in range(4)],
    "chat": [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]}
        for i in range(4)
    ],
    "tokens": [
        {"input_ids": [5, *range(7, 9 + i)], "labels": [-100, *range(7, 9 + i)]} for i in range(4)
    ],
    "classification": [{"text": str(i), "label": i % 2} for i in range(4)],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("format", FORMATTED)
@pytest.mark.parametrize("of", ["numpy", "torch", "arrow", "pandas", "columns"])
def test_a_saved_set_is_read_alike_whatever_its_cells_were_shown_as(
    tmp_path, of, format, streaming
):
    """`save_to_disk` keeps what `set_format` has asked for: arrays, tensors, some columns."""
    rows = datasets.Dataset.from_list(FORMATTED[format])
    if streaming and format == "classification":
        features = rows.features.copy()
        features["label"] = datasets.ClassLabel(names=["a", "b"])
        rows = rows.cast(features)
    rows.save_to_disk(tmp_path / "plain")
    if of == "columns":
        rows.set_format("numpy", columns=rows.column_names[:1])
    else:
        rows.set_format(of)
    rows.save_to_disk(tmp_path / "formatted")
    tokenizer = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)

    def read(name):
        section = {"train": str(tmp_path / name), "format": format, "streaming": streaming}
        data = prepare_data(DataSection.model_validate(section), tokenizer=tokenizer)
        return list(data.train), data.label_names

    assert read("formatted") == read("plain")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_the_mark_of_a_byte_order_is_no_text(tmp_path, document, streaming):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    options = {"format": "text", "document": document, "streaming": streaming}
    (row,) = prepare(tmp_path / "a.txt", **options).train
    assert TOKENIZER.decode(row["input_ids"]) == "hello<|end|>"


@pytest.mark.parametrize(
    ("format", "row", "hint"),
    [
        ("chat", {"conversations": [{"from": "human", "value": "a"}]}, "{messages: conversations}"),
        (
            "question_answer",
            {"problem": "a", "solution": "b"},
            "{question: problem, answer: solution}",
        ),
        (
            "question_answer",
            {"questions": "a", "x": "b"},
            "{question: questions, answer: <your column>}",
        ),
        ("classification", {"text": "a", "labels": 1}, "{label: labels}"),
        (
            "seq2seq",
            {"article": "a", "highlights": "b", "id": "c"},
            "{source: article, target: highlights}",
        ),
    ],
)
def test_columns_that_are_called_otherwise_are_proposed_all_at_once(tmp_path, format, row, hint):
    (tmp_path / "a.jsonl").write_text(lines(row, row))
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "a.jsonl", format=format)
    assert f"set data.columns to {hint}, or another data.format" in str(caught.value)
