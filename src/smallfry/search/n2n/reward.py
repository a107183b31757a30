"""Reward of a student: its accuracy, times a concave function of its compression.

    R = C (2 − C) · accuracy of the student / accuracy of the teacher
    C = 1 − parameters of the student / parameters of the teacher

(N2N; Ashok, Rhinehart, Beainy, Kitani, ICLR 2018, arXiv 1709.06030)
"""

from smallfry.errors import UsageError

__all__ = ["INVALID", "constrained_reward", "reward"]

INVALID = -1.0  # of a student that can't be built
SOFT = 15  # iterations after which a student beyond a limit is worth as much as an invalid one


def reward(compression: float, accuracy_ratio: float) -> float:
    """Compute the reward of a student.

    Args:
        compression: C, at most 1.
        accuracy_ratio: The student's accuracy by the teacher's.

    Raises:
        UsageError: A compression above 1, or a negative ratio.

    Example:
        >>> reward(0.5, 1.0), reward(0.0, 1.0)
        (0.75, 0.0)
    """
    if compression > 1 or accuracy_ratio < 0:
        raise UsageError(
            f"a compression is at most 1, and a ratio of accuracies at least 0, got {compression} "
            f"and {accuracy_ratio}"
        )
    return compression * (2 - compression) * accuracy_ratio


def constrained_reward(value: float, iteration: int, is_within: bool) -> float:
    """Return the reward of a student that has a limit: mild at first, −1 after 15 iterations.

    Args:
        value: Its reward without the limit.
        iteration: Of the policy, from 0.
        is_within: It keeps the limit.

    Example:
        >>> constrained_reward(0.8, 0, False), constrained_reward(0.8, 15, False)
        (0.8, -1.0)
    """
    if is_within:
        return value
    softness = max(0.0, 1 - iteration / SOFT) ** 4
    return (softness - 1) + softness * value
