"""Helpers that anything in the package may import."""
