"""descriptors: each formula is checked by another one, what is planted is found, and order means nothing."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import f_oneway
from sklearn.metrics.pairwise import cosine_similarity

from sdxl_sae_kit.artifacts import Artifact
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.features import Curve, Example, FeatureStats
from sdxl_sae_kit.html import to_webp
from sdxl_sae_kit.prompts import Prompts, load_prompts
from sdxl_sae_kit.questions import expected
from sdxl_sae_kit.similarity import WorldEmbed, specificity
from sdxl_sae_kit.studies.causes import LOOKS, Causes
from sdxl_sae_kit.studies.descriptors import Descriptors, describable, describe, describe_causes, omega_squared

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square")
N_IMAGES, GRID = 60, (8, 8)


@dataclass(frozen=True)
class Planted(FeatureStats):
    """Statistics whose codes (image, latent, height, width) are made up, and held in memory."""

    codes: np.ndarray = field(repr=False, kw_only=True)
    known: Prompts = field(repr=False, kw_only=True)
    pictures: tuple[bytes, ...] = field(repr=False, kw_only=True)
    times: tuple[Curve, ...] = field(repr=False, kw_only=True, default=())

    @property
    def prompts(self) -> Prompts:
        return self.known

    @property
    def curves(self) -> tuple[Curve, ...]:
        return self.times

    def image_activations(self, by: str = "max") -> np.ndarray:
        return self.codes.max(axis=(2, 3))

    def examples(self, feature: int, by: str = "max", n: int | None = None) -> list[Example]:
        values = self.codes[:, feature].max(axis=(1, 2))
        best = [i for i in np.argsort(-values, kind="stable")[: n or 12].tolist() if values[i] > 0]
        return [Example(i, "", i, float(values[i]), self.codes[i, feature], self.pictures[i]) for i in best]


def planted(codes: np.ndarray, *, factors: bool = True, hookpoint: str = "mid.0", pictures=None) -> Planted:
    """The statistics of these codes on images whose colour goes with i % 3 and shape with i // 3 % 2."""
    n = codes.shape[1]
    fires = codes > 0
    scenes = [{"colour": COLOURS[i % 3], "shape": SHAPES[i // 3 % 2], "unique": str(i)} for i in range(N_IMAGES)]
    texts = tuple(f"scene {i}" for i in range(N_IMAGES))
    known = Prompts(texts, tuple(range(N_IMAGES)), tuple(scenes if factors else [{}] * N_IMAGES))
    names = ("mean", "std", "max", "moran", "moran_low", "moran_high", "moran_n")
    return Planted(
        artifact=Artifact(Path("nowhere/features/planted-00000000")), sae="planted", hookpoint=hookpoint, grid=GRID,
        step=0, n_images=N_IMAGES, n_tokens=N_IMAGES * 64, density=fires.mean((0, 2, 3)).astype(np.float32),
        image_density=fires.any((2, 3)).mean(0).astype(np.float32), codes=codes, known=known,
        pictures=pictures or (to_webp(Image.new("RGB", (16, 16), (200, 40, 40))),) * N_IMAGES,
        **{name: np.linspace(0.1, 0.9, n).astype(np.float32) for name in names},
    )  # fmt: skip


def random_codes(seed: int = 0, n: int = 8) -> np.ndarray:
    """Codes in which every feature fires at some tokens of some images, the last on four images only."""
    rng = np.random.default_rng(seed)
    on = rng.random((N_IMAGES, n, 1, 1)) < 0.5
    codes = (rng.random((N_IMAGES, n, *GRID)) * (rng.random((N_IMAGES, n, *GRID)) < 0.3) * on).astype(np.float32)
    codes[:, :, 4, 4] += np.where(on[..., 0, 0], 0.01, 0).astype(np.float32)
    codes[4:, -1] = 0
    return codes


def column(made: Descriptors, name: str) -> np.ndarray:
    return made.values[:, made.names.index(name)]


def caused(values: np.ndarray, latents: list[int], names: tuple[str, ...] = ("colour", *LOOKS)) -> Causes:
    nothing = Artifact(Path("nowhere/studies/causes-00000000"))
    n_prompts = np.ones(len(latents), dtype=np.int64)
    return Causes(nothing, "planted", "mid.0", np.array(latents), names, values, values, n_prompts)


# Response ------------------------------------------------------------------------------------------------------------


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
    assert omega_squared(np.zeros((10, 0)), group).shape == (0,)


def test_a_factor_with_many_values_explains_no_more_of_noise_than_one_with_few() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(120, 400))
    many, few = ([f"v{i % g}" for i in range(120)] for g in (30, 2))
    assert omega_squared(noise, few).mean() < 0.01
    assert omega_squared(noise, many).mean() < 0.05  # uncorrected it is 29 / 119 = 0.24


def test_a_planted_response_is_found_and_what_is_no_factor_left_out() -> None:
    codes = random_codes()
    codes[:, 0] *= np.array([i % 3 == 0 for i in range(N_IMAGES)])[:, None, None]
    codes[::3, 0, 2, 2] = 2
    made = describe(planted(codes))
    assert column(made, "responds to colour")[0] > 0.9 and column(made, "responds to shape")[0] < 0.1
    assert "responds to unique" not in made.names  # a value of its own for every image
    assert made.latents.tolist() == list(range(7))  # the last fires on four images


def test_what_cannot_be_seen_is_no_response() -> None:
    """The pose of a plain circle, which a caption tells, is nothing that a feature can respond to."""
    scenes = load_prompts("world", N_IMAGES)
    stats = replace(planted(random_codes()), known=scenes)
    seen = [expected(factors) for factors in scenes.factors]
    pose = np.array([i for i, factors in enumerate(seen) if "pose" in factors])
    assert 0 < len(pose) < sum("pose" in factors for factors in scenes.factors)
    responses = stats.image_activations()[pose][:, :7]
    found = omega_squared(responses, [seen[i]["pose"] for i in pose])
    np.testing.assert_allclose(column(describe(stats), "responds to pose"), found)


def test_some_features_are_spread_over_the_ranks_of_density() -> None:
    stats = planted(random_codes(n=41))
    some, ranked = describable(stats, 5), sorted(range(40), key=lambda latent: stats.density[latent])
    assert set(some.tolist()) == {ranked[at] for at in (0, 10, 20, 29, 39)}
    assert describable(stats, 100).tolist() == describable(stats).tolist() == list(range(40))
    np.testing.assert_array_equal(describe(stats, some).values, describe(stats).values[some])


def test_of_no_features_nothing_is_told() -> None:
    made = describe(planted(np.zeros((N_IMAGES, 3, *GRID), np.float32)))
    assert made.values.shape == (0, len(made.names)) and "responds to colour" in made.names


# Space and look ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_same_place_is_the_mean_cosine_of_all_pairs_of_maps(seed: int) -> None:
    stats = planted(random_codes(seed))
    for latent, found in zip(*(describe(stats).latents, column(describe(stats), "same place")), strict=True):
        maps = np.stack([e.heat_map.ravel() for e in stats.examples(int(latent), n=5)])
        assert found == pytest.approx(cosine_similarity(maps)[np.triu_indices(5, 1)].mean(), rel=1e-5)


def test_places_of_extremes() -> None:
    codes = np.zeros((N_IMAGES, 3, *GRID), np.float32)
    codes[:5, 0, 3:5, 3:5] = np.linspace(1, 2, 5)[:, None, None]  # always in the middle, however strong
    for image in range(5):
        codes[image, 1, image, image] = 1  # never at the same token
    codes[:5, 2, 0, 0] = 1  # in the corner
    made = describe(planted(codes))
    np.testing.assert_allclose(column(made, "same place"), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(column(made, "active area"), [4 / 64, 1 / 64, 1 / 64], rtol=1e-5)
    assert column(made, "centre-ness")[0] > 0.85 and column(made, "centre-ness")[2] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(column(made, "Moran's I"), [0.1, 0.5, 0.9], rtol=1e-6)


def test_colour_and_texture_are_read_under_the_heat_map() -> None:
    left = np.indices((32, 32))[1] < 16
    stripes = np.indices((32, 32))[1] // 2 % 2 * 255
    pixels = np.where(left[..., None], np.array([200, 40, 40]), np.repeat(stripes[..., None], 3, axis=2))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "WEBP", lossless=True)
    codes = np.zeros((N_IMAGES, 2, *GRID), np.float32)
    codes[:9, 0, 2:6, 0:3] = 1
    codes[:9, 1, 2:6, 5:7] = 1
    made = describe(planted(codes, pictures=(buffer.getvalue(),) * N_IMAGES))
    assert column(made, "red − green") == pytest.approx([160 / 255, 0], abs=0.01)
    assert column(made, "yellow − blue")[0] == pytest.approx((200 + 40) / 2 / 255 - 40 / 255, abs=0.01)
    assert column(made, "brightness")[0] == pytest.approx(280 / 3 / 255, abs=0.01)
    # of stripes of 2 pixels every central difference is half a step (at the border it is none)
    assert column(made, "texture") == pytest.approx([0, 0.5], abs=0.02)
    assert describe(planted(codes, factors=False)).only("look").names == made.only("look").names
    unseen = describe(planted(codes, pictures=(b"",) * N_IMAGES))
    assert np.isnan(unseen.only("look").values).all() and np.isfinite(unseen.only("space").values).all()


def test_alike_is_the_specificity_of_the_top_images(small_stats, tmp_path) -> None:
    made = describe(small_stats, embed=WorldEmbed())
    expected = specificity(small_stats, WorldEmbed()).value[made.latents]
    np.testing.assert_allclose(column(made, "alike"), expected, rtol=1e-6)
    assert made.kinds[made.names.index("alike")] == "look"


# Time and cause ------------------------------------------------------------------------------------------------------


def timed(stats: Planted, activity: np.ndarray) -> Planted:
    """Statistics whose latents have this activity (step, latent), the uncond half the opposite."""
    density = np.full(activity.shape[1], 0.5, np.float32)
    curves = [Curve(s, "cond", density, (a / density).astype(np.float32)) for s, a in enumerate(activity)]
    other = [Curve(s, "uncond", density, a.astype(np.float32)) for s, a in enumerate(activity[::-1])]
    return replace(stats, times=(*curves[::-1], *other))


def test_the_peak_is_the_centre_of_mass_of_activity_over_steps() -> None:
    stats, activity = planted(random_codes()), np.zeros((5, 8))
    activity[0, 0] = activity[4, 1] = activity[2, 2] = 1
    activity[:, 3] = 1
    activity[:, 4] = [4, 3, 2, 1, 0]
    activity[1, 5] = activity[3, 5] = 0.3
    made = describe(stats, timing=timed(stats, activity))  # latent 6 is silent at all steps
    np.testing.assert_allclose(column(made, "peak step"), [0, 1, 0.5, 0.5, 0.25, 0.5, np.nan], atol=1e-6)
    np.testing.assert_allclose(column(made, "late share"), [0, 1, 0, 0.4, 0.1, 0.5, np.nan], atol=1e-6)


def test_of_a_single_step_time_is_not_defined_but_named() -> None:
    stats = planted(random_codes())
    made = describe(stats, timing=timed(stats, np.ones((1, 8))))
    assert made.only("time").names == ("peak step", "late share")
    assert np.isnan(made.only("time").values).all()


def test_causes_are_told_by_latent_and_what_is_not_told_is_left_out() -> None:
    names = ("colour", *LOOKS)
    values = np.array([[0.04, 0.2, 0.1, 0.5, 0.7], [0.01, 0.0, 0.0, np.nan, 0.1], [np.nan, 0.1, np.nan, 0.3, 0.2]])
    told = caused(values, [5, 0, 7], names)
    made = describe(planted(random_codes()), causes=told).only("cause")
    assert made.names == ("changes colour", "change inside", "spread", "coarse share", "colour share")
    rows = {5: [0.2, 0.2, 1 / 3, 0.5, 0.7], 0: [0.1, 0.0, np.nan, np.nan, 0.1], 2: [np.nan] * 5}
    for latent, row in rows.items():
        np.testing.assert_allclose(made.values[latent], row, atol=1e-12)
    np.testing.assert_array_equal(describe_causes(told, made.latents).values, made.values)


# All of it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [True, False])
def test_the_order_of_features_and_images_means_nothing(factors: bool) -> None:
    codes, rng = random_codes(3), np.random.default_rng(1)
    values = rng.random((8, 5))
    activity = rng.random((4, 8))
    stats = planted(codes, factors=factors)
    made = describe(stats, causes=caused(values, [*range(8)]), timing=timed(stats, activity))
    features = np.array([3, 1, 0, 6, 2, 5, 4, 7])
    moved = replace(planted(codes[:, features], factors=factors), moran=stats.moran[features])
    dealt = caused(
        values[[2, 0, 1, *range(3, 8)]], [int(np.flatnonzero(features == f)[0]) for f in [2, 0, 1, *range(3, 8)]]
    )
    again = describe(moved, causes=dealt, timing=timed(moved, activity[:, features]))
    np.testing.assert_allclose(again.values, made.values[features[:7]], atol=1e-12)
    images = rng.permutation(N_IMAGES)
    scenes = tuple(stats.known.factors[i] for i in images)
    turned = replace(planted(codes[images], factors=factors), known=replace(stats.known, factors=scenes))
    np.testing.assert_allclose(describe(turned).values, describe(stats).values, atol=1e-9)


def test_names_do_not_depend_on_the_hookpoint_and_kinds_can_be_chosen() -> None:
    stats = planted(random_codes())
    values = np.random.default_rng(0).random((3, 5))
    one = describe(stats, causes=caused(values, [0, 1, 2]), timing=timed(stats, np.ones((3, 8))))
    other = planted(random_codes(9), hookpoint="up.0.1")
    two = describe(other, causes=caused(np.full((1, 5), np.nan), [7]), timing=timed(other, np.zeros((3, 8))))
    assert one.names == two.names and one.kinds == two.kinds and two.hookpoint == "up.0.1"
    assert np.isfinite(one.values[:3]).all() and np.isnan(two.only("cause", "time").values).all()
    parts = [one.only(kind) for kind in ("response", "space", "look", "time", "cause")]
    assert sum((part.names for part in parts), ()) == one.names
    np.testing.assert_array_equal(np.concatenate([part.values for part in parts], axis=1), one.values)
    assert one.only("cause", "space").names == one.only("space", "cause").names


def test_what_is_no_kind_is_refused(unchecked_types) -> None:
    with pytest.raises(KitError, match="not 'caus'. Did you mean 'cause'"):
        describe(planted(random_codes())).only("caus")


def test_what_is_of_another_sae_is_refused() -> None:
    stats = planted(random_codes())
    with pytest.raises(ArtifactError, match="causes are of other, stats of planted"):
        describe(stats, causes=replace(caused(np.ones((1, 5)), [0]), sae="other"))
    with pytest.raises(ArtifactError, match="timing are of other, stats of planted"):
        describe(stats, timing=replace(stats, sae="other"))
