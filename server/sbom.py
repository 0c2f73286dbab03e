"""What software is installed, as a software bill of materials: CycloneDX 1.6, JSON."""

from __future__ import annotations

import json
import platform
import re
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distribution, distributions
from typing import Any, Final
from urllib.parse import quote

ROOT: Final = "feverfew"
_LICENSE_CLASSIFIER: Final = "License :: "

Tree = dict[str, Any]


def bill() -> str:
    """Returns the bill of all distributions in this Python environment, and of Python, as JSON text.

    It tells what is installed now; the report of a run names the versions that the run had.
    """
    found = {_normal(one.name): one for one in distributions() if one.name}  # a second copy is not imported
    found.pop(ROOT, None)
    tree = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid4().urn,
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": _component(distribution(ROOT), kind="application"),
        },
        "components": [_python(), *(_component(found[name], kind="library") for name in sorted(found))],
    }
    return json.dumps(tree, indent=1) + "\n"


def _component(one: Distribution, *, kind: str) -> Tree:
    name = _normal(one.name)
    url = f"pkg:pypi/{name}@{quote(one.version, safe='')}"
    tree: Tree = {"type": kind, "bom-ref": url, "name": name, "version": one.version, "purl": url}
    licenses = _licenses(one)
    return tree | ({"licenses": licenses} if licenses else {})


def _python() -> Tree:
    name, version = platform.python_implementation(), platform.python_version()
    return {"type": "platform", "bom-ref": f"{name}@{version}", "name": name, "version": version}


def _licenses(one: Distribution) -> list[Tree]:
    """Returns what a distribution says of its licence: an SPDX expression, or names in its own words."""
    expressions = one.metadata.get_all("License-Expression")
    if expressions:
        return [{"expression": expressions[0]}]
    classifiers = one.metadata.get_all("Classifier") or []
    names = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith(_LICENSE_CLASSIFIER)]
    return [{"license": {"name": name}} for name in dict.fromkeys(names)]


def _normal(name: str) -> str:
    """Returns a name as package indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
