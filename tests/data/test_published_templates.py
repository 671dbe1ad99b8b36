"""Every chat template that TRL ships: each answer is learned once, behind what it prompts with."""

import re
from importlib.resources import files

import pytest
from support.bytes_tokenizer import bytes_tokenizer

from hf_gradacc.data.chat import split_chat

FOLDER = files("trl") / "chat_templates"
NAMES = sorted(file.name for file in FOLDER.iterdir() if file.name.endswith(".jinja"))
TOKENS = re.compile(r"<\|[^|<>]+\|>|<｜[^｜<>]+｜>|<[a-z_/]+>|\[/?[A-Z_]+\]")
# These prompt with a thought that has begun, and render an answer without one.
BEGIN_A_THOUGHT = ("deepseek", "nemotron")


def tokenizer_of(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    tokenizer = bytes_tokenizer(text, sorted(set(TOKENS.findall(text))))
    tokenizer.bos_token = "<|begin|>"
    return tokenizer


def talk(*, system, thoughts):
    messages = [{"role": "system", "content": "sysword"}] if system else []
    for i in range(3):
        answer = {"role": "assistant", "content": f"answer{i}"}
        thought = {"reasoning_content": f"thought{i}"} if thoughts else {}
        messages += [{"role": "user", "content": f"question{i}"}, {**answer, **thought}]
    return messages


def renders(tokenizer, messages, options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # a template refuses a system turn, or words that are not in pieces
        return None


@pytest.mark.slow
@pytest.mark.parametrize("thoughts", [False, True], ids=["plain", "thoughts"])
@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_learned_once_behind_its_prompt(name, thoughts):
    tokenizer = tokenizer_of(name)
    for system in (False, True):
        for options in ({}, {"enable_thinking": False}):
            messages = talk(system=system, thoughts=thoughts)
            if renders(tokenizer, messages, options) is None:
                continue
            for turns in ("auto", "each", "together"):
                rows = split_chat(tokenizer, messages, turns=turns, options=options)
                said = [tokenizer.decode([t for t in row.labels if t != -100]) for row in rows]
                for i in range(3):
                    assert "".join(said).count(f"answer{i}") == 1, (turns, options)
                    assert f"question{i}" not in "".join(said)
                assert "sysword" not in "".join(said)
                moved = sum(row.notes["other_prefix"] for row in rows)
                if turns != "together" and not name.startswith(BEGIN_A_THOUGHT):
                    assert not moved, (turns, options)
                if turns == "each" and not moved:
                    check_prompts(tokenizer, rows, messages, options)


def check_prompts(tokenizer, rows, messages, options):
    """The tokens before the first target are what the template prompts with."""
    starts = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    for row, index in zip(rows, starts, strict=True):
        prompt = renders(tokenizer, messages[:index], {**options, "add_generation_prompt": True})
        if prompt is None:  # words in pieces
            continue
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        first = next(i for i, label in enumerate(row.labels) if label != -100)
        if "question0" in prompt:
            assert row.input_ids[:first] == ids


def test_the_templates_are_many():
    assert len(NAMES) > 30
