"""Sheets: every feature once, with the numbers that were measured, in files that load nothing and bring out no text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup, Tag
from payloads import NASTY
from synthetic import SyntheticStats, synthetic_icons, synthetic_stats

from sdxl_sae_kit import html, sheets
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.icons import Icons
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.sheets import draw_sheet

HOSTILE = NASTY + " & \x00"


@pytest.fixture(scope="module")
def stats() -> SyntheticStats:
    return synthetic_stats()


@pytest.fixture(scope="module")
def icons(stats: SyntheticStats, tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return synthetic_icons(tmp_path_factory.mktemp("icons"), stats.sae, [3, 17, 21])


@pytest.fixture(scope="module")
def control(stats: SyntheticStats, tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return synthetic_icons(tmp_path_factory.mktemp("control"), f"untrained_{stats.sae}", [3, 21])


@pytest.fixture
def labels(stats: SyntheticStats, tmp_path: Path) -> LabelStore:
    labels = LabelStore.of(stats, tmp_path)
    labels.set(17, HOSTILE)
    labels.set(3, "red")
    for text, right in (("blue", 1), ("red", 2), ("red", 9)):
        labels.add_test(3, text, right_active=right, n_active=10, right_inactive=8, n_inactive=10, author="a judge")
    return labels


def cards_of(file: Path) -> list[Tag]:
    return BeautifulSoup(file.read_text(), "html.parser").select(".sae-card")


def latent(card: Tag) -> int:
    return int(card.select_one("[data-latent]")["data-latent"])


def test_every_feature_that_fires_stands_once_with_what_was_measured(stats, icons, control, labels, tmp_path):
    first = draw_sheet(stats, icons=icons, control=control, labels=labels, out=tmp_path / "all.html")
    drawn = {latent(card): card for card in cards_of(first)}
    assert len(cards_of(first)) == len(drawn) and sorted(drawn) == stats.alive.tolist()
    densities = [stats.density[feature] for feature in drawn]
    assert densities == sorted(densities, reverse=True)
    for feature, card in drawn.items():
        said, firing = card.get_text(" "), round(float(stats.density[feature]) * stats.n_tokens)
        assert f"{100 * float(stats.density[feature]):#.3g} %" in said
        assert f"mean {html.short(float(stats.mean[feature]))}, n = {firing:,} firing tokens" in said
        moran = [html.short(float(end[feature])) for end in (stats.moran, stats.moran_low, stats.moran_high)]
        assert "Moran's I {} [{}, {}], n = {:.0f} images".format(*moran, stats.moran_n[feature]) in said
        prompts = [example.prompt for example in stats.examples(feature, "max", 4)]
        assert all(prompt in card.img["alt"] for prompt in prompts)
        assert len(card.select("img")) == 1 + (feature in (3, 17, 21)) + (feature in (3, 21))
        assert said.count("not drawn") == 2 - (feature in (3, 17, 21)) - (feature in (3, 21))
    ends = map(html.short, labels.tests(3)[-1].interval)
    assert "label test 0.850 [{}, {}], n = 20 pictures, by a judge".format(*ends) in drawn[3].get_text()
    assert drawn[17].select_one(".sae-name").get_text() == HOSTILE.replace("\x00", "\ufffd")
    rows = [[span.get_text() for span in figure.select("span")] for figure in drawn[3].select(".sae-icons")]
    assert rows == [["added 0", "0.5", "1", "1.5"], ["control 0", "0.5", "1", "1.5"]]


def test_a_file_can_load_nothing_and_run_nothing_but_the_filter(stats, icons, labels, tmp_path):
    text = draw_sheet(stats, icons=icons, labels=labels, out=tmp_path / "sheet.html").read_text()
    soup = BeautifulSoup(text, "html.parser")
    (policy,) = (meta["content"] for meta in soup.select("meta[http-equiv=Content-Security-Policy]"))
    (script,) = soup.select("script")
    twin = (Path(sheets.__file__).parent / "twin.js").read_text()
    assert script.string == twin
    assert policy == f"{html.POLICY}; script-src {html.source_hash(twin)}" and policy.startswith("default-src 'none'")
    assert all(image["src"].startswith("data:image/webp;base64,") and image["alt"] for image in soup.select("img"))
    assert not soup.select("link, iframe, object, embed, form, [onerror], [onclick], [style]")
    assert all(str(link["href"]).startswith("#") for link in soup.select("[href]"))
    assert not re.search(r"https?://|@import|url\(", text)


def test_many_features_make_several_files_that_find_each_other(stats, tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "PER_FILE", 10)
    first = draw_sheet(stats, by="latent", out=tmp_path / "a sheet & more.html")
    paths = [first, *(tmp_path / f"a sheet & more-{number}.html" for number in (2, 3, 4))]
    assert set(tmp_path.iterdir()) == set(paths)
    pages = [BeautifulSoup(path.read_text(), "html.parser") for path in paths]
    shown = [[latent(card) for card in page.select(".sae-card")] for page in pages]
    assert [len(numbers) for numbers in shown] == [10, 10, 10, 5] and sum(shown, []) == stats.alive.tolist()
    for number, page in enumerate(pages):
        hrefs = [link["href"] for link in page.select("main > nav")[0].select("a")]
        assert hrefs == ["a%20sheet%20%26%20more.html", *(f"a%20sheet%20%26%20more-{n}.html" for n in (2, 3, 4))]
        assert page.select_one("[aria-current=page]").get_text() == str(number + 1)
        assert f"of {len(stats.alive)} cards" in page.get_text()
    for link in pages[0].select(".sae-find a"):
        feature = int(link.get_text())
        name, _, anchor = str(link["href"]).partition("#")
        page = pages[hrefs.index(name) if name else 0]
        assert latent(page.find(id=anchor).find_parent("article")) == feature
    assert len(pages[0].select(".sae-find a")) == len(stats.alive)


@pytest.mark.parametrize("by", ["max", "mean", "moran"])
def test_the_order_is_that_of_the_statistic_and_what_is_not_known_comes_last(stats, tmp_path, by):
    features = [39, 5, 17, 3, 17]  # 39 is dead, without Moran's I
    shown = [latent(card) for card in cards_of(draw_sheet(stats, features=features, by=by, out=tmp_path / "s.html"))]
    assert shown == [*sorted([5, 17, 3], key=lambda feature: -getattr(stats, by)[feature]), 39]


def test_a_sheet_is_made_once_until_its_labels_change(small_stats, tmp_path, monkeypatch, capsys):
    labels, features = LabelStore.of(small_stats, tmp_path), small_stats.alive[:12].tolist()
    first = draw_sheet(small_stats, labels=labels, features=features, store=tmp_path)
    assert first.parent.parent == tmp_path / "reports" and (first.parent / "stamp.json").exists()
    assert "Drawing a sheet of 12 features" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(sheets, "_write", lambda *_: pytest.fail("it draws again"))
        assert draw_sheet(small_stats, labels=labels, features=np.array(features), store=tmp_path) == first
    labels.set(int(small_stats.alive[-1]), "not on this sheet")
    assert draw_sheet(small_stats, labels=labels, features=features, store=tmp_path) == first
    labels.set(features[0], "red")
    again = draw_sheet(small_stats, labels=labels, features=features, store=tmp_path)
    assert again != first and "red" in again.read_text()


def test_interrupted_it_goes_on_at_the_file_in_hand_and_ends_the_same(small_stats, tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "PER_FILE", 4)
    chosen = {"features": small_stats.alive[:12].tolist(), "labels": LabelStore.of(small_stats, tmp_path)}
    whole = draw_sheet(small_stats, store=tmp_path / "whole", **chosen)
    page = sheets._Sheet.page

    def stop(sheet, number, drawn, names):
        if number == 2:
            raise KeyboardInterrupt
        return page(sheet, number, drawn, names)

    monkeypatch.setattr(sheets._Sheet, "page", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_sheet(small_stats, store=tmp_path / "stopped", **chosen)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.html")}
    assert len(made) == 2
    monkeypatch.setattr(sheets._Sheet, "page", page)
    first = draw_sheet(small_stats, store=tmp_path / "stopped", **chosen)
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())
    assert {path.name: path.read_bytes() for path in first.parent.glob("*.html")} == {
        path.name: path.read_bytes() for path in whole.parent.glob("*.html")
    }


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"by": "densitiy"}, "no order 'densitiy'; there are density, .* Did you mean 'density'"),
        ({"features": [40]}, "No latent 40 .* it has 0 to 39"),
        ({"features": []}, "no latent to draw. 35 of synthetic"),
        ({"features": "17"}, "features are several latents"),
        ({"out": "."}, "The sheet cannot go to .*: it is a folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(stats, tmp_path, unchecked_types, wrong, match):
    with pytest.raises(KitError, match=match):
        draw_sheet(stats, **{"out": tmp_path / "sheet.html", **wrong})
    assert not list(tmp_path.iterdir())


def test_what_is_of_another_sae_is_refused_by_name(stats, icons, control, tmp_path, unchecked_types):
    other = synthetic_icons(tmp_path / "other", "another_mid.0_k10-0123abcd", [3])
    away = synthetic_icons(tmp_path / "away", f"untrained_{stats.sae}", [3], hookpoint="up.0.1")
    out = tmp_path / "sheet.html"
    with pytest.raises(KitError, match=r"icons are of another_mid\.0_k10-0123abcd, but the statistics of synthetic"):
        draw_sheet(stats, icons=other, out=out)
    for no_control in (icons, away):
        with pytest.raises(KitError, match=r"is no control for synthetic.* sae\.untrained\(\)"):
            draw_sheet(stats, icons=icons, control=no_control, out=out)
    with pytest.raises(KitError, match=r"labels are of another_mid\.0_k10-0123abcd, but"):
        draw_sheet(stats, labels=LabelStore.of("another_mid.0_k10-0123abcd", tmp_path), out=out)
    with pytest.raises(KitError, match="draw_sheet takes FeatureStats"):
        draw_sheet(icons, out=out)
    assert not out.exists()
