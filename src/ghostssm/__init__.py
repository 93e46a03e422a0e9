"""ghostssm: trained Mamba-2 models that decode with a much smaller recurrent state.

outcome = ghostssm.prune("state-spaces/mamba2-130m", "wikitext2", state_size=64, output="mamba2-130m-n64")
outcome = ghostssm.prune(model, strings, tokenizer=tokenizer, state_size=64)  # all of it in memory
outcome.checkpoint.model.generate(...)
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module, resources
from typing import Any

from ghostssm.models.registration import check_transformers, register_with_transformers


def _places() -> dict[str, tuple[str, str]]:
    """Public name to its module and its name there, as __init__.pyi has them."""
    stub = ast.parse((resources.files("ghostssm") / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {str(each.asname): (str(node.module), each.name) for node in imports for each in node.names}


_PLACES = _places()
__all__ = sorted(_PLACES)  # noqa: PLE0605  (names of the stub)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: PyTorch takes seconds, and ``ghostssm --help`` needs none of it."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ghostssm' has no attribute {name!r}")
    module, own_name = _PLACES[name]
    if module == "ghostssm._version":
        return getattr(import_module(module), own_name)
    check_transformers()
    value = globals()[name] = getattr(import_module(module), own_name)
    import_module("ghostssm.progress").register_screen(import_module("ghostssm.report.screen").progress_line)
    if "IPython" in sys.modules:
        import_module("ghostssm.report.showing").register_with_ipython()
    return value


def __dir__() -> list[str]:
    """The public names, also before their first use: for completion."""
    return __all__


register_with_transformers()
