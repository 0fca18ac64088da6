"""What is installed: `kernels/` under the name `meft_kernels`, every module of ours, and no package named `kernels`."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules_of(folder: str, installed_as: str) -> set[str]:
    """The files that a wheel has to hold for the package in ``folder``."""
    return {
        f"{installed_as}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".css"}
    }


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names inside a wheel that is built from a copy, so that no build folder is left in the checkout."""
    pytest.importorskip("setuptools")
    work = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("meft_engine", "kernels"):
        shutil.copytree(ROOT / folder, work / "source" / folder, ignore=ignore)
    for pattern in ("setup.cfg", "pyproject.toml", "LICENSE", "README*"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, work / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build = subprocess.run(
        [*command, "--wheel-dir", str(work), str(work / "source")], capture_output=True, text=True, timeout=300
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    expected = modules_of("meft_engine", "meft_engine") | modules_of("kernels", "meft_kernels")
    assert "meft_kernels/reference.py" in expected
    assert not expected - wheel_names, "add the package to `packages` in setup.cfg"


def test_wheel_has_no_package_that_shadows_others(wheel_names: set[str]) -> None:
    top_level = {name.partition("/")[0] for name in wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"meft_engine", "meft_kernels"}


def test_kernels_folder_is_no_package() -> None:
    # With an __init__.py, the folder would shadow PyPI's `kernels` for anyone who works in this directory.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_installed_package_resolves_from_another_directory(tmp_path: Path) -> None:
    code = "import meft_kernels.reference as r, meft_engine as e, importlib.util as u; "
    code += "print(r.__file__, e.__file__, u.find_spec('kernels') is None or u.find_spec('kernels').origin, sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    reference, engine, shadow = found.stdout.splitlines()
    assert Path(reference).name == "reference.py" and Path(engine).name == "__init__.py"
    assert not shadow.startswith(str(ROOT))


def test_import_needs_no_deepspeed_or_triton(tmp_path: Path) -> None:
    code = "import sys, meft_engine; print(sorted({'deepspeed', 'triton'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_tests_run_against_this_checkout() -> None:
    origin = importlib.util.find_spec("meft_engine").origin
    assert Path(origin).is_relative_to(ROOT), f"meft_engine comes from {origin}; run `make`, or pip install -e ."
