"""Tokenizers: a small vocabulary of our own everywhere, the real files and transformers as oracles where present."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightweight_engine.errors import CorruptCheckpointError, ModelNotFoundError
from lightweight_engine.flux.tokenizers import (
    CLIPTokenizer,
    T5Tokenizer,
    _byte_letters,
    _merge,
    find_tokenizer,
    hub_cache,
    is_tokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "i n", "d o", "do g</w>"]


def small_vocab() -> dict[str, int]:
    letters = list(_byte_letters().values())
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(pair.replace(" ", "") for pair in MERGES),
        START,
        END,
    ]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer(small_vocab(), MERGES)


def real_folder(kind: str) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
    from goldens import tokenizer_dir

    folder = tokenizer_dir()
    if folder is None:
        pytest.skip("no tokenizer files: set LWE_TOKENIZER_DIR")
    return folder / kind


def write_clip(folder: Path, vocab: dict[str, int] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(small_vocab() if vocab is None else vocab), encoding="utf-8")
    lines = ["#version: 0.2", *MERGES]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_t5(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("▁a", -2.0), ("▁cat", -2.0), ("▁", -3.0), ("t", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class TestCLIP:
    def names(self, clip: CLIPTokenizer, text: str) -> list[str]:
        by_id = {i: token for token, i in small_vocab().items()}
        return [by_id[i] for i in clip.encode(text)]

    def test_merges_and_words(self, clip: CLIPTokenizer) -> None:
        assert self.names(clip, "Cat  DOG\n2in!?") == ["cat</w>", "dog</w>", "2</w>", "i", "n</w>", "!", "?</w>"]
        assert self.names(clip, "cat's") == ["cat</w>", "'", "s</w>"]

    def test_special_ids_come_from_the_vocabulary(self, clip: CLIPTokenizer) -> None:
        vocab = small_vocab()
        assert (clip.start_id, clip.end_id, clip.comma_id) == (vocab[START], vocab[END], vocab[",</w>"])
        assert CLIPTokenizer({START: 0, END: 1}, []).comma_id is None

    def test_special_tokens_in_the_text(self, clip: CLIPTokenizer) -> None:
        assert self.names(clip, f"cat{END}dog") == ["cat</w>", END, "dog</w>"]
        assert self.names(clip, f"cat {END.upper()}") == ["cat</w>", END]

    def test_text_is_repaired_before_it_is_cut(self, clip: CLIPTokenizer) -> None:
        assert clip.encode("ｃａｔ “dog”") == clip.encode('cat "dog"')
        assert clip.encode("cat &amp; dog") == clip.encode("cat & dog")
        assert clip.encode("cat\x00\x1b[31m\u3000dog\xa0") == clip.encode("cat dog")
        assert clip.encode("\ud800") == clip.encode("\ufffd")

    def test_an_unknown_token_is_the_end(self) -> None:
        tokenizer = CLIPTokenizer({START: 0, END: 1, "a</w>": 2}, [])
        assert tokenizer.encode("a b") == [2, 1]

    def test_nothing(self, clip: CLIPTokenizer) -> None:
        assert clip.encode("") == clip.encode("  \n") == []

    def test_both_layouts_of_files(self, clip: CLIPTokenizer, tmp_path: Path) -> None:
        assert CLIPTokenizer.load(write_clip(tmp_path / "a")).encode("cat dog") == clip.encode("cat dog")
        for name, merges in (
            ("b", MERGES),
            ("c", [pair.split() for pair in MERGES]),
            ("d", [f"{pair} " for pair in MERGES]),
        ):
            (tmp_path / name).mkdir()
            model = {"model": {"type": "BPE", "vocab": small_vocab(), "merges": merges}}
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(model), encoding="utf-8")
            assert CLIPTokenizer.load(tmp_path / name).encode("cat dog") == clip.encode("cat dog")

    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="missing"):
            CLIPTokenizer.load(tmp_path)
        with pytest.raises(CorruptCheckpointError, match="lacks"):
            CLIPTokenizer.load(write_clip(tmp_path / "a", {"a": 0}))
        for text in (
            "<html>",
            "[]",
            '{"model": 3}',
            '{"model": {"vocab": {}, "merges": ["a"]}}',
            '{"model": {"vocab": {}, "merges": ["a b c"]}}',
        ):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(CorruptCheckpointError):
                CLIPTokenizer.load(tmp_path)

    def test_threads_agree(self, clip: CLIPTokenizer) -> None:
        texts = ["".join(random.Random(i).choices("catdog in 🐱é", k=40)) for i in range(200)]
        expected = [clip.encode(text) for text in texts]
        fresh, failures = CLIPTokenizer(small_vocab(), MERGES), []

        def work() -> None:
            if [fresh.encode(text) for text in texts] != expected:
                failures.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    @pytest.mark.parametrize("text", ["a" * 20_000, "🌸" * 20_000, "!" * 20_000, "&" * 20_000, " " * 20_000])
    def test_long_words_take_little_time(self, clip: CLIPTokenizer, text: str) -> None:
        began = time.process_time()
        clip.encode(text)
        assert time.process_time() - began < 3


def naive_merge(tokens: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The published algorithm: the best pair of the word, everywhere from left to right, until there is none."""
    while True:
        pairs = [pair for pair in pairwise(tokens) if pair in ranks]
        if not pairs:
            return tokens
        best = min(pairs, key=lambda pair: ranks[pair])
        merged: list[str] = []
        for token in tokens:
            if merged and (merged[-1], token) == best and not merged[-1].endswith("\0"):
                merged[-1] += token + "\0"  # a fresh token takes no further part in this pass
            else:
                merged.append(token)
        tokens = [token.rstrip("\0") for token in merged]


@pytest.mark.parametrize("seed", range(100))
def test_merging_equals_the_published_algorithm(seed: int) -> None:
    """Also for merges in an order that no training would give, where one pair can make a more urgent one."""
    pick = random.Random(seed)
    tokens = ["a", "b", "c"]
    merges = []
    for _ in range(30):
        pair = (pick.choice(tokens), pick.choice(tokens))
        merges.append(pair)
        tokens.append("".join(pair))
    pick.shuffle(merges)
    ranks: dict[tuple[str, str], int] = {}
    for pair in merges:
        ranks.setdefault(pair, len(ranks))
    word = pick.choices("abc", k=pick.randint(1, 40))
    assert _merge(list(word), {" ".join(pair): rank for pair, rank in ranks.items()}) == naive_merge(list(word), ranks)


class TestT5:
    def test_ids(self, tmp_path: Path) -> None:
        t5 = T5Tokenizer.load(write_t5(tmp_path))
        assert (t5.pad_id, t5.end_id) == (0, 1)
        assert t5.encode("a cat") == [3, 4]
        assert t5.encode("\ud800") == t5.encode("?")

    def test_never_cut(self, tmp_path: Path) -> None:
        assert len(T5Tokenizer.load(write_t5(tmp_path)).encode("cat " * 2000)) >= 2000

    def test_bad_files(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="missing"):
            T5Tokenizer.load(tmp_path)
        for text in ("", "<html>", "{}", '{"version": "1.0"}'):
            (tmp_path / "tokenizer.json").write_text(text)
            with pytest.raises(CorruptCheckpointError, match="not a tokenizer"):
                T5Tokenizer.load(tmp_path)


class TestFind:
    @pytest.mark.parametrize(
        ("kind", "place"),
        [
            ("clip", "models/tokenizers/clip_l"),
            ("clip", "models/text_encoder/clip_l"),
            ("clip", "models/text_encoders"),
            ("clip", "models/diffusers/flux/tokenizer"),
            ("clip", "backend/huggingface/black-forest-labs/FLUX.1-dev/tokenizer"),
            ("clip", "comfy/sd1_tokenizer"),
            ("t5", "models/tokenizers/t5xxl"),
            ("t5", "models/text_encoder"),
            ("t5", "backend/huggingface/black-forest-labs/FLUX.1-schnell/tokenizer_2"),
            ("t5", "comfy/text_encoders/t5_tokenizer"),
        ],
    )
    @pytest.mark.parametrize("named", ["models", "."])
    def test_places_of_an_install(self, tmp_path: Path, kind: Any, place: str, named: str) -> None:
        if named == "." and place.startswith("models/"):
            place = place.removeprefix("models/")
        (tmp_path / "app" / "models").mkdir(parents=True)
        assert find_tokenizer(kind, [tmp_path / "app" / named]) is None
        folder = (write_clip if kind == "clip" else write_t5)(tmp_path / "app" / place)
        found = find_tokenizer(kind, [tmp_path / "app" / named])
        assert found is not None
        assert found.resolve() == folder.resolve()

    def test_the_hub_cache_comes_last(self, tmp_path: Path) -> None:
        hub = tmp_path / "hub"
        cached = write_clip(hub / "models--openai--clip-vit-large-patch14" / "snapshots" / "abc")
        write_t5(hub / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "x" / "tokenizer_2")
        assert find_tokenizer("clip", [tmp_path / "models"], hub) == cached
        assert find_tokenizer("t5", [], hub) is not None
        own = write_clip(tmp_path / "models" / "tokenizers" / "clip_l")
        assert find_tokenizer("clip", [tmp_path / "models"], hub) == own

    def test_other_tokenizers_are_passed_over(self, tmp_path: Path) -> None:
        write_clip(tmp_path / "tokenizer", {"hello": 0})
        write_t5(tmp_path / "text_encoder")
        assert find_tokenizer("clip", [tmp_path]) is None
        (tmp_path / "text_encoder" / "tokenizer.json").write_bytes(b'"Unigram" "</s>" "<pad>"' + b" " * (9 << 20))
        assert not is_tokenizer("t5", tmp_path / "text_encoder")  # umT5, by its size

    def test_where_the_hub_is(self, tmp_path: Path) -> None:
        assert hub_cache({"HF_HUB_CACHE": "/a"}) == Path("/a")
        assert hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
        assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
        assert hub_cache({}) == Path.home() / ".cache" / "huggingface" / "hub"


# --- the real files ---------------------------------------------------------------------------------------------

POOLS = [
    [chr(i) for i in range(32, 127)],
    [chr(i) for i in range(256)],
    [chr(i) for i in range(0x370, 0x600)],
    [chr(i) for i in [*range(0x3040, 0x30FF), *range(0x4E00, 0x4E80)]],
    [chr(i) for i in [*range(0x1F300, 0x1F700), 0x200D, 0xFE0F]],
    [chr(i) for i in [*range(0x2000, 0x2100), *range(0xFF00, 0xFFEF)]],
    ["'s", "'LL", "&amp;", "&", START, "'ſ", "İ", "ß", "ﬁ", "“", "’", "e\u0301", "Ã©", "â€™", " ", "\n", "\x1b[31m"],
]


def random_text(pick: random.Random) -> str:
    pools = pick.choices(POOLS, k=pick.randint(1, 3))
    return "".join(pick.choice(pick.choice(pools)) for _ in range(pick.randint(1, 30)))


def test_clip_equals_the_published_rules() -> None:
    """A direct reading of the slow tokenizer: ftfy, lower case, one regular expression, plain BPE."""
    import ftfy
    import regex

    clip = CLIPTokenizer.load(real_folder("clip_l"))
    vocab = json.loads((real_folder("clip_l") / "vocab.json").read_text(encoding="utf-8"))
    lines = (real_folder("clip_l") / "merges.txt").read_text(encoding="utf-8").strip().split("\n")[1:]
    ranks = {(left, right): i for i, (left, right) in enumerate(line.split() for line in lines)}
    words = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )
    letters = _byte_letters()
    pick = random.Random(1)
    for _ in range(1500):
        text = random_text(pick)
        if START in text or END in text:
            continue  # cut out before; see TestCLIP
        expected = []
        for word in words.findall(regex.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()):
            tokens = [letters[byte] for byte in word.encode()]
            tokens[-1] += "</w>"
            expected += [vocab.get(token, vocab[END]) for token in naive_merge(tokens, ranks)]
        assert clip.encode(text) == expected, repr(text)


def test_clip_equals_transformers_where_its_fast_tokenizer_can() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is only an oracle of the tests")
    oracle = transformers.CLIPTokenizer.from_pretrained(str(real_folder("clip_l")))
    clip = CLIPTokenizer.load(real_folder("clip_l"))
    pick = random.Random(2)
    plain = [letter for letter in POOLS[0] if letter != "&"]
    for _ in range(500):
        text = "".join(pick.choices(plain, k=pick.randint(1, 60)))
        assert clip.encode(text) == oracle(text, add_special_tokens=False)["input_ids"], repr(text)


def test_t5_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is only an oracle of the tests")
    oracle = transformers.T5TokenizerFast.from_pretrained(str(real_folder("t5xxl")))
    t5 = T5Tokenizer.load(real_folder("t5xxl"))
    pick = random.Random(3)
    for _ in range(1500):
        # transformers 5 cuts at rare control characters, where the file itself (and transformers 4) does not
        text = "".join(letter for letter in random_text(pick) if letter.isprintable())
        assert t5.encode(text) == oracle(text, add_special_tokens=False)["input_ids"], repr(text)


def test_loading_is_fast_and_lazy() -> None:
    """Both load in a fresh process without torch, ftfy or regex; the target is 0.3 s on an idle machine."""
    code = (
        "import sys, time; from pathlib import Path; began = time.perf_counter()\n"
        "from lightweight_engine.flux.tokenizers import CLIPTokenizer, T5Tokenizer\n"
        "clip = CLIPTokenizer.load(Path(sys.argv[1])); T5Tokenizer.load(Path(sys.argv[2])); clip.encode('a cat, 8k')\n"
        "assert not {'torch', 'ftfy', 'regex', 'transformers'} & set(sys.modules)\n"
        "print(time.perf_counter() - began)"
    )
    folders = [str(real_folder(kind)) for kind in ("clip_l", "t5xxl")]
    times = [
        float(subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.6  # twice the target, as test machines are busy
