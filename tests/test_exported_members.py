"""The door of the package: what is exported can be imported, once, and is documented."""

import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys

import hf_gradacc


def test_all_is_sorted_and_everything_in_it_exists():
    assert hf_gradacc.__all__ == sorted(hf_gradacc.__all__)
    assert len(set(hf_gradacc.__all__)) == len(hf_gradacc.__all__)
    for name in hf_gradacc.__all__:
        assert inspect.getdoc(getattr(hf_gradacc, name)), name


def test_nothing_public_is_imported_at_the_door_without_being_exported():
    for name in hf_gradacc.__all__:
        getattr(hf_gradacc, name)
    assert set(hf_gradacc.__all__) <= set(dir(hf_gradacc))
    public = {
        name
        for name, value in vars(hf_gradacc).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(hf_gradacc.__all__)


def test_every_module_says_what_it_exports_and_stays_a_room_one_can_see_across():
    for module in pkgutil.walk_packages(hf_gradacc.__path__, "hf_gradacc."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        assert loaded.__doc__, module.name
        assert len(inspect.getsource(loaded).splitlines()) <= 300, module.name


def test_every_package_of_the_checkout_is_in_the_wheel():
    import tomllib
    from pathlib import Path

    root = Path(hf_gradacc.__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for init in (root / "hf_gradacc").rglob("__init__.py")
    }
    assert found | {"hf_gradacc._recipes"} == set(listed)


def test_neither_the_door_nor_help_loads_what_takes_seconds():
    check = (
        "import sys, hf_gradacc; from hf_gradacc import cli; sys.argv = ['x', '--help']\n"
        "assert 'GradAccTrainer' in dir(hf_gradacc) and 'errors' not in hf_gradacc.__all__\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_an_exported_name_is_the_one_of_its_module_and_can_be_pickled():
    from hf_gradacc.trainer import GradAccTrainer

    assert hf_gradacc.GradAccTrainer is GradAccTrainer
    assert pickle.loads(pickle.dumps(hf_gradacc.GradAccTrainer)) is GradAccTrainer
    assert not hasattr(hf_gradacc, "GradAccTrainr")
