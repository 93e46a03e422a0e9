"""Make transformers' auto classes know our model classes as soon as they exist, without importing them.

``import ghostssm`` alone must do, before or after transformers, and must not take the seconds that PyTorch needs. So
`ghostssm.models.own_class.classes` is imported right after transformers' auto classes. If these are imported from
within the Mamba-2 classes, which ours build on, it waits for the end of those.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ghostssm.errors import InputError

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 23), (5, 23)
"""Versions that were tried; others may lack what `ghostssm.models.transformers_private` uses."""
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_BASE_CLASSES = "transformers.models.mamba2.modeling_mamba2"


def check_transformers() -> None:
    """Raise InputError for a version of transformers that was not tried; takes no time."""
    installed = importlib.metadata.version("transformers")
    if not OLDEST_TRANSFORMERS <= tuple(map(int, re.findall(r"\d+", installed)[:2])) <= NEWEST_TRANSFORMERS:
        (major, oldest), (_, newest) = OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS
        raise InputError(
            f"transformers {installed} is installed, of which ghostssm uses parts that change between versions; it was "
            f"tried with {major}.{oldest} up to {major}.{newest}. Install one of these, "
            f"pip install 'transformers>={major}.{oldest},<{major}.{newest + 1}', or a newer ghostssm."
        )


def register_with_transformers() -> None:
    """Register now if transformers' auto classes are there, else when they come."""
    if _AUTO_CLASSES in sys.modules:
        import ghostssm.models.own_class.classes  # noqa: F401  (registers itself)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds both modules where Python would, once each, with a loader that registers our classes afterwards."""

    def __init__(self) -> None:
        self._awaited = {_AUTO_CLASSES, _BASE_CLASSES} - sys.modules.keys()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._awaited:
            return None
        self._awaited.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader
        self.running = False

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        self.running = True
        try:
            self._loader.exec_module(module)
        finally:
            self.running = False
        module.__spec__.loader = self._loader
        base = sys.modules.get(_BASE_CLASSES)
        loader = None if base is None or base.__spec__ is None else base.__spec__.loader
        if not (isinstance(loader, _Loader) and loader.running):
            import ghostssm.models.own_class.classes  # noqa: F401
