"""Train the two small tokenizers on our captions: ``python -m tools.tiny.train_tokenizers`` (seconds, on the CPU).

They have the file formats of the published ones. Every printable ASCII character is in both vocabularies, so that any
prompt can be encoded; case does not matter.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .captions import FRAMES, UNSEEN_FRAMES, caption
from .files import TINY
from .people import random_person

CLIP_MERGES = 320
T5_VOCAB = 256
START, END = "<|startoftext|>", "<|endoftext|>"


def captions(count: int, seed: int) -> Iterator[str]:
    """Captions of all kinds. The unseen frames take part: which words there are is no secret, only their order."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        view = ("bust",) * 8 + ("face", "hand")
        yield caption(random_person(rng), rng, view[i % 10], frames=(*FRAMES, *UNSEEN_FRAMES)).text


# --- CLIP: byte-level BPE with the end of a word marked by </w> ---------------------------------------------------


def train_bpe(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """The ``count`` most frequent merges, found one by one."""
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = Counter({_merged(word, best): times for word, times in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def train_clip(texts: list[str], folder: Path) -> None:
    from lightweight_engine.flux.tokenizers import _byte_letters, _words  # the very cut that the engine makes

    letters = _byte_letters()
    counts = Counter(word for text in texts for word in _words(text))
    words: Counter[tuple[str, ...]] = Counter()
    for word, times in counts.items():
        spelt = [letters[byte] for byte in word.encode()]
        words[(*spelt[:-1], spelt[-1] + "</w>")] += times
    merges = train_bpe(words, CLIP_MERGES)
    tokens = [
        *letters.values(),
        *(letter + "</w>" for letter in letters.values()),
        *(a + b for a, b in merges),
        START,
        END,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", {token: i for i, token in enumerate(dict.fromkeys(tokens))})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write(folder / "special_tokens_map.json", special)
    _write(
        folder / "tokenizer_config.json",
        {**special, "do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )


# --- T5: Unigram, every word and every sign with a mark before it -----------------------------------------------


def unigram_vocabulary(texts: list[str], size: int) -> list[tuple[str, float]]:
    """The special tokens, the most frequent words, and single characters, each with its log probability.

    Words are kept whole (the library's trainer breaks up words that share no part with others); what is not among
    them is spelt in characters.
    """
    words = Counter("\u2581" + word for text in texts for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()))
    characters = ["\u2581", *(chr(code) for code in range(33, 127) if not chr(code).isupper())]
    common = [word for word, _ in words.most_common() if word not in characters][: size - 3 - len(characters)]
    total = sum(words.values())
    pieces = [(word, math.log(words[word] / total)) for word in common]
    pieces += [(character, -14.0) for character in characters]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]


def train_t5(texts: list[str], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(unigram_vocabulary(texts, T5_VOCAB), unk_id=2))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "</s>", "<unk>")]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    blanks = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), blanks]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(folder / "tokenizer_config.json", {**special, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"})


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TINY / "tokenizers")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    texts = list(captions(args.count, args.seed))
    train_clip(texts, args.out / "clip_l")
    train_t5(texts, args.out / "t5xxl")


if __name__ == "__main__":
    main()
