"""From what a request asks for to the LoRAs that act: names, addresses, tags, limits, and what is refused."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import FLUX
from loopback import Site, serving
from lora_models import lora_file, numbers, pair, random_lora, small_shapes
from safetensors.torch import save

from lightweight_engine.backend.checkpoint import file_sha256
from lightweight_engine.backend.net import Access, Limits
from lightweight_engine.core.download import Downloads
from lightweight_engine.core.file_cache import FileCache
from lightweight_engine.core.lora_sources import shown_url
from lightweight_engine.errors import (
    AdapterChangedError,
    AdapterError,
    ModelNotFoundError,
    RequestError,
    WrongContentError,
)
from lightweight_engine.extensions.lora import FILES_KEPT, LoRAManager, field_of, reports, specs_of
from lightweight_engine.extensions.lora_library import LoraLibrary
from lightweight_engine.lora_spec import LoraSpec
from lightweight_engine.request import GenerationRequest

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
WIDTH = FLUX.hidden_size
PLAIN = pair(QKV, 3 * WIDTH, WIDTH, names="lora_down.weight lora_up.weight")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models" / "Lora" / "people").mkdir(parents=True)
    return tmp_path / "models" / "Lora"


def manager(folder: Path, site: Site | None = None, **options: bool) -> LoRAManager:
    allow = [site.name] if site else []
    cache = FileCache(folder.parent / "cache", 1 << 24)
    fetch = Downloads(cache, Limits(1 << 22, 5.0, 20.0, 0.0), Access(allow)).lora
    library = LoraLibrary([folder.parent])
    return LoRAManager(small_shapes(), library, fetch, sha256_of=file_sha256, shown=shown_url, **options)


def asked(warnings: list[str] | None = None, prompt: str = "a cat", **fields: object) -> list[LoraSpec]:
    return specs_of(GenerationRequest(prompt=prompt, **fields), prompt, [] if warnings is None else warnings)


class TestWhatIsAskedFor:
    def test_a_strength_of_zero_is_told(self) -> None:
        warnings: list[str] = []
        asked(
            warnings,
            loras=["night:0", LoraSpec(name="hat", scale=0, text_scale=1), "cap"],
            lora_urls=["https://a/secret.safetensors"],
            lora_scales=[0],
            prompt="<lora:style:0>",
        )
        ends = "had no effect at strength 0; give another, or leave it out"
        assert warnings == [f"lora_urls[0]: a LoRA {ends}", f"loras[0]: night {ends}", f"prompt: style {ends}"]

    def test_from_three_places(self) -> None:
        found = asked(
            lora_urls=["https://a/x.safetensors", "https://a/y.safetensors"],
            lora_scales=[0.5, 2],
            loras=["night:0.8", LoraSpec(name="hat", text_scale=0)],
            prompt="a cat<lora:style:0.3:0.9> in the sun",
        )
        assert [(spec.url or spec.name, spec.scale, spec.text_scale) for spec in found] == [
            ("https://a/x.safetensors", 0.5, None),
            ("https://a/y.safetensors", 2, None),
            ("night", 0.8, None),
            ("hat", 1, 0),
            ("style", 0.9, 0.3),
        ]

    @pytest.mark.parametrize("scales", [[], [1], [0.4]])
    def test_one_scale_stands_for_all(self, scales: list[float]) -> None:
        found = asked(lora_urls=["https://a/x.safetensors", "https://a/y.safetensors"], lora_scales=scales)
        assert {spec.scale for spec in found} == {scales[0] if scales else 1.0}

    @pytest.mark.parametrize("scales", [[1, 2, 3], [1, 1]])
    def test_scales_that_pair_with_nothing(self, scales: list[float]) -> None:
        with pytest.raises(RequestError, match="lora_scales has"):
            asked(lora_urls=["https://a/x.safetensors"], lora_scales=scales)

    def test_spellings(self) -> None:
        assert LoraSpec.parse("night") == LoraSpec(name="night")
        assert LoraSpec.parse("night:-0.5") == LoraSpec(name="night", scale=-0.5)
        assert LoraSpec.parse("a:b") == LoraSpec(name="a:b")
        assert LoraSpec.parse("https://a:8000/x.safetensors") == LoraSpec(url="https://a:8000/x.safetensors")
        assert LoraSpec.parse("https://a/x.safetensors:1.5") == LoraSpec(url="https://a/x.safetensors", scale=1.5)

    def test_twice_counts_once_and_two_strengths_both(self) -> None:
        warnings: list[str] = []
        found = asked(warnings, prompt="<lora:a:1><lora:a:1><lora:a:0.5>", loras=["a"])
        assert [spec.scale for spec in found] == [1, 1, 0.5]  # the field's spec leaves the text encoders to its scale
        assert warnings and "counts once" in warnings[0]

    @pytest.mark.parametrize(
        "fields",
        [
            {"lora_urls": [f"https://a/{i}.safetensors" for i in range(100)]},
            {"loras": [f"x{i}" for i in range(17)]},
            {"prompt": "".join(f"<lora:x{i}>" for i in range(17))},
            {"loras": [f"x{i}" for i in range(10)], "lora_urls": [f"https://a/{i}.safetensors" for i in range(10)]},
        ],
    )
    def test_too_many(self, fields: dict) -> None:
        with pytest.raises(RequestError, match="16"):
            asked(**fields)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e6, -1e6])
    def test_strengths_out_of_bounds(self, scale: float) -> None:
        for fields in ({"loras": [f"x:{scale}"]}, {"lora_urls": ["https://a/x.safetensors"], "lora_scales": [scale]},
                       {"prompt": f"a cat<lora:x:{scale}>"}):  # fmt: skip
            with pytest.raises(RequestError):
                asked(**fields)

    def test_other_tags_are_told(self) -> None:
        warnings: list[str] = []
        assert asked(warnings, prompt="a cat<hypernet:x:1><lora:y:1:1:8>")[0].name == "y"
        assert "<hypernet:x:1>" in warnings[0] and "rank" in warnings[1]

    def test_an_address_is_never_shown(self) -> None:
        secret = "https://a/x.safetensors?token=SECRET"
        request = GenerationRequest(lora_urls=secret, loras=[LoraSpec(url=secret)])
        assert "SECRET" not in repr(request) and "SECRET" not in repr(request.loras)
        for fields in (
            {"lora_urls": {"a": secret}},
            {"loras": [secret + ":1e6"]},
            {"loras": [{"url": secret, "x": 1}]},
        ):
            with pytest.raises(RequestError) as error:
                GenerationRequest(**fields)
            assert "SECRET" not in str(error.value)


class TestNames:
    def test_by_name_file_alias_and_folder(self, folder: Path) -> None:
        lora_file(folder, PLAIN, name="night.safetensors", metadata={"ss_output_name": "dark"})
        lora_file(folder / "people", PLAIN, name="hat.safetensors")
        lora_file(folder, PLAIN, name="hat.safetensors")
        library = LoraLibrary([folder.parent])
        assert [entry.name for entry in library.ls()] == ["hat", "night", "people/hat"]
        for name in ("night", "night.safetensors", "dark"):
            assert library.find(name).path == folder / "night.safetensors"
        assert library.find("people/hat").path == folder / "people" / "hat.safetensors"

    def test_what_was_replaced_is_not_kept(self, folder: Path) -> None:
        lora_file(folder, PLAIN, name="night.safetensors")
        library = LoraLibrary([folder.parent])
        before = weakref.ref(library.find("night"))
        assert library.find("night") is before()
        lora_file(folder, PLAIN, name="night.safetensors", metadata={"ss_output_name": "dark"})
        assert library.find("dark").path == folder / "night.safetensors"
        gc.collect()
        assert before() is None

    def test_of_two_folders_the_first_wins(self, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other" / "Lora"
        other.mkdir(parents=True)
        for place in (folder, other):
            lora_file(place, PLAIN, name="night.safetensors")
        assert LoraLibrary([folder.parent, other.parent]).find("night").path.parent == folder
        assert LoraLibrary([other.parent, folder.parent]).find("night").path.parent == other

    def test_what_is_not_there(self, folder: Path) -> None:
        lora_file(folder, PLAIN, name="night.safetensors")
        library = LoraLibrary([folder.parent])
        with pytest.raises(ModelNotFoundError, match="did you mean 'night'"):
            library.find("nigth")
        for name in ("../../etc/passwd", str(folder / "night.safetensors"), "a\0b", "x" * 4096, ""):
            with pytest.raises(ModelNotFoundError):
                library.find(name)

    def test_a_strength_that_is_none(self, folder: Path) -> None:
        lora_file(folder, PLAIN, name="night.safetensors")
        request = GenerationRequest(loras=["night:abc"])
        with pytest.raises(RequestError, match=r"^loras\[0\]: 'abc' is no strength; write night:0\.8$") as caught:
            manager(folder).use(request.loras, field_of=lambda spec: field_of(spec, request))
        assert caught.value.field == "loras[0]"

    def test_a_link_out_of_the_folder(self, folder: Path, tmp_path: Path) -> None:
        lora_file(tmp_path, PLAIN, name="outside.safetensors")
        (folder / "inside.safetensors").symlink_to(tmp_path / "outside.safetensors")
        (folder / "dead.safetensors").symlink_to(tmp_path / "gone.safetensors")
        library = LoraLibrary([folder.parent])
        assert all(entry.problem for entry in library.ls())
        with pytest.raises(AdapterError, match="leads out"):
            library.find("inside")

    def test_linked_folders_are_looked_into_once(self, folder: Path, tmp_path: Path) -> None:
        """Of those that lead out of the folder each file says what to do."""
        lora_file(folder / "people", PLAIN, name="hat.safetensors")
        (tmp_path / "elsewhere").mkdir()
        lora_file(tmp_path / "elsewhere", PLAIN, name="hat.safetensors")
        lora_file(tmp_path / "elsewhere", PLAIN, name="night.SAFETENSORS")
        for link, target in (("circle", folder), ("people/again", folder / "people"), ("more", tmp_path / "elsewhere")):
            (folder / link).symlink_to(target)
        (folder / "itself.safetensors").symlink_to(folder / "itself.safetensors")
        library = LoraLibrary([folder.parent])
        assert [entry.name for entry in library.ls()] == ["hat", "itself", "more/hat", "night"]
        assert library.find("hat").path == folder / "people" / "hat.safetensors"
        for name in ("night", "more/hat"):
            with pytest.raises(AdapterError, match="behind, a link that leads out of .*; put the file itself there"):
                library.find(name)

    def test_the_folder_itself_may_be_a_link(self, folder: Path, tmp_path: Path) -> None:
        lora_file(folder, PLAIN, name="hat.safetensors")
        root = tmp_path / "other"
        root.mkdir()
        (root / "Lora").symlink_to(folder)
        assert not LoraLibrary([root]).find("hat").problem

    def test_a_broken_file_is_a_row_of_the_list(self, folder: Path) -> None:
        (folder / "bad.safetensors").write_bytes(b"<html>not found</html>")
        library = LoraLibrary([folder.parent])
        assert library.ls()[0].problem
        with pytest.raises(AdapterError, match=r"bad\.safetensors"):
            library.find("bad")


class TestTheManager:
    def test_a_set_knows_what_it_changes(self, folder: Path) -> None:
        lora_file(folder, random_lora(small_shapes(), seed=1, text=True), name="a.safetensors")
        made = manager(folder)
        one, two = made.use([LoraSpec(name="a")]), made.use([LoraSpec(name="a", scale=0.5, text_scale=1)])
        assert one.key("transformer") != two.key("transformer") and one.text_key == two.text_key
        assert made.use([LoraSpec(name="a")]).full_key == one.full_key
        assert made.use([LoraSpec(name="a", scale=0)]).full_key == made.use([]).full_key
        assert {s for rows in two.changes("transformer").values() for _, s in rows} == {0.5}
        assert two.changes("t5") == {}

    def test_reports(self, folder: Path) -> None:
        tensors = {**PLAIN, "lora_unet_no_such_block.lora_down.weight": numbers(2, 8)}
        lora_file(folder, tensors, name="a.safetensors")
        report = reports([manager(folder).use([LoraSpec(name="a", scale=0.5)])])[0]
        assert (report.name, report.scale, report.text_scale) == ("a", 0.5, 0.5)
        assert (report.found, report.applied, dict(report.patches)) == (2, 1, {"transformer": 1})
        assert dict(report.ignored) == {"no such module in the model": ("lora_unet_no_such_block.lora_down.weight",)}
        assert report.sha256 == file_sha256(folder / "a.safetensors")

    def test_few_files_stay_open(self, folder: Path) -> None:
        for i in range(FILES_KEPT + 3):
            lora_file(folder, {**PLAIN, f"{QKV}.alpha": torch.tensor(float(i))}, name=f"{i}.safetensors")
        made = manager(folder)
        sets = [made.use([LoraSpec(name=str(i))]) for i in range(FILES_KEPT + 3)]
        assert len(made._open) == FILES_KEPT
        assert made.use([LoraSpec(name="10")]).uses[0].file is sets[-1].uses[0].file

    def test_another_file_than_expected(self, folder: Path) -> None:
        lora_file(folder, PLAIN, name="a.safetensors")
        with pytest.raises(AdapterError, match="another file"):
            manager(folder).use([LoraSpec(name="a", sha256="0" * 64)])
        assert manager(folder).use([LoraSpec(name="a", sha256=file_sha256(folder / "a.safetensors"))]).uses

    def test_a_file_that_is_replaced_as_it_is_read(self, folder: Path) -> None:
        """It would be kept as the one whose hash was taken, and told by it."""
        path = lora_file(folder, PLAIN, name="night.safetensors").path
        made = manager(folder)

        def hash_and_replace(path: Path) -> str:
            digest = file_sha256(path)
            os.utime(
                lora_file(folder, {key: 2 * each for key, each in PLAIN.items()}, name="night.safetensors").path, (1, 1)
            )
            return digest

        made._sha256_of = hash_and_replace
        with pytest.raises(AdapterChangedError, match="night was replaced as it was read; ask again"):
            made.use([LoraSpec(name="night")])
        made._sha256_of = file_sha256
        (use,) = made.use([LoraSpec(name="night")]).uses
        assert use.sha256 == file_sha256(path)

    @pytest.mark.parametrize("hashed", [False, True], ids=["before its hash is known", "before it is opened"])
    def test_a_file_that_goes_away_as_it_is_read(self, folder: Path, hashed: bool) -> None:
        made = manager(folder)
        lora_file(folder, PLAIN, name="night.safetensors")

        def lose(path: Path) -> str:
            digest = file_sha256(path)
            path.unlink()
            return digest if hashed else file_sha256(path)

        made._sha256_of = lose
        with pytest.raises(AdapterChangedError, match=r"night cannot be read \(No such file or directory\); ask again"):
            made.use([LoraSpec(name="night")])

    def test_a_file_that_may_not_be_read(self, folder: Path) -> None:
        """As one that is named by its path."""
        path = lora_file(folder, PLAIN, name="night.safetensors").path
        made = manager(folder)

        def refuse(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        made._sha256_of = refuse
        with pytest.raises(
            AdapterError, match=r"night cannot be read \(Permission denied\); mend its permissions"
        ) as told:
            made.read(path, "night")
        assert told.value.http_status == 422, "it does not pass by itself"

    def test_a_control_lora_says_what_it_needs(self, folder: Path) -> None:
        tensors = {"img_in.lora_A.weight": numbers(2, 128), "img_in.lora_B.weight": numbers(WIDTH, 2)}
        lora_file(folder, tensors, name="depth.safetensors")
        with pytest.raises(AdapterError, match="control picture"):
            manager(folder).use([LoraSpec(name="depth")])

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": numbers(4, 320),
              "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": numbers(320, 4)}, "SD 1.5"),
            ({**PLAIN, f"{QKV}.lora_up.weight": PLAIN[f"{QKV}.lora_up.weight"] * float("nan")}, "not finite"),
            ({**PLAIN, f"{QKV}.lora_up.weight": PLAIN[f"{QKV}.lora_up.weight"] / 0}, "not finite"),
            ({f"{QKV}.lora_down.weight": numbers(0, WIDTH), f"{QKV}.lora_up.weight": numbers(3 * WIDTH, 0)}, QKV),
            ({f"{QKV}.lora_down.weight": numbers(4097, WIDTH), f"{QKV}.lora_up.weight": numbers(3 * WIDTH, 4097)}, QKV),
            ({**PLAIN, f"{QKV}.lora_up.weight": numbers(3 * WIDTH + 1, 2)}, "img_attn"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, folder: Path, tensors: dict, words: str) -> None:
        lora_file(folder, tensors, name="bad.safetensors")
        with pytest.raises(AdapterError, match=words) as error:
            manager(folder).use([LoraSpec(name="bad")])
        assert "bad" in str(error.value)


class TestAddresses:
    def test_one_is_fetched_once_and_named(self, folder: Path, site: Site) -> None:
        site.files["style.safetensors"] = save(PLAIN)
        made = manager(folder, site)
        spec = LoraSpec(url=site.url("style.safetensors?token=SECRET"))
        use = made.use([spec, spec]).uses[0]
        assert (use.name, use.given) == ("style", site.url("style.safetensors"))
        assert site.count("style.safetensors") == 1
        assert "SECRET" not in repr(reports([made.use([spec])]))

    @pytest.mark.parametrize(
        ("body", "error", "words"),
        [
            (save({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": numbers(4, 320),
                   "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": numbers(320, 4)}),
             AdapterError, "style"),
            (save({**PLAIN, f"{QKV}.alpha": torch.tensor(float("nan"))}), AdapterError, "style"),
            (save(PLAIN)[:-1], WrongContentError, "incomplete"),
        ],
    )  # fmt: skip
    def test_a_file_that_does_not_fit(
        self, folder: Path, site: Site, body: bytes, error: type[Exception], words: str
    ) -> None:
        site.files["style.safetensors"] = body
        with pytest.raises(error, match=words):
            manager(folder, site).use([LoraSpec(url=site.url("style.safetensors"))])

    def test_duplicate_names_in_a_file(self, folder: Path, site: Site) -> None:
        body = save({**PLAIN, "x1.alpha": numbers(1), "x2.alpha": numbers(1)})
        site.files["style.safetensors"] = body.replace(b"x2.alpha", b"x1.alpha")
        with pytest.raises(WrongContentError, match="twice"):
            manager(folder, site).use([LoraSpec(url=site.url("style.safetensors"))])

    def test_a_stop_ends_the_fetch(self, folder: Path, site: Site) -> None:
        site.files["style.safetensors"] = save(PLAIN)

        def stop(received: int, size: int | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            manager(folder, site).use([LoraSpec(url=site.url("style.safetensors"))], progress=stop)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://a.b/x.safetensors?token=S", "https://a.b/x.safetensors"),
        ("https://u:S@a.b/x.safetensors#S", "https://a.b/x.safetensors"),
        (
            "https://civitai.com/api/download/models/1?type=Model&format=SafeTensor&token=S",
            "https://civitai.com/api/download/models/1?type=Model&format=SafeTensor",
        ),
        ("https://a/x.safetensors?X-Amz-Signature=S&Expires=1", "https://a/x.safetensors"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str) -> None:
    assert shown_url(url) == shown
