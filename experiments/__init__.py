"""Experiments: the only place with side effects."""
