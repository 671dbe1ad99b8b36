"""Rows on the screen: what is learned is marked, and nothing a terminal acts upon gets there."""

import io
import json
import re

import datasets
import pytest
from rich.console import Console
from support.bytes_tokenizer import bytes_tokenizer
from support.templates import CHATML_TOKENS, TAGGED

from hf_gradacc.data import prepare_data
from hf_gradacc.data.section import DataSection
from hf_gradacc.recipe import load_recipe
from hf_gradacc.recipe.plan.screen import show_plan
from hf_gradacc.recipe.plan.show_rows import make_visible, show_rows
from hf_gradacc.tracking.preview import preview_rows

TOKENIZER = bytes_tokenizer(TAGGED, CHATML_TOKENS)
CHAT = [
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello\tyou \x1b[31mžába\u202e."},
]


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Print the first rows of a data set; what reached the file or the terminal."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)

    def show(
        rows, *, terminal=False, no_color=None, num_rows=2, task="causal_lm", names=(), **section
    ):
        if isinstance(rows, list):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            parsed = DataSection.model_validate({"train": str(path), **section})
            data = prepare_data(parsed, tokenizer=TOKENIZER)
            rows, names = data.train, data.label_names
        file = io.StringIO()
        system = "standard" if terminal else None
        console = Console(
            file=file, force_terminal=terminal, color_system=system, no_color=no_color, width=60
        )
        show_rows(
            rows,
            num_rows=num_rows,
            tokenizer=TOKENIZER,
            task=task,
            label_names=names,
            console=console,
        )
        return file.getvalue()

    return show


ANSWER = "Hello⇥you \\x1b[31mžába\\u202e.<|im_end|>"


def test_brackets_mark_targets_where_there_is_no_colour(shown):
    text = shown([{"messages": CHAT}])
    assert text == (
        "\nThe first rows, targets in ⟦ ⟧\n"
        "row 1: 55 input tokens, 26 targets\n"
        "<|im_start|>user⏎\nHi··there<|im_end|>⏎\n<|im_start|>assistant⏎\n"
        f"⟦{ANSWER}⟧⏎\n\n"
    )


def test_colour_marks_them_on_a_terminal_and_no_control_character_of_a_row_gets_there(shown):
    text = shown([{"messages": CHAT}], terminal=True)
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", text, flags=re.DOTALL)
    assert green == ["in this colour", ANSWER]
    assert "⟦" not in text
    left = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", left)
    assert "\x1b[31m" not in text


def test_a_terminal_without_colour_gets_brackets(shown):
    assert f"⟦{ANSWER}⟧" in shown([{"messages": CHAT}], terminal=True, no_color=True)


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("a b", "a b"),
        (" a ", "·a·"),
        ("a  b", "a··b"),
        ("a \n b\n", "a·⏎\n·b⏎\n"),
        ("\r\x00\x07\x7f\x9b", "\\x0d\\x00\\x07\\x7f\\x9b"),
        ("\u2028\u2066\ufeff\ud800", "\\u2028\\u2066\\ufeff\\ud800"),
        ("👩\u200d🚀 ¶[red]", "👩\u200d🚀 ¶[red]"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, visible):
    assert make_visible(text) == visible


def test_a_streams_rows_are_shown_and_still_there_afterwards(shown):
    rows = [{"question": f"{n}?", "answer": "a" * n} for n in range(1, 5)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    encoded = stream.map(
        lambda row: {
            "input_ids": TOKENIZER(row["question"] + row["answer"])["input_ids"],
            "labels": [-100, -100, *TOKENIZER(row["answer"])["input_ids"]],
        }
    )
    text = shown(encoded, num_rows=3)
    assert text.splitlines()[3::2] == ["1?⟦a⟧", "2?⟦aa⟧", "3?⟦aaa⟧"]
    assert len(list(encoded)) == 4


def test_an_encoder_decoder_shows_source_and_target(shown):
    rows = [{"source": "long", "target": "s"}]
    text = shown(rows, task="seq2seq", format="seq2seq")
    assert "row 1: 5 input tokens, 2 targets\nlong<|end|> → ⟦s<|end|>⟧" in text


def test_a_classification_shows_text_and_class(shown):
    rows = [{"text": "fine", "label": "good"}, {"text": "not", "label": "bad"}]
    text = shown(rows, task="classification", format="classification")
    assert text.splitlines()[3::2] == ["fine → ⟦good⟧", "not → ⟦bad⟧"]


def test_a_regression_shows_its_number(shown):
    rows = [{"text": "fine", "label": 0.75}, {"text": "not", "label": 0.5}]
    text = shown(rows, task="classification", format="classification")
    assert text.splitlines()[3::2] == ["fine → ⟦0.75⟧", "not → ⟦0.5⟧"]


def test_the_table_of_samples_shows_the_same(shown, tmp_path):
    rows = [{"messages": [{**turn, "content": turn["content"][:5]} for turn in CHAT]}]
    text = shown(rows)
    path = str(tmp_path / "rows.jsonl")
    data = prepare_data(DataSection.model_validate({"train": path}), tokenizer=TOKENIZER)
    [[_, marked, inputs, targets]] = preview_rows(data.train, tokenizer=TOKENIZER)
    assert text.endswith(make_visible(marked) + "\n")
    assert f"row 1: {inputs} input tokens, {targets} targets" in text


def test_plan_shows_them_before_the_updates(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}?", "answer": "a" * n} for n in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        "model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 24,\n"
        "  num_hidden_layers: 1, num_attention_heads: 2}}\n"
        "tokenizer: {train: {vocab_size: 300}}\n"
        "data: {train: rows.jsonl, format: question_answer}\n"
        "train: {effective_batch_size: 2}\n"
    )
    file = io.StringIO()
    show_plan(load_recipe(tmp_path / "r.yaml"), num_rows=2, console=Console(file=file, width=110))
    text = file.getvalue()
    assert "<|user|>2?<|assistant|>⟦aa<|end|>⟧" in text
    assert "row 3:" not in text
    assert text.index("row 2:") < text.index("Updates")
