"""Servers that answer strangely: nothing is lost in silence, nothing wrong is kept, nothing hangs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from client import dicomweb, enquiry, fetch
from common.errors import DeploymentError
from tests.dicomweb import (
    ALL_SERIES,
    FILES,
    INSTANCES,
    SERIES,
    STUDIES,
    STUDY,
    TYPE,
    Handler,
    Switch,
    archive,
    element,
    give,
    listed,
    page,
    parts,
    served,
)
from tests.orthanc import site_of

UIDS = list(FILES)
CONTENTS = sorted(FILES.values())


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "MIN_PAUSE_SECONDS", 0.01)


class Fetch(Protocol):
    """Fetches from a server with these handlers into ``directory/north``, and returns what came of it."""

    def __call__(
        self, directory: Path, *, settings: dict[str, Any] | None = None, **handlers: Handler
    ) -> fetch.Outcome: ...


@pytest.fixture(scope="module")
def fetched() -> Iterator[Fetch]:
    switch = Switch()

    def fetch_from(
        directory: Path, *, settings: dict[str, Any] | None = None, **handlers: Handler
    ) -> fetch.Outcome:
        switch.app = archive(**handlers)
        return fetch.fetch(site_of(directory / "north", url, **(settings or {})))

    with served(switch) as url:
        yield fetch_from


def kept(directory: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in directory.rglob("*.dcm"))


def many(number: int) -> list[dict[str, Any]]:
    return [{"0020000D": element(f"1.2.{one}")} for one in range(number)]


def ignores_offset(request: Request) -> Response:
    return JSONResponse(many(250)[: int(request.query_params["limit"])])


def ignores_both(request: Request) -> Response:
    return JSONResponse(many(250))


def loses_behind_the_first_page(request: Request) -> Response:
    return JSONResponse(page(many(250)[: int(request.query_params["limit"])], request))


def gives_at_most_forty(request: Request) -> Response:
    return JSONResponse(page(many(250), request)[:40])


def says_no_content(request: Request) -> Response:
    found = page(many(250), request)
    return JSONResponse(found) if found else Response(status_code=204)


def has_exactly_two_pages(request: Request) -> Response:
    return JSONResponse(page(many(200), request))


@pytest.mark.parametrize(
    ("studies", "number"),
    [
        (listed(many(250)), 250),
        (ignores_offset, 250),
        (ignores_both, 250),
        (loses_behind_the_first_page, 250),
        (gives_at_most_forty, 250),
        (says_no_content, 250),
        (has_exactly_two_pages, 200),
        (listed([]), 0),
    ],
)
def test_search_finds_everything_whatever_the_server_makes_of_pages(
    fetched: Fetch, tmp_path: Path, studies: Handler, number: int
) -> None:
    asked: Counter[str] = Counter()

    def no_series(request: Request) -> Response:
        asked[request.path_params["study"]] += 1
        return Response(status_code=204)

    fetched(tmp_path, studies=studies, series=no_series)
    assert asked == {f"1.2.{one}": 1 for one in range(number)}


def bare(request: Request) -> Response:
    return Response(FILES[request.path_params["instance"]], media_type="application/dicom")


def quoted(request: Request) -> Response:
    content = parts(FILES[request.path_params["instance"]], boundary=b"a/b c")
    kind = 'Multipart/Related; boundary="a/b c"; type="application/dicom"'
    return Response(content, headers={"Content-Type": kind})


@pytest.mark.parametrize("instance", [give, bare, quoted])
def test_file_is_taken_from_parts_and_alone(fetched: Fetch, tmp_path: Path, instance: Handler) -> None:
    assert fetched(tmp_path, instance=instance).fetched == 3
    assert kept(tmp_path) == CONTENTS


def one_fails(answer: Response) -> Handler:
    return lambda request: answer if request.path_params["instance"] == UIDS[1] else give(request)


async def breaks_off() -> Any:
    yield parts(FILES[UIDS[1]])[:300]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Response(status_code=404), "not_found"),
        (Response(status_code=410), "not_found"),
        (Response(status_code=403), "forbidden"),
        (Response(status_code=406), "refused"),
        (RedirectResponse("/login"), "refused"),
        (Response(status_code=500), "server_error"),
        (Response(status_code=503), "server_error"),
        (Response(status_code=429), "server_error"),
        (PlainTextResponse("<html>log in</html>"), "bad_answer"),
        (Response(parts(FILES[UIDS[1]])[:-9], headers={"Content-Type": TYPE}), "bad_answer"),
        (Response(b"--xyz--", headers={"Content-Type": TYPE}), "bad_answer"),
        (Response(parts(b""), headers={"Content-Type": TYPE}), "bad_answer"),
        (Response(parts(b"GIF89a"), headers={"Content-Type": TYPE}), "bad_answer"),
        (Response(b"", headers={"Content-Type": "multipart/related"}), "bad_answer"),
        (Response(parts(FILES[UIDS[2]]), headers={"Content-Type": TYPE}), "other_instance"),
        (
            Response(parts(FILES[UIDS[1]]), headers={"Content-Type": TYPE, "Content-Encoding": "gzip"}),
            "no_answer",
        ),
    ],
)
def test_instance_that_cannot_be_had_is_counted_and_the_others_come(
    fetched: Fetch, tmp_path: Path, answer: Response, code: str
) -> None:
    outcome = fetched(tmp_path, instance=one_fails(answer))
    assert (outcome.fetched, outcome.not_given, outcome.is_whole) == (2, {code: 1}, False)
    assert kept(tmp_path) == sorted([FILES[UIDS[0]], FILES[UIDS[2]]])
    assert not list(tmp_path.rglob("*.part"))


def test_failure_that_passes_is_no_failure(fetched: Fetch, tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    def at_the_third(request: Request) -> Response:
        uid = request.path_params["instance"]
        asked[uid] += 1
        bad = Response(parts(FILES[uid])[:-40], headers={"Content-Type": TYPE})
        return give(request) if asked[uid] == 3 else bad if asked[uid] == 2 else Response(status_code=503)

    assert fetched(tmp_path, instance=at_the_third).is_whole
    assert set(asked.values()) == {3} and kept(tmp_path) == CONTENTS


def test_answer_that_never_ends_is_given_up(fetched: Fetch, tmp_path: Path) -> None:
    async def drips() -> Any:
        import anyio

        yield parts(FILES[UIDS[1]])[:200]
        await anyio.sleep(1.5)

    def slow(request: Request) -> Response:
        if request.path_params["instance"] != UIDS[1]:
            return give(request)
        return StreamingResponse(drips(), headers={"Content-Type": TYPE})

    outcome = fetched(tmp_path, settings={"timeout_seconds": 0.3}, instance=slow)
    assert (outcome.fetched, outcome.not_given) == (2, {"no_answer": 1})


@pytest.mark.parametrize("uid", ["../../stolen", "..", "1.2/../3", "1." * 40 + "1"])
@pytest.mark.parametrize("level", ["studies", "series", "instances"])
def test_identifier_that_is_none_is_neither_asked_for_nor_a_file(
    fetched: Fetch, tmp_path: Path, level: str, uid: str
) -> None:
    key = {"studies": enquiry.STUDY, "series": enquiry.SERIES, "instances": enquiry.INSTANCE}[level]
    more = {"studies": STUDIES, "series": ALL_SERIES, "instances": INSTANCES}[level]
    outcome = fetched(tmp_path, **{level: listed([{key: element(uid)}, *more])})
    assert (outcome.fetched, outcome.not_given) == (3, {"bad_identifier": 1})
    home = tmp_path / "north" / "private" / "pacs"
    assert {path.parent for path in tmp_path.rglob("*.dcm")} == {home / STUDY / SERIES}


@pytest.mark.parametrize(
    "answer",
    [
        Response(status_code=404),
        Response(status_code=400),
        PlainTextResponse("<html></html>"),
        JSONResponse({"error": 1}),
        JSONResponse([1, 2]),
        Response(b"[" * 100_000),
    ],
)
def test_address_without_dicomweb_is_told(fetched: Fetch, tmp_path: Path, answer: Response) -> None:
    with pytest.raises(DeploymentError, match="root of DICOMweb"):
        fetched(tmp_path, studies=lambda request: answer)


def test_study_that_the_server_fails_at_is_counted(fetched: Fetch, tmp_path: Path) -> None:
    def series(request: Request) -> Response:
        first = request.path_params["study"] == STUDY
        return JSONResponse(page(ALL_SERIES, request)) if first else Response(status_code=500)

    outcome = fetched(tmp_path, studies=listed([*STUDIES, {"0020000D": element("1.2.3")}]), series=series)
    assert (outcome.studies, outcome.fetched, outcome.not_given) == (1, 3, {"server_error": 1})


def test_series_with_fewer_images_than_the_server_counts_is_not_complete(
    fetched: Fetch, tmp_path: Path
) -> None:
    outcome = fetched(tmp_path, series=listed([{**ALL_SERIES[0], "00201209": element("4")}]))
    assert (outcome.fetched, outcome.not_given) == (3, {"not_listed": 1})


def test_requests_keep_their_distance(fetched: Fetch, tmp_path: Path) -> None:
    times: list[float] = []

    def noted(request: Request) -> Response:
        times.append(time.monotonic())
        return give(request)

    more = {"max_requests_per_second": 10, "connections": 4}
    begun = time.monotonic()
    fetched(tmp_path, settings=more, instance=noted)
    assert all(later - earlier > 0.05 for earlier, later in zip(times, times[1:], strict=False))
    assert time.monotonic() - begun > 0.1 * 8  # studies, series and instances twice each, and three files


def test_a_connection_is_used_again(fetched: Fetch, tmp_path: Path) -> None:
    ports = set()

    def noted(request: Request) -> Response:
        assert request.client is not None
        ports.add(request.client.port)
        content = parts(FILES[request.path_params["instance"]]) + b"\r\nepilogue"
        return StreamingResponse(in_pieces(content), headers={"Content-Type": TYPE})

    assert fetched(tmp_path, settings={"connections": 1}, instance=noted).fetched == 3
    assert len(ports) == 1


async def in_pieces(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 50):
        yield content[at : at + 50]


def test_nothing_but_the_query_is_asked(fetched: Fetch, tmp_path: Path) -> None:
    asked = []

    def noted(request: Request) -> Response:
        asked.append(dict(request.query_params) | {"agent": request.headers.get("referer")})
        return JSONResponse(page(STUDIES, request))

    query = {"date_from": "2024-01-01", "study_description": "*thorax*", "modalities": ["CT"]}
    fetched(tmp_path, settings={"query": query}, studies=noted)
    assert {one.get("StudyDate") for one in asked} == {"20240101-"}
    assert not any({"StudyDescription", "ModalitiesInStudy", "Modality"} & set(one) for one in asked)
