"""The sections of a recipe: every key, its type, its default and what it means.

The descriptions here are what `hf-gradacc schema` exports, so an editor shows them too. The
`data` section has a file of its own, `recipe_data`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hf_gradacc.recipe_data import DataSection, Section

__all__ = [
    "HEADS",
    "ModelSection",
    "OutputSection",
    "PeftSection",
    "Recipe",
    "Task",
    "TokenizerSection",
    "WandbSection",
]

Task = Literal["causal_lm", "seq2seq", "classification"]

HEADS: dict[Task, str] = {
    "causal_lm": "ForCausalLM",
    "seq2seq": "ForSeq2SeqLM",
    "classification": "ForSequenceClassification",
}
"""How the Auto classes of transformers and peft that load a task's model end."""


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
    """A Jinja template, or the path of a file that holds one, in place of the tokenizer's."""
    pad_token: str | None = None
    """Padding token; without one the tokenizer's own, or its end-of-text token."""
    eos_token: str | None = None
    """End-of-text token in place of the tokenizer's, such as `<|im_end|>`."""
    add_tokens: list[str] = Field(default_factory=list)
    """Tokens to add; the model's embeddings grow with them."""


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
    merge_on_save: bool = False
    """Save the whole model with the update merged in, rather than the adapter."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of peft's own config class."""

    @property
    def saves_whole_model(self) -> bool:
        """Whether a run leaves a model that transformers loads alone, not an adapter to one."""
        return self.method == "none" or self.merge_on_save

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
    """Where Weights & Biases files the run. Without an API key it is kept offline."""

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
    mode: Literal["online", "offline", "disabled"] | None = None
    """null means online with an API key, and offline without."""


class OutputSection(Section):
    """Where results go."""

    dir: str | None = None
    """Folder for checkpoints, the model and the resolved recipe, relative to the current one;
    null means `runs/` and the recipe's file name."""


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
    wandb: WandbSection = WandbSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _task_fits_format(self) -> Recipe:
        own = {"seq2seq": "seq2seq", "classification": "classification"}
        for source in [*self.data.train, *self.data.eval]:
            format = source.format or self.data.format
            if own.get(format, "causal_lm") != self.model.task:
                raise ValueError(
                    f"model.task = {self.model.task} cannot learn from data.format = {format}: "
                    f"set model.task to {own.get(format, 'causal_lm')}, or another format"
                )
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
    def _added_tokens_are_learned(self) -> Recipe:
        frozen = self.peft.method != "none" and not self.peft.modules_to_save
        if self.tokenizer.add_tokens and frozen:
            raise ValueError(
                "tokenizer.add_tokens grows the embeddings, but peft trains none of them, so the "
                "new tokens would mean nothing: set peft.modules_to_save to the model's embedding "
                "layers, such as [embed_tokens, lm_head]"
            )
        return self
