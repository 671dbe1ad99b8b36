"""The documentation: examples run, links and file names lead somewhere, nothing is said twice."""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

from hf_gradacc import GradAccOptions

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXTS = [*FRONT, *sorted(DOCS.rglob("*.md"))]
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
words = [[3 + 7 * n * i % 40 for i in range(n)] for n in (2, 5, 3, 9, 4, 7)]
dataset = rows = [{"input_ids": row, "labels": row} for row in words]


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
    whole, cut = (
        gradient_of_an_update(vars(module), per_device_train_batch_size=size) for size in (6, 2)
    )
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-7)


def gradient_of_an_update(given, **options):
    """What the README's trainer with a loss of its own hands to the optimizer, in one vector."""
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    arguments = given["GradAccArguments"](
        output_dir="out",
        effective_batch_size=6,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        **options,
    )
    given["ZLossTrainer"](
        model=copy.deepcopy(given["model"]),
        args=arguments,
        train_dataset=given["dataset"],
        data_collator=given["collator"],
        callbacks=[Watch],
    ).train()
    return seen[0]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


WORDS_IN_A_ROW = 10


def runs_of_words(text):
    """Every run of ten words of a text, within a paragraph, list item or row of a table."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for part in re.split(r"\n\s*\n|\n(?=[|#-])", text):
        words = re.findall(r"\w+", part)
        for i in range(len(words) - WORDS_IN_A_ROW + 1):
            yield " ".join(words[i : i + WORDS_IN_A_ROW])


def said_twice(texts):
    """The runs of words that stand in more than one of the named texts."""
    found = collections.defaultdict(set)
    for name, text in texts.items():
        for run in runs_of_words(text):
            found[run].add(name)
    return {run: sorted(names) for run, names in found.items() if len(names) > 1}


def test_each_thing_is_said_once():
    texts = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in TEXTS}
    assert said_twice(texts) == {}


def test_a_sentence_that_is_copied_to_another_page_is_found():
    sentence = next(runs_of_words((DOCS / "speed.md").read_text("utf-8")))
    texts = {"speed.md": f"- More. {sentence}, too.", "other.md": sentence, "third.md": "No."}
    assert said_twice(texts) == {sentence: ["other.md", "speed.md"]}


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_links_of_the_front_pages_lead_to_files(page):
    """Those between pages of the site are checked where it is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    missing = [to for to in links if "://" not in to and not (ROOT / to).is_file()]
    assert missing == []


PACKAGE = ROOT / "hf_gradacc"
FOLDERS = "|".join(
    sorted({p.name for p in PACKAGE.iterdir() if p.is_dir()} | {"tests", "benchmarks", "recipes"})
)


def named_files(text):
    """Files that a page names in code, such as `updates/sampler` or `benchmarks/speed.py`."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(rf"(?<![\w./-])(?:hf_gradacc/)?(?:{FOLDERS})/[\w./-]+", code):
            yield name.removeprefix("hf_gradacc/")


def test_every_file_that_the_documentation_names_exists():
    missing = []
    for page in TEXTS:
        for name in named_files(page.read_text("utf-8")):
            places = [ROOT / name, PACKAGE / name, PACKAGE / f"{name}.py", ROOT / f"{name}.yaml"]
            if not any(place.exists() for place in places):
                missing.append((str(page.relative_to(ROOT)), name))
    assert missing == []


def test_files_are_looked_for_in_code_alone():
    text = "`python benchmarks/speed.py --quick` of tests/test_x.py, `updates/sampler`"
    assert set(named_files(text)) >= {"benchmarks/speed.py"}
    assert "tests/test_x.py" not in set(named_files(text))


DOORS = ("hf_gradacc", *(f"hf_gradacc.{door}" for door in ("data", "recipe", "tracking", "verify")))


def imported_modules(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", *PAGES, *sorted((ROOT / "recipes").glob("*.py"))],
    ids=lambda f: f.name,
)
def test_what_people_copy_imports_from_the_doors_alone(file):
    source = file.read_text("utf-8")
    if file.suffix == ".md":
        source = "\n".join(code for _, code in examples(file))
    inner = {name for name in imported_modules(source) if name.split(".")[0] == "hf_gradacc"}
    assert inner <= set(DOORS)


def test_every_design_note_is_in_the_list_of_them():
    notes = {note.name for note in (DOCS / "design-notes").glob("2*.md")}
    index = (DOCS / "design-notes" / "index.md").read_text("utf-8")
    assert set(re.findall(r"\]\((2[^)]*\.md)\)", index)) == notes


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text("utf-8")
        fetched = re.findall(r"<(?:script|img|source)\b[^>]*\bsrc=[\"']?(https?:[^\"'\s>]+)", html)
        fetched += re.findall(
            r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(https?:[^\"'\s>]+)", html
        )
        assert fetched == [], page
    home = (site / "index.html").read_text("utf-8")
    assert "ExactSFTTrainer" in home
    assert "one_curve.png" in home
    listed = re.findall(
        r"<tr>\s*<td><code>(\w+)</code>", (site / "options.html").read_text("utf-8")
    )
    assert listed == [field.name for field in dataclasses.fields(GradAccOptions)]
    for door in DOORS:
        page = site / "api" / f"{door.removeprefix('hf_gradacc.')}.html"
        shown = re.findall(rf'id="{re.escape(door)}\.(\w+)"', page.read_text("utf-8"))
        assert set(importlib.import_module(door).__all__) == set(shown)
