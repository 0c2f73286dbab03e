"""Pages as templates of jinja2, the same for every page: what is put in is escaped, and must be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a site's daemon does without
    from jinja2 import Template


def template(path: Path, *, filters: Mapping[str, Callable[..., Any]] | None = None) -> Template:
    """Returns the template in a file, whose folder may hold others that it names.

    Rendering escapes whatever is put in, and raises ``jinja2.UndefinedError`` for a name that is not.

    Args:
        filters: by name, how values are written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(path.name)
