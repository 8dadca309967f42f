"""The shape of the code base: who may import whom, who may print or open sockets, and what a wheel installs."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mlx_cm.bundled import FOLDER

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("mlx_cm/**/*.py"), *ROOT.glob("convert/**/*.py"), ROOT / "cli.py"])


def module_of(path: Path) -> str:
    """Import name of a source file: convert/ and cli.py live inside mlx_cm."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "mlx_cm" else ("mlx_cm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in FILES}


def imports(tree: ast.AST) -> set[str]:
    """Full names of what is imported anywhere in a tree; `from a import b` gives `a.b` where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in TREES else node.module)
    return found


def eager_imports(tree: ast.Module) -> set[str]:
    """What importing a module imports."""
    found = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imports(ast.Module([node], []))
        pending += ast.iter_child_nodes(node)
    return found


def package(name: str) -> str:
    return name.partition(".")[0]


def within(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


# --- direction

# Layers from the bottom up; a module imports from its own layer and those below. What is not named is a part: between
# the foundations and the models; a new module that stands higher gets its place here.
LAYERS = (
    ("mlx_cm.errors", "mlx_cm.config", "mlx_cm.storage", "mlx_cm.rng", "mlx_cm.backend", "mlx_cm.platform_setup"),
    ("parts",),
    ("mlx_cm.models",),
    ("mlx_cm.guidance", "mlx_cm.quantization", "mlx_cm.lora", "mlx_cm.model_folder", "mlx_cm.tiling"),
    ("mlx_cm.pipelines",),
    ("mlx_cm.convert", "mlx_cm.hub", "mlx_cm.cache"),
    ("mlx_cm.sources", "mlx_cm.memory"),
    ("mlx_cm.loading",),
    ("mlx_cm.inspection", "mlx_cm.rewriting", "mlx_cm.training"),
    ("mlx_cm.training",),
    ("mlx_cm.cli",),
)
PARTS = 1
CONVERTING = "mlx_cm.sources"


def layer(module: str) -> int:
    return next((rank for rank, places in enumerate(LAYERS) if within(module, *places)), PARTS)


@pytest.mark.parametrize("module", TREES)
def test_imports_point_downwards(module):
    inner = {name for name in imports(TREES[module]) if package(name) == "mlx_cm" and name != "mlx_cm"}
    upwards = {name for name in inner if layer(name) > layer(module)}
    assert upwards == set() or module == "mlx_cm", f"{module} imports {upwards}"


def test_no_cycle():
    graph = {
        module: {name for name in eager_imports(tree) if name in TREES and name not in (module, "mlx_cm")}
        for module, tree in TREES.items()
    }
    graph.pop("mlx_cm")
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", [name for name in TREES if within(name, "mlx_cm.models")])
def test_models_do_not_import_sibling_models(module):
    siblings = {name for name in imports(TREES[module]) if within(name, "mlx_cm.models")}
    assert siblings <= {"mlx_cm.models.layers"}


@pytest.mark.parametrize("module", [name for name in TREES if not within(name, "mlx_cm.convert")])
def test_one_module_converts_and_only_when_needed(module):
    if module != CONVERTING:
        assert not {name for name in imports(TREES[module]) if within(name, "mlx_cm.convert")}
    assert not {name for name in eager_imports(TREES[module]) if within(name, "mlx_cm.convert")}


# --- what comes from outside

FOREIGN = {"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "cv2", "scipy"}
SOCKETS = {"huggingface_hub", "socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "ssl"}
# Locks come from the Hub's library too; they open no socket.
HUB_LOCKS = {"mlx_cm.cache": {"huggingface_hub.utils"}}
# What pyproject.toml asks for, by its name when imported.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pillow": "PIL"}
# Of the extra `train`, each where it is used; nothing else needs it.
OPTIONAL = {"mlx_cm.training.curve": {"matplotlib"}}
DEPENDENCIES = {
    IMPORT_NAMES.get(name, name) for name in (re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"])
}


@pytest.mark.parametrize("module", TREES)
def test_what_may_be_imported_from_outside(module):
    outside = {name for name in imports(TREES[module]) if package(name) != "mlx_cm"}
    packages = {package(name) for name in outside}
    assert not packages & FOREIGN
    assert packages <= DEPENDENCIES | OPTIONAL.get(module, set()) | sys.stdlib_module_names
    if module != "mlx_cm.cli":
        assert "click" not in packages
    if module != "mlx_cm.hub":
        online = {name for name in outside if package(name) in SOCKETS}
        assert online <= HUB_LOCKS.get(module, set())
    if within(module, "mlx_cm.convert"):
        assert packages <= {"numpy", "safetensors"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", [name for name in TREES if name != "mlx_cm.cli"])
def test_only_the_command_line_prints(module):
    for node in ast.walk(TREES[module]):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        assert not (
            isinstance(node, ast.Attribute)
            and node.attr in ("stdout", "stderr")
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )


@pytest.mark.parametrize("module", [name for name in TREES if within(name, "mlx_cm.models")])
def test_models_do_not_evaluate(module):
    """A host synchronisation inside a model stalls the GPU."""
    for node in ast.walk(TREES[module]):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("eval", "async_eval", "item", "tolist"))


def test_help_does_not_load_mlx():
    """`mlx-cm --help` answers at once."""
    script = (
        "import sys, mlx_cm.cli; sys.exit(sorted({'mlx.core', 'torch', 'numpy', 'PIL'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_a_wheel_holds_one_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entry_points = archive.read(f"{metadata}/entry_points.txt").decode()
        licence = archive.read(next(name for name in names if name.startswith(metadata) and name.endswith("LICENSE")))
    assert {name.partition("/")[0] for name in names} == {"mlx_cm", metadata}
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "mlx-cm=mlx_cm.cli:main" in entry_points.replace(" ", "")
    inside = {name for name in names if name.startswith("mlx_cm/")}
    expected = {path.relative_to(ROOT).as_posix() for path in FILES}
    expected = {name if name.startswith("mlx_cm/") else f"mlx_cm/{name}" for name in expected}
    assert {name for name in inside if name.endswith(".py")} == expected
    assert not [name for name in inside if "__pycache__" in name or name.endswith(".pyc")]
    bundle = {path.relative_to(ROOT).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    recipes = {f"mlx_cm/recipes/{path.name}" for path in ROOT.glob("recipes/*.toml")}
    assert bundle and recipes and inside == expected | bundle | recipes


def test_an_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import mlx_cm, mlx_cm.cli, mlx_cm.convert, mlx_cm.convert.readers
from mlx_cm import load
for module in (mlx_cm, mlx_cm.cli, mlx_cm.convert, mlx_cm.convert.readers):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert [path.rstrip("/") for path in mlx_cm.__path__] == [sys.argv[1] + "/mlx_cm"], mlx_cm.__path__
(image,) = load("emoji").generate("red apple", steps=1)
assert image.size == (64, 64)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, target], capture_output=True, text=True, cwd=elsewhere, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_tests_with_the_command_that_ci_runs():
    command = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest"
    for name in ("README.md", ".ci/run"):
        assert command in (ROOT / name).read_text(encoding="utf-8").splitlines(), name
