"""Nothing that comes from outside is ever executed: the source has no way to, and a payload in every format
of the outside does not run."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, Message, RecordDict
from PIL import Image

from client import images, replies, table
from client.approval import known_plans
from client.cohort import open_cohort
from client.site import read_settings
from client.table import Table
from common import exchange, flower
from common.arrays import STYPE
from common.errors import FeverfewError
from common.invitation import Invitation
from common.plan import Plan
from server import checkpoint
from simulations import medmnist
from tests import plans
from tests.sites import skeleton_cases, write_site

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "client", "server", "simulations")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    *(
        "pickle",
        "_pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "jsonpickle",
        "pickletools",
        "copyreg",
    ),
    *("marshal", "shelve", "dbm", "code", "codeop", "runpy", "imp", "zipimport", "ctypes"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "breakpoint"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"),
    *("yaml.Loader", "yaml.CLoader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CFullLoader"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execve", "os.spawnv", "pandas.read_pickle"),
}
PICKLING = {f"{numpy}.{name}" for numpy in ("np", "numpy") for name in ("load", "save", "savez")}
ALLOWED = {"client/preloaded.py": ["os.execv"]}
METHODS = {"recv"}
"""Of multiprocessing's connections: what was sent is unpickled. ``recv_bytes`` is not."""


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def problems(path: Path) -> list[str]:
    """Returns what a file has that could execute what it reads."""
    found = sorted(imported(path) & MODULES)
    for call in calls(path):
        name = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in CALLS or name.rpartition(".")[2] in METHODS:
            found.append(name)
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
            found.append(f"{name} with {keywords}")
        if name in PICKLING and "allow_pickle" not in keywords:
            found.append(f"{name} without allow_pickle=False")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_can_execute_what_it_reads(path: Path) -> None:
    """Arguments with which multiprocessing starts our own processes are pickled by it; nothing else is. One
    file starts a program in its own place, which is written there and told a number."""
    assert problems(path) == ALLOWED.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "connection.recv()",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(line: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert problems(path)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once a payload has run."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))  # noqa: S301 - shows that the payload works
    assert path.exists()
    path.unlink()
    return path


def objects(mark: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(mark)] * 3), allow_pickle=True)
    return stream.getvalue()


def yaml_of(mark: Path) -> str:
    return f"!!python/object/apply:os.mkdir ['{mark}']\n"


def _message(mark: Path, place: Path) -> None:
    flower.set_identity(1, node_id=1)
    for dtype in ("float32", "object", "O"):
        array = Array(dtype=dtype, shape=(3,), stype=STYPE, data=objects(mark))
        sent = Message(RecordDict({"arrays": ArrayRecord({"parameters": array})}), 7, "train")
        got = flower.unpack_message(flower.pack_message(sent)).content
        task = exchange.task_record(_task())
        exchange.read_task(RecordDict({**task, "arrays": got["arrays"]}))


def _update(mark: Path, place: Path) -> None:
    for data in (objects(mark), pickle.dumps(Payload(mark))):
        array = Array(dtype="float32", shape=(3,), stype=STYPE, data=data)
        good = exchange.update_record(
            exchange.Update(
                server_round=1, arrays={"values": np.zeros(3, np.float32)}, weight=1, train_loss=None
            )
        )
        record = RecordDict({**good, "arrays": ArrayRecord({"update": array})})
        exchange.read_update(
            record, server_round=1, num_parameters=3, form="fp32", bound=1, max_norm=9, weight=1
        )


def _task() -> exchange.Task:
    return exchange.Task(
        run="r",
        plan_hash="0" * 64,
        server_round=1,
        purpose="train",
        part="",
        parameters=np.zeros(3, np.float32),
    )


def _plan(mark: Path, place: Path) -> None:
    Plan.from_json(pickle.dumps(Payload(mark)).decode("latin1"))


def _site(mark: Path, place: Path) -> None:
    (place / "site.yaml").write_text(yaml_of(mark))
    read_settings(place / "site.yaml")


def _invitation(mark: Path, place: Path) -> None:
    Invitation.from_text(yaml_of(mark))


def _csv(mark: Path, place: Path) -> None:
    formula = f"=cmd|' /C touch {mark}'!A1"
    text = f"image,label,patient_id\n{formula},{yaml_of(mark)!r},__import__('os')\n"
    (place / "cases.csv").write_text(text)
    settings = Table.model_validate(skeleton_cases("north"))
    list(table.rows(settings, directory=place, patient_is="column"))


def _image(mark: Path, place: Path) -> None:
    payload = pickle.dumps(Payload(mark))
    for content in (payload, objects(mark), b"\0" * 128 + b"DICM" + payload):
        with pytest.raises(FeverfewError):
            images.decode(content)
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, format="PNG")
    images.decode(stream.getvalue() + payload)


def _checkpoint(mark: Path, place: Path) -> None:
    folder = place / "000001"
    folder.mkdir()
    data = pickle.dumps(Payload(mark))
    tree: dict[str, Any] = {"run": "r", "plan_hash": "h", "server_round": 1, "started": "2026-01-01"}
    (folder / "state.json").write_bytes(checkpoint.marked(json.dumps(tree).encode(), parameters=data))
    (folder / "parameters.safetensors").write_bytes(data)
    checkpoint.latest(place, run="r", plan_hash="h")


def _reply(mark: Path, place: Path) -> None:
    (place / "t.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    replies.load(place, "t")


def _approval(mark: Path, place: Path) -> None:
    site = write_site(place / "north", size=8, num_patients=4)
    (site.private / "approvals").mkdir()
    (site.private / "approvals" / "x.json").write_bytes(pickle.dumps(Payload(mark)))
    known_plans(site)


def _cache(mark: Path, place: Path) -> None:
    asked = plans.asked()
    site = write_site(place / "north", size=8, num_patients=12)
    open_cohort(site, asked=asked)
    cached = [path for path in site.cache.rglob("*") if path.is_file()]
    assert cached
    for path in cached:
        path.write_bytes(objects(mark))
    open_cohort(site, asked=asked)


def _medmnist(mark: Path, place: Path) -> None:
    names = ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels")
    np.savez(place / "x.npz", **{name: np.array([Payload(mark)]) for name in names})
    medmnist.read(place / "x.npz", num_classes=2)


FORMATS: list[Callable[[Path, Path], None]] = [
    *(_message, _update, _plan, _site, _invitation, _csv, _image, _checkpoint, _reply, _approval, _cache),
    _medmnist,
]


@pytest.mark.parametrize("read", FORMATS, ids=lambda read: read.__name__[1:])
def test_a_payload_in_an_outside_format_is_not_executed(
    read: Callable[[Path, Path], None], mark: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with contextlib.suppress(FeverfewError, ValueError, TypeError):
        read(mark, place)
    assert not mark.exists()


def test_the_yaml_payload_is_one(mark: Path) -> None:
    yaml.unsafe_load(yaml_of(mark))  # shows that the payload works
    assert mark.exists()
