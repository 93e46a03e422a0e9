"""Checks of what can be asked of a model, a recipe and a state size, before any work."""

from __future__ import annotations

from ghostssm.errors import InputError, ModelError
from ghostssm.methods import method_named, method_names
from ghostssm.pruning.recipe import Recipe


def check_original(is_stock: bool) -> None:
    """Raise ModelError for a model whose state is projected, or of a size of its own in some layer."""
    if not is_stock:
        raise ModelError("The model's state was projected or cut per layer before; prune the original instead.")


def check_streamable(recipe: Recipe) -> None:
    """Raise InputError unless a recipe can be carried out with one block in memory at a time."""
    fault = None
    unable = [step for step in recipe.steps if not step.registered.streamable]
    if not recipe.registered.streamable:
        fault = f"{recipe.method} needs the whole model at once"
    elif unable:
        fault = f"{unable[0]} changes the whole model at once"
    if fault:
        able = [name for name in method_names() if method_named(name).streamable]
        raise InputError(
            f"{fault}, so it can't be streamed. Leave out --stream, or take one of {', '.join(able)}, without a step "
            "that trains the whole model."
        )
