from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.errors import ConfigError
from simulations import inversion
from simulations.inversion import Inversion, inverted, likeness, toned
from simulations.trials import InversionTrial
from tests.plans import plan

SMALL: dict[str, Any] = {"randomness": "seeded"}
TRIAL = InversionTrial(num_patients=20, image_size=24, iterations=300, step=0.1, smoothness=0.1)


@pytest.fixture(scope="module")
def found() -> Inversion:
    return inversion.run(plan(**SMALL), trial=TRIAL)


@pytest.mark.slow
def test_image_is_recovered_from_the_update_of_a_step_without_privacy(found: Inversion) -> None:
    assert found.without_privacy.correlation > 0.9
    assert found.without_privacy.rank == 1, "nobody else's image is more like it"
    assert found.recovered_without_privacy.shape == found.original.shape == (24, 24)
    assert found.recovered_without_privacy.dtype == found.original.dtype == np.float32


@pytest.mark.slow
def test_image_is_not_recovered_from_an_update_with_privacy(found: Inversion) -> None:
    assert abs(found.with_privacy.correlation) < 0.3
    assert found.with_privacy.correlation < found.others_correlation
    assert found.without_privacy.psnr_db > found.with_privacy.psnr_db + 6
    assert 2.97 < found.epsilon <= 3.0


@pytest.mark.slow
def test_it_is_the_noise_that_keeps_the_image_and_not_the_clip() -> None:
    hardly = plan(**SMALL, privacy__target_epsilon=None, privacy__noise_multiplier=1e-4)
    found = inversion.run(hardly, trial=TRIAL)
    assert found.with_privacy.correlation > 0.9
    assert found.with_privacy.rank == 1


@pytest.mark.slow
def test_same_seed_gives_the_same_images_and_another_seed_others() -> None:
    brief = TRIAL.model_copy(update={"iterations": 3, "num_patients": 2})
    told: list[tuple[int, int]] = []
    first = inversion.run(plan(**SMALL), trial=brief, on_step=lambda done, total: told.append((done, total)))
    again = inversion.run(plan(**SMALL), trial=brief)
    for name in ("original", "recovered_without_privacy", "recovered_with_privacy"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert told == [(done, 6) for done in range(1, 7)]
    other = inversion.run(plan(**SMALL, seed=1), trial=brief)
    assert not np.array_equal(other.original, first.original)


def test_search_ends_at_the_image_of_a_linear_network_which_has_a_closed_form() -> None:
    """Its gradient is (p - y) times the image, so the direction of the update is the image itself."""
    rng = np.random.default_rng(4)
    image = rng.random((1, 1, 4, 4), dtype=np.float32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False))
    update = -0.3 * image.reshape(-1)
    trial = TRIAL.model_copy(update={"iterations": 400, "smoothness": 0.0})
    found = inverted(network, update, label=0, start=torch.full((1, 1, 4, 4), 0.5), trial=trial)
    assert np.corrcoef(found.reshape(-1).numpy(), image.reshape(-1))[0, 1] > 0.995


def test_likeness_is_blind_to_brightness_and_contrast_and_ranks_the_original_among_others() -> None:
    rng = np.random.default_rng(5)
    images = rng.random((4, 6, 6), dtype=np.float32)
    same = likeness(0.25 + 0.5 * images[0], images)
    assert same.correlation == pytest.approx(1.0)
    assert same.psnr_db > 100
    assert same.rank == 1
    other = likeness(images[2], images)
    assert other.rank > 1
    assert other.correlation == pytest.approx(np.corrcoef(images[2].ravel(), images[0].ravel())[0, 1])


def test_decibels_are_those_of_the_mean_squared_error() -> None:
    """Half of the pixels are wrong by one half, with mean and spread as they were."""
    original = np.tile(np.array([0.25, 0.75], dtype=np.float32), (2, 4))
    flipped = original.copy()
    flipped[0] = 1 - flipped[0]
    found = likeness(flipped, original[None])
    assert found.psnr_db == pytest.approx(-10 * math.log10(0.5**2 / 2))
    assert found.correlation == pytest.approx(0.0, abs=1e-6)


def test_flat_image_is_like_nothing() -> None:
    original = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    found = likeness(np.full((4, 4), 0.3, dtype=np.float32), original[None])
    assert found.correlation == 0.0
    assert toned(np.full((4, 4), 0.3, dtype=np.float32), original).std() == 0


@pytest.mark.slow
def test_picture_shows_the_three_images_on_one_png(found: Inversion, tmp_path: Path) -> None:
    inversion.picture(found, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG" and opened.size[0] == 900
        pixels = np.asarray(opened.convert("L"))
    inversion.picture(found, tmp_path / "again.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    black = np.zeros_like(found.original)
    for name in ("original", "recovered_without_privacy", "recovered_with_privacy"):
        inversion.picture(replace(found, **{name: black}), tmp_path / "changed.png")
        with Image.open(tmp_path / "changed.png") as opened:
            assert np.abs(np.asarray(opened.convert("L")).astype(int) - pixels).mean() > 5, name


def test_plan_without_privacy_has_nothing_to_attack() -> None:
    with pytest.raises(ConfigError, match="privacy=dp_sgd"):
        inversion.run(plan(privacy="none"), trial=TRIAL)
