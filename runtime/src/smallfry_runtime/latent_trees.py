"""Coder of samples under a hidden Chow–Liu tree, which encoder and decoder share.

Each variable x_i has a hidden state z_i, and the tree connects the states (in each, `bel` is the
distribution of z_i given all symbols so far, M states, C categories):

    root        bel = π
    visit i     q(x) = Σ_z bel(z) E_i[z, x];  then  bel ← bel ⊙ E_i[:, x_i],  λ_i = E_i[:, x_i]
    descend     bel_c = bel_i A_c
    return      m = A_c λ_c;  bel_i ← bel_i ⊙ m;  λ_i ← λ_i ⊙ m

in pre-order: all D conditionals cost 2(D − 1) products by M×M matrices. A subtree still to come
needs nothing, as it sums to one.

Both sides must have the same numbers. Parameters are multiples of 2⁻²⁸, and beliefs are rounded to
multiples of 2⁻²⁴ after each step, so every sum of products is below 2⁵³ such units and exact in
float64: any order of summation, and any processor, gives the same bits.

Source: Liu, Mandt, Van den Broeck, Lossless compression with probabilistic circuits, ICLR 2022.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.errors import DataError
from smallfry_runtime.rans import (
    CELL_WORK,
    ROW_WORK,
    SYMBOL_WORK,
    TOTAL,
    Cumulative,
    Decoder,
    find,
    rows_of,
)

BELIEF = 2.0**24
MOST_LATENT = 256  # states, so that sums stay exact
MOST_BELIEFS = 2**26  # in memory at once, in a tree that is one path; encoders take 256 samples

Floats = NDArray[np.float64]
Rounding = Callable[[Floats], Floats]
Visit = Callable[[int, Floats], NDArray[np.integer]]


class Event(NamedTuple):
    """Step of the traversal: enter a variable, or return from it to its parent."""

    variable: int
    is_return: bool


class LatentTree:
    """Tree with parameters in units of 2⁻²⁸.

    Args:
        parents: Parent of each variable; -1 for the root.
        root: Cumulative π, (states + 1,).
        transitions: Cumulative rows of A, (variables or 1, states, states + 1); that of the root is
            not used.
        emissions: Cumulative rows of E, (variables or 1, states, categories + 1).

    Raises:
        DataError: Parents that form no tree, or tables of other shapes or sums.
    """

    def __init__(
        self,
        parents: Sequence[int],
        root: Cumulative,
        transitions: Cumulative,
        emissions: Cumulative,
    ) -> None:
        self.parents = tuple(parents)
        self.events = traversal(self.parents)
        size, states = len(self.parents), len(root) - 1
        expected = ((states + 1,), (states, states + 1), (states, emissions.shape[-1]))
        found = (root.shape, transitions.shape[1:], emissions.shape[1:])
        counts = {len(transitions), len(emissions)} - {1, size}
        if found != expected or counts or not 1 <= states <= MOST_LATENT:
            raise DataError(f"the tables of a latent tree have the shapes {found}")
        for table in (root, transitions, emissions):
            steps = np.diff(table, axis=-1)
            if (table[..., 0] != 0).any() or (table[..., -1] != TOTAL).any() or steps.min() < 1:
                raise DataError("the tables of a latent tree are no distributions")
        self.root = np.diff(root) / TOTAL
        self.transitions = np.diff(transitions, axis=-1) / TOTAL
        self.emissions = np.diff(emissions, axis=-1) / TOTAL
        self.sums = emissions / TOTAL

    @property
    def categories(self) -> int:
        """Number of symbols of a variable."""
        return int(self.emissions.shape[-1])

    def walk(self, count: int, visit: Visit, rounding: Rounding | None = None) -> None:
        """Visit all variables in pre-order with the beliefs of a batch.

        Args:
            count: Samples in the batch.
            visit: From a variable and its belief (count, states) to its symbols (count,).
            rounding: Rounding of beliefs; by default that of the coder.
        """
        rounded = _rounded if rounding is None else rounding
        stack: list[tuple[Floats, Floats]] = []
        for variable, is_return in self.events:
            transition = self.transitions[variable % len(self.transitions)]
            if is_return:
                message = rounded(_to_one(stack.pop()[1] @ transition.T))
                belief, likelihood = stack.pop()
                likelihood = rounded(_to_one(likelihood * message))
                stack.append((_normal(belief * message, rounded), likelihood))
                continue
            prior = stack[-1][0] @ transition if stack else np.tile(self.root, (count, 1))
            belief = rounded(prior)
            symbols = visit(variable, belief)
            emission = self.emissions[variable % len(self.emissions)].T[symbols]
            stack.append((_normal(belief * emission, rounded), rounded(_to_one(emission))))

    def interval(
        self, variable: int, belief: Floats, symbols: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Compute the sums c and the frequencies f of symbols, each (batch,)."""
        sums = self.sums[variable % len(self.sums)].T  # (categories + 1, states)
        total = belief.sum(axis=1)
        ends = [(belief * sums[symbols + k]).sum(axis=1) for k in (0, 1)]
        starts, stops = (self._share(e, total, symbols + k) for k, e in enumerate(ends))
        return starts, stops - starts

    def cumulative(self, variable: int, belief: Floats) -> Cumulative:
        """Compute the sums of frequencies of all symbols, (batch, categories + 1)."""
        sums = belief @ self.sums[variable % len(self.sums)]
        return self._share(sums, sums[:, -1:], np.arange(self.categories + 1))

    def _share(self, sums: Floats, total: Floats, symbols: NDArray[np.integer]) -> Cumulative:
        free = float(TOTAL - self.categories)  # what is left when each symbol has one unit
        return np.floor(sums / total * free).astype(np.int64) + symbols

    def work(self, stream: bytes, count: int) -> int:
        """Estimate the work of ``decode``, before it is done, in nanoseconds of a processor."""
        states, categories = len(self.root), self.categories
        products = (2 * states * states + states * categories) // 16
        each = SYMBOL_WORK + 2 * CELL_WORK * categories + products
        return len(self.parents) * (2 * ROW_WORK * rows_of(stream, count) + each * count)

    def decode(self, stream: bytes, count: int) -> NDArray[np.int64]:
        """Decode samples, in batches of the stream's number of states.

        Args:
            stream: Output of the encoder with the same tree.
            count: Number of samples.

        Returns:
            (count, variables).

        Raises:
            DataError: A damaged stream.
        """
        decoder = Decoder(stream)
        if min(decoder.states, count) * len(self.root) * len(self.parents) > MOST_BELIEFS:
            raise DataError("the coded stream is damaged: it has too many states for its tree")
        samples = np.empty((count, len(self.parents)), np.int64)
        for start in range(0, count, decoder.states):
            part = samples[start : start + decoder.states]

            def visit(
                variable: int, belief: Floats, part: NDArray[np.int64] = part
            ) -> NDArray[np.int64]:
                table = self.cumulative(variable, belief)
                symbols = find(table, decoder.slots()[: len(part)])
                rows = np.arange(len(part))
                starts = table[rows, symbols]
                decoder.advance(starts, table[rows, symbols + 1] - starts)
                part[:, variable] = symbols
                return symbols

            self.walk(len(part), visit)
        decoder.finish()
        return samples


def traversal(parents: Sequence[int]) -> tuple[Event, ...]:
    """Return the steps through a tree in pre-order, up to the last variable.

    Raises:
        DataError: The parents form no tree.
    """
    children: dict[int, list[int]] = {}
    for variable, parent in enumerate(parents):
        children.setdefault(parent, []).append(variable)
    stack = [Event(variable, False) for variable in children.get(-1, [])]
    events, entered = [], 0
    while len(stack) > 0 and entered < len(parents):
        event = stack.pop()
        events.append(event)
        if not event.is_return:
            entered += 1
            stack.append(Event(event.variable, True))
            stack += [Event(child, False) for child in reversed(children.get(event.variable, []))]
    if entered < len(parents) or len(children.get(-1, [])) != 1:
        raise DataError("the parents of the variables form no tree")
    return tuple(events)


def _rounded(values: Floats) -> Floats:
    """Round to multiples of 2⁻²⁴, none of them 0."""
    return (np.floor(values * BELIEF) + 1) / BELIEF


def _to_one(values: Floats) -> Floats:
    """Scale to a maximum of one; likelihoods are known up to a factor."""
    scaled: Floats = values / values.max(axis=1, keepdims=True)
    return scaled


def _normal(values: Floats, rounded: Rounding) -> Floats:
    return rounded(values / values.sum(axis=1, keepdims=True))
