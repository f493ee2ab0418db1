"""RIEBench: every method on the same items, whatever the batches and breaks; nothing drawn twice, nothing dropped."""

from __future__ import annotations

import io
import json
import os
import signal
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from breaking import Breaking
from made_saes import sae_of
from PIL import Image

from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.errors import ArtifactError, KitError
from sdxl_sae_kit.items import Items, load_items
from sdxl_sae_kit.judges import WorldJudge
from sdxl_sae_kit.pipelines import load_pipeline
from sdxl_sae_kit.segmenters import GivenMasks, WorldSegmenter
from sdxl_sae_kit.studies import kept_masks, transport
from sdxl_sae_kit.studies import riebench as module
from sdxl_sae_kit.studies.benchmarked import FILE, RIEBench
from sdxl_sae_kit.studies.kept_masks import KeptMasks
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.riebench import riebench
from sdxl_sae_kit.studies.scoring import MEASURES

METHODS = {"sae": {"k": [4], "strength": [2]}, "steering": {"strength": [1]}, "random": {"k": [4], "strength": [2]}}
SETTINGS = ["none", "prompt", "sae, k 4, strength 2", "steering, strength 1", "random, k 4, strength 2"]
FEW = {"num_inference_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def items() -> Items:
    return load_items("world", 2).of("change object", "change background", "add object")


@pytest.fixture(scope="module")
def saes(pipe):
    return [sae_of(pipe, block, SAEConfig(k=8, expansion=2)) for block in ("up.0.1", "down.2.1")]


@pytest.fixture(scope="module")
def bench(pipe, saes, items, tmp_path_factory) -> RIEBench:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # SAEs of one step are tried at others: that is the question
        return riebench(pipe, saes, items, methods=METHODS, **FEW, store=tmp_path_factory.mktemp("bench"))


def lines(result: RIEBench) -> dict:
    return dict(Lines(result.artifact, FILE))


def same(one: RIEBench, other: RIEBench) -> None:
    """The same up to how batches of another size are rounded; one answer or two next to a tie may turn."""
    mine, theirs = lines(one), lines(other)
    turned = 0
    assert mine.keys() == theirs.keys()
    for name, line in mine.items():
        assert {**line, "scores": 0} == {**theirs[name], "scores": 0}
        for setting, scores in line.get("scores", {}).items():
            for measure, value in scores.items():
                again = theirs[name]["scores"][setting][measure]
                assert (value is None) == (again is None)
                if measure in ("reached", "kept"):
                    turned += value != again
                else:
                    assert value is None or value == pytest.approx(again, abs=2e-3)
    assert turned <= 2


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many pictures were drawn, call by call."""
    counts = []
    for place in (module, transport):
        draws = place.generate
        monkeypatch.setattr(
            place,
            "generate",
            lambda *given, _draws=draws, **more: counts.append(len(given[1])) or _draws(*given, **more),
        )
    return counts


def test_every_item_is_measured_in_every_setting_between_floor_and_ceiling(bench, items) -> None:
    found = lines(bench)
    assert sorted(found) == sorted(item.name for item in items) and not bench.failed
    blocks = "down.2.1+up.0.1"  # in the order of the forward pass, whatever that of the SAEs
    keys = [*SETTINGS[:2], *(f"{each}, {blocks}" for each in SETTINGS[2:])]
    assert [setting.key for setting in bench.settings] == keys
    for item in items:
        line = found[item.name]
        about = {name: line[name] for name in ("kind", "original", "edited", "seed", "failed")}
        assert about == {name: getattr(item, name, None) for name in about} and line["target"] == list(item.target)
        assert items[line["place"]] == item
        floor, ceiling, sae, steering, random = (line["scores"][key] for key in keys)
        assert all(tuple(scores) == MEASURES for scores in line["scores"].values())
        assert (floor["pixel"], floor["to original"], floor["kept"]) == (0, 0, 1)
        assert ceiling["to edited"] == 0 and ceiling["image similarity"] == pytest.approx(1, abs=1e-5)
        assert floor["to edited"] == pytest.approx(ceiling["to original"])
        assert min(edited["pixel"] for edited in (sae, steering, random)) > 0
        assert list(line["chosen"]) == keys[2:] and all(sum(n) <= 8 for n in line["chosen"][keys[2]].values())
        sheet = Image.open(io.BytesIO(bench.artifact.file(f"item-{line['place']}.webp").read_bytes()))
        assert sheet.size == (5 * 100 - 4, 96), "original, edited prompt, and every setting that edits"
    bench.artifact.verify()


def test_the_recipe_says_all_that_results_depend_on(bench, items, saes) -> None:
    recipe = bench.artifact.recipe
    assert recipe["items"] == {"digest": items.digest, "counts": dict.fromkeys(items.counts(), 2)}
    assert recipe["settings"][0] == ["none", None, 0.0, []]
    assert recipe["settings"][2] == ["sae", 4, 2.0, ["down.2.1", "up.0.1"]]
    assert {(hookpoint, digest) for hookpoint, _, digest in recipe["saes"]} == {(s.hookpoint, s.digest) for s in saes}
    told = {"model": "tiny-turbo", "num_inference_steps": 2, "guidance_scale": 0.0, "height": 64, "width": 64}
    told |= {"judge": WorldJudge().name, "segmenter": WorldSegmenter().name, "spatial": True, "seed": 0}
    assert {name: recipe[name] for name in told} == told
    assert recipe["features"] == {sae.hookpoint: sae.d_sae for sae in saes}


def test_a_finished_study_is_opened_without_drawing(pipe, bench, saes, items, drawn) -> None:
    again = riebench(pipe, saes[::-1], list(items), methods=METHODS, **FEW, store=bench.artifact.folder.parent.parent)
    assert not drawn and again.artifact.folder == bench.artifact.folder and again.rows()[0] == bench.rows()[0]


def test_batches_of_another_size_give_the_same(pipe, bench, saes, items, drawn, tmp_path) -> None:
    other = riebench(pipe, saes, items, methods=METHODS, **FEW | {"batch_size": 5}, store=tmp_path)
    assert set(drawn) == {5, 1} and sum(drawn) == len(items) * len(SETTINGS)
    assert other.artifact.name == bench.artifact.name
    same(bench, other)


def test_half_precision_measures_the_same_about(bench, saes, items, tmp_path) -> None:
    pipe = load_pipeline("tiny-turbo", device="cpu", dtype="bfloat16")
    methods = {"sae": METHODS["sae"], "neurons": {"k": [50], "strength": [1]}}
    half = riebench(pipe, saes, items[:1], methods=methods, **FEW, store=tmp_path)
    assert half.artifact.name != bench.artifact.name
    ((name, line),) = lines(half).items()
    none, prompt, sae, neurons = line["scores"].items()
    for setting, scores in (none, prompt, sae):
        assert scores["pixel"] == pytest.approx(lines(bench)[name]["scores"][setting]["pixel"], abs=0.03)
    assert min(scores["pixel"] for _, scores in (prompt, sae, neurons)) > 0


@pytest.mark.parametrize(("guidance", "neurons"), [(0.0, True), (3.0, False)])
def test_the_memory_told_is_what_a_source_holds(pipe, saes, items, guidance, neurons) -> None:
    placed = {sae.hookpoint: sae for sae in saes}
    drawn = {"num_inference_steps": 2, "guidance_scale": guidance, "height": 64, "width": 64}
    source = transport.Source.run(pipe, items[:2], placed, drawn, neurons=neurons)
    held = [each for side in source._sides for each in (side.updates, side.neurons) if each]
    found = sum(part.nbytes for each in held for parts in each._parts.values() for part in parts)
    assert found == 2 * module.count_bytes(pipe, placed, drawn, neurons)


def test_what_a_break_leaves_is_gone_on_with_and_gives_the_same(pipe, bench, saes, items, drawn, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):  # in the second batch, which has two of six items
        judge = Breaking(100)
        judge.left = calls_of_a_batch() + 2
        riebench(pipe, saes, items, methods=METHODS, judge=judge, **FEW, store=tmp_path)
    (artifact,) = (each for each in Store.at(tmp_path).artifacts() if each.name == bench.artifact.name)
    assert not artifact.finished and len(Lines(artifact, FILE)) == 4
    assert (artifact.folder / "item-3.webp").exists() and not (artifact.folder / "item-4.webp").exists()
    drawn.clear()
    same(bench, riebench(pipe, saes, items, methods=METHODS, **FEW, store=tmp_path))
    assert sum(drawn) == 2 * len(SETTINGS), "only what was left"


def calls_of_a_batch() -> int:
    """Times that the judge is asked for factors: once of the originals, and for every setting once, and twice more."""
    return 1 + 3 * len(SETTINGS)


@pytest.mark.slow
def test_killed_after_any_item_it_goes_on_with_the_others(
    pipe, bench, saes, items, drawn, monkeypatch, tmp_path
) -> None:
    n = 1 + int.from_bytes(os.urandom(1)) % (len(items) - 1)
    child = os.fork()
    if not child:
        add = Lines.add

        def add_some(self, unit, line):
            add(self, unit, line)
            if "scores" in line and len(self) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Lines, "add", add_some)
        riebench(pipe, saes, items, methods=METHODS, **FEW, store=tmp_path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    folder = tmp_path / "studies" / bench.artifact.name
    assert len((folder / FILE).read_text().splitlines()) == n, f"killed after {n} items"
    with open(folder / FILE, "a") as file:
        file.write('["add object 1", {"kind"')  # as a power cut leaves it
    same(bench, riebench(pipe, saes, items, methods=METHODS, **FEW, store=tmp_path))
    assert sum(drawn) == (len(items) - n) * len(SETTINGS), "only what was left"


class Counting(WorldSegmenter):
    """Counts what it is asked, and finds nothing on pictures of some items."""

    def __init__(self, *empty: str) -> None:
        super().__init__()
        self.empty, self.asked = empty, []
        self.name += f" but {empty}"

    def __call__(self, shots, asked):
        self.asked += [(shot.item, shot.side) for shot in shots]
        found = super().__call__(shots, asked)
        return [mask & (shot.item not in self.empty) for mask, shot in zip(found, shots, strict=True)]


def test_masks_are_asked_once_and_items_without_are_told_with_reasons(pipe, saes, items, tmp_path) -> None:
    bad = next(item.name for item in items if item.kind == "change object")
    segmenter = Counting(bad)
    first = riebench(pipe, saes, items, methods={}, segmenter=segmenter, **FEW, store=tmp_path)
    asked = len(segmenter.asked)
    assert asked == len(set(segmenter.asked)) == 2 * 4 + 2, "both pictures, and of added objects the edited one"
    second = riebench(
        pipe, saes, items, methods={"steering": {"strength": [1]}}, segmenter=segmenter, **FEW, store=tmp_path
    )
    assert len(segmenter.asked) == asked and second.artifact.name != first.artifact.name
    for result in (first, second):
        (failed,) = result.failed
        assert failed["item"] == bad and "the mask of either picture is empty" in failed["reason"]
        assert result.n == len(items) - 1
        assert result.artifact.stamp["facts"] == {"items": len(items), "failed": 1}
        line = lines(result)[bad]
        assert "scores" not in line and line["kind"] == "change object"
        assert result.artifact.file(f"item-{line['place']}.webp").exists()
    alone = riebench(
        pipe, saes, [each for each in items if each.name != bad], methods={"steering": {"strength": [1]}},
        segmenter=segmenter, **FEW, store=tmp_path,
    )  # fmt: skip
    for name, line in lines(alone).items():
        for setting, scores in line["scores"].items():
            there = lines(second)[name]["scores"][setting]
            assert scores["to original"] == pytest.approx(there["to original"], abs=2e-3), (
                "the failed one changes nothing"
            )


class Specks(WorldSegmenter):
    """Finds one pixel of each picture, which is half of no token anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "specks"

    def __call__(self, shots, asked):
        masks = [np.zeros((64, 64), dtype=bool) for _ in shots]
        for mask in masks:
            mask[5, 5] = True
        return masks


def test_a_mask_that_covers_no_token_is_a_failed_item_that_says_where(pipe, saes, items, tmp_path) -> None:
    found = riebench(pipe, saes, items[:1], methods={}, segmenter=Specks(), **FEW, store=tmp_path)
    assert "it covers no token by half" in found.failed[0]["reason"] and found.n == 0


def test_where_all_items_fail_nothing_is_edited(pipe, saes, items, drawn, tmp_path) -> None:
    result = riebench(
        pipe,
        saes,
        items[:2],
        methods=METHODS,
        segmenter=Counting(*(each.name for each in items)),
        **FEW,
        store=tmp_path,
    )
    assert result.n == 0 and len(result.failed) == 2 and drawn == [2, 2]


class Troubled:
    """Says of every picture where it is bright, or refuses it with a reason."""

    name = "troubled"

    def __init__(self, **reasons: str) -> None:
        self.reasons, self.asked = reasons, []

    def __call__(self, shots, asked):
        for shot in shots:
            if reason := self.reasons.get(shot.item.replace(" ", "_"), self.reasons.get("all")):
                raise KitError(reason)
        self.asked += [shot.item for shot in shots]
        return [shot.picture[:, :, 0] > 0.5 for shot in shots]


@pytest.fixture
def bright(items):
    """Pictures that are bright all over, but for the third item's, which is dark."""
    shots = np.ones((len(items), 4, 4, 3), dtype=np.float32)
    shots[2] = 0
    return shots


def test_what_a_segmenter_refused_is_asked_again_and_what_is_empty_is_not(tmp_path, items, bright) -> None:
    items = items.of("change object", "add object")
    bright = bright[: len(items)]
    artifact = Store.at(tmp_path).artifact("studies", "masks", {"study": "riebench masks"})
    first, *_ = (item.name.replace(" ", "_") for item in items)
    found = KeptMasks(artifact, Troubled(**{first: "busy"}), len(items)).of(items, bright, bright)
    assert "troubled says: busy" in found[0] and "is empty" in found[2] and not artifact.finished
    again = Troubled()
    found = KeptMasks(artifact, again, len(items)).of(items, bright, bright)
    assert not isinstance(found[0], str) and "is empty" in found[2] and artifact.finished
    assert set(again.asked) == {items[0].name}, "no other"


def test_the_same_reason_for_all_is_raised_and_nothing_kept(tmp_path, items, bright) -> None:
    artifact = Store.at(tmp_path).artifact("studies", "masks", {"study": "riebench masks"})
    kept = KeptMasks(artifact, Troubled(all="no network"), len(items))
    with pytest.raises(KitError, match="no network"):
        kept.of(items, bright, bright)
    assert not artifact.file("masks.jsonl").exists()
    alone = kept.of(items[:1], bright[:1], bright[:1])
    assert "no network" in alone[0], "of one item alone it may be the item's fault"


def test_two_studies_add_to_the_same_masks_at_once(tmp_path, items, bright) -> None:
    artifact = Store.at(tmp_path).artifact("studies", "masks", {"study": "riebench masks"})
    n, other = len(items), ~bright.astype(bool) * np.float32(1)
    one, two = (KeptMasks(artifact, Troubled(), n) for _ in range(2))
    mine = one.of(items[:3], bright[:3], bright[:3])
    theirs = two.of(items[1:], other[1:], other[1:])
    assert artifact.finished and artifact.stamp["facts"] == {"items": n}
    artifact.verify()
    for a, b in zip(mine[1:], theirs, strict=False):
        assert a == b if isinstance(a, str) else np.array_equal(a, b), "what is there first counts"


def test_masks_of_any_size_are_kept_bit_by_bit(tmp_path, items) -> None:
    rng = np.random.default_rng(0)
    masks = {item.name: (rng.random((5, 7)) < 0.5, rng.random((3, 3)) < 0.5) for item in items}
    artifact = Store.at(tmp_path).artifact("studies", "masks", {"study": "riebench masks"})
    shots = np.zeros((len(items), 4, 4, 3), dtype=np.float32)

    def find(_, asked, *__):
        return [masks[item.name] for item in asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_masks, "find_masks", find)
        kept = KeptMasks(artifact, WorldSegmenter(), len(items))
        kept.of(items[:2], shots[:2], shots[:2])
        kept.of(items, shots, shots)
    assert artifact.finished
    again = KeptMasks(artifact, WorldSegmenter(), len(items))
    for item, pair in zip(items, again.of(items, shots, shots), strict=True):
        assert all(
            (one == other).all() and one.shape == other.shape for one, other in zip(pair, masks[item.name], strict=True)
        )
    artifact.file("masks.jsonl").write_text("[]")
    with pytest.raises(ArtifactError, match=r"masks.jsonl is missing or has changed"):
        KeptMasks(artifact, WorldSegmenter(), len(items))


def test_numbers_that_are_not_finite_are_refused_and_what_was_measured_is_kept(pipe, saes, items, tmp_path) -> None:
    class Bad(WorldJudge):
        def semantic(self, before, after):
            return super().semantic(before, after) * np.nan

    with pytest.raises(KitError, match="is not finite, so it is not kept"):
        riebench(pipe, saes, items[:1], methods={}, judge=Bad(), **FEW, store=tmp_path)


def test_a_guided_model_draws_as_it_is_meant_to(items, tmp_path) -> None:
    base = load_pipeline("tiny-base")
    saes = [sae_of(base, "mid.0", SAEConfig(k=8, expansion=2))]
    found = riebench(base, saes, items[:1], methods={}, judge=None, store=tmp_path)
    assert (found.artifact.recipe["num_inference_steps"], found.artifact.recipe["guidance_scale"]) == (10, 3.0)


def test_random_features_depend_on_the_seed(pipe, saes, items, tmp_path) -> None:
    few = {"methods": {"random": METHODS["random"]}, **FEW, "store": tmp_path}
    one, other = (lines(riebench(pipe, saes, items[:2], seed=seed, **few)) for seed in (0, 1))
    key = next(key for key in one[items[0].name]["scores"] if key.startswith("random"))
    assert any(one[name]["scores"][key]["pixel"] != other[name]["scores"][key]["pixel"] for name in one)


def test_what_cannot_be_measured_is_refused(pipe, saes, items, tmp_path, unchecked_types, monkeypatch) -> None:
    def asked(**settings):
        given = {"saes": saes, "items": items[:1], **FEW, "store": tmp_path} | settings
        return riebench(pipe, given.pop("saes"), given.pop("items"), **given)

    for nothing in ([], "world", [1], None):
        with pytest.raises(KitError, match=r"riebench: items are one or more, such as load_items\('world', 20\)"):
            asked(items=nothing)
    with pytest.raises(KitError, match="Items need different names"):
        asked(items=[items[0], items[0]])
    with pytest.raises(KitError, match="2 of these 2 saes are of up.0.1"):
        asked(saes=[saes[0], saes[0]])
    with pytest.raises(KitError, match="Did you mean 'steering'"):
        asked(methods=["steerng"])
    with pytest.raises(KitError, match="segmenter is one such as AttentionSegmenter"):
        asked(segmenter=WorldSegmenter)
    with pytest.raises(KitError, match=r"no 'pear', only .* Take load_items\('world'\), or segmenter="):
        asked(items=load_items("natural", 1))
    with pytest.raises(KitError, match="No mask is given for item 'change object 1'; there are 1"):
        asked(segmenter=GivenMasks({"other": np.ones((4, 4))}))
    with pytest.raises(KitError, match="judge is one such as WorldJudge"):
        asked(judge=WorldJudge)
    with pytest.raises(KitError, match="spatial is True or False, not 'no'"):
        asked(spatial="no")
    with pytest.raises(KitError, match="batch_size must be an integer of at least 1"):
        asked(batch_size=0)
    with pytest.raises(KitError, match="seed must be an integer of at least 0"):
        asked(seed=-1)
    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="was trained on tiny-turbo"):
        patch.setattr("sdxl_sae_kit.interventions.describe", lambda _: SimpleNamespace(name="m", revision="1"))
        asked()
    with monkeypatch.context() as patch, pytest.raises(KitError, match=r"Pass segmenter=AttentionSegmenter\(pipe\)"):
        patch.setattr(module, "segmenter_of", lambda _: None)
        asked()
    with (
        monkeypatch.context() as patch,
        pytest.raises(KitError, match=r"Pass judge=EmbeddingJudge\(ClipEmbed\('openai"),
    ):
        patch.setattr("sdxl_sae_kit.judges.judge_of", lambda _: None)
        asked()
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_without_a_judge_only_pixels_are_told(pipe, saes, items, tmp_path) -> None:
    result = riebench(pipe, saes, items[:1], methods={"steering": {}}, judge=None, **FEW, store=tmp_path)
    (line,) = lines(result).values()
    assert {name for scores in line["scores"].values() for name, value in scores.items() if value is not None} <= {
        "pixel",
        "outside",
    }
    assert json.dumps(result.to_json())
