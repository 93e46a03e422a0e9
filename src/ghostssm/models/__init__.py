"""Models: a mixer under the field's names, its forward pass in our ops, every family, and our own model class."""
