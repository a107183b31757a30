"""Connectionist temporal classification: texts of a probability of each symbol at each step.

    B(π)       merges equal neighbours of a path π, then drops blanks (symbol 0)
    p(l | x)   = Σ of Π_t y[t, π_t] over all paths with B(π) = l

Graves et al., "Connectionist Temporal Classification", ICML 2006; prefix search after Hannun et
al., arXiv 1408.2873. Without PyTorch, and exact: with no limit of width, ``beam`` finds the
likeliest text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smallfry_runtime.decoders import chosen_settings
from smallfry_runtime.errors import UsageError

__all__ = [
    "Settings",
    "Text",
    "beam",
    "decode",
    "edit_distance",
    "greedy",
    "log_likelihood",
    "log_softmax",
]

Floats = NDArray[np.float64]
BLANK = 0
STEP = 4  # pixels
WIDEST = 100  # prefixes: a word of a picture takes half a second
FAR = 3  # edits between the greedy text and the words of a lexicon that are considered


@dataclass(frozen=True)
class Settings:
    """Settings of decoding.

    Args:
        beam: Prefixes kept at each step, at most 100; 0 takes the likeliest symbol of each
            step alone.
        words: Words to choose from; empty allows any text.

    Raises:
        UsageError: A beam out of range, or words that are no list of texts.
    """

    beam: int = 0
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        if type(self.beam) is not int or not 0 <= self.beam <= WIDEST:
            raise UsageError(f"beam is a whole number from 0 to {WIDEST}, got {self.beam!r}")
        listed = isinstance(self.words, list | tuple)
        if not listed or not all(isinstance(word, str) for word in self.words):
            raise UsageError("words must be a list of texts")


class Text(NamedTuple):
    """Decoded text."""

    symbols: tuple[int, ...]
    log_probability: float  # of the path if greedy, else of the text
    steps: tuple[tuple[int, int], ...]  # first and last step of each symbol, on the likeliest path


def decode(
    outputs: NDArray[Any], classes: Sequence[str], settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Decode logits (images, steps, symbols) to texts.

    Args:
        outputs: The logits.
        classes: Symbols; the first is the blank.
        settings: See ``Settings``.

    Returns:
        For each image its ``text``, ``confidence``, and ``characters`` with their first and last
        column of pixels.

    Raises:
        UsageError: A setting that is not there, an empty word, or words with other symbols.
    """
    chosen = chosen_settings(Settings, settings)
    numbers = {symbol: number for number, symbol in enumerate(classes)}
    words = [_spelled(word, numbers) for word in chosen.words]
    return [_to_dict(_best(log_softmax(row), chosen.beam, words), classes) for row in outputs]


def right(outputs: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the images (images,) whose greedy text is the label, (images, symbols), 0 for none."""
    pairs = zip(outputs, labels, strict=True)
    found = [greedy(log_softmax(row)).symbols == _label(label) for row, label in pairs]
    return np.array(found, np.bool_)


def log_softmax(logits: NDArray[Any]) -> Floats:
    """Compute logarithms of probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def greedy(logs: Floats) -> Text:
    """Decode the likeliest path of (steps, symbols).

    Example:
        >>> greedy(np.log([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])).symbols
        (1, 1)
    """
    path = logs.argmax(axis=1).tolist()
    symbols: list[int] = []
    steps: list[tuple[int, int]] = []
    for step, symbol in enumerate(path):
        if symbol != BLANK and step and path[step - 1] == symbol:
            steps[-1] = (steps[-1][0], step)
        elif symbol != BLANK:
            symbols.append(symbol)
            steps.append((step, step))
    return Text(tuple(symbols), float(logs.max(axis=1).sum()), tuple(steps))


def beam(logs: Floats, width: int) -> Text:
    """Decode the likeliest text by a search over prefixes.

    Of a prefix, the probabilities of all its paths that end in the blank and in its last symbol are
    kept apart. Equal ones are ordered by the prefix.

    Args:
        logs: (steps, symbols).
        width: Prefixes kept at each step.
    """
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for row in logs.tolist():
        found: dict[tuple[int, ...], list[float]] = {}

        def add(
            prefix: tuple[int, ...],
            end: int,
            value: float,
            found: dict[tuple[int, ...], list[float]] = found,
        ) -> None:
            entry = found.setdefault(prefix, [-np.inf, -np.inf])
            entry[end] = float(np.logaddexp(entry[end], value))

        for prefix, (blank, symbol) in kept.items():
            both = float(np.logaddexp(blank, symbol))
            add(prefix, 0, both + row[BLANK])
            if prefix:
                add(prefix, 1, symbol + row[prefix[-1]])
            for number in range(1, len(row)):
                again = bool(prefix) and number == prefix[-1]
                add((*prefix, number), 1, (blank if again else both) + row[number])
        ranked = sorted((-np.logaddexp(ends[0], ends[1]), prefix) for prefix, ends in found.items())
        kept = {prefix: (found[prefix][0], found[prefix][1]) for _, prefix in ranked[:width]}
    symbols, (blank, symbol) = next(iter(kept.items()))
    return Text(symbols, float(np.logaddexp(blank, symbol)), _aligned(logs, symbols))


def log_likelihood(logs: Floats, symbols: Sequence[int]) -> float:
    """Compute log p of a text given (steps, symbols) by the forward recursion."""
    alpha = _forward(logs, symbols, np.logaddexp)
    return float(np.logaddexp.reduce(alpha[-1, -2:]))


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the insertions, deletions and replacements from one sequence to another.

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    before = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        row = [i]
        for j, right in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right)))
        before = row
    return before[-1]


def _best(logs: Floats, width: int, words: Sequence[tuple[int, ...]]) -> Text:
    if not words:
        return beam(logs, width) if width else greedy(logs)
    start = greedy(logs).symbols
    near = [word for word in words if edit_distance(word, start) <= FAR] or words
    best = max(near, key=lambda word: (log_likelihood(logs, word), [-n for n in word]))
    return Text(best, log_likelihood(logs, best), _aligned(logs, best))


def _forward(logs: Floats, symbols: Sequence[int], join: Any) -> Floats:
    """Compute α (steps, 2 symbols + 1) on the text with blanks between and around its symbols."""
    states = [BLANK, *(each for symbol in symbols for each in (symbol, BLANK))]
    alpha = np.full((len(logs), len(states)), -np.inf)
    alpha[0, :2] = logs[0, states[:2]]
    skips = np.array([i > 1 and s != BLANK and s != states[i - 2] for i, s in enumerate(states)])
    for step in range(1, len(logs)):
        before = alpha[step - 1]
        total = join(before, np.concatenate([[-np.inf], before[:-1]]))
        two = np.concatenate([[-np.inf, -np.inf], before[:-2]])[: len(states)]
        alpha[step] = join(total, np.where(skips, two, -np.inf)) + logs[step, states]
    return alpha


def _aligned(logs: Floats, symbols: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Find the first and last step of each symbol on the likeliest path of a text."""
    if not symbols:
        return ()
    alpha = _forward(logs, symbols, np.maximum)
    last = alpha.shape[1] - 1
    state = last if alpha[-1, last] >= alpha[-1, last - 1] else last - 1
    states = [state]
    for step in range(len(logs) - 1, 0, -1):
        before = [state, state - 1]
        if state % 2 and state > 1 and symbols[state // 2] != symbols[state // 2 - 1]:
            before.append(state - 2)
        state = max((s for s in before if s >= 0), key=lambda s: alpha[step - 1, s])
        states.append(state)
    path = states[::-1]
    found = []
    for number in range(len(symbols)):
        at = [step for step, state in enumerate(path) if state == 2 * number + 1]
        found.append((at[0], at[-1]) if at else (0, 0))  # of a text longer than the steps
    return tuple(found)


def _to_dict(text: Text, classes: Sequence[str]) -> dict[str, Any]:
    names = [classes[symbol] for symbol in text.symbols]
    return {
        "text": "".join(names),
        "confidence": float(np.exp(text.log_probability)),
        "characters": [
            {"char": name, "start": first * STEP, "end": last * STEP + STEP - 1}
            for name, (first, last) in zip(names, text.steps, strict=True)
        ],
    }


def _spelled(word: str, numbers: Mapping[str, int]) -> tuple[int, ...]:
    if not word:
        raise UsageError("the word '' has no symbols: leave it out of the words")
    unknown = sorted({*word} - {*numbers})
    if unknown:
        raise UsageError(
            f"the word '{word}' has symbols unknown to the model: {unknown}; leave it out of the "
            "words"
        )
    return tuple(numbers[symbol] for symbol in word)


def _label(row: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(row[row != BLANK].tolist())
