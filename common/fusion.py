"""Joins an image with a row of clinical values before the head of a network."""

from __future__ import annotations

import torch
from torch import nn

from common.errors import ConfigError


class Fusion(nn.Module):
    """A network without its head beside clinical values, and a new linear head for both.

    ``forward(images, values)``: images as the network takes them; values float32, (cases, features).
    """

    def __init__(self, network: nn.Module, *, num_features: int) -> None:
        super().__init__()
        name, head = _last_linear(network)
        _replace(network, name, nn.Identity())
        self.image = network
        self.head = nn.Linear(head.in_features + num_features, head.out_features)

    def forward(self, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = self.head(torch.cat([self.image(images), values], dim=1))
        return seen


def _last_linear(network: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ConfigError(
            "Expected a network with a linear head to join clinical values before, found none; "
            "choose another model or plan.clinical=[]."
        )
    return found[-1]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    setattr(network.get_submodule(".".join(path)), last, module)
