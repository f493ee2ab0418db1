"""steering_panels: what is shown is what steer draws, the code draws it again, and nothing is lost on the way.

The widgets are driven without a browser.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_events import draw, move
from payloads import NASTY
from PIL import Image
from reading_html import Reader, read_safely

import sdxl_sae_kit as kit
from sdxl_sae_kit.differences import TOPS, Difference, top_of
from sdxl_sae_kit.edits import read_edits
from sdxl_sae_kit.errors import EditError, KitError
from sdxl_sae_kit.explorer import Drawn
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.steering_panels import SteeringPanel, steering_panel
from sdxl_sae_kit.steering_rows import VERBS, Change
from sdxl_sae_kit.steerings import Steering, random_direction

PROMPT, OTHER = "a large red circle on a black background", "a small blue star on the left"
LEFT = {"type": "rect", "x0": 0, "x1": 4, "y0": 0, "y1": 8}


@pytest.fixture
def panel(pipe: Any, small_saes: Any) -> SteeringPanel:
    return steering_panel(pipe, small_saes, PROMPT, seed=3, features={"up.0.1": strongest(pipe, small_saes, 2)})


def strongest(pipe: Any, saes: Any, n: int) -> list[int]:
    """Latents of up.0.1 that are strongest in PROMPT's picture, by their own formula."""
    code = Drawn.of(pipe, ["up.0.1"], PROMPT, 3).code(saes["up.0.1", "k8"], 0)
    peaks = code.max(axis=(0, 1)) / np.maximum(saes["up.0.1", "k8"].mean_activation.numpy(), 1e-9)
    return [int(latent) for latent in np.argsort(-peaks)[:n]]


def row(panel: SteeringPanel, at: int = 0) -> Any:
    return panel.rows.listed.children[at]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def run(panel: SteeringPanel, pipe: Any, saes: Any) -> np.ndarray:
    """The picture that the panel's code draws."""
    names: dict[str, Any] = {"pipe": pipe, "saes": saes}
    exec(panel.code.value, names)
    return pixels(names["image"])


def test_the_first_feature_is_turned_off_and_the_others_are_as_they_are(
    pipe: Any, small_saes: Any, panel: SteeringPanel
) -> None:
    first, second = strongest(pipe, small_saes, 2)
    assert panel.rows.changes == (Change("up.0.1", first, "scale", 0), Change("up.0.1", second, "scale", 1))
    with kit.steer(pipe, small_saes["up.0.1", "k8"], scale={first: 0.0}):
        (expected,) = generate(pipe, [PROMPT], [3])
    assert np.array_equal(pixels(panel.steered.image), pixels(expected))
    (clean,) = generate(pipe, [PROMPT], [3])
    assert not np.array_equal(pixels(panel.steered.image), pixels(clean))
    row(panel).strength.value = 1
    assert np.array_equal(pixels(panel.steered.image), pixels(clean))
    assert "with" not in panel.code.value
    assert np.array_equal(run(panel, pipe, small_saes), pixels(clean))


@pytest.mark.parametrize(("verb", "strength"), [("scale", 2.3), ("add", -6.5), ("clamp", 4.0)])
def test_each_verb_with_a_mask_is_drawn_again_by_the_code_bit_for_bit(
    pipe: Any, small_saes: Any, panel: SteeringPanel, verb: str, strength: float
) -> None:
    row(panel).verb.value = verb
    row(panel).strength.value = strength
    everywhere = pixels(panel.steered.image)
    draw(panel.picture.figure, LEFT | {"x1": 3.4}, {"type": "path", "path": "M5,5L7,5L7,7"})
    assert np.array_equal(run(panel, pipe, small_saes), pixels(panel.steered.image))
    assert not np.array_equal(pixels(panel.steered.image), everywhere)
    with kit.steer(
        pipe, small_saes["up.0.1", "k8"], where=panel.picture.mask, **{verb: {row(panel).latent.value: strength}}
    ):
        (expected,) = generate(pipe, [PROMPT], [3])
    assert np.array_equal(pixels(panel.steered.image), pixels(expected))
    move(panel.picture.figure, 0, x1=8)
    assert np.array_equal(run(panel, pipe, small_saes), pixels(panel.steered.image))
    panel.picture.whole.click()
    assert np.array_equal(pixels(panel.steered.image), everywhere)


def test_two_blocks_at_chosen_steps_of_a_guided_model_are_drawn_again_by_the_code(small_saes: Any) -> None:
    base = load_pipeline("tiny-base", device="cpu", dtype="float32")
    listed = [small_saes["up.0.1", "k8"], small_saes["down.2.1", "k8"]]
    with pytest.warns(UserWarning, match="was trained on tiny-turbo"):
        shown = steering_panel(base, listed, PROMPT, features={"up.0.1": [3], "down.2.1": [5]})
    for at in (0, 1):
        row(shown, at).verb.value = "add"
        row(shown, at).strength.value = 10
    all_steps = pixels(shown.steered.image)
    shown.steps.value = (2, 6)
    assert shown.steps.layout.display is None
    assert "steps=[2, 3, 4, 5, 6]" in shown.code.value and "saes[1]" in shown.code.value
    assert not np.array_equal(pixels(shown.steered.image), all_steps)
    with pytest.warns(UserWarning, match="was trained on tiny-turbo"):
        assert np.array_equal(run(shown, base, listed), pixels(shown.steered.image))


def test_one_step_needs_no_choice_of_steps(panel: SteeringPanel) -> None:
    assert panel.steps.layout.display == "none"
    assert "steps" not in panel.code.value


def test_the_clean_picture_is_drawn_once_for_each_prompt_and_seed(
    panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    original = Drawn.of
    monkeypatch.setattr(Drawn, "of", lambda *asked: drawn.append(asked[2:]) or original(*asked))
    row(panel).strength.value = 3
    panel.random.value = True
    draw(panel.picture.figure, LEFT)
    assert drawn == []
    panel.prompt.value = OTHER
    panel.seed.value = 4
    assert drawn == [(OTHER, 3), (OTHER, 4)]
    assert (panel.steered.asked.prompt, panel.steered.asked.seed) == (OTHER, 4)
    assert panel.picture.mask is not None


def test_what_arrives_while_something_is_drawn_is_drawn_once_as_it_then_stands(
    panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    original = Steering.draw
    monkeypatch.setattr(
        Steering, "draw", lambda self, *rest: drawn.append(self.changes[0].strength) or original(self, *rest)
    )

    async def slide() -> None:
        for strength in (2.0, 3.0, 4.0, 5.0):  # as a kernel hears of them, one after the other
            row(panel).strength.value = strength
        await asyncio.sleep(0.2)
        while panel._timer is not None:
            await asyncio.sleep(0.05)

    asyncio.run(slide())
    assert drawn == [5.0]
    assert panel.steered.asked.changes[0].strength == 5.0


def test_random_directions_are_as_long_as_the_features_and_stand_beside_them(
    pipe: Any, small_saes: Any, panel: SteeringPanel
) -> None:
    sae, latent = small_saes["up.0.1", "k8"], row(panel).latent.value
    direction = random_direction(sae, latent, 0)
    assert np.linalg.norm(direction) == pytest.approx(float(sae.directions[latent].norm()), rel=1e-5)
    features = pixels(panel.steered.image)
    panel.random.value = True
    with kit.steer(pipe, sae, scale={latent: 0.0}, along={latent: direction}):
        (expected,) = generate(pipe, [PROMPT], [3])
    first = pixels(panel.control.image)
    assert np.array_equal(first, pixels(expected))
    assert np.array_equal(pixels(panel.steered.image), features) and not np.array_equal(first, features)
    assert "After, random direction" in Reader(panel.result.value).text
    panel.another.click()
    assert not np.array_equal(pixels(panel.control.image), first)
    panel.random.value = False
    assert "random direction" not in Reader(panel.result.value).text and panel.another.disabled


def test_numbers_are_those_of_the_pictures(panel: SteeringPanel) -> None:
    draw(panel.picture.figure, LEFT)
    before, after = (pixels(image).astype(float) for image in (panel.clean.image, panel.steered.image))
    change = np.abs(after - before).mean(axis=2) / 255
    text = Reader(panel.result.value).text

    def shown(name: str) -> float:
        return float(re.search(re.escape(name) + r"\s*([\d.e-]+)", text)[1])  # type: ignore[index]

    assert shown("mean |change|") == pytest.approx(change.mean(), rel=6e-3)
    assert shown("largest |change|") == pytest.approx(change.max(), rel=6e-3)
    assert shown("mean |change| inside the mask") == pytest.approx(change[:, :32].mean(), rel=6e-3)
    assert shown("mean |change| outside the mask") == pytest.approx(change[:, 32:].mean(), rel=6e-3)
    assert shown("share of |change| inside the mask") == pytest.approx(
        100 * change[:, :32].sum() / change.sum(), rel=6e-3
    )
    assert shown("share of the picture inside the mask") == 50
    top = min(each for each in TOPS if each >= change.max())
    assert f"0  {top:#.3g}" in text


def test_a_map_is_black_where_nothing_changed_and_brightest_at_its_top() -> None:
    before = Image.new("RGB", (3, 1))
    after = before.copy()
    after.putpixel((1, 0), (51, 51, 51))  # a fifth of the range
    after.putpixel((2, 0), (255, 255, 255))
    difference = Difference.between(before, after)
    assert difference.change[0].tolist() == pytest.approx([0, 0.2, 1])
    drawn = pixels(difference.map(0.2))[0]
    assert drawn[0].tolist() == [0, 0, 0] and drawn[1].tolist() == drawn[2].tolist() == [252, 255, 164]
    assert top_of([difference]) == 1 and top_of([Difference.between(before, before)]) == TOPS[0]
    nowhere = Difference.between(before, before, np.zeros((1, 3))).numbers()
    assert nowhere["share of |change| inside the mask"] is None and nowhere["mean |change| inside the mask"] is None
    with pytest.raises(KitError, match="cannot be compared"):
        Difference.between(before, Image.new("RGB", (2, 2)))


def test_rows_are_added_up_to_eight_and_taken_away(panel: SteeringPanel) -> None:
    while not panel.rows.add.disabled:
        panel.rows.add.click()
    changes = panel.rows.changes
    assert len(changes) == len({(change.hookpoint, change.latent) for change in changes}) == 8
    assert all(change.strength == 1 for change in changes[1:])  # a new row changes nothing yet
    row(panel).remove.click()
    assert panel.rows.changes == changes[1:] and not panel.rows.add.disabled
    assert np.array_equal(pixels(panel.steered.image), pixels(panel.clean.image))


def test_without_features_the_strongest_of_the_picture_are_offered(pipe: Any, small_saes: Any) -> None:
    changes = steering_panel(pipe, small_saes, PROMPT, seed=3).rows.changes
    assert len(changes) == 4
    assert [c.latent for c in changes if c.hookpoint == "up.0.1"] == strongest(pipe, small_saes, 2)


def test_another_block_has_other_numbers_and_another_verb_other_strengths(
    panel: SteeringPanel, small_saes: Any
) -> None:
    for name in ("add", "clamp", "scale"):
        row(panel).verb.value, verb = name, VERBS[name]
        slider = row(panel).strength
        assert (slider.min, slider.max, slider.step, slider.value) == (verb.least, verb.most, verb.step, verb.begin)
    row(panel).latent.value = 10**6
    assert row(panel).latent.value == small_saes["up.0.1", "k8"].d_sae - 1
    row(panel).block.value = "down.2.1"
    assert row(panel).latent.value == small_saes["down.2.1", "k8"].d_sae - 1


def test_what_cannot_be_drawn_is_said_and_the_last_picture_stays(pipe: Any, panel: SteeringPanel) -> None:
    kept, code = panel.steered, panel.code.value

    def fails(*_: Any) -> None:
        raise RuntimeError(f"out of memory {NASTY}")

    handle = pipe.unet.mid_block.register_forward_pre_hook(fails)
    try:
        row(panel).strength.value = 3
    finally:
        handle.remove()
    assert read_safely(panel.notice.value).text == f"Not drawn: out of memory {NASTY}"
    assert panel.steered is kept and panel.code.value == code
    row(panel, 1).latent.value = row(panel).latent.value
    assert f"Two rows scale latent {row(panel).latent.value} of up.0.1, by 3 and 1." in panel.notice.value
    row(panel, 1).verb.value = "clamp"
    assert "are both scaled and clamped" in panel.notice.value
    row(panel, 1).remove.click()
    assert panel.notice.value == "" and panel.steered.asked.changes == panel.rows.changes


def test_an_edit_is_saved_to_a_new_file_and_replayed(
    pipe: Any, small_saes: Any, panel: SteeringPanel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(panel.picture.figure, LEFT)
    panel.save.click()
    assert "Saved." in panel.notice.value
    (edit,) = read_edits("edit.json")
    assert (edit.hookpoint, dict(edit.scale)) == ("up.0.1", {row(panel).latent.value: 0.0})
    with kit.replay(pipe, small_saes, "edit.json"):
        (image,) = generate(pipe, [PROMPT], [3])
    assert np.array_equal(pixels(image), pixels(panel.steered.image))
    written = Path("edit.json").read_bytes()
    row(panel).strength.value = 2
    panel.save.click()
    assert "already edit.json" in panel.notice.value and Path("edit.json").read_bytes() == written
    panel.file.value = f"no/folder/{NASTY}"
    panel.save.click()
    assert "Not saved:" in read_safely(panel.notice.value).text
    row(panel).strength.value = 1
    panel.file.value = "other.json"
    panel.save.click()
    assert "no edit to save" in panel.notice.value and not Path("other.json").exists()


def test_labels_stand_beside_their_latents_and_nobodys_text_becomes_html(
    pipe: Any, small_saes: Any, small_stats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LabelStore(tmp_path / "labels.jsonl")
    store.set(7, NASTY)
    monkeypatch.setattr(LabelStore, "of", lambda *_: store)
    shown = steering_panel(pipe, small_saes, NASTY, stats=small_stats, features={"up.0.1": [7], "down.2.1": [7]})
    assert NASTY in read_safely(row(shown).about.value).text
    assert NASTY not in read_safely(row(shown, 1).about.value).text  # another SAE's
    row(shown).latent.value = 8
    assert NASTY not in row(shown).about.value
    row(shown).latent.value = 7
    shown.random.value = True
    for piece in (shown.picture.told.value, shown.result.value, shown.static_html()):
        read_safely(piece)
    assert NASTY in Reader(shown.picture.told.value).text
    assert np.array_equal(run(shown, pipe, small_saes), pixels(shown.steered.image))  # the prompt is in the code too


def test_a_row_tells_how_active_its_latent_is(pipe: Any, small_saes: Any, panel: SteeringPanel) -> None:
    sae, latent = small_saes["up.0.1", "k8"], row(panel).latent.value
    z = Drawn.of(pipe, ["up.0.1"], PROMPT, 3).code(sae, 0)
    active, peak = int((z[..., latent] > 1e-3).sum()), z[..., latent].max() / float(sae.mean_activation[latent])
    told = Reader(row(panel).about.value).text
    assert f"fires on {active} of 64 tokens" in told
    assert float(re.search(r"at most ([\d.]+)×", told)[1]) == pytest.approx(peak, rel=6e-3)  # type: ignore[index]
    row(panel).latent.value = int(np.flatnonzero((z.max(axis=(0, 1)) == 0) & (sae.mean_activation.numpy() > 0))[0])
    assert "fires nowhere in the picture" in row(panel).about.value


def test_the_static_twin_has_pictures_rows_numbers_and_the_code(panel: SteeringPanel) -> None:
    draw(panel.picture.figure, LEFT)
    panel.random.value = True
    bundle = panel._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    read = read_safely(bundle["text/html"])
    assert [alt.split(",")[0].split(":")[0] for alt in read.values("alt")] == [
        *("Before", "After", "Where it changed", "After", "Where it changed")
    ]
    assert PROMPT in read.values("alt")[0] and "inside the mask" in read.values("alt")[1]
    assert panel.code.value in read.text
    assert f"scale latent {row(panel).latent.value} of up.0.1: 0 × its activation" in read.text


def test_even_what_was_never_drawn_has_a_twin(pipe: Any, small_saes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KitError(f"No memory is left for {NASTY}.")

    with monkeypatch.context() as broken:
        broken.setattr(Drawn, "of", fails)
        shown = steering_panel(pipe, small_saes, PROMPT)
        shown.rows.add.click()
        shown.save.click()
        assert NASTY in read_safely(shown.static_html()).text
    shown.seed.value = 1
    assert shown.steered is not None and shown.rows.changes


def test_what_does_not_fit_is_refused(pipe: Any, small_saes: Any, small_stats: Any, unchecked_types: None) -> None:
    one, other = (small_saes[hookpoint, "k8"] for hookpoint in ("down.2.1", "up.0.1"))
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ([other, other.untrained()], {}, "2 of these 2 saes are of up.0.1"),
        (one, {"stats": small_stats}, "steering_panel: stats of"),
        (one, {"seed": -1}, "steering_panel: seed"),
        (one, {"features": {"up.0.1": [1]}}, "features of up.0.1, but the SAEs are of down.2.1"),
        (one, {"features": {"down.2.1": [10**6]}}, "there is no 1000000"),
        (one, {"features": {"down.2.1": range(9)}}, "9 features, but there are 8 rows"),
    ]
    for saes, options, message in refused:
        with pytest.raises(KitError, match=re.escape(message)):
            steering_panel(pipe, saes, **options)
    twice = Steering(PROMPT, 0, (Change("up.0.1", 3, "add", 1.0), Change("up.0.1", 3, "add", 2.0)))
    with pytest.raises(EditError, match=r"Two rows add latent 3 of up\.0\.1, by 1 and 2"):
        _ = twice.edits
