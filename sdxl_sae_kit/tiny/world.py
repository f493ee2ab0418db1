"""A captioned picture world with known factors: one or two shapes on a background, 64 x 64 RGB.

A `Scene` is drawn anti-aliased from signed distance functions, so its object masks are exact, and its caption can leave
factors out, so that a picture has freedom that its words do not fix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from sdxl_sae_kit.errors import EditError, did_you_mean

SIZE = 64

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = {
    "red": (222, 38, 38),
    "green": (40, 175, 60),
    "blue": (45, 95, 235),
    "yellow": (248, 222, 50),
    "purple": (150, 60, 195),
    "orange": (248, 140, 30),
}
MATERIALS = ("plain", "striped", "checkered")
RADII = {"small": 0.38, "large": 0.62}
POSITIONS = {
    "in the center": (0.0, 0.0),
    "on the left": (-0.44, 0.0),
    "on the right": (0.44, 0.0),
    "at the top": (0.0, -0.44),
    "at the bottom": (0.0, 0.44),
}
BACKGROUNDS = {
    "black": (20, 20, 24),
    "white": (240, 240, 238),
    "gray": (128, 128, 130),
    "navy": (25, 34, 100),
    "teal": (14, 112, 105),
}
PATTERNS = ("plain", "grid")
STYLES = ("flat", "sketch", "neon")
POSES = ("upright", "tilted")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "material": MATERIALS,
    "size": tuple(RADII),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    "style": STYLES,
    "pose": POSES,
    "count": ("one", "two"),
    "relation": tuple(RELATIONS),
    "shape2": SHAPES,
    "colour2": tuple(COLOURS),
}
"""Every factor and its values. Size and position belong to one-object scenes, the last three to two-object scenes."""

_CONNECTIVES = ("a sketch of", "and", "shape", "on a", "background")
WORDS = tuple(sorted(set(" ".join([*_CONNECTIVES, *(" ".join(values) for values in FACTORS.values())]).split())))
"""Every word a caption can hold, and the factor values."""

ONE_OBJECT_FACTORS = ("size", "position")
TWO_OBJECT_FACTORS = ("relation", "shape2", "colour2")
_PAIR_OFFSET, _PAIR_RADIUS = 0.46, 0.41
_ONE_SWAY, _PAIR_SWAY, _RADIUS_SWAY = 0.05, 0.04, 0.05

Plane = Float[np.ndarray, "64 64"]
_rows, _columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_X, _Y = (_columns + 0.5) / SIZE * 2 - 1, (_rows + 0.5) / SIZE * 2 - 1


@dataclass(frozen=True)
class Scene:
    """One picture's factors. A second object is there exactly when `relation` is set: "first `relation` second"."""

    shape: str
    colour: str
    material: str
    background: str
    pattern: str
    style: str
    pose: str
    size: str = "small"
    position: str = "in the center"
    relation: str | None = None
    shape2: str | None = None
    colour2: str | None = None
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Sway right, down, in radius and in angle, usually within [-1, 1]; no caption tells it."""

    @property
    def count(self) -> str:
        """How many objects: "one" or "two"."""
        return "one" if self.relation is None else "two"


def factors(scene: Scene) -> dict[str, str]:
    """Return the factors that this scene has, by name: size and position only for one object, a relation for two."""
    absent = TWO_OBJECT_FACTORS if scene.count == "one" else ONE_OBJECT_FACTORS
    return {name: str(getattr(scene, name)) for name in FACTORS if name not in absent}


def visible_factors(scene: Scene) -> dict[str, str]:
    """Return the factors that can be seen in a picture of this scene.

    A plain circle looks the same in any pose, and inside the outline of a small sketch there is no room for a material.
    """
    hidden = {"pose"} if scene.shape == "circle" and scene.material == "plain" else set()
    if scene.style == "sketch" and scene.size == "small":
        hidden |= {"material"}
    return {name: value for name, value in factors(scene).items() if name not in hidden}


def sample_scene(rng: np.random.RandomState) -> Scene:
    """Draw a random scene: 30 % have two objects, plain materials and flat pictures are the commonest."""

    # The order of the draws is part of the world: the same random state always gave the same scenes.
    def pick(values: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
        return values[rng.randint(len(values)) if weights is None else rng.choice(len(values), p=weights)]

    scene = Scene(
        shape=pick(SHAPES),
        colour=pick(FACTORS["colour"]),
        material=pick(MATERIALS, (0.5, 0.25, 0.25)),
        background=pick(FACTORS["background"]),
        pattern=pick(PATTERNS, (0.75, 0.25)),
        style=pick(STYLES, (0.6, 0.2, 0.2)),
        pose=pick(POSES, (0.7, 0.3)),
    )
    if rng.rand() < 0.3:
        scene = replace(scene, relation=pick(FACTORS["relation"]), shape2=pick(SHAPES), colour2=pick(FACTORS["colour"]))
    elif pick(FACTORS["size"]) == "large":
        scene = replace(scene, size="large")
    else:
        scene = replace(scene, position=pick(FACTORS["position"]))
    right, down, radius, angle = rng.uniform(-1, 1, 4).round(3).tolist()
    return replace(scene, jitter=(right, down, radius, angle))


# Pictures -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    """One shape where it is drawn, in units of half the picture."""

    shape: str
    colour: str
    material: str
    centre: tuple[float, float]
    radius: float
    angle: float = 0.0

    def coordinates(self) -> tuple[Plane, Plane]:
        """Every pixel's place relative to the centre, turned upright and in units of the radius."""
        x, y = (_X - self.centre[0]) / self.radius, (_Y - self.centre[1]) / self.radius
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return cos * x + sin * y, -sin * x + cos * y


def _objects(scene: Scene) -> list[_Object]:
    """The objects from back to front: the second object lies behind the first."""
    right, down, radius, angle = scene.jitter
    turn = float(np.deg2rad(40 + 5 * angle) if scene.pose == "tilted" else np.deg2rad(2 * angle))
    if scene.relation is None:
        x, y = POSITIONS[scene.position]
        centre = (x + _ONE_SWAY * right, y + _ONE_SWAY * down)
        size = RADII[scene.size] * (1 + _RADIUS_SWAY * radius)
        return [_Object(scene.shape, scene.colour, scene.material, centre, size, turn)]
    assert scene.shape2 is not None and scene.colour2 is not None
    x, y = RELATIONS[scene.relation]
    size = _PAIR_RADIUS * (1 + _RADIUS_SWAY * radius)
    first = (_PAIR_OFFSET * x + _PAIR_SWAY * right, _PAIR_OFFSET * y + _PAIR_SWAY * down)
    second = (-_PAIR_OFFSET * x + _PAIR_SWAY * down, -_PAIR_OFFSET * y + _PAIR_SWAY * right)
    return [
        _Object(scene.shape2, scene.colour2, "plain", second, size),
        _Object(scene.shape, scene.colour, scene.material, first, size, turn),
    ]


def keep_place(before: Scene, after: Scene) -> Scene:
    """Return `after` with the jitter that draws its first object just where `before` has it."""
    angle = before.jitter[3]
    wanted, resting = _objects(before)[-1], _objects(replace(after, jitter=(0.0, 0.0, 0.0, angle)))[-1]
    sway = _ONE_SWAY if after.count == "one" else _PAIR_SWAY
    right, down = ((wanted.centre[axis] - resting.centre[axis]) / sway for axis in (0, 1))
    return replace(after, jitter=(right, down, (wanted.radius / resting.radius - 1) / _RADIUS_SWAY, angle))


def _cross(x: Plane, y: Plane) -> Plane:
    across, along = np.abs(x), np.abs(y)
    distance: Plane = np.minimum(np.maximum(across - 0.95, along - 0.32), np.maximum(across - 0.32, along - 0.95))
    return distance


def _star(x: Plane, y: Plane) -> Plane:
    sector = 2 * np.pi / 5
    angle, r = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2), np.hypot(x, y) / 1.05
    px, py = r * np.sin(angle), r * np.cos(angle)
    inner_x, inner_y = 0.46 * np.sin(np.pi / 5), 0.46 * np.cos(np.pi / 5)
    normal_x, normal_y = 1 - inner_y, inner_x
    distance: Plane = (px * normal_x + (py - 1) * normal_y) / np.hypot(normal_x, normal_y)
    return distance


def _heart(x: Plane, y: Plane) -> Plane:
    hx, hy = np.abs(x) * 1.15 / 1.55, (-y * 1.1 + 0.35) / 1.55 + 0.38
    lobe = np.hypot(hx - 0.25, hy - 0.75) - 0.3536
    m = np.maximum(hx + hy, 0) * 0.5
    tip = np.sqrt(np.minimum(hx**2 + (hy - 1) ** 2, (hx - m) ** 2 + (hy - m) ** 2)) * np.sign(hx - hy)
    distance: Plane = np.where(hx + hy > 1, lobe, tip) * 1.4
    return distance


# Signed distances to unit-sized shapes, negative inside; the star's and the heart's are near enough to draw with.
_DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.92,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "triangle": lambda x, y: np.maximum(np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y) - 0.5, y - 0.7),
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """Draw the scene as an RGB picture."""
    picture = backdrop(scene)
    for thing in _objects(scene):
        picture = _paint(picture, thing, scene.style)
    pixels: UInt8[np.ndarray, "64 64 3"] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return pixels


def backdrop(scene: Scene) -> Float32[np.ndarray, "64 64 3"]:
    """The scene without its objects."""
    colour = np.array(BACKGROUNDS[scene.background], np.float32)
    picture = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
    if scene.pattern == "grid":
        line = colour + 75 if colour.mean() < 140 else colour - 75
        picture = np.where((((_columns % 16) < 3) | ((_rows % 16) < 3))[..., None], line, picture)
    return picture


def _paint(picture: Float[np.ndarray, "64 64 3"], thing: _Object, style: str) -> Float[np.ndarray, "64 64 3"]:
    x, y = thing.coordinates()
    distance = _DISTANCES[thing.shape](x, y) * thing.radius * SIZE / 2  # in pixels from here on
    x, y = x * thing.radius * SIZE / 2, y * thing.radius * SIZE / 2
    colour, dark = np.array(COLOURS[thing.colour], np.float32), _dark(thing.material, x, y)[..., None]
    inside: Float[np.ndarray, "64 64 1"] = np.clip(0.5 - distance, 0, 1)[..., None]
    surface: Float[np.ndarray, "*size 3"] = colour * (1 - 0.65 * dark)
    if style == "sketch":
        line = np.clip(2.2 - np.abs(distance + 1), 0, 1)[..., None]
        inside, surface = np.maximum(line, inside * dark * 0.6), colour
    if style == "neon":
        glow = (np.exp(-np.maximum(distance, 0) / 5.0) * 0.8)[..., None]
        picture = picture * (1 - glow) + colour * glow
        edge = np.exp(-np.abs(distance) / 5.0)[..., None]
        surface = np.clip(surface * 0.55 + 255 * 0.55 * edge * (colour / 255 * 0.4 + 0.6), 0, 255)
    painted: Float[np.ndarray, "64 64 3"] = picture * (1 - inside) + surface * inside
    return painted


def _dark(material: str, x: Plane, y: Plane) -> Plane:
    """1 where the material is dark, x and y in pixels from the object's centre."""
    stripes: dict[str, Callable[[], Plane]] = {
        "plain": lambda: np.zeros_like(x),
        "striped": lambda: (y % 8 < 4) * 1.0,
        "checkered": lambda: ((x // 5) + (y // 5)) % 2,
    }
    return stripes[material]()


def object_mask(scene: Scene, which: str = "all") -> Bool[np.ndarray, "64 64"]:
    """Return the pixels inside the silhouettes of `which` objects: "all", "first" or "second"."""
    *behind, front = _objects(scene)
    chosen = {"all": [*behind, front], "first": [front], "second": behind}
    if which not in chosen:
        raise EditError(f"No object {which!r}; a scene has 'all', 'first' and 'second'.{did_you_mean(which, chosen)}")
    masks = [_DISTANCES[thing.shape](*thing.coordinates()) < 0 for thing in chosen[which]]
    return np.any(masks, axis=0) if masks else np.zeros((SIZE, SIZE), bool)


# Words --------------------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: np.random.RandomState | None = None, drop: float = 0.25) -> str:
    """Put the scene into words; with `rng`, leave each factor out with probability `drop` (objects: a third of it).

    What is usual (a flat picture, an upright object, plain material, a plain background) is mostly left unsaid.
    """

    def keep(chance: float = drop) -> bool:
        return rng is None or rng.rand() >= chance

    # Whether to speak is drawn only for what could be said: `and` stops the draw as well as the words.
    words = _opening(scene, rng, keep)
    if scene.count == "one" and keep():
        words.append(scene.size)
    if scene.pose == "tilted" and keep():
        words.append("tilted")
    if (scene.material != "plain" or (rng is not None and rng.rand() < 0.3)) and keep():
        words.append(scene.material)
    if keep():
        words.append(scene.colour)
    words.append(scene.shape if keep(drop / 3) else "shape")
    if scene.relation is not None:
        words += _second_object(scene, keep, drop)
    elif scene.size == "small" and keep():
        words.append(scene.position)
    return " ".join(words + _background(scene, keep))


def _opening(scene: Scene, rng: np.random.RandomState | None, keep: Callable[..., bool]) -> list[str]:
    if scene.style == "flat":
        return ["a flat" if rng is not None and rng.rand() < 0.4 else "a"]
    if not keep():
        return ["a"]
    return {"sketch": ["a sketch of", "a"], "neon": ["a neon"]}[scene.style]


def _second_object(scene: Scene, keep: Callable[..., bool], drop: float) -> list[str]:
    if not keep(drop / 3):
        return []
    words = [str(scene.relation) if keep() else "and", "a"]
    if keep():
        words.append(str(scene.colour2))
    return [*words, str(scene.shape2) if keep(drop / 3) else "shape"]


def _background(scene: Scene, keep: Callable[..., bool]) -> list[str]:
    colour, pattern = keep(), scene.pattern != "plain" and keep()
    said = [scene.background] * colour + [scene.pattern] * pattern
    return ["on a", *said, "background"] if said else []
