"""The Flux.1 autoencoder: pictures ``[B, 3, H, W]`` in -1..1 to moments ``[B, 32, H/8, W/8]``, and latents back.

Parameter names are those of the published ``ae`` file. Source: the Black Forest Labs reference (Apache-2.0).
``encode`` and ``decode`` speak the transformer's latents (shifted and scaled); tiling is in ``tiling.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend.attention import attention
from ..backend.feature_maps import add, group_norm, have_programs
from .params import AutoencoderParams


class Norm(nn.GroupNorm):
    """Group norm of 32 groups."""

    silu = False

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, input: Tensor, shift: Tensor | None = None) -> Tensor:
        """Of ``[B, C, H, W]``, to which ``shift`` ``[C]`` is added before."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, silu=self.silu, shift=shift)


class NormSiLU(Norm):
    """Group norm of 32 groups, then SiLU."""

    silu = True


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        if have_programs(x):
            return self._in_few_passes(x)
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return hidden + self._shortcut(x)

    def _in_few_passes(self, x: Tensor) -> Tensor:
        """Biases are added by what goes through the maps anyway."""
        assert self.conv2.bias is not None
        hidden = self.norm2(_without_bias(self.conv1, self.norm1(x)), self.conv1.bias)
        hidden = _without_bias(self.conv2, hidden)
        return add(self._shortcut(x), hidden, self.conv2.bias)

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.nin_shortcut is None else self.nin_shortcut(x)


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


class AttentionBlock(nn.Module):
    """One attention head over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (proj(normed).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v))
        attended = attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(attended)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.downsample = Downsample(out_channels) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Encoder(nn.Module):
    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, params.num_res_blocks, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # Numbered finest first as in the file, run coarsest first.
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, len(widths) - 1)], width, params.num_res_blocks + 1, upsample=i > 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = NormSiLU(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class Autoencoder(nn.Module):
    """Pixels in 0..1 on one side, the transformer's latents on the other."""

    def __init__(self, params: AutoencoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw from the posterior: moments ``[B, 32, h, w]`` and unit noise ``[B, 16, h, w]`` to a model latent."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
        return (z - self.params.shift) * self.params.scale

    def moments(self, pixels: Tensor) -> Tensor:
        """Of the posterior of pixels ``[B, 3, H, W]`` in 0..1."""
        return self.encoder(2.0 * pixels - 1.0)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in 0..1 and unit noise to latents ``[B, 16, H//8, W//8]``."""
        return self.sample(self.moments(pixels), noise)

    def to_decoder(self, latent: Tensor) -> Tensor:
        """A model latent to the decoder's own range."""
        return latent / self.params.scale + self.params.shift

    def decode(self, latent: Tensor) -> Tensor:
        """Latents ``[B, 16, h, w]`` to pixels ``[B, 3, 8h, 8w]``, float32 in 0..1; NaN stays NaN."""
        dtype = self.decoder.conv_in.weight.dtype
        raw = self.decoder(self.to_decoder(latent).to(dtype)).float()
        return ((raw + 1.0) / 2.0).clamp(0.0, 1.0)
