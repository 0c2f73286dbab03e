"""Lines of a log as JSON: every line of a process, whoever wrote it, and never an exception's text."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from common import logline
from common.command import exit_code
from common.errors import UserError
from common.logline import KEYS, JsonFormatter

SECRET = "Mueller^Anna 4711"


def parsed(text: str) -> list[dict[str, Any]]:
    """Returns the objects of a log; every line has to be one, with the keys of each."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert line.keys() >= set(KEYS) and all(isinstance(line[key], str) for key in KEYS), line
        assert line.keys() <= {*KEYS, "site", "run", "round", "exception"}, line
        assert line["level"] in logging.getLevelNamesMapping(), line
        told = datetime.fromisoformat(line["time"])
        assert told.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - told) < timedelta(hours=1)
    return lines


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("feverfew.test")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers.clear()


@pytest.fixture
def output(logger: logging.Logger) -> io.StringIO:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter("agent", site="north"))
    logger.addHandler(handler)
    return output


def test_a_record_is_one_line_with_what_is_known_of_site_run_and_round(
    logger: logging.Logger, output: io.StringIO
) -> None:
    with logline.about(run="run-1"):
        with logline.about(round=3):
            logger.info("the %s\nwith a line more, ünd %s", "message", '{"quotes"}')
        logger.warning("between rounds")
        other = threading.Thread(target=logger.error, args=("of another thread",))
        other.start()
        other.join()
    told = parsed(output.getvalue())
    assert (
        told[0].items()
        >= {
            "level": "INFO",
            "logger": "feverfew.test",
            "process": "agent",
            "message": 'the message\nwith a line more, ünd {"quotes"}',
            "site": "north",
            "run": "run-1",
            "round": 3,
        }.items()
    )
    assert ("run" in told[1], "round" in told[1]) == (True, False) and "run" not in told[2]


def test_an_exception_is_one_field_without_its_text(logger: logging.Logger, output: io.StringIO) -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise KeyError(SECRET) from error
    except KeyError:
        logger.exception("it failed")
    (line,) = parsed(output.getvalue())
    assert "builtins.KeyError" in line["exception"] and "builtins.ValueError" in line["exception"]
    assert f"{Path(__file__).name}:" in line["exception"] and SECRET not in output.getvalue()


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("\x1b[92mINFO \x1b[0m:      Starting Flower", "INFO", "Starting Flower"),
        ("\x1b[93mWARNING \x1b[0m:   late", "WARNING", "late"),
        ("ERROR:    Traceback", "ERROR", "Traceback"),
        ("plain", "INFO", "plain"),
        ('{"half": ', "INFO", '{"half": '),
        ('{"time": "now"}', "INFO", '{"time": "now"}'),
        ("[" * 100_000, "INFO", "[" * 100_000),
    ],
)
def test_a_line_of_another_program_becomes_a_message(text: str, level: str, message: str) -> None:
    (line,) = parsed(logline.wrapped(text, process="superlink"))
    assert (line["level"], line["message"], line["process"]) == (level, message, "superlink")
    assert logline.wrapped(json.dumps(line), process="x") == json.dumps(line), "and stays what it is"


def test_what_comes_through_a_pipe_is_written_line_by_line_whatever_it_is(tmp_path: Path) -> None:
    sink = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    entry, thread = logline.funnel(sink, partial(logline.wrapped, process="superexec"))
    long = b"x" * (3 * logline.MAX_LINE)
    os.write(entry, b"INFO : one\n\n\xff\xfe two\nthree")
    os.close(entry)
    thread.join(5)
    told = parsed((tmp_path / "log").read_text())
    assert [line["message"] for line in told] == ["one", "\ufffd\ufffd two", "three"]

    entry, thread = logline.funnel(os.open("/dev/full", os.O_WRONLY), partial(logline.wrapped, process="x"))
    written = 0
    while written < len(long):  # many times what a pipe holds: nobody waits for a disk that is full
        written += os.write(entry, long[written:])
    os.close(entry)
    thread.join(5)
    assert not thread.is_alive()


PROGRAM = """
import os, subprocess, sys, warnings, threading, logging
from functools import partial
from common import logline
from common.command import exit_code
from common.errors import UserError

def work():
    with logline.own_output(partial(logline.wrapped, process="x")) as output:
        logline.start("x", form="json", output=output)
        logging.getLogger("feverfew").info("of ours")
        print("printed")
        warnings.warn("a warning")
        os.write(2, b"of a library in C\\n")
        subprocess.run([sys.executable, "-c", "import sys; print('of a child'); sys.exit('its end')"])
        thread = threading.Thread(target=lambda: {}["secret"])
        thread.start()
        thread.join()
        ends()
    return 0

sys.exit(exit_code(work, command="x", tell=logline.tell_errors("x")))
"""


@pytest.mark.parametrize(
    ("end", "told", "code"),
    [
        ("raise UserError('Expected it, found that.')", "x: Expected it, found that.", 2),
        ("raise RuntimeError('secret')", "ended by RuntimeError", 1),
        ("raise KeyboardInterrupt", "x: interrupted", 130),
    ],
)
def test_all_that_a_process_and_its_children_write_is_json_to_the_end(end: str, told: str, code: int) -> None:
    program = f"def ends():\n    {end}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stderr == ""
    messages = [line["message"] for line in parsed(done.stdout)]
    assert {"of ours", "printed", "of a library in C", "of a child", "its end"} <= set(messages)
    assert any("a warning" in one for one in messages) and messages[-1] == told
    assert "a thread was ended by KeyError" in messages and "secret" not in done.stdout


def test_an_error_of_a_command_goes_to_who_is_to_be_told() -> None:
    def fail() -> int:
        raise UserError("Expected it.")

    told: list[str] = []
    assert exit_code(fail, command="c", tell=told.append) == 2 and told == ["c: Expected it."]


def test_a_line_tells_when_it_was_written() -> None:
    before = time.time()
    told = datetime.fromisoformat(json.loads(logline.wrapped("x", process="x"))["time"]).timestamp()
    assert before - 0.002 <= told <= time.time()
