"""The claims of the losses room, one module a method."""

__all__ = []
