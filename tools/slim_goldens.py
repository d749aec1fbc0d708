"""Make the slim copy of the golden data that the public tests fall back to.

    python tools/slim_goldens.py ../shared/golden

Small cases of every core family and of the output families, with the models that they need, two layouts of a
checkpoint, LoRAs of several dialects, and all of the storage formats, in the layout of the whole folder. Three things
keep it small: a case whose tensors are large is left out; models are xz-compressed (``goldens.unpacked``); and what no
case depends on is zero: rows of token embeddings, and the weights that LoRAs are added to. The answers of the real
tokenizers are recorded in ``tokens.json``, so that no tokenizer file is needed.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

PROJECT = Path(__file__).resolve().parents[1]
OUTPUT = PROJECT / "tests" / "golden" / "data"

MODELS = ("flux_dev_a", "clip_l", "t5xxl", "ae")
EMBEDDINGS = {"clip_l": ("clip", "text_model.embeddings.token_embedding.weight"), "t5xxl": ("t5", "shared.weight")}

# Family -> the most bytes that the tensors of one case may have.
LARGEST = {
    "parts": 50_000,
    "noise": 28_000,
    "samplers": 9_000,
    "img2img": 9_000,
    "clip": 33_000,
    "t5": 70_000,
    "cond": 70_000,
    "transformer": 91_000,
    "vae": 152_000,
    "e2e": 25_000,
}

# Family -> what tells its kinds of cases apart, where not every case is kept: the first of each kind is.
KINDS = {
    "samplers": ("sampler", "batch", "cfg_scale", "eta", "opts", "weights", "subseed_strength"),
    "vae": ("op", "shape"),
}

# Layouts of a checkpoint that are kept: the small files that are told apart by more than names.
CHECKPOINTS = ("bnb_nf4_v2", "gguf_q8_0")

# LoRAs whose changes do not depend on the weight: a dialect or an algorithm each.
LORAS = (
    "kohya_bfl_alpha", "kohya_loha", "kohya_lokr_decomposed", "peft_transformer_alpha", "peft_partial_blocks",
    "peft_metadata_alpha", "peft_with_text_encoder", "xlabs_double", "lycoris_lokr_simpletuner", "fal_base_model_bfl",
    "onetrainer_underscore", "neg_sdxl",
)  # fmt: skip
LORA_BASES = ("bfl_bf16", "tiny_text_encoders_f32")

OUTPUT_FAMILIES = ("rng", "infotext", "infotext_parse", "quote", "filenames", "metadata")
API_FAMILIES = ("api_models", "api_validation")


def slim_core(source: Path, target: Path) -> None:
    """Write the manifests and tensors of the cases that are kept."""
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        file = path.with_suffix(".safetensors")
        tensors = load_file(file) if file.exists() else {}
        kept = keep(path.stem, manifest["cases"], tensors)
        manifest["cases"] = kept
        write_json(target / path.name, manifest)
        wanted = {"common", *(case["id"] for case in kept)}
        chosen = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in wanted}
        if chosen:
            save_file(chosen, target / file.name)


def keep(family: str, cases: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The cases that are small, whose model is here, and that are the first of their kind."""
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        case = name.split(".")[0]
        sizes[case] = sizes.get(case, 0) + tensor.nbytes
    seen: set[str] = set()
    kept = []
    for case in cases:
        kind = json.dumps([case.get(key) for key in KINDS[family]]) if family in KINDS else case["id"]
        model = case.get("model", MODELS[0])
        has_model = family not in ("transformer", "e2e") or f"flux_{model}" in MODELS
        if has_model and kind not in seen and sizes.get(case["id"], 0) <= LARGEST.get(family, 0):
            seen.add(kind)
            kept.append(case)
    return kept


def slim_models(source: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the models compressed, and the sizes that their shapes do not tell."""
    target.mkdir(parents=True)
    sizes = json.loads((source / "models.json").read_text(encoding="utf-8"))
    write_json(target / "models.json", {name: sizes[name] for name in MODELS})
    for name in MODELS:
        data = (source / f"{name}.safetensors").read_bytes()
        if name in EMBEDDINGS:
            tokenizer, key = EMBEDDINGS[name]
            data = without_unused_rows(source / f"{name}.safetensors", key, record[tokenizer])
        (target / f"{name}.safetensors.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def without_unused_rows(path: Path, key: str, record: dict[str, Any]) -> bytes:
    """A text encoder's file with the embedding of every token zeroed that no recorded text has."""
    used = {token for ids in record["ids"].values() for token in ids} | {i for i in record["special"].values() if i}
    tensors = load_file(path)
    kept = torch.zeros_like(tensors[key])
    rows = torch.tensor(sorted(used | {0}))
    kept[rows] = tensors[key][rows]
    return save({**tensors, key: kept})


def slim_pipelines(source: Path, target: Path, families: Iterable[str]) -> None:
    target.mkdir(parents=True)
    for family in families:
        write_json(target / f"{family}.json", json.loads((source / f"{family}.json").read_text(encoding="utf-8")))
        arrays = source / f"{family}.npz"
        if arrays.exists():
            with np.load(arrays, allow_pickle=False) as data:
                np.savez_compressed(target / arrays.name, **dict(data))


def slim_checkpoints(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    rows = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["name"] in CHECKPOINTS]
    write_json(target / "manifest.json", rows)
    for row in rows:
        shutil.copyfile(source.parent / row["file"], target.parent / row["file"])
        expected = json.loads((source.parent / row["expected"]).read_text(encoding="utf-8"))
        write_json(target.parent / row["expected"], expected)


def slim_loras(source: Path, target: Path) -> None:
    """The smallest strength of each file, and the networks that they change, their weights zero."""
    target.mkdir(parents=True)
    rows = json.loads((source / "manifest.json").read_text(encoding="utf-8"))
    kept = list({row["name"]: row for row in reversed(rows) if row["name"] in LORAS}.values())
    write_json(target / "manifest.json", kept)
    for file in {row[key] for row in kept for key in ("file", "expected") if row.get(key)}:
        shutil.copyfile(source.parent / file, target.parent / file)
    for name in LORA_BASES:
        tensors = load_file(source.parent / "ckpt" / f"{name}.safetensors")
        data = save({key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
        (target.parent / "ckpt" / f"{name}.safetensors.xz").write_bytes(lzma.compress(data))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", type=Path, help="the whole golden folder")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "golden")]
    import recorded_tokenizers

    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as scratch:
        made = Path(scratch) / "data"
        slim_core(arguments.golden / "core", made / "core")
        record = recorded_tokenizers.record(made / "core")
        write_json(made / "tokens.json", record)
        slim_models(arguments.golden / "models", made / "models", record)
        slim_pipelines(arguments.golden / "pipelines", made / "pipelines", (*OUTPUT_FAMILIES, *API_FAMILIES))
        slim_checkpoints(arguments.golden / "ckpt", made / "ckpt")
        slim_loras(arguments.golden / "lora", made / "lora")
        shutil.copytree(arguments.golden / "quant", made / "quant", copy_function=shutil.copyfile)
        shutil.rmtree(arguments.out, ignore_errors=True)
        made.rename(arguments.out)
    total = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
