"""The rules of the layout: which module may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mixer.system.files import PROJECT

PACKAGE = PROJECT / "mixer"
FILES = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(module: str) -> dict[str, set[str]]:
    """Module of the package -> names that ``module`` imports from it, at the top or inside a function."""
    taken: dict[str, set[str]] = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found = [(name.name, "") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module, name.name) for name in node.names]
        else:
            continue
        for source, name in found:
            inner = f"{source}.{name}"
            if inner in FILES:
                taken.setdefault(inner, set())
            elif source in FILES:
                taken.setdefault(source, set()).add(name)
    return taken


def test_core_imports_neither_studies_nor_reporting():
    apart = ("mixer.studies.", "mixer.reporting.")
    wrong = [
        (module, taken)
        for module in FILES
        if not module.startswith(apart)
        for taken in imports(module)
        if taken.startswith(apart)
    ]
    assert not wrong


def test_reporting_imports_no_studies():
    assert not [m for m in FILES if m.startswith("mixer.reporting.") for t in imports(m) if "mixer.studies." in t]


def test_no_circular_imports():
    open_modules, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_modules, " -> ".join([*open_modules, module])
        if module not in done:
            open_modules.append(module)
            for taken in imports(module):
                visit(taken)
            done.add(open_modules.pop())

    for module in FILES:
        visit(module)


def test_no_private_name_crosses_a_file():
    private = {(m, name) for m in FILES for names in imports(m).values() for name in names if name.startswith("_")}
    for module, tree in TREES.items():  # nor as an attribute of a module
        modules = {name.split(".")[-1] for name in imports(module)}
        private |= {
            (module, f"{node.value.id}.{node.attr}")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in modules and node.attr.startswith("_")
        }
    assert not private


@pytest.mark.parametrize("module", FILES)
def test_no_function_has_the_name_of_a_module(module):
    names = {Path(path).stem for path in FILES.values()} | {path.parent.name for path in FILES.values()}
    functions = {node.name for node in TREES[module].body if isinstance(node, ast.FunctionDef)}
    assert not functions & names


def test_importing_the_package_does_not_wait_for_slow_packages():
    code = "import sys, mixer; print({'torchvision', 'torch._dynamo', 'matplotlib.pyplot'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert imported.stdout == "set()\n"
