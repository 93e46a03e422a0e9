"""Streamed runs: models larger than memory, one block at a time, shared by processes, resumable."""
