"""Prompts: where they come from, one seed for each, and which of them are held out.

Sources: `"world"` (captions of the embedded model's world, whose factors are known), `"scenes"` (everyday scenes for
real SDXL), a text, JSON-lines or CSV file, a dataset of the Hugging Face hub, or a list of strings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Bool

from sdxl_sae_kit import html
from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.arguments import checked
from sdxl_sae_kit.errors import PromptError, did_you_mean
from sdxl_sae_kit.tiny import world

HELD_OUT_SHARE = 0.2
COLUMNS = ("text", "prompt", "caption")
"""What the field that holds the prompts is usually called."""


@dataclass(frozen=True, repr=False)
class Prompts(Sequence[str]):
    """Texts, each with its own seed and, where they are known, the factors of what it describes."""

    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of the noise of each one's image, 0 to 2⁶³ − 1."""
    factors: tuple[dict[str, str], ...]
    """Factor → value, such as {"colour": "red"}; an empty mapping where nothing is known."""

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> Prompts: ...
    def __getitem__(self, item: int | slice) -> str | Prompts:
        if not isinstance(item, slice):
            return self.texts[item]
        return Prompts(self.texts[item], self.seeds[item], self.factors[item])

    def take(self, indices: Iterable[int]) -> Prompts:
        """Those at these places, in this order."""
        chosen = list(indices)
        return Prompts(
            tuple(self.texts[i] for i in chosen),
            tuple(self.seeds[i] for i in chosen),
            tuple(self.factors[i] for i in chosen),
        )

    @cached_property
    def held_out(self) -> Bool[np.ndarray, "image"]:
        """Which are kept from training: decided by a hash of the text, so the same text is never on both sides."""
        return np.array([is_held_out(text) for text in self.texts], dtype=bool)

    @property
    def digest(self) -> str:
        """sha256 of all of it, for recipes."""
        return hashlib.sha256(self.to_jsonl().encode()).hexdigest()

    @property
    def n_repeated(self) -> int:
        """How many say what an earlier one says."""
        return len(self.texts) - len(set(self.texts))

    def rows(self, n: int | None = None) -> list[dict[str, Any]]:
        """The first n as rows of a table: text, seed, whether held out, factors."""
        first = self[: len(self) if n is None else n]
        told = zip(first.texts, first.seeds, first.held_out.tolist(), first.factors, strict=True)
        return [
            {
                "prompt": text,
                "seed": seed,
                "held out": "yes" if held_out else "no",
                "factors": ", ".join(f"{factor} {value}" for factor, value in factors.items()),
            }
            for text, seed, held_out, factors in told
        ]

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self.texts[:2]))
        return f"Prompts: {len(self):,}, {int(self.held_out.sum()):,} held out; {first}{', …' if len(self) > 2 else ''}"

    def _repr_html_(self) -> str:
        return html.fragment(html.table(self.rows(10), f"The first of {len(self):,} prompts"))

    def to_jsonl(self) -> str:
        """One JSON object a line: text, seed, factors."""
        rows = zip(self.texts, self.seeds, self.factors, strict=True)
        return "".join(
            json.dumps({"text": text, "seed": seed, "factors": factors}) + "\n" for text, seed, factors in rows
        )

    @classmethod
    def from_jsonl(cls, text: str) -> Prompts:
        """What `to_jsonl` wrote.

        Raises:
            PromptError: a line is something else.
        """
        texts, seeds, factors = [], [], []
        for number, line in enumerate(text.split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                told = {str(factor): str(value) for factor, value in row["factors"].items()}
                texts.append(row["text"])
                seeds.append(operator.index(row["seed"]))
                factors.append(told)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise PromptError(f"Line {number} of these prompts is not one that to_jsonl writes.") from None
        if not all(isinstance(text, str) and _is_unicode(text) for text in texts):
            raise PromptError("A prompt here is no text. Write each line as to_jsonl does.")
        return cls(tuple(texts), tuple(seeds), tuple(factors))


def is_held_out(text: str) -> bool:
    """Whether a prompt belongs to the held-out fifth."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


@checked
def load_prompts(
    source: str | Path | Iterable[Any],
    n: int | None = None,
    *,
    seed: int = 0,
    column: str | None = None,
    split: str = "train",
) -> Prompts:
    """Prompts from a source, the i-th with seed `seed + i` unless the source says another.

    Args:
        source: `"world"`, `"scenes"`, a .txt, .jsonl or .csv file, `"hf:owner/name"` (a dataset of the Hugging Face
            hub, or `"hf:"` and a folder of one; it is streamed, and needs the extra `datasets`), strings, or rows such
            as a dataset gives. Files are UTF-8. JSON lines, CSV and rows may tell each prompt's `seed`, and JSON lines
            and rows its `factors`, as the `prompts.jsonl` of a cache does. `Prompts` stay as they are.
        n: how many; needed for `"world"` and `"scenes"`, otherwise the first n.
        seed: what the generated sources (0 to 2³² − 1) and the images' noise (0 to 2⁶³ − 1) start from.
        column: which field of JSON lines, CSV or rows holds the prompts; by default `text`, `prompt` or `caption`.
        split: of a dataset.

    Raises:
        PromptError: unknown source, a missing or unreadable file or column, an impossible seed, or no prompts. Rows
            without a text are left out with a warning; among strings they are an error.
        KitError: n is no integer from 1 on.

    >>> prompts = load_prompts("world", 500)
    >>> len(prompts), prompts.seeds[:3], prompts.factors[0]["style"] in ("flat", "sketch", "neon")
    (500, (0, 1, 2), True)
    """
    if n is not None:
        n = whole_number("load_prompts: n", n)
    seed = _whole(seed, "load_prompts")
    if isinstance(source, Prompts):
        return source if n is None else source[:n]
    if isinstance(source, str) and source in ("world", "scenes"):
        if n is None:
            raise PromptError(f"load_prompts({source!r}) makes as many prompts as you want: say n=.")
        if seed >= 2**32:
            raise PromptError(f"load_prompts({source!r}) starts from a seed of 0 to 2³² − 1, not {seed}.")
        made = (_world if source == "world" else _scenes)(n, seed)
        rows: list[dict[str, Any]] = [{"text": text, "factors": known} for text, known in zip(*made, strict=True)]
    else:
        rows = _first(_read(source, split), n, column, _describe(source))
    if not rows:
        raise PromptError(f"No prompts in {_describe(source)}. Give at least one.")
    seeds = [row.get("seed", seed + i) for i, row in enumerate(rows)]
    if max(seeds) >= 2**63:
        raise PromptError(f"load_prompts: {len(rows)} prompts from the seed {seed} on need seeds of more than 2⁶³ − 1.")
    texts = [row["text"] for row in rows]
    return Prompts(tuple(texts), tuple(seeds), tuple(row.get("factors", {}) for row in rows))


def _first(rows: Iterable[Any], n: int | None, column: str | None, source: str) -> list[dict[str, Any]]:
    """The first n rows that have a text."""
    chosen: list[dict[str, Any]] = []
    left_out = 0
    for number, row in enumerate(rows, 1):
        if len(chosen) == n:
            break
        told = {"text": row} if isinstance(row, str) else _pick(row, f"Row {number} of {source}", column)
        text = told["text"]
        if not isinstance(row, str) and _is_null(text):
            left_out += 1
            continue
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"Prompt {number} of {source} is {text!r}, not a text. Remove it or write one.")
        if not _is_unicode(text):
            raise PromptError(f"Prompt {number} of {source} is {text!r}, which is no valid Unicode. Mend or remove it.")
        chosen.append(told)
    if n is not None and len(chosen) < n:
        warnings.warn(f"{source} has {len(chosen)} prompts, fewer than the {n} asked for.", stacklevel=4)
    if left_out:
        warnings.warn(f"Rows of {source} without a text, left out: {left_out}.", stacklevel=4)
    return chosen


def _is_null(text: object) -> bool:
    """Whether a field is empty: None, white space, or NaN, which is what pandas has for it."""
    return text is None or (isinstance(text, float) and text != text) or (isinstance(text, str) and not text.strip())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no file or tokenizer can
        return False
    return True


def _world(n: int, seed: int) -> tuple[list[str], list[dict[str, str]]]:
    rng = np.random.RandomState(seed)
    scenes = [world.sample_scene(rng) for _ in range(n)]
    return [world.caption(scene) for scene in scenes], [world.factors(scene) for scene in scenes]


_SUBJECTS = (
    "a fox", "an old sailor", "a lighthouse", "two children", "a bowl of cherries", "a tabby cat", "a red bicycle",
    "a grand piano", "an astronaut", "a market stall", "a wooden boat", "a sunflower", "a steam train",
    "a ballet dancer", "a stack of books", "a mountain hut", "a parrot", "a glass teapot", "a street musician",
    "a flock of sheep", "a motorcycle", "a marble statue", "a tortoise", "a chess board", "a baker",
)  # fmt: skip
_ACTIONS = (
    "in the rain", "at sunset", "seen from above", "covered in snow", "under a streetlight", "beside a lake",
    "in a narrow alley", "on a white table", "in front of a brick wall", "in tall grass", "on a cliff by the sea",
    "in a crowded square", "in thick fog", "against a clear blue sky", "in a desert",
)  # fmt: skip
_STYLES = (
    "photograph", "oil painting", "watercolour", "pencil drawing", "woodcut", "film still", "pixel art",
    "studio photograph", "children's book illustration",
)  # fmt: skip


def _scenes(n: int, seed: int) -> tuple[list[str], list[dict[str, str]]]:
    rng = np.random.RandomState(seed)
    choose = [[words[i] for i in rng.randint(len(words), size=n)] for words in (_STYLES, _SUBJECTS, _ACTIONS)]
    factors = [
        {"style": style, "subject": subject, "setting": setting}
        for style, subject, setting in zip(*choose, strict=True)
    ]
    return [f"{f['style']} of {f['subject']} {f['setting']}" for f in factors], factors


def _read(source: str | Path | Iterable[Any], split: str) -> Iterable[Any]:
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise PromptError(f"load_prompts takes a name, a file, or a list of texts or rows, not {source!r}.")
        return source
    if str(source).startswith("hf:"):
        return _from_dataset(str(source).removeprefix("hf:"), split)
    path = Path(source)
    readers: dict[str, Callable[[str], list[Any]]] = {".txt": _from_txt, ".jsonl": _from_jsonl, ".csv": _from_csv}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise PromptError(
            f"Unknown prompt source {str(source)!r}; it is 'world', 'scenes', a .txt, .jsonl or .csv file, "
            f"'hf:owner/name', or a list of texts, also of one: ['a red star']."
            f"{did_you_mean(str(source), ['world', 'scenes'])}"
        )
    if not path.is_file():
        raise PromptError(f"There is no file {path}. Give the path of a .txt, .jsonl or .csv file.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte-order mark first
    except UnicodeDecodeError as cause:
        raise PromptError(f"{path} is not UTF-8 (byte {cause.start}: {cause.reason}). Save it as UTF-8.") from None
    try:
        return read(text)
    except (PromptError, csv.Error) as cause:
        raise PromptError(f"{path} cannot be read as prompts. {cause}") from None


def _from_txt(text: str) -> list[Any]:
    # not splitlines: a prompt may hold other Unicode line separators
    return [line for line in text.split("\n") if line.strip()]


def _from_jsonl(text: str) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as cause:
            raise PromptError(
                f"Line {number} is not JSON ({cause}). Mend it, or give a .txt file with one prompt a line."
            ) from None
    return rows


def _from_csv(text: str) -> list[Any]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _from_dataset(name: str, split: str) -> Iterator[Any]:
    """The rows of a dataset on the hub or in a folder, as they come: nothing is downloaded that is not read."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise PromptError(
            f"Reading hf:{name} needs the extra datasets: pip install 'sdxl-sae-kit[datasets]'."
        ) from None
    try:
        yield from load_dataset(name, split=split, streaming=True)
    except Exception as cause:  # the library raises whatever it trips over
        raise PromptError(f"The dataset {name!r} (split {split!r}) cannot be read: {cause}") from None


def _pick(row: Any, place: str, column: str | None) -> dict[str, Any]:
    """Text, seed and factors of a row."""
    if not isinstance(row, dict):
        raise PromptError(f'{place} is {row!r}, not a text. Write it as one, or as {{"text": "a prompt"}}.')
    names = COLUMNS if column is None else (column,)
    key = next((key for key in names if key in row), None)
    if key is None:
        raise PromptError(
            f"{place} has no field {' or '.join(map(repr, names))}, only {', '.join(map(repr, row))}. "
            f"Say with column= which of them holds the prompts.{did_you_mean(names[0], map(str, row))}"
        )
    told = {"text": row[key]}
    if not _is_null(row.get("seed")):
        told["seed"] = _whole(row["seed"], place)
    if isinstance(row.get("factors"), dict):
        told["factors"] = {str(factor): str(value) for factor, value in row["factors"].items() if value is not None}
    return told


def _whole(seed: Any, place: str) -> int:
    try:
        whole = isinstance(seed, str) or (isinstance(seed, float) and seed.is_integer())  # a blank makes a column float
        number = int(seed) if whole else operator.index(seed)
    except (TypeError, ValueError):
        raise PromptError(f"{place} has the seed {seed!r}, which is no integer. Mend it, or leave it out.") from None
    if not 0 <= number < 2**63:
        raise PromptError(f"{place} has the seed {seed!r}; it must be from 0 to 2⁶³ − 1. Mend it, or leave it out.")
    return number


def _describe(source: str | Path | Iterable[Any]) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the list given"
