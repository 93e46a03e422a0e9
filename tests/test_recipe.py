"""Recipes as text."""

from __future__ import annotations

import pytest

from ghostssm.choices import DEFAULT_RECIPE
from ghostssm.errors import InputError
from ghostssm.pruning.recipe import Recipe
from ghostssm.recovery import Step


@pytest.mark.parametrize(
    "text", ["ghost", "output+repair", "ghost+refit7", "balanced+per-layer", "output+refit30+repair+per-layer"]
)
def test_there_and_back(text: str) -> None:
    assert str(Recipe.parse(text)) == text


def test_defaults() -> None:
    assert str(Recipe.parse("output+refit+repair")) == DEFAULT_RECIPE
    assert str(Recipe.parse("ghost+refit")) == "ghost+refit100"
    assert Recipe.parse("ghost") == Recipe("ghost", steps=(), per_layer=False)
    assert Recipe.parse(DEFAULT_RECIPE).stock


def test_steps_keep_the_order_in_which_they_are_written() -> None:
    assert [step.name for step in Recipe.parse("ghost+repair+refit9").steps] == ["repair", "refit"]


def test_steps_of_the_whole_model_come_last_as_they_are_carried_out() -> None:
    assert str(Recipe.parse("ghost+distill9+repair+refit9")) == "ghost+repair+refit9+distill9"


@pytest.mark.parametrize("text", ["", "gost", "ghost+", "ghost+mend", "ghost+refitx", "+repair"])
def test_nonsense_is_refused_in_words(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        Recipe.parse(text)


def test_a_method_that_cuts_no_state_has_none_to_divide() -> None:
    with pytest.raises(InputError, match="leaves the state whole"):
        Recipe.parse("sparsegpt+per-layer")


def test_amounts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="number of refit is 0"):
        Step("refit", 0)
    with pytest.raises(InputError, match="takes no number"):
        Recipe.parse("ghost+repair3")
