"""Lottery tickets: masks found by training, and what starts under them."""

from steelyard.sparsity.lottery.iterative import Ticket, accept, iterative_pruning, rewind
from steelyard.sparsity.lottery.random_search import random_search

__all__ = ["Ticket", "accept", "iterative_pruning", "random_search", "rewind"]
