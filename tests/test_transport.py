"""Transport of features: every method against its formula in loops, and what must hold of any edit."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from made_saes import sae_of
from torch import nn

from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.hooks import record
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.studies.choices import draw_alike, rank
from sdxl_sae_kit.studies.traces import Encoder
from sdxl_sae_kit.studies.transport import METHODS, Setting, Source

BLOCKS = ("down.2.1", "mid.0", "up.0.1")
PLACES = {
    "down.2.1": "down_blocks.2.attentions.1",
    "mid.0": "mid_block.attentions.0",
    "up.0.1": "up_blocks.0.attentions.1",
}
STEPS, SIDE, D = 2, 8, 96
DRAWN = {"num_inference_steps": STEPS, "guidance_scale": 0.0}
ITEMS = [
    SimpleNamespace(original="a large red circle", edited="a large blue square", seed=3),
    SimpleNamespace(original="a small green star on the left", edited="a small green star on the right", seed=8),
    SimpleNamespace(original="a large yellow square", edited="a small yellow square", seed=8),
]
CONFIGS = {
    "down.2.1": SAEConfig(k=6, expansion=1),
    "mid.0": SAEConfig(k=5, expansion=1.5, normalize="whiten"),
    "up.0.1": SAEConfig(k=4, expansion=1, kind="batchtopk", normalize="channels"),
}


@pytest.fixture(scope="module")
def saes(pipe):
    return {block: sae_of(pipe, block, config) for block, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def source(pipe, saes):
    return Source.run(pipe, ITEMS, saes, DRAWN, neurons=True)


@pytest.fixture(scope="module")
def masks():
    """Other ones for every item and side; a token is half covered, one less than that."""
    rng = np.random.default_rng(0)
    made = rng.random((len(ITEMS), 2, SIDE, SIDE)) < 0.4
    pictures = made.repeat(8, axis=2).repeat(8, axis=3)
    pictures[0, 0, :8, :8] = [[True] * 4 + [False] * 4] * 8
    pictures[0, 1, :8, :8] = [[True] * 3 + [False] * 5] * 8
    return [(original, edited) for original, edited in pictures]


@pytest.fixture(scope="module")
def transport(source, masks):
    return source.masked(masks)


@pytest.fixture(scope="module")
def edited(pipe, transport):
    """What `changed` gives for each method with all blocks, made once."""

    @cache
    def of(method):
        return changed(pipe, transport, setting_of(method))

    return of


def draw(pipe, items=ITEMS, side="original", **settings):
    texts, seeds = [getattr(item, side) for item in items], [item.seed for item in items]
    return np.asarray(generate(pipe, texts, seeds, **DRAWN | settings, output_type="np"))


class Layers:
    """Neurons as plain torch hooks see them: {block: [step]}."""

    def __init__(self, pipe):
        self.seen, self.handles = {block: [] for block in BLOCKS}, []
        for block, path in PLACES.items():
            layer = pipe.unet.get_submodule(path).transformer_blocks[0].ff.net[0]
            keep = self.seen[block]
            self.handles.append(layer.register_forward_hook(lambda _m, _a, out, keep=keep: keep.append(out.clone())))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def changed(pipe, transport, setting, items=ITEMS, **settings):
    """By block (item, step, token, width): what the edit found and what it left; and the pictures."""
    if setting.method == "neurons":
        with Layers(pipe) as found, transport.edited(setting), Layers(pipe) as left:
            pictures = draw(pipe, items, **settings)
        stacked = [{block: torch.stack(each, dim=1).numpy() for block, each in seen.items()} for seen in (found, left)]
    else:
        with record(pipe, BLOCKS) as found, transport.edited(setting), record(pipe, BLOCKS, edited=True) as left:
            pictures = draw(pipe, items, **settings)
        stacked = [updates(recording) for recording in (found, left)]
    return *stacked, pictures


def updates(recording):
    return {
        block: torch.stack([recording.update(block, step).flatten(1, 2) for step in range(STEPS)], dim=1).numpy()
        for block in BLOCKS
    }


@pytest.fixture(scope="module")
def seen(pipe):
    """By side and kind, what the prompts do: recorded without the code that is tested."""
    told = {}
    for side in ("original", "edited"):
        with record(pipe, BLOCKS) as recording, Layers(pipe) as layers:
            draw(pipe, side=side)
        neurons = {block: torch.stack(each, dim=1).numpy() for block, each in layers.items()}
        told[side] = {"updates": updates(recording), "neurons": neurons}
    return told


# The formula, in loops ------------------------------------------------------------------------------------------------


def encoded(sae, tokens):
    with torch.no_grad():
        return sae.encode(torch.from_numpy(np.array(tokens))).double().numpy()


def half_covered(mask):
    return np.array(
        [[mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() >= 0.5 for x in range(8)] for y in range(8)]
    ).ravel()


def features(saes, seen, method, item):
    """(F_o, F_e) by block, each (step, token, feature), and the directions by block."""
    if method == "neurons":
        pair = [
            {block: seen[side]["neurons"][block][item].astype(float) for block in BLOCKS}
            for side in ("original", "edited")
        ]
        return *pair, {block: np.eye(pair[0][block].shape[2]) for block in BLOCKS}
    pair = [
        {block: encoded(saes[block], seen[side]["updates"][block][item]) for block in BLOCKS}
        for side in ("original", "edited")
    ]
    return *pair, {block: saes[block].directions.detach().double().numpy() for block in BLOCKS}


def choose_in_loops(F_o, F_e, directions, m_o, m_e, k, blocks):
    a = []
    for F, m in ((F_o, m_o), (F_e, m_e)):
        means = [
            (block, f, np.abs(F[block][0, m, f]).mean() * np.linalg.norm(directions[block][f]))
            for block in blocks
            for f in range(F[block].shape[2])
        ]
        total = sum(mean for *_, mean in means)
        a.append([(block, f, mean / total) for block, f, mean in means])
    scores = [
        (edited[2] - original[2], place, *original[:2]) for place, (original, edited) in enumerate(zip(*a, strict=True))
    ]
    added = [each[2:] for each in sorted(scores, key=lambda each: (-each[0], each[1]))[:k] if each[0] > 0]
    removed = [each[2:] for each in sorted(scores, key=lambda each: (each[0], each[1]))[:k] if each[0] < 0]
    return added, removed


def delta_in_loops(F_o, F_e, directions, m_o, m_e, added, removed, strength, spatial):
    delta = {block: np.zeros((STEPS, SIDE**2, d.shape[1])) for block, d in directions.items()}
    for sign, F, mask, chosen in ((1, F_e, m_e, added), (-1, F_o, m_o, removed)):
        for block, f in chosen:
            for t in range(STEPS):
                for p in np.flatnonzero(mask):
                    value = F[block][t, p, f] if spatial else np.mean([F[block][t, q, f] for q in np.flatnonzero(mask)])
                    delta[block][t, p] += sign * strength * value * directions[block][f]
    return delta


def close(found, left, delta, item):
    for block in BLOCKS:
        told = left[block][item].astype(float) - found[block][item]
        scale = np.abs(found[block][item]).max() + np.abs(delta[block]).max()
        np.testing.assert_allclose(told, delta[block], atol=3e-6 * scale)
    assert max(np.abs(each).max() for each in delta.values()) > 0.05, "the edit does nothing, so the test says nothing"


@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "mean"])
@pytest.mark.parametrize("method, k, strength", [("sae", 12, 1.5), ("sae", 1000, 1.0), ("neurons", 40, 2.0)])
def test_the_change_is_the_formula_of_the_chosen_features(
    pipe, saes, source, masks, seen, method, k, strength, spatial
):
    found, left, _ = changed(pipe, source.masked(masks, spatial=spatial), Setting(method, k, strength, BLOCKS))
    for item, pair in enumerate(masks):
        m_o, m_e = map(half_covered, pair)
        F_o, F_e, directions = features(saes, seen, method, item)
        added, removed = choose_in_loops(F_o, F_e, directions, m_o, m_e, k, BLOCKS)
        close(found, left, delta_in_loops(F_o, F_e, directions, m_o, m_e, added, removed, strength, spatial), item)


@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "mean"])
def test_adaptive_removes_what_the_picture_being_made_has(pipe, saes, source, masks, seen, spatial):
    found, left, _ = changed(pipe, source.masked(masks, spatial=spatial), Setting("sae_adaptive", 12, 2.0, BLOCKS))
    for item, pair in enumerate(masks):
        m_o, m_e = map(half_covered, pair)
        F_o, F_e, directions = features(saes, seen, "sae_adaptive", item)
        added, removed = choose_in_loops(F_o, F_e, directions, m_o, m_e, 12, BLOCKS)
        live = {block: encoded(saes[block], found[block][item]) for block in BLOCKS}
        assert np.abs(live["up.0.1"] - F_o["up.0.1"]).max() > 1e-3
        close(found, left, delta_in_loops(live, F_e, directions, m_o, m_e, added, removed, 2.0, spatial), item)


@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "mean"])
def test_steering_moves_the_updates_themselves(pipe, source, masks, seen, spatial):
    found, left, _ = changed(pipe, source.masked(masks, spatial=spatial), Setting("steering", None, 0.5, BLOCKS))
    for item, pair in enumerate(masks):
        delta = {}
        for block in BLOCKS:
            u_o, u_e = (seen[side]["updates"][block][item].astype(float) for side in ("original", "edited"))
            m_o, m_e = (half_covered(mask)[:, None] for mask in pair)
            if not spatial:
                u_o, u_e = (u[:, m.ravel()].mean(axis=1, keepdims=True) for u, m in ((u_o, m_o), (u_e, m_e)))
            delta[block] = 0.5 * (u_e * m_e - u_o * m_o)
        close(found, left, delta, item)


def test_random_is_the_formula_of_other_features_as_many_that_are_active(pipe, saes, source, transport, masks, seen):
    setting = Setting("random", 8, 1.0, BLOCKS)
    found, left, _ = changed(pipe, transport, setting)
    with transport.edited(Setting("sae", 8, 1.0, BLOCKS)) as of_sae, transport.edited(setting) as of_random:
        pass
    by_chance, by_rank = transport._choose(setting), transport._choose(Setting("sae", 8, 1.0, BLOCKS))
    for item, pair in enumerate(masks):
        m_o, m_e = map(half_covered, pair)
        F_o, F_e, directions = features(saes, seen, "random", item)
        removed, added = (
            [(block, f) for block in BLOCKS for f in chosen_at(by_chance, block, side, item)] for side in (0, 1)
        )
        assert all(F_e[block][0, m_e, f].any() for block, f in added)
        assert all(F_o[block][0, m_o, f].any() for block, f in removed)
        close(found, left, delta_in_loops(F_o, F_e, directions, m_o, m_e, added, removed, 1.0, True), item)
        assert [np.sum(list(counts[item].values()), axis=0).tolist() for counts in (of_sae, of_random)] == [[8, 8]] * 2
        by_sae = {(block, f) for block in BLOCKS for side in (0, 1) for f in chosen_at(by_rank, block, side, item)}
        assert len(by_sae) == 16 and not by_sae & {*removed, *added} and not {*removed} & {*added}


def chosen_at(choice, block, side, item):
    """Features chosen of an item at a block, which is missing where there are none of any item."""
    return np.flatnonzero(choice.chosen[block][side][item]) if block in choice.chosen else []


def test_random_is_the_same_again_and_alone_and_another_for_another_k(transport, last_alone):
    setting = Setting("random", 8, 1.0, BLOCKS)
    for block in BLOCKS:
        for side in (0, 1):
            here, there = (
                chosen_at(each._choose(setting), block, side, at) for each, at in ((transport, 2), (last_alone, 0))
            )
            assert np.array_equal(here, there)
    more, fewer = (transport._choose(Setting("random", k, 1.0, BLOCKS)).chosen["down.2.1"][1][1] for k in (9, 8))
    assert (fewer & ~more).any()


# What must hold of any edit -------------------------------------------------------------------------------------------


def setting_of(method, strength=1.0, blocks=BLOCKS):
    return Setting(method, None if method == "steering" else 12, strength, blocks)


@pytest.mark.parametrize("method", METHODS)
def test_strength_0_draws_the_original(pipe, source, transport, edited, method):
    with transport.edited(setting_of(method, 0.0)):
        pictures = draw(pipe)
    np.testing.assert_allclose(pictures, source.original, atol=1e-6)
    assert np.abs(edited(method)[2] - source.original).max() > 1e-3


@pytest.fixture(scope="module")
def last_alone(pipe, saes, masks):
    return Source.run(pipe, ITEMS[2:], saes, DRAWN, neurons=True).masked(masks[2:])


@pytest.mark.parametrize("method", METHODS)
def test_an_item_alone_is_edited_as_in_a_batch(pipe, transport, last_alone, edited, method):
    alone = last_alone
    with alone.edited(setting_of(method)):
        by_itself = draw(pipe, ITEMS[2:])
    np.testing.assert_allclose(by_itself[0], edited(method)[2][2], atol=2e-3)
    with transport.edited(setting_of(method)) as here, alone.edited(setting_of(method)) as there:
        assert here[2] == there[0]


@pytest.mark.parametrize("method", METHODS)
def test_tokens_outside_both_masks_keep_every_bit(edited, masks, method):
    found, left, _ = edited(method)
    for item, pair in enumerate(masks):
        inside = half_covered(pair[0]) | half_covered(pair[1])
        for block in BLOCKS:
            same = (found[block][item] == left[block][item]).all(axis=(0, 2))
            assert same[~inside].all(), (item, block)
        assert not (found["down.2.1"][item] == left["down.2.1"][item])[:, inside].all()


@pytest.mark.parametrize("method", METHODS)
def test_a_block_left_out_is_not_touched_and_shares_nothing(pipe, transport, method):
    blocks = ("down.2.1", "up.0.1")
    found, left, _ = changed(pipe, transport, setting_of(method, blocks=blocks))
    assert np.array_equal(found["mid.0"], left["mid.0"])
    assert all(not np.array_equal(found[block], left[block]) for block in blocks)
    with transport.edited(setting_of(method, blocks=blocks)) as chosen:
        assert all(set(counts) == (set() if method == "steering" else set(blocks)) for counts in chosen)


def test_at_most_k_are_chosen_over_all_blocks_together(transport):
    with transport.edited(Setting("sae", 12, 1.0, BLOCKS)) as chosen:
        totals = np.array([np.sum(list(counts.values()), axis=0) for counts in chosen])
    assert (totals == 12).all()
    assert any(added != removed for counts in chosen for added, removed in counts.values())
    with transport.edited(Setting("sae", 10_000, 1.0, BLOCKS)) as chosen:
        totals = np.array([np.sum(list(counts.values()), axis=0) for counts in chosen])
    assert (totals.sum(axis=1) <= sum(sae_size(block) for block in BLOCKS)).all() and (totals > 12).all()


def sae_size(block):
    return round(D * CONFIGS[block].expansion)


def test_all_of_steering_puts_the_edited_prompts_update_in_the_first_block(pipe, source, seen):
    everywhere = [(np.ones((64, 64), bool),) * 2] * len(ITEMS)
    _, left, _ = changed(pipe, source.masked(everywhere), Setting("steering", None, 1.0, BLOCKS))
    edited, original = (seen[side]["updates"]["down.2.1"][:, 0] for side in ("edited", "original"))
    np.testing.assert_allclose(left["down.2.1"][:, 0], edited, atol=1e-5 * np.abs(edited).max())
    assert np.abs(edited - original).max() > 0.1


def test_a_dictionary_that_leaves_nothing_out_writes_what_it_read(pipe, seen):
    sae = sae_of(pipe, "mid.0", SAEConfig(k=2 * D, expansion=2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    steps = [torch.from_numpy(seen["edited"]["updates"]["mid.0"][:, step]) for step in range(STEPS)]
    codes = Encoder(sae, torch.device("cpu")).read(steps)
    everything = torch.ones(len(ITEMS), 2 * D, dtype=torch.bool)
    for step, update in enumerate(steps):
        assert torch.allclose(codes.written(step, everything), update, atol=1e-6)
        assert not codes.written(step, ~everything).any()


def test_adaptive_is_the_same_as_long_as_the_picture_is_the_original(edited):
    (_, plain, _), (_, adaptive, _) = (edited(method) for method in ("sae", "sae_adaptive"))
    assert np.array_equal(plain["down.2.1"][:, 0], adaptive["down.2.1"][:, 0])
    assert not np.array_equal(plain["up.0.1"][:, -1], adaptive["up.0.1"][:, -1])


def test_a_choice_does_not_depend_on_the_units_that_an_sae_reads_in(pipe, saes, source, masks):
    """The same features in another unit, 1/50 as active and 50 times as long, count as much beside other blocks'."""
    plain, config = saes["down.2.1"], CONFIGS["down.2.1"]
    same = sae_of(pipe, "down.2.1", replace(config, normalize="scale"))
    with torch.no_grad():
        same.input_scale.fill_(50)
        for name in ("b_enc", "b_dec"):
            getattr(same, name).copy_(getattr(plain, name) / 50)
        same.W_enc.copy_(plain.W_enc)
        same.W_dec.copy_(plain.W_dec)
    other = Source.run(pipe, ITEMS, saes | {"down.2.1": same}, DRAWN).masked(masks)
    with source.masked(masks).edited(setting_of("sae")) as one, other.edited(setting_of("sae")) as two:
        assert one == two and all(0 < sum(counts["down.2.1"]) < 24 for counts in one)


def test_with_guidance_only_the_half_that_reads_the_prompt_is_changed(pipe, saes, masks):
    guided = DRAWN | {"guidance_scale": 3.0}
    transport = Source.run(pipe, ITEMS, saes, guided).masked(masks)
    with record(pipe, BLOCKS) as found, transport.edited(setting_of("sae")), record(pipe, BLOCKS, edited=True) as left:
        draw(pipe, **guided)
    for step in range(STEPS):
        for block in BLOCKS:
            assert torch.equal(found.update(block, step, "uncond"), left.update(block, step, "uncond"))
            assert not torch.equal(found.update(block, step), left.update(block, step))


def test_pictures_are_those_of_the_prompts_alone(pipe, source):
    for side, pictures in (("original", source.original), ("edited", source.edited)):
        assert pictures.dtype == np.float32 and np.array_equal(pictures, draw(pipe, side=side).astype(np.float32))


def n_hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


@pytest.mark.parametrize("method", ["sae", "neurons"])
def test_other_pictures_than_the_items_are_refused_and_leave_nothing_hooked(pipe, transport, method):
    before = n_hooks(pipe)
    for items, settings in ((ITEMS[:2], {}), (ITEMS, {"num_inference_steps": 1})):
        refused = pytest.raises(KitError, match="Draw the originals of exactly these items")
        with refused, transport.edited(setting_of(method)):
            draw(pipe, items, **settings)
    assert n_hooks(pipe) == before


def test_masks_that_hold_no_token_change_nothing(pipe, source, transport):
    nowhere = [(np.zeros((64, 64), bool),) * 2] * len(ITEMS)
    for method in METHODS:
        with source.masked(nowhere).edited(setting_of(method)) as chosen:
            assert all(counts == (0, 0) for each in chosen for counts in each.values())
    with source.masked(nowhere, spatial=False).edited(setting_of("steering", 2.0)):
        assert np.array_equal(draw(pipe), source.original)


# What is refused, and small things ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, complaint",
    [
        (("sea", 3, 1.0, BLOCKS), "no method 'sea'.*Did you mean 'sae'"),
        (("sae", 0, 1.0, BLOCKS), "k of sae must be an integer of at least 1, not 0"),
        (("random", None, 1.0, BLOCKS), "k of random must be"),
        (("steering", 4, 1.0, BLOCKS), "its k is None, not 4"),
        (("sae", 4, -1.0, BLOCKS), "from 0 on, not -1.0"),
        (("sae", 4, float("nan"), BLOCKS), "finite number"),
        (("sae", 4, float("inf"), BLOCKS), "finite number"),
        (("sae", 4, 1.0, ()), "one hookpoint or more"),
        (("sae", 4, 1.0, ("mid.0", "mid.0")), "each once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, complaint, unchecked_types):
    with pytest.raises(KitError, match=complaint):
        Setting(*given)


def test_blocks_and_saes_that_are_not_there_are_refused(pipe, saes, source, transport, masks):
    for setting, error, complaint in (
        (Setting("sae", 4, 1.0, ("mid.1",)), HookpointError, "Did you mean 'mid.0'"),
        (Setting("steering", None, 1.0, ("up.0.0",)), KitError, "is to edit up.0.0, but there are SAEs for down.2.1"),
        (Setting("prompt", None, 0.0, ()), KitError, "prompt transports nothing"),
    ):
        with pytest.raises(error, match=complaint), transport.edited(setting):
            pass
    without = Source.run(pipe, ITEMS[:1], saes, DRAWN).masked(masks[:1])
    with pytest.raises(KitError, match="neurons=True"), without.edited(setting_of("neurons")):
        pass
    with pytest.raises(KitError, match="1 pairs of masks for 3 items"):
        source.masked(masks[:1])


def test_saes_that_do_not_fit_are_refused_before_anything_is_drawn(pipe, saes, monkeypatch):
    monkeypatch.setattr("sdxl_sae_kit.studies.transport.generate", lambda *_args, **_more: pytest.fail("drawn"))
    each_token = sae_of(pipe, "mid.0", SAEConfig(k=4, expansion=1, normalize="layer_norm"))
    for given, error, complaint in (
        ({}, KitError, "got none"),
        ({"up.0.1": saes["mid.0"]}, ArtifactError, "was trained on updates of mid.0, not updates of up.0.1"),
        ({"mid.0": each_token}, KitError, "no direction that is the same"),
    ):
        with pytest.raises(error, match=complaint):
            Source.run(pipe, ITEMS, given, DRAWN)


def test_keys_are_unique_and_tell_the_setting():
    settings = [
        Setting(method, k, strength, blocks)
        for method in METHODS
        for k in ([None] if method == "steering" else [1, 12])
        for strength in (0.25, 1, 1.0000001, 1e-7, 12.0)
        for blocks in (BLOCKS, BLOCKS[::-1], BLOCKS[:1])
    ]
    settings += [Setting(end, None, 0.0, ()) for end in ("prompt", "none")]
    assert len({each.key for each in settings}) == len(settings)
    assert Setting("sae", 24, 1.0, ("down.2.1", "mid.0")).key == "sae, k 24, strength 1, down.2.1+mid.0"
    assert Setting("steering", None, 0.25, ("mid.0",)).key == "steering, strength 0.25, mid.0"
    assert [each.key for each in settings[-2:]] == ["prompt", "none"]


def test_random_draws_as_many_others_as_there_are_and_none_twice():
    rng = np.random.default_rng(0)
    for n in (0, 3, 9, 30):
        means = [np.where(rng.random(60) < 0.6, rng.random(60), 0) for _ in range(2)]
        chosen = [each[:n] for each in rank(*means)]
        drawn = draw_alike(chosen, means, seed=1)
        assert all((a[each] > 0).all() for each, a in zip(drawn, means, strict=True))
        everything = np.concatenate([*drawn, *chosen]).tolist()
        assert len(set(everything)) == len(everything)
        left = {f for f in range(60) if means[0][f] + means[1][f] > 0} - set(np.concatenate(chosen).tolist())
        wanted = [len(each) for each in chosen]
        if [len(each) for each in drawn] != wanted:
            short = {
                f for f in left if any(a[f] > 0 and len(d) < n for a, d, n in zip(means, drawn, wanted, strict=True))
            }
            assert short <= set(np.concatenate(drawn).tolist()), "all that could be drawn is"
        else:
            assert n < 30
    assert [each.tolist() for each in draw_alike([np.arange(2), np.arange(2, 4)], [np.ones(4), np.ones(4)], 0)] == [
        [],
        [],
    ]
    (first,), (second,) = draw_alike([np.array([0]), np.array([1])], [np.ones(4), np.ones(4)], 0)
    assert {first, second} == {2, 3}


def test_ties_go_to_the_feature_that_comes_first_and_nothing_comes_of_nothing():
    removed, added = rank(np.array([1.0, 1, 0, 0, 2]), np.array([0.0, 0, 1, 1, 2]))
    assert (removed.tolist(), added.tolist()) == ([0, 1], [2, 3])
    removed, added = rank(np.zeros(3), np.array([0.0, 1, 3]))
    assert (removed.tolist(), added.tolist()) == ([], [2, 1])


def test_a_compiled_unet_is_edited_all_the_same(pipe, saes, masks, edited):
    compiled = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    with pytest.warns(UserWarning, match="runs uncompiled"):
        transport = Source.run(compiled, ITEMS, saes, DRAWN, neurons=True).masked(masks)
        for method in ("sae", "neurons"):
            with transport.edited(setting_of(method)):
                np.testing.assert_allclose(draw(compiled), edited(method)[2], atol=1e-5)


def test_weights_that_wait_elsewhere_are_no_place_to_compute(saes, masks, edited):
    offloaded = load_pipeline("tiny-turbo", device="cpu", dtype="float32")
    offloaded.unet = accelerate.cpu_offload(offloaded.unet, execution_device=torch.device("cpu"))
    assert offloaded.unet.device.type == "meta"
    with Source.run(offloaded, ITEMS, saes, DRAWN).masked(masks).edited(setting_of("sae")):
        np.testing.assert_allclose(draw(offloaded), edited("sae")[2], atol=1e-5)


def test_forgotten_items_leave_what_the_others_did(pipe, saes, source, masks):
    kept = Source.run(pipe, ITEMS, saes, DRAWN, neurons=True)
    kept.masked(masks)._choose(setting_of("neurons"))
    kept.keep([2, 0])
    assert np.array_equal(kept.edited, source.edited[[2, 0]]) and kept.seeds == (8, 3)
    here = kept.masked([masks[2], masks[0]])
    for method in METHODS:
        with here.edited(setting_of(method)) as some, source.masked(masks).edited(setting_of(method)) as all_of_them:
            assert some == [all_of_them[2], all_of_them[0]]


def test_half_precision_keeps_its_dtype_and_saes_stay_as_they_are(pipe, saes):
    sae = saes["mid.0"]
    half = nn.Module.to(sae_of(pipe, "mid.0", CONFIGS["mid.0"]), torch.float16)
    encoder = Encoder(half, torch.device("cpu"))
    assert (half.W_enc.dtype, encoder.sae.W_enc.dtype) == (torch.float16, torch.float32)
    assert Encoder(sae, torch.device("cpu")).sae is sae
