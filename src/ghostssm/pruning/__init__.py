"""Pruning: a recipe carried out over a model, which gives a plan."""
