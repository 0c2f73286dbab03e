"""What a site's training is made of, as values: the product's own parts, or others in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from client import training
from client.augmentation import augmenter_of
from client.cohort import Part
from client.gaussian import Gaussian
from client.noise import Key
from client.precision import compute_type
from client.training import Gradient, PoissonSampler, Sampler, Trained
from common.calibration import Mechanism
from common.plan import DpSgd, Plan
from simulations.canaries import Canaries, CanaryGradient


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """The parts of training that privacy rests on. An audit takes the product's; a test plants a defect.

    Attributes:
        sampler: makes what draws the patients of a step; arguments as ``PoissonSampler``.
        gradient: makes the gradient function; arguments as ``CanaryGradient``.
        noise: makes of the task's random stream what the noise is drawn from.
        book: names the file of the ledger of a round.
    """

    sampler: Callable[..., Sampler] = PoissonSampler
    gradient: Callable[..., Gradient] = CanaryGradient
    noise: Callable[[Gaussian], Any] = lambda stream: stream
    book: Callable[[int], str] = lambda server_round: "ledger.sqlite"

    def train(
        self,
        network: nn.Module,
        part: Part,
        *,
        plan: Plan,
        mechanism: Mechanism,
        canaries: Canaries,
        key: Key,
    ) -> Trained:
        """Trains one round as ``client.training.train_by_plan`` does; without canaries to the same bits."""
        assert isinstance(plan.privacy, DpSgd)
        return training.train(
            network,
            part,
            training=plan.training,
            sampler=self.sampler_of(plan, mechanism, key=key),
            gradient=self.gradient(
                network,
                canaries=canaries,
                privacy=plan.privacy,
                noise_multiplier=mechanism.noise_multiplier,
                expected_batch=plan.training.expected_batch,
                noise=self.noise(Gaussian(key.derived("noise"))),
                compute=compute_type(plan),
            ),
            augmenter=augmenter_of(plan.training.augmentation, key=key),
        )

    def sampler_of(self, plan: Plan, mechanism: Mechanism, *, key: Key) -> Sampler:
        """Returns the sampler of one task."""
        return self.sampler(
            sample_rate=mechanism.sample_rate,
            cases_per_patient=plan.training.cases_per_patient,
            sampling=key.stream("sampling"),
            choosing=key.stream("cases"),
        )


PRODUCT = Implementation()
