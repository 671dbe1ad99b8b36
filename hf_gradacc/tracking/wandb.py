"""Weights & Biases: never a prompt, never a failed run, one run over all resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.integrations import WandbCallback
from transformers.utils import logging

from hf_gradacc.safety.run_state import keep, kept
from hf_gradacc.safety.withheld import shown_without_secrets
from hf_gradacc.text import printable
from hf_gradacc.tracking.preview import PREVIEW_COLUMNS, preview_rows, sampled_lengths
from hf_gradacc.tracking.run_facts import describe_run
from hf_gradacc.tracking.wandb_start import start_run, sync_folder, why_silent

__all__ = ["GradAccWandbCallback"]

logger = logging.get_logger(__name__)


def _never_fail(method: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an exception of W&B into one line; training and the run's own file go on."""

    @functools.wraps(method)
    def guarded(self: GradAccWandbCallback, *args: Any, **kwargs: Any) -> Any:
        if self.gave_up:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # whatever a tracker throws, the run is worth more
            if "DataLoader worker" in str(error):
                raise  # torch's SIGCHLD handler: a worker died while we happened to be here
            self.give_up(f"{type(error).__name__} in {method.__name__}: {error}")
            return None

    return guarded


class GradAccWandbCallback(WandbCallback):
    """The stock callback with an offline default, resumes that continue a run, and the plan.

    It takes the stock callback's place, so `isinstance(callback, WandbCallback)` and
    `trainer.remove_callback(WandbCallback)` mean what they meant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gave_up = False
        self._last_tokens_seen: float | None = None

    def give_up(self, why: str) -> None:
        """Send nothing more to W&B, and say so once."""
        if not self.gave_up:  # a method called by the one that fails has said it already
            logger.warning(
                f"W&B: {printable(why.splitlines()[0])}. Training goes on without it; every "
                "number is in the run's gradacc_log.jsonl."
            )
        self.gave_up = True

    @_never_fail
    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Begin the W&B run, or continue the one that the checkpoint names."""
        if not state.is_world_process_zero:
            self._initialized = True
            return
        if self._wandb.run is None:
            start_run(args, state)
        with shown_without_secrets(args):
            super().setup(args, state, model, **kwargs)
        run = self._wandb.run
        keep(state, wandb_run_id=run.id, wandb_step=run.step)
        facts = describe_run(
            args, state=state, model=model, train_dataloader=kwargs.get("train_dataloader")
        )
        saved = kept(state)
        facts |= {"run": (saved.get("run") or {}).get("id"), "digest": saved.get("digest")}
        run.config.update({"hf_gradacc": facts}, allow_val_change=True)
        # Every row carries both, so each plot can be drawn over updates or over target tokens.
        run.define_metric("train/target_tokens_seen")
        if state.global_step == 0:
            try:
                self._log_preview(run, args, getattr(model, "config", None), **kwargs)
            except Exception as error:  # a dataset's own; not worth the run's numbers
                why = printable(f"{type(error).__name__}: {error}")
                logger.warning(f"W&B: no preview of the rows ({why}).")

    def _log_preview(self, run: Any, args: Any, config: Any, **kwargs: Any) -> None:
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        table = args.wandb_upload_text and preview_rows(
            dataset,
            tokenizer=kwargs.get("processing_class"),
            is_seq2seq=bool(getattr(config, "is_encoder_decoder", False)),
            label_names=getattr(config, "id2label", None),
        )
        lengths = sampled_lengths(dataset)
        preview: dict[str, Any] = {}
        if table:
            preview["data/rows"] = self._wandb.Table(columns=PREVIEW_COLUMNS, data=table)
            print(
                f"W&B: {len(table)} rows of the training data go along as text (data/rows); "
                "wandb_upload_text = False, in a recipe wandb.upload_text, keeps them here."
            )
        if lengths:
            preview["data/input_tokens"] = self._wandb.Histogram(lengths)
        if preview:
            run.log({**preview, "train/global_step": 0})

    @_never_fail
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin or continue the run."""
        super().on_train_begin(args, state, control, model, **kwargs)
        # An evaluation before training has begun the run already, under a state now replaced.
        if state.is_world_process_zero and self._wandb.run is not None:
            keep(state, wandb_run_id=self._wandb.run.id)

    @_never_fail
    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send a row, evaluation rows with the target tokens seen so far."""
        row = dict(logs or {})
        self._last_tokens_seen = row.get("target_tokens_seen", self._last_tokens_seen)
        if self._last_tokens_seen is not None and "train_runtime" not in row:
            row.setdefault("target_tokens_seen", self._last_tokens_seen)
        super().on_log(args, state, control, model=model, logs=row, **kwargs)
        if state.is_world_process_zero:
            keep(state, wandb_step=self._wandb.run.step)

    @_never_fail
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upload the model, where WANDB_LOG_MODEL asks for it; say if the server is gone."""
        super().on_train_end(args, state, control, **kwargs)
        run = self._wandb.run
        why = why_silent(run) if state.is_world_process_zero and run is not None else None
        if why is not None:
            folder = sync_folder(run)
            keep(state, wandb_sync=[folder])
            print(f"W&B: the server does not answer ({why}). {folder} holds what was not uploaded.")

    @_never_fail
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upload the checkpoint, where WANDB_LOG_MODEL asks for it."""
        super().on_save(args, state, control, **kwargs)

    @_never_fail
    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Send the metrics of a prediction."""
        super().on_predict(args, state, control, metrics, **kwargs)

    @_never_fail
    def alert(self, *, title: str, text: str, level: str, count_key: str, count: int) -> None:
        """Send an alert, at most one a minute under one title, and keep a count in the summary."""
        run = self._wandb.run
        if run is not None:
            run.alert(title=title, text=text, level=level, wait_duration=60)
            run.summary[count_key] = count

    @_never_fail
    def log_table(self, key: str, *, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Send a table, drawn over updates like every other row."""
        run = self._wandb.run
        if run is not None:
            table = self._wandb.Table(columns=columns, data=rows)
            run.log({key: table, "train/global_step": step})

    @_never_fail
    def log_files(self, paths: list[Path]) -> None:
        """Upload a report and its picture as one artifact of type "report"."""
        run = self._wandb.run
        if run is not None:
            artifact = self._wandb.Artifact(name=f"report-{run.id}", type="report")
            for path in paths:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
