"""Pairs of answers become the tokens that TRL makes of them, behind what generation is sent."""

import json
from types import SimpleNamespace

import datasets
import pytest
from support import templates
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.data.formats import encode_row
from hf_gradacc.data.lengths import fit_length, measure_pairs
from hf_gradacc.data.reader import RowError, RowReader
from hf_gradacc.data.report import Fate
from hf_gradacc.updates.lengths import measure_length

PLAIN = bytes_tokenizer()
CHAT = bytes_tokenizer(templates.CHATML, templates.CHATML_TOKENS)
THINKING = bytes_tokenizer(templates.THINKING, templates.CHATML_TOKENS)


def say(role, content):
    return {"role": role, "content": content}


ASKED = [say("user", "2+2?")]
CHOSEN, REJECTED = [say("assistant", "It is 4.")], [say("assistant", "It is 5!")]
BEFORE = [say("user", "Hi"), say("assistant", "Hello"), *ASKED]
ROWS = {
    "texts": (PLAIN, {"prompt": "2+2=", "chosen": " 4", "rejected": " five"}),
    "texts that begin alike": (PLAIN, {"chosen": "Sum: 4", "rejected": "Sum: 9!"}),
    "turns": (CHAT, {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}),
    "turns that begin alike": (
        CHAT,
        {"chosen": [*BEFORE, *CHOSEN], "rejected": [*BEFORE, *REJECTED]},
    ),
}


def encode(tokenizer, row, *, task="dpo", **options):
    reader = RowReader(tokenizer, task=task, **options)
    return encode_row(reader, row, format="preference"), reader.notes


def texts(tokenizer, encoded):
    return {name: tokenizer.decode(ids) for name, ids in encoded.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_pair_for_dpo_has_the_tokens_that_trl_gives_it(name):
    DPOTrainer = pytest.importorskip("trl").DPOTrainer
    tokenizer, row = ROWS[name]
    theirs = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        datasets.Dataset.from_list([row]),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )[0]
    mine, notes = encode(tokenizer, row)
    assert not {"same_answers", "long_answers", "other_prompt"} & set(+notes)
    assert mine["prompt_ids"] == theirs["prompt_ids"]
    assert len(mine["chosen_ids"]) > 1 < len(mine["rejected_ids"])
    for side in ("chosen_ids", "rejected_ids"):
        # The line break that the template writes behind the end of a turn is nobody's answer.
        assert tokenizer.decode(theirs[side][len(mine[side]) :]) in ("", "\n")
        assert mine[side] == theirs[side][: len(mine[side])]


@pytest.mark.parametrize("name", ["turns", "turns that begin alike"])
def test_a_pair_for_a_reward_is_two_conversations_as_the_template_writes_them(name):
    tokenizer, row = ROWS[name]
    mine, _ = encode(tokenizer, {**row, "margin": 2}, task="reward")
    for side in ("chosen", "rejected"):
        turns = [*row.get("prompt", []), *row[side]]
        written = tokenizer.apply_chat_template(turns, tokenize=False)
        assert tokenizer.decode(mine[f"{side}_ids"]) == written
    assert mine["margin"] == 2.0


def test_answers_stand_behind_what_a_thinking_model_is_prompted_with():
    row = {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}
    options = {"template_options": {"enable_thinking": False}}
    mine, _ = encode(THINKING, row, **options)
    prompt = THINKING.apply_chat_template(
        ASKED, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert texts(THINKING, mine) == {
        "prompt_ids": prompt,
        "chosen_ids": "It is 4.<|im_end|>",
        "rejected_ids": "It is 5!<|im_end|>",
    }


def test_a_prompt_that_is_a_text_is_what_the_user_said():
    of_turns, _ = encode(CHAT, {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED})
    row = {"prompt": "2+2?", "chosen": CHOSEN, "rejected": REJECTED}
    assert encode(CHAT, row)[0] == of_turns
    whole = {"prompt": "2+2?", "chosen": [*ASKED, *CHOSEN], "rejected": [*ASKED, *REJECTED]}
    assert encode(CHAT, whole)[0] == of_turns
    assert encode(CHAT, {**whole, "prompt": "another"})[1]["other_prompt"] == 1


def test_answers_that_are_the_same_teach_nothing_and_are_counted():
    for task in ("dpo", "reward"):
        same, notes = encode(PLAIN, {"prompt": "a", "chosen": "b", "rejected": "b"}, task=task)
        fitted = fit_length(
            same, format="preference", max_length=9, max_target_length=None, too_long="error"
        )
        assert fitted[1] is Fate.NO_TARGET
        assert notes["same_answers"] == 1


@pytest.mark.parametrize(
    ("max_length", "too_long", "fate", "sizes"),
    [
        (9, "error", Fate.KEPT, (5, 3)),
        (8, "drop", Fate.TOO_LONG, (5, 3)),
        (6, "truncate", Fate.TRUNCATED, (2, 2)),
        (4, "truncate", Fate.NO_TARGET, (0, 0)),
        (2, "truncate", Fate.NO_TARGET, (0, 0)),
    ],
)
def test_both_answers_are_fitted_with_the_prompt_before_them(max_length, too_long, fate, sizes):
    pair = {"prompt_ids": [1] * 4, "chosen_ids": [2] * 5, "rejected_ids": [3] * 3}
    fitted, found = fit_length(
        pair,
        format="preference",
        max_length=max_length,
        max_target_length=None,
        too_long=too_long,
    )
    assert (found, len(fitted["chosen_ids"]), len(fitted["rejected_ids"])) == (fate, *sizes)


def test_a_pair_costs_twice_its_longer_answer_and_holds_both():
    pair = {"prompt_ids": [1] * 4, "chosen_ids": [2] * 5, "rejected_ids": [3] * 3}
    assert measure_pairs([pair]).tolist() == [[9, 7]]
    assert measure_length(pair) == 18
    joined = datasets.Dataset.from_list([{"chosen_ids": [1] * 3, "rejected_ids": [2]}])
    assert measure_pairs(joined).tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is null"),
        ({"prompt": ASKED, "chosen": "b", "rejected": "c"}, "'chosen' is text behind a prompt of"),
        ({"chosen": [*ASKED, *CHOSEN], "rejected": "c"}, "'rejected' is text, and the other"),
        (
            {"chosen": [say("user", "a"), *CHOSEN], "rejected": [say("user", "b"), *CHOSEN]},
            "begins otherwise than the chosen answer",
        ),
        (
            {"prompt": ASKED, "chosen": [], "rejected": REJECTED},
            "'chosen' is a list without a turn",
        ),
    ],
    ids=["missing", "null", "text after turns", "text beside turns", "no prompt", "empty"],
)
def test_a_malformed_pair_names_its_column(row, words):
    with pytest.raises(RowError, match=words):
        encode(CHAT, row)


@pytest.mark.parametrize("task", ["dpo", "reward"])
@pytest.mark.parametrize(
    "write",
    [json.dumps, lambda turns: json.dumps(turns[0]), lambda turns: turns[0]],
    ids=["text of JSON", "text of one turn", "one turn alone"],
)
def test_answers_may_be_written_as_a_text_or_as_one_turn(task, write):
    """LLaMA-Factory's pairs hold one turn; a csv can hold nothing but text."""
    row = {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED}
    expected, _ = encode(CHAT, row, task=task)
    other = {"prompt": json.dumps(ASKED), "chosen": write(CHOSEN), "rejected": write(REJECTED)}
    assert encode(CHAT, other, task=task)[0] == expected
