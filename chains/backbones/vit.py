"""Vision transformers of any width as plain torch modules.

The matching table without torch, and what the names mean, is in `chains/architectures/vit.py`; a test holds the two
together. Initial weights are those of ViTs that are trained from scratch: truncated normals of 0.02.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from chains.architectures.vit import MLP_RATIO, Settings
from chains.backbones.base import Backbone
from chains.width import Width

NORM_EPSILON = 1e-6  # of every LayerNorm, not torch's default
INITIAL_STD = 0.02


class PatchEmbed(nn.Module):
    """Images (batch, 3, H, W) → tokens (batch, patches, `channels`), row by row."""

    def __init__(self, channels: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch, stride)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention on tokens (batch, tokens, channels)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)  # (batch, heads, tokens, channels of a head)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, NORM_EPSILON)
        self.attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, NORM_EPSILON)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(Backbone):
    """Images (batch, 3, H, W) → feature (batch, `channels`): the class token, and behind it the mean of the part tokens
    where there are some."""

    def __init__(self, name: str, width: Width) -> None:
        super().__init__()
        settings, channels = Settings.parse(name), width.stem
        front = settings.size.width if settings.has_projection else channels
        self.taken, self.extra_tokens = settings.taken, settings.extra_tokens
        self.channels = len(self.taken) * channels
        self.patch_embed = PatchEmbed(front, settings.size.patch, settings.stride)
        self.positions = nn.Parameter(torch.zeros(front, settings.token_count))
        self.dw = nn.Linear(front, channels, bias=False) if settings.has_projection else nn.Identity()
        self.blocks = nn.ModuleList(Block(channels, settings.size.heads) for _ in range(settings.size.depth))
        self.norm = nn.LayerNorm(channels, NORM_EPSILON)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        patches = functional.pad(self.patch_embed(images), (0, 0, self.extra_tokens, 0))
        x = self.dw(patches + self.positions.T)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x[:, tokens].mean(dim=1) for tokens in self.taken], dim=1)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=INITIAL_STD)
        if isinstance(self.dw, nn.Linear):
            nn.init.eye_(self.dw.weight)  # as the authors start it; of a narrower network, the first of its rows
