"""Fixtures of real parts: five published tokenizers, and SmolLM2-135M-Instruct.

    def test_answers_are_targets(real_tokenizer):
        tokenizer = real_tokenizer("qwen3")      # or another of TOKENIZERS

    def test_loss_falls(smollm2):                # the folder of the model, in float32
        model = AutoModelForCausalLM.from_pretrained(smollm2)

    @pytest.mark.parametrize("name", TOKENIZERS) # from support.real_parts import TOKENIZERS
    def test_of_each_family(real_tokenizer, name):
        tokenizer = real_tokenizer(name)

    def test_of_a_template(trl_template):        # the text of trl/chat_templates/gemma.jinja
        template = trl_template("gemma")

Each call loads a tokenizer anew, so a test may change its own. Its chat template is the one it was
published with, or TRL's of that family where it has none. A part that is not there skips the test:
`make real` fetches it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from support.real_parts import part_folder


def _part(name: str) -> Path:
    folder = part_folder(name)
    if not folder.is_dir():
        pytest.skip(f"the real part {name} is not at {folder}: `make real` fetches it")
    return folder


def _trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def trl_template() -> Callable[[str], str]:
    """Give the text of a chat template that TRL ships, by its name there."""
    return _trl_template


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[[str], Any]:
    """Give a published tokenizer by the name of its part, loaded anew at each call."""
    from transformers import AutoTokenizer

    def load(name: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(_part(name))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _trl_template(name)
        return tokenizer

    return load


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: config, weights in float32, tokenizer."""
    return _part("smollm2")
