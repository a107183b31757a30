"""Conductance-based neurons with spike-timing-dependent plasticity, in NumPy.

Units are mV and ms; conductances have none. Forward Euler with a step dt:

    excitatory   100 dv/dt = (-65 - v) + g_e (0 - v) + g_i (-100 - v)
    inhibitory    10 dv/dt = (-60 - v) + g_e (0 - v) + g_i (-85 - v)
    g_e and g_i decay with 1 and 0.5

An excitatory neuron fires above θ - 72 if 50 ms have passed since its last spike, is held for 5 ms
at -65, and raises θ. An inhibitory one fires above -40 and is held for 2 ms at -45. An excitatory
spike excites the partner of the neuron, whose spike inhibits all others. A spike of an input adds
its weight to g_e when it arrives:

    arrival          w ← clip(w + 0.0001 post₁);  pre ← 1
    excitatory spike w ← clip(w + 0.01 pre post₂);  post₁, post₂ ← 1

with traces pre, post₁ and post₂ that decay with 20, 20 and 40. Hussaini et al., ICRA 2023, after
Diehl & Cook, Frontiers in Computational Neuroscience 2015.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layer", "Plasticity", "normalise_weights"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
REST_E, REST_I = -65.0, -60.0
RESET_E, RESET_I = -65.0, -45.0
REVERSAL_E, REVERSAL_I = -100.0, -85.0  # of inhibition; that of excitation is 0
TAU_E, TAU_I, TAU_GE, TAU_GI = 100.0, 10.0, 1.0, 0.5
OFFSET, THRESHOLD_I = -72.0, -40.0
HELD_E, HELD_I, LOCKOUT = 5.0, 2.0, 5.0
CLOCK = 0.1  # of the timer: 5 of its milliseconds are 50
TO_INHIBITORY, TO_EXCITATORY = 10.4, 17.0  # weights
THETA, TAU_THETA = 20.0, 1e7
TAU_PRE, TAU_POST1, TAU_POST2 = 20.0, 20.0, 40.0
RATE_PRE, RATE_POST = 1e-4, 1e-2
DRIVE = 78.0  # sum of a neuron's input weights
NEVER = -(10**9)  # step of a spike that has not come
STATE = ("v_e", "v_i", "ge_e", "gi_e", "ge_i", "timer", "thresholds", "_last_e", "_last_i")


@dataclass
class Layer:
    """Excitatory neurons with their inhibitory partners; arrays are (…, neurons).

    Args:
        shape: Of the arrays; the last dimension holds the neurons of a module.
        dt: Step.
        theta: Thresholds to go on with; else 20.
        theta_step: Rise of θ with a spike; 0 freezes θ, as in recording and testing.
    """

    shape: tuple[int, ...]
    dt: float
    theta: Floats | None = None
    theta_step: float = 0.05

    def __post_init__(self) -> None:
        self.v_e, self.v_i = np.full(self.shape, -105.0), np.full(self.shape, -100.0)
        self.ge_e, self.gi_e, self.ge_i = (np.zeros(self.shape) for _ in range(3))
        self.timer = np.zeros(self.shape)
        self.thresholds = np.full(self.shape, THETA) if self.theta is None else self.theta.copy()
        self.step = 0
        self._last_e = np.full(self.shape, NEVER)
        self._last_i = np.full(self.shape, NEVER)

    def repeated(self, count: int) -> "Layer":
        """Return ``count`` copies of the neurons, along a new first dimension."""
        found = Layer((count, *self.shape), self.dt, theta_step=self.theta_step)
        for name in STATE:
            setattr(found, name, np.repeat(getattr(self, name)[None], count, axis=0))
        found.step = self.step
        return found

    def advance(self) -> tuple[Bools, Bools]:
        """Integrate a step, and find the spikes; deliver inputs and then ``reset``.

        Returns:
            Excitatory and inhibitory spikes.
        """
        dt = self.dt
        free_e = self.step - self._last_e >= round(HELD_E / dt)
        free_i = self.step - self._last_i >= round(HELD_I / dt)
        v, ge, gi = self.v_e, self.ge_e, self.gi_e
        change = (REST_E - v - ge * v + gi * (REVERSAL_E - v)) * (dt / TAU_E)
        self.v_e = np.where(free_e, v + change, v)
        w = self.v_i
        change = (REST_I - w - self.ge_i * w) * (dt / TAU_I)  # nothing inhibits the inhibitory
        self.v_i = np.where(free_i, w + change, w)
        self.ge_e *= 1 - dt / TAU_GE
        self.gi_e *= 1 - dt / TAU_GI
        self.ge_i *= 1 - dt / TAU_GE
        self.timer += CLOCK * dt
        if self.theta_step:
            self.thresholds *= 1 - dt / TAU_THETA
        spikes = (self.v_e > self.thresholds + OFFSET) & (self.timer > LOCKOUT) & free_e
        inhibitory = (self.v_i > THRESHOLD_I) & free_i
        if spikes.any():
            self.ge_i += TO_INHIBITORY * spikes
        if inhibitory.any():
            others = inhibitory.sum(axis=-1, keepdims=True) - inhibitory
            self.gi_e += TO_EXCITATORY * others
        return spikes, inhibitory

    def reset(self, spikes: Bools, inhibitory: Bools) -> None:
        """Reset the neurons that have fired, and end the step."""
        if spikes.any():
            self.v_e[spikes] = RESET_E
            self.timer[spikes] = 0.0
            self._last_e[spikes] = self.step
            if self.theta_step:
                self.thresholds[spikes] += self.theta_step
        if inhibitory.any():
            self.v_i[inhibitory] = RESET_I
            self._last_i[inhibitory] = self.step
        self.step += 1


class Plasticity:
    """Input weights of modules (modules, inputs, neurons), and the traces that change them.

    Without delays all synapses of an input have one trace. With delays each synapse has its own.

    Args:
        weights: Changed in place.
        dt: Step.
        most: Greatest weight.
        delays: Steps of each synapse, of the shape of the weights; None for none.
        learns: False leaves the weights alone.
    """

    def __init__(
        self,
        weights: Floats,
        dt: float,
        most: float = 1.0,
        delays: NDArray[np.int64] | None = None,
        learns: bool = True,
    ) -> None:
        self.weights, self.dt, self.most, self.learns = weights, dt, most, learns
        modules, inputs, neurons = weights.shape
        self._post = np.full((modules, neurons), NEVER)
        self._pre = np.full((modules, inputs) if delays is None else weights.shape, NEVER)
        self._delays = delays
        if delays is not None:
            self._coming = np.zeros((int(delays.max()) + 1, *weights.shape), np.bool_)

    def arrive(self, step: int, spikes: Bools) -> Floats:
        """Deliver the input spikes of a step, and apply the rule of arrivals.

        Args:
            step: The step.
            spikes: (modules, inputs), as they leave.

        Returns:
            The rise of g_e, (modules, neurons).
        """
        if self._delays is not None:
            return self._arrive_late(step, spikes)
        rise: Floats = np.matmul(spikes[:, None].astype(np.float64), self.weights)[:, 0]
        if self.learns:
            m, i = spikes.nonzero()
            changed = self.weights[m, i] + RATE_PRE * self._trace(self._post, step, TAU_POST1)[m]
            self.weights[m, i] = np.minimum(changed, self.most)
            self._pre[spikes] = step
        return rise

    def _arrive_late(self, step: int, spikes: Bools) -> Floats:
        assert self._delays is not None
        m, i = spikes.nonzero()
        slots = (step + self._delays[m, i]) % len(self._coming)
        neurons = np.arange(self.weights.shape[2])
        self._coming[slots, m[:, None], i[:, None], neurons] = True
        here = self._coming[step % len(self._coming)]
        rise: Floats = (self.weights * here).sum(axis=1)
        if self.learns:
            post = np.broadcast_to(
                self._trace(self._post, step, TAU_POST1)[:, None], self.weights.shape
            )
            self.weights[here] = np.minimum(self.weights[here] + RATE_PRE * post[here], self.most)
            self._pre[here] = step
        here[...] = False
        return rise

    def fire(self, step: int, spikes: Bools) -> None:
        """Apply the rule of excitatory spikes (modules, neurons)."""
        if not self.learns or not spikes.any():
            return
        m, j = spikes.nonzero()
        pre = self._pre[m] if self._delays is None else self._pre[m, :, j]
        post = self._trace(self._post, step, TAU_POST2)[m, j]
        rise = RATE_POST * self._trace(pre, step, TAU_PRE) * post[:, None]
        self.weights[m, :, j] = np.minimum(self.weights[m, :, j] + rise, self.most)
        self._post[spikes] = step

    def _trace(self, last: NDArray[Any], step: int, tau: float) -> Floats:
        """Return the traces of events whose last steps are given; 0 of those that never came."""
        found: Floats = np.exp(-(step - last) * (self.dt / tau))
        return found


def normalise_weights(weights: Floats) -> None:
    """Scale the input weights of each neuron to a sum of 78, in place; (…, inputs, neurons)."""
    weights *= DRIVE / weights.sum(axis=-2, keepdims=True)
