"""Workflows: the use cases, each one function from a request to an outcome."""
