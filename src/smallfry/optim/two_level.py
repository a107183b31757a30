"""Two-level natural gradient: a coarse level couples the blocks of a block-diagonal inverse.

With u the gradient, M the damped blocks of any other method here and z₁ = M⁻¹ u, a few directions
R₀ are corrected for the whole network's Fisher, layers coupled (Koroko et al. 2023, arXiv
2303.18083):

    z = z₁ + R₀ᵀ β,    β = (R₀ F• R₀ᵀ)⁻¹ R₀ (u − F• z₁),    F• = F + λ I

which never raises the energy ½ ‖z − F•⁻¹ u‖² in the norm of F•. F is that of some samples of the
batch that u comes from (``curvature/coarse.py``): so the coarse level acts on the steps that take
statistics, and the others have the fine level alone. With samples of an earlier batch, directions
that these don't span would be taken for flat, and steps along them would have no bound.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Unpack

from torch import Tensor, nn

from smallfry.curvature import Block, Observation, Rows
from smallfry.curvature.coarse import (
    FineLevel,
    coarse_correction,
    fine_level,
    krylov,
    nicolaides,
    preconditioned,
    residual,
    spectral,
    split,
)
from smallfry.curvature.kronecker import NotFiniteError, eigendecompose
from smallfry.curvature.terms import joined
from smallfry.errors import UsageError, nearest
from smallfry.optim.approximation import Approximation
from smallfry.optim.base import NaturalGradient
from smallfry.optim.block_rows import rows_of
from smallfry.optim.collectives import Collectives
from smallfry.optim.corrected import CorrectedProduct
from smallfry.optim.ekfac import DiagonalInBasis
from smallfry.optim.kfac import KroneckerProduct
from smallfry.optim.kpsvd import NearestProduct, NearestSum
from smallfry.optim.numerics import finite
from smallfry.optim.preconditioner import Preconditioner
from smallfry.optim.settings import CurvatureSettings, Settings, require_count
from smallfry.settings import fitted

FINE: dict[str, Callable[[], Approximation]] = {
    "kfac": KroneckerProduct,
    "ekfac": DiagonalInBasis,
    "kpsvd": NearestProduct,
    "deflation": NearestSum,
    "lanczos": lambda: NearestSum(solver="lanczos"),
    "kfac_corrected": CorrectedProduct,
}
SPACES = ("nicolaides", "spectral", "residual", "tko", "z1", "gradient", "previous")
Vector = Mapping[str, Tensor]
Space = Callable[[FineLevel[str], Callable[[str, Tensor], Tensor]], Sequence[Vector]]


class TwoLevel(NaturalGradient):
    """Natural gradient with a coarse level.

    Args:
        model: The model.
        lr: Learning rate of the covered parameters.
        fine: The fine level: "kfac", "ekfac", "kpsvd", "deflation", "lanczos", "kfac_corrected", or
            an ``Approximation`` with settings of its own.
        coarse: Directions, one for each layer and space: "nicolaides" (ones), "spectral" (smallest
            eigenvector of the fine level), "residual" (M⁻¹ of what z₁ leaves), "z1", "gradient",
            "previous" (the last coarse step's z), or "tko" (ones, in the additive form of
            Tselepidis et al. 2020, here with the exact F); several of these; or a function from a
            ``FineLevel`` and M⁻¹ to vectors.
        form: "residual" minimises the energy; "additive" puts u for u − F• z₁, and may raise it.
        krylov: Add M⁻¹ of each direction as another direction.
        coarse_samples: Samples of a batch that F is made of; None for all.
        settings: Those of ``NaturalGradient``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from smallfry.optim import TwoLevel
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = TwoLevel(model, lr=0.1, likelihood="categorical")
        >>> loss = F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    shares_batches = False  # its coarse level couples the samples of all processes
    beside = "; in steps with a refresh also inputs and gradients of some samples"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        fine: str | Approximation = "kfac",
        coarse: str | Sequence[str] | Space = ("z1", "residual"),
        form: Literal["residual", "additive"] = "residual",
        krylov: bool = False,
        coarse_samples: int | None = 64,
        **settings: Unpack[Settings],
    ) -> None:
        if not isinstance(fine, Approximation) and fine not in FINE:
            raise UsageError(f"unknown fine level '{fine}'{nearest(str(fine), FINE)}")
        if form not in ("residual", "additive"):
            raise UsageError(f"form is 'residual' or 'additive', not '{form}'")
        require_count("coarse_samples", coarse_samples, optional=True)
        krylov = fitted(krylov, bool, "krylov")
        spaces: tuple[str, ...] | Space
        if callable(coarse):
            spaces = coarse
        else:
            named = [coarse] if isinstance(coarse, str) else coarse
            names: tuple[str, ...] = fitted(named, tuple[str, ...], "coarse")
            for name in names:
                if name not in SPACES:
                    raise UsageError(f"unknown coarse space '{name}'{nearest(name, SPACES)}")
            if not names:
                raise UsageError("the coarse level needs at least one space")
            spaces = names
            form = "additive" if spaces == ("tko",) else form
        method = FINE[fine]() if isinstance(fine, str) else fine
        if not method.needs_gradients:
            name = type(method).__name__
            raise UsageError(
                f"the coarse level needs gradients, and {name} takes none: choose "
                "another fine level"
            )
        self.level = CoarseLevel(spaces, form, krylov, coarse_samples)
        super().__init__(model, lr, method, **settings)

    @property
    def energy(self) -> float | None:
        """Change of ½ ‖z − F•⁻¹ u‖² by the last step's coarse level; None without one."""
        return self._two_level.energy

    @property
    def _two_level(self) -> "TwoLevelPreconditioner":
        assert isinstance(self.preconditioner, TwoLevelPreconditioner)
        return self.preconditioner

    def _build_preconditioner(
        self, blocks: Sequence[Block], approximation: Approximation, collectives: Collectives
    ) -> Preconditioner:
        return TwoLevelPreconditioner(blocks, approximation, self.settings, collectives, self.level)

    def _step(self, observations: Sequence[Observation]) -> None:
        self._two_level.begin_step()
        try:
            super()._step(observations)
        finally:
            self._two_level.stepping = False


class CoarseLevel(NamedTuple):
    """Settings of a coarse level, as in ``TwoLevel``."""

    spaces: tuple[str, ...] | Space
    form: Literal["residual", "additive"]
    krylov: bool
    samples: int | None


class TwoLevelPreconditioner(Preconditioner):
    """Preconditioner with a coarse level on the steps that update statistics.

    Args:
        blocks: See ``Preconditioner``, also for the following.
        approximation: The fine level.
        settings: Damping, averaging, and how many rows are taken.
        collectives: Of one process alone.
        level: The coarse level.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        approximation: Approximation,
        settings: CurvatureSettings,
        collectives: Collectives,
        level: CoarseLevel,
    ) -> None:
        super().__init__(blocks, approximation, settings, collectives)
        self.level = level
        self.energy: float | None = None
        self.stepping = False
        self._curved = 0.0  # zᵀ F z of the last step
        self._samples: dict[str, Rows] = {}  # of the last step's batch, if it took statistics

    def begin_step(self) -> None:
        """Discard the last batch's samples, and start accumulating a step."""
        self.stepping, self._samples = True, {}

    def refresh(self, observations: Sequence[Observation], inverse: bool) -> None:
        """Refresh the fine level, and keep some samples for the coarse one."""
        super().refresh(observations, inverse)
        for name, block in self.blocks.items() if observations else ():
            if not self.states[name]:
                continue
            rows = joined([rows_of(block, seen) for seen in observations])
            kept = slice(0, self.level.samples)
            cut = Rows(rows.inputs[:, kept].clone(), rows.gradients[:, :, kept].clone())
            self._samples[name] = cut

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the fine level, corrected by the coarse level."""
        fine = super().apply(gradients)
        if not fine or not self._samples:
            if self.stepping:
                self.energy, self._curved = None, 0.0
            return fine
        rows = {name: self._samples[name] for name in gradients}
        damping = {name: self.lambdas[name] for name in gradients}
        level = fine_level(rows, gradients, fine, damping)
        result, energy, image = dict(fine), 0.0, level.image
        try:
            found = coarse_correction(level, self._basis(level), self.level.form)
            result |= {name: fine[name] + part for name, part in found.vector.items()}
            energy, image = found.energy, level.image + found.image
        except NotFiniteError:
            self.counters["failed_refreshes"] += 1
        slope = sum(float((result[name] * u).sum()) for name, u in gradients.items())
        if not slope > 0 or not finite(result.values()):
            # not a direction of descent: stale curvature can do that
            result, energy, image = fine, 0.0, level.image
        if self.stepping:
            self.energy = energy
            samples = next(iter(rows.values())).samples
            self._curved = float(image @ image) / samples
            if isinstance(self.level.spaces, tuple) and "previous" in self.level.spaces:
                for name, part in result.items():
                    self.states[name]["previous"] = part.clone()
        return result

    def divergence(
        self,
        directions: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        rates: Mapping[str, float],
    ) -> float:
        """Compute ⟨z, u⟩, or zᵀ F z if that is larger.

        The former bounds the latter for z = M⁻¹ u, not for what the coarse level adds.
        """
        largest = max(rates.values(), default=0.0)
        return max(super().divergence(directions, grads, rates), largest**2 * self._curved)

    def _basis(self, level: FineLevel[str]) -> list[Vector]:
        spaces = self.level.spaces
        if not isinstance(spaces, tuple):
            basis = list(spaces(level, self.solve))
        else:
            basis = [row for name in spaces for row in self._space(name, level)]
        return krylov(basis, self.solve) if self.level.krylov else basis

    def _space(self, name: str, level: FineLevel[str]) -> Sequence[Vector]:
        if name in ("nicolaides", "tko"):
            return nicolaides(level.gradient)
        if name == "spectral":
            factors = {k: self.approximation.factors(self.states[k]) for k in level.gradient}
            return spectral(
                {k: (eigendecompose(a), eigendecompose(g)) for k, (a, g) in factors.items()}
            )
        if name == "residual":
            return preconditioned(residual(level), self.solve)
        if name == "previous":
            states = {key: self.states[key] for key in level.gradient}
            return split({k: s["previous"] for k, s in states.items() if "previous" in s})
        return split(level.solution if name == "z1" else level.gradient)
