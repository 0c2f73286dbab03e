from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from client.clipping import PrivateGradient
from client.gaussian import Gaussian
from client.training import Batch
from common import model
from common.errors import ConfigError
from common.fusion import Fusion
from tests.plans import TINY, plan

AGE = {"name": "age", "kind": "number", "mean": 50, "std": 20}
SEX = {"name": "sex", "kind": "category", "values": ["f", "m"]}


@pytest.mark.parametrize("name", ["cnn", "linear", "densenet121", "efficientnet_b0"])
def test_clinical_values_are_joined_before_the_head_of_every_network(name: str) -> None:
    asked = plan(model=name, preprocessing__size=(32, 32), clinical=[AGE, SEX], classes=("a", "b", "c"))
    network = model.build(asked)
    image, values = torch.rand(2, 1, 32, 32), torch.zeros(2, 5)
    values[1, 0] = 2.0
    outputs = network(image[:1].repeat(2, 1, 1, 1), values)
    assert outputs.shape == (2, 3) and not torch.equal(outputs[0], outputs[1])
    weight = network.head.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.allclose(outputs[1] - outputs[0], 2 * weight[:, -5], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_patients_of_a_network_with_clinical_values_keep_to_themselves(size: tuple[int, ...]) -> None:
    asked = plan(**TINY | {"preprocessing__size": size}, clinical=[AGE])
    rng = np.random.default_rng(0)
    batch = Batch(
        images=torch.from_numpy(rng.random((3, 1, *size), dtype=np.float32)),
        values=torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]),
        targets=torch.tensor([0, 1, 1]),
        owners=torch.tensor([0, 1, 2]),
        num_patients=3,
    )
    together = rows(asked, batch)
    for patient in range(3):
        chosen = slice(patient, patient + 1)
        alone = Batch(
            images=batch.images[chosen],
            values=batch.values[chosen],
            targets=batch.targets[chosen],
            owners=torch.tensor([0]),
            num_patients=1,
        )
        for one, all_of_them in zip(rows(asked, alone), together, strict=True):
            assert torch.allclose(one[0], all_of_them[patient], atol=1e-5)


def rows(asked: object, batch: Batch) -> list[torch.Tensor]:
    network = model.build(asked)  # type: ignore[arg-type]
    gradient = PrivateGradient(
        network,
        privacy=plan().privacy,  # type: ignore[arg-type]
        noise_multiplier=1.0,
        expected_batch=3,
        noise=Gaussian(bytes(32)),
    )
    found, _ = gradient.contributions(batch)
    gradient.close()
    return [one.rows() for one in found]


def test_network_without_a_linear_head_has_nothing_to_join_before() -> None:
    with pytest.raises(ConfigError, match="linear head"):
        Fusion(nn.Sequential(nn.Conv2d(1, 1, 3)), num_features=1)
