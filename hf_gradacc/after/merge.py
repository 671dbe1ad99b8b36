"""`hf-gradacc merge`: an adapter and its base as one model that transformers loads alone.

The merged model is read back before its folder gets its name, and its logits are compared with the
adapter's: an output layer that was trained apart from the embeddings it shares, for one, would
otherwise be lost in silence.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_gradacc.after.saved import (
    SavedModel,
    find_saved,
    load_adapter,
    load_saved,
    load_tokenizer_of,
    loading_quietly,
)
from hf_gradacc.errors import ConfigError
from hf_gradacc.recipe.folder import RECIPE_NAME
from hf_gradacc.recipe.keys.sections import HEADS
from hf_gradacc.safety.output_files import check_output
from hf_gradacc.tracking.card import CARD_NAME, PLOT_NAME, as_merged, is_own_card

__all__ = ["Merged", "merge_run"]

_LIMITS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""How far logits may move, relative to their size: a merge rounds each weight once."""

_PROBE = 16
"""Tokens whose logits are compared."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        folder: Where it lies.
        dtype: The type of its weights.
        difference: How far its logits are from the adapter's, relative to their size.
        was_quantized: The adapter was trained on the base in 4 bits, and merged into the base as
            it was before.
    """

    folder: Path
    dtype: str
    difference: float
    was_quantized: bool


def merge_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    allow_env: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Merged:
    """Merge the adapter of a run into its base, in the base's own type of weights.

    Args:
        run: The folder of a run, or of one of its checkpoints.
        out: The folder to make; by default the run's name and `-merged`.
        allow_env: Variables that the recipe may read.
        trust_remote_code: Let the model run code of its repository, if the recipe says so too.

    Raises:
        ConfigError: If there is nothing to merge or it cannot be merged, if `out` holds something
            or cannot be written, or if the saved model does not answer as the adapter did. No
            folder is left then.
    """
    saved = find_saved(run, allow_env=allow_env, trust_remote_code=trust_remote_code)
    if not saved.is_adapter:
        raise ConfigError(f"RUN = {str(run)!r} holds a whole model: there is nothing to merge.")
    resolved = saved.folder.resolve()
    folder = Path(out) if out is not None else resolved.with_name(f"{resolved.name}-merged")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"OUT = {str(folder)!r} is there already: name a folder that is not.")
    if not folder.exists():
        check_output(folder, option="OUT")
    tokenizer = load_tokenizer_of(saved)
    with loading_quietly():
        model = load_adapter(saved, tokenizer=tokenizer).eval()
    _refuse_what_does_not_merge(saved, model)
    expected = _probe(model, tokenizer)
    with loading_quietly():  # newer releases of peft part shared weights, too, and warn of it
        merged = model.merge_and_unload(safe_merge=True)
    if _shared_apart(merged):
        merged.config.get_text_config().tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".merging-", dir=folder.parent))
    try:
        _save(merged, saved, staged, tokenizer)
        _save_card(saved, staged, name=folder.name)
        dtype = str(merged.dtype).removeprefix("torch.")
        del model, merged
        difference = _compare(saved, staged, tokenizer, expected, dtype)
        staged.chmod(0o777 & ~_umask())
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Merged(folder, dtype, difference, saved.is_quantized)


def _refuse_what_does_not_merge(saved: SavedModel, model: Any) -> None:
    config = model.active_peft_config
    if config.is_prompt_learning or not hasattr(model, "merge_and_unload"):
        raise ConfigError(
            f"{saved.folder}: {config.peft_type.value} learns inputs, not weights, so there is "
            "nothing to merge: use the adapter as it is, with peft or `hf-gradacc chat`."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{saved.section.name} is stored quantized, and merging would round the update away: "
            "write the model that it was made from as base_model_name_or_path into "
            f"{saved.folder / 'adapter_config.json'}, and as model.name into {RECIPE_NAME}."
        )


def _shared_apart(model: Any) -> bool:
    """Whether the config shares an output layer with the embeddings, and the adapter does not."""
    output = model.get_output_embeddings()
    if output is None or not model.config.get_text_config().tie_word_embeddings:
        return False
    ours, theirs = output.weight, model.get_input_embeddings().weight
    return ours is not theirs and ours.data_ptr() != theirs.data_ptr()


def _save(merged: Any, saved: SavedModel, folder: Path, tokenizer: Any) -> None:
    from hf_gradacc.recipe.model.ends import add_stop_tokens

    if saved.recipe is not None:
        add_stop_tokens(merged, saved.recipe, tokenizer=tokenizer, folder=str(folder))
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for place in (saved.folder, saved.folder.parent):
        if saved.recipe is not None and (place / RECIPE_NAME).is_file():
            shutil.copyfile(place / RECIPE_NAME, folder / RECIPE_NAME)
            break


def _save_card(saved: SavedModel, folder: Path, *, name: str) -> None:
    """Take the card of the run along, with how to load what is merged now."""
    path = saved.folder / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not is_own_card(card):
        return
    head = f"AutoModel{HEADS[saved.task]}"
    load = f'from transformers import {head}\n\nmodel = {head}.from_pretrained("{name}")'
    (folder / CARD_NAME).write_text(as_merged(card, load), encoding="utf-8")
    if (saved.folder / PLOT_NAME).is_file():
        shutil.copyfile(saved.folder / PLOT_NAME, folder / PLOT_NAME)


def _compare(saved: SavedModel, staged: Path, tokenizer: Any, expected: Any, dtype: str) -> float:
    import torch

    found = SavedModel(staged, False, saved.task, None, _whole(saved, staged), saved.trusted)
    actual = _probe(load_saved(found, tokenizer=tokenizer).to("cpu"), tokenizer)
    difference = (torch.linalg.vector_norm(actual - expected) / expected.norm()).item()
    if not difference <= _LIMITS.get(dtype, min(_LIMITS.values())):  # NaN is not, either
        raise ConfigError(
            f"the merged model does not answer as the adapter in {saved.folder} does: its logits "
            f"differ by {difference:.2g} of their size. Nothing was saved; use the adapter "
            "as it is."
        )
    return difference


def _whole(saved: SavedModel, staged: Path) -> Any:
    described: dict[str, Any] = {"name": str(staged), "revision": None, "overrides": {}}
    return saved.section.model_copy(update=described)


def _probe(model: Any, tokenizer: Any) -> Any:
    """The logits of a few tokens spread over the vocabulary, in float32."""
    import torch

    step = max(1, len(tokenizer) // (_PROBE + 1))
    ids = torch.arange(1, 1 + _PROBE)[None] * step % len(tokenizer)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        return model(**inputs).logits.float()


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask
