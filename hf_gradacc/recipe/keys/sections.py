"""The sections of a recipe: every key, its type, its default and what it means.

The descriptions here are what `hf-gradacc schema` exports, so an editor shows them too. The
`data` section has a file of its own, `recipe_data`.

The `train` section: every field of GradAccArguments, checked by the type it declares.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    create_model,
    field_validator,
    model_validator,
)

from hf_gradacc.compat import RENAMED_OPTIONS
from hf_gradacc.data.section import (
    PAIR_TASKS,
    DataSection,
    ModelSection,
    Section,
    Task,
    TokenizerSection,
)
from hf_gradacc.recipe.file.interpolation import FromEnvironment
from hf_gradacc.recipe.file.problems import Key
from hf_gradacc.recipe.keys.evaluation import EvaluationSection, contradictions_of_evaluation
from hf_gradacc.recipe.keys.pairs import DpoSection, RewardSection, contradictions_of_pairs

__all__ = [
    "HEADS",
    "RESERVED",
    "OutputSection",
    "PeftSection",
    "Recipe",
    "SamplesSection",
    "WandbSection",
    "arguments_class",
    "train_section",
]

HEADS: dict[Task, str] = {
    "causal_lm": "ForCausalLM",
    "seq2seq": "ForSeq2SeqLM",
    "classification": "ForSequenceClassification",
    "dpo": "ForCausalLM",
    "reward": "ForSequenceClassification",
}
"""How the Auto classes of transformers and peft that load a task's model end."""


class PeftSection(Section):
    """Train a small part of the model, through the peft library."""

    method: Literal["none", "lora", "dora", "qlora", "ia3", "prompt_tuning", "prefix_tuning"] = (
        "none"
    )
    """`qlora` loads the model in 4 bits and needs bitsandbytes."""
    r: int = Field(default=16, ge=1)
    """Rank of LoRA, DoRA and QLoRA."""
    alpha: float = Field(default=32, gt=0)
    """Scale of LoRA, DoRA and QLoRA; updates are multiplied by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank matrices."""
    target_modules: str | list[str] | None = None
    """Which layers; null means all linear ones for LoRA, and peft's choice for IA3."""
    modules_to_save: list[str] | None = None
    """Layers trained in full and saved along, such as a new head."""
    num_virtual_tokens: int = Field(default=16, ge=1)
    """Length of the learned prompt or prefix."""
    loraplus_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: how many times `train.learning_rate` the B matrices learn with, such as 16."""
    merge_on_save: bool = False
    """Save the whole model with the update merged in, rather than the adapter."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of peft's own config class."""

    @property
    def saves_whole_model(self) -> bool:
        """Whether a run leaves a model that transformers loads alone, not an adapter to one."""
        return self.method == "none" or self.merge_on_save

    @model_validator(mode="after")
    def _has_matrices(self) -> PeftSection:
        if self.loraplus_ratio is not None and self.method not in ("lora", "dora", "qlora"):
            raise ValueError(
                f"`loraplus_ratio` is about the matrices of LoRA, and method {self.method} has "
                f"none: set `method` to lora, dora or qlora, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _mergeable(self) -> PeftSection:
        if self.merge_on_save and self.method in ("none", "prompt_tuning", "prefix_tuning"):
            raise ValueError(f"`merge_on_save` has nothing to merge for method {self.method}")
        if self.merge_on_save and self.method == "qlora":
            raise ValueError(
                "merging into 4-bit weights would round the update away: save the adapter, and "
                "merge it into the unquantized model with peft"
            )
        return self


class WandbSection(Section):
    """Track the run with Weights & Biases: the section turns it on, unless `train.report_to` says
    otherwise. Without an API key the run is kept offline."""

    project: str = "hf-gradacc"
    """Project."""
    name: str | None = None
    """Name of the run; null means the recipe's file name."""
    entity: str | None = None
    """Team or user."""
    group: str | None = None
    """Group of runs."""
    tags: list[str] = Field(default_factory=list)
    """Tags."""
    notes: str | None = None
    """A longer description."""
    per_rank: bool = False
    """Also a run for every rank, with its own figures, in one group."""
    report: bool = False
    """Write the report when training ends, and upload it as an artifact."""
    upload_text: bool = False
    """Upload text of rows: eight of the training set with their targets marked, and `samples`."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """null means online with an API key, and offline without."""


class SamplesSection(Section):
    """Let the model answer a few prompts while it trains. Training is the same without."""

    every: int = Field(default=100, ge=1)
    """Updates between two looks; there is one after the last update, too."""
    count: int = Field(default=4, ge=1, le=64)
    """Prompts: of the first held-out rows, or of the first rows of `data.train` if none are."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 writes the likeliest token each time; above, tokens are drawn, from the same seed."""


class OutputSection(Section):
    """Where results go."""

    dir: str | None = None
    """Folder for checkpoints, the model and the resolved recipe, relative to the current one;
    null means `runs/` and the recipe's file name."""
    overwrite: bool = False
    """Remove what an earlier run wrote into the folder, and nothing else; `--overwrite`."""

    @field_validator("dir")
    @classmethod
    def _names_a_folder(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or not value.strip()):
            raise ValueError("it names no folder, such as runs/mine")
        return value


def _method(value: Any) -> Any:
    """`peft: lora` is short for `peft: {method: lora}`."""
    return {"method": value} if isinstance(value, str) else {} if value is None else value


class Recipe(Section):
    """A training run, complete: what `hf-gradacc train` and `recipes/sft.py` run."""

    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    peft: Annotated[PeftSection, BeforeValidator(_method)] = PeftSection()
    train: dict[str, Any] = Field(default_factory=dict)
    """Any field of GradAccArguments, so any field of transformers.TrainingArguments."""
    dpo: DpoSection = DpoSection()
    reward: RewardSection = RewardSection()
    evaluation: EvaluationSection = EvaluationSection()
    wandb: WandbSection = WandbSection()
    samples: SamplesSection | None = None
    output: OutputSection = OutputSection()
    _from_environment: dict[Key, FromEnvironment] = PrivateAttr(default_factory=dict)

    @property
    def from_environment(self) -> dict[Key, FromEnvironment]:
        """The keys that hold something from the environment, which is written out by name."""
        return self._from_environment

    def keep_from_environment(self, found: Mapping[Key, FromEnvironment]) -> None:
        """Note which keys hold something from the environment.

        Args:
            found: By key as written; a source that is written as its path alone is found there.
        """
        for key, held in found.items():
            if key[:1] == ("data",) and key[1:2] in (("train",), ("eval",)):
                rest = key[2:] if key[2:] and isinstance(key[2], int) else (0, *key[2:])
                key = (*key[:2], *rest) if len(rest) > 1 else (*key[:2], *rest, "path")
            elif key == ("peft",):
                key = ("peft", "method")
            self._from_environment[key] = held

    @model_validator(mode="after")
    def _task_fits_format(self) -> Recipe:
        own: dict[str, list[Task]] = {
            "seq2seq": ["seq2seq"],
            "classification": ["classification"],
            "preference": [*PAIR_TASKS],
        }
        for source in [*self.data.train, *self.data.eval]:
            format = source.format or self.data.format
            tasks = own.get(format, ["causal_lm"])
            if self.model.task not in tasks:
                raise ValueError(
                    f"model.task = {self.model.task} cannot learn from data.format = {format}: "
                    f"set model.task to {' or '.join(tasks)}, or another format"
                )
        return self

    @model_validator(mode="after")
    def _samples_are_written(self) -> Recipe:
        if self.samples is not None and self.model.task in ("classification", "reward"):
            raise ValueError("samples are texts that a model writes, and a classifier writes none")
        return self

    @model_validator(mode="after")
    def _task_and_evaluation_hold_together(self) -> Recipe:
        problems = [*contradictions_of_pairs(self), *contradictions_of_evaluation(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _weights_to_quantize(self) -> Recipe:
        if self.peft.method == "qlora" and self.model.name is None:
            raise ValueError(
                "peft.method = qlora loads trained weights in 4 bits, and model.config has none: "
                "set model.name, or use lora"
            )
        return self

    @model_validator(mode="after")
    def _one_thing_trains(self) -> Recipe:
        if self.model.unfrozen_parameters and self.peft.method != "none":
            raise ValueError(
                f"model.unfrozen_parameters and peft.method = {self.peft.method} both say what is "
                f"trained: leave one of them out; beside an adapter, peft.modules_to_save trains "
                f"layers in full"
            )
        return self

    @property
    def adapter_to_nothing(self) -> str:
        """Why the adapter that a run leaves cannot be loaded; empty if it can, or there is none."""
        if self.model.config is None or self.peft.saves_whole_model:
            return ""
        learns_prompt = self.peft.method in ("prompt_tuning", "prefix_tuning")
        way_out = "peft.method: none" if learns_prompt else "peft.merge_on_save: true"
        return (
            "the adapter is one to random weights (model.config), which are not saved, so it "
            f"cannot be loaded again: set {way_out} for a model that can"
        )

    @model_validator(mode="after")
    def _added_tokens_are_learned(self) -> Recipe:
        frozen = self.peft.method != "none" and not self.peft.modules_to_save
        if self.tokenizer.add_tokens and frozen:
            raise ValueError(
                "tokenizer.add_tokens grows the embeddings, but peft trains none of them, so the "
                "new tokens would mean nothing: set peft.modules_to_save to the model's embedding "
                "layers, such as [embed_tokens, lm_head]"
            )
        return self


RESERVED = {
    "output_dir": "set output.dir",
    "run_name": "set wandb.name",
    "project": "set wandb.project",
    "wandb_per_rank": "set wandb.per_rank",
    "wandb_report": "set wandb.report",
    "wandb_upload_text": "set wandb.upload_text",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN; a recipe holds no secret",
    "loraplus_ratio": "set peft.loraplus_ratio",
    "local_rank": "leave it to the launcher",
}
"""Fields that another section owns, and what to write instead."""


def arguments_class(task: Task = "causal_lm") -> type[Any]:
    """The arguments of a task: GradAccArguments, or those of TRL with its options.

    Imported late because torch and transformers take seconds to load.
    """
    if task in PAIR_TASKS:
        from hf_gradacc.recipe import pair_trainers

        return pair_trainers.DPOArguments if task == "dpo" else pair_trainers.RewardArguments
    from hf_gradacc.arguments import GradAccArguments

    return GradAccArguments


@cache
def train_section() -> type[BaseModel]:
    """A pydantic model with a field for each option; only those set are passed on."""
    from hf_gradacc.arguments import OUR_OPTIMIZERS

    arguments = arguments_class()
    hints = typing.get_type_hints(arguments)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        # Declared as text for the command line's sake; what it wants is a boolean.
        plain = bool | str if field.name == "fsdp" else _plain(hints[field.name])
        if field.name == "optim":
            plain = Literal[(*typing.get_args(plain), *OUR_OPTIMIZERS)]
        if field.init and field.name not in RESERVED and plain is not None:
            described = Field(default=None, description=field.metadata.get("help"))
            fields[field.name] = (plain | None, described)
    for new, old in RENAMED_OPTIONS.items():
        fields.setdefault(new, fields[old])
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    model: type[BaseModel] = create_model("TrainSection", __config__=config, **fields)
    model.__doc__ = "Any field of GradAccArguments, so any field of transformers.TrainingArguments."
    return model


def _plain(hint: Any) -> Any:
    """A hint as YAML can express it: an enum by its values; None for what needs Python objects."""
    if _is_enum(hint):
        values = tuple(str(member.value) for member in hint)
        return (
            Annotated[Literal[values], BeforeValidator(_no)] if "no" in values else Literal[values]
        )
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not types.NoneType]
        # `SchedulerType | str` accepts any text by its type, but only a few words by its code.
        enums = [member for member in members if _is_enum(member)]
        plain = [_plain(member) for member in members if not (enums and member is str)]
        known = tuple(member for member in plain if member is not None)
        return typing.Union[known] if known else None  # noqa: UP007 - known at run time only
    if isinstance(hint, type) and hint.__module__ != "builtins":
        return None
    return hint


def _no(value: Any) -> Any:
    """YAML reads an unquoted `no` as false."""
    return "no" if value is False else value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)
