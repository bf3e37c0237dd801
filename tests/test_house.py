"""The rules of the house: who may import whom, and what the package shows to the world."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import a2fpn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "a2fpn"

CORE = {
    "_registry",
    "_version",
    "config",
    "device",
    "pyramid",
    "layers",
    "masks",
    "necks",
    "backbones",
    "heads",
    "preprocess",
    "detectors",
}
BUILDING = CORE | {"checkpoint", "weights", "hub", "factory"}

# What each module or folder of the package may import of the package itself, and of others.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "_registry": (set(), set()),
    "_version": (set(), set()),
    "weights": ({"_registry", "checkpoint", "hub"}, {"torch", "torchvision", "huggingface_hub"}),
    "config": ({"_registry"}, set()),
    "device": (set(), {"torch"}),
    "pyramid": (set(), {"torch"}),
    "layers": (set(), {"torch", "timm.layers"}),
    "necks": ({"_registry", "layers", "pyramid"}, {"torch"}),
    "backbones": ({"_registry", "config", "layers", "pyramid"}, {"torch", "timm", "safetensors"}),
    "masks": ({"device"}, {"torch"}),
    "preprocess": ({"config", "masks"}, {"torch"}),
    "heads": ({"device", "masks", "pyramid"}, {"torch", "torchvision"}),
    "detectors": (CORE - {"_version", "layers", "detectors"}, {"torch", "torchvision"}),
    "checkpoint": ({"_version", "config"}, {"torch", "safetensors"}),
    "hub": ({"_version", "checkpoint", "detectors"}, {"httpx2", "huggingface_hub", "timm"}),
    "factory": (BUILDING | {"convert"}, {"torch"}),
    "convert": (BUILDING, {"torch", "torchvision", "safetensors"}),
    "data": (
        {"config", "heads", "masks"},
        {"datasets", "fsspec", "torch", "torchvision", "numpy", "PIL", "pycocotools"},
    ),
    "evaluation": ({"data"}, {"faster_coco_eval", "hotcoco", "numpy", "pycocotools"}),
    "optimize": (
        {"config", "detectors", "device", "heads", "preprocess", "pyramid"},
        {"torch", "torchvision", "timm.layers", "timm.models.resnet"},
    ),
    "tta": ({"heads"}, {"torch", "torchvision"}),
    "tiling": ({"data"}, {"numpy", "pycocotools"}),
    "inference": (
        {"config", "data", "detectors", "heads", "optimize", "tiling", "tta", "visualize"},
        {"torch", "numpy", "PIL", "supervision"},
    ),
    "visualize": ({"data", "inference"}, {"contourpy", "matplotlib", "numpy", "PIL", "pycocotools"}),
    "cli": (BUILDING | {"data", "evaluation", "inference", "optimize", "visualize"}, {"torch", "rich", "typer"}),
    "__main__": ({"cli"}, set()),
    "finite": (set(), {"torch"}),
    "__init__": (BUILDING | {"finite", "inference", "optimize"}, set()),
}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module of the package, or the folder, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def within(name: str, allowed: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in allowed)


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_who_may_import_whom(path: Path) -> None:
    own, others = MAY_IMPORT[name_of(path)]
    modules = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files(PACKAGE)}
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "a2fpn":
            module = rest.partition(".")[0]
            assert module not in modules or module in own | {name_of(path)}, f"{path.name} imports {name}"
        elif root not in sys.stdlib_module_names:
            # "from timm import layers" is timm as well, unless timm.layers alone is allowed.
            assert within(name, others) or any(other.startswith(f"{name}.") for other in others), (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_never_imports_what_stands_on_it(path: Path) -> None:
    assert not [name for name in imports(path) if within(name, {"train", "hub", "benchmarks", "tests", "accelerate"})]


def test_only_backbones_build_timm_networks() -> None:
    users = {
        name_of(path)
        for path in files(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "create_model" and ast.unparse(node.value) == "timm"
    }
    assert users == {"backbones"}


@pytest.mark.parametrize(
    ("folder", "public"),
    [
        ("train", {"a2fpn.data", "a2fpn.evaluation", "a2fpn.inference"}),
        ("hub", {"a2fpn.backbones", "a2fpn.checkpoint", "a2fpn.cli", "a2fpn.convert", "a2fpn.hub"}),
    ],
)
def test_tools_use_the_public_api_and_not_each_other(folder: str, public: set[str]) -> None:
    names = {name for path in files(ROOT / folder) for name in imports(path)}
    other = {"train": "hub", "hub": "train"}[folder]
    assert not [name for name in names if within(name, {other})]
    exported = {"a2fpn", *(f"a2fpn.{name}" for name in a2fpn.__all__)}
    assert not [name for name in names if within(name, {"a2fpn"}) and name not in exported and not within(name, public)]


def test_the_public_names_are_few_and_there() -> None:
    assert len(a2fpn.__all__) <= 25
    assert a2fpn.__all__ == sorted(a2fpn.__all__)
    for name in a2fpn.__all__:
        assert getattr(a2fpn, name) is not None, name


def test_the_public_names_are_documented() -> None:
    for name in a2fpn.__all__:
        member = getattr(a2fpn, name)
        if callable(member):
            assert inspect.getdoc(member), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'a2fpn' has no attribute 'Predicter'"):
        a2fpn.Predicter  # noqa: B018


def test_the_import_brings_nothing_that_building_a_model_does_not_need() -> None:
    heavy = {"matplotlib", "supervision", "typer", "rich", "pycocotools", "accelerate", "jsonargparse", "cv2", "pandas"}
    code = f"import a2fpn, sys; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_the_package_is_typed_and_has_one_version() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert a2fpn.__version__.count(".") == 2
    literals = [path for path in files(PACKAGE) if f'"{a2fpn.__version__}"' in path.read_text(encoding="utf-8")]
    assert [path.name for path in literals] == ["_version.py"]
