"""Exit codes of the commands, the same everywhere: 0 well, 1 the world, 2 the person, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable

from common.errors import FeverfewError, UserError


def exit_code(action: Callable[[], int], *, command: str) -> int:
    """Runs a command; one clear line on standard error for an error of ours, a traceback for a defect.

    Returns:
        What the action returns, 2 for a ``UserError``, 1 for other errors of ours, 130 for Ctrl-C.
    """
    try:
        return action()
    except FeverfewError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
