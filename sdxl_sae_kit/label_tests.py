"""Label tests: a label is believed as far as it lets somebody who knows nothing else tell active images from others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, get_args

import ipywidgets as widgets
import numpy as np
from jaxtyping import Bool, Int
from PIL import Image
from tqdm.auto import tqdm

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import counted, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.features import Example, FeatureStats, Ranking
from sdxl_sae_kit.forms import line, widget
from sdxl_sae_kit.label_lines import latent, tidy
from sdxl_sae_kit.labellers import LabelJudge, Labeller
from sdxl_sae_kit.labels import Label, LabelStore, LabelTest, check_stats, user
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.sae import FIRES

SHOWN = 12
"""Images of each kind, active and inactive, from which a labeller names a latent."""
_SIDE = 160  # pixels of a picture in the form
_FORMULA = "It is (right active / active + right inactive / inactive) / 2; activations are maxima over the image"


@checked
def test_label(
    stats: FeatureStats,
    feature: SupportsIndex,
    *,
    labels: LabelStore | None = None,
    n: int = 20,
    seed: int = 0,
) -> BlindTest:
    """Test a latent's label in a notebook: n held-out pictures, half of them active, shuffled, without any hint.

    The active half is spread over all strengths. Pictures that the label's author was shown, that a gallery shows of
    this latent, or that you saw in an earlier test of it are left out. The result is saved in `labels`.

    Args:
        stats: of the SAE.
        feature: the latent; it must have a label.
        labels: where labels are and the result goes; by default the file of this SAE in the store of `stats`.
        n: pictures, an even number from 2 on.
        seed: for the choice and the order of the pictures.

    Raises:
        KitError: the latent has no label, no pictures were kept, there are too few held-out images on which it is
            active or inactive, or n is odd.

    >>> kit.test_label(stats, 17)            # doctest: +SKIP
    """
    return BlindTest(stats, feature, _store("test_label", stats, labels), n, seed)


test_label.__test__ = False  # type: ignore[attr-defined]  # its name is no reason for pytest to collect it


@checked
def score_label(
    stats: FeatureStats,
    feature: SupportsIndex,
    judge: LabelJudge,
    *,
    labels: LabelStore | None = None,
    text: str | None = None,
    n: int = 20,
    seed: int = 0,
) -> LabelTest:
    """The same test, taken by a judge that answers for each picture whether it shows what the label says; saved too.

    Args:
        stats, feature, labels, n, seed: as for `test_label`; the same seed shows the same pictures, whatever the text.
        judge: such as a WorldLabeller.
        text: another text to test on this latent, such as another latent's label as a control.

    Raises:
        KitError: as for `test_label`; `text` is empty; or the judge is none, or gave another number of answers than
            there were pictures.

    >>> kit.score_label(stats, 17, WorldLabeller()).balanced_accuracy            # doctest: +SKIP
    """
    labels = _store("score_label", stats, labels)
    if isinstance(judge, type) or not isinstance(judge, LabelJudge):
        raise KitError(f"score_label: judge is one such as WorldLabeller(), not {judge!r}.")
    feature = _known_latent(stats, feature)
    label = labels.latest(feature)
    text = tidy(text if text is not None else _needed(label, feature).text or "")
    drawn = _draw(stats, feature, n, seed, _shown(stats, feature, label))
    answers = judge.judge(text, [decode_picture(stats.thumbnail(image)) for image in drawn.images.tolist()])
    if len(answers) != len(drawn.images):
        raise KitError(f"{judge.name} gave {len(answers)} answers for {len(drawn.images)} pictures. Mend its judge.")
    return _save(labels, stats, feature, text, drawn, np.array(answers, dtype=bool), judge.name)


@checked
def auto_label(
    stats: FeatureStats,
    features: Iterable[SupportsIndex],
    labeller: Labeller,
    *,
    labels: LabelStore | None = None,
    n: int = 20,
) -> list[LabelTest]:
    """Let a labeller name latents from their strongest training images, and test each name on held-out images.

    Labels and tests are saved one by one with the labeller's name as author: after a break the same call goes on.
    Latents that have a label, also one given while this runs, or that this labeller has named before, are passed over,
    so that nobody's word is replaced; only a missing test is made up for.

    Args:
        stats: of the SAE.
        features: latents.
        labeller: such as a WorldLabeller.
        labels: where labels and tests go; by default the file of this SAE in the store of `stats`.
        n: pictures of each test, an even number from 2 on.

    Returns:
        The tests made now. Latents with too few images for a test are named, but not tested; a line says how many.

    Raises:
        KitError: the SAE has no such latent, no pictures were kept, n is odd, or the labeller is none or failed; what
            was saved before stays.

    >>> kit.auto_label(stats, stats.alive[:20], WorldLabeller())            # doctest: +SKIP
    """
    labels = _store("auto_label", stats, labels)
    if isinstance(labeller, type) or not isinstance(labeller, Labeller):
        raise KitError(f"auto_label: labeller is one such as WorldLabeller(), not {labeller!r}.")
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise KitError(f"auto_label: features are several latents, such as [3, 17], not {features!r}.")
    n = whole_number("auto_label: n", n, least=2, multiple_of=2)
    to_name, to_test = _undone(stats, features, labels, labeller.name)
    if not to_name and not to_test:
        tqdm.write("auto_label: nothing to do. No latent was given that has no label or waits for its test.")
        return []
    pictures = len(to_name) * 2 * SHOWN + (len(to_name) + len(to_test)) * n
    tqdm.write(
        f"{labeller.name} names {counted(len(to_name), 'latents')}, each from up to {2 * SHOWN} pictures, and tests "
        f"{counted(len(to_name) + len(to_test), 'labels')} on {n} each: at most {pictures:,} pictures, no prompts. "
        f"The pictures go {labeller.where}."
    )
    tests = []
    for feature in tqdm(to_test + to_name, desc="auto_label", unit="latent"):
        if feature in to_name and labels.latest(feature) is None:
            _name(stats, feature, labeller, labels)
        label = labels.latest(feature)
        if label is None or label.author != labeller.name:  # too few images, or somebody has spoken since
            continue
        if _is_testable(stats, feature, n, _shown(stats, feature, label)):
            tests.append(score_label(stats, feature, labeller, labels=labels, text=label.text, n=n))
    if untested := len(to_test) + len(to_name) - len(tests):
        tqdm.write(
            f"{untested:,} of them are active on too few images, or on too many, for a name or a test of {n}, or were "
            "labelled by somebody else in the meantime."
        )
    return tests


class BlindTest(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """The form of one test; made by `test_label`. `result` is None until it was checked."""

    def __init__(self, stats: FeatureStats, feature: SupportsIndex, labels: LabelStore, n: int, seed: int) -> None:
        self._stats, self._labels, self._feature = stats, labels, _known_latent(stats, feature)
        label = _needed(labels.latest(self._feature), self._feature)
        self.text = label.text or ""
        seen = _shown(stats, self._feature, label) | _met(labels, self._feature)
        self._drawn = _draw(stats, self._feature, n, seed, seen)
        self.result: LabelTest | None = None
        self._asked = False  # whether ticking none is meant
        self.pictures = [widget(widgets.HTML, "picture", _SIDE) for _ in self._drawn.images]
        self.answers = [
            widget(widgets.Checkbox, "shows", _SIDE, description=f"{place} shows it", indent=False)
            for place in range(1, n + 1)
        ]
        self.check = widget(widgets.Button, "check", 100, description="Check", button_style="primary")
        self.notice = widget(widgets.HTML, "notice")
        ask = (
            f"Tick every picture that shows this. {n // 2} of the {n} make latent {self._feature} active somewhere, "
            "the others nowhere; all are held-out images that its label was not made from."
        )
        heading = widgets.HTML(html.fragment(html.heading(self.text, ask)))
        tiles = [widgets.VBox(pair) for pair in zip(self.pictures, self.answers, strict=True)]
        super().__init__([heading, line(tiles), line([self.check, self.notice])])
        for place, (image, picture) in enumerate(zip(self._drawn.images.tolist(), self.pictures, strict=True), start=1):
            picture.value = html.picture(_enlarged(stats.thumbnail(image)), f"Picture {place} of {n}")
        self.check.on_click(lambda button: self._check())

    def __repr__(self) -> str:
        return f"BlindTest(latent {self._feature}, {self.text!r}: {self.result or 'not checked yet'})"

    def static_html(self) -> str:
        """What stands here without a kernel: the label and how its latest test ended; it shows no picture."""
        tests = [test for test in self._labels.tests(self._feature) if test.text == self.text]
        told = str(tests[-1]) if tests else "not tested yet"
        heading = html.heading(f"Latent {self._feature} · {self.text}", f"Latest label test: {html.words(told)}.")
        return html.fragment(html.quiet("Static copy: take the test in JupyterLab."), heading)

    def _check(self) -> None:
        if self.result is not None:
            return
        said = np.array([answer.value for answer in self.answers], dtype=bool)
        if not said.any() and not self._asked:
            self._asked = True
            self.notice.value = "You ticked none. Press Check again to save that."
            return
        try:
            self.result = _save(self._labels, self._stats, self._feature, self.text, self._drawn, said, user())
        except (KitError, OSError) as error:
            self.notice.value = f"Not saved: {html.escape(error)}"
            return
        for control in (*self.answers, self.check):
            control.disabled = True
        self._reveal(said)
        self.notice.value = f"Saved: {html.escape(self.result)}. {_FORMULA}."

    def _reveal(self, said: Bool[np.ndarray, " picture"]) -> None:
        values = self._stats.strengths(self._feature)[self._drawn.images]
        for picture, value, active, shows in zip(
            self.pictures, values.tolist(), self._drawn.active.tolist(), said.tolist(), strict=True
        ):
            truth = f"active, {html.short(value)}" if active else "not active"
            picture.value += f"<div>{'✓ right' if active == shows else '✗ wrong'}: {truth}</div>"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = super()._repr_mimebundle_(**options)
        return {**bundle, "text/html": self.static_html()}


@dataclass(frozen=True)
class _Drawn:
    """Images of a test, in the order in which they are shown."""

    images: Int[np.ndarray, " picture"]
    active: Bool[np.ndarray, " picture"]


def _draw(stats: FeatureStats, feature: int, n: int, seed: int, seen: set[int]) -> _Drawn:
    """Half of them active, one from each stratum of strength, half not; neither from `seen`. Raises KitError."""
    half = whole_number("test_label: n", n, least=2, multiple_of=2) // 2
    active, inactive = _held_out(stats, feature, seen)
    if not _is_testable(stats, feature, n, seen):
        raise KitError(
            f"A test of {n} pictures needs {half} held-out images on which latent {feature} is active and {half} on "
            f"which it is not, that nobody was shown with its label; there are {len(active)} and {len(inactive)}. "
            "Pass a smaller even n, or measure more images, collected with thumbnails."
        )
    rng = np.random.default_rng([whole_number("test_label: seed", seed, least=0), feature])
    chosen = [rng.choice(stratum) for stratum in np.array_split(active, half)]
    images = np.concatenate([chosen, rng.choice(inactive, half, replace=False)])
    order = rng.permutation(n)
    return _Drawn(images[order], order < half)


def _is_testable(stats: FeatureStats, feature: int, n: int, seen: set[int]) -> bool:
    return all(len(images) >= n // 2 for images in _held_out(stats, feature, seen))


def _held_out(
    stats: FeatureStats, feature: int, seen: set[int]
) -> tuple[Int[np.ndarray, " active"], Int[np.ndarray, " inactive"]]:
    """Pictured held-out images but those seen: with the latent active, weakest first, and without."""
    return _split(stats, feature, np.setdiff1d(stats.pictured[stats.prompts.held_out[stats.pictured]], list(seen)))


def _split(
    stats: FeatureStats, feature: int, images: Int[np.ndarray, " image"]
) -> tuple[Int[np.ndarray, " active"], Int[np.ndarray, " inactive"]]:
    values = stats.strengths(feature)[images]
    ordered = images[np.argsort(values, kind="stable")]
    n_inactive = int((values <= FIRES).sum())
    return ordered[n_inactive:], ordered[:n_inactive]


def _shown(stats: FeatureStats, feature: int, label: Label | None) -> set[int]:
    """Images that the label's author was shown, by the label's evidence or in a gallery."""
    examples = [example for by in get_args(Ranking) for example in stats.examples(feature, by)]
    return {example.image for example in examples + stats.sample(feature)} | _images(label)


def _met(labels: LabelStore, feature: int) -> set[int]:
    """Images that the user saw in earlier tests of this latent, and was then told the truth of."""
    mine = [test for test in labels.tests(feature) if test.author == user()]
    return {image for test in mine for image in _images(test)}


def _images(said: Label | LabelTest | None) -> set[int]:
    named = (said.evidence or {}).get("images", []) if said else []
    return {image for image in named if isinstance(image, int)} if isinstance(named, list) else set()


def _save(
    labels: LabelStore,
    stats: FeatureStats,
    feature: int,
    text: str,
    drawn: _Drawn,
    said: Bool[np.ndarray, " picture"],
    author: str,
) -> LabelTest:
    right = said == drawn.active
    return labels.add_test(
        feature,
        text,
        right_active=int(right[drawn.active].sum()),
        n_active=int(drawn.active.sum()),
        right_inactive=int(right[~drawn.active].sum()),
        n_inactive=int((~drawn.active).sum()),
        evidence={
            "stats": stats.artifact.folder.name,
            "images": drawn.images.tolist(),
            "said": "".join(np.where(said, "y", "n")),
        },
        author=author,
    )


def _undone(
    stats: FeatureStats, features: Iterable[SupportsIndex], labels: LabelStore, author: str
) -> tuple[list[int], list[int]]:
    """The latents that this labeller has to name, and those whose names by it were never tested."""
    named = {label.feature for label in labels.history() if label.author == author}
    tested = {(test.feature, test.text) for test in labels.tests() if test.author == author}
    wanted = list(dict.fromkeys(_known_latent(stats, feature) for feature in features))
    newest = {feature: labels.latest(feature) for feature in wanted}
    to_name = [feature for feature, label in newest.items() if label is None and feature not in named]
    to_test = [
        feature
        for feature, label in newest.items()
        if label is not None and label.author == author and (feature, label.text) not in tested
    ]
    return to_name, to_test


def _name(stats: FeatureStats, feature: int, labeller: Labeller, labels: LabelStore) -> None:
    """Let the labeller name a latent from training images, which no test shows, if they tell it apart."""
    active, inactive = _split(stats, feature, stats.pictured[~stats.prompts.held_out[stats.pictured]])
    if not len(active) or not len(inactive):
        return
    rng = np.random.default_rng(feature)
    strongest, others = active[::-1][:SHOWN], rng.permutation(inactive)[:SHOWN]
    text = labeller.label(_examples(stats, feature, strongest), _examples(stats, feature, others))
    shown = {"stats": stats.artifact.folder.name, "shown": "strongest training images by max, and inactive ones",
             "images": [*strongest.tolist(), *others.tolist()]}  # fmt: skip
    labels.suggest(feature, text, evidence=shown, author=labeller.name)


def _examples(stats: FeatureStats, feature: int, images: Sequence[int] | Int[np.ndarray, " image"]) -> list[Example]:
    values = stats.strengths(feature)
    return [
        Example(
            int(image),
            stats.prompts.texts[image],
            stats.prompts.seeds[image],
            float(values[image]),
            stats.heat_map(feature, int(image)),
            stats.thumbnail(int(image)),
        )
        for image in images
    ]


def _store(caller: str, stats: FeatureStats, labels: LabelStore | None) -> LabelStore:
    """Where labels are, once it is certain that there are pictures to show. Raises KitError."""
    check_stats(caller, stats)
    if labels is not None and not isinstance(labels, LabelStore):
        raise KitError(f"{caller}: labels is a LabelStore, such as LabelStore(Path('mine.jsonl')), not {labels!r}.")
    if labels is not None and labels.sae not in (None, stats.sae):
        raise KitError(f"{caller}: the labels are of {labels.sae}, but the statistics of {stats.sae}. Pass its own.")
    if not len(stats.pictured):
        raise KitError(f"No pictures are kept for {stats.sae}. Collect with images='thumbnails' and measure again.")
    return labels or LabelStore.of(stats)


def _needed(label: Label | None, feature: int) -> Label:
    if label is None:
        raise KitError(f"Latent {feature} has no label that could be tested. Give it one first, with labels.set.")
    return label


def _known_latent(stats: FeatureStats, feature: SupportsIndex) -> int:
    number = latent(feature)
    if number >= stats.d_sae:
        raise KitError(f"No latent {number} in {stats.sae}; it has 0 to {stats.d_sae - 1:,}.")
    return number


def _enlarged(thumbnail: bytes) -> bytes:
    picture: Image.Image = decode_picture(thumbnail)
    factor = _SIDE / max(picture.size)
    return html.to_webp(picture.resize([round(side * factor) for side in picture.size], Image.Resampling.BICUBIC))
