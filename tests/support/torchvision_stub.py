"""An empty torchvision, where there is none: models that look at images import it, and landings never call it.

Import this before vLLM.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


class _Anything(type):
    """Kind of a class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Dummy


class _Dummy(metaclass=_Anything):
    """Stands for every name of the package."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


class _Package(types.ModuleType):
    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Dummy


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        package: Any = _Package(spec.name)
        package.__path__ = []
        return package

    def exec_module(self, module: types.ModuleType) -> None: ...


if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(_Finder())
