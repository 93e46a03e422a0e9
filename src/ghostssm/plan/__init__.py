"""Plans: what happens to every mixer's state, as a value, in a file, and applied to weights."""
