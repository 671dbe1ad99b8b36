"""The sections of a recipe as far as they can be read, for checks that look at several of them.

A report names everything that is wrong. So a check of what keys mean together goes on where one of
them is misspelt: what is wrong by itself is left out here, as if it were not written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hf_gradacc.data.section import DataSection, ModelSection, SourceSection, TokenizerSection
from hf_gradacc.recipe.file.problems import Key, Problem, dotted
from hf_gradacc.recipe.file.source import RecipeSource
from hf_gradacc.recipe.keys.evaluation import EvaluationSection
from hf_gradacc.recipe.keys.pairs import DpoSection
from hf_gradacc.recipe.keys.sections import PeftSection, arguments_class, train_section

__all__ = ["ReadableSections", "differs"]

_Section = TypeVar("_Section", bound=BaseModel)


class ReadableSections:
    """What of a recipe is right by itself.

    Attributes:
        source: The recipe's values, and where each was written.
        paths: The absolute path for each key that is local, see `resolve_paths`.
        model, tokenizer, data, peft, evaluation, dpo: The sections; None for one whose keys
            contradict each other.
        train: The values of `train` that are no null.
    """

    def __init__(self, source: RecipeSource, paths: Mapping[Key, str]) -> None:
        self.source, self.paths = source, paths
        self.model = _read(ModelSection, source.values.get("model"))
        self.tokenizer = _read(TokenizerSection, source.values.get("tokenizer"))
        self.data = _read(DataSection, source.values.get("data"))
        self.peft = _read(PeftSection, source.values.get("peft"))
        self.evaluation = _read(EvaluationSection, source.values.get("evaluation"))
        self.dpo = _read(DpoSection, source.values.get("dpo"))
        read = _read(train_section(), source.values.get("train"))
        values = {} if read is None else read.model_dump(exclude_unset=True)
        self.train: dict[str, Any] = {n: v for n, v in values.items() if v is not None}

    @cached_property
    def sources(self) -> list[tuple[Key, SourceSection, str | None]]:
        """Each source of rows: its key as written, its section, and its path if it is local."""
        found: list[tuple[Key, SourceSection, str | None]] = []
        for part in ("train", "eval") if self.data is not None else ():
            written = self.source.values["data"].get(part)
            for index, section in enumerate(getattr(self.data, part)):
                key: Key = ("data", part, index)
                place = self.paths.get(key)
                found.append((key if isinstance(written, list) else key[:2], section, place))
        return found

    @property
    def has_eval(self) -> bool:
        """Whether there are held-out rows; so it seems where what is written of them is wrong."""
        written = self.source.values.get("data")
        if not isinstance(written, dict):
            return True
        return any(written.get(name) not in (None, []) for name in ("eval", "holdout"))

    @property
    def stops_early(self) -> bool:
        """Whether the run ends, and its model is chosen, by an evaluation."""
        section = self.evaluation
        return section is not None and section.early_stopping_patience is not None

    @property
    def metrics(self) -> list[str] | None:
        """What is measured beside the loss; None where what is written of it is wrong."""
        written = self.source.values.get("evaluation")
        asked = written.get("metrics") if isinstance(written, dict) else written
        found = [] if self.evaluation is None else self.evaluation.metrics
        return None if asked and not found else [*found]

    def is_unclear(self, name: str) -> bool:
        """Whether the recipe sets a training argument to something that is wrong by itself."""
        written = self.source.values.get("train")
        return (
            isinstance(written, dict) and written.get(name) is not None and name not in self.train
        )

    def trains_with(self, name: str) -> Any:
        """The value of a training argument: the recipe's, or the default."""
        if name in self.train:
            return self.train[name]
        return _defaults().get(name)

    def sets(self, name: str) -> bool:
        """Whether the recipe sets a training argument to something else than its default."""
        return name in self.train and self.train[name] != _defaults().get(name)

    def problem(self, key: Key, why: str, fix: str) -> Problem:
        """A problem of one key, with the value that is written there."""
        value: Any = self.source.values
        for step in key:
            inside = isinstance(value, dict) and step in value
            inside |= isinstance(value, list) and isinstance(step, int) and step < len(value)
            value = value[step] if inside else ...
        return Problem(dotted(key), why, fix, self.source.origin(key), value)


def differs(section: BaseModel, name: str) -> bool:
    """Whether a key of a section is something else than its default."""
    field = type(section).model_fields[name]
    return bool(getattr(section, name) != field.get_default(call_default_factory=True))


def _read(kind: type[_Section], written: Any) -> _Section | None:
    if isinstance(written, str):
        written = {"method": written}
    values = dict(written) if isinstance(written, dict) else {}
    for _ in range(2):
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                if details["loc"]:
                    values.pop(str(details["loc"][0]), None)
    return None


def _defaults() -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(arguments_class()):
        if field.default is not dataclasses.MISSING:
            found[field.name] = getattr(field.default, "value", field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found
