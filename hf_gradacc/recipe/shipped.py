"""The recipes that ship: list, show, copy."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.tables import WithoutBlanks
from hf_gradacc.text import nearest, printable

__all__ = [
    "copy_recipe",
    "find_recipe",
    "list_recipes",
    "recipe_names",
    "recipes_app",
    "recipes_folder",
    "show_recipe",
]

recipes_app = typer.Typer(help="The recipes that ship: list, show, copy.", no_args_is_help=True)


def recipes_folder() -> Path:
    """Where recipes lie: in the package where it was installed, else beside it in the checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, such as `qwen3/4b_lora_chat`."""
    folder = recipes_folder()
    names = (str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("sweeps/"))


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name where it ships.

    Raises:
        ConfigError: If there is neither such a file nor such a name.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes_folder() / f"{name.removesuffix('.yaml').removeprefix('recipes/')}.yaml"
    if shipped.is_file():
        return shipped
    guess = nearest(name, recipe_names())
    hint = f"did you mean {guess}? " if guess else ""
    raise ConfigError(
        f"RECIPE = {name!r} is neither a file nor a recipe that ships: {hint}"
        "`hf-gradacc recipes list` shows all."
    )


@recipes_app.command("list")
def list_recipes() -> None:
    """List the shipped recipes with what they do and need."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("does")
    table.add_column("needs")
    for name in recipe_names():
        text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        needs = _header(text, "Needs:").partition(" (")[0].rstrip(".")
        # Square brackets, as in hf_gradacc[trl], are no markup.
        table.add_row(name, escape(title), escape(needs))
    # Without a terminal, as in a pipe or a log, every row stays one line.
    console = Console(width=None if sys.stdout.isatty() else 250)
    console.print(WithoutBlanks(table))


@recipes_app.command("show")
def show_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or file.")],
) -> None:
    """Print a recipe.

    Example: `hf-gradacc recipes show qwen3/4b_lora_chat`
    """
    text = printable(_read(find_recipe(recipe)))
    console = Console()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text, end="")


@recipes_app.command("copy")
def copy_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name or file.")],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="File or folder to copy to.")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, with those it inherits from, to make it yours.

    Example: `hf-gradacc recipes copy qwen3/4b_lora_chat mine.yaml`
    """
    from hf_gradacc.recipe.file.source import flatten_recipe

    source = find_recipe(recipe)
    place = target / source.name if target.is_dir() or target.suffix == "" else target
    if place.exists() and not force:
        raise ConfigError(
            f"target = {str(place)!r} is there already: use another name, or --force."
        )
    sweep = _sweep_of(source)
    beside = place.with_name(f"{place.stem}_sweep.yaml")
    if sweep is not None and beside.exists() and not force:
        raise ConfigError(
            f"target = {str(place)!r}: the sweep that ships with it would go to {str(beside)!r}, "
            f"which is there already: use another name, or --force."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    text = _read(source)
    if "\nbase:" in f"\n{text}":
        text = flatten_recipe(source)
    place.write_text(_move_paths(text, source.parent, place.parent), encoding="utf-8")
    print(f"copied: {place}")
    if sweep is not None:
        shipped = f"sweep {source.stem} recipes/sweeps/{source.stem}.yaml"
        text = _read(sweep).replace(shipped, f"sweep {place} {beside}")
        text = text.replace(f"train, {source.stem},", f"train, {place},")
        beside.write_text(text, encoding="utf-8")
        print(f"copied: {beside}, a sweep of it; `hf-gradacc sweep {place} {beside}` checks it")


def _sweep_of(recipe: Path) -> Path | None:
    """The sweep that ships with a shipped recipe; None if there is none."""
    folder = recipes_folder().resolve()
    if not recipe.resolve().is_relative_to(folder):
        return None
    sweep = folder / "sweeps" / recipe.resolve().relative_to(folder)
    return sweep if sweep.is_file() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"RECIPE = {str(path)!r} is not text: save it as UTF-8; byte {error.start} is not."
        ) from None


def _move_paths(text: str, old: Path, new: Path) -> str:
    """Rewrite data paths that are relative to the recipe, so that they lead to the same files."""
    for path in set(re.findall(r"[\w./-]+\.(?:jsonl|json|csv|parquet|txt)\b", text)):
        if not Path(path).is_absolute() and (old / path).is_file():
            text = text.replace(f": {path}", f": {os.path.relpath(old / path, new)}")
    return text


def _header(text: str, heading: str) -> str:
    """The paragraph of a recipe's opening comment that starts with `heading`."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    for index, line in enumerate(lines):
        if line.startswith(heading):
            found = [line.removeprefix(heading)]
            for more in lines[index + 1 :]:
                if not more or more.split(" ")[0].endswith(":"):
                    break
                found.append(more)
            return " ".join(part.strip() for part in found)
    return ""
