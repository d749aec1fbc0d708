"""The Flux.1 transformer, dev and schnell, at any depth and width.

Parameter names are those of the published single-file checkpoints, so such files load with no renaming. The network
is split where sampling wants it split: what does not depend on the latent (``modulations``, ``rotary``, ``txt_in``)
is computed once, before the loop; ``forward`` is what remains of a step.

Source: the Black Forest Labs reference implementation (Apache-2.0). Letters: B batch, L image tokens, T text tokens,
S = T + L (text first), D hidden, N heads, K head dim, R rows of a modulation table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend.attention import attention
from ..backend.eight_bit import Rows
from ..backend.eight_bit_attention import attend
from ..backend.fused import ResidualStream, are_products, gelu_beside, heads, linear_gelu, norm_modulate
from ..backend.linear import as_numbers
from .blocks import repeated
from .params import FluxParams

EMBEDDING_DIM = 256

# The float32 exponential that the reference ran on rounds these two near-ties (0.47 and 0.50 of a last place) upwards.
# A guidance of 3.5 makes an angle of thousands of radians, in which that last bit is worth 2e-4.
_ROUNDED_UP = (13, 44)


@lru_cache(maxsize=8)
def embedding_frequencies(device: torch.device) -> Tensor:
    """``exp(-ln(10000) k / 128)`` for k = 0..127, float32; the same bits on every device."""
    half = EMBEDDING_DIM // 2
    with torch.inference_mode(False):  # the table is kept, and training may read it
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
        freqs = exponent.double().exp().float()
        near_ties = torch.tensor(_ROUNDED_UP)
        freqs[near_ties] = torch.nextafter(freqs[near_ties], torch.ones(1))
        return freqs.to(device)


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoidal embedding ``[R, 256]`` (cosines first) of ``t`` ``[R]`` in 0..1 or of a guidance.

    The factor 1000 is applied in the dtype of ``t``: the reference hands the guidance over in bfloat16, which rounds
    3.5 to 3504, and the timestep in float32.
    """
    angles = (1000.0 * t)[:, None].float() * embedding_frequencies(t.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(t.dtype)


def rotary_table(positions: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Rotations ``[S, K/2]`` (complex64, cos + i sin) for integer ``positions`` ``[S, axes]``; angles in float64."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[:, axis, None].double() * omega)
    angle = torch.cat(angles, dim=-1)
    return torch.complex(angle.cos().float(), angle.sin().float())


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class HeadNorm(nn.Module):
    """The gain ``[K]`` of an RMS norm of one head; asked for by a call, so that what is attached to the module acts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self) -> Tensor:
        return self.scale


class QKNorm(nn.Module):
    """The gains ``[K]`` of queries and keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(dim)
        self.key_norm = HeadNorm(dim)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.query_norm(), self.key_norm()


class MLP(nn.Sequential):
    """Two linears with GELU between them; by their numbers in the published files."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, input: Tensor | Rows) -> Tensor:
        return self[2](linear_gelu(self[0], input, self[2]))


class SelfAttention(nn.Module):
    """The parameters of one stream's attention; the streams meet in ``DoubleBlock.forward``."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.qkv = nn.Linear(params.hidden_size, 3 * params.hidden_size, bias=params.qkv_bias)
        self.norm = QKNorm(params.head_dim)
        self.proj = nn.Linear(params.hidden_size, params.hidden_size)


class Modulation(nn.Module):
    """SiLU of the conditioning vector, ``[R, D]``, to ``[R, count*D]``: shift, scale and gate, once or twice."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, count * dim)

    def forward(self, active: Tensor) -> Tensor:
        return self.lin(active)


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own and one joint attention."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp = params.hidden_size, params.mlp_hidden
        self.img_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(params)
        self.img_mlp = MLP(dim, mlp)
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn = SelfAttention(params)
        self.txt_mlp = MLP(dim, mlp)

    def forward(
        self, img: ResidualStream, txt: ResidualStream, img_mod: Tensor, txt_mod: Tensor, rotary: Tensor
    ) -> None:
        """Add to image tokens ``[B, L, D]`` and text tokens ``[B, T, D]``; modulations are ``[B, 1, 6*D]``."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)
        attended = self.attend(
            img.normed(img_shift1, img_scale1, self.img_attn.qkv),
            txt.normed(txt_shift1, txt_scale1, self.txt_attn.qkv),
            rotary,
        )
        split = txt.tokens.shape[1]
        img.add(img_gate1, self.img_attn.proj(attended[:, split:]))
        img.add(img_gate2, self.img_mlp(img.normed(img_shift2, img_scale2, self.img_mlp[0])))
        txt.add(txt_gate1, self.txt_attn.proj(attended[:, :split]))
        txt.add(txt_gate2, self.txt_mlp(txt.normed(txt_shift2, txt_scale2, self.txt_mlp[0])), clip=True)

    def attend(self, img: Tensor | Rows, txt: Tensor | Rows, rotary: Tensor) -> Tensor:
        """Joint attention ``[B, S, D]``, text first; apart, so that projections are gone before the MLPs need room."""
        streams = [(each.qkv(x), *each.norm()) for each, x in ((self.txt_attn, txt), (self.img_attn, img))]
        return attend(streams, rotary, self.img_attn.qkv)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint stream, one fused projection in and one out."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp = params.hidden_size, params.mlp_hidden
        self.linear1 = nn.Linear(dim, 3 * dim + mlp)
        self.linear2 = nn.Linear(dim + mlp, dim)
        self.norm = QKNorm(params.head_dim)
        self.modulation = Modulation(dim, 3)

    def forward(self, x: ResidualStream, mod: Tensor, rotary: Tensor) -> None:
        """Add to joint tokens ``[B, S, D]``; the modulation is ``[B, 1, 3*D]``."""
        shift, scale, gate = mod.chunk(3, dim=-1)
        normed = x.normed(shift, scale, self.linear1)
        if isinstance(normed, Tensor) and are_products(normed, self.linear1, self.linear2):
            update = self._update(normed, rotary)
        else:  # each goes as soon as it has been read, which ``footprint.step_room`` counts on
            fused = self.linear1(normed)
            del normed
            joined = self._joined(fused, rotary)
            del fused
            update = self.linear2(joined).view(x.tokens.shape)
        x.add(gate, update, clip=True)

    def _update(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Both linears in two products each: nothing is copied to lie beside another."""
        qkv, mlp = self._projected(x)
        attended = attention(*heads([(qkv, *self.norm())], rotary))
        del qkv
        return as_numbers(self.linear2, x).beside(attended, mlp)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values, and the activated half of the MLP; apart, so that the weight is gone after it."""
        into, width = as_numbers(self.linear1, x), 3 * x.shape[-1]
        return into.rows(0, width)(x), into.rows(width, None).gelu(x)

    def _joined(self, fused: Tensor, rotary: Tensor) -> Tensor | Rows:
        """What attention gives beside the activated half of the MLP, as ``linear2`` reads it."""
        width = self.linear2.out_features
        attended = attend([(fused[..., : 3 * width], *self.norm())], rotary, self.linear1)
        joined = gelu_beside(attended, fused, self.linear2)
        # As rows: a product of three dimensions would copy what does not lie close together.
        return joined if isinstance(joined, Rows) else joined.flatten(0, 1)


class LastLayer(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.linear = nn.Linear(params.hidden_size, params.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.hidden_size, 2 * params.hidden_size))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        shift, scale = mod.chunk(2, dim=-1)
        return self.linear(norm_modulate(x, shift, scale))


@dataclass(frozen=True)
class Modulations:
    """What the conditioning vector does to every block, for R rows (steps, pictures, or both).

    Each tensor is ``[R, 1, count*D]``: ``double`` holds (image, text) pairs.
    """

    double: list[tuple[Tensor, Tensor]]
    single: list[Tensor]
    final: Tensor

    def rows(self, index: slice | Tensor) -> Modulations:
        """The same for a choice of rows; a slice makes views."""
        return self.map(lambda tensor: tensor[index])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        return [*(each for pair in self.double for each in pair), *self.single, self.final]

    def map(self, change: Callable[[Tensor], Tensor]) -> Modulations:
        """The same with each tensor changed."""
        double = [(change(img), change(txt)) for img, txt in self.double]
        return Modulations(double, [change(mod) for mod in self.single], change(self.final))

    @staticmethod
    def stack(parts: Sequence[Modulations]) -> Modulations:
        """The rows of all ``parts``, one after another."""
        return Modulations(
            [
                (torch.cat([img for img, _ in pairs]), torch.cat([txt for _, txt in pairs]))
                for pairs in zip(*(p.double for p in parts), strict=True)
            ],
            [torch.cat(mods) for mods in zip(*(p.single for p in parts), strict=True)],
            torch.cat([p.final for p in parts]),
        )


class Flux(nn.Module):
    """The whole transformer. ``forward`` works on tokens; ``velocity.py`` wraps it for latents."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        dim = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, dim)
        self.time_in = MLPEmbedder(EMBEDDING_DIM, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(EMBEDDING_DIM, dim)
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.double_blocks: Sequence[DoubleBlock] = nn.ModuleList(  # type: ignore[assignment]
            repeated(params.depth, lambda: DoubleBlock(params))
        )
        self.single_blocks: Sequence[SingleBlock] = nn.ModuleList(  # type: ignore[assignment]
            repeated(params.depth_single_blocks, lambda: SingleBlock(params))
        )
        self.final_layer = LastLayer(params)

    def condition(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The conditioning vector ``[R, D]``.

        Args:
            timestep: ``[R]`` float32, sigma in 0..1.
            pooled: ``[R, V]`` pooled CLIP vector in the compute dtype.
            guidance: ``[R]`` distilled guidance in the compute dtype (its factor 1000 rounds there); dev only.
        """
        vec = self.time_in(timestep_embedding(timestep).to(pooled.dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("this transformer has a guidance embedding: give the distilled guidance")
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(pooled.dtype))
        return vec + self.vector_in(pooled)

    def modulations(self, vec: Tensor) -> Modulations:
        """All modulation vectors for conditioning vectors ``[R, D]``, in one product per layer."""
        vec = vec[:, None]
        active = F.silu(vec)
        return Modulations(
            [(block.img_mod(active), block.txt_mod(active)) for block in self.double_blocks],
            [block.modulation(active) for block in self.single_blocks],
            self.final_layer.adaLN_modulation(vec),
        )

    def rotary(self, rows: int, columns: int, text_tokens: int) -> Tensor:
        """Rotations ``[T + rows*columns, K/2]`` for text at (0, 0, 0) and an image of ``rows`` x ``columns`` tokens."""
        device = self.img_in.bias.device
        positions = torch.zeros(text_tokens + rows * columns, 3, dtype=torch.float64, device=device)
        grid = positions[text_tokens:].view(rows, columns, 3)
        grid[..., 1] = torch.arange(rows, device=device)[:, None]
        grid[..., 2] = torch.arange(columns, device=device)[None]
        return rotary_table(positions, self.params.axes_dim, self.params.theta)

    def forward(self, img: Tensor, txt: Tensor, modulations: Modulations, rotary: Tensor) -> Tensor:
        """One evaluation.

        Args:
            img: packed latent ``[B, L, C]``.
            txt: text ``[B, T, D]``, already through ``txt_in``.
            modulations: B rows.
            rotary: from ``rotary`` above.

        Returns:
            The velocity ``[B, L, C]``.
        """
        streams = ResidualStream(txt), ResidualStream(self.img_in(img))
        for block, (img_mod, txt_mod) in zip(self.double_blocks, modulations.double, strict=True):
            block(streams[1], streams[0], img_mod, txt_mod, rotary)
        x = ResidualStream(torch.cat([each.tokens for each in streams], dim=1))
        del streams
        for block, mod in zip(self.single_blocks, modulations.single, strict=True):
            block(x, mod, rotary)
        return self.final_layer(x.tokens[:, txt.shape[1] :], modulations.final)
