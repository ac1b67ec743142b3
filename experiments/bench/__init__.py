"""Costs as ratios measured side by side in one run. A room is a module with a function `bench()`."""
