"""galleries: what is shown is what was measured, labels last, and nobody's text becomes HTML.

The widgets are driven without a browser.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import widgets
from payloads import NASTY
from PIL import Image
from reading_html import Reader, read_safely
from synthetic import SyntheticStats, synthetic_stats

from sdxl_sae_kit.cards import VIEWS, statistics
from sdxl_sae_kit.details import Detail
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.galleries import DRAWING, Gallery, gallery
from sdxl_sae_kit.html import short
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.sae import FIRES
from sdxl_sae_kit.similarity import Specificity

STATS = synthetic_stats(d_sae=40, n_dead=5)
FEW = synthetic_stats(d_sae=3, n_dead=0)


@pytest.fixture
def labels(tmp_path: Path) -> LabelStore:
    return LabelStore.of(STATS, tmp_path)


@pytest.fixture
def shown(labels: LabelStore) -> Gallery:
    return gallery(STATS, labels=labels, page_size=10)


def cards(html: str) -> list[int]:
    return [int(latent) for latent in re.findall(r'<header><b data-latent="(\d+)">\1</b>', html)]


def opened(source: str) -> np.ndarray:
    """The picture at an address, as integers (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"), dtype=int)


def alike(stats: FeatureStats) -> Specificity:
    """What `specificity` measures, made up."""
    value = np.random.default_rng(1).uniform(size=stats.d_sae).astype(np.float32)
    n = np.full(stats.d_sae, 12)
    return Specificity(
        stats.sae, stats.hookpoint, "a made-up judge", value, value - 0.1, value + 0.1, n, value * 0, 0.25, (0.2, 0.3)
    )


class Unpictured(SyntheticStats):
    """Statistics of a cache without pictures."""

    pictured = np.arange(0)  # type: ignore[assignment]


class OddIcons(Icons):
    """Icons of the odd latents."""

    def get(self, feature: int) -> tuple[bytes, ...] | None:
        return tuple(STATS.thumbnail(image) for image in range(3)) if feature % 2 else None


def icons_of(stats: FeatureStats) -> Icons:
    odd = np.arange(1, stats.d_sae, 2)
    return OddIcons(stats.artifact, stats.sae, stats.hookpoint, (0.5, 1.0, 1.5), odd, stats.thumbnail(0))


def drawn(detail: Detail) -> list[int]:
    """The images on the screen."""
    alts = read_safely(detail.images.value).values("alt")
    return [int(re.match(r"Image (\d+),", alt)[1]) for alt in alts]  # type: ignore[index]


def all_pages(shown: Gallery) -> list[int]:
    overview = shown.overview
    overview.turn_to(0)
    latents = cards(overview.grid.value)
    while not overview.next.disabled:
        overview.next.click()
        latents += cards(overview.grid.value)
    return latents


@pytest.mark.parametrize("key", ["density", "max", "mean", "moran"])
def test_sorting_puts_the_largest_first_and_misses_nobody(shown: Gallery, key: str) -> None:
    shown.overview.sort.value = key
    latents = all_pages(shown)
    values = getattr(STATS, key)[latents]
    assert sorted(latents) == list(range(35))
    assert (np.diff(values) <= 0).all()


def test_specificity_is_an_order_only_where_it_was_measured(shown: Gallery, labels: LabelStore) -> None:
    assert "specificity" not in dict(shown.overview.sort.options).values()
    with pytest.raises(KitError, match=r"similarity=kit\.specificity\(stats\)"):
        gallery(STATS, labels=labels, sort="specificity")
    measured = alike(STATS)
    measured.value[[5, 8]] = np.nan
    sorted_by_it = gallery(STATS, labels=labels, similarity=measured, sort="specificity")
    order = all_pages(sorted_by_it)
    assert set(order[-2:]) == {5, 8} and (np.diff(measured.value[order[:-2]]) <= 0).all()


def test_what_was_measured_of_another_sae_is_refused(labels: LabelStore) -> None:
    other = synthetic_stats(sae="another-01234567")
    for name, of in (("similarity", alike), ("icons", icons_of)):
        gallery(STATS, labels=labels, **{name: of(STATS)})
        with pytest.raises(KitError, match=f"{name} are of another-01234567, but the statistics of {STATS.sae}"):
            gallery(STATS, labels=labels, **{name: of(other)})


def test_unlabelled_come_first(shown: Gallery, labels: LabelStore) -> None:
    labels.set(7, "red")
    shown.overview.sort.value = "unlabelled"
    assert all_pages(shown)[-1] == 7


def test_pages_are_full_and_end_where_they_should(shown: Gallery) -> None:
    overview = shown.overview
    assert len(cards(overview.grid.value)) == 10
    assert (overview.previous.disabled, overview.next.disabled) == (True, False)
    assert "1–10 of 35 latents (5 dead hidden)" in overview.position.value
    overview.turn_to(99)
    assert len(cards(overview.grid.value)) == 5
    assert (overview.previous.disabled, overview.next.disabled) == (False, True)
    overview.previous.click()
    assert "21–30 of 35" in overview.position.value


def test_dead_latents_show_when_asked_for(shown: Gallery) -> None:
    shown.overview.sort.value = "latent"
    shown.overview.hide_dead.value = False
    assert all_pages(shown) == list(range(40))
    assert shown.overview.grid.value.count("It fired on no token.") == 5


def test_the_filter_looks_in_labels_and_in_prompts_of_the_examples(shown: Gallery, labels: LabelStore) -> None:
    labels.set(11, "Shiny THING")
    shown.overview.filter.value = "thing shiny"
    assert all_pages(shown) == [11]
    shown.overview.filter.value = "red left"
    expected = {
        latent
        for latent in STATS.alive.tolist()
        if any("red" in example.prompt and "left" in example.prompt for example in STATS.examples(latent))
    }
    assert set(all_pages(shown)) == expected
    assert 0 < len(expected) < 35
    shown.overview.filter.value = "no such word"
    assert all_pages(shown) == []
    assert "nothing found" in shown.overview.position.value


def test_the_filter_passes_over_images_on_which_a_latent_does_not_fire(labels: LabelStore) -> None:
    codes = np.zeros_like(FEW.codes)
    codes[5, 0] = 1.0
    texts = tuple(f"scene{image}" for image in range(len(codes)))
    shown = gallery(dataclasses.replace(FEW, codes=codes, texts=texts), labels=labels)
    for words, expected in (("scene5", [0]), ("scene3", [])):
        shown.overview.filter.value = words
        assert all_pages(shown) == expected


def test_labels_are_kept_beside_the_statistics(tmp_path: Path) -> None:
    detail = gallery(synthetic_stats(tmp_path), 2).detail
    detail.form.text.value = "blue"
    detail.form.save.click()
    assert LabelStore.of("synthetic_mid.0_k10-0123abcd", tmp_path).all() == {2: "blue"}


def test_a_label_is_saved_confirmed_shown_and_there_again_later(shown: Gallery, labels: LabelStore) -> None:
    shown.overview.latent.value = 12
    shown.overview.go.click()
    assert shown.children == (shown.detail,)
    shown.detail.form.text.value = "  red balls "
    shown.detail.form.save.click()
    assert "Saved <bdi>red balls</bdi>" in shown.detail.form.notice.value
    shown.detail.back.click()
    assert shown.children == (shown.overview,)
    shown.overview.filter.value = "balls"
    again = gallery(STATS, 12, labels=LabelStore(labels.file))
    assert again.detail.form.text.value == "red balls"
    again.detail.form.withdraw.click()
    assert (again.detail.form.text.value, labels.all()) == ("", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [(" ", "needs some text"), ("x" * 501, "at most 500 characters"), ("<b>\ud83d", "half a character")],
)
def test_a_bad_label_is_refused_where_it_was_typed(labels: LabelStore, text: str, message: str) -> None:
    detail = gallery(STATS, 3, labels=labels).detail
    detail.form.text.value = text
    detail.form.save.click()
    assert message in read_safely(detail.form.notice.value).text
    assert labels.all() == {}


def test_previous_and_next_follow_the_chosen_order(shown: Gallery) -> None:
    shown.overview.sort.value = "max"
    order = all_pages(shown)
    shown.show(order[1])
    shown.detail.next.click()
    assert shown.detail.feature == order[2]
    for _ in range(5):
        shown.detail.previous.click()
    assert shown.detail.feature == order[0]


def test_the_detail_states_what_was_measured_over_how_many(labels: LabelStore) -> None:
    measured = alike(STATS)
    read = read_safely(gallery(STATS, 4, labels=labels, similarity=measured).detail.facts.value)
    codes = STATS.codes[:, 4]
    firing = codes[codes > FIRES]
    fires_on = int((codes.max((1, 2)) > FIRES).sum())
    for fact in (
        f"{100 * firing.size / codes.size:#.3g} %tokens with z > 0.001 / all tokens{codes.size:,} tokens",
        f"{firing.mean():#.3g}mean of z over firing tokens{firing.size:,} firing tokens",
        f"{firing.std():#.3g}standard deviation of z over firing tokens",
        f"{codes.max():#.3g}largest z",
        f"{STATS.moran[4]:#.3g}[{STATS.moran_low[4]:#.3g}, {STATS.moran_high[4]:#.3g}]",
        f"random: -0.0159{fires_on} images",  # -1 / 63
        f"{measured.value[4]:#.3g}[{measured.low[4]:#.3g}, {measured.high[4]:#.3g}]",
        "by a made-up judge; random images: 0.250 [0.200, 0.300]12 images",
    ):
        assert fact in read.text


@pytest.mark.parametrize("view", VIEWS)
def test_each_view_shows_its_images_with_their_numbers(labels: LabelStore, view: str) -> None:
    detail = gallery(STATS, 3, labels=labels).detail
    detail.viewer.view.value = view
    detail.show(4)
    maps = STATS.codes[:, 4]
    measured = {"mean": maps.mean((1, 2)), "area": 100 * (maps > FIRES).mean((1, 2))}.get(view, maps.max((1, 2)))
    read = read_safely(detail.images.value)
    assert len(read.values("src")) == len(detail.form.evidence["images"]) == 12
    assert detail.form.evidence["shown"] == view
    for image in detail.form.evidence["images"]:
        assert STATS.texts[image] in read.text and short(float(measured[image])) in read.text
    ranked = np.argsort(-measured, kind="stable")[:12].tolist()
    if view in ("max", "mean", "area"):
        assert detail.form.evidence["images"] == ranked


def test_quantiles_run_from_the_weakest_quarter_to_the_strongest(labels: LabelStore) -> None:
    detail = gallery(STATS, 4, labels=labels).detail
    detail.viewer.view.value = "quantiles"
    quarters = re.findall("(weakest|second|third|strongest) quarter:", read_safely(detail.images.value).text)
    assert quarters == [name for name in ("weakest", "second", "third", "strongest") for _ in range(3)]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 7, 11])
def test_a_latent_that_fires_on_few_images_has_quarters_by_rank_or_none(labels: LabelStore, n: int) -> None:
    codes = np.zeros_like(FEW.codes)
    codes[:n, 0] = np.arange(1, n + 1)[:, None, None]
    detail = gallery(dataclasses.replace(FEW, codes=codes), 0, labels=labels).detail
    detail.viewer.view.value = "quantiles"
    named = re.findall("(weakest|second|third|strongest) quarter:", read_safely(detail.images.value).text)
    middles = (np.arange(n) + 0.5) / n
    quarters = ["weakest", "second", "third", "strongest"]
    assert named == ([quarters[at] for at in np.digitize(middles, [0.25, 0.5, 0.75])] if n >= 4 else [])
    assert n < 4 or (named[0], named[-1]) == ("weakest", "strongest")


def test_random_images_of_a_cache_without_pictures_are_missing_for_that_reason(labels: LabelStore) -> None:
    detail = gallery(Unpictured(**vars(STATS)), 4, labels=labels).detail
    detail.viewer.view.value = "random"
    text = read_safely(detail.images.value).text
    assert "keeps no pictures" in text and "fired on no token" not in text


def test_random_images_are_drawn_again_only_when_asked(labels: LabelStore) -> None:
    detail = gallery(STATS, 4, labels=labels).detail
    assert detail.viewer.again.disabled
    detail.viewer.view.value = "random"
    first = drawn(detail)
    assert len(set(first)) == 12 and not detail.viewer.again.disabled
    detail.show(4)
    assert drawn(detail) == first
    detail.viewer.again.click()
    assert drawn(detail) != first
    assert {STATS.codes[image, 4].max() > FIRES for image in first} == {True, False}


def test_whatever_was_shown_of_a_latent_is_evidence_of_its_label_and_of_no_other(labels: LabelStore) -> None:
    detail = (shown := gallery(STATS, 4, labels=labels)).detail
    seen = set(drawn(detail))
    detail.viewer.view.value = "random"
    for _ in range(3):
        seen |= set(drawn(detail))
        detail.viewer.again.click()
    seen |= set(drawn(detail))
    shown.show(5)
    assert set(detail.form.evidence["images"]) == set(drawn(detail)) != seen
    shown.show(4)
    detail.form.text.value = "balls"
    detail.form.save.click()
    saved = labels.latest(4)
    assert saved is not None and saved.evidence is not None
    assert set(saved.evidence["images"]) == seen | set(drawn(detail))


def test_the_heat_map_covers_as_much_as_was_chosen(labels: LabelStore) -> None:
    detail = gallery(STATS, 4, labels=labels).detail

    def colourfulness(opacity: float) -> float:
        detail.viewer.opacity.value = opacity
        drawn = opened(read_safely(detail.images.value).values("src")[0])[:, 107:]
        return float((drawn.max(-1) - drawn.min(-1)).mean())

    shown = [colourfulness(opacity) for opacity in (0.0, 0.5, 1.0)]
    assert shown == sorted(shown) and shown[0] < 2 < 10 < shown[2]


def test_neighbours_are_named_with_their_number_and_chance_and_open(labels: LabelStore) -> None:
    labels.set(10, "the same colour")
    shown = gallery(STATS, 4, labels=labels)
    text = read_safely(shown.detail.facts.value).text
    on = STATS.codes[:, [4, 10]].swapaxes(0, 1).reshape(2, -1) > FIRES
    p, q = on.mean(1)
    index = (on[0] & on[1]).sum() / (on[0] | on[1]).sum()
    assert f"10 {index:#.3g} ({p * q / (p + q - p * q):#.3g}) the same colour" in text
    assert f"n = {STATS.n_tokens:,} tokens" in text
    shown.detail.facts._hear({"open": 10})
    assert (shown.detail.feature, shown.detail.heading.takes_focus) == (10, "h3")


def test_tags_certainty_and_what_was_shown_are_kept_with_a_label(labels: LabelStore) -> None:
    form = (detail := gallery(STATS, 4, labels=labels).detail).form
    detail.viewer.view.value = "mean"
    form.text.value, form.tags.value, form.confidence.value = "balls", " colour, hue; ;round ", 0.85
    form.save.click()
    label = labels.latest(4)
    assert label is not None
    assert (label.tags, label.confidence) == (("colour, hue", "round"), 0.85)
    images = {example.image for by in ("max", "mean") for example in STATS.examples(4, by)}  # it opens with "max"
    assert label.evidence is not None and label.evidence["shown"] == "mean"
    assert sorted(label.evidence["images"]) == sorted(images)
    again = gallery(STATS, 4, labels=labels).detail.form
    assert (again.text.value, again.tags.value, again.confidence.value) == ("balls", "colour, hue; round", 0.85)
    again.text.value, again.confidence.value = "cubes", -1.0
    again.save.click()
    assert labels.latest(4).confidence is None  # type: ignore[union-attr]
    again.undo.click()
    assert "latent 4 is <bdi>balls</bdi> again" in again.notice.value
    assert (again.text.value, again.confidence.value, labels.get(4)) == ("balls", 0.85, "balls")


def test_saving_changes_only_what_was_changed(labels: LabelStore) -> None:
    stood = labels.set(4, "red,\nround", tags=("colour, hue", "form"), confidence=0.834)
    form = gallery(STATS, 4, labels=labels).detail.form
    assert "\n" not in form.text.value  # which a field of one line would drop
    form.save.click()
    label = labels.latest(4)
    assert label is not None and label.time > stood.time
    assert (label.text, label.tags, label.confidence) == (stood.text, stood.tags, stood.confidence)
    form.confidence.value = 0.5
    form.save.click()
    label = labels.latest(4)
    assert label is not None and (label.text, label.confidence) == (stood.text, 0.5)


def test_only_a_test_of_the_label_that_stands_is_shown(labels: LabelStore) -> None:
    for text, right in (("balls", 9), ("cubes", 7)):
        labels.add_test(4, text, right_active=right, n_active=10, right_inactive=5, n_inactive=10)
    labels.set(4, "balls")
    text = read_safely(gallery(STATS, 4, labels=labels).detail.facts.value).text
    assert "latest test of its label" in text and "balls" in text and "cubes" not in text
    labels.set(4, "cones")
    assert "latest test" not in gallery(STATS, 4, labels=labels).detail.facts.value


def test_icons_stand_on_cards_and_on_the_page_of_a_feature(labels: LabelStore) -> None:
    shown = gallery(STATS, labels=labels, icons=icons_of(STATS), sort="latent", page_size=2)
    alts = read_safely(shown.overview.grid.value).values("alt")
    assert len(alts) == 3 and "Icon of latent 1" in alts[1]
    shown.show(1)
    facts = read_safely(shown.detail.facts.value)
    assert [alt for alt in facts.values("alt") if "writes" in alt] == [
        f"What latent 1 writes at strength {strength}" for strength in ("0.5", "1", "1.5")
    ]
    shown.show(2)
    assert "writes at strength" not in shown.detail.facts.value


def test_a_gallery_has_as_many_widgets_with_many_latents_as_with_few(labels: LabelStore, tmp_path: Path) -> None:
    made = []
    for stats in (FEW, STATS):
        before = len(widgets.widget._instances)
        gallery(stats, labels=LabelStore.of(stats, tmp_path / str(stats.d_sae)))
        made.append(len(widgets.widget._instances) - before)
    assert made[0] == made[1] > 0


def test_galleries_share_their_threads(labels: LabelStore) -> None:
    gallery(STATS, labels=labels)
    before = threading.active_count()
    assert [gallery(STATS, labels=labels, page_size=10) for _ in range(5)]
    assert threading.active_count() <= before + DRAWING


def test_what_a_page_sends_that_is_no_latent_does_nothing(shown: Gallery) -> None:
    for content in (None, [], {"open": "7"}, {"open": None}, {"turn": "x"}, {"other": 1}):
        shown.overview.grid._hear(content)
    assert (shown.children, shown.overview.page) == ((shown.overview,), 0)
    shown.overview.grid._hear({"turn": 1})
    assert shown.overview.page == 1
    shown.overview.grid._hear({"open": 400})
    assert "No latent 400" in shown.overview.position.value
    shown.overview.grid._hear({"open": 6})
    assert shown.children == (shown.detail,) and shown.detail.feature == 6
    shown.detail.back.click()
    assert shown.overview.grid.takes_focus == '[data-latent="6"]'


def test_a_dead_latent_says_so(labels: LabelStore) -> None:
    shown = gallery(STATS, 39, labels=labels)
    assert f"it fired on none of the {STATS.n_tokens:,} tokens" in shown.detail.facts.value
    assert "it fired on none" in shown.static_html()


def test_a_latent_there_is_not_is_refused(shown: Gallery, labels: LabelStore) -> None:
    for feature in (40, -1):
        with pytest.raises(KitError, match=rf"No latent {feature} in synthetic_mid.0_k10-0123abcd; it has 0 to 39\."):
            gallery(STATS, feature, labels=labels)
    shown.overview.latent.value = 40
    shown.overview.go.click()
    assert "No latent 40" in shown.overview.position.value
    assert shown.children == (shown.overview,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 49}, "1 to 48"),
        ({"page_size": 0}, "page_size must be an integer of at least 1, not 0"),
        ({"page_size": 2.5}, "page_size must be an integer of at least 1, not 2.5"),
        ({"static": -1}, "static must be an integer of at least 0, not -1"),
        ({"sort": "size"}, "no order 'size'"),
        ({"stats": None}, "takes FeatureStats, .* not None"),
    ],
)
def test_bad_options_are_refused(
    labels: LabelStore, options: dict[str, object], message: str, unchecked_types: None
) -> None:
    with pytest.raises(KitError, match=message):
        gallery(**({"stats": STATS, "labels": labels} | options))  # type: ignore[arg-type]


def test_the_static_twin_shows_the_features_asked_for_in_the_chosen_order(labels: LabelStore) -> None:
    shown = gallery(STATS, labels=labels, page_size=5, sort="mean", static=12)
    bundle = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    read = read_safely(bundle["text/html"])
    assert cards(bundle["text/html"]) == sorted(range(35), key=lambda latent: (-STATS.mean[latent], latent))[:12]
    assert "12 of 35 latents (5 dead hidden), order: mean" in read.text
    assert not {"script", "button", "input", "a"} & set(read.tags)
    shown.show(4)
    assert "Latent 4" in shown._repr_mimebundle_()["text/html"]


def test_the_default_twin_has_everybody_up_to_a_hundred(labels: LabelStore) -> None:
    assert len(cards(gallery(STATS, labels=labels).static_html())) == 35
    many = synthetic_stats(d_sae=120, n_dead=5)
    assert len(cards(gallery(many, labels=labels).static_html())) == 100


def test_a_card_is_small_and_shows_image_above_heat_map(shown: Gallery) -> None:
    html = shown.static_html()
    assert len(html) / len(cards(html)) < 6_000
    sheet = opened(read_safely(html).values("src")[0])
    assert sheet.shape == (131, 265, 3)
    first = STATS.examples(cards(html)[0])[0]
    hottest = np.unravel_index(first.heat_map.argmax(), first.heat_map.shape)
    below = sheet[67:131, 0:64].sum(-1)
    brightest = np.unravel_index(below.argmax(), below.shape)
    assert np.abs(np.array(brightest) // 8 - hottest).max() <= 1


def test_two_galleries_share_no_id(labels: LabelStore) -> None:
    reader = Reader(gallery(STATS, labels=labels).static_html() + gallery(STATS, 3, labels=labels).static_html())
    assert not reader.values("id")


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([NASTY, "\0<b\0>", "‮אבג"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from([NASTY, "' onload='x"])
    | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
)
def test_prompts_and_labels_stay_text_everywhere(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, label: str
) -> None:
    stats = dataclasses.replace(FEW, texts=(prompt,) * len(FEW.texts))
    labels = LabelStore.of(stats, tmp_path_factory.mktemp("store"))
    shown = gallery(stats, labels=labels, page_size=2, static=2)
    shown.overview.filter.value = label
    shown.show(0)
    shown.detail.form.text.value = label
    shown.detail.form.save.click()
    detail = shown.detail
    one = [detail.heading.value, detail.images.value, detail.facts.value, detail.form.notice.value, shown.static_html()]
    shown.detail.back.click()
    listed = [shown.overview.grid.value, shown.overview.position.value, shown.static_html()]
    for html in one + listed:
        read = read_safely(html)
        assert "script" not in read.tags
    assert labels.get(0) == label.replace("\r\n", "\n").replace("\r", "\n").strip()


def test_morans_i_counts_the_images_on_which_it_is_defined() -> None:
    counted = STATS.moran_n.copy()
    counted[3] = 7
    rows = {row[0]: row for row in statistics(dataclasses.replace(STATS, moran_n=counted), 3)}
    assert rows["Moran's I"][3] == "7 images"
