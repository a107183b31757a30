"""Policies for the choice of a student, one layer after the other.

removal    a bidirectional LSTM reads all layers; each is kept or removed, independently given these
shrinkage  LSTM cells; the share of each layer depends on the shares chosen before it

Both are trained by REINFORCE: ∇ E[R] = E[(R − b) ∇ log p], with an entropy bonus.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smallfry.search.n2n.layer import NUMBERS

__all__ = ["Policy", "Removal", "Shrinkage", "reinforce"]

HIDDEN, DEPTH = 30, 2
KEEP_BIAS = 2.0  # of the logit: few layers are removed at first
LARGEST_GRADIENT = 1.0
ENTROPY = 0.01  # weight of the bonus


class Policy(nn.Module):
    """Policy over sequences of actions, one for each layer."""

    def logits(self, layers: Tensor, actions: Tensor) -> Tensor:
        """Compute the logits of each layer's actions, given those of the layers before it.

        Args:
            layers: Descriptors, (layers, numbers).
            actions: Numbers of actions, (samples, layers); later ones have no effect.

        Returns:
            (samples, layers, actions).
        """
        raise NotImplementedError

    def sample(
        self, layers: Tensor, possible: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Draw sequences of actions.

        Args:
            layers: Descriptors, (layers, numbers).
            possible: Actions there are, bool, (layers, actions).
            count: Samples.
            generator: Random numbers.

        Returns:
            Numbers of actions, (samples, layers), int64.
        """
        raise NotImplementedError

    def score(self, layers: Tensor, possible: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of sequences, and the entropy along them, (samples,)."""
        logs = masked(self.logits(layers, actions), possible)
        chosen = logs.gather(2, actions[..., None])[..., 0].sum(1)
        finite = logs.masked_fill(~possible, 0.0)
        return chosen, -(logs.exp() * finite).sum((1, 2))


class Removal(Policy):
    """Policy of removal: action 0 removes a layer, 1 keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUMBERS, HIDDEN, DEPTH, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 2)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([0.0, KEEP_BIAS]))

    def logits(self, layers: Tensor, actions: Tensor) -> Tensor:
        """Compute the logits, the same for all samples."""
        found: Tensor = self.head(self.lstm(layers[None])[0])
        return found.expand(len(actions), -1, -1)

    @torch.no_grad()
    def sample(
        self, layers: Tensor, possible: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Draw the actions of all layers at once."""
        logits = self.logits(layers, torch.zeros(1, len(layers)))[0]
        shares = masked(logits, possible).exp()
        return torch.multinomial(shares, count, replacement=True, generator=generator).T


class Shrinkage(Policy):
    """Policy of widths: an action is the number of a share.

    Args:
        shares: The shares there are.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self.shares = torch.tensor(list(shares), dtype=torch.get_default_dtype())
        self.lstm = nn.LSTM(NUMBERS + 1, HIDDEN, DEPTH, batch_first=True)
        self.head = nn.Linear(HIDDEN, len(shares))

    def logits(self, layers: Tensor, actions: Tensor) -> Tensor:
        """Compute the logits; each layer's depend on the shares of the ones before it."""
        before = torch.cat([torch.ones(len(actions), 1), self.shares[actions[:, :-1]]], 1)
        rows = layers.expand(len(actions), -1, -1)
        inputs = torch.cat([rows, before.to(layers)[..., None]], 2)
        found: Tensor = self.head(self.lstm(inputs)[0])
        return found

    @torch.no_grad()
    def sample(
        self, layers: Tensor, possible: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Draw the actions of one layer after the other."""
        before, state = torch.ones(count), None
        actions = []
        for row, allowed in zip(layers, possible, strict=True):
            inputs = torch.cat([row.expand(count, -1), before.to(row)[:, None]], 1)
            outputs, state = self.lstm(inputs[:, None], state)
            shares = masked(self.head(outputs[:, 0]), allowed).exp()
            actions.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
            before = self.shares[actions[-1]]
        return torch.stack(actions, 1)


def masked(logits: Tensor, possible: Tensor) -> Tensor:
    """Compute log-probabilities of the possible actions, −∞ of the others."""
    return logits.masked_fill(~possible, -torch.inf).log_softmax(-1)


def reinforce(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    layers: Tensor,
    possible: Tensor,
    actions: Tensor,
    advantages: Tensor,
) -> None:
    """Take a step along the estimated gradient of the expected reward.

    Args:
        policy: Changed in place.
        optimizer: Of its parameters.
        layers: Descriptors, (layers, numbers).
        possible: Actions there are, (layers, actions).
        actions: Sampled sequences, (samples, layers).
        advantages: Rewards of these less a baseline, (samples,).
    """
    logs, entropy = policy.score(layers, possible, actions)
    loss = -(advantages * logs).mean() - ENTROPY * entropy.mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(policy.parameters(), LARGEST_GRADIENT)
    optimizer.step()
