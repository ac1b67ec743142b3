"""Axes as products of atoms, some of which are one and the same.

An axis is a product of *atoms*, the slowest first: an axis that was merged from (h, w, c) has three, one that was never
cut or merged has one, an axis of length 1 has none. Where the axes of two arrays must agree their atoms are *united*;
where an axis is *cut*, its atom is replaced by two in every axis that has it. What must stay as it is gets *blocked*,
with a reason.
"""

import math
from collections.abc import Sequence

Axis = tuple[int, ...]
Axes = tuple[Axis, ...]


class Atoms:
    """Atoms, which of them are united, and what blocks them.

    A united atom has one representative; a cut one has two parts. `resolve` sees through both.
    """

    def __init__(self):
        self._sizes: list[int] = []
        self._parents: list[int] = []
        self._parts: dict[int, Axis] = {}
        self._reasons: dict[int, str] = {}
        self._marks: dict[int, frozenset[str]] = {}

    def axis(self, size: int, reason: str | None = None) -> Axis:
        """A new axis, unlike all others, and blocked if there is a reason."""
        if size == 1:
            return ()
        self._sizes.append(size)
        self._parents.append(len(self._parents))
        atom = self._parents[-1]
        if reason is not None:
            self._reasons[atom] = reason
        return (atom,)

    def array(self, shape: Sequence[int], reason: str | None = None) -> Axes:
        """New axes for an array."""
        return tuple(self.axis(size, reason) for size in shape)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in representatives that are not cut."""
        atoms: list[int] = []
        for atom in map(self._root, axis):
            atoms.extend(self.resolve(self._parts[atom]) if atom in self._parts else (atom,))
        return tuple(atoms)

    def size(self, *atoms: int) -> int:
        """Product of the lengths of atoms: `size(*axis)` is the length of an axis."""
        return math.prod(self._sizes[atom] for atom in atoms)

    def reason(self, atom: int) -> str | None:
        """Why a representative is blocked, or `None`."""
        return self._reasons.get(atom)

    def marks(self, axis: Axis) -> frozenset[str]:
        """What is known of any atom of an axis: "input" of the program, "reduced" by a sum or the like."""
        return frozenset().union(*(self._marks.get(atom, frozenset()) for atom in self.resolve(axis)))

    def block(self, axis: Axis, reason: str) -> None:
        """Blocks all atoms of an axis; the first reason is kept."""
        for atom in self.resolve(axis):
            self._reasons.setdefault(atom, reason)

    def mark(self, axis: Axis, mark: str) -> None:
        """Notes something about all atoms of an axis."""
        for atom in self.resolve(axis):
            self._marks[atom] = self._marks.get(atom, frozenset()) | {mark}

    def unite(self, a: Axis, b: Axis, reason: str) -> None:
        """Makes two axes of one length the same; blocks both, for the reason, if their atoms do not fit together."""
        a, b = self.resolve(a), self.resolve(b)
        while a and b:
            short = min(self.size(a[0]), self.size(b[0]))
            if any(self.size(axis[0]) % max(short, 1) for axis in (a, b)):
                break
            for axis in (a, b):
                if self.size(axis[0]) > short:
                    self.cut(axis[0], short)
            a, b = self.resolve(a), self.resolve(b)
            self._join(a[0], b[0])
            a, b = self.resolve(a[1:]), self.resolve(b[1:])
        self.block((*a, *b), f"{reason}: its axes are not cut alike")

    def cut(self, atom: int, outer: int) -> None:
        """Replaces a representative by two atoms of lengths `outer` and size / outer."""
        reason = self._reasons.get(atom)
        parts = (*self.axis(outer, reason), *self.axis(self._sizes[atom] // outer, reason))
        for part in parts:
            self._marks[part] = self._marks.get(atom, frozenset())
        self._parts[atom] = parts

    def _root(self, atom: int) -> int:
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom

    def _join(self, a: int, b: int) -> None:
        if a == b:
            return
        self._parents[b] = a
        if b in self._reasons:
            self._reasons.setdefault(a, self._reasons[b])
        self._marks[a] = self._marks.get(a, frozenset()) | self._marks.get(b, frozenset())
