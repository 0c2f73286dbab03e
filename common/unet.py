"""The U-Net of a plan: a network that gives every pixel or voxel a class.

Source: Ronneberger, Fischer, Brox (2015), U-Net: Convolutional Networks for Biomedical Image Segmentation;
the network is MONAI's, with one convolution at each level.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from common.value import Value

if TYPE_CHECKING:  # torch is imported where a network is built, not where a plan is read
    from torch import nn

Width = Annotated[int, Field(ge=1, le=512)]
Stride = Literal[1, 2]


class Unet(Value):
    """MONAI's U-Net with GroupNorm: levels that see the image ever coarser, joined with their mirror images.

    ``strides``: by how much each level is coarser than the one before it; the first is about the image
    itself. One number less than ``channels``, since the last level keeps the size of the one before.
    """

    name: Literal["unet"]
    channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=6)]
    strides: tuple[Stride, ...]
    groups: Annotated[int, Field(ge=1, le=64)]

    @model_validator(mode="after")
    def _levels_fit_together(self) -> Self:
        if len(self.strides) != len(self.channels) - 1:
            raise ValueError(f"expected one stride less than channels, found {self.strides}")
        if any(width % self.groups for width in self.channels):
            raise ValueError(f"expected channels divisible by groups={self.groups}, found {self.channels}")
        return self

    @property
    def divisor(self) -> int:
        """Every side of the image must be divisible by it, or halves do not fit together again."""
        return math.prod(self.strides)


def build(asked: Unet, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """Returns the network with new parameters from torch's generator.

    Input: float32, (batch, in_channels, *size), values in [0, 1], with sides divisible by ``asked.divisor``.
    Output: float32, (batch, out_channels, *size), logits.
    """
    from monai.networks.nets import UNet  # seconds to import, so only where needed

    network: nn.Module = UNet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=asked.channels,
        strides=asked.strides,
        norm=("group", {"num_groups": asked.groups}),
        act=("relu", {"inplace": False}),
    )
    return network
