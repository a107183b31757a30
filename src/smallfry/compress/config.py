"""Settings of a compression."""

from dataclasses import dataclass
from typing import Any

from smallfry.errors import UsageError
from smallfry.training.method import MethodSettings, from_dict


@dataclass(frozen=True)
class CompressConfig:
    """Methods and their settings.

    Args:
        methods: In the order of their stages, each a name or NAME: {SETTING: VALUE}, such as
            [{magnitude: {sparsity: 0.5}}, {round_weights: {bits: 8}}].
        seed: Seed of what is random.
    """

    methods: list[Any]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("methods: name at least one, such as [round_weights]")
        _ = self.settings

    @property
    def settings(self) -> list[MethodSettings]:
        """The methods' settings.

        Raises:
            UsageError: An unknown method or setting.
        """
        return [from_dict(each) for each in self.methods]
