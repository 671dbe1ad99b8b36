"""How a W&B run begins: online or offline, without a prompt; new or continued."""

from __future__ import annotations

import netrc
import os
import secrets
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hf_gradacc.safety.run_state import keep, kept
from hf_gradacc.tracking.run_files import LOG_NAME

__all__ = [
    "ensure_wandb_mode",
    "has_wandb_credentials",
    "is_in_sweep",
    "start_rank_run",
    "start_run",
    "sync_folder",
    "why_silent",
]

_DECIDED: set[str] = set()
"""Holds "offline" once this module, not the user, took W&B offline: only then is a word due."""


INIT_TIMEOUT_SECONDS = 30.0
CONNECT_TIMEOUT_SECONDS = 10.0
FINISH_TIMEOUT_SECONDS = 60.0


def has_wandb_credentials(settings: Any) -> bool:
    """Look for a key where wandb itself would: environment, settings, netrc. Asks nobody.

    Args:
        settings: `wandb.setup().settings`.
    """
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if getattr(settings, "api_key", None) or getattr(settings, "identity_token_file", None):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    path = path if path.exists() else Path("~/_netrc").expanduser()
    hosts = {urlsplit(str(getattr(settings, "base_url", ""))).netloc, "api.wandb.ai"}
    try:
        known = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return False
    # `default` entries of a netrc are not for W&B, so `authenticators` would say too much.
    return any((known.hosts.get(host) or ("", "", ""))[2] for host in hosts)


def ensure_wandb_mode(args: Any = None) -> str | None:
    """Make `wandb.init` run offline if it would otherwise ask for a key. Call it before.

    Args:
        args: A `TrainingArguments`; nothing is done where its `report_to` leaves wandb out.

    Returns:
        The mode wandb is in now ("online", "offline", "disabled", ...), or None if it is not
        used or not installed.
    """
    if args is not None and "wandb" not in (args.report_to or []):
        return None
    try:
        import wandb
    except ImportError:
        return None
    settings = wandb.setup().settings
    chosen = os.environ.get("WANDB_MODE") or (settings.mode if settings.mode != "online" else None)
    if chosen is None and wandb.run is None and not has_wandb_credentials(settings):
        # Not through the environment: wandb warns about variables that change after its set-up.
        # Silent, because its nine lines say what our one line says.
        wandb.setup(settings=wandb.Settings(mode="offline", silent=True))
        _DECIDED.add("offline")
        return "offline"
    return chosen or "online"


def start_run(args: Any, state: Any) -> None:
    """Begin a W&B run, or continue the one that the checkpoint names.

    Args:
        args: The `TrainingArguments`.
        state: The `TrainerState`, of a fresh run or just loaded from a checkpoint.
    """
    import wandb

    mode = ensure_wandb_mode(args)
    options: dict[str, Any] = {}
    if not is_in_sweep():  # its agent says where a run belongs, and wandb warns of other words
        options["project"] = os.getenv("WANDB_PROJECT", "huggingface")
    if state.trial_name is not None:
        options |= {"name": state.trial_name, "group": args.run_name or args.output_dir}
    elif args.run_name is not None:
        options["name"] = args.run_name
    saved = kept(state)
    resumes = "wandb_run_id" in saved and state.trial_name is None and not os.getenv("WANDB_RUN_ID")
    if resumes:
        options |= {"id": saved["wandb_run_id"], "resume": "allow"}
    if getattr(args, "wandb_per_rank", False) and "group" not in options:
        # The id makes the group this run's own, whatever else bears its name.
        run_id = options.get("id") or os.getenv("WANDB_RUN_ID") or secrets.token_hex(4)
        name = args.run_name or Path(args.output_dir).name
        if not is_in_sweep():
            options["id"] = run_id
        options["group"] = os.getenv("WANDB_RUN_GROUP") or f"{name}-{run_id}"
    timeouts = _timeouts()
    try:
        if mode == "online":
            _try_to_connect(wandb.setup().settings.base_url)
        run = wandb.init(settings=wandb.Settings(**timeouts), **options)
        why = "no API key was found"
    except Exception as error:  # a wrong key, no network, a project one may not write to
        run = wandb.init(mode="offline", settings=wandb.Settings(silent=True), **options)
        why = f"it could not be reached ({type(error).__name__})"
        mode = "offline"
        _DECIDED.add("offline")
    if mode != "offline":
        keep(state, wandb_sync=[])
        return
    folders = [*saved.get("wandb_sync", []), sync_folder(run)] if resumes else [sync_folder(run)]
    keep(state, wandb_sync=folders)
    if _DECIDED:
        print(f"W&B: recording offline, since {why}; to upload: wandb sync {' '.join(folders)}")
    if resumes:
        # Online, the server says where the steps of a run go on; offline, nobody does, and those
        # of both parts would lie upon each other. The log has a line for each that came after the
        # checkpoint, and more: a gap does no harm.
        run.log(
            {"train/global_step": state.global_step},
            step=saved.get("wandb_step", 0) + _count_log_lines(args) + 1,
        )


def start_rank_run(args: Any, *, run_id: str, name: str, group: str, config: dict[str, Any]) -> Any:
    """Begin or continue the run of a rank other than the first.

    Args:
        args: The `TrainingArguments`.
        run_id: Of rank 0's run; it gives this one its id, so a resume finds it again.
        name: Of the whole run.
        group: That all its ranks share.
        config: What to file with this rank's run.
    """
    import wandb

    mode = ensure_wandb_mode(args)
    if is_in_sweep():  # where every process of this run would get the id of the first
        wandb.setup().settings.sweep_id = None
    run = wandb.init(
        project=os.getenv("WANDB_PROJECT", "huggingface"),
        id=f"{run_id}-rank{args.process_index}",
        name=f"{name}-rank{args.process_index}",
        group=group,
        job_type="rank",
        resume="allow",
        config=config,
        settings=wandb.Settings(**_timeouts()),
    )
    if mode == "offline" and _DECIDED:
        print(f"W&B: rank {args.process_index} likewise; to upload: wandb sync {sync_folder(run)}")
    return run


def is_in_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _timeouts() -> dict[str, Any]:
    import wandb

    return {
        name: seconds
        for name, seconds in (
            ("init_timeout", INIT_TIMEOUT_SECONDS),
            ("finish_timeout", FINISH_TIMEOUT_SECONDS),
        )
        if f"WANDB_{name.upper()}" not in os.environ and name in wandb.Settings.model_fields
    }


def _try_to_connect(url: str) -> None:
    """Raise OSError if no server answers there: wandb before 0.31 would wait for it forever."""
    if urllib.request.getproxies():  # the way out leads through somebody else
        return
    place = urlsplit(str(url))
    port = place.port or (443 if place.scheme == "https" else 80)
    socket.create_connection((place.hostname or "", port), timeout=CONNECT_TIMEOUT_SECONDS).close()


def why_silent(run: Any) -> str | None:
    """Return why the server of an online run does not answer now, None if it does.

    wandb accepts everything, writes it to its file, and does not report what it could not upload.
    """
    if run.settings.mode != "online":
        return None
    try:
        with urllib.request.urlopen(run.settings.base_url, timeout=CONNECT_TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code >= 500 else None
    except OSError as error:
        return type(error).__name__


def sync_folder(run: Any) -> str:
    """Return the folder that `wandb sync` takes, relative to here if it lies below."""
    folder = Path(str(run.settings.sync_dir))
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def _count_log_lines(args: Any) -> int:
    log_path = Path(args.output_dir) / LOG_NAME
    return len(log_path.read_bytes().splitlines()) if log_path.exists() else 0
