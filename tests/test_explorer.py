"""explorer: what is shown is what the SAEs read while the image was made, and nobody's text becomes HTML.

The widgets are driven without a browser.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_events import drag, leave
from payloads import NASTY
from reading_html import Reader, read_safely

from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.explorer import Drawn, Explorer, explore, strongest
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.sae import SAE

PROMPT, OTHER = "a large red circle on a black background", "a small blue star on the left"
HOOKPOINTS = ("down.2.1", "up.0.1")


@pytest.fixture
def shown(pipe: Any, small_saes: Any) -> Explorer:
    return explore(pipe, small_saes, PROMPT, seed=3, n=5)


def listed(panel: Any) -> dict[int, list[tuple[str, float]]]:
    """Latent → the two numbers shown of it, with their names."""
    found = {}
    for caption in re.findall("<figcaption>(.*?)</figcaption>", panel.value):
        read = Reader(caption).text
        latent = int(re.match(r"\d+", read)[0])  # type: ignore[index]
        found[latent] = [(name, float(number)) for name, number in re.findall(r"(max|mean|in|out) ([\d.e-]+)×", read)]
    return found


def read_independently(pipe: Any, sae: SAE, prompt: str, seed: int) -> np.ndarray:
    """z (height, width, latent) from the block's output minus its input, token by token, by the paper's formulas."""
    block, path = {"down.2.1": ("down_blocks", (2, 1)), "up.0.1": ("up_blocks", (0, 1))}[sae.hookpoint]
    module = getattr(pipe.unet, block)[path[0]].attentions[path[1]]
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output[0] - args[0]))
    try:
        generate(pipe, [prompt], [seed])
    finally:
        handle.remove()
    update = seen[0][0].permute(1, 2, 0).double().numpy()
    w_enc, b_enc, b_dec = (getattr(sae, name).double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
    z = np.zeros((*update.shape[:2], sae.d_sae))
    for place in np.ndindex(update.shape[:2]):
        h = (update[place] - b_dec) @ w_enc + b_enc
        for latent in np.argsort(-h)[: sae.k]:
            z[*place, latent] = max(h[latent], 0)
    return z


@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_the_whole_picture_lists_the_largest_maxima_in_the_latents_own_unit(
    pipe: Any, small_saes: Any, shown: Explorer, hookpoint: str
) -> None:
    sae = small_saes[hookpoint, "k8"]
    z, usual = read_independently(pipe, sae, PROMPT, 3), sae.mean_activation.numpy()
    found = listed(shown.panels[hookpoint])
    peaks = {latent: z[..., latent].max() / usual[latent] for latent in range(sae.d_sae) if usual[latent] > 0}
    assert list(found) == sorted(peaks, key=peaks.__getitem__, reverse=True)[:5]
    for latent, numbers in found.items():
        mean = z[..., latent].mean() / usual[latent]
        assert numbers == [("max", pytest.approx(peaks[latent], rel=6e-3)), ("mean", pytest.approx(mean, rel=6e-3))]
    n_active = int((z > 1e-3).any(axis=(0, 1)).sum())
    assert f"5 of {n_active} latents active on 64 tokens" in Reader(shown.panels[hookpoint].value).text


@pytest.mark.parametrize("kind", ["box", "lasso"])
def test_a_drag_lists_means_inside_beside_means_outside(pipe: Any, small_saes: Any, shown: Explorer, kind: str) -> None:
    sae, tokens = small_saes["up.0.1", "k8"], [18, 19, 20, 26, 27, 36]
    drag(shown.picture.figure, tokens, kind)
    z = read_independently(pipe, sae, PROMPT, 3).reshape(64, -1) / np.maximum(sae.mean_activation.numpy(), 1e-9)
    others = [token for token in range(64) if token not in tokens]
    inside, outside = z[tokens].mean(axis=0), z[others].mean(axis=0)
    found = listed(shown.panels["up.0.1"])
    assert list(found) == np.argsort(-inside)[:5].tolist()
    for latent, ((one, within), (other, without)) in found.items():
        assert (one, other) == ("in", "out")
        assert within == pytest.approx(inside[latent], rel=6e-3)
        assert without == pytest.approx(outside[latent], rel=6e-3, abs=1e-4)
    assert "Latents active on 6 of 64 tokens, within rows 3–5 and columns 3–5" in shown.caption.value
    assert "latents active on 6 of 64 tokens" in shown.panels["down.2.1"].value


def test_sliders_and_drags_of_the_same_tokens_show_the_same(shown: Explorer) -> None:
    first = shown.panels["up.0.1"].value
    drag(shown.picture.figure, [row * 8 + column for row in (2, 3) for column in (4, 5, 6)])
    dragged = shown.panels["up.0.1"].value
    leave(shown.picture.figure)
    assert shown.panels["up.0.1"].value == first
    shown.picture.rows.value, shown.picture.columns.value = (3, 4), (5, 7)
    assert shown.panels["up.0.1"].value == dragged != first


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_strongest_ranks_by_the_formula_and_lists_only_what_fires_and_has_a_unit(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    code = (rng.random((3, 4, 9)) * (rng.random((3, 4, 9)) < 0.2) * 5).astype(np.float32)
    usual = (rng.random(9) * (rng.random(9) < 0.8)).astype(np.float32)
    selected = rng.random((3, 4)) < 0.5
    selected[1, 1] = True
    inside = [place for place in np.ndindex(3, 4) if selected[place]]
    outside = [place for place in np.ndindex(3, 4) if not selected[place]]
    found = strongest(code, usual, selected, n)
    able = [f for f in range(9) if usual[f] > 0 and max(code[*at, f] for at in inside) > 1e-3]
    score = {f: sum(code[*at, f] for at in inside) / len(inside) / usual[f] for f in able}
    if not outside:
        score = {f: code[..., f].max() / usual[f] for f in able}
    assert len(found) == min(n, len(able))
    assert {each.latent for each in found} <= set(able)
    assert [score[each.latent] for each in found] == pytest.approx(sorted(score.values(), reverse=True)[:n], rel=1e-5)
    for each in found:
        assert each.peak == pytest.approx(code[..., each.latent].max() / usual[each.latent], rel=1e-5)
        without = np.mean([code[*at, each.latent] for at in outside]) / usual[each.latent] if outside else np.nan
        assert each.outside == pytest.approx(without, rel=1e-5, abs=1e-7, nan_ok=True)


def test_a_new_prompt_or_seed_is_drawn_and_the_same_is_not_drawn_again(
    pipe: Any, shown: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown.drawn is not None
    (expected,) = generate(pipe, [PROMPT], [3])
    assert shown.drawn.image.tobytes() == expected.tobytes()
    before = shown.panels["up.0.1"].value
    shown.prompt.value = OTHER
    (expected,) = generate(pipe, [OTHER], [3])
    assert shown.drawn.image.tobytes() == expected.tobytes()
    assert OTHER in shown.picture.told.value
    assert shown.panels["up.0.1"].value != before
    shown.seed.value = 4
    assert shown.drawn.seed == 4
    monkeypatch.setattr(Drawn, "of", lambda *_: pytest.fail("drawn again"))
    shown.go.click()


def test_what_cannot_be_drawn_is_said_and_the_last_picture_stays(pipe: Any, shown: Explorer) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(f"out of memory {NASTY}")

    kept, hooks = shown.drawn, sum(len(module._forward_hooks) for module in pipe.unet.modules())
    handle = pipe.unet.mid_block.register_forward_pre_hook(fails)
    try:
        shown.prompt.value = OTHER
    finally:
        handle.remove()
    assert shown.drawn is kept
    assert read_safely(shown.notice.value).text == f"Not drawn: out of memory {NASTY}"
    assert sum(len(module._forward_hooks) for module in pipe.unet.modules()) == hooks
    shown.go.click()
    assert shown.notice.value == ""
    assert shown.drawn is not None
    assert shown.drawn.prompt == OTHER


def test_a_prompt_longer_than_the_model_reads_is_told_of(shown: Explorer) -> None:
    shown.prompt.value = "red circle " * 60
    assert "longer than the 24 tokens that this model reads" in shown.notice.value


def test_one_block_can_be_looked_at_alone(shown: Explorer) -> None:
    shown.block.value = "up.0.1"
    assert shown.panels["down.2.1"].layout.display == "none"
    assert shown.panels["up.0.1"].layout.display is None
    assert "<h3>down.2.1" not in shown.static_html()
    shown.block.value = "all"
    assert [shown.panels[hookpoint].layout.display for hookpoint in HOOKPOINTS] == [None, None]


def test_a_model_of_several_steps_shows_each_steps_cond_half(small_saes: Any) -> None:
    base = load_pipeline("tiny-base", device="cpu", dtype="float32")
    sae = small_saes["up.0.1", "k8"]
    with pytest.warns(UserWarning, match="was trained on tiny-turbo"):
        shown = explore(base, sae, PROMPT)
    seen: list[torch.Tensor] = []
    handle = base.unet.up_blocks[0].attentions[1].proj_out.register_forward_hook(lambda _, a, out: seen.append(out))
    try:
        generate(base, [PROMPT], [0])
    finally:
        handle.remove()
    assert shown.step.options == tuple(range(len(seen)))
    before = shown.panels["up.0.1"].value
    shown.step.value = 4
    assert shown.panels["up.0.1"].value != before
    assert "Step 4 of 0 to 9." in shown.caption.value
    assert shown.drawn is not None
    cond = seen[4][1].reshape(8, 8, -1)
    assert np.allclose(shown.drawn.code(sae, 4), sae.encode(cond).numpy(), atol=1e-4)


def test_pressing_a_feature_opens_its_gallery_and_its_label_is_shown(
    pipe: Any, small_saes: Any, small_stats: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LabelStore(tmp_path / "labels.jsonl")
    monkeypatch.setattr(LabelStore, "of", lambda *_: store)
    shown = explore(pipe, small_saes, PROMPT, stats=small_stats)
    latent = next(iter(listed(shown.panels["up.0.1"])))
    store.set(latent, NASTY)
    shown.refresh()
    read = read_safely(shown.panels["up.0.1"].value)
    assert NASTY in read.text
    assert [int(each) for each in read.values("data-latent")] == list(listed(shown.panels["up.0.1"]))
    assert read_safely(shown.panels["down.2.1"].value).values("data-latent") == []  # there are no statistics of it
    shown.panels["up.0.1"]._handle_custom_msg({"open": latent}, [])
    (opened,) = shown.opened.children
    assert opened.children == (opened.detail,)
    assert opened.detail.feature == latent
    assert f"Latent {latent}" in shown.static_html()
    shown.panels["up.0.1"]._handle_custom_msg({"open": 10**6}, [])
    assert "No latent 1000000" in shown.notice.value
    with pytest.raises(KitError, match=r"no statistics of down\.2\.1 here"):
        shown.show("down.2.1", 0)


def test_no_prompt_becomes_html(pipe: Any, small_saes: Any) -> None:
    shown = explore(pipe, small_saes, NASTY)
    drag(shown.picture.figure, [1, 2, 3])
    pieces = [shown.picture.told.value, shown.caption.value, shown.static_html()]
    pieces += [panel.value for panel in shown.panels.values()]
    for piece in pieces:
        assert "<script" not in piece
        read_safely(piece)
    assert NASTY in Reader(shown.picture.told.value).text


def test_the_static_twin_has_the_picture_and_every_block_with_alt_texts(shown: Explorer) -> None:
    bundle = shown._repr_mimebundle_()
    assert shown.picture.figure._widget_layout["images"][0]["source"].startswith("data:image/webp")  # reaches any page
    assert "application/vnd.jupyter.widget-view+json" in bundle
    read = read_safely(bundle["text/html"])
    assert len(read.values("alt")) == 1 + 2 * 5
    assert read.values("alt")[0] == f"The image drawn of: {PROMPT}"
    assert all(PROMPT in alt for alt in read.values("alt"))
    assert f"{PROMPT} seed 3, 64×64 pixels, 8×8 tokens" in read.text
    drag(shown.picture.figure, [1, 2, 3])
    read = read_safely(shown.static_html())
    assert "Which part of it is selected" in read.values("alt")
    assert "Latents active on 3 of 64 tokens" in read.text


def test_even_what_was_never_drawn_has_a_twin(pipe: Any, small_saes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KitError(f"No memory is left for {NASTY}.")

    monkeypatch.setattr(Drawn, "of", fails)
    shown = explore(pipe, small_saes)
    drag(shown.picture.figure, [1])
    assert NASTY in read_safely(shown.static_html()).text


def test_what_does_not_fit_together_is_refused(
    pipe: Any, small_saes: Any, small_stats: Any, unchecked_types: None
) -> None:
    one, other = (small_saes[hookpoint, "k8"] for hookpoint in HOOKPOINTS)
    twin = other.untrained()
    elsewhere = SAE(other.config, 24, other.site)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ([other, twin], {}, "2 of these 2 saes are of up.0.1"),
        ([], {}, "there are no saes"),
        (17, {}, "explore takes SAEs, such as train gives, or one or several of them as saes, not 17"),
        ([one, None], {}, "explore takes SAEs, such as train gives, or one or several of them as saes, not "),
        (one, {"stats": small_stats}, "belong to none of these SAEs"),
        (twin, {}, "does not tell how strongly its latents usually fire"),
        (one, {"n": 0}, "explore: n"),
        (one, {"seed": -1}, "explore: seed"),
    ]
    for saes, options, message in refused:
        with pytest.raises(KitError, match=re.escape(message)):
            explore(pipe, saes, **options)
    with pytest.raises(ArtifactError, match=r"reads 24 numbers a token, but up\.0\.1 of this U-Net has 96"):
        explore(pipe, elsewhere)


def test_a_hookpoint_that_the_model_lacks_is_refused(pipe: Any, small_saes: Any) -> None:
    sae = SAE(small_saes["up.0.1", "k8"].config, 96, replace(small_saes["up.0.1", "k8"].site, hookpoint="up.9.1"))
    with pytest.raises(HookpointError, match="No hookpoint"):
        explore(pipe, sae)
