"""plan.model -> a network that DP-SGD can train, or a refusal that says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from common import unet
from common.errors import ConfigError
from common.fusion import Fusion
from common.layout import with_quick_layers
from common.plan import Cnn, Plan
from common.unet import Unet

FlatArray = np.ndarray[tuple[int], np.dtype[np.float32]]


def build(plan: Plan) -> nn.Module:
    """Returns the plan's network, initialised from ``plan.seed``.

    Input: float32, (batch, channels, *size), values in [0, 1]; and, where the plan asks for clinical values,
    float32, (batch, ``plan.num_features``). Output: float32, (batch, ``plan.num_outputs``), logits; for masks
    (batch, ``plan.num_outputs``, *size). The network has no buffers, no BatchNorm, no dropout, no
    in-place operation: nothing mixes patients and nothing draws from torch's generators.

    Raises:
        ConfigError: DP-SGD cannot train the network; says which layer and why. Or the images are too small.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        network = _BUILDERS[plan.model.name](plan)
        if plan.clinical:
            network = Fusion(network, num_features=plan.num_features)
        network = trainable_privately(network)
    _check_size(network, plan)
    return network


def _check_size(network: nn.Module, plan: Plan) -> None:
    """Tries one image, since pooling may leave nothing of a small one; no site is to find out later."""
    asked = plan.preprocessing
    try:
        with torch.no_grad():
            network(*blank_inputs(plan))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Expected images that model={plan.model.name} can take, found preprocessing.size="
            f"{list(asked.size)} ({str(error).splitlines()[0]}); choose a larger preprocessing.size."
        ) from None


def blank_inputs(plan: Plan) -> tuple[torch.Tensor, ...]:
    """Returns the network's inputs for one case that is black and says nothing."""
    asked = plan.preprocessing
    image = torch.zeros(1, asked.num_channels, *asked.size)
    return (image, torch.zeros(1, plan.num_features)) if plan.clinical else (image,)


def trainable_privately(network: nn.Module) -> nn.Module:
    """Replaces BatchNorm by GroupNorm, removes in-place operations and dropout, refuses what is left.

    Raises:
        ConfigError: a layer mixes patients or keeps statistics; names it.
    """
    network = with_quick_layers(_without_batch_norm(network))
    for name, module in network.named_modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        reason = _REFUSED.get(type(module))
        if reason:
            raise ConfigError(
                f"Expected layers that DP-SGD can train, found {type(module).__name__} at '{name}': {reason}."
            )
    for name, _ in network.named_buffers():
        raise ConfigError(
            f"Expected a network without buffers, found '{name}': running statistics would carry "
            "information about patients past the noise."
        )
    return network


_MIXES = "it computes statistics over the batch, so one patient changes the gradients of others"
_REFUSED: dict[type, str] = {
    nn.BatchNorm1d: _MIXES,
    nn.BatchNorm2d: _MIXES,
    nn.BatchNorm3d: _MIXES,
    nn.SyncBatchNorm: _MIXES,
    nn.LazyBatchNorm2d: _MIXES,
    nn.LSTM: "its per-sample gradients are not available here",
    nn.GRU: "its per-sample gradients are not available here",
    nn.RNN: "its per-sample gradients are not available here",
    nn.MultiheadAttention: "its per-sample gradients are not available here",
}


def _without_batch_norm(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
        return nn.GroupNorm(math.gcd(32, module.num_features), module.num_features)
    for name, child in module.named_children():
        setattr(module, name, _without_batch_norm(child))
    return module


class _Centre(nn.Module):
    """[0, 1] -> [-1, 1]: zero-mean inputs keep per-patient gradients short, so less of them is clipped."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2 - 1


_CONTRAST_GAIN = 10.0  # zero-mean filters answer to differences of neighbours, which are small


def _cnn(plan: Plan) -> nn.Module:
    asked = plan.model
    assert isinstance(asked, Cnn)
    layer = _LAYERS[len(plan.preprocessing.size)]
    pool = layer.max_pool if asked.pooling == "max" else layer.average_pool
    layers: list[nn.Module] = [_Centre()]
    width_in: int = plan.preprocessing.num_channels
    for width, pool_size in zip(asked.channels, asked.pool_sizes, strict=True):
        convolution = layer.convolution(width_in, width, kernel_size=3, padding=1)
        if asked.first_block == "contrast" and len(layers) == 1:
            _begin_with_contrast(convolution)
            layers += [convolution, nn.ReLU(), pool(pool_size)]
        else:
            layers += [convolution, nn.GroupNorm(asked.groups, width), nn.ReLU(), pool(pool_size)]
        width_in = width
    head = nn.Linear(width_in * asked.head_size ** len(plan.preprocessing.size), plan.num_outputs)
    return nn.Sequential(*layers, layer.adaptive_pool(asked.head_size), nn.Flatten(), head)


class _Layers(NamedTuple):
    """The layers of torch for so many spatial dimensions."""

    convolution: type[nn.Conv2d | nn.Conv3d]
    max_pool: type[nn.MaxPool2d | nn.MaxPool3d]
    average_pool: type[nn.AvgPool2d | nn.AvgPool3d]
    adaptive_pool: type[nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d]


_LAYERS = {
    2: _Layers(nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    3: _Layers(nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
}


def _begin_with_contrast(convolution: nn.Conv2d | nn.Conv3d) -> None:
    with torch.no_grad():
        spatial = tuple(range(2, convolution.weight.dim()))
        convolution.weight -= convolution.weight.mean(dim=spatial, keepdim=True)
        convolution.weight *= _CONTRAST_GAIN
        if convolution.bias is not None:
            convolution.bias.zero_()


def _linear(plan: Plan) -> nn.Module:
    asked = plan.preprocessing
    return nn.Sequential(
        nn.Flatten(), nn.Linear(asked.num_channels * math.prod(asked.size), plan.num_outputs)
    )


def _article_cnn(plan: Plan) -> nn.Module:
    """64x64x3 -> conv 32 -> pool -> conv 64 -> dense 128 -> 1 logit; the sigmoid is in the loss."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 29 * 29, 128),
        nn.ReLU(),
        nn.Linear(128, 1),
    )


def _densenet121(plan: Plan) -> nn.Module:
    from monai.networks.nets import DenseNet121  # seconds to import, so only where needed

    network: nn.Module = DenseNet121(
        spatial_dims=len(plan.preprocessing.size),
        in_channels=plan.preprocessing.num_channels,
        out_channels=plan.num_outputs,
    )
    return network


def _efficientnet_b0(plan: Plan) -> nn.Module:
    from monai.networks.nets import EfficientNetBN  # seconds to import, so only where needed

    network: nn.Module = EfficientNetBN(
        "efficientnet-b0",
        pretrained=False,
        spatial_dims=len(plan.preprocessing.size),
        in_channels=plan.preprocessing.num_channels,
        num_classes=plan.num_outputs,
    )
    for module in network.modules():
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0  # type: ignore[assignment]
    return network


def _unet(plan: Plan) -> nn.Module:
    asked = plan.model
    assert isinstance(asked, Unet)
    network = unet.build(
        asked,
        spatial_dims=len(plan.preprocessing.size),
        in_channels=plan.preprocessing.num_channels,
        out_channels=plan.num_outputs,
    )
    return nn.Sequential(_Centre(), network)


_BUILDERS: dict[str, Callable[[Plan], nn.Module]] = {
    "cnn": _cnn,
    "linear": _linear,
    "article_cnn": _article_cnn,
    "densenet121": _densenet121,
    "efficientnet_b0": _efficientnet_b0,
    "unet": _unet,
}


def num_parameters(network: nn.Module) -> int:
    """Returns the length of the flat array."""
    return sum(parameter.numel() for parameter in network.parameters())


def flatten(network: nn.Module) -> FlatArray:
    """Returns all parameters as one float32 array, in ``named_parameters`` order; a copy."""
    parts = [parameter.detach().reshape(-1) for parameter in network.parameters()]
    return torch.cat(parts).to(torch.float32).numpy()


def load(network: nn.Module, flat: FlatArray) -> None:
    """Writes a flat array, as made by ``flatten``, into the network."""
    position = 0
    source = torch.from_numpy(np.ascontiguousarray(flat))
    with torch.no_grad():
        for parameter in network.parameters():
            size = parameter.numel()
            parameter.copy_(source[position : position + size].view_as(parameter))
            position += size


def named_arrays(network: nn.Module, flat: FlatArray) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Returns the flat array cut into the network's named tensors, for ``model.safetensors``."""
    arrays, position = {}, 0
    for name, parameter in network.named_parameters():
        size = parameter.numel()
        arrays[name] = flat[position : position + size].reshape(tuple(parameter.shape))
        position += size
    return arrays
