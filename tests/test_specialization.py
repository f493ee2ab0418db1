"""specialization: planted differences are found, shuffled ones are not, and each formula is checked by another."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reading_html import read_safely
from scipy.stats import f_oneway

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import Example, FeatureStats
from sdxl_sae_kit.html import to_webp
from sdxl_sae_kit.prompts import Prompts
from sdxl_sae_kit.studies import specialization
from sdxl_sae_kit.studies.specialization import association, omega_squared, specialize

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square")
N_IMAGES, N_FEATURES, GRID = 60, 20, (8, 8)


@dataclass(frozen=True)
class Planted(FeatureStats):
    """Statistics whose codes (image, latent, height, width) are made up, and held in memory."""

    codes: np.ndarray = field(repr=False, kw_only=True)
    known: Prompts = field(repr=False, kw_only=True)
    picture: bytes = field(repr=False, kw_only=True)

    @property
    def prompts(self) -> Prompts:
        return self.known

    def image_activations(self, by: str = "max") -> np.ndarray:
        return self.codes.max(axis=(2, 3))

    def examples(self, feature: int, by: str = "max", n: int | None = None) -> list[Example]:
        values = self.codes[:, feature].max(axis=(1, 2))
        best = [i for i in np.argsort(-values, kind="stable")[: n or 12].tolist() if values[i] > 0]
        return [Example(i, "", i, float(values[i]), self.codes[i, feature], self.picture) for i in best]


def planted(store: Store, hookpoint: str, factor: str | None, *, factors: bool = True, name: str = "sae") -> Planted:
    """Twenty features that answer to one value of a factor each, or to nothing; the last fires on four images only."""
    rng = np.random.default_rng(zlib.crc32(f"{hookpoint} {name}".encode()))
    scenes = [{"colour": COLOURS[i % 3], "shape": SHAPES[i // 3 % 2], "unique": str(i)} for i in range(N_IMAGES)]
    strength = rng.uniform(0.5, 1, (N_IMAGES, N_FEATURES)) * (rng.random((N_IMAGES, N_FEATURES)) < 0.6)
    if factor is not None:
        values = sorted({scene[factor] for scene in scenes})
        for feature in range(N_FEATURES):
            match = np.array([scene[factor] == values[feature % len(values)] for scene in scenes])
            strength[:, feature] = match * (1 + 0.1 * rng.random(N_IMAGES))
    strength[:, -1] = 0
    strength[:4, -1] = 1
    codes = np.zeros((N_IMAGES, N_FEATURES, *GRID), np.float32)
    codes[:, :, 2:5, 2:5] = strength[:, :, None, None]
    fires = codes > 0
    recipe = {"hookpoint": hookpoint, "factor": factor, "name": name}
    artifact = store.artifact("features", name, recipe)
    if not artifact.finished:
        with artifact.lock():
            artifact = artifact.seal()
    texts = tuple(f"scene {i}" for i in range(N_IMAGES))
    known = Prompts(texts, tuple(range(N_IMAGES)), tuple(scenes if factors else [{}] * N_IMAGES))
    names = ("mean", "std", "max", "moran", "moran_low", "moran_high", "moran_n")
    per_latent = {name: np.full(N_FEATURES, 0.75, np.float32) for name in names}
    return Planted(
        artifact=artifact, sae=name, hookpoint=hookpoint, grid=GRID, step=0, n_images=N_IMAGES, n_tokens=N_IMAGES * 64,
        density=fires.mean((0, 2, 3)).astype(np.float32), image_density=fires.any((2, 3)).mean(0).astype(np.float32),
        **per_latent, codes=codes, known=known, picture=to_webp(Image.new("RGB", (16, 16), (200, 40, 40))),
    )  # fmt: skip


@pytest.fixture(scope="module")
def different(store):
    """One hookpoint answers to colours, the other to shapes."""
    return specialize([planted(store, "mid.0", "colour"), planted(store, "up.0.1", "shape")], clusters=2, store=store)


# Formulas ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0, 3))
def test_omega_squared_is_what_the_f_statistic_says(seed: int, g: int, effect: float) -> None:
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.arange(g), np.arange(g), rng.integers(0, g, 30)])
    y = rng.normal(5, 1, (len(group), 3)) + effect * group[:, None] * np.array([1, 0, -1])
    f = np.array([f_oneway(*(column[group == i] for i in range(g))).statistic for column in y.T])
    expected = (g - 1) * (f - 1) / ((g - 1) * (f - 1) + len(group))
    np.testing.assert_allclose(omega_squared(y, [f"v{i}" for i in group]), np.maximum(expected, 0), atol=1e-9)


def test_omega_squared_of_extremes() -> None:
    group = ["a"] * 5 + ["b"] * 5
    responses = np.stack([np.repeat([0.0, 1.0], 5), np.ones(10)], axis=1)
    np.testing.assert_array_equal(omega_squared(responses, group), [1, 0])


def test_a_factor_with_many_values_explains_no_more_of_noise_than_one_with_few() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(120, 400))
    many, few = ([f"v{i % g}" for i in range(120)] for g in (30, 2))
    assert omega_squared(noise, few).mean() < 0.01
    assert omega_squared(noise, many).mean() < 0.05  # uncorrected it is 29 / 119 = 0.24


def test_information_is_complete_when_clusters_are_hookpoints_and_p_is_as_small_as_it_can_be() -> None:
    hookpoint = np.repeat(np.arange(4), 25)
    bits, shuffled, p = association(hookpoint, 3 - hookpoint, permutations=99, seed=0)
    assert bits == pytest.approx(2)
    assert shuffled < 0.2
    assert p == 1 / 100


def test_p_values_of_unrelated_labels_are_uniform() -> None:
    rng = np.random.default_rng(1)
    hookpoint = np.repeat(np.arange(3), 30)
    p = np.array([association(hookpoint, rng.integers(0, 4, 90), permutations=19, seed=s)[2] for s in range(80)])
    assert 0.42 < p.mean() < 0.6
    assert (p <= 0.05).mean() < 0.13


# The study -----------------------------------------------------------------------------------------------------------


def test_planted_differences_are_found(different) -> None:
    assert different.information == pytest.approx(1, abs=0.05)  # two hookpoints, told apart entirely
    assert different.p_value == 1 / 501
    rows = {row["descriptor"]: row for row in different.rows()}
    assert rows["colour"]["mid.0"] > 0.9 and rows["shape"]["up.0.1"] > 0.9
    assert rows["colour"]["up.0.1"] < 0.02 and rows["shape"]["mid.0"] < 0.02
    low, high = rows["colour"]["mid.0 interval"]
    assert low <= rows["colour"]["mid.0"] <= high
    assert "so the hookpoints' features differ" in different.sentence()
    assert "mid.0 colour" in different.sentence() and "up.0.1 shape" in different.sentence()


def test_a_value_of_its_own_for_every_image_is_no_factor(different) -> None:
    assert "unique" not in {row["descriptor"] for row in different.rows()}


def test_features_on_fewer_than_five_images_are_left_out(different) -> None:
    assert different.features["feature"].tolist() == [*range(N_FEATURES - 1)] * 2


def test_looks_are_those_of_the_planted_patch(different) -> None:
    rows = {row["descriptor"]: row for row in different.rows()}
    assert rows["active area"]["mid.0"] == pytest.approx(9 / 64, abs=1e-5)
    assert rows["Moran's I"]["mid.0"] == 0.75  # that of the statistics
    assert 0.5 < rows["centre-ness"]["mid.0"] < 1


def test_hookpoints_alike_give_no_evidence(store) -> None:
    stats = [planted(store, hookpoint, None) for hookpoint in ("mid.0", "up.0.0")]
    same = specialize(stats, clusters=3, permutations=99, store=store)
    assert same.p_value > 0.05
    assert "no evidence of a difference" in same.sentence()


def test_controls_are_shown_beside_and_judged(store) -> None:
    stats = [planted(store, "mid.0", "colour"), planted(store, "up.0.1", "shape")]
    untrained = [planted(store, "mid.0", "colour", name="u"), planted(store, "up.0.1", "shape", name="u")]
    alike = specialize(stats, controls=untrained, clusters=2, permutations=9, store=store)
    assert alike.control_information == pytest.approx(alike.information)
    assert "no less, so the difference is in the updates and need not be learnt" in alike.sentence()
    assert alike.rows()[0]["untrained mid.0"] == pytest.approx(alike.rows()[0]["mid.0"], abs=0.01)
    assert "untrained up.0.1" in alike.plot().data[0].x
    noise = [planted(store, hookpoint, None, name="u") for hookpoint in ("mid.0", "up.0.1")]
    better = specialize(stats, controls=noise, clusters=2, permutations=9, store=store)
    assert better.control_information < 0.5 * better.information
    assert re.search(r"features it is -?[\d.]+: less\.", better.sentence())


def test_without_factors_colours_describe(store) -> None:
    stats = [planted(store, hookpoint, None, factors=False) for hookpoint in ("mid.0", "up.0.0")]
    found = specialize(stats, clusters=2, permutations=9, seed=5, store=store)
    rows = {row["descriptor"]: row for row in found.rows()}
    assert rows["red − green"]["mid.0"] == pytest.approx(160 / 255, abs=0.05)
    assert "No factors of the prompts are known" in found.sentence()
    assert found.plot().layout.meta["alt"]


def test_shares_are_counted_and_drawn(different) -> None:
    shares = different.shares()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    f = different.features
    first = [np.mean(f["cluster"][f["hookpoint"] == 0] == c) for c in range(2)]
    np.testing.assert_allclose(shares[0], first)
    bars = different.plot_shares()
    np.testing.assert_allclose([bar.y[0] for bar in bars.data], first)
    assert "100%" in bars.layout.meta["alt"]
    points = different.plot_clusters()
    assert sum(len(trace.x) for trace in points.data) == len(f["feature"])
    assert "19 of mid.0" in points.layout.meta["alt"]


def test_it_is_computed_once(different, store, monkeypatch) -> None:
    monkeypatch.delattr(specialization, "_run")
    stats = [planted(store, "mid.0", "colour"), planted(store, "up.0.1", "shape")]
    assert specialize(stats, clusters=2, store=store).rows() == different.rows()
    different.artifact.verify()


def test_what_does_not_fit_together_is_refused(store) -> None:
    mid, up = planted(store, "mid.0", "colour"), planted(store, "up.0.1", "shape")
    with pytest.raises(KitError, match="give two or more, each once"):
        specialize([mid], store=store)
    with pytest.raises(KitError, match="mid.0, mid.0; give two or more"):
        specialize([mid, mid], store=store)
    with pytest.raises(KitError, match="different images"):
        specialize([mid, replace(up, known=up.known[:-1])], store=store)
    with pytest.raises(KitError, match="controls are of down.2.1"):
        specialize([mid, up], controls=[planted(store, "down.2.1", None)], store=store)
    with pytest.raises(KitError, match="too few for 99 clusters"):
        specialize([mid, up], clusters=99, store=store)


def test_names_are_shown_and_never_run(different) -> None:
    nasty = "<script>alert(1)</script>\"'&"
    row = dict(different.table[0], descriptor=nasty)
    page = read_safely(replace(different, table=[row, *different.table[1:]], clusters=[nasty, "2"])._repr_html_())
    assert page.text.count(nasty) >= 2
