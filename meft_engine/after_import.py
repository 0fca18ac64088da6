"""Imports a module of ours as soon as another package has been imported, by whomever, and not before."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def run(package: str, module: str) -> None:
    """Import ``module`` once ``package`` is there: now if it is, else at the end of its import."""
    if package in sys.modules:
        _follow(package, module)
    elif not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package, module))


class _Finder(MetaPathFinder):
    """Lets the others find the package, and has its loader do more at the end."""

    def __init__(self, package: str, module: str) -> None:
        self.package, self.module = package, module

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        # A folder without an __init__.py is a package too, and has nothing to run.
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        # Specs are also asked for by those who only want to know whether there is such a package.
        spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
        return spec

    def _execute(self, execute: Any, module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        _follow(self.package, self.module)


def _follow(package: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        # Whoever imports the package need not want anything of ours.
        warnings.warn(f"{module} cannot be used with this version of {package}: {error!r}", stacklevel=2)
