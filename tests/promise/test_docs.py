"""The examples of the documentation, run from top to bottom."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text())


def examples(page):
    """The page's examples with the line each begins in; one may say what it needs."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        source = match.group(1)
        needs = re.match(r"# needs (\w+)\n", source)
        if needs is None or importlib.util.find_spec(needs.group(1)) is not None:
            yield text[: match.start(1)].count("\n"), source


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Dataclasses, and checkpoints that pickle them, look for the module they are in.
    module = types.ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    ran = 0
    for line, source in examples(page):
        exec(compile("\n" * line + source, str(page), "exec"), vars(module))
        ran += 1
    assert ran >= page.read_text().count("```python") - page.read_text().count("# needs ")


def test_the_page_on_subclassing_is_among_them():
    assert "subclassing.md" in [page.name for page in PAGES]
    assert len(list(examples(DOCS / "subclassing.md"))) >= 10


IN_A_PROJECT = """
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradacc import GradAccMixin, GradAccOptions

config = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)
model = LlamaForCausalLM(config)
dataset = rows = [{"input_ids": [3] * n, "labels": [3] * n} for n in (2, 5, 3, 9, 4, 7)]


def collator(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda ids, fill: ids + [fill] * (width - len(ids))
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["labels"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
    }
"""
"""What a reader of the README has: a model, a dataset, a data collator, and imports."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_examples_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trl = pytest.importorskip("trl")
    module = types.ModuleType("examples")
    monkeypatch.setitem(sys.modules, "examples", module)
    exec(IN_A_PROJECT, vars(module))
    vars(module).update(SFTConfig=trl.SFTConfig, SFTTrainer=trl.SFTTrainer)
    readme = ROOT / "README.md"
    ran = []
    for line, source in examples(readme):
        exec(compile("\n" * line + source, str(readme), "exec"), vars(module))
        ran.append(source)
    assert len(ran) == readme.read_text("utf-8").count("```python") >= 4
    assert vars(module)["report"].passed
    assert vars(module)["trainer"].state.global_step == 3
    assert issubclass(vars(module)["ExactSFTTrainer"], trl.SFTTrainer)
