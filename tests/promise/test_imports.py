"""The rule of imports: a folder imports from lower lines only; two folders of one line not at all.

Read from the source as text, imports inside functions and under TYPE_CHECKING too.
"""

import ast
import graphlib
from pathlib import Path

import pytest

import hf_gradacc

PACKAGE = Path(hf_gradacc.__file__).parent
ROOMS = {
    "errors": {"text"},
    "text": set(),
    "_exports": set(),
    "compat": {"errors"},
    "arguments": {"errors"},
    "updates": {"errors", "text", "compat", "arguments"},
}
ROOMS["loss"] = ROOMS["ranks"] = ROOMS["data"] = ROOMS["updates"] | {"updates"}
ROOMS["safety"] = ROOMS["loss"] | {"loss", "ranks"}
ROOMS["tracking"] = ROOMS["loss"] | {"ranks", "safety"}
ROOMS["trainer"] = ROOMS["safety"] | {"safety", "tracking"}
ROOMS["verify"] = ROOMS["trainer"] | {"trainer"}
ROOMS["recipe"] = ROOMS["verify"] | {"verify", "data"}
ROOMS["after"] = ROOMS["elsewhere"] = ROOMS["recipe"] | {"recipe"}
ROOMS["cli"] = ROOMS["after"] | {"after", "elsewhere", "__version__"}
ROOMS["__main__"] = {"cli"}
DOORS = ("data", "recipe", "tracking", "verify")
for _door in DOORS:
    ROOMS[_door] = ROOMS[_door] | {"_exports"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path, package):
    """Yield (line, module) of every import of `package` in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            if node.module == package:
                yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    yield node.lineno, alias.name


def test_the_rule_knows_every_room():
    rooms = {room_of(path) for path in files()} - {"__init__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_lower_lines_only(room):
    wrong = []
    for path in files():
        if room_of(path) != room:
            continue
        for line, module in imports_of(path, "hf_gradacc"):
            target = module.split(".")[1] if "." in module else "__init__"
            if target != room and target not in ROOMS[room]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


INNER = sorted({path.parent for path in files() if path.parent.parent.parent == PACKAGE.parent})


def inner_imports(folder):
    """Which rooms of a folder import which others of it, by their names."""
    rooms = {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
    for path in folder.glob("*/*.py"):
        for _, module in imports_of(path, "hf_gradacc"):
            parts = module.split(".")[1:]
            if (
                parts[0] == folder.name
                and len(parts) > 1
                and parts[1] in rooms - {path.parent.name}
            ):
                yield path.parent.name, parts[1]


@pytest.mark.parametrize(
    "folder", [path for path in INNER if path != PACKAGE], ids=lambda p: p.name
)
def test_rooms_of_a_folder_do_not_import_each_other_in_a_circle(folder):
    below = {}
    for room, other in inner_imports(folder):
        below.setdefault(room, set()).add(other)
    order = graphlib.TopologicalSorter(below)
    order.prepare()  # raises CycleError, which names the circle


def test_a_wrong_import_would_be_seen(tmp_path):
    file = tmp_path / "loss.py"
    file.write_text("def f():\n    from hf_gradacc.trainer.mixin import GradAccMixin\n")
    assert list(imports_of(file, "hf_gradacc")) == [(2, "hf_gradacc.trainer.mixin")]


def test_only_ranks_calls_torch_distributed():
    wrong = []
    for path in files():
        if room_of(path) == "ranks":
            continue
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            # A class that sharded weights are made of is no call.
            names = [name for name in names if not name.startswith("torch.distributed.tensor")]
            if any(name.startswith("torch.distributed") for name in names):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_only_the_trainer_touches_what_is_private_to_the_stock_trainer():
    from transformers import Trainer

    private = {name for name in vars(Trainer) if name.startswith("_") and name[1] != "_"}
    wrong = []
    for path in files():
        if room_of(path) == "trainer":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private:
                owner = ast.unparse(node.value)
                if owner.endswith("trainer"):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_only_recipe_and_data_know_yaml():
    for path in files():
        if room_of(path) not in ("recipe", "data"):
            assert not list(imports_of(path, "yaml")), path
