"""A small store with a cache, an SAE and labels that all carry hostile text, for tests of reports."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from caches import a_cache
from made_saes import random_sae
from payloads import SCRIPTS

from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.labels import LabelStore

PAYLOADS = tuple(text for text in SCRIPTS if "\0" not in text)
"""Text that must be shown as it is, and do nothing."""
HOSTILE = " ".join(PAYLOADS)
METRICS = {
    "explained_variance": 0.875,
    "explained_variance_interval": [0.75, 0.9375],
    "l0": 2.0,
    "dead_share": 0.25,
    "n_tokens": 4096,
}


def hostile_store(root: Path) -> tuple[Path, Path]:
    """The folders of a cache whose model has a hostile name and of an SAE with hostile labels, trained on it."""
    store = Store(root)
    cache, _ = a_cache(root, model=HOSTILE)
    sae = random_sae(seed=3)
    made = store.artifact("saes", "m_mid.0_k2", sae_recipe(cache.artifact, sae.config))
    with made.lock():
        sae.name = made.name
        sae.save(made.file("sae.safetensors"))
        made.seal(facts={"metrics": METRICS})
    labels = LabelStore.of(made.name, root)
    control = LabelStore.of(f"{made.name}_control", root)
    for latent, text in enumerate(PAYLOADS[:4]):
        labels.set(latent, text, author=PAYLOADS[-2])
    labels.add_test(0, PAYLOADS[0], right_active=9, n_active=10, right_inactive=8, n_inactive=10, author="judge")
    control.add_test(0, "another", right_active=5, n_active=10, right_inactive=6, n_inactive=10, author="judge")
    return cache.artifact.folder, made.folder


def sae_recipe(cache: Artifact, config) -> dict:
    """As training writes it."""
    return {"cache": cache.digest, "hookpoint": "mid.0", "config": asdict(config), "batch_size": 64, "epochs": 1}
