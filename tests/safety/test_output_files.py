"""What a command is asked to write is looked at before it works for it, and is not touched."""

import os
from pathlib import Path

import pytest

from hf_gradacc.errors import ConfigError
from hf_gradacc.safety.output_files import check_drawing, check_output, picture_type


def files_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "page.html").write_text("before")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("name", ["new.html", "page.html", "not/yet/there.html", "a folder/x"])
def test_what_can_be_written_passes_and_nothing_is_made(folder, name):
    before = files_of(folder)
    check_output(folder / name, option="--html")
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a folder", "is a folder"),
        ("page.html/x.html", "page.html is not a folder"),
        ("page.html/x/y.html", "page.html is not a folder"),
        ("x" * 300, "name too long"),
        ("a\0b", "null"),
        ("loop", "symbolic links"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_option(folder, name, why):
    with pytest.raises(ConfigError, match=f"(?i)^--html = .*{why}") as caught:
        check_output(folder / name, option="--html")
    assert "name another" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_cannot_be_written(folder):
    (folder / "a folder").chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_output(folder / "a folder" / "new.html", option="--html")


@pytest.mark.parametrize("name", ["x.png", "x.SVG", "x.pdf", "x"])
def test_pictures_of_known_types_pass(folder, name):
    check_drawing(folder / name, option="--png")


@pytest.mark.parametrize("name", ["x.xyz", "x.html", "x.png.gz"])
def test_a_picture_of_no_type_is_named_with_types_to_use(folder, name):
    with pytest.raises(ConfigError, match=r"^--png = .*cannot be drawn.*use \.png, \.svg, \.pdf"):
        check_drawing(folder / name, option="--png")


def test_a_listed_type_that_cannot_be_drawn_here_is_told(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")  # pgf is listed by matplotlib, and needs a LaTeX
    with pytest.raises(ConfigError, match=r"x\.pgf': \.pgf cannot be drawn \(.+\): use"):
        check_drawing(folder / "x.pgf", option="--png")


def test_the_ending_decides_the_type():
    assert [picture_type(Path(name)) for name in ("a.b.PDF", "a", "a.")] == ["pdf", "png", "png"]
