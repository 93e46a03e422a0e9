"""Recipes as text."""

from __future__ import annotations

import pytest

from ghostssm.errors import InputError
from ghostssm.pruning.recipe import DEFAULT_RECIPE, DEFAULT_REFIT_STEPS, Recipe


@pytest.mark.parametrize(
    "text", ["ghost", "output+repair", "ghost+refit7", "balanced+per-layer", "output+refit30+repair+per-layer"]
)
def test_there_and_back(text: str) -> None:
    assert str(Recipe.parse(text)) == text


def test_defaults() -> None:
    assert Recipe.parse("output+repair+refit") == DEFAULT_RECIPE
    assert Recipe.parse("ghost+refit").refit == DEFAULT_REFIT_STEPS
    assert Recipe.parse("ghost") == Recipe("ghost", repair=False, refit=0, per_layer=False)
    assert DEFAULT_RECIPE.how.stock


@pytest.mark.parametrize("text", ["", "gost", "ghost+", "ghost+mend", "ghost+refitx", "+repair"])
def test_nonsense_is_refused_in_words(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        Recipe.parse(text)


def test_a_method_that_cuts_no_state_has_none_to_divide() -> None:
    with pytest.raises(InputError, match="leaves the state whole"):
        Recipe.parse("sparsegpt+per-layer")


def test_negative_steps_are_refused() -> None:
    with pytest.raises(InputError, match="refit steps is -1"):
        Recipe("ghost", refit=-1)
