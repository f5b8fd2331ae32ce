"""Rules of docs/conventions.md about imports and the length of functions, read from the source with `ast`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWNERS = {
    "deepspeed": {"orchestration/services/engine.py"},
    "mlflow": {"orchestration/services/tracking.py"},
    "boto3": {"orchestration/services/storage.py"},
    "botocore": {"orchestration/services/storage.py"},
}
PACKAGES = ("tinyemo", "orchestration", "cluster", "tests")
MAX_FUNCTION_LINES = 80


def imported(path: Path) -> set[str]:
    """Return the top-level name of every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no files"
    return found


def test_the_model_science_knows_no_cluster() -> None:
    foreign = {"ray", "deepspeed", "mlflow", "boto3", "botocore", "orchestration", "cluster"}
    assert {str(p): imported(p) & foreign for p in files("tinyemo") if imported(p) & foreign} == {}


def test_one_module_owns_each_outside_service() -> None:
    trespassing = [
        f"{path.name} imports {service}"
        for path in [*files("orchestration"), *files("cluster")]
        for service, owners in OWNERS.items()
        if service in imported(path) and str(path.relative_to(ROOT)) not in owners
    ]
    assert trespassing == []


def test_the_platform_knows_no_training() -> None:
    foreign = {"torch", "tinyemo.projector", "deepspeed", "transformers"}
    assert {str(p): imported(p) & foreign for p in files("cluster") if imported(p) & foreign} == {}


def test_no_function_has_two_jobs() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for package in PACKAGES
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def private_modules(path: Path) -> set[str]:
    """Return the modules of other packages that a file imports and whose names begin with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        found |= {name for name in names if any(part.startswith("_") for part in name.split("."))}
    return found - {"__future__"}


def test_private_modules_of_other_packages_stand_in_the_architecture() -> None:
    documented = (ROOT / "docs" / "architecture.md").read_text()
    used = {name for package in PACKAGES[:3] for path in files(package) for name in private_modules(path)}
    assert {name for name in used if name not in documented} == set()


def test_file_names_are_unique_in_orchestration() -> None:
    """A newcomer finds a subject by its file name; commands in cli/ are named after what they run."""
    paths = [path for path in files("orchestration") if path.name != "__init__.py" and path.parent.name != "cli"]
    names = [path.name for path in paths]
    assert {str(path.relative_to(ROOT)) for path in paths if names.count(path.name) > 1} == set()


def test_aliases_of_models_are_moved_by_promotions_alone() -> None:
    calls = {
        str(path.relative_to(ROOT))
        for package in PACKAGES[:3]
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and (getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None))
        in ("move_alias", "set_registered_model_alias", "delete_registered_model_alias")
    }
    assert calls == {"orchestration/services/tracking.py", "orchestration/report/promotion.py"}
