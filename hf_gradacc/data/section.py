"""The `data` section of a recipe: sources, formats, lengths, mixing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from hf_gradacc.text import nearest

__all__ = [
    "FORMAT_COLUMNS",
    "OPTIONAL_COLUMNS",
    "PAIR_TASKS",
    "AssistantTurns",
    "DataSection",
    "DocumentUnit",
    "Format",
    "ModelSection",
    "Section",
    "SourceSection",
    "Task",
    "TokenizerSection",
    "TrainTokenizerSection",
]

Format = Literal[
    "chat",
    "prompt_completion",
    "instruction",
    "question_answer",
    "text",
    "classification",
    "seq2seq",
    "preference",
    "tokens",
]


AssistantTurns = Literal["auto", "each", "last", "together"]


DocumentUnit = Literal["file", "paragraph", "line"]


FORMAT_COLUMNS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
    "classification": ("text", "label"),
    "seq2seq": ("source", "target"),
    "preference": ("chosen", "rejected"),
    "tokens": ("input_ids",),
}
"""The columns a format cannot do without."""


OPTIONAL_COLUMNS: dict[Format, tuple[str, ...]] = {
    "chat": ("tools", "system", "chat_template_kwargs"),
    "instruction": ("input", "system", "history"),
    "question_answer": ("system", "history"),
    "preference": ("prompt", "tools", "system", "chat_template_kwargs", "margin"),
    "tokens": ("labels", "attention_mask", "completion_mask", "assistant_masks"),
}
"""The columns a format uses where they are there."""


_RENDERING = {
    *("conversation", "messages", "chat_template", "tools", "documents", "tokenize", "padding"),
    *("truncation", "max_length", "add_generation_prompt", "continue_final_message"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What `apply_chat_template` takes beside the values of a template."""


class Section(BaseModel):
    """Strict: no unknown key, no value of another type quietly converted."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """A child recipe cannot delete what its base says, so `null` takes it back."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in fields or fields[name].is_required()
        }


def _known_columns(columns: dict[str, str] | None) -> dict[str, str] | None:
    """Only columns of some format can be mapped; a base may bring those of another one."""
    tables = (FORMAT_COLUMNS, OPTIONAL_COLUMNS)
    known = [name for table in tables for names in table.values() for name in names]
    for name in columns or {}:
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean {guess}?" if guess else f"known: {', '.join(sorted(set(known)))}"
            raise ValueError(f"{name} is not a column of any format; {hint}")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known_columns)]


class SourceSection(Section):
    """One set of rows."""

    path: str
    """Hub name, or a local file, folder or pattern: json, jsonl, csv, parquet, arrow, text."""
    name: str | None = None
    """Configuration of a hub set."""
    split: str = "train"
    """Split of a hub set, a saved set or a folder whose files are named by split; slices such as
    `train[:1%]` work for all but streams."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    weight: float = Field(default=1.0, gt=0)
    """Share in a mix, relative to the other sources."""
    format: Format | None = None
    """In place of `data.format`."""
    columns: Columns | None = None
    """In place of `data.columns`."""


def _sources(value: Any) -> Any:
    """`path` and `[path, {path: ..., weight: ...}]` are both ways to write a list of sources."""
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[SourceSection], BeforeValidator(_sources)]


class DataSection(Section):
    """Which rows, and how they become tokens and targets."""

    train: Sources = Field(min_length=1)
    """One source or a list of them: a path, or a path with its own settings."""
    eval: Sources = []
    """Held-out rows, written as `train` is."""
    holdout: int | float | None = Field(default=None, gt=0)
    """Without `eval`: how many rows (5 or more), or which share, to hold out of `train`."""
    format: Format = "chat"
    """How a row is read."""
    columns: Columns = {}
    """Column names of the format to those of the data, such as `question: problem`."""
    document: DocumentUnit = "file"
    """What one document is in txt and md files; paragraphs end with an empty line."""
    system: str | None = None
    """A system turn put before rows that have none."""
    template_options: dict[str, Any] = {}
    """Values the chat template reads, such as `enable_thinking: false` or `date_string: ...`."""
    assistant_turns: AssistantTurns = "auto"
    """Which turns of a conversation share a sequence: `auto` learns each behind the text that the
    template prompts it with, in as few sequences as can be; `each` makes one of every turn, `last`
    learns only the last, `together` makes one of the conversation, whatever the template does."""
    roles_to_train: list[str] = Field(default=["assistant"], min_length=1)
    """Roles whose turns are learned; marks of a turn (`weight`, `train`, ...) go first."""
    source_prefix: str = ""
    """Text put before every source of `seq2seq`, such as `summarize: `."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest row in tokens; for `text`, the length of a block."""
    max_target_length: int | None = Field(default=None, ge=1)
    """Longest target of `seq2seq`; null means `max_length`."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a longer row; the report says to how many."""
    unusable: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be read or rendered; the report says to how many."""
    mix: Literal["first_exhausted", "all_exhausted"] = "all_exhausted"
    """Whether a mix ends with its first exhausted source, or repeats it until the last is."""
    streaming: bool = False
    """Read while training instead of preparing everything first."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that prepare the rows; null means one."""
    seed: int = Field(default=0, ge=0)
    """Decides which rows are held out, and the order of a mix."""

    @field_validator("template_options")
    @classmethod
    def _leave_rendering_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            if name in _RENDERING:
                raise ValueError(f"{name} says how to render; a recipe cannot change that")
        return options

    @field_validator("holdout")
    @classmethod
    def _share_or_rows(cls, holdout: int | float | None) -> int | float | None:
        if isinstance(holdout, float) and not holdout < 1:
            raise ValueError("`holdout` is a share below 1.0, or a whole number of rows")
        return holdout

    @model_validator(mode="after")
    def _one_eval(self) -> DataSection:
        if self.eval and self.holdout is not None:
            raise ValueError("give either `eval` or `holdout`, not both")
        if self.streaming and self.holdout is not None:
            raise ValueError("a stream cannot hold rows out; give `eval`")
        sliced = next((s.split for s in [*self.train, *self.eval] if "[" in s.split), None)
        if self.streaming and sliced is not None:
            raise ValueError(f"a stream has no slice {sliced}; name the split, or do not stream")
        return self


Task = Literal["causal_lm", "seq2seq", "classification", "dpo", "reward"]


PAIR_TASKS: tuple[Task, ...] = ("dpo", "reward")
"""The tasks that learn from pairs of answers, a chosen and a rejected one."""


class ModelSection(Section):
    """Which model: a name on the hub or a local folder, or a config for one to start from zero."""

    name: str | None = None
    """Hub name, or a folder; a folder is looked for beside the recipe first."""
    config: dict[str, Any] | None = None
    """`model_type` and sizes of a model with random weights, instead of `name`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Config values to change in a named model, such as `output_router_logits: true`."""
    task: Task = "causal_lm"
    """The head: it decides what a target is."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` keeps the checkpoint's (float32 for `config`)."""
    attn_implementation: str | None = None
    """For example `sdpa`, `flash_attention_2`, `eager`; null lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that the hub repository ships. Off unless you know its authors."""
    unfrozen_parameters: list[str] | None = Field(default=None, min_length=1)
    """Train only parameters whose name holds one of these regular expressions; null trains all."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either `name` or `config`; set the other to null")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, such as llama")
        return self


class TrainTokenizerSection(Section):
    """How to train a tokenizer on the training data."""

    vocab_size: int = Field(default=2048, ge=300)
    """Entries, special tokens included; 256 of them are the bytes."""


class TokenizerSection(Section):
    """Which tokenizer; by default the model's own."""

    name: str | None = None
    """Hub name or folder; null takes the model's."""
    train: TrainTokenizerSection | None = None
    """Train a byte-level BPE on the training data instead."""
    chat_template: str | None = None
    """In place of the tokenizer's: the name of one of its several templates or of a shipped one
    (chatml, gemma, llama3, mistral, phi3, zephyr), the path of a file, or Jinja text."""
    pad_token: str | None = None
    """Padding token; without one the tokenizer's own, or its end-of-text token."""
    eos_token: str | None = None
    """End-of-text token in place of the tokenizer's, such as `<|im_end|>`."""
    add_tokens: list[str] = Field(default_factory=list)
    """Tokens to add; the model's embeddings grow with them."""
