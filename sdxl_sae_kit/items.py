"""Items of RIEBench: two prompts that differ in one thing, what to find on their pictures, and what must change.

Sources: `"world"` (edits of one factor in the embedded model's world, whose truth is known), `"natural"` (our own set
for real SDXL), or a file in the published format.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import PromptError, did_you_mean
from sdxl_sae_kit.files import canonical_json, sha256
from sdxl_sae_kit.item_files import Record, read_records
from sdxl_sae_kit.masks import shortened
from sdxl_sae_kit.prompts import is_held_out
from sdxl_sae_kit.tiny.edits import EDIT_KINDS, Edit, add_object, delete_object, edit
from sdxl_sae_kit.tiny.judge import expected_answers
from sdxl_sae_kit.tiny.world import COLOURS, FACTORS, SHAPES, Scene, caption, sample_scene

EDIT_TYPES: Mapping[int, str] = MappingProxyType(dict(enumerate(EDIT_KINDS, 1)))
"""The nine kinds of edit by the number that the published file has for each."""

MOST = 10_000
"""Items of a kind that the world is asked for at most: it must find different originals."""

_NATURAL = Path(__file__).with_name("natural_items.json")
_PLACES = {"left of": "on the left", "right of": "on the right", "above": "at the top", "below": "at the bottom"}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_TEXTS = ("name", "original", "edited", "original_mask", "edited_mask", "instruction")
_NEEDED = _TEXTS[:3]  # masks may be given by hand, so that nothing needs to be looked for
_FIRST, _SECOND = ("shape", "colour"), ("shape2", "colour2")
_OF_AN_OBJECT = (*_FIRST, *_SECOND)


@dataclass(frozen=True)
class Item:
    """One edit: what to draw (`original`), what to draw instead (`edited`), and where the two pictures differ.

    Raises:
        KitError: a text, kind, scene or seed that is none.
    """

    name: str
    """Unique in its set."""
    kind: str
    """A value of `EDIT_TYPES`."""
    original: str
    edited: str
    original_mask: str = "#everything"
    """What to find on the original prompt's picture: a thing, "background", "#everything", or "~" and what not."""
    edited_mask: str = "#everything"
    instruction: str = ""
    seed: int = 0
    """Of both pictures, 0 to 2⁶³ − 1."""
    before: Scene | None = None
    """What the prompts describe, where they are the tiny world's."""
    after: Scene | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for name in _TEXTS:
            _check_text(name, getattr(self, name), needed=name in _NEEDED)
        for name, scene in (("before", self.before), ("after", self.after)):
            if not isinstance(scene, Scene | None):
                raise PromptError(f"Item: {name} is a Scene of the tiny world or None, not {shortened(scene)}.")
        object.__setattr__(self, "seed", whole_number("Item: seed", self.seed, least=0))
        if self.seed >= 2**63:
            raise PromptError(f"Item: the seed {self.seed} is too large; seeds are at most 2⁶³ − 1.")

    @property
    def target(self) -> tuple[str, str] | None:
        """The factor that changes and the value that the judge must name; None where the scenes are not known.

        Of two objects the judge counts the left or upper one as the first, whatever the prompt says first.
        """
        return None if self.before is None or self.after is None else _target(self.kind, self.before, self.after)

    @property
    def wanted(self) -> Mapping[str, str]:
        """All that the judge must name: the target and, where an object is added, that object's shape and colour."""
        if self.target is None or self.after is None:
            return {}
        answers = expected_answers(self.after)
        added = _as_second(self.after) if self.kind == "add object" else ()
        return dict([self.target]) | {factor: str(answers[factor]) for factor in added}

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """What is to stay, as (factor before, factor after): what the first is on the original, the second is edited.

        They differ where an object comes or goes, as the one that stays then may be the judge's second of two.
        """
        if self.before is None or self.after is None:
            return ()
        was, becomes = expected_answers(self.before), expected_answers(self.after)
        if self.before.count == self.after.count:
            names = {factor: factor for factor in was}
        else:
            stays = dict(zip(_as_first(self.before), _as_first(self.after), strict=True))
            names = {factor: factor for factor in was if factor not in _OF_AN_OBJECT} | stays
        return tuple(
            (one, other) for one, other in names.items() if was[one] is not None and becomes.get(other) == was[one]
        )


@dataclass(frozen=True, repr=False)
class Items(Sequence[Item]):
    """Items of different names, in order; a slice of them is one of these, too.

    Raises:
        PromptError: something else than an `Item` is among them, or two have one name.
    """

    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if strange := [item for item in self.items if not isinstance(item, Item)]:
            raise PromptError(f"Items are made of Items such as load_items gives, not {shortened(strange[0])}.")
        if twins := [name for name, n in Counter(item.name for item in self.items).items() if n > 1]:
            raise PromptError(f"Items need different names; there is more than one {twins[0]!r}. Rename all but one.")

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, item: int) -> Item: ...
    @overload
    def __getitem__(self, item: slice) -> Items: ...
    def __getitem__(self, item: int | slice) -> Item | Items:
        return Items(self.items[item]) if isinstance(item, slice) else self.items[item]

    @cached_property
    def digest(self) -> str:
        """sha256 of all of it, for recipes."""
        return sha256(canonical_json([asdict(item) for item in self.items]).encode())

    def counts(self) -> dict[str, int]:
        """How many there are of each kind that is there, in the order of `EDIT_TYPES`."""
        found = Counter(item.kind for item in self.items)
        return {kind: found[kind] for kind in EDIT_TYPES.values() if found[kind]}

    def of(self, *kinds: str) -> Items:
        """Those of these kinds, in their order.

        Raises:
            PromptError: there is no such kind of edit.

        >>> load_items("natural").of("change colour", "change material").counts()
        {'change colour': 9, 'change material': 9}
        """
        for kind in kinds:
            _check_kind(kind)
        return Items(tuple(item for item in self.items if item.kind in kinds))

    def reseeded(self, seed: int) -> Items:
        """The same with the seed `seed + i` for the i-th, counted from 0.

        Raises:
            KitError: it is no integer from 0 on, or the last seed would be more than 2⁶³ − 1.
        """
        seed = whole_number("seed", seed, least=0)
        if seed + len(self) > 2**63:
            raise PromptError(f"The seed {seed} is too large: {len(self)} items need seeds of at most 2⁶³ − 1.")
        return Items(tuple(replace(item, seed=seed + place) for place, item in enumerate(self.items)))

    def rows(self, n: int | None = None) -> list[dict[str, Any]]:
        """The first n as rows of a table; KitError where that is no integer from 0 on."""
        n = len(self) if n is None else whole_number("n", n, least=0)
        return [
            {
                "item": item.name,
                "kind": item.kind,
                "original": item.original,
                "edited": item.edited,
                "masks": " → ".join(dict.fromkeys((item.original_mask, item.edited_mask))),
                "target": ", ".join(map(" ".join, item.wanted.items())) or "not known",
                "seed": item.seed,
            }
            for item in self.items[:n]
        ]

    def __repr__(self) -> str:
        return f"Items: {len(self):,}" + "".join(f", {kind} {n:,}" for kind, n in self.counts().items())

    def _repr_html_(self) -> str:
        counts = [{"kind": kind, "items": n} for kind, n in self.counts().items()]
        first = html.table(self.rows(10), f"The first of {len(self):,} items")
        return html.fragment(first, html.table(counts, "Items of each kind"))


@checked
def load_items(source: str | Path, n: int | None = None, *, seed: int = 0) -> Items:
    """Items from a source, the i-th with seed `seed + i`.

    Args:
        source: `"world"` (made anew, with prompts that are held out and changes that can be seen; the sets of fewer are
            the first of larger ones), `"natural"` (81 edits in our own words), or the path of a file in the published
            format: JSON, a list of records or an object id → record. RIEBench's own file is not part of this kit.
        n: how many of each kind; needed for `"world"`, otherwise at most the first n of each, all by default.
        seed: of the first item's pictures, and what the world's scenes are drawn from.

    Raises:
        PromptError: unknown source, or a file that cannot be read; the message names the item and the field.
        KitError: n or seed is no integer in its range.

    >>> load_items("world", 20).counts()["change pose"]
    20
    """
    n = None if n is None else whole_number("load_items: n", n)
    seed = whole_number("load_items: seed", seed, least=0)
    items: Iterable[Item]
    if source == "world":
        items = _world(n, seed)
    elif source == "natural":
        items = _first(map(_from_record, read_records(_NATURAL)), n)
    else:
        items = _first(map(_from_record, read_records(_known(source))), n)
    return Items(tuple(items)).reseeded(seed)


def _known(source: str | Path) -> Path:
    path = Path(source)
    if not path.suffix and not os.path.exists(path):  # which is False, too, of a name that no file can have
        raise PromptError(
            f"Unknown items {shortened(str(source))}; they are 'world', 'natural', or the path of a JSON file."
            f"{did_you_mean(str(source), ['world', 'natural'])}"
        )
    return path


def _from_record(record: Record) -> Item:
    told = record._asdict()
    return Item(kind=EDIT_TYPES[told.pop("type_id")], **told)


def _first(items: Iterable[Item], n: int | None) -> Iterator[Item]:
    """At most n of each kind, in their order."""
    taken: Counter[str] = Counter()
    for item in items:
        taken[item.kind] += 1
        if n is None or taken[item.kind] <= n:
            yield item


def _check_kind(kind: str) -> None:
    known = EDIT_TYPES.values()
    if kind not in known:
        raise PromptError(f"No kind of edit {kind!r}; there are {', '.join(known)}.{did_you_mean(str(kind), known)}")


def _check_text(name: str, text: object, *, needed: bool) -> None:
    if not isinstance(text, str):
        raise PromptError(f"Item: {name} is a text, not {shortened(text)}.")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise PromptError(f"Item: {name} is {shortened(text)}, no valid Unicode. Mend it.")
    if needed and not text.strip():
        raise PromptError(f"Item: {name} is {shortened(text)}, which says nothing. Write a text.")


# Edits of the tiny world ---------------------------------------------------------------------------------------------


def _world(n: int | None, seed: int) -> list[Item]:
    """n of each kind, the kinds in turn, so that fewer are the first of more."""
    if n is None or n > MOST:
        raise PromptError(f"load_items('world') makes as many of each kind as you want: say n=, at most {MOST:,}.")
    in_turn = chain.from_iterable(zip(*_world_edits(n, seed).values(), strict=True))
    return [_from_edit(made, f"{made.kind} {place // len(EDIT_KINDS) + 1}") for place, made in enumerate(in_turn)]


def _world_edits(n: int, seed: int) -> dict[str, list[Edit]]:
    """n edits of each kind; a random scene goes to the kind that has fewest of those that can use it, and to no other.

    Each scene has random numbers of its own, so that what comes first is the same for any n.
    """
    rng = np.random.RandomState([(seed >> 32) % 2**32, seed % 2**32])
    made: dict[str, list[Edit]] = {kind: [] for kind in EDIT_KINDS}
    seen = set()
    while wanting := [kind for kind in made if len(made[kind]) < n]:
        scene = sample_scene(rng)
        if (words := caption(scene)) in seen or not is_held_out(words):
            continue
        seen.add(words)
        chance = np.random.RandomState(rng.randint(2**31))
        tried = (_world_edit(kind, scene, chance) for kind in sorted(wanting, key=lambda kind: len(made[kind])))
        if found := next(filter(None, tried), None):
            made[found.kind].append(found)
    return made


def _world_edit(kind: str, scene: Scene, rng: np.random.RandomState) -> Edit | None:
    """A random edit of this kind that can be seen and whose caption is held out, if there is one."""
    fitting = (after for after in _edited(kind, scene, rng) if is_held_out(caption(after)))
    return next((Edit(kind, scene, after) for after in fitting if _target(kind, scene, after)), None)


def _edited(kind: str, scene: Scene, rng: np.random.RandomState) -> Iterator[Scene]:
    """What an edit of this kind can make of the scene, in random order."""
    if kind == "delete object":
        if scene.count == "two":
            yield delete_object(scene)
    elif kind == "add object":
        if scene.count == "one" and scene.position in _PLACES.values():
            things = list(product(SHAPES, COLOURS))
            yield from (add_object(scene, *things[place]) for place in rng.permutation(len(things)))
    else:
        factor = EDIT_KINDS[kind]
        others = [value for value in FACTORS[factor] if value != getattr(scene, factor)]
        yield from (edit(scene, factor, others[place]) for place in rng.permutation(len(others)))


def _target(kind: str, before: Scene, after: Scene) -> tuple[str, str] | None:
    """The factor of this kind that the judge should answer anew, and the answer; None where it sees no change."""
    was, becomes = expected_answers(before), expected_answers(after)
    factor = EDIT_KINDS[kind]
    for name in (factor, f"{factor}2"):
        old, new = was.get(name), becomes.get(name)
        if old is not None and new is not None and old != new:
            return name, new
    return None


def _as_first(scene: Scene) -> tuple[str, str]:
    """What the judge calls shape and colour of the object that the prompt says first."""
    return _SECOND if scene.relation in ("right of", "below") else _FIRST


def _as_second(pair: Scene) -> tuple[str, str]:
    """What it calls those of the other one."""
    return _FIRST if _as_first(pair) == _SECOND else _SECOND


def _from_edit(made: Edit, name: str) -> Item:
    mask = _mask(made)
    return Item(
        name=name,
        kind=made.kind,
        original=caption(made.before),
        edited=caption(made.after),
        original_mask=mask,
        edited_mask=mask,
        instruction=_instruction(made),
        before=made.before,
        after=made.after,
    )


def _mask(made: Edit) -> str:
    """Where the edit is, in the words that the world's segmenter knows."""
    factor = EDIT_KINDS[made.kind]
    if factor == "style":
        return "#everything"
    if factor in ("background", "pattern"):
        return "background"
    pair = made.after if made.kind == "add object" else made.before
    if pair.relation is None:
        return "object"
    return f"object {_second_place(pair) if factor == 'count' else _PLACES[pair.relation]}"


def _second_place(pair: Scene) -> str:
    """Where the second of two objects stands."""
    return _PLACES[_OPPOSITE[str(pair.relation)]]


def _instruction(made: Edit) -> str:
    before, after = made.before, made.after
    place = f" {_PLACES[before.relation]}" if before.relation else ""
    thing = f"the {before.colour} {before.shape}{place}"
    if made.kind == "add object":
        return f"add {_a(after.colour2)} {after.shape2} {_second_place(after)}"
    if made.kind == "delete object":
        return f"remove the {before.colour2} {before.shape2} {_second_place(before)}"
    return {
        "change object": f"turn {thing} into a {after.shape}",
        "change content": "draw a grid on the background" if after.pattern == "grid" else "make the background plain",
        "change pose": f"tilt {thing}" if after.pose == "tilted" else f"set {thing} upright",
        "change colour": f"make {thing} {after.colour}",
        "change material": f"make {thing} {after.material}",
        "change background": f"make the background {after.background}",
        "change style": f"make it {'a sketch' if after.style == 'sketch' else after.style}",
    }[made.kind]


def _a(word: str | None) -> str:
    return f"{'an' if word == 'orange' else 'a'} {word}"
