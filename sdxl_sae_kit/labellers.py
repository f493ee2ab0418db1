"""Labellers: whoever can name a feature from pictures, and say of other pictures whether they show what a label says.

Nothing here is called but by the user's own `auto_label` or `score_label`. Anything with the attributes of `Labeller`
will do.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from sdxl_sae_kit.devices import choose_device
from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.features import Example
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.tiny.judge import load_judge
from sdxl_sae_kit.tiny.world import FACTORS

HERE = "nowhere: they stay on this computer"
LONGEST_NAME = 200  # characters of a model's answer that are kept
MOST_ANSWER = 1_000_000  # bytes of an endpoint's answer
_COLUMNS, _TILE, _GAP = 4, 128, 4  # of a sheet of pictures
_NEW_TOKENS = 40
_TOLD = 200  # characters of an answer that an error quotes
_DAY = 86_400  # seconds

NAME_IT = (
    "The first picture is a sheet of {shown} small pictures on which one unit of an image generator is active, the "
    "second a sheet of {contrast} on which it is not. What do those of the first sheet show that those of the second "
    "do not? Answer with at most eight words that would fit under each picture of the first sheet, and nothing else."
)
JUDGE_IT = 'Does this picture show the following: "{text}"? Answer with one word, yes or no.'


@runtime_checkable
class LabelJudge(Protocol):
    """Whoever can say of pictures whether they show what a label says."""

    @property
    def name(self) -> str:
        """Who is named as author."""

    @property
    def where(self) -> str:
        """Where the pictures go, as words that follow "the pictures go"."""

    def judge(self, text: str, images: Sequence[Image.Image]) -> list[bool]:
        """One answer for each picture, given nothing but the label and the picture."""


@runtime_checkable
class Labeller(LabelJudge, Protocol):
    """A judge who can also name a feature."""

    def label(self, examples: Sequence[Example], contrast: Sequence[Example]) -> str:
        """A name for what the images of `examples` (latent active) show and those of `contrast` (inactive) do not."""


class WorldLabeller:
    """Names what tells pictures of the tiny world apart: one value of one factor, as the tiny judge reads them.

    Labels are such as "colour red", which means that some object is red. It judges these and bare values such as "red".

    >>> WorldLabeller().judge("colour red", pipe("a red star").images)      # doctest: +SKIP
    [True]
    """

    name = "tiny-judge"
    where = HERE

    def __init__(self) -> None:
        self._judge = load_judge()

    def __repr__(self) -> str:
        return "WorldLabeller()"

    def label(self, examples: Sequence[Example], contrast: Sequence[Example]) -> str:
        """The factor's value whose share among `examples` most exceeds that among `contrast`."""
        active, inactive = (
            self._facts([decode_picture(each.thumbnail) for each in group]) for group in (examples, contrast)
        )

        def excess(fact: str) -> float:
            return sum(fact in facts for facts in active) / len(active) - sum(
                fact in facts for facts in inactive
            ) / len(inactive)

        return max(dict.fromkeys(_FACTS.values()), key=excess)

    def judge(self, text: str, images: Sequence[Image.Image]) -> list[bool]:
        """Whether the tiny judge sees in each picture of 64 × 64 pixels the value that the label names.

        Raises:
            KitError: the label is not one value of one factor, or a picture has another size.
        """
        fact = _FACTS.get(" ".join(text.casefold().split()))
        if fact is None:
            raise KitError(
                f"The tiny judge knows single values of the world, such as 'colour red' or 'on the left', "
                f"not {text!r}. Test this label yourself, with test_label."
            )
        return [fact in facts for facts in self._facts(images)]

    def _facts(self, images: Sequence[Image.Image]) -> list[set[str]]:
        """What is seen in each picture; of two objects it is not asked which."""
        told = self._judge.read(images).told()
        return [{_fact(factor, value) for factor, value in seen.items() if value is not None} for seen in told]


def _fact(factor: str, value: str) -> str:
    return f"{factor.removesuffix('2')} {value}"


def _all_facts() -> dict[str, str]:
    """Every way to name a fact → the fact; bare values that two factors share name none."""
    facts = [_fact(factor, value) for factor in FACTORS if factor[-1] != "2" for value in FACTORS[factor]]
    bare = [fact.split(" ", 1)[1] for fact in facts]
    alone = {value: fact for value, fact in zip(bare, facts, strict=True) if bare.count(value) == 1}
    return {fact: fact for fact in facts} | alone


_FACTS = _all_facts()


class _VisionModel(ABC):
    """A model that answers a question about pictures in words."""

    name: str

    @abstractmethod
    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The model's answer."""

    def label(self, examples: Sequence[Example], contrast: Sequence[Example]) -> str:
        """The model's words for what sets `examples` apart, shown as two sheets of pictures, without prompts.

        Raises:
            KitError: it answered nothing.
        """
        question = NAME_IT.format(shown=len(examples), contrast=len(contrast))
        answer = self.ask(question, [sheet(group) for group in (examples, contrast)]).strip()
        words = answer.split("\n")[0].strip(" \"'.*")[:LONGEST_NAME].encode(errors="ignore").decode().strip()
        if not words:
            raise KitError(f"{self.name} named nothing: it answered {answer[:80]!r}. Try another model.")
        return words

    def judge(self, text: str, images: Sequence[Image.Image]) -> list[bool]:
        """The model's yes or no to each picture, asked one by one; an answer that begins with neither counts as no.

        Raises:
            KitError: no answer was a yes or a no.
        """
        answers = [self.ask(JUDGE_IT.format(text=text), [image]) for image in images]
        said = [re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE) for answer in answers]
        if not any(said):
            raise KitError(
                f"{self.name} answered neither yes nor no to any of {len(images)} pictures, but such as "
                f"{answers[0][:80]!r}. Try another model."
            )
        return [match is not None and match[1].lower() == "yes" for match in said]


class TransformersLabeller(_VisionModel):
    """A vision-language model of transformers (image-text-to-text), run here.

    Args:
        model: a folder, or the hub id of a model, which is fetched if it is not here; never with code of its own.
        device: as for `load_pipeline`.

    Raises:
        ModelError: there is no such model, or it is of another kind.

    >>> kit.auto_label(stats, [3, 17], TransformersLabeller("HuggingFaceTB/SmolVLM-500M-Instruct"))  # doctest: +SKIP
    """

    where = HERE

    def __init__(self, model: str | Path, *, device: str | None = None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        local = Path(model).expanduser()
        self.name = local.name if local.is_dir() else str(model)
        source, options = str(local if local.is_dir() else model), {"local_files_only": local.is_dir()}
        options["trust_remote_code"] = False
        try:
            self._processor = AutoProcessor.from_pretrained(source, backend="pil", **options)
            loaded = AutoModelForImageTextToText.from_pretrained(source, use_safetensors=True, dtype="auto", **options)
        except (OSError, ValueError, KeyError, ImportError) as cause:
            raise ModelError(
                f"{model} cannot be loaded as a vision-language model ({str(cause).strip().splitlines()[0]}). "
                "Give the folder or the hub id of an image-text-to-text model with safetensors."
            ) from cause
        self._model = loaded.to(choose_device(device)).eval()

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The model's likeliest answer, at most 40 tokens."""
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
        asked = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, dtype=self._model.dtype)
        tokens = self._model.generate(**asked, max_new_tokens=_NEW_TOKENS, do_sample=False)
        answer: str = self._processor.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


@dataclass(frozen=True)
class EndpointLabeller(_VisionModel):
    """A vision-language model behind an address that speaks OpenAI's chat completions, as vLLM, Ollama and others do.

    Pictures and the labels under test are sent there, prompts never; redirections are not followed.

    Args:
        url: up to and without `/chat/completions`, such as "http://localhost:8000/v1".
        model: its name there.
        api_key: sent as bearer token; shown nowhere.
        timeout: seconds that one answer may take, at most a day.

    Raises:
        KitError: one of these is not as described, such as an address with an impossible port, or the key holds what
            no header can.

    >>> EndpointLabeller("http://localhost:8000/v1", "a-model").where
    'to http://localhost:8000/v1'
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise KitError(
                "An endpoint's address begins with http:// or https://, then names a host and perhaps a port, such as "
                f"http://localhost:8000/v1; {self.url!r} is none. Mend it."
            )
        if not isinstance(self.model, str) or not self.model.strip():
            raise KitError(f"An endpoint needs the name of a model that it serves, not {self.model!r}.")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, Real) or not 0 < self.timeout <= _DAY:
            raise KitError(f"A timeout is a positive number of seconds, at most {_DAY:,}, not {self.timeout!r}.")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", str(self.api_key)):
            raise KitError("An API key is printable ASCII without spaces, and the one given is not. Copy it anew.")

    @property
    def name(self) -> str:  # type: ignore[override]  # here it depends on the model
        """The model's name."""
        return self.model

    @property
    def where(self) -> str:
        """The address."""
        return f"to {self.url}"

    def ask(self, question: str, images: Sequence[Image.Image]) -> str:
        """The endpoint's answer.

        Raises:
            KitError: it cannot be reached in time, refuses, or answers something else than a chat completion.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        content += [{"type": "image_url", "image_url": {"url": _png_uri(image)}} for image in images]
        asked = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(asked).encode(), headers, method="POST")
        return self._answer(self._post(request))

    def _post(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.build_opener(_NoRedirection).open(request, timeout=self.timeout) as response:
                body: bytes = response.read(MOST_ANSWER + 1)
        except urllib.error.HTTPError as refusal:
            told = refusal.read(4 * _TOLD).decode(errors="replace")[:_TOLD]
            raise KitError(
                f"{self.url} refused with status {refusal.code} ({refusal.reason}): {told!r}. "
                "Check the address, the model's name and the key; what was labelled before is kept."
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as cause:  # not reached, too slow, cut off
            reason = getattr(cause, "reason", cause)
            why = f"within {self.timeout:g} s" if isinstance(reason, TimeoutError) else f"({reason})"
            raise KitError(
                f"{self.url} gave no answer {why}. Check that it runs; what was labelled "
                "before is kept, and the same call goes on from there."
            ) from None
        return body

    def _answer(self, body: bytes) -> str:
        try:
            answer = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            raise KitError(
                f"{self.url} answered no chat completion but {body[:_TOLD].decode(errors='replace')!r}. "
                "Check that the address ends where /chat/completions begins."
            )
        return answer


def _is_address(url: object) -> bool:
    """Whether this names a host, and a port that there can be; names and passwords in it are not understood."""
    if not isinstance(url, str) or not re.fullmatch(r"https?://[^\s/@]+(/[^\s]*)?", url):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """The user named one address; a key or a picture sent there must go nowhere else."""

    def redirect_request(self, *asked: Any) -> None:
        """Follow none: urllib then raises the status as an error."""


def sheet(examples: Sequence[Example]) -> Image.Image:
    """The pictures of the examples on one sheet, four in a row."""
    step, rows = _TILE + _GAP, -(-len(examples) // _COLUMNS)
    drawn = Image.new("RGB", (_COLUMNS * step - _GAP, rows * step - _GAP), "white")
    for place, example in enumerate(examples):
        tile = decode_picture(example.thumbnail).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
        drawn.paste(tile, (place % _COLUMNS * step, place // _COLUMNS * step))
    return drawn


def _png_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
