"""What ``fetch`` tells the hospital, and the index that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from client import fetch, pacs
from client.fetched import REMEDIES
from client.site import open_site
from common.errors import ConfigError, DeploymentError, StateError
from tests.dicomweb import SERIES, STUDY, archive, element, listed, served
from tests.orthanc import changed, site_of
from tests.ports import free_port
from tests.test_docs import DOCS, literals, quoted, table

CLIENT = Path(fetch.__file__).parent


def test_every_code_is_explained_and_has_a_remedy() -> None:
    files = [CLIENT / f"{name}.py" for name in ("answers", "dicomweb", "enquiry")]
    given = literals("NotGiven", of=files) | {"not_listed", "bad_identifier"}
    rows = table((DOCS / "pacs.md").read_text(encoding="utf-8"), "pacs codes")
    documented = [name for row in rows for name in quoted(row[0])]
    assert set(documented) == set(REMEDIES) == given and len(documented) == len(given)


def test_example_in_the_documents_is_what_a_site_takes(tmp_path: Path) -> None:
    text = (DOCS / "pacs.md").read_text(encoding="utf-8")
    example = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["pacs"]
    site = site_of(tmp_path / "north", **example)
    assert site.settings.pacs is not None and site.settings.pacs.query.body_part == "CHEST"
    commented = (CLIENT.parent / "conf" / "client.yaml").read_text(encoding="utf-8")
    lines = commented.partition("# pacs:\n")[2].partition("# docs/pacs.md")[0].splitlines()
    template = "\n".join(line.removeprefix("#") for line in lines).replace("{{", "{").replace("}}", "}")
    assert yaml.safe_load(template) == example


def test_site_without_a_pacs_is_told_what_to_write(tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", "http://127.0.0.1:9")
    path = site.directory / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"pacs": None}))
    with pytest.raises(ConfigError, match="docs/pacs.md"):
        fetch.fetch(open_site(site.directory))


def test_server_that_was_never_there_is_told(tmp_path: Path) -> None:
    site = site_of(tmp_path / "north", f"http://127.0.0.1:{free_port()}", patience_seconds=0.5)
    with pytest.raises(DeploymentError, match="see url in site.yaml"):
        fetch.fetch(site)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"00100020": {}},
        {"00100020": {"vr": "LO", "Value": None}},
        {"00100020": {"Value": [None, {"x": 1}]}},
    ],
)
def test_attributes_that_a_server_leaves_out_are_empty(tmp_path: Path, attributes: dict[str, Any]) -> None:
    with served(archive(studies=listed([{"0020000D": element(STUDY), **attributes}]))) as url:
        site = site_of(tmp_path / "north", url)
        fetch.fetch(site)
    (one,) = pacs.index(site)
    assert (one.patient, one.accession, one.modality, one.series) == ("", "", "CT", SERIES)


def test_looking_counts_also_what_the_server_does_not_count(tmp_path: Path) -> None:
    with served(archive()) as url:
        site = site_of(tmp_path / "north", url)
        looked = fetch.look(site)
        assert (looked.studies, looked.series, looked.instances, looked.there) == (1, 1, 3, 0)
        fetch.fetch(site)
        assert (fetch.look(site).instances, fetch.look(site).there) == (3, 3)


def test_series_that_a_later_query_does_not_mean_stay_in_the_index(tmp_path: Path) -> None:
    with served(archive()) as url:
        site = site_of(tmp_path / "north", url)
        fetch.fetch(site)
    with served(archive(studies=listed([]))) as url:
        assert fetch.fetch(changed(site, url=url)).series == 0
    assert len(pacs.index(site)) == 1


def test_digest_of_the_index_changes_with_what_is_there(tmp_path: Path) -> None:
    with served(archive()) as url:
        site = site_of(tmp_path / "north", url)
        digests = [pacs.digest(site)]
        for _ in range(2):
            fetch.fetch(site)
            digests.append(pacs.digest(site))
        next(pacs.home(site).rglob("*.dcm")).unlink()
        pacs.write(site, pacs.known(site).values())
        digests.append(pacs.digest(site))
    assert digests[1] == digests[2] and len(set(digests)) == 3


def test_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    with served(archive()) as url:
        site = site_of(tmp_path / "north", url)
        fetch.fetch(site)
    path = pacs.home(site) / pacs.INDEX
    path.write_text(path.read_text().replace(f'"{STUDY}"', '"../../.."'))
    with pytest.raises(StateError):
        pacs.index(site)
