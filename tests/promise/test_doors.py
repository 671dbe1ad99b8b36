"""The doors of the package: what is exported can be imported, once, and is documented."""

import ast
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gradacc

DOORS = {
    "hf_gradacc": 23,
    "hf_gradacc.data": 13,
    "hf_gradacc.recipe": 15,
    "hf_gradacc.tracking": 5,
    "hf_gradacc.verify": 2,
}
MODULES = [module.name for module in pkgutil.walk_packages(hf_gradacc.__path__, "hf_gradacc.")]


@pytest.mark.parametrize("door", DOORS)
def test_all_is_sorted_and_everything_in_it_exists_and_is_documented(door):
    opened = importlib.import_module(door)
    assert opened.__all__ == sorted(opened.__all__)
    assert len(set(opened.__all__)) == len(opened.__all__) == DOORS[door]
    for name in opened.__all__:
        assert inspect.getdoc(getattr(opened, name)), name


@pytest.mark.parametrize("door", DOORS)
def test_a_door_gives_what_it_exports_and_nothing_else(door):
    opened = importlib.import_module(door)
    for name in opened.__all__:
        getattr(opened, name)
    assert set(opened.__all__) <= set(dir(opened))
    helpers = {"load_when_asked"}
    public = {
        name
        for name, value in vars(opened).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name not in helpers
    }
    assert public == set(opened.__all__)
    assert not hasattr(opened, opened.__all__[0][:-1])


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_what_it_exports(name):
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    assert module.__doc__, name
    if hasattr(module, "__path__"):
        return  # a folder's `__init__`: a door, or a docstring alone
    exported = module.__all__
    defined = {
        node.name
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    assert defined <= set(exported), f"{name} defines {defined - set(exported)} unexported"
    for symbol in exported:
        value = getattr(module, symbol)
        assert symbol not in defined or value.__module__ == name


def test_every_package_of_the_checkout_is_in_the_wheel():
    import tomllib

    root = Path(hf_gradacc.__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for init in (root / "hf_gradacc").rglob("__init__.py")
    }
    assert found | {"hf_gradacc._recipes"} == set(listed)


def test_every_file_beside_the_code_is_in_the_wheel():
    import tomllib

    root = Path(hf_gradacc.__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in root.joinpath(*package.split(".")).glob(pattern)
    }
    files = {path for path in (root / "hf_gradacc").rglob("*") if path.is_file()}
    beside = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert {"page.html", "page.css", "page.js", "py.typed"} <= {path.name for path in beside}
    assert beside <= listed


def test_neither_a_door_nor_help_loads_what_takes_seconds():
    check = (
        "import sys, hf_gradacc, hf_gradacc.recipe, hf_gradacc.data\n"
        "import hf_gradacc.verify, hf_gradacc.tracking\n"
        "from hf_gradacc import cli; sys.argv = ['x', '--help']\n"
        "assert 'GradAccTrainer' in dir(hf_gradacc) and 'errors' not in hf_gradacc.__all__\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'matplotlib'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_an_exported_name_is_the_one_of_its_module_and_can_be_pickled():
    from hf_gradacc.trainer.mixin import GradAccTrainer

    assert hf_gradacc.GradAccTrainer is GradAccTrainer
    assert pickle.loads(pickle.dumps(hf_gradacc.GradAccTrainer)) is GradAccTrainer
    assert not hasattr(hf_gradacc, "GradAccTrainr")
