"""causes: what is measured is what `steer` makes of the picture, the control is as large, a kill loses nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_html import read_safely

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.judges import EmbeddingJudge, WorldJudge
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.similarity import WorldEmbed
from sdxl_sae_kit.studies import causes
from sdxl_sae_kit.studies.causes import LOOKS, Causes, measure_causes
from sdxl_sae_kit.studies.descriptors import describable
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.statistics import bhattacharyya, coarse_share, colour_share
from sdxl_sae_kit.tiny.world import FACTORS


@pytest.fixture(scope="module")
def sae(small_saes):
    return small_saes["up.0.1", "k8"]


@pytest.fixture(scope="module")
def chosen(small_stats) -> list[int]:
    """Six latents that fire on three held-out images or more, the first two not on all tokens, and a dead one."""
    held_out = small_stats.prompts.held_out
    often = ((small_stats.image_activations("max") > FIRES) & held_out[:, None]).sum(axis=0) >= 3
    order = np.argsort(np.where(often, small_stats.density, np.inf), kind="stable")
    dead = np.flatnonzero(small_stats.density == 0)
    return [*order[:6].tolist(), *dead[:1].tolist()]


@pytest.fixture(scope="module")
def result(pipe, sae, small_stats, chosen, store) -> Causes:
    return measure_causes(pipe, sae, small_stats, chosen, prompts_per_feature=2, batch_size=8, store=store)


def by_hand(clean, changed, fires, judge) -> dict[str, float]:
    """The same numbers by other formulas, cell by cell and pixel by pixel."""
    change = changed.astype(np.float64) - clean
    region = np.kron(fires, np.ones((8, 8))) > 0
    size = np.abs(change).mean(axis=2)
    cells = [change[y : y + 8, x : x + 8].sum(axis=(0, 1)) for y in range(0, 64, 8) for x in range(0, 64, 8)]
    grey = change @ np.ones((3, 1)) / np.sqrt(3)
    energy = (change**2).sum()
    p, q = (judge.factors(picture[None]) for picture in (clean, changed))
    return {
        **{factor: 1 - float(np.sqrt(p[factor][0].astype(np.float64) * q[factor][0]).sum()) for factor in p},
        "inside": size[region].mean(),
        "outside": size[~region].mean(),
        "coarse share": sum((cell**2).sum() for cell in cells) / 64 / energy,
        "colour share": ((change - grey / np.sqrt(3)) ** 2).sum() / energy,
    }


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["feature", "random direction"])
def test_it_is_what_steer_makes_of_the_strongest_held_out_image(condition, pipe, sae, small_stats, chosen, store):
    result = measure_causes(pipe, sae, small_stats, chosen[:1], prompts_per_feature=1, batch_size=8, store=store)
    latent, prompts = chosen[0], small_stats.prompts
    means = np.where(prompts.held_out, small_stats.image_activations("mean")[:, latent], -1)
    image = int(means.argmax())
    row = sae.directions[latent].numpy()
    random = np.random.default_rng([0, latent]).standard_normal(sae.d_in)
    along = row if condition == "feature" else random * np.linalg.norm(row) / np.linalg.norm(random)
    clean = generate(pipe, [prompts.texts[image]], [prompts.seeds[image]], output_type="np")[0]
    with steer(pipe, sae, scale={latent: 0.0}, along={latent: along.astype(np.float32)}):
        changed = generate(pipe, [prompts.texts[image]], [prompts.seeds[image]], output_type="np")[0]
    expected = by_hand(clean, changed, small_stats.heat_map(latent, image) > FIRES, WorldJudge())
    found = (result.values if condition == "feature" else result.control)[0]
    assert dict(zip(result.names, found.tolist(), strict=True)) == pytest.approx(expected, rel=0.02, abs=2e-6)
    assert expected["inside"] > 1e-5


def test_means_are_over_prompts_and_the_dead_are_not_told(result, small_stats, chosen) -> None:
    assert result.names == (*FACTORS, *LOOKS)
    assert result.latents.tolist() == chosen
    assert result.n_prompts.tolist() == [2] * 6 + [0] * (len(chosen) - 6)
    assert np.isnan(result.values[6:]).all() and np.isnan(result.control[6:]).all()
    lines = Lines(result.artifact, "causes.jsonl")
    assert all(small_stats.prompts.held_out[int(image)] for image in lines)
    told = [line[str(chosen[1])] for line in lines.values() if str(chosen[1]) in line]
    for what, found in (("feature", result.values), ("random direction", result.control)):
        means = np.array([[each[what][name] for name in result.names] for each in told], dtype=np.float64).mean(axis=0)
        np.testing.assert_allclose(found[1], means, atol=causes.FLOOR)


def test_what_is_rounding_counts_as_nothing(result, monkeypatch) -> None:
    numbers = dict.fromkeys(result.names, 0.9 * causes.FLOOR)
    line = {str(result.latents[0]): {"feature": numbers, "random direction": dict.fromkeys(result.names, 0.0)}}
    monkeypatch.setattr(causes, "Lines", lambda *_: {"7": line})
    rows = {row["changes"]: row for row in Causes.open(result.artifact.folder).rows()}
    assert (rows["colour"]["feature"], rows["colour"]["larger"], rows["colour"]["n"]) == (0, 0.5, 1)
    assert rows["coarse share"]["feature"] == pytest.approx(0.9 * causes.FLOOR)


def test_by_default_the_described_features_are_measured(pipe, sae, small_stats, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(causes, "_run", lambda _pipe, _sae, _stats, _orders, _judge, artifact: artifact.seal())
    asked = measure_causes(pipe, sae, small_stats, store=tmp_path)
    assert asked.latents.tolist() == describable(small_stats).tolist()


def test_without_a_judge_pictures_alone_are_measured(pipe, sae, small_stats, chosen, tmp_path) -> None:
    plain = measure_causes(pipe, sae, small_stats, chosen[:1], prompts_per_feature=1, judge=None, store=tmp_path)
    assert plain.names == LOOKS and plain.factors == ()
    assert "No judge told what the pictures show." in plain.sentence()
    judge = EmbeddingJudge(WorldEmbed())
    seen = measure_causes(pipe, sae, small_stats, chosen[:1], prompts_per_feature=1, judge=judge, store=tmp_path)
    assert seen.names == ("semantic", *LOOKS)
    np.testing.assert_allclose(seen.values[0, 1:], plain.values[0])
    assert seen.values[0, 0] == pytest.approx(0, abs=0.1)


# Formulas ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4]), st.floats(0, 2))
def test_shares_are_of_what_projections_keep(seed: int, cell: int, mixed: float) -> None:
    """Averaging over cells, and over colours, are orthogonal projections: here they are matrices."""
    rng = np.random.default_rng(seed)
    change = rng.normal(size=(8, 8, 3)) + mixed * rng.normal(size=3)
    cells = np.kron(np.eye(8 // cell), np.ones((cell, 1))) / np.sqrt(cell)
    kept = np.einsum("yi,xj,yxc->ijc", cells, cells, change)
    assert coarse_share(change, cell) == pytest.approx((kept**2).sum() / (change**2).sum())
    basis = np.linalg.svd(np.ones((1, 3)))[2][1:].T  # of the plane of colours without lightness
    assert colour_share(change) == pytest.approx(((change @ basis) ** 2).sum() / (change**2).sum())


def test_shares_of_extremes() -> None:
    blocks, checks = np.kron(np.eye(2), np.ones((4, 4))), np.indices((8, 8)).sum(axis=0) % 2 * 2.0 - 1
    assert coarse_share(np.repeat(blocks[..., None], 3, axis=2), 4) == pytest.approx(1)
    assert coarse_share(np.repeat(checks[..., None], 3, axis=2), 4) == pytest.approx(0)
    assert colour_share(np.repeat(checks[..., None], 3, axis=2)) == pytest.approx(0)
    assert colour_share(checks[..., None] * np.array([1.0, -1, 0])) == pytest.approx(1)
    noise = np.random.default_rng(1).normal(size=(64, 64, 3))
    assert coarse_share(noise, 8) == pytest.approx(1 / 64, rel=0.2)
    assert colour_share(noise) == pytest.approx(2 / 3, rel=0.05)
    assert np.isnan([coarse_share(np.zeros((8, 8, 3)), 4), colour_share(np.zeros((8, 8, 3)))]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_bhattacharyya_is_one_less_the_sum_of_geometric_means(seed: int, n: int) -> None:
    p, q = np.random.default_rng(seed).dirichlet(np.full(n, 0.3), size=(2, 5))
    np.testing.assert_allclose(bhattacharyya(p, q), 1 - np.sqrt(p * q).sum(axis=1), atol=1e-12)
    np.testing.assert_allclose(bhattacharyya(p, q), bhattacharyya(q, p))
    np.testing.assert_array_equal(bhattacharyya(p, p), 0)
    assert bhattacharyya(np.array([1.0, 0]), np.array([0.0, 1])) == 1


# The table -----------------------------------------------------------------------------------------------------------


def planted(result: Causes, difference: float, n: int = 40) -> Causes:
    """Features whose answers change in colour by so much more than the random direction's, everything else alike."""
    rng = np.random.default_rng(0)
    control = rng.uniform(0.1, 0.2, (n, len(result.names)))
    values = control + rng.normal(0, 1e-3, control.shape)
    values[:, result.names.index("colour")] += difference
    values[0, result.names.index("outside")] = np.nan
    return replace(result, latents=np.arange(n), values=values, control=control, n_prompts=np.full(n, 2))


def test_rows_are_paired_means_with_intervals_over_features(result) -> None:
    rows = {row["changes"]: row for row in planted(result, 0.05).rows()}
    assert list(rows) == list(result.names)
    assert rows["colour"]["difference"] == pytest.approx(0.05, abs=1e-3)
    low, high = rows["colour"]["difference interval"]
    assert 0.049 < low < rows["colour"]["difference"] < high < 0.051
    assert rows["colour"]["larger"] == 1 and rows["colour"]["n"] == 40
    assert rows["outside"]["n"] == 39
    control = planted(result, 0.05).control[1:, result.names.index("outside")]
    assert rows["outside"]["random direction"] == pytest.approx(control.mean())
    low, high = rows["shape"]["larger interval"]
    assert low < 0.5 < high
    same = planted(result, 0)
    ties = {row["changes"]: row["larger"] for row in replace(same, values=same.control).rows()}
    assert set(ties.values()) == {0.5}


def test_a_judge_of_embeddings_is_not_said_to_tell_bhattacharyyas_distance(result) -> None:
    names = ("semantic", *LOOKS)
    seen = replace(planted(result, 0), names=names, values=np.full((40, 5), 0.2), control=np.full((40, 5), 0.1))
    assert "Bhattacharyya" not in seen.sentence() and "the judge's own distance" in seen.sentence()
    assert "Bhattacharyya" not in seen.plot().layout.yaxis.title.text


def test_the_sentence_says_what_the_numbers_say(result) -> None:
    more, less = planted(result, 0.05).sentence(), planted(result, -0.05).sentence()
    assert "changes most in colour" in more and re.search(r"more often for colour \(100.0% ", more)
    assert re.search(r"less often for colour \(0.0% ", less)
    assert "as often, within the interval, for shape" in more
    few = planted(result, 0)
    few.values[:] = 1e-6
    few.values[::10, few.names.index("shape")] = 1  # 4 of 40
    assert "changes most in shape" in few.sentence() and "100% of it by the tenth" in few.sentence()
    assert "means over 40 features on up to 2 held-out images" in more


def test_it_is_shown_safely_and_drawn(result) -> None:
    page = read_safely(replace(result, hookpoint="<script>alert(1)</script>")._repr_html_())
    assert "<script>alert(1)</script>" in page.text and "Turning off a feature" in page.text
    drawn = planted(result, 0.05).plot()
    assert "colour" in drawn.data[0].hovertext and "coarse share" not in drawn.data[0].hovertext
    assert "95 % intervals" in drawn.layout.meta["alt"]


# Kept and refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [1, 4])
def test_killed_after_any_image_it_goes_on_and_ends_the_same(
    whole, pipe, sae, small_stats, chosen, result, tmp_path, monkeypatch
) -> None:
    def ask() -> Causes:
        return measure_causes(pipe, sae, small_stats, chosen, prompts_per_feature=2, batch_size=8, store=tmp_path)

    if not (child := os.fork()):
        add = Lines.add

        def add_and_die(self, unit, line):
            add(self, unit, line)
            if len(self) == whole:
                with open(self._path, "ab") as file:
                    file.write(b'["half a li')
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Lines, "add", add_and_die)
        ask()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    again = ask()
    for name in ("values", "control", "n_prompts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert again.artifact.digest == result.artifact.digest


def test_it_is_measured_once_and_read_back(
    pipe, sae, small_stats, chosen, result, store, monkeypatch, tmp_path
) -> None:
    monkeypatch.delattr(causes, "_run")
    ask = {"prompts_per_feature": 2, "batch_size": 8, "store": store}
    assert measure_causes(pipe, sae, small_stats, np.array(chosen), **ask).rows() == result.rows()
    assert result.artifact.name in repr(Store.at(store)) and str(len(chosen)) in repr(result)
    result.artifact.verify()
    shutil.copytree(result.artifact.folder, tmp_path / "studies" / result.artifact.name)
    assert Causes.open(tmp_path / "studies" / result.artifact.name).names == result.names


def test_what_cannot_be_measured_is_refused(pipe, sae, small_saes, small_stats, chosen, tmp_path, unchecked_types):
    def ask(latents=chosen, **settings):
        return measure_causes(pipe, settings.pop("sae", sae), small_stats, latents, store=tmp_path, **settings)

    with pytest.raises(KitError, match=f"has latents 0 to {sae.d_sae - 1}; there is no {sae.d_sae}"):
        ask([0, sae.d_sae])
    with pytest.raises(KitError, match="there is no True"):
        ask([True])
    with pytest.raises(KitError, match="hold one twice"):
        ask([3, 3])
    with pytest.raises(KitError, match="none of 0 latents .* fires on a held-out image"):
        ask([])
    with pytest.raises(KitError, match="prompts_per_feature must be an integer of at least 1, not 0"):
        ask(prompts_per_feature=0)
    with pytest.raises(KitError, match="judge is one such as"):
        ask(judge="me")
    with pytest.raises(ArtifactError, match="the statistics are of"):
        ask(sae=small_saes["down.2.1", "k8"])
    with pytest.raises(ArtifactError, match="No finished artifact"):
        Causes.open(tmp_path)
