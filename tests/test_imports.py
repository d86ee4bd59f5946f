"""The house rules that can be read from the source: who may import whom, what is heavy, how long files may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "roma_ray"

# Each line names the rooms below; a room may import any of them.
GROUND = {"errors", "versions", "assets", "borders", "config", "store"}
METHOD = GROUND | {"questions", "moe", "manifold", "engine"}
JUDGED = METHOD | {"evaluation", "benchmarks", "stages"}
SHOWN = JUDGED | {"figures", "tracking"}

# Room -> the rooms that it may import besides itself. A new room needs a line here: that is the point.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "versions": set(),
    "assets": set(),
    "borders": {"errors"},
    "config": {"errors", "borders"},
    "store": {"errors", "versions"},
    "questions": GROUND,
    "manifold": GROUND,
    "moe": GROUND - {"config"},
    "engine": GROUND | {"questions", "moe", "manifold"},
    "evaluation": METHOD,
    "benchmarks": METHOD | {"evaluation"},
    "stages": METHOD | {"evaluation", "benchmarks"},
    "baselines": JUDGED,
    "cluster": JUDGED | {"baselines"},
    "figures": JUDGED,
    "tracking": JUDGED | {"figures"},
    "ablations": SHOWN | {"cluster"},
    "runs": JUDGED | {"baselines", "figures"},
    "terminal": GROUND | {"engine"},
    "doctor": METHOD | {"cluster"},
    "api": SHOWN | {"cluster", "runs", "terminal"},
    # The names that `import roma_ray` offers, and `python -m roma_ray`.
    "__init__": METHOD | {"api"},
    "__main__": {"cli"},
    "cli": SHOWN | {"baselines", "cluster", "ablations", "runs", "terminal", "doctor", "api"},
}

# Library -> the rooms that may import it; a library that is not here may be used anywhere but at the top of the CLI.
ONLY_IN = {
    "ray": {"cluster", "ablations", "doctor"},
    "mlflow": {"tracking"},
    "faiss": {"manifold"},
    "peft": {"moe", "baselines"},
    "sentence_transformers": {"stages"},
    "datasets": {"questions", "benchmarks"},
    "lm_eval": {"benchmarks"},
    "click": {"cli"},
    "rich": {"terminal"},
    "obstore": {"store"},
    "boto3": {"store"},
}

# Pure tensor functions know neither files nor models.
NEVER_IN = {"manifold": {"transformers", "pyarrow", "json", "pathlib", "safetensors"}}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    at_import: bool
    """Runs when the file is imported: not inside a function, not under TYPE_CHECKING."""

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path, source: str | None = None) -> Iterator[Import]:
    """Every import of a file, absolute, at any depth: also in functions, under TYPE_CHECKING and by importlib."""
    tree = ast.parse(file.read_text(encoding="utf-8") if source is None else source)
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parts[:-1]]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for module in _modules(node, package):
            yield Import(file, node.lineno, module, at_import)  # type: ignore[attr-defined]
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _type_checking(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not deferred)

    yield from visit(tree, True)


def _modules(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        # `from roma_ray.engine import training` names a module by its alias.
        named = [f"{origin}.{alias.name}" for alias in node.names]
        return [name if origin == PACKAGE.name or name in modules() else origin for name in named]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {module_of(file): file for file in FILES}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def all_imports() -> list[Import]:
    return [found for file in FILES for found in imports_of(file)]


def _forbidden(found: Import) -> str | None:
    """Why an import breaks the rules, or None."""
    room = room_of(found.file)
    top, _, rest = found.module.partition(".")
    if top == PACKAGE.name:
        target = rest.partition(".")[0]
        if not target or target == room:
            return None
        return None if target in MAY_IMPORT[room] else f"{room} may not import {target}"
    if top in {"tests", "jobs", "benchmarks"}:
        return "the package stands without the repository around it"
    if room not in ONLY_IN.get(top, {room}):
        return f"only {', '.join(sorted(ONLY_IN[top]))} may import {top}"
    if top in NEVER_IN.get(room, set()):
        return f"{room} does without {top}"
    return None


def test_every_room_has_its_place() -> None:
    assert {room_of(file) for file in FILES} == set(MAY_IMPORT), (
        "say in MAY_IMPORT (and ARCHITECTURE.md) whom the new room may import"
    )


def test_nobody_imports_whom_he_must_not() -> None:
    faults = [f"{found.place}: {reason}" for found in all_imports() if (reason := _forbidden(found))]
    assert not faults, "\n".join(faults)


def test_the_rules_have_no_circle() -> None:
    order: list[str] = []
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, targets in left.items() if targets <= set(order)]
        assert free, f"a circle among {sorted(left)}"
        order += free
        left = {room: targets for room, targets in left.items() if room not in free}


def circle_of(arrows: dict[str, set[str]]) -> list[str]:
    """Those of a graph that lie on a circle or between two of them; arrows point from who imports to what is imported."""
    left = {module: set(targets) for module, targets in arrows.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        left = {module: targets for module, targets in left.items() if module not in free}
    while unused := left.keys() - set().union(*left.values()):
        left = {module: targets for module, targets in left.items() if module not in unused}
    return sorted(left)


def test_no_modules_import_one_another() -> None:
    """Not inside functions either: what is imported there to escape a circle is one."""
    arrows: dict[str, set[str]] = {module: set() for module in modules()}
    for found in all_imports():
        # The package's own names are looked up when somebody asks for them (`__getattr__`).
        if found.module in arrows and found.module != PACKAGE.name:
            arrows[module_of(found.file)].add(found.module)
    assert not (circle := circle_of(arrows)), f"a circle among {circle}: put what both need into a module of its own"


def test_a_circle_is_seen() -> None:
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_ray_and_mlflow_stay_out_of_the_method() -> None:
    below = JUDGED | {"baselines", "figures", "runs"}
    users = {room_of(i.file) for i in all_imports() if i.module.partition(".")[0] in {"ray", "mlflow"}}
    assert not users & below


# Read before any command is known.
AT_START = {"commands", "options", "grids", "housekeeping", "proving", "mending"}


def test_the_command_line_imports_nothing_heavy_when_it_starts() -> None:
    allowed = set(sys.stdlib_module_names) | {"click", "__future__"}
    light = {f"roma_ray.cli.{name}": PACKAGE / "cli" / f"{name}.py" for name in AT_START}
    light["roma_ray.cli"] = PACKAGE / "cli" / "__init__.py"
    light["roma_ray"] = PACKAGE / "__init__.py"
    at_start = [i for i in all_imports() if i.file in light.values() and i.at_import and i.module not in light]
    heavy = [i.place for i in at_start if i.module.partition(".")[0] not in allowed]
    assert not heavy, "import it inside the command that needs it:\n" + "\n".join(heavy)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("manifold/x.py", "from roma_ray.questions import records"),
        ("manifold/x.py", "from roma_ray import questions"),
        ("manifold/x.py", "from ..questions.records import Question"),
        ("manifold/x.py", "def f():\n    import roma_ray.moe.routers"),
        ("manifold/x.py", "import json"),
        ("moe/x.py", "from roma_ray.engine.setup import Setup"),
        ("engine/x.py", "def f():\n    def g():\n        import ray.data"),
        ("engine/x.py", "if TYPE_CHECKING:\n    from ray import ObjectRef"),
        ("engine/x.py", "import importlib\nimportlib.import_module('ray')"),
        ("engine/x.py", "from roma_ray.stages import finetuning"),
        ("evaluation/x.py", "try:\n    import mlflow\nexcept ImportError:\n    pass"),
        ("cluster/x.py", "import mlflow.tracking"),
        ("stages/x.py", "from roma_ray.runs.pipeline import run"),
        ("engine/x.py", "from tests.tiny import tiny_moe"),
        ("config/x.py", "from roma_ray.store.artifacts import Store"),
    ],
)
def test_the_check_sees_what_it_must_see(file: str, source: str) -> None:
    assert any(_forbidden(found) for found in imports_of(PACKAGE / file, source))


def test_the_check_lets_pass_what_is_allowed() -> None:
    source = (
        "from roma_ray.manifold import losses\nfrom . import setup\nimport torch\nfrom roma_ray.errors import RomaError"
    )
    assert [_forbidden(found) for found in imports_of(PACKAGE / "engine" / "x.py", source)] == [None] * 4


# "About 400" and "about 60": a tenth more is still one room.
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 440, 66


def test_files_and_functions_stay_short() -> None:
    long = []
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        lines = source.count("\n")
        if lines > MOST_LINES:
            long.append(f"{file.relative_to(PACKAGE.parent)}: {lines} lines; make two rooms of it")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{file.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}: {length} lines")
    assert not long, "\n".join(long)


# Whose files are not the storage's: strangers' and users' own, models', the machine's, another library's.
OWN_FILES = {
    "benchmarks/local_data.py": "the user's folder of benchmark files",
    "borders/documents.py": "the user's YAML and JSON",
    "borders/templates.py": "the renderer's own process",
    "borders/text.py": "the terminal",
    "cli/options.py": "the place of an export, before any work",
    "cluster/ray_cluster.py": "Ray's session files",
    "cluster/rendezvous.py": "torch's rendezvous, which opens the file itself",
    "cluster/worker_pool.py": "this package's own code",
    "cluster/worth.py": "the size of a model",
    "engine/devices.py": "the kernel's limits",
    "engine/hub.py": "the hub's cache",
    "engine/setup.py": "a model's folder",
    "moe/adapters.py": "an adapter's folder, for any tool",
    "moe/folders.py": "exports: folders of the user's own",
    "moe/merged.py": "a whole model, for any tool",
    "moe/reference.py": "the reference code's checkpoint, for its tools",
    "moe/routing_json.py": "the reference code's form, for its tools",
    "moe/snapshot.py": "a model's shards",
    "questions/dataset_registry.py": "a published data set's file",
    "questions/jsonl.py": "the user's questions",
    "questions/parquet.py": "the user's questions",
    "questions/readers.py": "the questions shipped with the package",
    "stages/embedding.py": "an encoder's folder",
    "tracking/mlflow.py": "MLflow's database, and what it takes from a folder",
}
_CALLS = {
    "open", "os.open", "io.open", "gzip.open", "safe_open", "load_file", "save_file", "os.replace", "os.rename", "os.remove",
    "os.unlink", "os.listdir", "os.scandir", "os.walk", "os.makedirs", "os.mkdir", "os.link", "os.symlink", "shutil.copy",
    "shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.rmtree", "np.memmap", "np.load", "np.save", "mmap.mmap",
    "torch.load", "torch.save", "pq.read_table", "pq.write_table", "pq.ParquetFile", "tempfile.mkdtemp",
    "tempfile.TemporaryDirectory", "tempfile.NamedTemporaryFile",
}  # fmt: skip
_METHODS = {
    "read_text", "write_text", "read_bytes", "write_bytes", "unlink", "rename", "iterdir", "glob", "rglob", "mkdir", "rmdir",
    "touch", "symlink_to", "hardlink_to",
}  # fmt: skip
# A tracker's client has a `rename` too.
_NO_PATHS = {"client"}


def reaches_files(source: str) -> bool:
    """Whether a source opens, lists, renames, maps or removes files by itself."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return any(
        ast.unparse(call) in _CALLS
        or (isinstance(call, ast.Attribute) and call.attr in _METHODS and ast.unparse(call.value) not in _NO_PATHS)
        for call in calls
    )


def test_only_the_store_reaches_files_of_the_storage() -> None:
    found = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        if room_of(file) != "store" and reaches_files(file.read_text(encoding="utf-8"))
    }
    assert found - set(OWN_FILES) == set(), "ask roma_ray/store/ for it, or say here whose files these are"
    assert set(OWN_FILES) - found == set(), "they reach no files any more"


@pytest.mark.parametrize(
    "source", ["open(p)", "Path(p).write_text('x')", "os.replace(a, b)", "np.memmap(p)", "p.glob('*')"]
)
def test_reaching_files_is_seen(source: str) -> None:
    assert reaches_files(source)


def test_no_two_files_share_a_name() -> None:
    """Nor do one's singular and another's plural: who is told a name finds the file."""
    named: dict[str, list[str]] = {}
    for file in FILES:
        if not file.stem.startswith("__"):
            named.setdefault(file.stem.removesuffix("s"), []).append(str(file.relative_to(PACKAGE)))
    assert not [files for files in named.values() if len(files) > 1]


def test_no_two_classes_share_a_name() -> None:
    """Of those that other files may import."""
    named: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                named.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert not {name: files for name, files in named.items() if len(files) > 1}


def test_public_things_have_a_docstring() -> None:
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            bare.append(str(file.relative_to(PACKAGE.parent)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                bare.append(f"{file.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}")
    assert not bare, "\n".join(bare)
