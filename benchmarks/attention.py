"""The transformer's attention by ours ("auto" on Hopper) and by torch's backends, and in 8 bits by ours and by cuDNN.

    python -m benchmarks.attention

Random queries, keys and values lie as a fused projection writes them, 24 heads of 128. Backends run in turn, round by
round. Rows "from the projection" norm and rotate queries and keys too, as a block does, and compare with one another;
all others are given what is normed and rotated already. The error is that of some heads beside torch's attention in
float32, relative to it. cuDNN in 8 bits needs the package ``nvidia-cudnn-frontend`` before 1.19; without it the row is
left out, and a line says so. A GPU is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import milliseconds
from benchmarks.report import publish
from lightweight_engine.backend import eight_bit_attention
from lightweight_engine.backend.attention import attention
from lightweight_engine.backend.fused import heads
from lightweight_engine.backend.kernels import eight_bit_attention as programs
from lightweight_engine.core.describe import device_name

SIZES = {"512x512": 1024, "768x1344": 4032, "1536x2688": 16128}
TEXT, HEADS, DIM = 512, 24, 128
CALLS, ROUNDS = 20, 3
KNOWN = 2  # heads that are computed in float32 as well
EIGHT_BITS = "cudnn, 8 bits"
WEIGHTS = 256.0
"""What brings weights, none above 1, well within 8-bit floats; cuDNN takes it back."""

Work = Callable[[], Tensor]


def in_eight_bits(q: Tensor, k: Tensor, v: Tensor) -> tuple[Work, float]:
    """cuDNN's attention of ``[1, N, S, K]`` in float8_e4m3fn, and the seconds that its plan took.

    Its result is in 8 bits too, each number in the measure of ``v``.

    Raises:
        ImportError: without the package.
    """
    import cudnn  # type: ignore[import-not-found]

    begin = time.perf_counter()
    handle, eight, wide = cudnn.create_handle(), cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=eight, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
    out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
    inputs = {
        graph.tensor(name=name, dim=list(each.shape), stride=list(each.stride()), data_type=eight): each
        for name, each in {"q": q, "k": k, "v": v}.items()
    }
    factors = {
        "descale_q": 1,
        "descale_k": 1,
        "descale_v": 1,
        "descale_s": 1 / WEIGHTS,
        "scale_s": WEIGHTS,
        "scale_o": 1,
    }
    scales = {name: graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=wide) for name in factors}
    made, _, *largest = graph.sdpa_fp8(*inputs, **scales, generate_stats=False, attn_scale=DIM**-0.5)
    made.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride())).set_data_type(eight)
    for each in largest:
        each.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(wide)
    graph.build([cudnn.heur_mode.A])
    room = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    numbers = torch.tensor([*factors.values(), 0, 0], dtype=torch.float32, device=q.device)
    places = inputs | {made: out} | dict(zip([*scales.values(), *largest], numbers.split(1), strict=True))
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)

    def work() -> Tensor:
        graph.execute(places, room, handle=handle)
        return out.transpose(1, 2).flatten(2)

    return work, time.perf_counter() - begin


def from_projection(fused: Tensor) -> dict[str, Work]:
    """A single block's way from its projection ``[1, S, 3*N*K]``, in 16 bits and in 8; nothing is turned."""
    gain = torch.ones(DIM, dtype=fused.dtype, device=fused.device)
    rotary = torch.ones(fused.shape[1], DIM // 2, dtype=torch.complex64, device=fused.device)
    streams = [(fused, gain, gain)]
    ways: dict[str, Work] = {
        "from the projection": lambda: attention(*heads(streams, rotary)),
        "from the projection, cudnn": lambda: attention(*heads(streams, rotary), backend="cudnn"),
    }
    if eight_bit_attention.available(fused.device):
        ways["from the projection, ours in 8 bits"] = lambda: programs.attend(streams, rotary)
    return ways


def rows_of(picture: str, image: int) -> list[dict[str, Any]]:
    """A row for each backend at a size in tokens."""
    tokens = image + TEXT
    fused = torch.randn(1, tokens, 3, HEADS, DIM, device="cuda")
    fused[:, :, :2] = F.rms_norm(fused[:, :, :2], (DIM,))  # as norms leave them, so that another changes nothing
    q, k, v = fused.bfloat16().permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(*(each[:, :KNOWN].float() for each in (q, k, v))).transpose(1, 2).flatten(2)
    ways: dict[str, Work] = {
        name: lambda name=name: attention(q, k, v, backend=name) for name in ("auto", "cudnn", "flash", "efficient")
    }
    ways |= from_projection(fused.bfloat16().flatten(2))
    plans: dict[str, float] = {}
    try:
        eight = fused.to(torch.float8_e4m3fn).permute(2, 0, 3, 1, 4)
        ways[EIGHT_BITS], plans[EIGHT_BITS] = in_eight_bits(*eight)
    except ImportError as error:
        print(f"without {EIGHT_BITS}: {error}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            times[name].append(milliseconds(work, CALLS))
    operations = 4 * tokens**2 * HEADS * DIM
    rows = []
    for name, taken in times.items():
        found = ways[name]()[..., : KNOWN * DIM].float()
        rows.append(
            {
                "picture": picture,
                "backend": name,
                "ms": statistics.median(taken),
                "TFLOP/s": operations / statistics.median(taken) / 1e9,
                "error": float((found - exact).norm() / exact.norm()),
                "plan s": plans.get(name),
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed")
    rows = [row for picture, image in SIZES.items() for row in rows_of(picture, image)]
    publish("attention", rows, text_tokens=TEXT, device=device_name(torch.device("cuda")))


if __name__ == "__main__":
    main()
