"""Imports point down only, and each heavy dependency has few homes."""

import ast
import re
import sys
from pathlib import Path

import pytest

import hf_lowrank


ROOT = Path(hf_lowrank.__file__).parent
# A part may import parts of a smaller number, and itself.
LEVEL = {
    "errors": 0, "checks": 1, "files": 1, "registry": 1, "sharding": 1, "versions": 1, "readme": 1,
    "linalg": 2, "blocks": 2, "draws": 2, "parts": 2, "provenance": 2, "upload": 2, "formats": 3, "statistics": 3,
    "methods": 4, "allocation": 4, "refine": 4, "kinds": 4, "convolutions": 4.5, "recipe": 5, "surgery": 5, "sizes": 6,
    "factorize": 6, "groups": 6, "replace": 6, "rewrite": 6, "candidates": 6.5,
    "passes": 7, "latency": 7, "plan": 7, "truncate": 7, "reporting": 7,
    "integrations": 8, "models": 8, "training": 9, "tuners": 9, "evaluation": 9, "testing": 10, "cli": 11,
    "__init__": 12,
}  # fmt: skip
HOMES = {
    "transformers": {"integrations", "models", "training", "tuners", "testing"},
    "peft": {"tuners", "testing", "integrations/peft_lora"},
    "optimum": {"cli"},
    "datasets": {"integrations"},
    "optuna": {"allocation"},
    "pywt": {"linalg"},
    "sklearn": {"linalg"},
    "vllm": {"integrations/vllm"},
    "matplotlib": {"reporting"},
    "jinja2": {"reporting"},
}
FILES = sorted(ROOT.rglob("*.py"))


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """(absolute dotted name, line) of every import of `path`."""
    package = ("hf_lowrank", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = part(path)
    for name, line in imported(path):
        top, _, rest = name.partition(".")
        if top == "hf_lowrank":
            other = rest.partition(".")[0]
            if other in LEVEL and other != own:
                assert LEVEL[other] < LEVEL[own], f"{path.name}:{line} imports {other} from {own}"
        elif top in HOMES:
            homes = {own, "/".join(path.relative_to(ROOT).parts[:2])}
            assert homes & HOMES[top], f"{path.name}:{line} imports {top} from {own}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_print_no_broad_except(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            assert None not in caught, "a bare except"
            assert not {ast.unparse(kind) for kind in caught} & {"Exception", "BaseException"}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert part(path) == "cli"


def test_what_the_package_always_imports_it_declares_once():
    tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 has no tomllib")
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    core, optional = (
        {re.match(r"[\w-]+", entry)[0].lower() for entry in entries}
        for entries in (project["dependencies"], sum(extras.values(), []))
    )
    assert not core & optional
    modules = {"huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
    for path in FILES:
        homes = {part(path), "/".join(path.relative_to(ROOT).parts[:2])}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                at_home = homes & HOMES.get(top, set())
                assert modules.get(top, top) in core or at_home, f"{path.name} imports {top}, which is not declared"
