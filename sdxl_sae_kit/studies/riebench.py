"""RIEBench: edits of nine kinds, made while the picture is drawn by moving features from one prompt to another.

Every method is measured on exactly the same items: pictures of both prompts and masks are made once, and shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sdxl_sae_kit.amounts import human_bytes, whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.attended import few_steps
from sdxl_sae_kit.errors import KitError
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.hookpoints import by_hookpoint, list_hookpoints, resolve
from sdxl_sae_kit.interventions import check_fit, check_model
from sdxl_sae_kit.items import Item, Items
from sdxl_sae_kit.judges import PictureJudge, Pictures, chosen_judge
from sdxl_sae_kit.masks import covered
from sdxl_sae_kit.neurons import list_layers
from sdxl_sae_kit.pipelines import generate
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.segmenters import Segmenter, check_asked, segmenter_of
from sdxl_sae_kit.studies.benchmarked import FILE, PICTURE, RIEBench
from sdxl_sae_kit.studies.distances import drawing, joined, made_by, tile
from sdxl_sae_kit.studies.grids import ByBlock, Forecast, Methods, settings_of
from sdxl_sae_kit.studies.kept_masks import KeptMasks
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.studies.scoring import Pair, Scoring
from sdxl_sae_kit.studies.transport import ENDS, METHODS, Setting, Source, Transport

_ASKED = "riebench"
_DRAWING = ("num_inference_steps", "guidance_scale", "height", "width")


@checked
def riebench(
    pipe: Any,
    saes: SAE | Iterable[SAE] | Mapping[Any, SAE],
    items: Items | Sequence[Item],
    *,
    methods: Methods = METHODS,
    by_block: ByBlock | None = None,
    segmenter: Segmenter | EllipsisType = ...,
    judge: PictureJudge | EllipsisType | None = ...,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    spatial: bool = True,
    seed: int = 0,
    batch_size: int = 20,
    store: Store | Path | str | None = None,
) -> RIEBench:
    """Move features from the edited prompt's picture into the original's while it is drawn, and measure what comes out.

    Of every item both prompts are drawn from the same seed, and their updates encoded where the item's masks say. A
    feature's score is its share of all activation within the mask on the edited prompt less that on the original one;
    the k features of highest score are added to the original's updates, step by step, at the edited mask, and the k of
    lowest score are taken away at the original's mask, `strength` times what they are. Methods: `sae` does so;
    `sae_adaptive` takes away what is there at that moment; `steering` moves whole updates; `neurons` moves outputs of
    the blocks' feed-forward layers; `random` moves as many random features. Beside them stand the pictures of the
    edited prompt (`prompt`, the ceiling) and of the original one (`none`, the floor).

    Pictures of the prompts are made once for all methods, masks once for all calls with these items and settings. An
    item without a mask is kept in the result, with the reason. Killed at any moment, it loses at most the batch in hand
    and goes on at the items that are not done; a finished study is opened at once.

    Args:
        pipe: an SDXL pipeline of diffusers.
        saes: one SAE for each block, of this model; the steps they were trained on may be others.
        items: from `load_items`, or several `Item`s.
        methods: names, with the benchmark's grids of k and strength (k 80 to 640 of SDXL's 20,480 features); or a
            mapping of each to its own, such as {"sae": {"k": [24], "strength": [1, 2]}, "steering": {}}. With none, {},
            only the pictures of the two prompts are drawn and measured.
        by_block: (method, k, strength), which is tried with all blocks, each block alone, and each left out.
        segmenter: what finds the masks; by default the embedded model's. Others need one.
        judge: what tells pictures apart; by default the embedded model's. Others need one; None measures pixels only.
        num_inference_steps, guidance_scale: of every picture; by default 4 and 0, but as a model is meant to be used
            that draws nothing good without guidance.
        spatial: move each activation to its own place; else the mean over the mask to all of it.
        seed: of the random features.
        batch_size: items drawn at once; what their blocks did is held in memory, for how much see the first line told.
        store: folder of artifacts.

    Raises:
        ArtifactError: SAEs of another model.
        HookpointError: the pipeline has no such hookpoint.
        KitError: no items, two of one name, no segmenter or judge for this model, masks that the embedded segmenter
            knows nothing of or that are not among those given, unknown methods, impossible k or strength (see
            `settings_of`), or a segmenter that refuses a whole batch for one reason.

    The benchmark: RIEBench, of the paper on sparse autoencoders for SDXL Turbo (arXiv 2410.22366).

    Example:
        >>> riebench(pipe, saes_by_hookpoint, load_items("world", 20))                            # doctest: +SKIP
    """
    placed = _read_saes(pipe, saes)
    items = _read_items(items)
    features = {block: sae.d_sae for block, sae in placed.items()}
    neurons = {block: _count_neurons(pipe, block) for block in placed}
    settings = settings_of(methods, features, neurons, by_block)
    finds = _read_segmenter(pipe, segmenter)
    check_asked(finds, items)
    tells = _read_judge(pipe, judge)
    size = whole_number(f"{_ASKED}: batch_size", batch_size)
    if not isinstance(spatial, bool):
        raise KitError(f"{_ASKED}: spatial is True or False, not {spatial!r}.")
    model = made_by(pipe)
    pictures = {
        "items": {"digest": items.digest, "counts": items.counts()},
        **model,
        **drawing(pipe, **few_steps(pipe, num_inference_steps, guidance_scale)),
        "segmenter": finds.name,
    }
    recipe = {
        "study": _ASKED,
        **pictures,
        "saes": [[block, sae.name, sae.digest] for block, sae in placed.items()],
        "features": features,
        "settings": [[each.method, each.k, each.strength, list(each.blocks)] for each in settings],
        "judge": tells and tells.name,
        "spatial": spatial,
        "seed": whole_number(f"{_ASKED}: seed", seed, least=0),
        **({"n_contest": len(settings_of(methods, features, neurons))} if by_block else {}),
    }
    place = Store.at(store)
    artifact = place.artifact("studies", f"riebench_{model['model']}_{len(items)}items", recipe)
    if not artifact.finished:
        with artifact.lock():
            if not artifact.finished:
                masks = place.artifact("studies", f"masks_{len(items)}items", {"study": "riebench masks", **pictures})
                kept = KeptMasks(masks, finds, len(items))
                _Bench(pipe, placed, items, settings, kept, tells, artifact).run(size)
    return RIEBench.open(artifact.folder)


# What is asked --------------------------------------------------------------------------------------------------------


def _read_saes(pipe: Any, saes: Any) -> dict[str, SAE]:
    """The SAEs by hookpoint, in the order of the forward pass."""
    given = by_hookpoint(_ASKED, "saes", SAE, saes)
    for sae in given.values():
        check_model(_ASKED, pipe, sae)
        check_fit(pipe, sae)
    return {name: given[name] for name in list_hookpoints(pipe.unet) if name in given}


def _count_neurons(pipe: Any, block: str) -> int:
    unet = getattr(pipe.unet, "_orig_mod", pipe.unet)  # a compiled one wraps it
    layers = [unet.get_submodule(path) for path in list_layers(unet, block).values()]
    return sum(layer.proj.out_features // 2 for layer in layers)  # half of them are gates


def _read_items(items: Any) -> Items:
    if not isinstance(items, Sequence) or not len(items) or not all(isinstance(item, Item) for item in items):
        raise KitError(f"{_ASKED}: items are one or more, such as load_items('world', 20) gives, not {items!r:.80}.")
    return items if isinstance(items, Items) else Items(tuple(items))


def _read_segmenter(pipe: Any, segmenter: Any) -> Segmenter:
    found = segmenter_of(pipe) if segmenter is ... else segmenter
    if found is None:
        raise KitError(
            f"{_ASKED}: this model has no segmenter of its own, so nothing says where edits are to be made. Pass "
            "segmenter=AttentionSegmenter(pipe), GroundedSegmenter(), or GivenMasks(masks)."
        )
    if isinstance(found, type) or not isinstance(found, Segmenter):
        raise KitError(f"{_ASKED}: segmenter is one such as AttentionSegmenter(pipe), not {found!r}.")
    return found


def _read_judge(pipe: Any, judge: Any) -> PictureJudge | None:
    found = chosen_judge(_ASKED, pipe, judge)
    if found is None and judge is ...:
        raise KitError(
            f"{_ASKED}: this model has no judge of its own, so nothing says how well edits do. Pass judge="
            "EmbeddingJudge(ClipEmbed('openai/clip-vit-large-patch14'), Lpips()), or None to measure pixels only."
        )
    return found


# The work -------------------------------------------------------------------------------------------------------------


class _Bench:
    """One run: every setting on every item, batch by batch."""

    def __init__(
        self, pipe: Any, saes: Mapping[str, SAE], items: Items, settings: Sequence[Setting], masks: KeptMasks,
        judge: PictureJudge | None, artifact: Artifact,
    ) -> None:  # fmt: skip
        self.pipe, self.saes, self.items, self.settings = pipe, saes, items, settings
        self.masks, self.judge, self.artifact = masks, judge, artifact
        self.lines = Lines(artifact, FILE)
        self.neurons = any(setting.method == "neurons" for setting in settings)
        self.drawing, self.moving = (
            {name: artifact.recipe[name] for name in names} for names in (_DRAWING, ("spatial", "seed"))
        )

    def run(self, size: int) -> None:
        """Measure the items that are not done yet, in batches, and finish."""
        left = [place for place, item in enumerate(self.items) if item.name not in self.lines]
        cost = Forecast(len(left), len(self.settings), self.drawing["num_inference_steps"])
        held = human_bytes(min(size, len(left)) * count_bytes(self.pipe, self.saes, self.drawing, self.neurons))
        tqdm.write(f"{cost} A batch holds {held} of memory. As {self.artifact.name}.")
        total = len(self.items) * cost.n_settings
        with tqdm(desc=_ASKED, unit="picture", total=total, initial=total - cost.n_pictures) as self.bar:
            for start in range(0, len(left), size):
                self._measure(left[start : start + size])
        failed = sum(line["failed"] is not None for line in self.lines.values())
        self.artifact.seal(facts={"items": len(self.items), "failed": failed})

    def _measure(self, places: Sequence[int]) -> None:
        """All settings on a batch of items; an item is done when its line is written, which is after its pictures."""
        source = self._source(places)
        found = self.masks.of([self.items[place] for place in places], source.original, source.edited)
        masks = [each if isinstance(each, str) else _on_grids(each, source.blocks) for each in found]
        sound = [at for at, found in enumerate(masks) if not isinstance(found, str)]
        for at, (place, mask) in enumerate(zip(places, masks, strict=True)):
            if isinstance(mask, str):
                pair = [tile(pictures[at]) for pictures in (source.original, source.edited)]
                self._keep(place, pair, {"failed": mask})
                self.bar.update(len(self.settings))
        if sound:
            source.keep(sound)
            self._try([places[at] for at in sound], source, [masks[at] for at in sound])

    def _source(self, places: Sequence[int]) -> Source:
        items = [self.items[place] for place in places]
        return Source.run(self.pipe, items, self.saes, self.drawing, neurons=self.neurons)

    def _try(self, places: Sequence[int], source: Source, masks: Sequence[Any]) -> None:
        items = [self.items[place] for place in places]
        score = Scoring(self.judge, items, masks, source.original, source.edited)
        transport = source.masked(masks, **self.moving)
        scores: list[dict[str, Any]] = [{} for _ in items]
        chosen: list[dict[str, Any]] = [{} for _ in items]
        tiles = [[tile(picture) for picture in pair] for pair in zip(source.original, source.edited, strict=True)]
        for setting in self.settings:
            pictures, moved = self._draw(setting, items, source, transport)
            for at, told in enumerate(score(pictures)):
                scores[at][setting.key] = told
                if setting.method not in ENDS:
                    chosen[at][setting.key] = moved[at]
                    tiles[at].append(tile(pictures[at]))
            self.bar.update(len(items))
        for at, place in enumerate(places):
            self._keep(place, tiles[at], {"failed": None, "scores": scores[at], "chosen": chosen[at]})

    def _draw(
        self, setting: Setting, items: Sequence[Item], source: Source, transport: Transport
    ) -> tuple[Pictures, Sequence[Any]]:
        """The pictures of a setting, and how many features of each block were added and removed, item by item."""
        if setting.method in ENDS:
            return (source.original if setting.method == "none" else source.edited), []
        with transport.edited(setting) as moved:
            drawn = draw_items(self.pipe, items, self.drawing)
        return drawn, moved

    def _keep(self, place: int, tiles: Sequence[Image.Image], result: Mapping[str, Any]) -> None:
        item = self.items[place]
        write_atomically(self.artifact.file(PICTURE.format(place)), joined([tiles]))
        about = {"kind": item.kind, "original": item.original, "edited": item.edited, "seed": item.seed, "place": place}
        self.lines.add(item.name, about | {"target": item.target and list(item.target)} | dict(result))


def _on_grids(masks: Pair, grids: Mapping[str, tuple[int, int]]) -> Pair | str:
    """The masks, or why the item has failed: one covers no token at some hookpoint, so nothing could be moved there."""
    for side, mask in zip(("original", "edited"), masks, strict=True):
        for block, grid in grids.items():
            if not covered(mask, grid).any():
                return f"the mask of the {side} picture is empty: at {block} it covers no token by half"
    return masks


def count_bytes(pipe: Any, saes: Mapping[str, SAE], drawn: Mapping[str, Any], neurons: bool) -> int:
    """What `Source` holds of each item: updates, and neurons if asked, of both prompts at every step."""
    latents = drawn["height"] // pipe.vae_scale_factor, drawn["width"] // pipe.vae_scale_factor
    values = 0
    for block, sae in saes.items():
        height, width = resolve(pipe.unet, block).grid(*latents)
        values += height * width * (sae.d_in + (_count_neurons(pipe, block) if neurons else 0))
    halves = 2 if drawn["guidance_scale"] > 1 else 1
    return int(2 * drawn["num_inference_steps"] * halves * values * pipe.unet.dtype.itemsize)


def time_drawing(pipe: Any, items: Items, num_inference_steps: int, guidance_scale: float) -> float:
    """Seconds that a picture takes to draw, of the quicker of two batches of these items."""
    settings, seconds = drawing(pipe, num_inference_steps, guidance_scale), []
    for _ in range(2):
        started = time.perf_counter()
        draw_items(pipe, items, settings)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / len(items)


def draw_items(pipe: Any, items: Sequence[Item], settings: Mapping[str, Any]) -> Pictures:
    """The pictures of the items' original prompts, colours 0 to 1."""
    texts, seeds = [item.original for item in items], [item.seed for item in items]
    return np.asarray(generate(pipe, texts, seeds, **settings, output_type="np"), dtype=np.float32)
