"""A pixel model of fewstep as a diffusers pipeline: one file that needs diffusers and torch alone."""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

OUTPUTS = ("pil", "np", "pt")


class FewstepPipeline(DiffusionPipeline):
    """Makes pictures with few evaluations of a denoiser.

    Args:
        denoiser: ``denoiser(sample, sigma, class_labels) -> x0`` on ``sample = x0 + sigma n``.
        scheduler: a ``TableauScheduler`` with path "edm"; its timesteps are noise levels.
    """

    denoiser: Any
    scheduler: Any
    model_cpu_offload_seq: Any = "denoiser"

    def __init__(self, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures.

        Args:
            batch_size: how many; labels or latents may say it instead.
            num_inference_steps: the scheduler's own number, which is the default.
            class_labels: a class, or one for each picture; -1 is no class. By default classes are drawn uniformly.
            guidance_scale: classifier-free guidance (arXiv 2207.12598), 1 for none; other scales double the cost.
            generator: where the noise comes from.
            latents: (B, C, H, W) unit noise to start from instead.
            output_type: "pil", "np" (B, H, W, C) in [0, 1] or "pt" (B, C, H, W) in [0, 1].
            return_dict: whether to return an object with ``.images`` or a tuple.

        Raises:
            ValueError: counts that do not agree, labels out of range, or an output type that is not known.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        count = self._count(batch_size, class_labels, latents)
        shape, device = tuple(self.denoiser.shape), self._execution_device
        if latents is None:
            latents = randn_tensor((count, *shape), generator=generator, device=device, dtype=torch.float32)
        elif latents.shape[1:] != shape:
            raise ValueError(f"latents must be (B, {', '.join(map(str, shape))}), got {tuple(latents.shape)}")
        labels = self._labels(class_labels, count, guidance_scale, generator, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # The state stays in float32: noise of level 80 has no room for a picture in half precision.
        x = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        for sigma in self.progress_bar(self.scheduler.timesteps):
            x0 = self._denoise(self.scheduler.scale_model_input(x, sigma), sigma, labels, guidance_scale)
            x = self.scheduler.step(x0, sigma, x, generator=generator).prev_sample
        images = self._pictures(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, x: torch.Tensor, sigma: Any, labels: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The estimate of x0 under guidance."""
        if labels is None or scale == 1:
            return self.denoiser(x, sigma, labels)
        both = self.denoiser(torch.cat([x, x]), sigma, torch.cat([torch.full_like(labels, -1), labels]))
        free, own = both.chunk(2)
        return torch.lerp(free, own, scale)

    def _count(self, batch_size: int, labels: Any, latents: torch.Tensor | None) -> int:
        """How many pictures were asked for."""
        many = [len(labels)] if isinstance(labels, list | tuple) or _rows(labels) else []
        many += [] if latents is None else [len(latents)]
        if len({*many, batch_size} - {1}) > 1 or batch_size < 1 or 0 in many:
            raise ValueError(f"how many pictures? batch_size={batch_size}, class_labels and latents say {many}")
        return max([batch_size, *many])

    def _labels(
        self, given: Any, count: int, scale: float, generator: Any, device: torch.device
    ) -> torch.Tensor | None:
        """(B,) int64 labels, or None for a model without classes."""
        classes = int(self.denoiser.config.classes)
        if not classes:
            if given is not None or scale != 1:
                raise ValueError("this model has no classes: leave class_labels and guidance_scale out")
            return None
        if given is None:
            first = generator[0] if isinstance(generator, list) else generator
            place = "cpu" if first is None else first.device
            return torch.randint(0, classes, (count,), generator=first, device=place).to(device)
        labels = torch.as_tensor(given, dtype=torch.int64, device=device).reshape(-1).expand(count)
        wrong = labels[(labels < -1) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is out of range: classes are 0 to {classes - 1}, and -1 for none")
        return labels

    def _pictures(self, x: torch.Tensor, output_type: str) -> Any:
        """From [-1, 1] to what was asked for."""
        x = (x.clamp(-1, 1) / 2 + 0.5).cpu()
        if output_type == "pt":
            return x
        if output_type == "pil" and x.shape[1] not in (1, 3):
            raise ValueError(f"pictures with {x.shape[1]} channels are no images: use output_type='pt' or 'np'")
        array = x.permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)


def _rows(labels: Any) -> bool:
    return isinstance(labels, torch.Tensor) and labels.ndim > 0
