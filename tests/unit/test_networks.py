"""The four networks against independent implementations, and their own fast paths against their plain ones."""

from __future__ import annotations

import pytest
import torch
from factories import AE, CLIP, FLUX, T5, network

from lightweight_engine.backend.attention import BACKENDS, attention, in_parts
from lightweight_engine.backend.fused import rotate
from lightweight_engine.flux.autoencoder import Autoencoder
from lightweight_engine.flux.clip import CLIPText
from lightweight_engine.flux.conditioning import Conditioning
from lightweight_engine.flux.latents import pack, unpack
from lightweight_engine.flux.params import FluxParams
from lightweight_engine.flux.preview import Preview, colour_fields
from lightweight_engine.flux.t5 import T5Encoder, relative_buckets
from lightweight_engine.flux.tiling import decode_tiled
from lightweight_engine.flux.transformer import Flux, rotary_table
from lightweight_engine.flux.velocity import Velocity, predict_velocity


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5)])
def test_pack_and_unpack(size: tuple[int, int]) -> None:
    latent = torch.randn(2, 16, *size)
    tokens = pack(latent)
    assert tokens.shape == (2, ((size[0] + 1) // 2) * ((size[1] + 1) // 2), 64)
    assert torch.equal(unpack(tokens, *size), latent)


def test_odd_sizes_wrap_around() -> None:
    latent = torch.randn(1, 1, 1, 3)
    # Tokens hold (row, column) 2 x 2: the second row repeats the first, the fourth column the first.
    assert torch.equal(pack(latent)[0, 1], latent[0, 0, 0, [2, 0, 2, 0]])


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    positions = torch.stack([torch.zeros(6), torch.arange(6), torch.arange(6)], dim=1)
    rotary = rotary_table(positions, (8, 12, 12), 10_000)
    q, k = torch.randn(32).expand(6, 32), torch.randn(32).expand(6, 32)
    q, k = rotate(q[None, None], rotary)[0, 0], rotate(k[None, None], rotary)[0, 0]
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(6))
    torch.testing.assert_close(q[1] @ k[3], q[2] @ k[4])


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_transformer_equals_diffusers(guidance_embed: bool) -> None:
    pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is installed with the extra 'test'")
    from benchmarks.step import build

    params = FluxParams(
        **{**FLUX.__dict__, "guidance_embed": guidance_embed, "mlp_hidden": 256, "depth": 2, "depth_single_blocks": 2}
    )
    ours, peer = build(params, torch.float32)
    latent, context, pooled = torch.randn(2, 16, 6, 10), torch.randn(2, 7, 48), torch.randn(2, 32)
    sigma = torch.tensor([0.3, 0.9])
    guidance = torch.tensor([3.5, 1.0]) if guidance_embed else None
    ids = torch.zeros(3, 5, 3)
    ids[..., 1], ids[..., 2] = torch.arange(3)[:, None], torch.arange(5)[None]
    with torch.inference_mode():
        out = predict_velocity(ours, latent, sigma, context, pooled, guidance)
        expected = peer(
            hidden_states=pack(latent),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(7, 3),
            return_dict=False,
        )[0]
    torch.testing.assert_close(pack(out), expected, rtol=1e-4, atol=2e-4)


def test_t5_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    config = transformers.T5Config(
        vocab_size=T5.vocab_size, d_model=T5.hidden_size, d_kv=T5.head_dim, d_ff=T5.mlp_hidden,
        num_layers=T5.num_layers, num_heads=T5.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    ours = network(T5Encoder, T5)
    peer = transformers.T5EncoderModel(config).eval()
    peer.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.randint(0, T5.vocab_size, (2, 150))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), peer(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_buckets_are_symmetric_but_for_direction() -> None:
    buckets = relative_buckets(300, 32, 128)
    after = torch.triu(torch.ones(300, 300, dtype=torch.bool), 1)
    assert torch.equal(buckets[after], (buckets.T + 16)[after])
    assert buckets.max() == 31 and buckets.min() == 0


def test_clip_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP.vocab_size, hidden_size=CLIP.hidden_size, intermediate_size=CLIP.mlp_hidden, eos_token_id=63,
        num_hidden_layers=CLIP.num_layers, num_attention_heads=CLIP.num_heads, hidden_act="quick_gelu",
    )  # fmt: skip
    ours = network(CLIPText, CLIP)
    peer = transformers.CLIPTextModel(config).eval()
    state = ours.state_dict()
    if not any(key.startswith("text_model.") for key in peer.state_dict()):  # transformers 5 dropped the prefix
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    peer.load_state_dict(state, strict=False)
    ids = torch.randint(1, 63, (2, 77))
    ids[0, 20:], ids[1, 60:] = 63, 63
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, 63), peer(input_ids=ids).pooler_output, rtol=1e-4, atol=1e-4)


def conditioning(length: int = 7) -> Conditioning:
    return Conditioning(torch.randn(length, FLUX.context_in_dim), torch.randn(FLUX.vec_in_dim), 3.5)


@pytest.mark.parametrize("ahead", [True, False])
def test_precomputed_velocity_equals_the_plain_one(ahead: bool) -> None:
    model = network(Flux, FLUX)
    velocity, conds, sigmas = Velocity(model), [conditioning(), conditioning()], [1.0, 0.7, 0.2]
    with torch.inference_mode():
        if ahead:
            velocity.precompute(sigmas, conds)
        for sigma in [*sigmas, 0.55]:
            latent = torch.randn(2, 16, 5, 6)
            plain = predict_velocity(
                model,
                latent,
                torch.full((2,), sigma),
                torch.stack([cond.context for cond in conds]),
                torch.stack([cond.pooled for cond in conds]),
                torch.full((2,), 3.5),
            )
            out = velocity(latent, sigma, conds)
            assert (out - plain).norm() <= 1e-6 * plain.norm()


def test_precomputed_modulations_do_not_read_their_weights_again() -> None:
    model = network(Flux, FLUX)
    velocity, cond = Velocity(model), conditioning()
    latent = torch.randn(1, 16, 4, 4)
    with torch.inference_mode():
        velocity.precompute([1.0, 0.5], [cond])
        expected = velocity(latent, 0.5, [cond])
        for name, parameter in model.named_parameters():
            if ".lin." in name or "adaLN" in name or name.startswith(("time_in", "guidance_in", "vector_in")):
                parameter.fill_(float("nan"))
        assert torch.equal(velocity(latent, 0.5, [cond]), expected)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("cudnn", "flash", "efficient")])
@pytest.mark.parametrize("shape", [(1, 2, 5, 8), (2, 3, 17, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_backends_agree(backend: str, shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = torch.randn(3, *shape)
    expected = attention(q, k, v, causal=causal, backend="reference")
    torch.testing.assert_close(attention(q, k, v, causal=causal, backend=backend), expected, rtol=1e-5, atol=1e-5)
    bias = torch.randn(1, shape[1], shape[2], shape[2])
    torch.testing.assert_close(
        attention(q, k, v, bias=bias, scale=1.0, backend=backend),
        attention(q, k, v, bias=bias, scale=1.0, backend="reference"),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("queries", [1, 7, 64])
def test_attention_in_parts_is_attention(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightweight_engine.backend.attention._QUERIES", queries)
    q, k, v = torch.randn(3, 2, 3, 17, 16)
    for scale in (None, 0.3):
        expected = BACKENDS["reference"](q, k, v, None, False, scale)
        torch.testing.assert_close(in_parts(q, k, v, scale), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_streams_stay_finite() -> None:
    from lightweight_engine.backend.fused import ResidualStream

    for dtype, expected in ((torch.float16, 32768), (torch.float32, 120_000)):
        stream = ResidualStream(torch.full((1, 1, 2), 6e4, dtype=dtype))
        gate, update = torch.ones(1, 1, 2, dtype=dtype), torch.full((1, 1, 2), 6e4, dtype=dtype)
        stream.add(gate, update, clip=True)
        assert (stream.tokens == expected).all()
        stream.add(-gate, update)  # what is not to be clipped is not
        stream.add(-gate, update)
        assert (stream.tokens == expected - 120_000).all()


def test_autoencoder_sizes() -> None:
    model = network(Autoencoder, AE)
    with torch.inference_mode():
        latent = model.encode(torch.rand(1, 3, 41, 55), torch.zeros(1, 16, 5, 6))
        assert latent.shape == (1, 16, 5, 6)
        pixels = model.decode(latent)
    assert pixels.shape == (1, 3, 40, 48) and pixels.min() >= 0 and pixels.max() <= 1


def test_a_single_tile_is_the_whole_picture() -> None:
    model = network(Autoencoder, AE)
    latent = torch.randn(2, 16, 9, 6)
    with torch.inference_mode():
        torch.testing.assert_close(decode_tiled(model, latent, (64, 64), 2), model.decode(latent), rtol=0, atol=1e-5)


def test_preview_finds_the_colours_of_a_linear_autoencoder() -> None:
    model = network(Autoencoder, AE)
    preview = Preview.fit(model, count=4, size=64)
    with torch.inference_mode():
        assert preview(torch.randn(1, 16, 5, 7)).shape == (1, 3, 5, 7)
    fields = colour_fields(4, 64)
    assert fields.shape == (4, 3, 64, 64) and fields.min() >= 0 and fields.max() <= 1
