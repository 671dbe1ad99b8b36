"""Installing this package changes nothing of what is installed, with any releases it supports.

pip itself decides, in an environment that holds the metadata of a set and nothing else. It sees no
index, so whatever it would replace is an error.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
OURS = [Requirement(text) for text in PROJECT["dependencies"]]
NEWEST = "constraints.txt"
HEAD = "Metadata-Version: 2.1\n"


def pins(*files):
    """The releases in constraint files; the last one wins."""
    text = "\n".join((ROOT / file).read_text().lower() for file in files)
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


IN_USE = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "accelerate": "1.15.0"}
SETS = {
    file.stem: pins(NEWEST, f"constraints/{file.name}")
    for file in sorted((ROOT / "constraints").glob("*.txt"))
} | {
    "a CUDA build": pins(NEWEST) | IN_USE,
    "an oldest torch": pins(NEWEST, "constraints/oldest.txt") | {"torch": "2.10.0+cu126"},
    "half new, half old": pins(NEWEST)
    | {"accelerate": "1.10.0", "peft": "0.18.0", "datasets": "4.7.0", "wandb": "0.25.0"},
    "the newest torch": pins(NEWEST) | {"torch": "2.15.0", "transformers": "5.24.0"},
}


def install_into(folder, versions):
    """Run pip's resolver in an environment that holds these releases.

    Returns:
        What it would install, or None and why it cannot.
    """
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    for name, version in versions.items():
        holder = site / f"{name}-{version}.dist-info"
        holder.mkdir()
        (holder / "METADATA").write_text(f"{HEAD}Name: {name}\nVersion: {version}\n")
    about = f"{HEAD}Name: {NAME}\nVersion: 1\nRequires-Python: {PROJECT['requires-python']}\n"
    about += "".join(f"Requires-Dist: {one}\n" for one in OURS)
    wheel = folder / f"{NAME}-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{NAME}-1.dist-info/METADATA", about)
        file.writestr(f"{NAME}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr(f"{NAME}-1.dist-info/RECORD", "")
    python, report = folder / "env" / "bin" / "python", folder / "report.json"
    command = [sys.executable, "-m", "pip", "--isolated", "--python", str(python), "install"]
    options = ["--dry-run", "--no-index", "--no-cache-dir", "--report", str(report)]
    ran = subprocess.run(
        [*command, *options, str(wheel)],
        env=os.environ | {"PIP_CONFIG_FILE": os.devnull},  # it may name more places to look in
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        return None, ran.stderr
    return [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]], ""


@pytest.mark.parametrize("name", SETS)
def test_installing_changes_nothing_that_is_installed(tmp_path, name):
    versions = {one.name: SETS[name][one.name] for one in OURS}
    installed, why = install_into(tmp_path, versions)
    assert installed == [NAME], why


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "peft"])
def test_a_release_that_is_too_old_would_be_seen(tmp_path, name):
    versions = {one.name: SETS["oldest"][one.name] for one in OURS} | {name: "0.9"}
    installed, why = install_into(tmp_path, versions)
    assert installed is None
    assert f"No matching distribution found for {name}" in why
