"""In which type convolutions and linear layers are computed while a site trains."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from client import processor
from common.plan import Plan

NO_GAIN: Final = frozenset(("efficientnet_b0", "unet"))
"""Models that gain nothing from bfloat16 on a processor that has it, or nothing that is worth its rounding
(``benchmarks/step_cost.py``)."""

TILE_CHANNELS: Final = 16
"""That a row of a tile holds."""

_IN_ROWS: Final = (nn.GroupNorm, nn.InstanceNorm2d)


def compute_type(plan: Plan) -> torch.dtype | None:
    """Returns bfloat16, or None for that of the parameters, float32.

    "auto" is bfloat16 where the processor multiplies it and the model gains from it: nothing else is known
    to be faster. Evaluation is always in float32.
    """
    match plan.training.precision:
        case "fp32":
            return None
        case "bf16":
            return torch.bfloat16
    is_possible = plan.privacy.mechanism == "none" or plan.privacy.clipping in ("auto", "bookkeeping")
    gains = is_possible and plan.model.name not in NO_GAIN and processor.multiplies_bfloat16()
    return torch.bfloat16 if gains else None


def memory_format(network: nn.Module, compute: torch.dtype | None) -> torch.memory_format:
    """Returns in which order images lie in memory while a network is trained.

    In bfloat16 the channels of a pixel lie side by side: so convolutions and pooling take them, and would
    put them otherwise. Group normalisation is slow in that order, and a network with it keeps to rows, as
    do all in float32.
    """
    keeps_rows = any(isinstance(layer, _IN_ROWS) for layer in network.modules())
    return torch.contiguous_format if compute is None or keeps_rows else torch.channels_last


def is_slow_in_groups(dtype: torch.dtype, layer: Any) -> bool:
    """Says whether a convolution with a group of channels for each case is faster in float32.

    So it is in bfloat16 where the processor has tiles (AMX), unless the layer's channels fill them. On such
    a processor a private step of the default network, which begins with 1 and 8 channels, took 2.6 times a
    plain one with the gradients of its weights in bfloat16, and takes less than one with them in float32;
    layers of 16 channels and more take two thirds of the time in bfloat16 (``benchmarks/step_cost.py``).
    """
    widths = (layer.in_channels, layer.out_channels)
    fills = all(width // layer.groups % TILE_CHANNELS == 0 for width in widths)
    return dtype == torch.bfloat16 and processor.has_tiles() and not fills
