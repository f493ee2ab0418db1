"""comparisons: two features side by side are each what was measured, and what they share stands beside chance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from payloads import NASTY
from reading_html import read_safely
from synthetic import synthetic_stats

from sdxl_sae_kit.comparisons import compare
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.html import short
from sdxl_sae_kit.labels import LabelStore

STATS = synthetic_stats(d_sae=40, n_dead=5)


def test_both_sides_show_their_images_and_numbers(tmp_path: Path) -> None:
    stats = synthetic_stats(tmp_path)
    LabelStore.of(stats).set(3, NASTY)
    shown = compare((stats, 3), (stats, 9))
    read = read_safely(shown.body.value)
    tops = [{example.image for example in stats.examples(latent)} for latent in (3, 9)]
    assert "script" not in read.tags and NASTY in read.text
    assert len(read.values("src")) == sum(map(len, tops))
    assert f"maximum{short(float(stats.max[3]))}5,760 tokens{short(float(stats.max[9]))}5,760 tokens" in read.text
    chance = len(tops[0]) * len(tops[1]) / stats.n_images
    assert (
        f"top images{len(tops[0] & tops[1])}{short(chance)}images among the strongest 12 of A and 12 of B" in read.text
    )


def test_the_controls_are_shared_and_either_side_can_change() -> None:
    shown = compare((STATS, 3), (STATS, 9))
    shown.viewer.view.value = "mean"
    assert read_safely(shown.body.value).text.count("Strongest on average") == 2
    shown.latents[1].value = 10
    assert "B: latent 10" in shown.body.value and "A: latent 3" in shown.body.value
    assert "B: latent 10" in shown.static_html()


def test_neighbourhood_is_told_within_one_sae_only() -> None:
    together = {neighbour.latent: neighbour.value for neighbour in STATS.coactive(3)}
    near, far = next(iter(together)), next(at for at in STATS.alive.tolist() if at != 3 and at not in together)
    assert f"fires together{short(together[near])}" in read_safely(compare((STATS, 3), (STATS, near)).body.value).text
    text = read_safely(compare((STATS, 3), (STATS, far)).body.value).text
    assert f"fires togetherat most {short(min(together.values()))}" in text
    other = synthetic_stats(sae="another-01234567")
    text = read_safely(compare((STATS, 3), (other, near)).body.value).text
    assert "fires together" not in text and "top images" in text  # the images are the same
    elsewhere = dataclasses.replace(other, texts=("other images",) * len(other.texts))
    assert "top images" not in read_safely(compare((STATS, 3), (elsewhere, near)).body.value).text


def test_a_dead_latent_says_so() -> None:
    for sides in (((STATS, 39), (STATS, 3)), ((STATS, 3), (STATS, 39))):
        read = read_safely(compare(*sides).body.value)
        assert "it fired on no token" in read.text
        assert "fires together–" in read.text and "writes alike–" in read.text


def test_what_is_no_pair_is_refused(unchecked_types: None) -> None:
    for wrong in (STATS, (STATS, 1, 2), (3, STATS)):
        with pytest.raises(KitError, match=r"two pairs \(statistics, latent\)"):
            compare((STATS, 3), wrong)  # type: ignore[arg-type]
    with pytest.raises(KitError, match="No latent 40 in"):
        compare((STATS, 3), (STATS, 40))


def test_the_twin_has_no_control() -> None:
    bundle = compare((STATS, 3), (STATS, 9))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert not {"script", "button", "input", "select"} & set(read_safely(bundle["text/html"]).tags)
