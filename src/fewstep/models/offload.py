"""Frozen networks in host memory: accelerate brings each layer's weights to the accelerator when the layer runs."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.errors import InputError
from fewstep.models.lora import tree


def offloaded(network: nn.Module, device: str | torch.device) -> nn.Module:
    """The same network with its weights in host memory, computing on ``device``; the one given is left as it is.

    Weights that a loss sends gradients through stay on the device until its backward pass is done.

    Raises:
        InputError: accelerate is missing.
    """
    try:
        from accelerate import cpu_offload
    except ImportError:
        raise InputError("accelerate is not installed: pip install 'fewstep[hf]'") from None
    made: nn.Module = cpu_offload(
        tree(network.to("cpu")).requires_grad_(False), execution_device=torch.device(device), offload_buffers=False
    )
    return made
