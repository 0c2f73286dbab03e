"""Plan: everything the coordinator decides for a run, as one immutable value with one hash.

No field has a default here: defaults are written in ``conf/`` only (a test holds this).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError

SCHEMA_VERSION = 1

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=8, le=1024)]
Classes = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(min_length=2)]


class Value(BaseModel):
    """A frozen value that refuses unknown keys, wrong types and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Cnn(Value):
    """Convolution blocks with GroupNorm, and a linear head that sees a ``head_size`` x ``head_size`` grid.

    ``first_block``: ``normalised`` like the others, which makes it blind to an image's contrast; or
    ``contrast``, which begins with filters of zero mean and no norm, so that it answers to contrast
    and not to brightness.
    """

    name: Literal["cnn"]
    channels: Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(min_length=1, max_length=5)]
    groups: Annotated[int, Field(ge=1, le=64)]
    head_size: Annotated[int, Field(ge=1, le=16)]
    pooling: Literal["max", "average"]
    pool_sizes: tuple[Annotated[int, Field(ge=1, le=8)], ...]
    first_block: Literal["normalised", "contrast"]

    @model_validator(mode="after")
    def _blocks_fit_together(self) -> Self:
        if len(self.pool_sizes) != len(self.channels):
            raise ValueError(f"expected one pool size for each of channels, found {self.pool_sizes}")
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"expected channels divisible by groups={self.groups}, found {self.channels}")
        return self


class ArticleCnn(Value):
    """The CNN of the article that inspired the project; binary tasks on 64x64x3."""

    name: Literal["article_cnn"]


class DenseNet121(Value):
    """MONAI's DenseNet121, BatchNorm replaced by GroupNorm."""

    name: Literal["densenet121"]


class EfficientNetB0(Value):
    """MONAI's EfficientNet-B0, BatchNorm replaced by GroupNorm."""

    name: Literal["efficientnet_b0"]


Model = Annotated[Cnn | ArticleCnn | DenseNet121 | EfficientNetB0, Field(discriminator="name")]


class Preprocessing(Value):
    """What is asked of a case: an array of ``(channels, *size)`` with values in [0, 1].

    Intensities between ``lower`` and ``upper`` are scaled to [0, 1], others clipped. With ``percentile``
    these are percentiles of the image itself (a case is judged by itself alone); with ``window`` they are
    intensities, such as Hounsfield units or the range of a raster, and contrast is kept as it was.
    """

    channels: Literal[1, 3]
    size: tuple[Size, Size]
    scaling: Literal["percentile", "window"]
    lower: Annotated[float, Field(allow_inf_nan=False)]
    upper: Annotated[float, Field(allow_inf_nan=False)]

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"expected lower < upper, found {self.lower} and {self.upper}")
        if self.scaling == "percentile" and not 0 <= self.lower < self.upper <= 100:
            raise ValueError(f"expected percentiles in [0, 100], found {self.lower} and {self.upper}")
        return self


class Augmentation(Value):
    """Each case enters a step as so many random copies, whose gradients are averaged before the clip.

    Shifts are fractions of the width and of the height, a zoom by z makes things up to 1 + z times as large
    and up to 1 - z times as small, and a flip mirrors left and right in half of the copies.
    """

    copies: Annotated[int, Field(ge=1, le=64)]
    max_shift_fraction: Annotated[float, Field(ge=0, le=0.5)]
    max_rotation_degrees: Annotated[float, Field(ge=0, le=180)]
    max_zoom_fraction: Annotated[float, Field(ge=0, le=0.5)]
    flip: bool

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if not (self.max_shift_fraction or self.max_rotation_degrees or self.max_zoom_fraction or self.flip):
            raise ValueError("expected a shift, rotation, zoom or flip, found none; set augmentation to null")
        return self


class Training(Value):
    """Local training of one round at one site."""

    local_steps: Annotated[int, Field(ge=0, le=100_000)]
    expected_batch: Annotated[int, Field(ge=1, le=100_000)]
    cases_per_patient: Annotated[int, Field(ge=1, le=64)]
    physical_batch: Annotated[int, Field(ge=1, le=4096)]
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    proximal_mu: NonNegative
    augmentation: Augmentation | None


class NoPrivacy(Value):
    """No clipping, no noise, exact metrics; every report says "none"."""

    mechanism: Literal["none"]


class DpSgd(Value):
    """Patient-level DP-SGD (Abadi et al. 2016). Exactly one of target and multiplier is given."""

    mechanism: Literal["dp_sgd"]
    noise: Literal["own", "shared"]
    target_epsilon: Annotated[float, Field(gt=0, le=1000)] | None
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)] | None
    max_noise_multiplier: Annotated[float, Field(gt=0, le=1e6)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    max_grad_norm: Positive
    loss_bound: Positive
    loss_noise_ratio: Annotated[float, Field(ge=1, le=1000)]

    @model_validator(mode="after")
    def _one_of_target_and_multiplier(self) -> Self:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("expected exactly one of target_epsilon and noise_multiplier, the other null")
        if self.noise_multiplier is not None and self.noise_multiplier > self.max_noise_multiplier:
            raise ValueError("expected noise_multiplier <= max_noise_multiplier")
        return self

    @model_validator(mode="after")
    def _noise_is_own(self) -> Self:
        if self.noise == "shared":
            raise ValueError(
                "noise=shared is refused: a site's part of the noise protects nobody unless the server sees "
                "the sum of all sites alone, and it sees each update; use noise=own "
                "(docs/decisions/013-shared-noise.md)"
            )
        return self


Privacy = Annotated[NoPrivacy | DpSgd, Field(discriminator="mechanism")]


class Evaluation(Value):
    """What is measured and how finely; released as score histograms by class."""

    bins: Annotated[int, Field(ge=2, le=1000)]
    validation_every: Annotated[int, Field(ge=0, le=100_000)]
    test_at_end: bool
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)] | None


class FedAvg(Value):
    """Federated averaging (McMahan et al. 2017) of updates with public weights."""

    name: Literal["fedavg"]
    weights: Literal["equal", "nominal", "examples"]
    server_learning_rate: Positive
    update_bound: Annotated[float, Field(gt=0, le=1024)]


Strategy = FedAvg


class Plan(Value):
    """Everything the coordinator decides for a run; the same at every site."""

    schema_version: Literal[1]
    study: Name
    classes: Classes
    randomness: Literal["secure", "seeded"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # torch drops what is above 32 bits
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    sites: Annotated[int, Field(ge=1, le=100_000)]
    quorum: Annotated[int, Field(ge=1, le=100_000)]
    node_deadline_seconds: Seconds
    reply_deadline_seconds: Seconds
    grace_seconds: Seconds
    model: Model
    preprocessing: Preprocessing
    training: Training
    privacy: Privacy
    evaluation: Evaluation
    strategy: Strategy

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.quorum > self.sites:
            raise ValueError(f"expected quorum <= sites, found {self.quorum} > {self.sites}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected distinct classes, found {list(self.classes)}")
        if self.strategy.weights == "examples" and self.privacy.mechanism != "none":
            raise ValueError("strategy.weights=examples would release exact counts; use equal or nominal")
        if self.privacy.mechanism == "none" and self.evaluation.noise_multiplier is not None:
            raise ValueError("evaluation.noise_multiplier has no effect with privacy=none; set it to null")
        self._evaluation_has_effect()
        if self.model.name == "article_cnn":
            self._article_cnn_fits()
        return self

    def _evaluation_has_effect(self) -> None:
        asked = self.evaluation
        if asked.noise_multiplier is not None and not self.validation_rounds and not asked.test_at_end:
            raise ValueError("evaluation.noise_multiplier has no effect where nothing is evaluated")

    def _article_cnn_fits(self) -> None:
        if self.preprocessing.channels != 3 or self.preprocessing.size != (64, 64):
            raise ValueError(
                "model=article_cnn takes 64x64x3: set preprocessing.channels=3 preprocessing.size=[64,64]"
            )
        if len(self.classes) != 2:
            raise ValueError(f"model=article_cnn is for two classes, found {len(self.classes)}")

    @property
    def num_outputs(self) -> int:
        """One logit for two classes (sigmoid), else one per class (softmax)."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    @property
    def validation_rounds(self) -> tuple[int, ...]:
        """Rounds after which the validation part is evaluated, ascending."""
        every = self.evaluation.validation_every
        return tuple(range(every, self.rounds + 1, every)) if every else ()

    @property
    def num_steps(self) -> int:
        """Noisy steps of one site over the whole run."""
        return self.rounds * self.training.local_steps

    def to_json(self) -> str:
        """Returns canonical JSON: sorted keys, no spaces, ASCII."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads a plan; the inverse of ``to_json``.

        Raises:
            ConfigError: not JSON, unknown key, wrong type, value out of range.
        """
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Expected a plan in JSON, found text that is not ({error}).") from None
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: Any) -> Plan:
        """Reads a plan from plain dictionaries.

        Raises:
            ConfigError: unknown key, wrong type, value out of range; names the key.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None


def canonical_json(tree: Any) -> str:
    """Returns the one JSON text of a tree: sorted keys, no spaces, ASCII, no NaN.

    >>> canonical_json({"b": 1.0, "a": [True, None]})
    '{"a":[true,null],"b":1.0}'
    """
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def first_problem(error: ValidationError) -> str:
    """Returns one line about the first thing that is wrong, with the key that is to blame."""
    found = error.errors(include_url=False)
    first = found[0]
    where = ".".join(str(part) for part in first["loc"]) or "plan"
    value = first.get("input")
    shown = f", found {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""
    if first["type"] == "extra_forbidden":
        return f"Unknown key '{where}'; see conf/ for the keys that exist."
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}{more}."
