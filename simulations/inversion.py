"""Gradient inversion: the image of one patient, looked for in the update of one step.

Whoever sees an update of one step on one case has its gradient. An image is changed until its own gradient
points the same way; nothing else about the patient is used but the label, the plan and the received model.

Source: Geiping, Bauermeister, Dröge and Moeller (2020), Inverting Gradients: How Easy Is It to Break Privacy
in Federated Learning? Cosine distance, total variation, signed gradients with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from client.cohort import Part
from client.training import case_losses, to_input, train_by_plan
from common import model, privacy
from common.model import FlatArray
from common.plan import DpSgd, Plan
from simulations.membership import key_of
from simulations.patients import phantom_part
from simulations.trials import InversionTrial, changed, without_privacy

Picture = np.ndarray[Any, np.dtype[np.float32]]

_START_SPREAD = 0.1
"""Of the grey noise that the search begins with, around the middle of the range."""
_DECAY = 0.1
"""Adam's step falls to this at the end of the search."""
_DPI = 100


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How much a recovered image is like the original; blind to brightness and contrast, as the network is.

    correlation: of the pixels, 1 for the image itself and about 0 for another. psnr_db: peak signal-to-noise
    ratio in decibels, after the recovered image got mean and spread of the original.
    """

    correlation: float
    psnr_db: float


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """An image and what was recovered of it: float32, (height, width), in [0, 1].

    Recovered images have the original's mean and spread. epsilon: what the one private step costs.
    """

    original: Picture
    recovered_without_privacy: Picture
    recovered_with_privacy: Picture
    without_privacy: Likeness
    with_privacy: Likeness
    epsilon: float


def run(
    plan: Plan, *, trial: InversionTrial, on_step: Callable[[int, int], None] = lambda done, total: None
) -> Inversion:
    """Recovers one phantom image from the update of a step without the plan's privacy, and from one with it.

    The whole of the plan's epsilon is spent in this one step: the least noise that it allows.

    Args:
        plan: gives model, privacy, preprocessing and seed.
        on_step: told (done, total) of the steps of both searches.
    """
    assert isinstance(plan.privacy, DpSgd), "privacy=none has nothing to show beside it"
    private = changed(
        plan,
        image_size=trial.image_size,
        cases_per_patient=1,
        local_steps=1,
        expected_batch=1,
        momentum=0.0,
        weight_decay=0.0,
    )
    part = phantom_part(
        1, cases_per_patient=1, asked=private.preprocessing, image_size=2 * trial.image_size, seed=plan.seed
    )
    total = 2 * trial.iterations
    recovered = [
        _recovered(chosen, part, trial=trial, on_step=lambda done, first=first: on_step(first + done, total))
        for first, chosen in ((0, without_privacy(private)), (trial.iterations, private))
    ]
    original = to_input(part.images[:1]).numpy().mean(axis=(0, 1))
    plain, noised = (_toned(one, original) for one in recovered)
    return Inversion(
        original=original,
        recovered_without_privacy=plain,
        recovered_with_privacy=noised,
        without_privacy=likeness(plain, original),
        with_privacy=likeness(noised, original),
        epsilon=privacy.epsilon(
            [privacy.mechanism(private, nominal_patients=1).training(1)], delta=plan.privacy.delta
        ).value,
    )


def _recovered(plan: Plan, part: Part, *, trial: InversionTrial, on_step: Callable[[int], None]) -> Picture:
    """Trains the one step as a site does, and returns what its update tells; float32, (height, width)."""
    network = model.build(plan)
    received = model.flatten(network)
    trained = train_by_plan(
        network,
        part,
        plan=plan,
        mechanism=privacy.mechanism(plan, nominal_patients=1),
        key=key_of(plan, number=1),
    )
    model.load(network, received)
    start = np.random.default_rng(plan.seed).normal(0.5, _START_SPREAD, (1, *part.images.shape[1:]))
    found = inverted(
        network,
        trained.update,
        label=int(part.labels[0]),
        start=torch.from_numpy(start.astype(np.float32)),
        trial=trial,
        on_step=on_step,
    )
    return found[0].mean(dim=0).numpy()


def inverted(
    network: nn.Module,
    update: FlatArray,
    *,
    label: int,
    start: torch.Tensor,
    trial: InversionTrial,
    on_step: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Returns an image whose gradient points against the update of a step of plain gradient descent.

    Args:
        network: as it was before the step.
        update: float32, (num_parameters,); its length does not matter.
        start: float32, (1, channels, height, width), where the search begins.

    Returns:
        float32, (1, channels, height, width), in [0, 1].
    """
    parameters, targets = list(network.parameters()), torch.tensor([label])
    wanted = torch.from_numpy(-update)
    image = start.clone().requires_grad_()
    search = torch.optim.Adam([image], lr=trial.step)
    fall = torch.optim.lr_scheduler.ExponentialLR(search, _DECAY ** (1 / trial.iterations))
    for done in range(1, trial.iterations + 1):
        gradients = torch.autograd.grad(
            case_losses(network(image), targets).sum(), parameters, create_graph=True
        )
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distance = 1 - torch.cosine_similarity(flat, wanted, dim=0)
        (slope,) = torch.autograd.grad(distance + trial.smoothness * _variation(image), image)
        image.grad = slope.sign()
        search.step()
        fall.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        on_step(done)
    return image.detach()


def _variation(image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring pixels."""
    return image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()


def _toned(recovered: Picture, original: Picture) -> Picture:
    """Returns the recovered image with mean and spread of the original, within [0, 1]."""
    spread = float(recovered.std())
    scaled = (recovered - recovered.mean()) * (float(original.std()) / spread if spread else 0.0)
    toned: Picture = np.clip(scaled + original.mean(), 0, 1).astype(np.float32)
    return toned


def likeness(recovered: Picture, original: Picture) -> Likeness:
    """Returns how much two images, of values in [0, 1], are alike.

    >>> ramp = np.linspace(0, 1, 11, dtype=np.float32).reshape(1, 11)
    >>> found = likeness(np.clip(ramp - 0.1, 0, None), np.clip(ramp, 0.1, None))
    >>> round(found.correlation, 6), round(found.psnr_db, 3)
    (1.0, 20.0)
    """
    error = float(np.mean((recovered.astype(np.float64) - original) ** 2))
    if not (recovered.std() and original.std()):
        return Likeness(correlation=0.0, psnr_db=_decibels(error))
    correlation = float(np.corrcoef(recovered.reshape(-1), original.reshape(-1))[0, 1])
    return Likeness(correlation=correlation, psnr_db=_decibels(error))


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf


def picture(inversion: Inversion, path: Path) -> None:
    """Writes the three images beside each other as one PNG."""
    from matplotlib.figure import Figure  # half a second to import, and only pictures need it

    figure = Figure(figsize=(9.0, 3.7), dpi=_DPI, layout="constrained")
    shown = (
        ("The patient's image", "never leaves the hospital", inversion.original),
        (
            "Recovered, privacy=none",
            f"correlation {inversion.without_privacy.correlation:.2f}",
            inversion.recovered_without_privacy,
        ),
        (
            f"Recovered, epsilon {inversion.epsilon:.1f}",
            f"correlation {inversion.with_privacy.correlation:.2f}",
            inversion.recovered_with_privacy,
        ),
    )
    for place, (title, caption, values) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        place.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        place.set_title(title, fontsize=12)
        place.set_xlabel(caption, fontsize=11)
        place.set_xticks([])
        place.set_yticks([])
    figure.savefig(path, metadata={"Software": None})
