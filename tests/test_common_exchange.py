from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common import exchange, measure
from common.arrays import packed
from common.errors import InvalidReply, Refusal
from common.exchange import Prepared, Scored, Task, Update
from common.quantisation import BLOCK, Form, carried, quantised
from tests import plans
from tests.test_common_arrays import LIES, lying

VALUES = np.array([0.5, -1.0, 2.0], dtype=np.float32)
TASK = Task(run="r-1", plan_hash="ab" * 32, server_round=3, purpose="train", part="", parameters=VALUES)
PREPARED = Prepared(
    site="north",
    status="approved",
    reason="",
    role="training",
    data="private",
    nominal_patients=500,
    patient_is="column",
    parts=("train", "test"),
    feverfew="0.1.0",
)
HISTOGRAM = np.arange(8, dtype=np.float64).reshape(1, 2, 4) - 2


def refused_task(record: RecordDict) -> str:
    with pytest.raises(Refusal) as caught:
        exchange.read_task(record)
    return caught.value.code


def rejected(read: Callable[[], Any]) -> str:
    with pytest.raises(InvalidReply) as caught:
        read()
    return caught.value.code


def update_record(**changes: Any) -> RecordDict:
    """A good reply to round 3 with a few things put in its place; None leaves a metric out."""
    metrics: dict[str, Any] = {"server-round": 3, "weight": 5.0, "train-loss": 0.25}
    metrics |= changes.pop("metrics", {})
    values = changes.pop("values", VALUES)
    arrays = changes.pop("arrays", {"update": packed(values)})
    assert not changes
    record = RecordDict({"arrays": ArrayRecord(arrays)})
    record["metrics"] = MetricRecord({name: value for name, value in metrics.items() if value is not None})
    return record


def read_update(record: RecordDict, **changes: Any) -> Update:
    asked: dict[str, Any] = {
        "server_round": 3,
        "num_parameters": 3,
        "form": "fp32",
        "bound": 4.0,
        "max_norm": 1e38,
        "weight": 5.0,
    }
    return exchange.read_update(record, **(asked | changes))


def pickled() -> bytes:
    """An npy file that would have to be unpickled."""
    file = io.BytesIO()
    np.save(file, np.array([None] * 3), allow_pickle=True)
    return file.getvalue()


def archive() -> bytes:
    """An npz file, which numpy opens in place of an npy file."""
    file = io.BytesIO()
    np.savez(file, update=VALUES)
    return file.getvalue()


def npy(header: str, payload: bytes = VALUES.tobytes()) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + payload


HOSTILE = {
    "no bytes": b"",
    "no array": b"not an array at all",
    "pickled": pickled(),
    "archive": archive(),
    "npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"),
    "open bracket": npy("(" * 9000),
    "no end": VALUES.tobytes()[:-3],
    "too much": VALUES.tobytes() + b"\0\0\0\0",
}


def test_task_is_read_back() -> None:
    again = exchange.read_task(exchange.task_record(TASK))
    assert dataclasses.replace(again, parameters=VALUES) == dataclasses.replace(TASK, parameters=VALUES)
    assert again.parameters.tobytes() == VALUES.tobytes()
    assert again.parameters.dtype == np.float32
    assert again.identity == TASK.identity


def test_task_without_parameters_has_no_arrays() -> None:
    empty = dataclasses.replace(TASK, purpose="prepare", parameters=np.zeros(0, np.float32))
    record = exchange.task_record(empty)
    assert list(record) == ["task"]
    assert exchange.read_task(record).parameters.shape == (0,)


@settings(deadline=None)
@given(
    st.from_regex(r"[\w-][\w.-]{0,20}", fullmatch=True),
    st.integers(0, 2**53 - 1),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=5),
)
def test_any_task_is_read_back_with_the_same_identity(
    run: str, server_round: int, values: list[float]
) -> None:
    parameters = np.array(values, dtype=np.float32)
    task = dataclasses.replace(TASK, run=run, server_round=server_round, parameters=parameters)
    again = exchange.read_task(exchange.task_record(task))
    assert again.identity == task.identity
    assert again.parameters.tobytes() == parameters.tobytes()


def test_identity_is_a_hash_of_everything_that_names_a_task() -> None:
    digest = hashlib.sha256(VALUES.tobytes()).hexdigest()
    text = "\n".join(["r-1", "ab" * 32, "3", "train", "", digest])
    assert TASK.identity == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run", "r-2"),
        ("plan_hash", "cd" * 32),
        ("server_round", 4),
        ("purpose", "evaluate"),
        ("part", "test"),
        ("parameters", np.array([0.5, -1.0, np.nextafter(np.float32(2), 3)], dtype=np.float32)),
    ],
)
def test_another_task_has_another_identity(name: str, value: Any) -> None:
    assert dataclasses.replace(TASK, **{name: value}).identity != TASK.identity


def test_identity_is_of_the_values_and_not_of_their_layout() -> None:
    strided = np.repeat(VALUES, 2)[::2]
    assert dataclasses.replace(TASK, parameters=strided).identity == TASK.identity


@pytest.mark.parametrize("field", ["run", "plan-hash", "server-round", "purpose", "part"])
def test_task_without_a_field_is_malformed(field: str) -> None:
    record = exchange.task_record(TASK)
    del record.config_records["task"][field]
    assert refused_task(record) == "malformed_task"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", 7),
        ("run", "x" * 257),
        ("run", ""),
        ("run", "../up"),
        ("run", "/tmp"),
        ("run", ".."),
        ("run", "a/b"),
        ("run", "a\n"),
        ("run", "a b"),
        ("server-round", -1),
        ("server-round", "3"),
        ("server-round", True),
        ("server-round", 2.0),
        ("server-round", 2**53),
        ("part", b"test"),
        ("purpose", ["train"]),
    ],
)
def test_task_with_a_field_of_the_wrong_kind_is_malformed(field: str, value: Any) -> None:
    record = exchange.task_record(TASK)
    record.config_records["task"][field] = value
    assert refused_task(record) == "malformed_task"


@pytest.mark.parametrize(
    "array",
    [
        packed(VALUES.astype(np.float64)),
        packed(VALUES.reshape(3, 1)),
        packed(np.array([1.0, np.nan], dtype=np.float32)),
        packed(np.array([1.0, np.inf], dtype=np.float32)),
        *(lying(packed(VALUES), **lie) for lie in LIES.values()),
        *(lying(packed(VALUES), data=data) for data in HOSTILE.values()),
    ],
    ids=["float64", "matrix", "nan", "inf", *LIES, *HOSTILE],
)
def test_task_whose_parameters_are_not_one_finite_float32_array_is_malformed(array: Array) -> None:
    record = exchange.task_record(TASK)
    record["arrays"] = ArrayRecord({"parameters": array})
    assert refused_task(record) == "malformed_task"


def test_task_with_parameters_under_another_name_is_malformed() -> None:
    record = exchange.task_record(TASK)
    record["arrays"] = ArrayRecord({"weights": packed(VALUES)})
    assert refused_task(record) == "malformed_task"
    assert refused_task(RecordDict()) == "malformed_task"


def test_prepared_is_read_back() -> None:
    assert exchange.read_prepared(exchange.prepared_record(PREPARED)) == PREPARED
    declined = dataclasses.replace(PREPARED, status="declined", reason="budget_exceeded")
    assert exchange.read_prepared(exchange.prepared_record(declined)) == declined


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site", 1),
        ("site", "x" * 257),
        ("status", b"approved"),
        ("nominal_patients", 0),
        ("nominal_patients", -5),
        ("nominal_patients", 2.5),
        ("nominal_patients", True),
        ("parts", [1, 2]),
        ("parts", 3),
        ("extra", "field"),
    ],
)
def test_prepared_with_a_wrong_field_is_rejected(field: str, value: Any) -> None:
    record = exchange.prepared_record(PREPARED)
    record.config_records["reply"][field] = value
    assert rejected(lambda: exchange.read_prepared(record)) == "records"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Prepared)])
def test_prepared_without_a_field_is_rejected(field: str) -> None:
    record = exchange.prepared_record(PREPARED)
    del record.config_records["reply"][field]
    assert rejected(lambda: exchange.read_prepared(record)) == "records"


def test_prepared_with_another_record_is_rejected() -> None:
    record = exchange.prepared_record(PREPARED)
    record["more"] = ConfigRecord({"text": "of a patient"})
    assert rejected(lambda: exchange.read_prepared(record)) == "records"
    assert rejected(lambda: exchange.read_prepared(RecordDict())) == "records"


def test_refusal_is_told_by_its_code() -> None:
    record = exchange.refusal_record("budget_exceeded")
    assert rejected(lambda: exchange.require_accepted(record)) == "refused_budget_exceeded"


@pytest.mark.parametrize("code", ["two words", "x" * 41, "drop\ntable", "", "prüfung", 7, ["a"]])
def test_refusal_with_anything_but_a_short_word_is_cut_off(code: Any) -> None:
    record = RecordDict({"refused": ConfigRecord({"code": code})})
    assert rejected(lambda: exchange.require_accepted(record)) == "refused"


def test_refusal_without_a_code_is_a_refusal() -> None:
    record = RecordDict({"refused": ConfigRecord({})})
    assert rejected(lambda: exchange.require_accepted(record)) == "refused"


def test_replies_that_are_no_refusal_are_accepted() -> None:
    for record in (update_record(), exchange.delivered_record(), exchange.prepared_record(PREPARED)):
        exchange.require_accepted(record)


@pytest.mark.parametrize("loss", [0.25, -0.5, None])
def test_update_is_read_back(loss: float | None) -> None:
    update = Update(server_round=3, arrays={"values": VALUES}, weight=5.0, train_loss=loss)
    again = read_update(exchange.update_record(update))
    assert (again.server_round, again.weight, again.train_loss) == (3, 5.0, loss)
    assert again.arrays["values"].tobytes() == VALUES.tobytes()


def test_update_at_the_bound_is_taken_and_beyond_it_is_not() -> None:
    assert read_update(update_record(), bound=2.0).arrays["values"][2] == 2.0
    assert rejected(lambda: read_update(update_record(), bound=1.999)) == "out_of_bound"
    assert rejected(lambda: read_update(update_record(values=-VALUES), bound=1.999)) == "out_of_bound"


def test_exact_weight_is_taken_where_none_is_announced() -> None:
    assert read_update(update_record(metrics={"weight": 77}), weight=None).weight == 77


@pytest.mark.parametrize(
    ("metrics", "code"),
    [
        ({"server-round": 2}, "server_round"),
        ({"server-round": None}, "records"),
        ({"weight": None}, "records"),
        ({"more": 1.0}, "records"),
        ({"weight": 5.5}, "weight"),
        ({"weight": 0.0}, "weight"),
        ({"weight": -5.0}, "weight"),
        ({"weight": 1e8}, "weight"),
        ({"weight": math.nan}, "non_finite"),
        ({"weight": math.inf}, "non_finite"),
        ({"weight": [5.0]}, "non_finite"),
        ({"train-loss": math.nan}, "non_finite"),
        ({"train-loss": -math.inf}, "non_finite"),
        ({"train-loss": [1.0, 2.0]}, "non_finite"),
    ],
)
def test_update_with_wrong_metrics_is_rejected(metrics: dict[str, Any], code: str) -> None:
    assert rejected(lambda: read_update(update_record(metrics=metrics))) == code


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e7 + 1])
def test_weight_that_no_site_can_have_is_rejected_even_where_none_is_announced(weight: float) -> None:
    assert rejected(lambda: read_update(update_record(metrics={"weight": weight}), weight=None)) == "weight"


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (packed(VALUES[:2]), "shape"),
        (packed(np.zeros(0, np.float32)), "shape"),
        (packed(np.array(1, np.float32)), "shape"),
        (packed(VALUES.reshape(1, 3)), "shape"),
        (packed(VALUES.astype(np.float64)), "dtype"),
        (packed(VALUES.astype(np.int32)), "dtype"),
        (packed(np.array([0, np.nan, 0], np.float32)), "non_finite"),
        (packed(np.array([0, 0, -np.inf], np.float32)), "non_finite"),
        (lying(packed(VALUES[:2]), shape=(3,)), "shape"),
        (lying(packed(np.zeros(10_000, np.float32)), shape=(3,)), "shape"),
        (lying(packed(VALUES.astype(np.float64)), dtype="float32"), "shape"),
        (lying(packed(VALUES), stype="pickle"), "shape"),
        *((lying(packed(VALUES), data=data), "shape") for data in HOSTILE.values()),
    ],
)
def test_update_whose_array_is_not_what_it_should_be_is_rejected(array: Array, code: str) -> None:
    assert rejected(lambda: read_update(update_record(arrays={"update": array}))) == code


@pytest.mark.parametrize("names", [[], ["other"], ["update", "other"]])
def test_update_with_other_arrays_is_rejected(names: list[str]) -> None:
    arrays = {name: packed(VALUES) for name in names}
    assert rejected(lambda: read_update(update_record(arrays=arrays))) == "records"


def test_update_with_records_of_another_kind_or_number_is_rejected() -> None:
    swapped = RecordDict({"arrays": MetricRecord({"a": 1}), "metrics": MetricRecord({"server-round": 3})})
    more = update_record()
    more["notes"] = ConfigRecord({"text": "of a patient"})
    for record in (swapped, more, RecordDict(), exchange.delivered_record()):
        assert rejected(lambda record=record: read_update(record)) == "records"  # type: ignore[misc]


@settings(deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_changed_bytes_of_an_array_are_rejected_or_change_its_values(position: int, patch: bytes) -> None:
    data = bytearray(packed(VALUES).data)
    data[position : position + len(patch)] = patch
    record = update_record(arrays={"update": lying(packed(VALUES), data=bytes(data))})
    try:
        values = read_update(record, bound=1e38).arrays["values"]
    except InvalidReply as problem:
        assert problem.code in {"shape", "non_finite", "out_of_bound"}
    else:
        assert (values.shape, str(values.dtype)) == ((3,), "float32")


def test_task_whose_arrays_are_something_else_is_malformed() -> None:
    record = exchange.task_record(TASK)
    record["arrays"] = ConfigRecord({"parameters": 1.0})
    assert refused_task(record) == "malformed_task"


def test_parameters_that_were_read_may_be_written_to() -> None:
    """torch warns of arrays that may not."""
    assert exchange.read_task(exchange.task_record(TASK)).parameters.flags.writeable


def read_scored(record: RecordDict, *, exact: bool, **changes: Any) -> Scored:
    expected = measure.arrays_of(plans.asked(), bins=4, exact=exact)
    options: dict[str, Any] = {"server_round": 3, "part": "test", "expected": expected}
    return exchange.read_scored(record, **(options | changes))


def noised(**changes: Any) -> RecordDict:
    scored: dict[str, Any] = {
        "server_round": 3,
        "part": "test",
        "arrays": {"histogram": HISTOGRAM},
    }
    return exchange.scored_record(Scored(**(scored | changes)))


def exact_arrays(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "scores": np.array([[0.2], [0.9]], np.float32),
        "targets": np.array([[0], [1]], np.int8),
        "weights": np.array([1.0, 0.5]),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_noised_scores_are_read_back() -> None:
    scored = read_scored(noised(), exact=False)
    assert (scored.server_round, scored.part) == (3, "test")
    np.testing.assert_array_equal(scored.arrays["histogram"], HISTOGRAM)


def test_exact_scores_are_read_back() -> None:
    scored = read_scored(noised(arrays=exact_arrays()), exact=True)
    for name, array in exact_arrays().items():
        np.testing.assert_array_equal(scored.arrays[name], array)
        assert scored.arrays[name].dtype == array.dtype


def test_exact_scores_of_nobody_are_read_back() -> None:
    nobody = exact_arrays(
        scores=np.zeros((0, 1), np.float32), targets=np.zeros((0, 1), np.int8), weights=np.zeros(0)
    )
    assert read_scored(noised(arrays=nobody), exact=True).arrays["scores"].shape == (0, 1)


def test_exact_and_noised_scores_are_not_taken_for_each_other() -> None:
    assert rejected(lambda: read_scored(noised(), exact=True)) == "records"
    assert rejected(lambda: read_scored(noised(arrays=exact_arrays()), exact=False)) == "records"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"server_round": 2}, "server_round"),
        ({"arrays": {"histogram": HISTOGRAM.astype(np.float32)}}, "dtype"),
        ({"arrays": {"histogram": HISTOGRAM[:, :, :3]}}, "shape"),
        ({"arrays": {"histogram": HISTOGRAM[0]}}, "shape"),
        ({"arrays": {"histogram": HISTOGRAM * np.nan}}, "non_finite"),
        ({"arrays": {"histogram": HISTOGRAM, "scores": HISTOGRAM}}, "records"),
        ({"arrays": {}}, "records"),
    ],
)
def test_wrong_noised_scores_are_rejected(changes: dict[str, Any], code: str) -> None:
    assert rejected(lambda: read_scored(noised(**changes), exact=False)) == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"weights": None}, "records"),
        ({"weights": np.array([1.0])}, "shape"),
        ({"weights": np.array([[1.0, 0.5]])}, "shape"),
        ({"weights": np.array([1.0, 0.5], np.float32)}, "dtype"),
        ({"weights": np.array([1.0, np.inf])}, "non_finite"),
        ({"scores": np.array([0.2, 0.9], np.float32)}, "shape"),
        ({"scores": np.array([[0.2], [np.nan]], np.float32)}, "non_finite"),
        ({"targets": np.array([[0], [1]])}, "dtype"),
        ({"targets": np.array([[0]], np.int8)}, "shape"),
    ],
)
def test_wrong_exact_scores_are_rejected(changes: dict[str, Any], code: str) -> None:
    assert rejected(lambda: read_scored(noised(arrays=exact_arrays(**changes)), exact=True)) == code


def test_scores_with_another_metric_are_rejected() -> None:
    record = noised()
    record.metric_records["metrics"]["seconds"] = 12.5
    assert rejected(lambda: read_scored(record, exact=False)) == "records"


SHORT = tuple(BLOCK)
LONG = np.random.default_rng(0).standard_normal(300).astype(np.float32)


def short_update(form: Form, **changes: Any) -> RecordDict:
    """A good reply in a form, with arrays put in the place of others; None leaves one out."""
    sent = quantised(LONG, form=form)
    arrays = {"update": sent["values"], "scales": sent["scales"]} | changes
    return update_record(arrays={name: packed(value) for name, value in arrays.items() if value is not None})


def read_short(record: RecordDict, *, form: Form) -> Update:
    return read_update(record, form=form, num_parameters=len(LONG), bound=9.0)


@pytest.mark.parametrize("form", SHORT)
def test_an_update_in_fewer_bytes_is_read_as_what_arrives_of_it(form: Form) -> None:
    sent = Update(server_round=3, arrays=quantised(LONG, form=form), weight=5.0, train_loss=None)
    again = read_short(exchange.update_record(sent), form=form)
    assert set(again.arrays) == {"values"}
    assert again.arrays["values"].tobytes() == carried(LONG, form=form).tobytes()


@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"scales": None}, "records"),
        ({"more": np.zeros(1, np.float32)}, "records"),
        ({"scales": np.zeros(7, np.float32)}, "shape"),
        ({"scales": np.zeros((2, 1), np.float32)}, "shape"),
        ({"scales": lambda scales: scales.astype(np.float64)}, "dtype"),
        ({"scales": lambda scales: scales * np.float32(np.nan)}, "non_finite"),
        ({"scales": lambda scales: scales + np.float32(np.inf)}, "non_finite"),
        ({"scales": lambda scales: -1 - scales}, "records"),
        ({"scales": lambda scales: scales * 0 + np.float32(3e38)}, "non_finite"),
        ({"scales": lambda scales: scales * 100}, "out_of_bound"),
        ({"update": LONG}, "dtype"),
        ({"update": np.zeros(300, np.uint8)}, "dtype"),
        ({"update": np.zeros(299, np.int8)}, "shape"),
    ],
)
def test_an_update_in_fewer_bytes_is_rejected_by_what_is_wrong_with_it(
    form: Form, changes: dict[str, Any], code: str
) -> None:
    scales = quantised(LONG, form=form)["scales"]
    made = {name: value(scales) if callable(value) else value for name, value in changes.items()}
    assert rejected(lambda: read_short(short_update(form, **made), form=form)) == code


def test_an_update_of_another_form_than_the_plans_is_rejected() -> None:
    for sent, asked in permutations(("fp32", "fp16", "int8"), 2):
        record = exchange.update_record(
            Update(server_round=3, arrays=quantised(LONG, form=sent), weight=5.0, train_loss=None)
        )
        assert rejected(lambda record=record, asked=asked: read_short(record, form=asked)) in (  # type: ignore[misc]
            "records",
            "dtype",
        )


@pytest.mark.parametrize("form", SHORT)
def test_a_task_in_fewer_bytes_is_the_same_task_at_both_ends(form: Form) -> None:
    task = dataclasses.replace(TASK, parameters=carried(LONG, form=form))
    again = exchange.read_task(exchange.task_record(task, form=form))
    assert again.parameters.tobytes() == task.parameters.tobytes() and again.identity == task.identity


@pytest.mark.parametrize(
    "arrays",
    [
        {"parameters": LONG, "scales": np.ones(1, np.float32)},
        {"parameters": np.ones(300, np.int8)},
        {"parameters": np.ones(300, np.int8), "scales": np.ones(3, np.float32)},
        {"parameters": np.ones(300, np.int8), "scales": -np.ones(2, np.float32)},
        {"parameters": np.full(300, 127, np.int8), "scales": np.full(2, 3e38, np.float32)},
        {"parameters": np.ones(300, np.int16), "scales": np.ones(2, np.float32)},
        {"parameters": LONG, "more": LONG},
    ],
)
def test_a_task_of_no_form_is_refused(arrays: dict[str, Any]) -> None:
    record = exchange.task_record(TASK)
    record["arrays"] = ArrayRecord({name: packed(value) for name, value in arrays.items()})
    assert refused_task(record) == "malformed_task"
