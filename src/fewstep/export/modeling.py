"""A denoiser of fewstep as a diffusers model; exported with its network as ``modeling_fewstep.py``."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from fewstep.core.denoiser import build_precond


class FewstepDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """``D(x, sigma, label) -> x0`` with ``x = x0 + sigma n``.

    Args:
        description: JSON-able: the network with its sizes, the path and the preconditioning.
        classes: number of classes, 0 for none.
    """

    @register_to_config
    def __init__(self, description: dict[str, Any], classes: int = 0) -> None:
        super().__init__()
        self.denoiser = build_precond(description)

    def forward(self, sample: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The estimate of x0, float32 or wider.

        Args:
            sample: (B, C, H, W), the noisy pictures ``x0 + sigma n``.
            sigma: the noise level, a number or (B,).
            class_labels: (B,) int64, -1 for no class; None where there are no classes.
        """
        found: Tensor = self.denoiser(sample, sigma, None if class_labels is None else {"label": class_labels})
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a picture."""
        return tuple(self.denoiser.shape)

    @property
    def has_classes(self) -> bool:
        """Whether it takes labels."""
        return bool(self.config["classes"])
