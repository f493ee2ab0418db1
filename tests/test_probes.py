"""Probes: what is planted in updates is told, the rest is not, and quadrants are means of their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_sae_kit import probes
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.probes import _quadrants, probe
from sdxl_sae_kit.prompts import load_prompts


def test_probes_tell_factors_of_real_updates_better_than_chance(small_cache) -> None:
    rows = probe(small_cache)
    assert {row["hookpoint"] for row in rows} == {"down.2.1", "up.0.1"}
    position = [row for row in rows if row["factor"] == "position"]
    assert all(row["AUC interval"][0] <= row["AUC"] <= row["AUC interval"][1] for row in rows)
    assert all(row["AUC"] > 0.7 for row in position)


def test_of_updates_dealt_out_anew_probes_tell_nothing(small_cache, monkeypatch) -> None:
    rng = np.random.default_rng(0)

    def dealt(*given):
        return rng.permutation(_quadrants(*given))

    monkeypatch.setattr(probes, "_quadrants", dealt)
    mean = np.mean([row["AUC"] for _ in range(4) for row in probe(small_cache, ["up.0.1"])])
    assert abs(mean - 0.5) < 0.12


def test_quadrants_are_means_of_their_tokens(small_cache) -> None:
    images = np.array([0, 7])
    height, width = small_cache.grid("up.0.1")
    x = small_cache.read("up.0.1", images)[:, 0].float().numpy().reshape(2, height, width, -1)
    corners = [
        x[:, rows, :][:, :, columns].mean(axis=(1, 2))
        for rows in (slice(0, height // 2), slice(height // 2, None))
        for columns in (slice(0, width // 2), slice(width // 2, None))
    ]
    found = _quadrants(small_cache, "up.0.1", images, 0).reshape(2, -1, 4)
    np.testing.assert_allclose(found, np.stack(corners, axis=-1), atol=1e-5)


def test_what_is_not_there_is_refused(small_cache) -> None:
    with pytest.raises(HookpointError):
        probe(small_cache, ["mid.0"])
    with pytest.raises(KitError):
        probe(small_cache, step=3)
    with pytest.raises(KitError, match=r"Pass \['up.0.1'\]"):
        probe(small_cache, "up.0.1")


def test_sampled_tokens_have_no_quadrants(pipe, tmp_path) -> None:
    sampled = collect(pipe, load_prompts("world", 4), ["up.0.1"], tokens_per_image=8, store=tmp_path)
    with pytest.raises(ArtifactError, match="keeps 8 tokens of each image"):
        probe(sampled)
