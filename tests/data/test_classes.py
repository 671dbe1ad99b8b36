"""What labels are taken for, and the lines that say so."""

import datasets
import pytest

from hf_gradacc.data.classes import NAMED_CLASSES, find_classes
from hf_gradacc.data.section import DataSection


def found(*columns):
    section = DataSection.model_validate(
        {"train": [f"{n}.jsonl" for n in range(len(columns))], "format": "classification"}
    )
    raw = [datasets.Dataset.from_dict({"label": column}) for column in columns]
    return find_classes(section, raw)


def test_classes_are_listed_with_their_rows_over_all_sources():
    labels = found(["good", "bad", "good", None], ["bad", "good"])
    assert labels.names == ["bad", "good"]
    assert labels.remarks == ["classes, with their rows: bad 2, good 3"]


def test_a_class_label_column_lists_classes_without_rows_too():
    section = DataSection.model_validate({"train": "c", "format": "classification"})
    feature = datasets.ClassLabel(names=["sports", "business", "science"])
    rows = datasets.Dataset.from_dict({"label": [2, 0, 2]}).cast_column("label", feature)
    labels = find_classes(section, [rows])
    assert labels.names == ["sports", "business", "science"]
    assert labels.remarks == ["classes, with their rows: sports 1, business 0, science 2"]


def test_many_classes_are_counted_in_one_line():
    labels = found([f"c{n:03}" for n in range(NAMED_CLASSES + 5)])
    assert len(labels.names) == NAMED_CLASSES + 5
    assert labels.remarks[0].endswith(f"c{NAMED_CLASSES - 1:03} 1, and 5 more classes")


def test_whole_numbers_are_classes_and_the_line_says_what_else_they_could_be():
    labels = found([3, 1, 1])
    assert labels.names == ["1", "3"]
    assert labels.remarks == [
        "classes, with their rows: 1 2, 3 1 (whole numbers are classes; for a regression write "
        "decimal ones)"
    ]


@pytest.mark.parametrize(
    ("column", "span"),
    [([1.0, 2.0, 3.0], "1 to 3"), (["1.0", "2.0"], "1 to 2"), (["1", "2.0"], "1 to 2")],
)
def test_decimal_labels_are_a_regression_also_if_all_are_whole(column, span):
    labels = found(column)
    assert (labels.names, labels.ids) == ([], None)
    assert labels.remarks == [
        f"labels: decimal numbers from {span}, so the model learns a regression; if they are "
        "classes, write them as whole numbers (1, not 1.0) or as words"
    ]


def test_a_regression_on_fractions_needs_no_way_out():
    assert found([0.5, 2.0, -1.0]).remarks == [
        "labels: decimal numbers from -1 to 2, so the model learns a regression"
    ]


def test_names_that_differ_in_case_or_blanks_only_are_named():
    labels = found(["Good", "good ", "bad", "GO OD", "Bad\n"])
    assert len(labels.names) == 5
    assert labels.remarks[0] == (
        "classes, with their rows: 'Bad\\n' 1, GO OD 1, Good 1, bad 1, 'good ' 1"
    )
    assert labels.remarks[1:] == [
        f"classes {names} differ in case or blanks only, and are learned as different ones: "
        "if they are the same, write them alike"
        for names in ("'Bad\\n' and 'bad'", "'GO OD' and 'Good' and 'good '")
    ]


def test_truth_values_are_classes():
    assert found([True, False, True]).names == ["False", "True"]
