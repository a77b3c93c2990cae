"""Negative prompts for one-step models: Negative-Away Steer Attention (NASA, SNOOPI, arXiv 2412.02687)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.cond import Cond
from fewstep.core.denoiser import Denoiser, Precond, Wrapper, rewrapped
from fewstep.core.generator import Generator
from fewstep.core.pipeline import TextConditions
from fewstep.errors import InputError
from fewstep.models.diffusers import DiffusersNet
from fewstep.models.frozen import network_under
from fewstep.models.lora import tree

# Processors of diffusers that compute plain attention, which is what is replaced.
PLAIN = ("AttnProcessor", "AttnProcessor2_0")


class NASA(Wrapper):
    """A denoiser whose cross-attention moves away from a negative prompt, ``A(Q, K+, V+) - alpha A(Q, K-, V-)``.

    A call is one evaluation: the picture is seen once, and only the attention to the text is computed twice. Made by
    :func:`nasa`; ``denoiser`` has a module tree of its own over the weights of the one it was made of.
    """

    def __init__(self, denoiser: Denoiser, away: Steered) -> None:
        super().__init__(denoiser)
        self.away, self.alpha = away, away.alpha

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        return self.denoiser(x, sigma, cond)


class Steered:
    """Attention with the features of a negative prompt taken away: a processor for the attention of diffusers.

    All layers share one, and with it the embeddings ``negative`` (1, T, C) of the prompt.
    """

    def __init__(self, negative: Tensor, alpha: float) -> None:
        self.negative, self.alpha = negative, alpha

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens (B, N, C) and text (B, T, C') -> (B, N, C), with the names that diffusers calls them by."""
        assert encoder_hidden_states is not None
        mask, rows = None, len(hidden_states)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, encoder_hidden_states.shape[1], rows)
            mask = mask.view(rows, attn.heads, -1, mask.shape[-1])
        query = _heads(attn, attn.to_q(hidden_states))
        query = query if attn.norm_q is None else attn.norm_q(query)
        found = _attend(attn, query, encoder_hidden_states, mask)
        if self.alpha:
            # Held where it is needed from then on: a copy for each layer and call would wait for the host.
            self.negative = self.negative.to(encoder_hidden_states)
            found = found - self.alpha * _attend(attn, query, self.negative, None)
        out: Tensor = found.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


def _heads(attn: Any, tokens: Tensor) -> Tensor:
    """(B, T, heads * C) -> (B, heads, T, C)."""
    return tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _attend(attn: Any, query: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """``A(Q, K, V)`` of a text (B or 1, T, C'): (B, heads, N, C)."""
    text = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
    key, value = _heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text))
    key = key if attn.norm_k is None else attn.norm_k(key)
    rows = len(query)
    key, value = key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def nasa(generator: Generator, negative: str | Tensor, alpha: float = 0.4) -> Generator:
    """The generator with its cross-attention steered away from ``negative``; the one that is given stays as it is.

    ``negative`` is a prompt, or its embeddings (T, C) or (1, T, C). ``alpha`` >= 0 is how far; 0 changes nothing, not a
    bit. The weights are shared and nothing is trained. Supported are text-conditional ``UNet2DConditionModel`` of
    diffusers (Stable Diffusion 1.x, 2.x, XL and what is distilled from them) with plain attention processors; what else
    a network is told of a prompt, such as XL's pooled embedding, stays that of the positive one. Guidance around the
    denoiser stays around it. Such a generator is for sampling: it cannot be saved.

    Raises:
        InputError: a bad ``alpha``, another network or attention, a prompt for a generator that reads none, embeddings
            of another width, or a generator that is steered already.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise InputError(f"NASA needs alpha >= 0 and finite, got {alpha!r}: 0 is no steering")
    D = network_under(generator.denoiser)
    if _steered(generator.denoiser):
        raise InputError("this generator is steered away from a prompt already: start from the one it was made of")
    kind = D.net.config.class_name if isinstance(D.net, DiffusersNet) else type(D.net).__name__
    if kind != "UNet2DConditionModel":
        raise InputError(f"NASA needs the cross-attention of a UNet2DConditionModel of diffusers, got a {kind}")
    away = Steered(_embedded(generator, D, negative), float(alpha))
    net = tree(D.net)
    _install(net, away)
    made: Precond = D.with_net(net)
    return replace(generator, denoiser=rewrapped(generator.denoiser, NASA(made, away)))


def _steered(D: Denoiser) -> bool:
    while isinstance(D, Wrapper):
        if isinstance(D, NASA):
            return True
        D = D.denoiser
    return False


def _embedded(generator: Generator, D: Precond, negative: str | Tensor) -> Tensor:
    """The embeddings (1, T, C) of a negative prompt."""
    if isinstance(negative, str):
        if not isinstance(generator.conds, TextConditions):
            raise InputError(f"this generator reads no prompts: pass the embeddings of {negative!r} instead")
        found = generator.conds.encode([negative])["prompt_embeds"]
    elif isinstance(negative, Tensor):
        found = negative[None] if negative.ndim == 2 else negative
    else:
        raise InputError(f"a negative prompt is a text or its embeddings, got a {type(negative).__name__}")
    width = D.net.needs["prompt_embeds"].shape[-1]  # type: ignore[index]
    if found.ndim != 3 or len(found) != 1 or found.shape[2] != width:
        raise InputError(f"the embeddings of one negative prompt are (1, T, {width}), got {tuple(found.shape)}")
    return found.detach().to(generator.device)


@torch.no_grad()
def _install(net: nn.Module, away: Steered) -> None:
    """Gives every cross-attention layer the processor.

    Raises:
        InputError: there is no such layer, or one that computes attention in a way of its own.
    """
    layers = {name: m for name, m in net.named_modules() if name.split(".")[-1] == "attn2"}
    if not layers:
        raise InputError(f"{type(net).__name__} has no cross-attention layers to steer")
    for name, layer in layers.items():
        own = type(layer.processor).__name__
        if own not in PLAIN or layer.group_norm is not None or layer.spatial_norm is not None:
            raise InputError(f"the attention {name} has the processor {own}, NASA replaces {' or '.join(PLAIN)} alone")
        layer.set_processor(away)
