"""Plan: everything the coordinator decides for a run, as one immutable value with one hash.

No field has a default here: defaults are written in ``conf/`` only (a test holds this).
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from common import landmarks, schema
from common.asked import Asked
from common.augmented import Augmentation
from common.errors import ConfigError, SchemaError
from common.landmarks import LandmarkHistograms
from common.quantisation import Exchange
from common.strategy import Strategy
from common.unet import Unet
from common.value import Name, NonNegative, Positive, Seconds, Value, canonical_json, first_problem

SCHEMA_VERSION = 3
"""Raised with every key that comes or goes. A plan is known by its hash, so none is ever brought forward."""

NO_EXPANDED_WEIGHTS = ("densenet121", "unet")
"""Models that ``privacy.clipping=ew`` cannot train."""
NO_PRIVATE_BFLOAT16 = ("unet",)
"""Models in which rounding to bfloat16 lets the rest of a batch change what a patient contributes."""


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


class Linear(Value):
    """Logistic regression: all pixels of a case, and a linear head that sees nothing else."""

    name: Literal["linear"]


class ArticleCnn(Value):
    """The CNN of the article that inspired the project; binary tasks on 64x64x3."""

    name: Literal["article_cnn"]


class DenseNet121(Value):
    """MONAI's DenseNet121, BatchNorm replaced by GroupNorm."""

    name: Literal["densenet121"]


class EfficientNetB0(Value):
    """MONAI's EfficientNet-B0, BatchNorm replaced by GroupNorm."""

    name: Literal["efficientnet_b0"]


Model = Annotated[
    Cnn | Linear | ArticleCnn | DenseNet121 | EfficientNetB0 | Unet, Field(discriminator="name")
]


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
    precision: Literal["auto", "fp32", "bf16"]
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
    clipping: Literal["auto", "bookkeeping", "hooks", "ghost", "ew"]

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


class Plan(Asked):
    """Everything the coordinator decides for a run, and what it asks of a case; the same at every site."""

    schema_version: Literal[3]
    study: Name
    randomness: Literal["secure", "seeded"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # torch drops what is above 32 bits
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    sites: Annotated[int, Field(ge=1, le=100_000)]
    sites_per_round: Annotated[int, Field(ge=1, le=100_000)] | None
    quorum: Annotated[int, Field(ge=1, le=100_000)]
    node_deadline_seconds: Seconds
    approval_deadline_seconds: Annotated[float, Field(ge=0, le=30 * 86400)]
    reply_deadline_seconds: Seconds
    grace_seconds: Seconds
    model: Model
    training: Training
    privacy: Privacy
    evaluation: Evaluation
    strategy: Strategy
    exchange: Exchange
    landmarks: LandmarkHistograms | None

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.quorum > self.sites:
            raise ValueError(f"expected quorum <= sites, found {self.quorum} > {self.sites}")
        self._sites_per_round_fits()
        self._quorum_is_enough_for_the_strategy()
        if self.strategy.weights == "examples" and self.privacy.mechanism != "none":
            raise ValueError("strategy.weights=examples would release exact counts; use equal or nominal")
        if self.privacy.mechanism == "none" and self.evaluation.noise_multiplier is not None:
            raise ValueError("evaluation.noise_multiplier has no effect with privacy=none; set it to null")
        self._evaluation_has_effect()
        self._landmarks_fit()
        self._augmentation_fits()
        self._clipping_is_possible()
        if self.model.name == "article_cnn":
            self._article_cnn_fits()
        self._model_fits_the_target()
        return self

    def _sites_per_round_fits(self) -> None:
        asked = self.sites_per_round
        if asked is not None and not self.quorum <= asked <= self.sites:
            raise ValueError(
                f"expected quorum <= sites_per_round <= sites, found sites_per_round={asked} with "
                f"quorum={self.quorum} and sites={self.sites}"
            )
        if asked is not None and self.landmarks is not None:
            raise ValueError("plan.landmarks asks every site once; set plan.sites_per_round=null")

    def _quorum_is_enough_for_the_strategy(self) -> None:
        least = self.strategy.least_updates
        if self.quorum < least:
            raise ValueError(
                f"expected plan.quorum >= {least} with strategy={self.strategy.name} "
                f"({self.strategy.condition}), "
                f"found {self.quorum}; raise the quorum, or choose another strategy"
            )

    def _model_fits_the_target(self) -> None:
        if (self.target == "mask") != isinstance(self.model, Unet):
            raise ValueError(
                f"expected model=unet with target mask and with no other, found model={self.model.name} with "
                f"target {self.target}"
            )
        if isinstance(self.model, Unet):
            self._unet_fits(self.model)

    def _unet_fits(self, unet: Unet) -> None:
        if any(side % unet.divisor for side in self.preprocessing.size):
            raise ValueError(
                f"expected sides that model.strides={list(unet.strides)} divide (by {unet.divisor}), found "
                f"preprocessing.size={list(self.preprocessing.size)}"
            )
        if self.clinical:
            raise ValueError("plan.clinical is joined before a linear head, which model=unet has not")

    def _evaluation_has_effect(self) -> None:
        asked = self.evaluation
        if asked.noise_multiplier is not None and not self.validation_rounds and not asked.test_at_end:
            raise ValueError("evaluation.noise_multiplier has no effect where nothing is evaluated")

    def _landmarks_fit(self) -> None:
        if self.landmarks is None:
            return
        landmarks.check_place(self.landmarks, self.preprocessing)
        if self.rounds > 1 or self.validation_rounds or self.evaluation.test_at_end:
            raise ValueError(
                "plan.landmarks takes one round and evaluates nothing: choose plan=landmarks, which sets both"
            )
        if self.exchange.update != "fp32":
            raise ValueError("exchange.update has no effect with plan.landmarks; set it to fp32")

    def _augmentation_fits(self) -> None:
        asked, dimensions = self.training.augmentation, len(self.preprocessing.size)
        if asked is not None and max(asked.flip_axes, default=0) >= dimensions:
            raise ValueError(
                f"expected flip_axes below {dimensions}, for so many axes has preprocessing.size, found "
                f"{list(asked.flip_axes)}"
            )

    def _clipping_is_possible(self) -> None:
        if self.privacy.mechanism == "none":
            return
        way, training = self.privacy.clipping, self.training
        if way == "ghost" and (training.cases_per_patient > 1 or training.augmentation is not None):
            raise ValueError(
                "privacy.clipping=ghost clips cases, not patients: expected training.cases_per_patient=1 and "
                "no augmentation; or choose privacy.clipping=auto"
            )
        if training.precision == "bf16" and way in ("hooks", "ghost", "ew"):
            raise ValueError(
                f"training.precision=bf16 is not possible with privacy.clipping={way}: choose "
                "privacy.clipping=auto, or training.precision=auto"
            )
        if training.precision == "bf16" and self.model.name in NO_PRIVATE_BFLOAT16:
            raise ValueError(
                f"training.precision=bf16 cannot train model={self.model.name} privately: rounding would let "
                "one patient change what others contribute; choose training.precision=auto, or fp32"
            )
        if way == "ew" and self.model.name in NO_EXPANDED_WEIGHTS:
            raise ValueError(
                f"privacy.clipping=ew cannot train model={self.model.name}: torch has no expanded weights "
                "for some of its layers; choose privacy.clipping=auto"
            )

    def _article_cnn_fits(self) -> None:
        if self.preprocessing.num_channels != 3 or self.preprocessing.size != (64, 64):
            raise ValueError(
                "model=article_cnn takes 64x64x3: set preprocessing.channels=3 preprocessing.size=[64,64]"
            )
        if self.num_outputs != 1:
            raise ValueError(f"model=article_cnn is for one of two classes, found {len(self.classes)}")

    @property
    def asked(self) -> Asked:
        """What the plan asks of a case, without the rest: cohorts are opened by it.

        Of landmarks, the case as it is after the scaling.
        """
        asked = Asked.model_validate({name: getattr(self, name) for name in Asked.model_fields})
        return asked if self.landmarks is None else landmarks.measured(asked)

    @property
    def validation_rounds(self) -> tuple[int, ...]:
        """Rounds after which the validation part is evaluated, ascending."""
        every = self.evaluation.validation_every
        return tuple(range(every, self.rounds + 1, every)) if every else ()

    @property
    def num_steps(self) -> int:
        """Noisy steps of one site over the whole run."""
        return self.rounds * self.round_steps

    @property
    def round_steps(self) -> int:
        """Noisy steps of one site in a round; the histograms of landmarks are released in one."""
        return self.training.local_steps if self.landmarks is None else 1

    def to_json(self) -> str:
        """Returns canonical JSON: sorted keys, no spaces, ASCII."""
        return self._text_and_hash[0]

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, 64 hexadecimal digits."""
        return self._text_and_hash[1]

    def __hash__(self) -> int:
        return hash(self.hash)

    @cached_property
    def _text_and_hash(self) -> tuple[str, str]:
        """Made once: a task asks for the hash a dozen times."""
        text = canonical_json(self.model_dump(mode="json"))
        return text, hashlib.sha256(text.encode()).hexdigest()

    def __copy__(self) -> Self:
        """Returns a copy that makes its own text: ``model_copy`` may change it."""
        copied = super().__copy__()
        copied.__dict__.pop("_text_and_hash", None)
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Returns a copy, see ``__copy__``."""
        copied = super().__deepcopy__(memo)
        copied.__dict__.pop("_text_and_hash", None)
        return copied

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
            SchemaError: the plan of an older or a newer Feverfew.
            ConfigError: unknown key, wrong type, value out of range; names the key.
        """
        found = tree.get("schema_version") if isinstance(tree, dict) else SCHEMA_VERSION
        if found != SCHEMA_VERSION and schema.require(found, newest=SCHEMA_VERSION, what="a plan"):
            raise SchemaError(
                f"Expected a plan of schema {SCHEMA_VERSION}, found {found}: an older Feverfew made it; "
                "compose it again with feverfew-server plan."
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(first_problem(error)) from None
