"""Pruning: a recipe is carried out over a model, which gives a plan."""
