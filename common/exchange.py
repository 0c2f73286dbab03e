"""All that crosses the network, as typed values <-> Flower's records.

A task is a ``RecordDict`` with one ``ConfigRecord`` "task" and, where parameters travel, one
``ArrayRecord`` "arrays" that holds one flat array, and its scales where it is quantised
(``common.quantisation``). A reply has either a ``MetricRecord`` "metrics" and an ``ArrayRecord`` "arrays", or
one ``ConfigRecord``: "reply", "delivered" or "refused". Beside it may be
a ``ConfigRecord`` "ledger": the last row of the site's ledger, which the coordinator keeps and presents at
the next run.
``docs/privacy.md`` lists every field of a reply; nothing else may leave a site.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common import quantisation, received
from common.arrays import packed, unpacked
from common.chain import Head
from common.errors import InvalidReply, Refusal
from common.measure import ANY, ArrayKind
from common.model import FlatArray
from common.quantisation import BLOCK, FloatArray, Form

PREPARE, TRAIN, EVALUATE, DELIVER = "query.prepare", "train", "evaluate", "query.deliver"
LANDMARKS = "query.landmarks"

_HASH_BYTES, _MOST_SIGNATURE_BYTES = 32, 192

Purpose = Literal["prepare", "train", "evaluate", "landmarks", "deliver"]
STATUSES = frozenset(("approved", "waiting", "declined", "incompatible"))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the server asks a site in one message.

    ``server_round`` is 0 for prepare. ``part`` is "validation" or "test" for evaluate, else "".
    ``parameters``: float32, (num_parameters,), or empty for prepare and landmarks. ``head``: what the
    coordinator remembers of this site's ledger; for prepare only, and no part of the task's identity.
    """

    run: str
    plan_hash: str
    server_round: int
    purpose: Purpose
    part: str
    parameters: FlatArray
    head: Head | None = None

    @property
    def identity(self) -> str:
        """sha256 over run, plan, round, purpose, part and the parameters: the same task has the same."""
        digest = hashlib.sha256(np.ascontiguousarray(self.parameters).tobytes()).hexdigest()
        text = "\n".join([self.run, self.plan_hash, str(self.server_round), self.purpose, self.part, digest])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A site's answer before round 1; every field is a public constant of the site.

    ``status``: approved, waiting, declined or incompatible; ``reason``: a code, "" when approved.
    """

    site: str
    status: str
    reason: str
    role: str
    data: str
    nominal_patients: int
    patient_is: str
    parts: tuple[str, ...]
    feverfew: str


@dataclass(frozen=True, kw_only=True)
class Update:
    """A site's training of one round. ``arrays``: as ``common.quantisation.quantised`` returns them.
    ``weight``: public. ``train_loss``: noised under DP, None if no step was made."""

    server_round: int
    arrays: Mapping[str, FloatArray]
    weight: float
    train_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Counts and scores of a part of a site's cohort, noised or, without privacy or for public data, exact.

    Of an evaluation the arrays that ``common.measure.arrays_of`` names, noised as
    ``common.calibration.measure_noise_std`` says. Of landmarks one, of ``landmarks``: float64, (landmarks,
    bins), noised as ``common.calibration.landmark_noise_std`` says.
    """

    server_round: int
    part: str
    arrays: Mapping[str, FloatArray]


def task_record(task: Task, *, form: Form = "fp32") -> RecordDict:
    """Packs a task; in another form than fp32, parameters that came out of that form arrive unchanged."""
    fields = ConfigRecord(
        {
            "run": task.run,
            "plan-hash": task.plan_hash,
            "server-round": task.server_round,
            "purpose": task.purpose,
            "part": task.part,
        }
    )
    record = RecordDict({"task": fields})
    if task.parameters.size:
        record["arrays"] = _array_record("parameters", quantisation.quantised(task.parameters, form=form))
    if task.head is not None:
        attach_head(record, task.head)
    return record


def attach_head(record: RecordDict, head: Head) -> None:
    """Adds the last row of a site's ledger to a message: sites send it, coordinators send it back."""
    digest, signature = bytes.fromhex(head.hash), base64.b64decode(head.signature, validate=True)
    record["ledger"] = ConfigRecord({"number": head.number, "hash": digest, "signature": signature})


def detach_head(record: RecordDict) -> Head | None:
    """Takes the last row of a ledger out of a message; None where it has none.

    Raises:
        ValueError: something else is in its place.
    """
    if "ledger" not in record:
        return None
    fields = record.pop("ledger")
    if not isinstance(fields, ConfigRecord) or set(fields) != {"number", "hash", "signature"}:
        raise ValueError("expected number, hash and signature of a row")
    digest, signature = fields["hash"], fields["signature"]
    if not isinstance(digest, bytes) or len(digest) != _HASH_BYTES:
        raise ValueError("expected the hash of a row")
    if not isinstance(signature, bytes) or len(signature) > _MOST_SIGNATURE_BYTES:
        raise ValueError("expected a signature")
    encoded = base64.b64encode(signature).decode("ascii")
    return Head(number=received.count(fields["number"]), hash=digest.hex(), signature=encoded)


def read_task(record: RecordDict) -> Task:
    """Unpacks a task.

    Raises:
        Refusal: the message is not a task of this protocol; code ``malformed_task``.
    """
    try:
        head = detach_head(record)
        fields = received.part(record, "task", ConfigRecord)
        has_arrays = "arrays" in record
        parameters = _parameters(received.part(record, "arrays", ArrayRecord)) if has_arrays else _NOTHING
        task = Task(
            run=received.run_id(fields["run"]),
            plan_hash=received.text(fields["plan-hash"]),
            server_round=received.count(fields["server-round"]),
            purpose=received.text(fields["purpose"]),  # type: ignore[arg-type]
            part=received.text(fields["part"]),
            parameters=parameters,
            head=head,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refusal("malformed_task", str(error)) from None
    if not np.isfinite(parameters).all():
        raise Refusal("malformed_task", "parameters are not finite")
    return task


def _array_record(name: str, arrays: Mapping[str, FloatArray]) -> ArrayRecord:
    """Packs what ``common.quantisation.quantised`` returns, its values under a name of their own."""
    return ArrayRecord({name if key == "values" else key: packed(value) for key, value in arrays.items()})


def _parameters(arrays: ArrayRecord) -> FlatArray:
    if not {"parameters"} <= set(arrays) <= {"parameters", "scales"}:
        raise ValueError("expected parameters, and nothing but scales beside them")
    found = {name: unpacked(array) for name, array in arrays.items()}
    return quantisation.restored({"values": found.pop("parameters"), **found}).copy()  # trained in place


def prepared_record(prepared: Prepared) -> RecordDict:
    """Packs the answer to prepare."""
    fields = {name: getattr(prepared, name) for name in _PREPARED_FIELDS}
    fields["parts"] = list(prepared.parts)
    return RecordDict({"reply": ConfigRecord(fields)})


_NOTHING = np.zeros(0, np.float32)
_PARTS = {"train", "validation", "test"}
_PREPARED_FIELDS = tuple(Prepared.__dataclass_fields__)


def read_prepared(record: RecordDict) -> Prepared:
    """Unpacks and validates the answer to prepare.

    Raises:
        InvalidReply: fields are missing, too many or of the wrong kind.
    """
    try:
        fields: dict[str, Any] = dict(received.part(record, "reply", ConfigRecord))
        if set(fields) != set(_PREPARED_FIELDS) or len(record) != 1:
            raise InvalidReply("records")
        for name in ("site", "status", "reason", "role", "data", "patient_is", "feverfew"):
            fields[name] = received.text(fields[name])
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", fields["site"]):
            raise InvalidReply("records")  # the name is also that of a file
        if fields["status"] not in STATUSES:
            raise InvalidReply("records")
        fields["parts"] = tuple(received.text(part) for part in fields["parts"][: len(_PARTS) + 1])
        fields["nominal_patients"] = received.count(fields["nominal_patients"])
    except (KeyError, TypeError, ValueError):
        raise InvalidReply("records") from None
    if fields["nominal_patients"] < 1 or not set(fields["parts"]) <= _PARTS:
        raise InvalidReply("records")
    return Prepared(**fields)


def refusal_record(code: str) -> RecordDict:
    """Packs a refusal: a constant code and nothing else."""
    return RecordDict({"refused": ConfigRecord({"code": code})})


def delivered_record() -> RecordDict:
    """Packs the answer to deliver."""
    return RecordDict({"delivered": ConfigRecord({"delivered": True})})


def require_accepted(record: RecordDict) -> None:
    """Checks that a reply is not a refusal.

    Raises:
        InvalidReply: code ``refused_<code of the site>``; a code that is not a short word is cut off.
    """
    refused = record.get("refused")
    if not isinstance(refused, ConfigRecord):
        return
    code = refused.get("code")
    is_word = isinstance(code, str) and code.isidentifier() and code.isascii() and len(code) <= 40
    raise InvalidReply(f"refused_{code}" if is_word else "refused")


def update_record(update: Update) -> RecordDict:
    """Packs a training reply."""
    metrics: dict[str, int | float] = {"server-round": update.server_round, "weight": update.weight}
    if update.train_loss is not None:
        metrics["train-loss"] = update.train_loss
    return RecordDict(
        {"arrays": _array_record("update", update.arrays), "metrics": MetricRecord(dict(metrics))}
    )


def read_update(
    record: RecordDict,
    *,
    server_round: int,
    num_parameters: int,
    form: Form,
    bound: float,
    max_norm: float,
    weight: float | None,
) -> Update:
    """Unpacks and validates a training reply; returns it in fp32, whatever it came in.

    Args:
        form: the one that the plan asks for.
        bound: largest magnitude of an element that is believed.
        max_norm: largest Euclidean norm that is believed.
        weight: the public weight the reply must carry; None where the site's exact count is the weight.

    Raises:
        InvalidReply: code ``records``, ``server_round``, ``weight``, ``shape``, ``dtype``,
            ``non_finite``, ``out_of_bound`` or ``norm``.
    """
    arrays, metrics = _only(record, "update", *(["scales"] if form in BLOCK else []))
    if not {"server-round", "weight"} <= set(metrics) <= {"server-round", "weight", "train-loss"}:
        raise InvalidReply("records")
    if metrics["server-round"] != server_round:
        raise InvalidReply("server_round")
    claimed = received.weight(metrics["weight"])
    if weight is not None and claimed != weight:
        raise InvalidReply("weight")
    values = _values(arrays, size=num_parameters, form=form)
    if max(values.max(initial=0.0), -values.min(initial=0.0)) > bound:
        raise InvalidReply("out_of_bound")
    if math.sqrt(np.einsum("i,i", values, values, dtype=np.float64)) > max_norm:
        raise InvalidReply("norm")
    loss = metrics.get("train-loss")
    return Update(
        server_round=server_round,
        arrays={"values": values},
        weight=claimed,
        train_loss=None if loss is None else received.metric(loss),
    )


def _values(arrays: ArrayRecord, *, size: int, form: Form) -> FlatArray:
    shapes = {"update": (size,), "scales": (quantisation.num_scales(size, form=form),)}
    dtypes = {"update": quantisation.DTYPES[form], "scales": "float32"}
    found = {
        name: received.decoded(array, shape=shapes[name], dtype=dtypes[name])
        for name, array in arrays.items()
    }
    try:
        values = quantisation.restored({"values": found.pop("update"), **found})
    except ValueError:  # a scale that is negative; all else was looked at before
        raise InvalidReply("records") from None
    if not np.isfinite(values).all():
        raise InvalidReply("non_finite")
    return values


def scored_record(scored: Scored) -> RecordDict:
    """Packs an evaluation reply."""
    return RecordDict(
        {
            "arrays": ArrayRecord({name: packed(value) for name, value in scored.arrays.items()}),
            "metrics": MetricRecord({"server-round": scored.server_round}),
        }
    )


def read_scored(
    record: RecordDict, *, server_round: int, part: str, expected: Mapping[str, ArrayKind]
) -> Scored:
    """Unpacks and validates an evaluation reply.

    Raises:
        InvalidReply: code ``records``, ``server_round``, ``shape``, ``dtype`` or ``non_finite``.
    """
    arrays, metrics = _only(record, *expected)
    if set(metrics) != {"server-round"}:
        raise InvalidReply("records")
    if metrics["server-round"] != server_round:
        raise InvalidReply("server_round")
    length = next((arrays[name].shape[0] for name in expected if arrays[name].shape), ANY)
    decoded = {
        name: received.decoded(
            arrays[name],
            shape=tuple(length if axis == ANY else axis for axis in kind.shape),
            dtype=kind.dtype,
        )
        for name, kind in expected.items()
    }
    return Scored(server_round=server_round, part=part, arrays=decoded)


def _only(record: RecordDict, *names: str) -> tuple[ArrayRecord, MetricRecord]:
    """Returns the two records of a reply that has exactly these arrays and nothing else."""
    if set(record) != {"arrays", "metrics"}:
        raise InvalidReply("records")
    arrays, metrics = record["arrays"], record["metrics"]
    if not isinstance(arrays, ArrayRecord) or not isinstance(metrics, MetricRecord):
        raise InvalidReply("records")
    if set(arrays) != set(names):
        raise InvalidReply("records")
    return arrays, metrics
