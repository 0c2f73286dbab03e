"""Gradient inversion: the image of one patient, looked for in the update of one step.

Whoever sees an update of one step on one case has its gradient. An image is changed until its own gradient
points the same way; nothing else about the patient is used but the label, the plan and the received model.

Source: Geiping, Bauermeister, Dröge and Moeller (2020), Inverting Gradients: How Easy Is It to Break Privacy
in Federated Learning? Cosine distance, total variation, signed gradients with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from client.cohort import Part
from client.training import case_losses, to_input, train_by_plan
from common import calibration, model, privacy
from common.model import FlatArray
from common.plan import Plan
from simulations.membership import key_of
from simulations.patients import phantom_part
from simulations.trials import InversionTrial, changed, delta_of, without_privacy

Picture = np.ndarray[Any, np.dtype[np.float32]]

_START_SPREAD = 0.1
"""Of the grey noise that the search begins with, around the middle of the range."""
_DECAY = 0.1
"""Adam's step falls to this at the end of the search."""
_DPI = 100


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How much a recovered image is like the original; blind to brightness and contrast, as the network is.

    correlation: of the pixels. psnr_db: peak signal-to-noise ratio in decibels, after the recovered image got
    mean and spread of the original. rank: the place of the original among images of different patients, the
    most like the recovered one first; patients look like each other, so a correlation alone says little.
    """

    correlation: float
    psnr_db: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """An image and what was recovered of it: float32, (height, width), in [0, 1].

    Recovered images have the original's mean and spread. num_patients: of how many patients the ranks are.
    others_correlation: of the original with the other patients' images, on average. epsilon: what the one
    private step costs.
    """

    original: Picture
    recovered_without_privacy: Picture
    recovered_with_privacy: Picture
    without_privacy: Likeness
    with_privacy: Likeness
    num_patients: int
    others_correlation: float
    epsilon: float


def run(
    plan: Plan, *, trial: InversionTrial, on_step: Callable[[int, int], None] = lambda done, total: None
) -> Inversion:
    """Recovers one phantom image from the update of a step without the plan's privacy, and from one with it.

    The whole of the plan's epsilon is spent in this one step: the least noise that it allows.

    Args:
        plan: gives model, privacy, preprocessing and seed.
        on_step: told (done, total) of the steps of both searches.

    Raises:
        ConfigError: the plan has no privacy.
    """
    delta = delta_of(plan)
    private = changed(
        plan,
        image_size=trial.image_size,
        cases_per_patient=1,
        local_steps=1,
        expected_batch=1,
        momentum=0.0,
        weight_decay=0.0,
    )
    everybody = phantom_part(
        trial.num_patients,
        cases_per_patient=1,
        asked=private.asked,
        image_size=2 * trial.image_size,
        seed=plan.seed,
    )
    victim = replace(everybody, patients=everybody.patients[:1])
    images = to_input(everybody.images).numpy().mean(axis=1)
    plain = _recovered(
        without_privacy(private),
        victim,
        trial=trial,
        on_step=lambda done: on_step(done, 2 * trial.iterations),
    )
    noised = _recovered(
        private,
        victim,
        trial=trial,
        on_step=lambda done: on_step(trial.iterations + done, 2 * trial.iterations),
    )
    spend = calibration.mechanism(private, nominal_patients=1).training(1)
    return Inversion(
        original=images[0],
        recovered_without_privacy=toned(plain, images[0]),
        recovered_with_privacy=toned(noised, images[0]),
        without_privacy=likeness(plain, images),
        with_privacy=likeness(noised, images),
        num_patients=trial.num_patients,
        others_correlation=float(np.mean([_correlation(images[0], other) for other in images[1:]])),
        epsilon=privacy.epsilon([spend], delta=delta).value,
    )


def _recovered(plan: Plan, part: Part, *, trial: InversionTrial, on_step: Callable[[int], None]) -> Picture:
    """Trains the one step as a site does, and returns what its update tells; float32, (height, width)."""
    network = model.build(plan)
    received = model.flatten(network)
    trained = train_by_plan(
        network,
        part,
        plan=plan,
        mechanism=calibration.mechanism(plan, nominal_patients=1),
        key=key_of(plan, number=1),
    )
    model.load(network, received)
    start = np.random.default_rng(plan.seed).normal(0.5, _START_SPREAD, (1, *part.images.shape[1:]))
    found = inverted(
        network,
        trained.update,
        label=int(part.targets[0]),
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


def toned(recovered: Picture, original: Picture) -> Picture:
    """Returns the recovered image with mean and spread of the original, within [0, 1]."""
    spread = float(recovered.std())
    scaled = (recovered - recovered.mean()) * (float(original.std()) / spread if spread else 0.0)
    toned: Picture = np.clip(scaled + original.mean(), 0, 1).astype(np.float32)
    return toned


def likeness(recovered: Picture, images: Picture) -> Likeness:
    """Returns how much a recovered image is like the first of several images, and whether more than others.

    Args:
        recovered: float32, (height, width), in [0, 1].
        images: float32, (patients, height, width), in [0, 1].
    """
    correlations = [_correlation(recovered, image) for image in images]
    error = np.mean((toned(recovered, images[0]).astype(np.float64) - images[0]) ** 2)
    return Likeness(
        correlation=correlations[0],
        psnr_db=_decibels(float(error)),
        rank=1 + sum(other >= correlations[0] for other in correlations[1:]),
    )


def _correlation(first: Picture, second: Picture) -> float:
    """Returns Pearson's correlation of the pixels; 0 where one image is flat."""
    if not (first.std() and second.std()):
        return 0.0
    return float(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1])


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
            _caption(inversion.without_privacy, inversion),
            inversion.recovered_without_privacy,
        ),
        (
            f"Recovered, epsilon {inversion.epsilon:.1f}",
            _caption(inversion.with_privacy, inversion),
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


def _caption(found: Likeness, inversion: Inversion) -> str:
    """The likeness in two lines of words."""
    correlation = round(found.correlation, 2) + 0.0  # no minus before a zero
    return f"correlation {correlation:.2f}\nplace {found.rank} of {inversion.num_patients} patients"
