"""Choice of the best epoch by one of the scores of a task."""

from collections.abc import Mapping

from smallfry.errors import UsageError, nearest
from smallfry.tasks import HasChoices, Task


def require_choice(task: Task, by: str | None) -> None:
    """Require a score that a task can choose its best epoch by; None is always one.

    Raises:
        UsageError: It can't.
    """
    known = task.choices if isinstance(task, HasChoices) else ()
    if by is None or by in known:
        return
    if not known:
        raise UsageError(f"the task {task.name} ranks its epochs itself: leave out select_by")
    raise UsageError(f"select_by: no score '{by}'{nearest(by, known)}")


def rank(task: Task, scores: Mapping[str, float], by: str | None = None) -> tuple[float, ...]:
    """Return a sort key of scores, greatest of the best epoch.

    Args:
        task: The task, whose own rank decides between equal scores.
        scores: Of an epoch.
        by: Name of the score; None for the task's own rank.
    """
    if by is None:
        return task.rank(scores)
    sign = -1 if by.endswith(("loss", "error")) else 1
    return sign * scores[by], *task.rank(scores)
