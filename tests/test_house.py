"""The floors of the house: no import goes up, none runs in a circle (NOTES, "The house")."""

import ast
from graphlib import TopologicalSorter

from service import PROJECT

FLOORS = {"serving": 0, "sqlite": 0, "db": 1, "postgres": 2, "app": 3, "serving.local": 3}
CLIENT = ("proof", "proof_of_correctness")  # they know the service by HTTP only
PATTERNS = ("*.py", "serving/*.py", "sqlite/*.py", "postgres/*.py", "proof/*.py")
SOURCES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for pattern in PATTERNS
    for path in PROJECT.glob(pattern)
}


def imported_by(source: str) -> set[str]:
    """The modules of this project that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(SOURCES)


def floor(module: str) -> int:
    return FLOORS.get(module, FLOORS.get(module.split(".")[0], 4))  # 4: gunicorn.conf.py


ARROWS = {module: imported_by(source) for module, source in SOURCES.items()}


def test_no_import_goes_up() -> None:
    for module, below in ARROWS.items():
        if module.split(".")[0] in CLIENT:
            assert all(name.split(".")[0] in CLIENT for name in below), module
        else:
            assert all(floor(name) <= floor(module) for name in below), (module, below)
    assert ARROWS["db"]  # or nothing was looked at


def test_no_imports_run_in_a_circle() -> None:
    assert list(TopologicalSorter(ARROWS).static_order())
    assert not [module for module, source in SOURCES.items() if "TYPE_CHECKING" in source]
