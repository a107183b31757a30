"""Print a script that completes commands in a shell."""

from dataclasses import dataclass
from typing import Literal

from smallfry.cli._fields import argument
from smallfry.errors import UsageError
from smallfry.io.terminal import say


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a completion script; bash: source <(smallfry completion bash).

    Args:
        shell: Its shell: bash, zsh or fish.
    """

    shell: Literal["bash", "zsh", "fish"] | None = argument()


def run(options: Options) -> int:
    """Print the script."""
    from smallfry.cli._completion import script

    if options.shell is None:
        raise UsageError("expected a shell: bash, zsh or fish")
    say(script(options.shell))
    return 0
