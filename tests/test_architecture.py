"""The shape of the code: arrows point down, the library knows no orchestrator, and the wheel ships the library alone."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARY = sorted((REPOSITORY / "distill_pipeline").rglob("*.py"))
ORCHESTRATION = sorted([*(REPOSITORY / "assets").glob("*.py"), *(REPOSITORY / "resources").glob("*.py")])
HEAVY = {"torch", "transformers", "lm_eval", "matplotlib"}
LONGEST_ASSET_BODY = 25


def imports_of(tree: ast.AST) -> set[str]:
    """Packages that a piece of code imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_contracts_on_imports_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_library_never_imports_the_orchestrator_or_what_stands_above_it():
    for path in LIBRARY:
        assert not imports_of(parsed(path)) & {"dagster", "assets", "resources"}, path


def test_resources_never_import_assets():
    for path in (REPOSITORY / "resources").glob("*.py"):
        assert "assets" not in imports_of(parsed(path)), path


@pytest.mark.parametrize("path", ORCHESTRATION, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_orchestration_keeps_annotations_alive_and_imports_nothing_heavy(path):
    tree = parsed(path)
    futures = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert not futures, "Dagster reads annotations of assets at run time"
    assert not imports_of(tree) & HEAVY


def test_the_composition_root_holds_no_logic():
    banned = ast.If | ast.IfExp | ast.For | ast.While | ast.Try | ast.With | ast.BinOp | ast.comprehension | ast.Lambda
    nodes = list(ast.walk(parsed(REPOSITORY / "assets" / "definitions.py")))
    assert not [node for node in nodes if isinstance(node, banned)]


def test_asset_bodies_are_short():
    for path in ORCHESTRATION:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and any("asset" in ast.unparse(mark) for mark in node.decorator_list):
                assert (node.end_lineno or 0) - node.body[0].lineno < LONGEST_ASSET_BODY, f"{path}: {node.name}"


def test_nothing_in_pyproject_beats_workspace_yaml():
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert "[tool.dagster" not in text
    assert "[tool.dg" not in text


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    hatchling = pytest.importorskip("hatchling.build", reason="hatchling is not installed: no wheel to look at")
    checkout = tmp_path / "checkout"
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".*", "data", "__pycache__"))
    code = "import hatchling.build, sys; hatchling.build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"distill_pipeline"}
    assert hatchling is not None
