"""The largest Euclidean norm that an honest update can have under DP-SGD, from public values alone.

In every step the sum of clipped gradients is at most as long as the number of patients drawn times
``max_grad_norm``, and the noise is hardly longer than its standard deviation times the root of the number of
parameters. An update beyond that was not made by the plan's training.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from common.calibration import largest_noise_multiplier
from common.model import FlatArray
from common.plan import DpSgd, Plan
from common.quantisation import largest_gain

FAILURE_PROB: Final = 1e-12
"""That one step of an honest site goes beyond what is assumed of its noise or of its batch, each."""
ROUNDING: Final = 1.001
"""Of float32 arithmetic."""
PATIENTS_TO_NOMINAL: Final = 2.0
"""An honest site has at most so many times its nominal number of patients; ``check`` warns long before."""


def largest_norm(plan: Plan, *, nominal_patients: int, parameters: FlatArray) -> float:
    """Returns a bound on the norm of the update of one round, as it is sent; infinite without privacy:
    nothing is clipped.

    Guarantee: an honest site with at most twice its nominal number of patients exceeds it in a round with a
    probability below 2e-12 for each of its steps. It is no tighter than the sum of the norms of all steps.

    Source: for the noise, the concentration of the norm of a Gaussian vector about at most the root of its
    dimension (Boucheron, Lugosi and Massart 2013, Concentration Inequalities, theorem 5.6); for the batch,
    Bernstein's inequality.

    Args:
        parameters: those that the round begins with; weight decay pulls at them.
    """
    privacy, training = plan.privacy, plan.training
    if not isinstance(privacy, DpSgd):
        return math.inf
    sigma = largest_noise_multiplier(plan, nominal_patients=nominal_patients)
    sigma *= math.sqrt(1 + privacy.loss_noise_ratio**-2)  # a part of the budget is the released loss's
    noise = sigma * (math.sqrt(len(parameters)) + math.sqrt(2 * math.log(1 / FAILURE_PROB)))
    start = float(np.linalg.norm(parameters))
    batch = training.expected_batch
    gradient = privacy.max_grad_norm * (_most_drawn(batch) + noise) / batch
    moved = momentum = 0.0
    for _ in range(training.local_steps):
        decay = training.weight_decay * (start + moved)
        momentum = training.momentum * momentum + gradient + decay + training.proximal_mu * moved
        moved += training.learning_rate * momentum
    return moved * ROUNDING * largest_gain(plan.exchange.update)


def _most_drawn(expected_batch: int) -> float:
    """Patients in a step, but for ``FAILURE_PROB``: a sum of independent draws with this mean or less."""
    mean, log = PATIENTS_TO_NOMINAL * expected_batch, math.log(1 / FAILURE_PROB)
    return mean + log / 3 + math.sqrt(log * log / 9 + 2 * log * mean)
