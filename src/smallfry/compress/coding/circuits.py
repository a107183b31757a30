"""Hidden Chow–Liu trees: probabilistic circuits, for learning a distribution and coding samples.

Variables x_1 … x_D with C categories have hidden states z_1 … z_D of M values, and a tree of high
mutual information connects the states:

    p(x) = Σ_z π(z_root) Π_c A_c[z_parent, z_c] Π_i E_i[z_i, x_i]

``smallfry_runtime.latent_trees`` codes samples with it, ``em`` learns the parameters. Source: Liu,
Mandt, Van den Broeck, Lossless compression with probabilistic circuits, ICLR 2022.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smallfry.compress.coding.chow_liu import levels, mutual_information, spanning_tree
from smallfry.compress.coding.em import EMConfig, EMSettings, learn
from smallfry.compress.coding.rans import encode, states_for
from smallfry.compress.coding.tree_likelihood import Tables, log_probability, logs_of
from smallfry.errors import DataError, UsageError
from smallfry_runtime.latent_trees import Floats, LatentTree
from smallfry_runtime.rans import TOTAL, is_justified, quantized

MAGIC = b"HCLT\x01"
BATCH = 1024  # samples whose probabilities are computed at a time


@dataclass(frozen=True, eq=False)
class HCLT:
    """Hidden Chow–Liu tree.

    Args:
        parents: Parent of each variable, -1 for the root.
        root: π, (states,).
        transitions: A of each variable, rows sum to one, (variables or 1, states, states); one for
            all variables is shared. That of the root is not used.
        emissions: E of each variable, (variables or 1, states, categories).

    Raises:
        DataError: Parents that form no tree, or tables of other shapes.

    Example:
        >>> import numpy as np
        >>> from smallfry.compress.codec import HCLT
        >>> images = np.random.default_rng(0).integers(0, 2, (100, 1)).repeat(6, axis=1)
        >>> model = HCLT.fit(images, states=2, epochs=20)
        >>> data = model.encode(images)
        >>> bool((model.decode(data) == images).all()), len(data) < 100 * 6 / 8
        (True, True)
    """

    parents: tuple[int, ...]
    root: Floats
    transitions: Floats
    emissions: Floats

    def __post_init__(self) -> None:
        _ = self.tree  # validates

    @classmethod
    def fit(
        cls,
        samples: NDArray[np.integer],
        states: int = 16,
        epochs: int = 50,
        *,
        categories: int | None = None,
        **settings: Unpack[EMSettings],
    ) -> "HCLT":
        """Learn the tree and its parameters.

        Args:
            samples: Values from 0, (samples, variables).
            states: M; more give a better fit and cost their square in time.
            epochs: Passes through the samples.
            categories: C; default the largest value and one.
            settings: Fields of ``smallfry.compress.coding.em.EMConfig``.

        Raises:
            UsageError: No samples, values out of range, or settings that are not there.
        """
        count = require_samples(samples, categories)
        parents = spanning_tree(mutual_information(samples, count))
        return cls(parents, *learn(parents, samples, count, EMConfig(states, epochs, **settings)))

    @property
    def categories(self) -> int:
        """Number of values of a variable."""
        return int(self.emissions.shape[-1])

    @property
    def parameters(self) -> int:
        """Number of free parameters."""
        size = len(self.parents)
        shared = len(self.transitions) == 1
        edges = min(1, size - 1) if shared else size - 1
        states = len(self.root)
        emissions = len(self.emissions) * states * (self.categories - 1)
        return states - 1 + edges * states * (states - 1) + emissions

    @cached_property
    def tree(self) -> LatentTree:
        """Parameters in whole units, which the coder uses."""
        tables = (self.root, self.transitions, self.emissions)
        return LatentTree(self.parents, *(quantized(np.asarray(each)) for each in tables))

    @cached_property
    def fingerprint(self) -> bytes:
        """Hash of the coder's parameters, 16 bytes."""
        found = hashlib.sha256(np.array(self.parents, "<i4").tobytes())
        for table in (self.tree.root, self.tree.transitions, self.tree.emissions):
            found.update((table * TOTAL).astype("<u4").tobytes())
        return found.digest()[:16]

    @torch.no_grad()
    def log2_probability(self, samples: NDArray[np.integer]) -> Floats:
        """Compute log₂ p(x) of samples (samples, variables): (samples,)."""
        return self.marginal(samples, np.ones(len(self.parents), bool))

    @torch.no_grad()
    def marginal(self, samples: NDArray[np.integer], mask: NDArray[np.bool_]) -> Floats:
        """Compute log₂ of marginal probabilities.

        Args:
            samples: (samples, variables).
            mask: True for variables that are given, (variables,) or (samples, variables).

        Returns:
            (samples,).

        Raises:
            UsageError: Values out of range, or another number of variables.
        """
        values = self._require(samples)
        given = torch.from_numpy(np.broadcast_to(mask, samples.shape).copy())
        logs = logs_of(Tables(self.root, self.transitions, self.emissions))
        order = levels(self.parents)
        batches = zip(torch.split(values, BATCH), torch.split(given, BATCH), strict=True)
        parts = [log_probability(logs, self.parents, order, *batch) for batch in batches]
        found: Floats = (torch.cat(parts) / math.log(2)).numpy()
        return found

    def encode(self, samples: NDArray[np.integer]) -> bytes:
        """Code samples losslessly; the result decodes to them on every processor.

        Args:
            samples: (samples, variables), at least one.

        Raises:
            UsageError: Values out of range, or another number of variables.
        """
        values = self._require(samples).numpy()
        stream = encode_samples(self.tree, values)
        body = self.fingerprint + len(values).to_bytes(4, "little") + stream
        return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def decode(self, data: bytes) -> NDArray[np.int64]:
        """Decode the result of ``encode``: (samples, variables).

        Raises:
            DataError: Damaged, coded with another model, or of more work than its bytes justify.
        """
        body = data[9:]
        if data[:5] != MAGIC or len(body) < 20:
            raise DataError("not the output of HCLT.encode")
        if zlib.crc32(body) != int.from_bytes(data[5:9], "little"):
            raise DataError("the coded samples are damaged: their checksum is wrong")
        if body[:16] != self.fingerprint:
            raise DataError("the samples were coded with another model; load that one")
        count, stream = int.from_bytes(body[16:20], "little"), body[20:]
        if not is_justified(self.tree.work(stream, count), len(data)):
            raise DataError(f"{len(data)} bytes are too few for {count} coded samples")
        return self.tree.decode(stream, count)

    def _require(self, samples: NDArray[np.integer]) -> Tensor:
        require_samples(samples, self.categories)
        if samples.shape[1] != len(self.parents):
            raise UsageError(
                f"the model has {len(self.parents)} variables, and the samples "
                f"{samples.shape[1]}; give (samples, variables)"
            )
        return torch.from_numpy(samples.astype(np.int64))


def require_samples(samples: NDArray[np.integer], categories: int | None) -> int:
    """Validate samples and return the number of categories.

    Raises:
        UsageError: Not (samples, variables) of integers from 0 to categories − 1.
    """
    if samples.ndim != 2 or 0 in samples.shape or samples.dtype.kind not in "iu":
        raise UsageError(
            f"expected integers (samples, variables), got {samples.dtype} {samples.shape}"
        )
    least, most = int(samples.min()), int(samples.max())
    count = most + 1 if categories is None else categories
    if least < 0 or most >= count:
        raise UsageError(f"values must be 0 to {count - 1}, got {least} to {most}")
    return count


def encode_samples(tree: LatentTree, samples: NDArray[np.int64]) -> bytes:
    """Encode samples (samples, variables) to a stream, which ``tree.decode`` reads."""
    width = states_for(samples.size)
    blocks = -(-len(samples) // width)
    starts = np.zeros((blocks, len(tree.parents), width), np.int64)
    frequencies = np.full_like(starts, TOTAL)
    entered = [event.variable for event in tree.events if not event.is_return]
    place = {variable: k for k, variable in enumerate(entered)}
    block, lane = np.divmod(np.arange(len(samples)), width)
    for first in range(0, len(samples), BATCH):
        part = slice(first, first + BATCH)

        def visit(variable: int, belief: Floats, part: slice = part) -> NDArray[np.int64]:
            symbols: NDArray[np.int64] = samples[part, variable]
            at = (block[part], place[variable], lane[part])
            starts[at], frequencies[at] = tree.interval(variable, belief, symbols)
            return symbols

        tree.walk(len(samples[part]), visit)
    return encode(starts.reshape(-1, width), frequencies.reshape(-1, width))
