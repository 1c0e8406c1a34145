"""Imports go down the floors only, files on one floor do not import each other, and the library alone stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    0: ["averaging", "errors", "lost_ranks", "messages", "options", "transfer", "weight_names"],
    1: ["config", "numbers", "keyed_random", "network_call", "rundir", "distributed", "integrations"],
    2: [
        *["batch_order", "compiling", "data", "model", "diffusion", "sampling", "features", "metrics"],
        *["capabilities", "image_grid", "named_weights", "sampling_network"],
    ],
    2.5: ["own_statistics"],
    3: [
        "train",
        "score",
        "report",
        "reconstruction",
        "from_run",
        "importing",
        "own_folder",
        "classifier_training",
        "doctor",
        "launch",
    ],
    4: ["cli", "export"],
    5: ["__main__"],
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}
SOURCES = sorted((ROOT / "ddpm_ema").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
BASE_INSTALL = {"torch", "numpy", "safetensors"}


def unit(path: Path) -> str:
    """The file or package directly below ddpm_ema that a source belongs to: the unit that the floors are about."""
    return path.relative_to(ROOT / "ddpm_ema").parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def units_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("ddpm_ema.")} & set(FLOOR_OF)


@pytest.mark.parametrize("path", [p for p in SOURCES if unit(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_lower_floors_only(path: Path) -> None:
    assert unit(path) in FLOOR_OF, f"{path.name} has no floor: give it one here and in docs/architecture.md"
    own, floor = unit(path), FLOOR_OF[unit(path)]
    wrong = {other for other in units_imported(path) if other != own and FLOOR_OF[other] >= floor}
    assert not wrong, f"{own} (floor {floor}) imports {wrong}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_under_20_lines_of_code(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree, clean=False) or ""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) - len([line for line in docstring.splitlines() if line.strip()]) < 20


def test_the_floor_table_of_the_documentation_names_every_unit() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = [
        u for u in {unit(p) for p in SOURCES} - {"__init__"} if f"`{u}.py`" not in text and f"`{u}/`" not in text
    ]
    assert not missing


def test_averaging_imports_the_base_install_only() -> None:
    for path in (ROOT / "ddpm_ema" / "averaging").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        outside -= BASE_INSTALL | {"ddpm_ema", "__future__"} | set(sys.stdlib_module_names)
        assert not outside, f"{path.name} imports {outside}"
        assert not {u for u in units_imported(path) if u != "averaging"}, f"{path.name}: the library stands alone"


def test_import_ddpm_ema_loads_neither_diffusers_nor_accelerate_nor_torchvision() -> None:
    heavy = ["diffusers", "accelerate", "torchvision", "pydantic", "torch_fidelity", "matplotlib"]
    code = f"import ddpm_ema, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
