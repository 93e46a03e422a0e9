"""Plans: what becomes of every mixer's state, as a value, in a file, and applied to weights."""
