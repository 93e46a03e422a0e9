"""The use cases: each is one function from a request to an outcome, in a module of its name."""
