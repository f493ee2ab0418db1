"""A recorded edit: everything `steer` was told, in plain numbers, to be saved, shown and done again.

An edits file is one JSON object: `{"format": "sdxl-sae-kit edits", "version": 1, "edits": [...]}`. Each edit has the
fields of `Edit`, those at their defaults left out; latents are the keys of objects, as text.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sdxl_sae_kit import html
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import ArtifactError, EditError, KitError, did_you_mean
from sdxl_sae_kit.files import write_atomically
from sdxl_sae_kit.masks import Polygon, Where, as_mask, numbers, plain_map, plain_mask, shortened

FORMAT, VERSION = "sdxl-sae-kit edits", 1
LARGEST_FILE = 2**28
"""Bytes that are read."""
VERBS = ("add", "scale", "clamp", "replace")
CHOICES = {"cfg": ("both", "cond", "uncond"), "gate": (None, "active", "inactive")}
SHOWN = 96
"""Pixels of a mask's picture."""

Cfg = Literal["both", "cond", "uncond"]
Gate = Literal["active", "inactive"]
Strengths = Mapping[int, float | ArrayLike]
"""Latent → a number; (height, width), a map of any size; (image,), a number for each image; or one map for each."""


@dataclass(frozen=True, repr=False)
class Edit:
    """What one `steer` does to the updates of a hookpoint.

    Attributes:
        add, scale, clamp, replace, reconstruct, ablate_block, where, steps, cfg, schedule, gate, keep_norm, along: as
            `steer` takes them.

    Raises:
        EditError: arguments that make no sense, alone or together.

    >>> Edit("up.0.1", "k10", "3f…", scale={17: 0.0}, steps=[0])
    Edit at up.0.1 by k10: scale 17: 0.00; steps: 0
    """

    hookpoint: str
    """Short name."""
    sae: str | None = None
    """Name of the SAE; to ablate a block none is needed."""
    digest: str | None = None
    """sha256 of the SAE."""
    add: Strengths = field(default_factory=dict)
    scale: Strengths = field(default_factory=dict)
    clamp: Strengths = field(default_factory=dict)
    replace: Strengths = field(default_factory=dict)
    reconstruct: bool = False
    ablate_block: bool = False
    where: Where | None = None
    steps: Sequence[int] | Sequence[float] | None = None
    cfg: Cfg = "both"
    schedule: Sequence[float] | None = None
    gate: Gate | None = None
    keep_norm: bool = False
    along: Mapping[int, ArrayLike] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {verb: _strengths(verb, getattr(self, verb)) for verb in VERBS}
        values["where"] = None if self.where is None else plain_mask(self.where)
        values["steps"] = None if self.steps is None else _steps(self.steps)
        values["schedule"] = None if self.schedule is None else _schedule(self.schedule)
        values["along"] = _strengths("along", self.along)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # how a frozen dataclass is normalised
        _check_settings(self)
        _check_together(self)

    @property
    def latents(self) -> list[int]:
        """The latents that are edited."""
        return list(dict.fromkeys(latent for verb in VERBS for latent in getattr(self, verb)))

    @property
    def does_nothing(self) -> bool:
        """Whether it says of no latent and no block what is to change."""
        return not (self.latents or self.reconstruct or self.ablate_block)

    @property
    def overwrites(self) -> bool:
        """Whether the update is left behind, rather than added to."""
        return bool(self.replace or self.reconstruct or self.ablate_block)

    @property
    def needs_code(self) -> bool:
        """Whether it depends on how active latents are."""
        return bool(self.scale or self.clamp or (self.gate and self.latents))

    def factor(self, step: int, n_steps: int) -> float:
        """What the change is multiplied by at a denoising step, counted from 0; 0 where the step is not edited.

        Raises:
            EditError: none of this image's steps is edited, or some that it has not.
        """
        if self.steps is not None and step not in self._chosen(n_steps):
            return 0.0
        if self.schedule is None:
            return 1.0
        place = step / (n_steps - 1) if n_steps > 1 else 0.0
        return float(np.interp(place, np.linspace(0, 1, len(self.schedule)), self.schedule))

    def _chosen(self, n_steps: int) -> list[int]:
        steps = list(self.steps or ())
        if isinstance(steps[0], float):
            start, end = steps
            if chosen := [i for i in range(n_steps) if start <= i / n_steps < end]:
                return chosen
            raise EditError(
                f"steps={tuple(steps)} is none of this image's {n_steps} step(s): there is no i with {start:g} ≤ "
                f"i / {n_steps} < {end:g}."
            )
        if outside := [i for i in steps if i >= n_steps]:
            raise EditError(f"steps={outside}, but this image is made in {n_steps} step(s), numbered from 0.")
        return [int(i) for i in steps]

    def to_json(self) -> dict[str, Any]:
        """The edit as JSON values; fields at their defaults are left out."""
        record = {name: getattr(self, name) for name in _DEFAULTS if getattr(self, name) != _DEFAULTS[name]}
        for name in (*VERBS, "along"):
            if name in record:
                record[name] = {str(latent): value for latent, value in record[name].items()}
        if self.steps is not None and isinstance(self.steps[0], float):
            record["steps"] = {"from": self.steps[0], "to": self.steps[1]}
        if self._polygons:
            record["where"] = {"polygons": [polygon.points for polygon in self._polygons]}
        plain: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, record: Any) -> Edit:
        """The edit that `to_json` gave these values for.

        Raises:
            EditError: a stranger's values that are no edit; the message names the field.
        """
        if not isinstance(record, Mapping) or "hookpoint" not in record:
            raise EditError(f"an edit is an object with at least its hookpoint, not {shortened(record)}.")
        for name in record:
            if name not in _DEFAULTS:
                raise EditError(
                    f"an edit has no {name!r}; it has {', '.join(_DEFAULTS)}.{did_you_mean(name, _DEFAULTS)}"
                )
        values = dict(record)
        for name in (*VERBS, "along"):
            if name in values:
                values[name] = _by_latent(name, values[name])
        if isinstance(steps := values.get("steps"), Mapping):
            values["steps"] = [_real("steps", steps.get(end)) for end in ("from", "to")]
        if isinstance(where := values.get("where"), Mapping):
            polygons = where.get("polygons")
            if not isinstance(polygons, list) or not polygons:
                raise EditError(f"where is a map or {{'polygons': […]}}, not {shortened(where)}.")
            values["where"] = tuple(map(Polygon, polygons))
        return cls(**values)

    def rows(self) -> list[dict[str, str]]:
        """What is done and where, as rows of a table."""
        changes = [(f"{verb} {latent}", _strength(v)) for verb in VERBS for latent, v in getattr(self, verb).items()]
        changes += [("along", f"vectors of its own for {', '.join(map(str, self.along))}")] if self.along else []
        words = {"reconstruct": "the SAE's reconstruction", "ablate_block": "0", "keep_norm": "yes"}
        changes += [(name, text) for name, text in words.items() if getattr(self, name)]
        settings = {"where": self._where, "steps": self._steps, "cfg": self.cfg, "gate": self.gate}
        settings["schedule"] = ", ".join(map(html.short, self.schedule or ())) or None
        changes += [(name, text) for name, text in settings.items() if text is not None and text != "both"]
        return [{"what": what, "how": how} for what, how in changes]

    @property
    def _polygons(self) -> tuple[Polygon, ...]:
        plain: Any = self.where
        return plain if plain is not None and isinstance(plain[0], Polygon) else ()

    @property
    def _steps(self) -> str | None:
        if self.steps is None:
            return None
        if isinstance(self.steps[0], float):
            return f"from {self.steps[0]:g} to {self.steps[1]:g} of all"
        return ", ".join(map(str, self.steps))

    @property
    def _where(self) -> str | None:
        if self.where is None:
            return None
        share = f"{100 * float(as_mask(self.where, (SHOWN, SHOWN)).mean()):.3g} % of the picture"
        form = f"{len(self._polygons)} polygon(s)" if self._polygons else f"a mask of {_sides(self.where)}"
        return f"{form}: {share}"

    def _repr_html_(self) -> str:
        by = f" by {self.sae} (sha256 {(self.digest or 'unknown')[:12]})" if self.sae else ""
        picture = ""
        if self.where is not None:
            mask = as_mask(self.where, (SHOWN, SHOWN))[0].numpy()
            drawn = html.to_webp(Image.fromarray((255 * mask).round().astype(np.uint8)).convert("RGB"))
            picture = html.picture(drawn, f"where, white where edited: {self._where}")
        rows = self.rows() or [{"what": "nothing", "how": "every update stays as it is"}]
        heading = html.heading(f"Edit at {self.hookpoint}", html.words(by.strip()))
        return html.fragment(heading, picture, html.table(rows))

    def __repr__(self) -> str:
        said = "; ".join(f"{row['what']}: {row['how']}" for row in self.rows()) or "nothing"
        return f"Edit at {self.hookpoint}{f' by {self.sae}' if self.sae else ''}: {said}"


_DEFAULTS = {
    each.name: each.default_factory() if each.default_factory is not MISSING
    else None if each.default is MISSING else each.default
    for each in fields(Edit)
}  # fmt: skip


@checked
def write_edits(path: Path | str, edits: Edit | Sequence[Edit]) -> None:
    """Write edits, in the order in which they are to be made, to a JSON file.

    Raises:
        ArtifactError: the file cannot be written.

    Example:
        >>> write_edits("off.json", Edit("up.0.1", "k10", "3f…", scale={17: 0.0}))               # doctest: +SKIP
    """
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    text = json.dumps({"format": FORMAT, "version": VERSION, "edits": [edit.to_json() for edit in listed]}, indent=1)
    try:
        write_atomically(Path(path), text.encode())
    except OSError as cause:
        raise ArtifactError(f"{path} cannot be written ({cause.strerror}). Choose another place.") from None


@checked
def read_edits(path: Path | str) -> list[Edit]:
    """The edits of a file that `write_edits` made, or a stranger wrote.

    Raises:
        ArtifactError: no such file, one of more than 256 MiB, or it holds something else; the message names the file
            and the field.

    >>> read_edits("off.json")                                                                   # doctest: +SKIP
    [Edit at up.0.1 by k10: scale 17: 0.00]
    """
    try:
        if (size := Path(path).stat().st_size) > LARGEST_FILE:
            raise ArtifactError(f"{path} has {size:,} bytes; edits files of up to {LARGEST_FILE:,} are read.")
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except (OSError, ValueError, RecursionError) as cause:
        raise ArtifactError(f"{path} cannot be read as JSON ({cause}). Write it with write_edits.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("edits"), list):
        raise ArtifactError(f"{path} is no edits file: it must say format {FORMAT!r} and have a list of edits.")
    if content.get("version") != VERSION or content.keys() != {"format", "version", "edits"}:
        raise ArtifactError(
            f"{path} has version {content.get('version')!r} and fields {', '.join(content)}; this kit reads version "
            f"{VERSION} with format, version and edits."
        )
    edits = []
    for number, record in enumerate(content["edits"]):
        with explained(f"{path}, edit {number}", ArtifactError):
            edits.append(Edit.from_json(record))
    return edits


@contextmanager
def explained(asked: str, kind: type[KitError] = EditError) -> Iterator[None]:
    """Say in front of a refusal what was asked."""
    try:
        yield
    except KitError as cause:
        raise kind(f"{asked}: {cause}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice, among {', '.join(found)}")
    return found


def _strengths(verb: str, edits: Any) -> dict[int, Any]:
    """Edits of one verb, with latents as plain integers and strengths as JSON could hold them."""
    edits, example = {} if edits is None else edits, f"such as {verb}={{17: 2.0}},"
    if not isinstance(edits, Mapping):
        raise EditError(f"{verb} must say how strongly for each latent, {example} not {shortened(edits)}.")
    latents = _integers(f"latents of {verb}, {example}", edits)
    return {
        latent: plain_map(f"{verb}[{latent}]", value, example)
        for latent, value in zip(latents, edits.values(), strict=True)
    }


def _integers(name: str, values: Any) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        found = list(values) if isinstance(values, Mapping) else values
        raise EditError(f"{name} must be integers, not {shortened(found)}.") from None


def _steps(steps: Any) -> tuple[int, ...] | tuple[float, ...]:
    given = list(steps) if np.iterable(steps) and not isinstance(steps, str) else steps
    if isinstance(given, list) and any(isinstance(step, Real) and not hasattr(step, "__index__") for step in given):
        ends = [_real("steps", end) for end in given]
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
            raise EditError(f"steps as fractions are two, 0 ≤ start < end ≤ 1, such as (0.0, 0.5), not {given!r}.")
        return tuple(ends)
    numbered = tuple(_integers("steps, such as steps=[0],", given))
    if not numbered or min(numbered) < 0:
        raise EditError(f"steps={given!r} must name one step or more, numbered from 0. Leave it out for all.")
    return numbered


def _schedule(schedule: Any) -> tuple[float, ...]:
    factors = numbers(schedule)
    if factors is None or factors.ndim != 1 or not len(factors):
        raise EditError(f"schedule must be finite factors, such as [1.0, 0.0], not {shortened(schedule)}.")
    return tuple(factors.tolist())


def _check_settings(edit: Edit) -> None:
    for name in ("hookpoint", "sae", "digest"):
        value: object = getattr(edit, name)
        if not isinstance(value, str) and (value is not None or name == "hookpoint"):
            raise EditError(f"{name} must be a text, not {shortened(value)}.")
    for name, choices in CHOICES.items():
        if getattr(edit, name) not in choices:
            *others, last = map(repr, choices)
            raise EditError(f"{name} is {', '.join(others)} or {last}, not {getattr(edit, name)!r}.")
    for name in ("reconstruct", "ablate_block", "keep_norm"):
        if not isinstance(getattr(edit, name), bool):
            raise EditError(f"{name} must be True or False, not {shortened(getattr(edit, name))}.")


def _check_together(edit: Edit) -> None:
    for latent, vector in edit.along.items():
        if latent not in edit.latents or np.ndim(vector) != 1:
            raise EditError(f"along[{latent}] must be a vector for a latent that is edited; edited are {edit.latents}.")
    if min(edit.latents, default=0) < 0:
        raise EditError(f"latents are numbered from 0; there is no {min(edit.latents)}.")
    if both := sorted(set(edit.scale) & set(edit.clamp)):
        raise EditError(f"latents {both} are both scaled and clamped. Choose one for each.")
    if edit.replace and (edit.add or edit.scale or edit.clamp or edit.reconstruct):
        raise EditError("replace leaves nothing of the update, so it goes with no other verb. Nest two steers instead.")
    if edit.ablate_block and (edit.latents or edit.reconstruct or edit.gate or edit.keep_norm):
        raise EditError(
            "ablate_block makes the update 0, so it goes with no other verb, gate or keep_norm. Leave them out."
        )
    if edit.gate and edit.reconstruct and not edit.latents:
        raise EditError("gate says at which tokens latents are edited, but none is. Leave it out, or name latents.")


def _by_latent(name: str, values: Any) -> dict[int, Any]:
    if not isinstance(values, Mapping):
        raise EditError(f"{name} must be an object by latent, such as {{'17': 2.0}}, not {shortened(values)}.")
    for key in values:
        if not (isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,9}", key)):
            raise EditError(
                f"{name} must be an object by latent, such as {{'17': 2.0}}; it has the key {shortened(key)}."
            )
    return {int(key): value for key, value in values.items()}


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise EditError(f"{name} must be numbers, not {shortened(value)}.")
    return float(value)


def _strength(value: Any) -> str:
    if isinstance(value, float):
        return html.short(value)
    array = np.asarray(value)
    form = "one for each image" if array.ndim == 1 else f"a map of {_sides(value)}"
    return f"{form}, {html.short(array.min())} to {html.short(array.max())}"


def _sides(value: Any) -> str:
    return "×".join(map(str, np.shape(value)))
