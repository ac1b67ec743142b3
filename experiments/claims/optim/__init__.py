"""The claims of the optim room, one module a method."""

__all__: list[str] = []
