from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from common.template import template


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text("{% if text %}\n<p>{{ text | twice }}</p>\n{% endif %}\n")
    return path


def test_what_is_put_in_is_escaped_and_written_by_the_filters(page: Path) -> None:
    found = template(page, filters={"twice": lambda text: text * 2}).render(text="<b>&")
    assert found.strip() == "<p>&lt;b&gt;&amp;&lt;b&gt;&amp;</p>"


def test_what_is_not_put_in_is_an_error(page: Path) -> None:
    with pytest.raises(UndefinedError):
        template(page, filters={"twice": str}).render()
