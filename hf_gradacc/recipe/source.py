"""Read recipe files as written: inheritance, overrides, and the line every value came from.

A recipe is data. YAML is read without tags that build objects, and interpolation knows other
keys of the recipe and, spelt `${oc.env:NAME}`, plain environment variables; nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_gradacc.recipe.problems import Key, Origin, Problem, RecipeError, dotted

__all__ = [
    "COMMAND_LINE",
    "SECRET_KEY",
    "SECRET_NAME",
    "RecipeSource",
    "flatten_recipe",
    "read_recipe",
]

COMMAND_LINE = "command line"
SECRET_NAME = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)
"""Environment variables that a recipe may not read."""


SECRET_KEY = re.compile(r"secret|passw|api_?key|credential|(hub|auth|access)_token", re.IGNORECASE)
"""Keys, of options handed on to other libraries, whose values are never saved or logged."""


_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:\s*([^}]*)\}")


class RecipeSource:
    """The merged, still unchecked values of a recipe, and where each was written."""

    def __init__(self, path: Path, values: dict[str, Any], origins: dict[Key, Origin]) -> None:
        self.path = path
        self.values = values
        self.origins = origins

    def origin(self, key: Sequence[str | int]) -> Origin:
        """Where the value at `key`, or the closest section around it, was written."""
        for length in range(len(key), 0, -1):
            found = self.origins.get(tuple(key[:length]))
            if found is not None:
                return found
        return Origin(str(self.path))

    def folder(self, key: Sequence[str | int]) -> Path:
        """The folder that a relative path at `key` starts from: its recipe's, or the current."""
        file = self.origin(key).file
        return Path.cwd() if file == COMMAND_LINE else Path(file).absolute().parent


def read_recipe(path: Path, *, overrides: Sequence[str] = ()) -> RecipeSource:
    """Read a recipe with everything it inherits, then apply `key.sub=value` overrides.

    Raises:
        RecipeError: If a file cannot be read as YAML, an override cannot be applied, or an
            interpolation leads nowhere.
    """
    origins: dict[Key, Origin] = {}
    config = _read_with_bases(path, origins, seen=())
    problems = [
        problem
        for override in overrides
        if (problem := _override(config, override, origins)) is not None
    ]
    if problems:
        raise RecipeError(problems)
    _refuse_resolvers(config, origins, path)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        why = str(error).splitlines()[0]
        fix = "write ${section.key} with a key that this recipe has"
        raise RecipeError([Problem(key, why, fix, Origin(str(path)))]) from None
    assert isinstance(values, dict)
    return RecipeSource(path, {str(name): value for name, value in values.items()}, origins)


def flatten_recipe(path: Path) -> str:
    """A recipe with its bases merged in, as YAML under its own opening comment.

    Raises:
        RecipeError: As `read_recipe`.
    """
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"(#.*\n)*", text)
    assert comment is not None
    merged = OmegaConf.to_yaml(_read_with_bases(path, {}, seen=()))
    return f"{comment.group()}\n{merged}"


def _read_with_bases(path: Path, origins: dict[Key, Origin], seen: tuple[Path, ...]) -> DictConfig:
    """One file merged over its `base`; `origins` ends with the line that won for each key."""
    if path.resolve() in seen:
        loop = " -> ".join(str(step) for step in (*seen, path.resolve()))
        raise RecipeError(
            [Problem("base", "inherits itself", f"break the circle: {loop}", Origin(str(path)))]
        )
    config, lines = _read_file(path)
    base = config.pop("base", None)
    if base is not None:
        origin = lines.get(("base",), Origin(str(path)))
        if not isinstance(base, str):
            fix = "write the path of one recipe, relative to this file"
            raise RecipeError([Problem("base", "is not a path", fix, origin, base)])
        parent = path.parent / base
        if not parent.is_file():
            fix = f"{parent} is not a file; the path is relative to this recipe"
            raise RecipeError([Problem("base", "is not a recipe", fix, origin, base)])
        config = _merge(
            _read_with_bases(parent, origins, (*seen, path.resolve())), config, origins, path
        )
    origins.update(lines)
    return config


def _merge(
    below: DictConfig, above: DictConfig, origins: dict[Key, Origin], path: Path
) -> DictConfig:
    try:
        merged = OmegaConf.merge(below, above)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        fix = "give the key the same shape in both recipes"
        origin = Origin(str(path))
        raise RecipeError([Problem("", f"does not fit its base: {why}", fix, origin)]) from None
    assert isinstance(merged, DictConfig)
    return merged


def _read_file(path: Path) -> tuple[DictConfig, dict[Key, Origin]]:
    """Parse one file, and list the line of every key."""
    origin = Origin(str(path))
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise RecipeError([Problem("", reason, "check the path", origin)]) from None
    except UnicodeDecodeError as error:
        fix = f"save it as UTF-8; byte {error.start} is not"
        raise RecipeError([Problem("", "is not text", fix, origin)]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError([_yaml_problem(error, path)]) from None
    if root is None:
        return OmegaConf.create({}), {}
    if not isinstance(root, yaml.MappingNode):
        fix = "a recipe is sections of `key: value`, such as model, data, train"
        raise RecipeError([Problem("", "is not a mapping", fix, Origin(str(path), 1))])
    lines: dict[Key, Origin] = {}
    problems: list[Problem] = []
    for key, line, why in _walk(root, (), ()):
        lines[key] = Origin(str(path), line)
        if why:
            fix = "keys are plain words, each once, and an anchor cannot hold itself"
            problems.append(Problem(dotted(key), why, fix, lines[key]))
    if problems:
        raise RecipeError(problems)
    try:
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise RecipeError([_yaml_problem(error, path)]) from None
    assert isinstance(config, DictConfig)
    _expand_short_forms(config)
    return config, lines


def _expand_short_forms(config: DictConfig) -> None:
    """`peft: lora` sets the method and leaves the section's other keys to base and overrides."""
    values = OmegaConf.to_container(config, resolve=False)
    if isinstance(values, dict) and isinstance(values.get("peft"), str):
        config["peft"] = {"method": values["peft"]}


def _walk(
    node: yaml.Node, key: Key, parents: tuple[int, ...]
) -> Iterator[tuple[Key, int, str | None]]:
    """Yield key, line and, where something is wrong with it, why, for every value below `node`."""
    if id(node) in parents:
        yield key, node.start_mark.line + 1, "refers to itself"
        return
    parents = (*parents, id(node))
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag != "tag:yaml.org,2002:str":
                yield (*key, str(name.value)[:40]), line, "is not a word"
                continue
            why = "stands here twice" if name.value in names else None
            names.add(name.value)
            yield (*key, name.value), line, why
            yield from _walk(value, (*key, name.value), parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, index), value.start_mark.line + 1, None
            yield from _walk(value, (*key, index), parents)


def _yaml_problem(error: Exception, path: Path) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line = None if mark is None else mark.line + 1
    why = str(
        getattr(error, "problem", None) or str(error).splitlines()[0] if str(error) else error
    )
    fix = "check indentation, colons and quotes around this line"
    return Problem("", f"is not a YAML that a recipe may hold: {why}", fix, Origin(str(path), line))


def _override(config: DictConfig, text: str, origins: dict[Key, Origin]) -> Problem | None:
    """Apply one `key.sub=value` in place; a problem where that cannot be done."""
    origin = Origin(COMMAND_LINE)
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", name):
        return Problem(text, "is not an override", "write key.sub=value", origin)
    key: Key = tuple(int(p) if p.isdigit() else p for p in re.findall(r"\w+", name))
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
        OmegaConf.update(config, name, parsed, merge=True, force_add=True)
        _expand_short_forms(config)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        why = f"cannot be set: {str(error).splitlines()[0]}"
        return Problem(name, why, "check the key, and quote values with brackets", origin, value)
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = origin
    return None


def _refuse_resolvers(config: DictConfig, origins: dict[Key, Origin], path: Path) -> None:
    """Only `${oc.env:NAME}` may call out, and never for a name that looks like a secret."""
    problems = []
    for key, text in _strings(OmegaConf.to_container(config, resolve=False), ()):
        for name, argument in _RESOLVER.findall(text):
            if name != "oc.env":
                why = f"calls ${{{name}:...}}"
                fix = "only ${section.key} and ${oc.env:NAME} are known to recipes"
            elif SECRET_NAME.search(argument.split(",")[0].strip()):
                why = f"reads the secret {argument.strip()}"
                fix = "leave it in the environment; transformers and wandb find it there"
            else:
                continue
            origin = origins.get(key, Origin(str(path)))
            problems.append(Problem(dotted(key), why, fix, origin, text))
    if problems:
        raise RecipeError(problems)


def _strings(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, (*key, index))
