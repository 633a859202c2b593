"""Imports point downwards: a room imports itself and rooms of lower levels, also inside functions and for types."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# From top to bottom. Rooms of one level do not import one another.
LEVELS = (
    ("benchmarks",),  # they measure the programs
    ("scripts", "trellis.viewer", "train"),
    ("dataset_toolkits", "trellis.tokenizer", "trellis.trainers"),
    ("trellis.runs", "trellis.tokens"),
    ("trellis.models", "trellis.datasets"),
    ("trellis.modules", "trellis.grids", "trellis.evaluation"),
    ("trellis.utils",),
)
HEIGHT = {room: -level for level, rooms in enumerate(LEVELS) for room in rooms}
TOPS = {room.partition(".")[0] for room in HEIGHT}
# `import trellis` loads nothing until a name is asked for; the file that says how is no room.
DOOR = "trellis"
# What the door hands out by name; anything else in `from trellis import name` is a room, or the version.
HANDED_OUT = {"trellis.SparseStructureTokenizer": "trellis.tokenizer"}


def sources(root: Path) -> list[Path]:
    folders = ("trellis", "dataset_toolkits", "scripts", "benchmarks")
    return [root / "train.py", *sorted(path for folder in folders for path in (root / folder).rglob("*.py"))]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module of the project. Raises KeyError for one without a level."""
    parts = HANDED_OUT.get(module, module).split(".")
    room = ".".join(parts[:2]) if parts[0] == "trellis" else parts[0]
    if room in ("trellis", "trellis.__version__"):
        return DOOR
    HEIGHT[room]
    return room


def imported(tree: ast.AST, module: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import in a file: statements anywhere in it, import_module and Registry."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}" if base == DOOR else base) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "Registry"):
            names = [name.value for name in ast.walk(node) if isinstance(name, ast.Constant)]
            for name in names:
                if isinstance(name, str) and (name.startswith(".") or name.partition(".")[0] in TOPS):
                    yield node.lineno, importlib.util.resolve_name(name, package)


def wrong_arrows(root: Path) -> list[str]:
    """Each import that does not point downwards, as "file:line imports module"."""
    found = []
    for path in sources(root):
        module = module_name(path, root)
        if module == DOOR:
            continue
        room = room_of(module)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        neighbors = {other.stem for other in path.parent.glob("*.py")} if room in ("scripts", "benchmarks") else set()
        for line, target in imported(ast.parse(path.read_text(encoding="utf-8")), module, package):
            top = target.partition(".")[0]
            if top in neighbors or top not in TOPS:
                continue
            other = room_of(target)
            if other == DOOR:
                # The whole package, from inside it, is an arrow to every room.
                wrong = target == DOOR and module.startswith("trellis.")
            else:
                wrong = other != room and HEIGHT[other] >= HEIGHT[room]
            if wrong:
                found.append(f"{path.relative_to(root)}:{line} imports {target}")
    return sorted(set(found))


def test_imports_point_downwards():
    assert not wrong_arrows(ROOT)


@pytest.mark.parametrize(
    "file, code, wrong",
    [
        ("trellis/models/a.py", "from ..modules import conv", False),
        ("trellis/models/a.py", "from . import b", False),
        ("trellis/models/a.py", "from ..datasets import base", True),
        ("trellis/models/a.py", "def f():\n    from ..trainers.ema import EMA", True),
        ("trellis/models/a.py", "if TYPE_CHECKING:\n    from trellis.runs import folder", True),
        ("trellis/models/a.py", "import trellis.tokens.text as text", True),
        ("trellis/models/a.py", "from .. import tokens", True),
        ("trellis/models/a.py", "from .. import utils, __version__", False),
        ("trellis/models/a.py", "import trellis", True),
        ("trellis/models/a.py", "importlib.import_module('trellis.tokenizer')", True),
        ("trellis/models/__init__.py", "import_module('..trainers', __name__)", True),
        ("trellis/models/__init__.py", "Registry(__name__, {'A': '.a', 'B': '..modules.b'})", False),
        ("trellis/models/__init__.py", "Registry(__name__, {'A': '.a', 'B': '..runs.b'})", True),
        ("trellis/models/__init__.py", "from ..trainers import basic", True),
        ("trellis/tokens/a.py", "from trellis import SparseStructureTokenizer", True),
        ("trellis/trainers/vae/a.py", "from ...runs.folder import x", False),
        ("trellis/trainers/vae/a.py", "from ...tokenizer import x", True),
        ("trellis/viewer/a.py", "import scripts.evaluate", True),
        ("dataset_toolkits/a.py", "from trellis.grids import meshes", False),
        ("dataset_toolkits/a.py", "from trellis.trainers import basic", True),
        ("benchmarks/a.py", "import runs, torch\nfrom benchmarks.common import x", False),
        ("benchmarks/a.py", "import train", False),
        ("train.py", "from benchmarks import runs", True),
        ("train.py", "import trellis\nfrom trellis import trainers", False),
    ],
)
def test_a_wrong_arrow_is_found(file, code, wrong, tmp_path):
    for name in ("train.py", "benchmarks/runs.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code if name == file else "")
    assert bool(wrong_arrows(tmp_path)) == wrong
