"""`hf-gradacc import`: read another tool's file, write a recipe, check it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hf_gradacc.elsewhere.axolotl import read_axolotl
from hf_gradacc.elsewhere.draft import Draft, Note
from hf_gradacc.elsewhere.llamafactory import read_llamafactory
from hf_gradacc.elsewhere.shared import Places
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.file.problems import Problem, RecipeError
from hf_gradacc.recipe.file.reading import read_yaml
from hf_gradacc.recipe.file.source import write_values
from hf_gradacc.recipe.load import load_recipe

__all__ = ["Imported", "detect_tool", "import_file"]

_SECTIONS = (
    *("model", "tokenizer", "data", "peft", "train", "dpo", "evaluation", "wandb", "output"),
)
_OWN = {
    "Axolotl": {"base_model", "datasets", "pretraining_dataset", "sequence_len", "adapter",
                "micro_batch_size", "num_epochs", "sample_packing", "val_set_size"},
    "LLaMA-Factory": {"model_name_or_path", "dataset", "stage", "finetuning_type", "cutoff_len",
                      "template", "lora_rank", "do_train", "preprocessing_num_workers"},
}  # fmt: skip
"""Keys by which the files are told apart."""


@dataclass(frozen=True)
class Imported:
    """A recipe made of another tool's file.

    Attributes:
        tool: "Axolotl" or "LLaMA-Factory".
        text: The recipe.
        notes: What it lacks, or holds in another way.
        problems: What `hf-gradacc train` would still refuse.
    """

    tool: str
    text: str
    notes: list[Note]
    problems: list[Problem]

    def describe(self, out: Path) -> str:
        """Say in a few lines what was written, and each key that changes what is trained."""
        left = [note for note in self.notes if not note.carried]
        lines = [f"written: {out}, from a file of {self.tool}"]
        lines += [f"{_count(len(left), 'key')} without a counterpart, see its last lines"]
        lines += [f"  {note.key}: {note.value}: {note.text}" for note in self.notes if note.changes]
        if self.problems:
            count = _count(len(self.problems), "problem")
            lines += [f"{count} before it can be trained:", *(f"  {p}" for p in self.problems)]
        else:
            lines += [f"look at it first: hf-gradacc plan {out}"]
        return "\n".join(lines)


def import_file(file: Path, out: Path, *, world_size: int | None = None) -> Imported:
    """Make a recipe of a file, and write it where no file is yet.

    Args:
        file: An Axolotl or LLaMA-Factory file, YAML or JSON.
        out: The recipe to write.
        world_size: Processes that the file was used with: rows of an update are counted for them.

    Raises:
        ConfigError: If `out` is there, or the file is of neither tool, or trains what no recipe
            does.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: name another file with --output.")
    try:
        values, _ = read_yaml(file)
    except RecipeError as error:  # it is no recipe, and need not become one
        (found, *_) = error.problems
        raise ConfigError(_unreadable(found)) from None
    tool = detect_tool(values, file)
    draft = Draft(values, world_size)
    read = read_axolotl if tool == "Axolotl" else read_llamafactory
    try:
        read(draft, Places(file, out.parent))
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{file}: {error}") from None
        raise ConfigError(
            f"{file}: a value is not of the kind that {tool} has there ({error}): correct it first."
        ) from error
    text = _write(draft, tool, file.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    problems: list[Problem] = []
    try:
        load_recipe(out, trust_remote_code=True)
    except RecipeError as error:
        problems = error.problems
    return Imported(tool, text, draft.notes, problems)


def _unreadable(found: Problem) -> str:
    """Say why a file of another tool cannot be read, in words that are not about recipes."""
    why = found.why.replace("is not a YAML that a recipe may hold", "is not YAML")
    fix = found.fix.replace("a recipe is sections", "such a file is lines")
    fix = fix.replace("such as model, data, train", "such as base_model or model_name_or_path")
    fix = fix.replace("what the run needs", "what it needs")
    key = f"{found.key}: " if found.key else ""
    return f"{found.origin}: {key}{why}: {fix}."


def detect_tool(values: Collection[str], file: Path) -> str:
    """Tell by its keys which tool a file is for.

    Raises:
        ConfigError: If by none.
    """
    counts = {tool: len(keys & set(values)) for tool, keys in _OWN.items()}
    tool = max(counts, key=lambda name: counts[name])
    others = [count for name, count in counts.items() if name != tool]
    if counts[tool] < 2 or counts[tool] in others:
        raise ConfigError(
            f"{file} is neither a file of Axolotl (base_model, datasets, sequence_len, ...) nor of "
            "LLaMA-Factory (model_name_or_path, dataset, cutoff_len, ...)."
        )
    return tool


def _write(draft: Draft, tool: str, name: str) -> str:
    values = {section: draft.values[section] for section in _SECTIONS if draft.values.get(section)}
    left = [note for note in draft.notes if not note.carried]
    header = [
        f"# Made by `hf-gradacc import` of {name} ({tool}).",
        f"# {_count(len(left), 'key')} of it {'has' if len(left) == 1 else 'have'} no counterpart; "
        "a comment at the end says what became of each.",
        "",
    ]
    body = write_values(values)
    body = re.sub(r"^(?=\w)", "\n", body, flags=re.MULTILINE).lstrip("\n")
    lines: list[str] = []
    for title, held in (
        ("Carried over in another way:", [n for n in draft.notes if n.carried]),
        ("Without a counterpart, and what is trained differs:", [n for n in left if n.changes]),
        ("Without a counterpart, and nothing changes:", [n for n in left if not n.changes]),
    ):
        if held:
            lines += ["", f"# {title}"]
            lines += [f"#   {note.key}: {note.value}\n#     {note.text}" for note in held]
    return "\n".join([*header, body.rstrip("\n"), *lines, ""])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
