"""Exit codes of the commands, the same everywhere: 0 well, 1 the world, 2 the person, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from common.errors import FeverfewError, UserError

INTERRUPTED: Final = 130


def exit_code(action: Callable[[], int], *, command: str, tell: Callable[[str], None] | None = None) -> int:
    """Runs a command; one clear line for an error of ours, a traceback for a defect.

    Args:
        tell: takes that line; None is standard error.

    Returns:
        What the action returns, 2 for a ``UserError``, 1 for other errors of ours, 130 for Ctrl-C.
    """
    say = tell or (lambda text: print(text, file=sys.stderr))
    try:
        return action()
    except FeverfewError as error:
        say(f"{command}: {error}")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        say(f"{command}: interrupted")
        return INTERRUPTED
