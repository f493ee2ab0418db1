"""Finished benchmarks with made-up scores, for tests of what is told of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.studies.benchmarked import FILE, PICTURE, RIEBench
from sdxl_sae_kit.studies.distances import sheet
from sdxl_sae_kit.studies.scoring import MEASURES
from sdxl_sae_kit.studies.transport import Setting

BLOCKS = ("down.2.1", "mid.0", "up.0.0")
KINDS = ("change object", "change colour", "change style")
ENDS = [Setting("none", None, 0.0, ()), Setting("prompt", None, 0.0, ())]

Score = Callable[[Setting, int, np.random.Generator], Mapping[str, float | None]]
"""A setting's measures for the item at this place; what is not said is not told."""


def grid(*methods: str, ks: Sequence[int] = (8, 16), blocks: Sequence[str] = BLOCKS) -> list[Setting]:
    """Each method at these k and strengths 1 and 2; steering at strengths alone."""
    return [
        Setting(method, k, strength, tuple(blocks))
        for method in methods
        for k in ([None] if method == "steering" else ks)
        for strength in (1.0, 2.0)
    ]


def by_block(method: str = "sae", k: int = 8, blocks: Sequence[str] = BLOCKS) -> list[Setting]:
    """A setting at each block alone, and with each left out."""
    each = [(block,) for block in blocks] + [tuple(b for b in blocks if b != block) for block in blocks]
    return [Setting(method, k, 1.0, those) for those in dict.fromkeys(each) if those != tuple(blocks)]


def coin(p: float, rng: np.random.Generator) -> float:
    return float(rng.random() < p)


def floor() -> dict[str, float]:
    return dict.fromkeys(MEASURES, 0.0) | {"kept": 1.0, "to edited": 0.5, "image similarity": 0.5}


def made_up(
    folder: Path,
    settings: Sequence[Setting],
    score: Score,
    *,
    per_kind: int = 20,
    failed: Mapping[str, str] | None = None,
    seed: int = 0,
    words: str = "a <b>red</b> & round thing",
    order: Callable[[list[str]], list[str]] = list,
    pictures: bool = False,
    recipe: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = KINDS,
) -> RIEBench:
    """A finished benchmark; items are named by kind and number, and written in this order."""
    made = {"study": "riebench", "settings": [[s.method, s.k, s.strength, list(s.blocks)] for s in settings], "seed": 0}
    made |= {"saes": [[block, "k8", "0" * 64] for block in BLOCKS], "features": dict.fromkeys(BLOCKS, 64)}
    made |= {"items": {"counts": dict.fromkeys(kinds, per_kind)}, "model": "made up", "num_inference_steps": 4}
    made |= {"guidance_scale": 0.0, "height": 64, "width": 64, "segmenter": "s", "judge": "j", "spatial": True}
    made |= {"made with": seed}
    artifact = Store.at(folder).artifact("studies", "made_up", made | dict(recipe or {}))
    names = [f"{kind} {i:03}" for kind in kinds for i in range(per_kind)]
    with artifact.lock():
        places = {name: place for place, name in enumerate(names)}
        told = {name: line(name, places[name], settings, score, seed, words, failed or {}) for name in order(names)}
        artifact.file(FILE).write_text("".join(f"{json.dumps(each, allow_nan=False)}\n" for each in told.items()))
        if pictures:
            drawn = sum(bool(s.blocks) for s in settings)
            for place in range(len(names)):
                artifact.file(PICTURE.format(place)).write_bytes(sheet([tiles(place, 2 + drawn)]))
        artifact.seal(facts={})
    return RIEBench.open(artifact.folder)


def tiles(place: int, n: int) -> list[np.ndarray]:
    """Flat tiles whose green tells which they are, and whose blue of which item."""
    return [np.full((8, 8, 3), [0.5, at / n, (place % 10) / 10], dtype=np.float32) for at in range(n)]


def line(
    name: str, place: int, settings: Sequence[Setting], score: Score, seed: int, words: str, failed: Mapping[str, str]
) -> dict[str, Any]:
    rng = np.random.default_rng([seed, place])
    made: dict[str, Any] = {"kind": name[:-4], "original": words, "edited": f"{words} {place}", "seed": place}
    made |= {"place": place, "failed": failed.get(name), "target": ["colour", "blue"]}
    if made["failed"] is not None:
        return made
    there = list(dict.fromkeys([*settings, *ENDS]))
    scores = {s.key: dict.fromkeys(MEASURES) | dict(score(s, place, rng)) for s in there}
    chosen = {s.key: {b: [1 + at, 2] for at, b in enumerate(s.blocks)} for s in there if s.k}
    return made | {"scores": json.loads(json.dumps(scores)), "chosen": chosen}
