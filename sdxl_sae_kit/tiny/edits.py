"""Edits of scenes that change one factor and nothing else, named after the nine kinds that RIEBench tells apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdxl_sae_kit.errors import EditError, did_you_mean
from sdxl_sae_kit.tiny.world import COLOURS, FACTORS, SHAPES, Scene, factors, keep_place

EDIT_KINDS = {
    "change object": "shape",
    "add object": "count",
    "delete object": "count",
    "change content": "pattern",
    "change pose": "pose",
    "change colour": "colour",
    "change material": "material",
    "change background": "background",
    "change style": "style",
}
"""The nine kinds of edit that RIEBench knows and the factor each changes here."""

_SIDES = {"on the left": "left of", "on the right": "right of", "at the top": "above", "at the bottom": "below"}


@dataclass(frozen=True)
class Edit:
    """Two scenes that differ in one factor only."""

    kind: str
    before: Scene
    after: Scene


def edit(scene: Scene, factor: str, value: str) -> Scene:
    """Return the scene with one factor changed.

    Raises `EditError` for unknown factors and values, and for what the world lacks (a large object off centre).

    >>> edit(Scene("star", "red", "plain", "navy", "plain", "flat", "upright"), "colour", "blue").colour
    'blue'
    """
    if factor == "count":
        raise EditError("edit cannot change 'count' by itself: use add_object or delete_object.")
    if factor not in FACTORS:
        raise EditError(f"No factor {factor!r}; a scene has {', '.join(FACTORS)}.{did_you_mean(factor, FACTORS)}")
    if value not in FACTORS[factor]:
        known = FACTORS[factor]
        raise EditError(f"No {factor} {value!r}; it can be {', '.join(known)}.{did_you_mean(value, known)}")
    if factor not in factors(scene):
        raise EditError(f"A scene of {scene.count} has no {factor!r}; it has {', '.join(factors(scene))}.")
    edited = replace(scene, **{factor: value})  # type: ignore[arg-type]
    if edited.size == "large" and edited.position != "in the center":
        raise EditError(f"A large object is always in the center, not {edited.position}: make it small first.")
    return edited


def add_object(scene: Scene, shape: str, colour: str) -> Scene:
    """Put a second, plain object opposite the first, which must stand at a side; the first stays where it is."""
    if scene.count == "two" or scene.position not in _SIDES:
        raise EditError("add_object needs one object, standing at a side: there is no room for a second one here.")
    relation = _SIDES[scene.position]
    pair = replace(scene, position="in the center", relation=relation, shape2=shape, colour2=colour)
    return keep_place(scene, edit(edit(pair, "shape2", shape), "colour2", colour))


def delete_object(scene: Scene) -> Scene:
    """Take the second object away; the first stays where it is."""
    if scene.relation is None:
        raise EditError("delete_object needs two objects; this scene has one.")
    position = next(place for place, relation in _SIDES.items() if relation == scene.relation)
    return keep_place(scene, replace(scene, position=position, relation=None, shape2=None, colour2=None))


def edits(scene: Scene) -> list[Edit]:
    """List every edit of the nine kinds that can be made to this scene."""
    found = [
        Edit(kind, scene, edit(scene, factor, value))
        for kind, factor in EDIT_KINDS.items()
        if factor != "count"
        for value in FACTORS[factor]
        if value != getattr(scene, factor)
    ]
    if scene.count == "two":
        return [*found, Edit("delete object", scene, delete_object(scene))]
    if scene.position in _SIDES:
        found += [Edit("add object", scene, add_object(scene, shape, colour)) for shape in SHAPES for colour in COLOURS]
    return found
