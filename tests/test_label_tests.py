"""label tests: blind, fair, on images nobody was shown with the label, counted rightly and saved."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import Image as ImageWidget
from PIL import Image
from reading_html import read_safely
from scipy.stats import binom, binomtest
from sklearn.metrics import balanced_accuracy_score
from world_stats import DEAD, EVERYWHERE, LEFT, NOISE, RARE, RED, shows_red, world_stats

from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.label_lines import LabelTest
from sdxl_sae_kit.label_tests import SHOWN, BlindTest, auto_label, score_label, test_label
from sdxl_sae_kit.labellers import HERE, WorldLabeller
from sdxl_sae_kit.labels import LabelStore, user
from sdxl_sae_kit.pictures import decode_picture

STATS = world_stats()
HELD_OUT = STATS.prompts.held_out


@pytest.fixture
def labels(tmp_path: Path) -> LabelStore:
    return LabelStore.of(STATS, tmp_path)


@pytest.fixture
def form(labels: LabelStore) -> BlindTest:
    labels.set(RED, "something <red>")
    return test_label(STATS, RED, labels=labels, n=12)


class Honest:
    """Knows the pictures by heart, and answers by a rule about the image's number."""

    name, where = "honest", HERE

    def __init__(self, rule) -> None:
        self.rule, self.asked = rule, []
        self.known = {decode_picture(STATS.thumbnail(image)).tobytes(): image for image in range(len(HELD_OUT))}

    def label(self, examples, contrast) -> str:
        self.named_from = examples, contrast
        return "a name"

    def judge(self, text: str, images: Sequence[Image.Image]) -> list[bool]:
        shown = [self.known[image.tobytes()] for image in images]
        self.asked.append((text, shown))
        return [bool(self.rule(image)) for image in shown]


def counted(active: int, n_active: int, inactive: int, n_inactive: int) -> LabelTest:
    return LabelTest(0, "x", active, n_active, inactive, n_inactive, "me", datetime(2030, 1, 1, tzinfo=UTC))


def exactly(form: BlindTest) -> tuple[list[int], np.ndarray]:
    """The images of a form and which are active, from the statistics."""
    images = form._drawn.images.tolist()
    return images, STATS.image_activations()[images, RED] > 0.001


def test_half_of_the_pictures_are_active_held_out_and_never_shown_with_the_label(labels: LabelStore) -> None:
    evidence = [image for image in np.flatnonzero(HELD_OUT).tolist() if shows_red(image)][:3]
    labels.set(RED, "red", evidence={"images": evidence})
    judge = Honest(shows_red)
    orders = set()
    for seed in range(5):
        test = score_label(STATS, RED, judge, labels=labels, seed=seed)
        text, images = judge.asked[-1]
        assert text == "red" and len(set(images)) == 20 and HELD_OUT[images].all()
        assert sum(map(shows_red, images)) == test.n_active == test.n_inactive == 10
        assert not set(images) & {*evidence, *(example.image for example in STATS.examples(RED))}
        orders.add(tuple(map(shows_red, images)))
    assert len(orders) == 5, "the order must tell nothing"


def test_active_images_are_of_all_strengths(labels: LabelStore) -> None:
    labels.set(RED, "red")
    judge = Honest(shows_red)
    score_label(STATS, RED, judge, labels=labels)
    images = judge.asked[0][1]
    strengths = STATS.image_activations()[:, RED]
    shown = {example.image for example in STATS.examples(RED)}
    there = sorted(strengths[i] for i in np.flatnonzero(HELD_OUT) if shows_red(i) and i not in shown)
    ranks = np.searchsorted(there, sorted(strengths[i] for i in images if shows_red(i)))
    assert (np.abs(ranks - (np.arange(10) + 0.5) * len(there) / 10) <= len(there) / 10 + 1).all()


def test_one_seed_shows_the_same_pictures_for_another_text(labels: LabelStore) -> None:
    labels.set(RED, "red")
    judge = Honest(shows_red)
    score_label(STATS, RED, judge, labels=labels)
    control = score_label(STATS, RED, judge, labels=labels, text="on the left")
    assert judge.asked[0][1] == judge.asked[1][1]
    assert (control.text, labels.get(RED)) == ("on the left", "red")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(shows_red, 1.0), (lambda i: not shows_red(i), 0.0), (lambda i: True, 0.5), (lambda i: False, 0.5)],
)
def test_scores_of_the_wise_the_contrary_and_the_indifferent(labels: LabelStore, rule, expected: float) -> None:
    labels.set(RED, "red")
    test = score_label(STATS, RED, Honest(rule), labels=labels)
    assert test.balanced_accuracy == expected
    assert labels.tests(RED) == [test] and test.author == "honest"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2).filter(lambda pairs: len(dict(pairs)) == 2))
def test_balanced_accuracy_is_sklearns(pairs: list[tuple[bool, bool]]) -> None:
    truth, said = map(np.array, zip(*pairs, strict=True))
    right = truth == said
    test = counted(int(right[truth].sum()), int(truth.sum()), int(right[~truth].sum()), int((~truth).sum()))
    assert test.balanced_accuracy == pytest.approx(balanced_accuracy_score(truth, said))
    assert 0 <= test.interval[0] <= test.balanced_accuracy <= test.interval[1] <= 1


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_the_interval_is_newcombes_of_two_wilson_intervals(n: int, m: int, one: float, other: float) -> None:
    """Newcombe 1998, method 10, for the difference p − (1 − q), of which (p + q) / 2 is (difference + 1) / 2."""
    right, wrong = round(one * n), m - round(other * m)
    (l1, u1), (l2, u2) = (binomtest(count, of).proportion_ci(method="wilson") for count, of in ((right, n), (wrong, m)))
    difference = right / n - wrong / m
    low = difference - np.hypot(right / n - l1, u2 - wrong / m)
    high = difference + np.hypot(u1 - right / n, wrong / m - l2)
    interval = counted(right, n, m - wrong, m).interval
    assert interval == pytest.approx((max((low + 1) / 2, 0), min((high + 1) / 2, 1)), abs=1e-9)


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    """Exact: every outcome, weighted by its probability, over a grid of true rates."""
    intervals = np.array([[counted(i, n, j, n).interval for j in range(n + 1)] for i in range(n + 1)])
    rates = np.linspace(0.02, 0.98, 25)
    covered = []
    for one, other in itertools.product(rates, rates):
        chance = np.outer(binom.pmf(range(n + 1), n, one), binom.pmf(range(n + 1), n, other))
        truth = (one + other) / 2
        covered.append((chance * ((intervals[..., 0] <= truth) & (truth <= intervals[..., 1]))).sum())
    assert 0.945 <= np.mean(covered) <= 0.965
    assert min(covered) >= 0.87


@pytest.mark.parametrize(
    ("feature", "n", "message"),
    [
        (LEFT, 20, "Latent 1 has no label that could be tested"),
        (DEAD, 20, "needs 10 held-out images on which latent 3 is active .* there are 0 and"),
        (EVERYWHERE, 20, r"there are \d+ and 0"),
        (RARE, 2, "there are 0 and"),
        (RED, 7, "n must be a multiple of 2"),
        (RED, 0, "n must be a multiple of 2"),
        (99, 20, "No latent 99 in world"),
    ],
)
def test_tests_that_cannot_be_are_refused(labels: LabelStore, feature: int, n: int, message: str) -> None:
    for named in (RED, DEAD, EVERYWHERE, RARE):
        labels.set(named, "red")
    judge = Honest(shows_red)
    for take in (lambda: test_label(STATS, feature, labels=labels, n=n),
                 lambda: score_label(STATS, feature, judge, labels=labels, n=n)):  # fmt: skip
        with pytest.raises(KitError, match=message):
            take()
    assert not labels.tests() and not judge.asked


def test_a_judge_must_answer_for_every_picture(labels: LabelStore) -> None:
    labels.set(RED, "red")
    judge = Honest(shows_red)
    judge.judge = lambda text, images: [True]
    with pytest.raises(KitError, match="honest gave 1 answers for 20 pictures"):
        score_label(STATS, RED, judge, labels=labels)
    assert not labels.tests()


def test_the_form_gives_nothing_away_before_the_check(form: BlindTest) -> None:
    images, _ = exactly(form)
    said = "".join(picture.value for picture in form.pictures) + form.children[0].value
    assert "something &lt;red&gt;" in said and len(form.pictures) == len(form.answers) == 12
    for image in images:
        assert not re.search(rf"scene {image}\b", said) and f"{STATS.values[image, RED]:.2f}" not in said
    for place, picture in enumerate(form.pictures, start=1):
        assert read_safely(picture.value).values("alt") == [f"Picture {place} of 12"]
    assert not any(answer.value for answer in form.answers)
    assert not any(mark in said for mark in ("✓", "✗", "not active"))
    assert not any(isinstance(child, ImageWidget) for child in form.pictures)


def test_a_checked_form_is_scored_saved_shut_and_explained(form: BlindTest, labels: LabelStore) -> None:
    images, active = exactly(form)
    ticked = active.copy()
    ticked[np.flatnonzero(active)[0]] = False  # one active missed
    ticked[np.flatnonzero(~active)[:2]] = True  # two inactive taken in
    for answer, value in zip(form.answers, ticked.tolist(), strict=True):
        answer.value = value
    form.check.click()
    assert form.result is not None
    (saved,) = labels.tests(RED)
    assert saved == form.result
    assert (saved.right_active, saved.n_active, saved.right_inactive, saved.n_inactive) == (5, 6, 4, 6)
    assert saved.balanced_accuracy == pytest.approx((5 / 6 + 4 / 6) / 2)
    assert (saved.text, saved.author, saved.evidence["images"]) == ("something <red>", user(), images)
    assert "balanced accuracy 0.75 (Newcombe" in form.notice.value.replace("&#x27;", "'")
    assert all(control.disabled for control in (*form.answers, form.check))
    for picture, is_active, right in zip(form.pictures, active, active == ticked, strict=True):
        told = read_safely(picture.value).text
        assert told.startswith("✓ right" if right else "✗ wrong") and ("not active" in told) == (not is_active)


def test_who_took_a_test_never_meets_its_pictures_again(labels: LabelStore) -> None:
    labels.set(RED, "red")
    met: set[int] = set()
    for _ in range(3):
        form = test_label(STATS, RED, labels=labels, n=6)
        images, _ = exactly(form)
        assert not met & set(images)
        met |= set(images)
        form.answers[0].value = True
        form.check.click()
    assert len(labels.tests(RED)) == 3
    with pytest.raises(KitError, match="nobody was shown"):
        for _ in range(50):
            form = test_label(STATS, RED, labels=labels, n=6)
            form.answers[0].value = True
            form.check.click()


def test_a_form_that_cannot_save_says_so_and_reveals_nothing(form: BlindTest, labels: LabelStore, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError("no <space>")

    monkeypatch.setattr(LabelStore, "add_test", full)
    form.answers[0].value = True
    form.check.click()
    assert form.notice.value == "Not saved: no &lt;space&gt;" and form.result is None
    assert not form.check.disabled and "active" not in read_safely(form.pictures[0].value).text


def test_the_static_copy_tells_the_latest_score_of_this_text_and_shows_no_picture(labels: LabelStore) -> None:
    nasty = '"><script>alert(1)</script>'
    labels.set(RED, nasty)
    form = test_label(STATS, RED, labels=labels, n=6)
    bundle = form._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "not tested yet" in bundle["text/html"] and "<script" not in bundle["text/html"]
    score_label(STATS, RED, Honest(shows_red), labels=labels, n=6)
    score_label(STATS, RED, Honest(lambda i: True), labels=labels, text="another", n=6)
    told = read_safely(form._repr_mimebundle_()["text/html"])
    assert "balanced accuracy 1.00" in told.text and nasty in told.text and "img" not in told.tags


def test_automatic_labels_are_right_where_there_is_something_to_name(labels: LabelStore) -> None:
    tests = {test.feature: test for test in auto_label(STATS, [RED, LEFT, NOISE], WorldLabeller(), labels=labels, n=12)}
    assert labels.all() | {NOISE: ""} == {RED: "colour red", LEFT: "position on the left", NOISE: ""}
    assert tests[RED].balanced_accuracy >= 0.9
    assert tests[NOISE].interval[0] <= 0.5 <= tests[NOISE].interval[1], "a name for noise tells nothing"
    control = score_label(STATS, RED, WorldLabeller(), labels=labels, text="background teal", n=12)
    assert control.interval[0] <= 0.5 <= control.interval[1]
    assert all(label.author == "tiny-judge" for label in labels.history())


def test_names_come_from_training_images_and_evidence_says_which(labels: LabelStore) -> None:
    labeller = Honest(shows_red)
    auto_label(STATS, [RED], labeller, labels=labels)
    active, inactive = labeller.named_from
    assert len(active) == len(inactive) == SHOWN
    assert all(shows_red(e.image) for e in active) and not any(shows_red(e.image) for e in inactive)
    shown = [example.image for example in (*active, *inactive)]
    assert not HELD_OUT[shown].any() and labels.latest(RED).evidence["images"] == shown
    values = STATS.image_activations()[:, RED]
    assert min(e.value for e in active) == np.sort(values[~HELD_OUT])[-SHOWN]
    assert not set(shown) & set(labeller.asked[0][1])


def test_automatic_labels_replace_nobodys_word_and_go_on_after_a_break(labels: LabelStore, capsys) -> None:
    labels.set(LEFT, "mine")
    labeller = Honest(shows_red)

    def fails(text, images):
        raise KitError("The endpoint is gone.")

    labeller.judge = fails
    with pytest.raises(KitError, match="gone"):
        auto_label(STATS, [RED, LEFT, NOISE], labeller, labels=labels)
    assert labels.all() == {RED: "a name", LEFT: "mine"} and not labels.tests()
    del labeller.judge
    tests = auto_label(STATS, [RED, LEFT, NOISE], labeller, labels=labels)
    assert [test.feature for test in tests] == [RED, NOISE] and len(labels.history(RED)) == 1
    labels.withdraw(RED, author="me")
    assert auto_label(STATS, [RED, LEFT, NOISE], labeller, labels=labels) == []
    assert labels.get(RED) is None, "a name that was refused does not come back"


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_person_who_speaks_while_it_runs_is_not_overruled(labels: LabelStore, capsys, moment: str) -> None:
    labeller, asked = Honest(shows_red), []

    def names(examples, contrast) -> str:
        asked.append(len(asked))
        if len(asked) == 1:
            labels.set(NOISE if moment == "before" else RED, "a person's", author="person")
        return "a name"

    labeller.label = names
    tests = auto_label(STATS, [RED, NOISE], labeller, labels=labels, n=12)
    theirs, other = (NOISE, RED) if moment == "before" else (RED, NOISE)
    assert labels.all() == {theirs: "a person's", other: "a name"}
    assert len(labels.history(theirs)) == 1 and [test.feature for test in tests] == [other]
    assert len(asked) == (1 if moment == "before" else 2), "nobody is asked for a name that is there"
    assert "1 of them are active on too few images" in "".join(capsys.readouterr())


def test_a_name_taken_back_while_others_are_tested_is_passed_over(labels: LabelStore) -> None:
    labeller = Honest(shows_red)
    for feature in (RED, NOISE):
        labels.set(feature, "a name", author=labeller.name)
    judge = labeller.judge

    def judges(text, images):
        if labels.get(NOISE):
            labels.withdraw(NOISE, author="person")
        return judge(text, images)

    labeller.judge = judges
    assert [test.feature for test in auto_label(STATS, [RED, NOISE], labeller, labels=labels, n=12)] == [RED]
    assert labels.all() == {RED: "a name"}


def test_one_latent_is_tested_without_the_matrix_of_all(labels: LabelStore, monkeypatch) -> None:
    monkeypatch.delattr(type(STATS), "image_activations")
    monkeypatch.setattr("sdxl_sae_kit.features.FeatureStats.image_activations", None)
    assert len(auto_label(STATS, [RED], WorldLabeller(), labels=labels, n=6)) == 1
    form = test_label(STATS, RED, labels=labels, n=6)
    form.answers[0].value = True
    form.check.click()
    assert form.result is not None and "active" in read_safely(form.pictures[0].value).text


@pytest.mark.parametrize("feature", ["1", 1.5, None, True, -1])
def test_a_latent_is_a_number(labels: LabelStore, unchecked_types: None, feature: object) -> None:
    with pytest.raises(KitError, match="from 0 on, not"):
        test_label(STATS, feature, labels=labels)
    with pytest.raises(KitError, match="from 0 on, not"):
        auto_label(STATS, [feature], Honest(shows_red), labels=labels)


def test_a_whole_float_as_from_pandas_is_told_what_to_pass(labels: LabelStore, unchecked_types: None) -> None:
    for use in (labels.get, labels.history, labels.withdraw, labels.tests, lambda latent: labels.set(latent, "x")):
        with pytest.raises(KitError, match=r"not np.float64\(5.0\). Pass 5."):
            use(np.float64(5.0))
        for wrong in ("5", [5], float("nan"), float("inf")):
            with pytest.raises(KitError, match=f"from 0 on, not {re.escape(repr(wrong))}.$"):
                use(wrong)


@pytest.mark.parametrize("wrong", [{"features": STATS}, object(), None])
def test_what_is_no_statistics_is_named(labels: LabelStore, unchecked_types: None, wrong: object) -> None:
    judge, told = Honest(shows_red), "takes FeatureStats, .*, not "
    for caller, use in {
        "LabelStore.of": lambda: LabelStore.of(wrong),
        "test_label": lambda: test_label(wrong, RED),
        "score_label": lambda: score_label(wrong, RED, judge, labels=labels),
        "auto_label": lambda: auto_label(wrong, [RED], judge),
    }.items():
        with pytest.raises(KitError, match=f"{caller} {told}"):
            use()


def test_where_labels_are_is_no_path(unchecked_types: None) -> None:
    judge, where = Honest(shows_red), "mine.jsonl"
    for use in (lambda: test_label(STATS, RED, labels=where),
                lambda: score_label(STATS, RED, judge, labels=where),
                lambda: auto_label(STATS, [RED], judge, labels=where)):  # fmt: skip
        with pytest.raises(KitError, match=r"takes a LabelStore, .* as labels, not 'mine.jsonl'"):
            use()


@pytest.mark.parametrize("wrong", [WorldLabeller, None, "gpt"])
def test_a_labeller_is_one(labels: LabelStore, unchecked_types: None, wrong: object) -> None:
    labels.set(RED, "red")
    with pytest.raises(KitError, match=r"auto_label: labeller is one such as WorldLabeller\(\), not "):
        auto_label(STATS, [RED], wrong, labels=labels)
    with pytest.raises(KitError, match=r"score_label: judge is one such as WorldLabeller\(\), not "):
        score_label(STATS, RED, wrong, labels=labels)


def test_auto_label_looks_at_what_it_is_given_before_it_names(
    labels: LabelStore, unchecked_types: None, capsys
) -> None:
    labeller = Honest(shows_red)
    for features, n, message in [
        (130, 20, "auto_label takes a list as features, not 130"),
        ("ab", 20, "features are several latents, .* not 'ab'"),
        (["x"], 20, "A latent is an integer from 0 on, not 'x'"),
        ([RED], 3, "auto_label: n must be a multiple of 2 of at least 2, not 3"),
    ]:
        with pytest.raises(KitError, match=message):
            auto_label(STATS, features, labeller, labels=labels, n=n)
    assert auto_label(STATS, [], labeller, labels=labels) == []
    told = capsys.readouterr()
    assert "nothing to do" in told.out + told.err and "names" not in told.out + told.err
    assert not labels.file.exists() and not labeller.asked


@pytest.mark.parametrize("text", ["", "  ", 7])
def test_an_empty_text_is_no_text_to_test(labels: LabelStore, unchecked_types: None, text: object) -> None:
    labels.set(RED, "red")
    judge = Honest(shows_red)
    with pytest.raises(KitError, match="A label|takes a text"):
        score_label(STATS, RED, judge, labels=labels, text=text)
    assert not judge.asked and not labels.tests()


def test_a_cache_without_pictures_is_called_so(labels: LabelStore, monkeypatch) -> None:
    monkeypatch.setattr(type(STATS), "pictured", np.arange(0))
    labels.set(RED, "red")
    judge = Honest(shows_red)
    for use in (lambda: test_label(STATS, RED, labels=labels),
                lambda: score_label(STATS, RED, judge, labels=labels),
                lambda: auto_label(STATS, [RED], judge, labels=labels)):  # fmt: skip
        with pytest.raises(KitError, match="No pictures are kept .* images='thumbnails' and measure again"):
            use()


def test_ticking_none_is_asked_about_once_and_a_test_is_saved_once(form: BlindTest, labels: LabelStore) -> None:
    assert repr(form) == "BlindTest(latent 0, 'something <red>': not checked yet)"
    form.check.click()
    assert form.notice.value == "You ticked none. Press Check again to save that."
    assert form.result is None and not labels.tests() and not form.check.disabled
    for _ in range(2):
        form.check.click()
    (saved,) = labels.tests()
    assert saved == form.result and saved.balanced_accuracy == 0.5
    assert len(repr(form)) < 300 and "balanced accuracy 0.50" in repr(form)


def test_what_will_be_sent_where_is_said_before(labels: LabelStore, capsys) -> None:
    labeller = Honest(shows_red)
    labeller.where = "to https://example.org/v1"
    said = []
    labeller.label = lambda examples, contrast: said.append(capsys.readouterr()) or "a name"
    auto_label(STATS, np.array([RED, RARE, DEAD, EVERYWHERE, RED]), labeller, labels=labels, n=20)
    before = said[0].out + said[0].err
    assert "honest names 4 latents, each from up to 24 pictures, and tests 4 labels on 20 each" in before
    assert f"at most {4 * 24 + 4 * 20} pictures, no prompts" in before
    assert "The pictures go to https://example.org/v1." in before
    after = capsys.readouterr()
    assert "3 of them are active on too few images" in after.out + after.err


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.sampled_from([2, 6, 10]))
def test_every_draw_is_fair(tmp_path_factory, seed: int, n: int) -> None:
    labels = LabelStore.of(STATS, tmp_path_factory.mktemp("labels"))
    labels.set(RED, "red")
    judge = Honest(shows_red)
    test = score_label(STATS, RED, judge, labels=labels, n=n, seed=seed)
    assert test.n_active == test.n_inactive == n / 2 and HELD_OUT[judge.asked[0][1]].all()
