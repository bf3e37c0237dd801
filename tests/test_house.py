"""The rules of the house: who may import whom, and what the package shows to the world."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import a2fpn
from tests.conftest import LONG

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "a2fpn"

BUILDING = {
    "_registry",
    "_serialize",
    "config",
    "errors",
    "pyramid",
    "necks",
    "backbones",
    "detectors",
    "compose",
    "build",
}

# What each module or folder of the package may import of the package itself, and of others.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "_plugins": ({"errors"}, set()),
    "_registry": ({"_plugins", "errors"}, set()),
    "_text": (set(), set()),
    "_words": (set(), set()),
    "_atomic": (set(), set()),
    "device": (set(), {"torch"}),
    "_version": (set(), set()),
    "errors": (set(), set()),
    "_serialize": ({"errors", "_registry"}, set()),
    "config": ({"errors", "_registry", "_serialize"}, set()),
    "pyramid": ({"errors"}, {"torch"}),
    "layers": ({"device", "errors"}, {"torch", "timm.layers", "torchvision.ops", "triton"}),
    "necks": ({"errors", "_registry", "layers", "pyramid"}, {"torch"}),
    "backbones": (
        {"_plugins", "device", "errors", "_registry", "config", "layers", "pyramid"},
        {"torch", "timm", "safetensors", "huggingface_hub"},
    ),
    "masks": ({"device", "errors"}, {"numpy", "pycocotools", "torch", "torchvision"}),
    "preprocess": ({"device", "errors", "config", "masks"}, {"torch"}),
    "heads": ({"device", "errors", "layers", "masks", "pyramid"}, {"torch", "torchvision", "triton"}),
    "detectors": (
        {"errors", "_registry", "backbones", "config", "heads", "layers", "masks", "necks", "preprocess", "pyramid"},
        {"torch", "torchvision"},
    ),
    "compose": (
        {"_plugins", "_words", "errors", "_registry", "_serialize", "backbones", "config", "detectors", "necks"},
        set(),
    ),
    "build": ({"errors", "_serialize", "backbones", "config", "detectors", "necks"}, set()),
    "pretrained": (
        BUILDING | {"_atomic", "_plugins", "_version", "_words", "convert", "layers"},
        {"huggingface_hub", "safetensors", "torch", "torchvision"},
    ),
    "convert": (BUILDING | {"_text", "device", "layers", "pretrained"}, {"torch", "torchvision", "safetensors"}),
    "data": (
        {"_atomic", "_registry", "_text", "config", "errors", "masks"},
        {
            "datasets",
            "fsspec",
            "matplotlib",
            "numpy",
            "orjson",
            "PIL",
            "pillow_heif",
            "pycocotools",
            "tifffile",
            "torch",
            "torchvision",
            "yaml",
        },
    ),
    "evaluation": ({"data", "errors", "masks"}, {"hotcoco", "numpy", "pycocotools"}),
    "instance_metrics": ({"errors", "data", "masks"}, {"numpy"}),
    "counting": ({"errors"}, {"numpy"}),
    "inference": (
        {
            *("_registry", "_serialize", "_text", "_words", "backbones", "config", "data", "detectors", "device"),
            *("errors", "heads", "masks", "preprocess", "pyramid"),
        },
        {
            *("contourpy", "matplotlib", "numpy", "onnxruntime", "openvino", "PIL", "pycocotools", "supervision"),
            *("timm.layers",),
            *("timm.models._features", "timm.models.resnet", "torch", "torchvision"),
        },
    ),
    "export": (
        {"_atomic", "_serialize", "_version", "detectors", "errors", "heads", "inference", "masks"},
        {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "torch"},
    ),
    "training": (
        {
            "_atomic",
            "_plugins",
            "_registry",
            "_serialize",
            "_text",
            "_version",
            "_words",
            "config",
            "data",
            "errors",
            "evaluation",
            "inference",
            "preprocess",
            "pretrained",
        },
        {
            *(
                "accelerate",
                "filelock",
                "matplotlib",
                "numpy",
                "PIL",
                "psutil",
                "rich",
                "safetensors",
                "timm.utils",
            ),
            *("timm.optim", "torch", "trackio", "yaml"),
        },
    ),
    "report": (
        {"_text", "_version", "data", "detectors", "errors", "evaluation", "inference", "pretrained"},
        {"contourpy", "jinja2", "markupsafe", "matplotlib", "numpy", "PIL", "pycocotools", "torch"},
    ),
    "writers": (
        {"_atomic", "_registry", "config", "data", "errors", "inference", "masks"},
        {"contourpy", "numpy", "pycocotools", "tifffile"},
    ),
    "app": ({"data", "inference", "writers"}, {"gradio", "numpy", "PIL"}),
    "cli": (
        BUILDING
        | {
            "_atomic",
            "_plugins",
            "_text",
            "_version",
            "_words",
            "convert",
            "counting",
            "instance_metrics",
            "data",
            "evaluation",
            "export",
            "heads",
            "inference",
            "preprocess",
            "pretrained",
            "training",
            "app",
            "report",
            "writers",
        },
        {"numpy", "PIL", "torch", "rich", "typer"},
    ),
    "__main__": ({"cli"}, set()),
    "finite": (set(), {"torch"}),
    "__init__": (BUILDING | {"_version", "export", "finite", "inference", "pretrained"}, set()),
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
    assert not [name for name in imports(path) if within(name, {"train", "hub", "benchmarks", "tests"})]


def test_only_backbones_build_timm_networks() -> None:
    users = {
        name_of(path)
        for path in files(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "create_model" and ast.unparse(node.value) == "timm"
    }
    assert users == {"backbones"}


def test_only_training_imports_accelerate() -> None:
    users = {name_of(path) for path in files(PACKAGE) for name in imports(path) if within(name, {"accelerate"})}
    assert users == {"training"}


@pytest.mark.parametrize("folder", ["train", "hub"])
def test_the_outer_folders_are_doors(folder: str) -> None:
    assert sum(len(path.read_text().splitlines()) for path in files(ROOT / folder)) <= 20


def test_the_public_names_are_few_and_there() -> None:
    assert len(a2fpn.__all__) <= 29
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


def test_modules_come_with_their_first_use_and_building_a_model_needs_no_heavy_one() -> None:
    heavy = {"matplotlib", "supervision", "typer", "rich", "pycocotools", "accelerate", "cv2", "pandas"}
    building = f"import a2fpn, sys; a2fpn.create_model, a2fpn.create_neck; print(*sorted({heavy!r} & set(sys.modules)))"
    # In the same interpreter, since one takes seconds to start: modules come with their first use.
    using = "a2fpn.errors.ConfigError, a2fpn.data.CocoDataset, a2fpn.training"
    command = [sys.executable, "-c", f"{building}; {using}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() == []


@pytest.mark.parametrize("name", a2fpn.__all__)
def test_every_public_name_comes_with_its_module(name: str) -> None:
    """Also those that a type checker alone imports by hand."""
    assert getattr(a2fpn, name) is vars(a2fpn)[name]
    assert name in dir(a2fpn)


def test_the_files_that_are_tested_first_exist() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / f"test_{name}.py").is_file()] == []


def test_app_has_no_doctests_that_would_be_left_out() -> None:
    assert ">>>" not in (PACKAGE / "app.py").read_text(encoding="utf-8")


def test_other_names_are_no_modules() -> None:
    for name in ("nosuch", "_nosuch", "create_modell"):
        with pytest.raises(AttributeError, match=f"module 'a2fpn' has no attribute '{name}'"):
            getattr(a2fpn, name)


def test_the_package_is_typed_and_has_one_version() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert a2fpn.__version__.count(".") == 2
    literals = [path for path in files(PACKAGE) if f'"{a2fpn.__version__}"' in path.read_text(encoding="utf-8")]
    assert [path.name for path in literals] == ["_version.py"]


def test_a_name_that_does_not_exist_is_an_error_for_a_type_checker(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text((PACKAGE / "__init__.py").read_text())
    (tmp_path / "use.py").write_text("import package\npackage.create_model('x')\npackage.create_modell('x')\n")
    options = ["--follow-imports=skip", "--ignore-missing-imports", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, "package", "use.py"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stdout
    assert 'use.py:3: error: Module has no attribute "create_modell"; maybe "create_model"?' in shown
    assert "use.py:2" not in shown


def test_nothing_changes_the_state_of_the_whole_process() -> None:
    """A serving process loads and evaluates models in threads."""
    calls = (
        *("register_module_parameter_registration_hook", "register_module_forward_hook", "setdefaulttimeout"),
        *("redirect_stdout", "gc.disable", "set_default_dtype", "set_default_device"),
    )
    found = [(path.name, call) for path in files(PACKAGE) for call in calls if call in path.read_text(encoding="utf-8")]
    assert found == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also not inside a function or for a type checker alone."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files(PACKAGE)
    }
    graph = {
        # A package is there before what lies in it.
        name: {found for found in imports(path) if found in modules and not f"{name}.".startswith(f"{found}.")}
        for name, path in modules.items()
    }
    reachable = {name: found - {"a2fpn"} for name, found in graph.items() if name != "a2fpn"}
    for _ in modules:
        grown = {name: found.union(*(reachable[other] for other in found)) for name, found in reachable.items()}
        if grown == reachable:
            break
        reachable = grown
    assert sorted(name for name, found in reachable.items() if name in found) == []
