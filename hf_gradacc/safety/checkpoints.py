"""Checkpoint folders that are whole or absent.

A checkpoint is written to a staging folder, listed in a manifest with the size and hash of each
file, flushed to disk, and only then renamed to ``checkpoint-<step>``. If the process is killed at
any moment, or the disk runs full, earlier checkpoints stay as they were. Before a checkpoint is
loaded, its files are compared with the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import xxhash
except ImportError:  # comes with datasets, which runs on plain lists do without
    xxhash = None  # type: ignore[assignment]

__all__ = [
    "MANIFEST_NAME",
    "find_damage",
    "find_edits",
    "find_whole_checkpoint",
    "holds_optimizer",
    "list_checkpoints",
    "publish",
    "remove",
    "run_of",
    "step_of",
    "write_manifest",
]

MANIFEST_NAME = "gradacc_manifest.json"
STAGING_NAME = ".saving"
"""Folder beside the checkpoints in which the next one is written."""


_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_CHUNK_BYTES = 16 * 2**20
_HASHES: dict[str, Callable[[], Any]] = {
    **({} if xxhash is None else {"xxh3_128": xxhash.xxh3_128}),
    "sha256": hashlib.sha256,
}
"""What a manifest may hold of a file, the fastest first: that one is written."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the checkpoints of a run, the one with the highest step first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.match(p.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def step_of(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was saved; -1 if its name does not say."""
    found = _CHECKPOINT.match(checkpoint.name)
    return int(found[1]) if found else -1


def run_of(checkpoint: Path) -> str | None:
    """Return the id of the run that saved a checkpoint; None if its manifest names none."""
    try:
        run = json.loads((checkpoint / MANIFEST_NAME).read_bytes())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run if isinstance(run, str) else None


def holds_optimizer(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds the state of an optimizer, in any engine's form."""
    names = [path.name for path in checkpoint.iterdir()]
    return any(name.startswith(("optimizer", "global_step")) for name in names) or any(
        name.endswith(("-optimizer.pt", "_optim_states.pt")) for name in names
    )


def find_whole_checkpoint(
    output_dir: str | Path, *, is_own: Callable[[Path], bool] | None = None
) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint without damage.

    Args:
        output_dir: The folder that holds them.
        is_own: Whether a checkpoint may be taken; None for all.

    Returns:
        The checkpoint, or None, and one line for each newer one that is damaged or was changed.
    """
    passed_over: list[str] = []
    for path in list_checkpoints(output_dir):
        if is_own is not None and not is_own(path):
            continue
        damage, edits = find_edits(path)
        if damage is None and not edits:
            return path, passed_over
        change = (
            f"was changed since it was written ({next(iter(edits), '')}); resume from it by name"
        )
        passed_over.append(
            f"{path.name} is damaged: {damage}" if damage else f"{path.name} {change}"
        )
    return None, passed_over


# ---- writing -----------------------------------------------------------------------------------
def write_manifest(folder: Path, *, run: str | None = None) -> None:
    """Write the manifest: all files with size and hash. Wait until they are on the disk.

    Args:
        folder: The checkpoint.
        run: Id of the run that it belongs to.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            (kind := next(iter(_HASHES))): _hash(path, kind),
        }
    with (folder / MANIFEST_NAME).open("w") as file:
        json.dump({"version": 1, "run": run, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(staged: Path, final: Path) -> None:
    """Rename a finished checkpoint to its final name, in one atomic step."""
    if final.exists():  # a damaged checkpoint of this step, or the step is saved twice
        remove(final, aside=staged.parent)
    for folder in (p for p in (staged, *staged.rglob("*")) if p.is_dir()):
        _flush(folder)
    staged.rename(final)
    _flush(final.parent)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()


def remove(folder: Path, *, aside: Path) -> None:
    """Delete a checkpoint; never leave a part of it under its name."""
    aside.mkdir(exist_ok=True)
    grave = aside / f"old-{folder.name}"
    shutil.rmtree(grave, ignore_errors=True)
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


# ---- checking ----------------------------------------------------------------------------------
def find_damage(folder: str | Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is as it was written.

    With a manifest, every file must have the size and hash written there. The stock Trainer writes
    none; then files are checked that can be: JSON must parse, safetensors files must have the
    length that their header states, and torch files must end as an archive does.
    """
    damage, edits = find_edits(folder)
    return damage or next(iter(edits), None)


def find_edits(folder: str | Path) -> tuple[str | None, list[str]]:
    """Tell damage from what somebody changed on purpose after a checkpoint was written.

    A file that was written anew since the manifest is taken as it is, if it is whole. State that
    was taken away starts anew, and weights may be in other files than before.

    Returns:
        What is damaged, or None; and one line for each change, with what follows from it.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return _find_damage_without_manifest(folder), []
    try:
        files = {
            str(name): (int(facts.pop("bytes")), *facts.popitem())
            for name, facts in json.loads(manifest.read_bytes())["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST_NAME} cannot be read ({type(error).__name__})", []
    if not files:
        return f"{MANIFEST_NAME} lists no file", []
    edits = []
    for name, (written, kind, digest) in files.items():
        path = folder / name
        if not path.is_file():
            effect = _effect_of_removing(folder, name)
            if effect is None:
                return f"{name} is missing", []
            edits.append(f"{name} is missing: {effect}")
        elif problem := _find_difference(path, name, written=written, kind=kind, digest=digest):
            if path.stat().st_mtime_ns <= manifest.stat().st_mtime_ns:
                return problem, []
            if torn := _find_torn(path, name):
                return torn, []
            edits.append(f"{problem}: it was changed since and is taken as it is")
    return _find_missing_shard(folder), edits


def _find_difference(path: Path, name: str, *, written: int, kind: str, digest: str) -> str | None:
    """Compare a file with what the manifest says of it: its size alone if the hash is not here."""
    size = path.stat().st_size
    if size != written:
        return f"{name} has {size:,} bytes where {written:,} were written"
    try:
        found = _hash(path, kind) if kind in _HASHES else digest
    except OSError as error:
        return f"{name} cannot be read ({type(error).__name__})"
    return f"{name} holds other bytes than were written" if found != digest else None


_STARTS_ANEW = {
    "optimizer.pt": "the optimizer and the learning rate schedule start anew",
    "optimizer.bin": "the optimizer and the learning rate schedule start anew",
    "scheduler.pt": "the optimizer and the learning rate schedule start anew",
    "master_weights.safetensors": "float32 master weights begin at the rounded weights",
    "scaler.pt": "the loss scale starts anew",
}
_NOT_READ = ("config.json", "generation_config.json", "training_args.bin")


def _effect_of_removing(folder: Path, name: str) -> str | None:
    """Return what follows from a file that was taken away; None if nothing can resume without."""
    if name in _STARTS_ANEW:
        return _STARTS_ANEW[name]
    if re.fullmatch(r"rng_state(_\d+)?\.pth", name):
        return "random numbers, as dropout draws them, start from the seed"
    if re.fullmatch(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name):
        others = sorted({*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")})
        return f"the weights of {others[0].name} are taken" if others else None
    if name in _NOT_READ or "token" in name or name.endswith((".md", ".txt", ".jinja")):
        return "a resumed run does not read it"
    return None


def _find_missing_shard(folder: Path) -> str | None:
    """Return a file that an index of weights names and that is not there."""
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            for name in json.loads(index.read_bytes())["weight_map"].values():
                if not (folder / name).is_file():
                    return f"{name}, which {index.name} names, is missing"
    return None


def _find_damage_without_manifest(folder: Path) -> str | None:
    if not (folder / "trainer_state.json").is_file():
        return "trainer_state.json is missing"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if torn := _find_torn(path, path.relative_to(folder).as_posix()):
            return torn
    return None


def _find_torn(path: Path, name: str) -> str | None:
    """Look whether a file ends where it should."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return f"{name} is no valid JSON"
    elif path.suffix == ".safetensors":
        if not _is_whole_safetensors(path):
            return f"{name} is shorter or longer than its header says"
    elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        return f"{name} has no end of archive: it was cut off"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Compare a file's size with the offsets in its header."""
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
        except ValueError:
            return False
    ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
    return bool(header) and path.stat().st_size == 8 + length + max(ends, default=0)


def _hash(path: Path, kind: str) -> str:
    digest = _HASHES[kind]()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    """Flush a folder's entries to disk; some file systems neither can nor need to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
