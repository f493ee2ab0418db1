"""labellers: they say what they see, send what they announce to where they announce it, and fail in words."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from world_stats import LEFT, RED, scenes, thumbnails, world_stats

from sdxl_sae_kit.errors import KitError, ModelError
from sdxl_sae_kit.features import Example
from sdxl_sae_kit.label_tests import auto_label
from sdxl_sae_kit.labellers import (
    HERE,
    EndpointLabeller,
    Labeller,
    TransformersLabeller,
    WorldLabeller,
    sheet,
)
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pictures import decode_picture
from sdxl_sae_kit.tiny.world import FACTORS, factors

PICTURES = [decode_picture(thumbnail) for thumbnail in thumbnails()[:200]]
TOLD = [factors(scene) for scene in scenes()[:200]]


def example(image: int) -> Example:
    return Example(image, f"secret prompt {image}", image, 1.0, np.ones((8, 8), np.float32), thumbnails()[image])


# The tiny world ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> WorldLabeller:
    return WorldLabeller()


@pytest.mark.parametrize("text", ["colour red", "Red", " shape  star", "background navy", "on the left", "count two"])
def test_the_world_labeller_judges_what_is_in_the_scene(world: WorldLabeller, text: str) -> None:
    value = text.casefold().split(maxsplit=1)[-1].strip() if text != "on the left" else text
    truth = [value in told.values() for told in TOLD]
    said = world.judge(text, PICTURES)
    assert any(truth) and np.mean(np.array(said) == truth) >= 0.97


@pytest.mark.parametrize("text", ["red circle", "", "plain", "colour", "colour pink", "shape2 star"])
def test_the_world_labeller_does_not_guess_what_a_text_means(world: WorldLabeller, text: str) -> None:
    with pytest.raises(KitError, match="knows single values of the world, such as"):
        world.judge(text, PICTURES[:1])


def test_the_world_labeller_is_shown_as_it_is_made(world: WorldLabeller) -> None:
    assert repr(world) == "WorldLabeller()"


def test_it_knows_every_value_and_tells_same_named_ones_by_their_factor(world: WorldLabeller) -> None:
    for factor, values in FACTORS.items():
        for value in values if factor[-1] != "2" else ():
            assert len(world.judge(f"{factor} {value}", PICTURES[:2])) == 2
    assert world.judge("material plain", PICTURES) != world.judge("pattern plain", PICTURES)


@pytest.mark.parametrize(("factor", "value"), [("colour", "red"), ("position", "at the top"), ("background", "teal")])
def test_the_world_labeller_names_what_sets_the_examples_apart(world: WorldLabeller, factor: str, value: str) -> None:
    groups: dict[bool, list[Example]] = {True: [], False: []}
    for image, told in enumerate(TOLD):
        groups[value in (told.get(factor), told.get(factor + "2"))].append(example(image))
    assert world.label(groups[True][:12], groups[False][:12]) == f"{factor} {value}"


def test_every_labeller_has_what_a_labeller_needs(world: WorldLabeller, vlm: TransformersLabeller) -> None:
    assert all(isinstance(each, Labeller) for each in (world, vlm, EndpointLabeller("http://localhost:1/v1", "m")))
    assert (world.where, vlm.where) == (HERE, HERE)


def test_a_sheet_holds_all_pictures_in_order() -> None:
    drawn = sheet([example(image) for image in range(6)])
    assert drawn.size == (4 * 132 - 4, 2 * 132 - 4)
    for place in range(6):
        left, top = place % 4 * 132, place // 4 * 132
        tile = np.asarray(drawn.crop((left, top, left + 128, top + 128)).resize((64, 64)), dtype=float)
        assert np.abs(tile - np.asarray(PICTURES[place], dtype=float)).mean() < 6


# A model of transformers ---------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "yes", "no", "red", "ball"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory) -> Path:
    """A LLaVA of 20,000 random weights, saved as such models are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer,
        patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**narrow, num_hidden_layers=2, image_size=32, patch_size=16),
        text_config=LlamaConfig(**narrow, vocab_size=len(WORDS), num_hidden_layers=1, num_key_value_heads=2,
                                pad_token_id=0, bos_token_id=2, eos_token_id=3),
        image_token_index=4,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vlm(vlm_folder: Path) -> TransformersLabeller:
    return TransformersLabeller(vlm_folder, device="cpu")


def test_a_local_model_answers_in_its_own_words_the_same_each_time(vlm: TransformersLabeller) -> None:
    answer = vlm.ask("red ball", PICTURES[:2])
    assert vlm.name == "tiny-llava"
    assert set(answer.split()) <= set(WORDS[5:]) | {"<unk>"}
    assert answer == vlm.ask("red ball", PICTURES[:2])


def test_its_answer_depends_on_pictures_and_question(vlm: TransformersLabeller, monkeypatch) -> None:
    seen = []
    generate = vlm._model.generate
    monkeypatch.setattr(vlm._model, "generate", lambda **asked: seen.append(asked) or generate(**asked))
    for question, pictures in (("red", PICTURES[:1]), ("red", PICTURES[1:3]), ("ball", PICTURES[:1])):
        vlm.ask(question, pictures)
    assert [len(asked["pixel_values"]) for asked in seen] == [1, 2, 1]
    assert not torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"][:1])
    ids = [asked["input_ids"][0].tolist() for asked in seen]
    assert ids[0] != ids[2] and ids[1] == [WORDS.index("<image>")] * 8 + [WORDS.index("red")]
    assert all(asked["do_sample"] is False for asked in seen)


class Answering(TransformersLabeller):
    """A local model's questions with somebody else's answers."""

    def __init__(self, *answers: str) -> None:
        self.name, self.answers, self.asked = "parrot", list(answers), []

    def ask(self, question, images) -> str:
        self.asked.append((question, images))
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(("Yes", "no"), [True, False]), (("**YES**, it is", "No."), [True, False]), (("yesterday", "no"), [False, False]),
     (("yes", ""), [True, False]), (("Not yes", "yes"), [False, True])],
)  # fmt: skip
def test_a_yes_counts_and_nothing_else(answers, expected) -> None:
    model = Answering(*answers)
    assert model.judge("a <red> ball", PICTURES[:2]) == expected
    assert all('"a <red> ball"' in question and len(images) == 1 for question, images in model.asked)


def test_a_model_that_answers_something_else_throughout_is_named() -> None:
    with pytest.raises(KitError, match="parrot answered neither yes nor no to any of 2 pictures, but such as 'hm'"):
        Answering("hm").judge("red", PICTURES[:2])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("red balls", "red balls"), (' "Red balls."\nBecause …', "Red balls"), ("x" * 999, "x" * 200), ("a\ud83d", "a")],
)
def test_a_name_is_the_first_line_of_the_answer(answer: str, expected: str) -> None:
    model = Answering(answer)
    assert model.label([example(0)], [example(1), example(2)]) == expected
    ((question, images),) = model.asked
    assert "sheet of 1 small" in question and "sheet of 2 on" in question and len(images) == 2


@pytest.mark.parametrize("answer", ["", " \n", '"."'])
def test_no_name_is_no_answer(answer: str) -> None:
    with pytest.raises(KitError, match="parrot named nothing"):
        Answering(answer).label([example(0)], [example(1)])


@pytest.mark.parametrize("kind", ["missing", "empty", "pickled", "other"])
def test_what_is_no_such_model_is_refused(kind: str, vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind in ("pickled", "other"):
        for file in vlm_folder.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
    if kind == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
    if kind == "other":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="vision-language model"):
        TransformersLabeller(folder, device="cpu")


def test_a_model_with_code_of_its_own_is_not_run(vlm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in vlm_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.C", "AutoModelForImageTextToText": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ModelError):
        TransformersLabeller(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


# An endpoint ---------------------------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """A server on this computer that remembers what it was asked, and answers as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict, dict]] = []
        self.answer = lambda asked: (200, {}, completion("yes"))
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_) -> None:
        """A client that went away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, headers, answer = self.server.answer(body)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(answer))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_) -> None:
        """Nothing on stderr."""


def completion(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("no_proxy", "*")
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def sent_pictures(body: dict) -> list[Image.Image]:
    parts = body["messages"][0]["content"]
    uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(uri.startswith("data:image/png;base64,") for uri in uris)
    return [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]


def test_an_endpoint_gets_the_label_the_picture_and_the_key_and_nothing_else(endpoint: Endpoint) -> None:
    labeller = EndpointLabeller(endpoint.url + "/", "seer-1", api_key="s3cret")
    assert labeller.judge("red", PICTURES[:2]) == [True, True]
    assert (labeller.name, labeller.where) == ("seer-1", f"to {endpoint.url}/")
    assert "s3cret" not in repr(labeller)
    for (path, headers, body), picture in zip(endpoint.asked, PICTURES[:2], strict=True):
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
        assert body.keys() == {"model", "temperature", "messages"} and body["model"] == "seer-1"
        (sent,) = sent_pictures(body)
        assert np.array_equal(np.asarray(sent), np.asarray(picture))


def test_a_whole_automatic_round_through_an_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    stats = world_stats()
    labels = LabelStore.of(stats, tmp_path)
    endpoint.answer = lambda body: (200, {}, completion("A red thing." if "sheet" in str(body) else "yes"))
    labeller = EndpointLabeller(endpoint.url, "seer-1")
    tests = auto_label(stats, [RED, LEFT], labeller, labels=labels, n=4)
    assert labels.all() == {RED: "A red thing", LEFT: "A red thing"}
    assert [(test.balanced_accuracy, test.author) for test in tests] == [(0.5, "seer-1")] * 2
    assert len(endpoint.asked) == 2 * (1 + 4)
    assert sum(len(sent_pictures(body)) for _, _, body in endpoint.asked) == 2 * (2 + 4)
    assert "Authorization" not in endpoint.asked[0][1]
    assert "scene" not in json.dumps([body for _, _, body in endpoint.asked]), "no prompts"
    auto_label(stats, [RED, LEFT], labeller, labels=labels, n=4)
    assert len(endpoint.asked) == 10, "nothing is asked twice"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"out of memory", r"refused with status 500 \(Internal Server Error\): 'out of memory'"),
        (401, b"{}", "refused with status 401"),
        (404, b"", "Check the address"),
        (200, b"<html>login</html>", "answered no chat completion but '<html>login</html>'"),
        (200, b"", "answered no chat completion"),
        (200, b"{}", "answered no chat completion"),
        (200, b'{"choices": []}', "answered no chat completion"),
        (200, completion(None), "answered no chat completion"),
        (200, completion([1]), "answered no chat completion"),
        (200, b"[" * 100_000, "answered no chat completion"),
        (200, b"\xff\xfe\x00", "answered no chat completion"),
        (200, completion("y" * 1_000_001), "answered no chat completion"),
    ],
)
def test_an_answer_that_is_none_is_told(endpoint: Endpoint, status: int, body: bytes, message: str) -> None:
    endpoint.answer = lambda asked: (status, {}, body)
    with pytest.raises(KitError, match=message) as told:
        EndpointLabeller(endpoint.url, "m", api_key="s3cret").judge("red", PICTURES[:1])
    assert len(str(told.value)) < 800 and "s3cret" not in str(told.value)


def test_a_slow_endpoint_is_given_up(endpoint: Endpoint) -> None:
    free = threading.Event()
    endpoint.answer = lambda asked: free.wait(30) and (200, {}, completion("yes"))
    try:
        with pytest.raises(KitError, match=r"gave no answer within 0.3 s"):
            EndpointLabeller(endpoint.url, "m", timeout=0.3).judge("red", PICTURES[:1])
    finally:
        free.set()


def test_an_endpoint_that_breaks_off_or_is_not_there_is_told(endpoint: Endpoint) -> None:
    endpoint.answer = lambda asked: (200, {"Content-Length": "999"}, b"{")
    with pytest.raises(KitError):
        EndpointLabeller(endpoint.url, "m", timeout=2).judge("red", PICTURES[:1])
    endpoint.answer = lambda asked: (99_999, {}, b"")
    with pytest.raises(KitError, match="gave no answer"):
        EndpointLabeller(endpoint.url, "m").judge("red", PICTURES[:1])
    with pytest.raises(KitError, match=r"gave no answer \(.*refused") as told:
        EndpointLabeller("http://127.0.0.1:1/v1", "m").judge("red", PICTURES[:1])
    assert "within" not in str(told.value)


def test_a_page_of_html_is_not_told_whole(endpoint: Endpoint) -> None:
    endpoint.answer = lambda asked: (502, {}, b"<html>" + b"x" * 5000)
    with pytest.raises(KitError, match="refused with status 502") as told:
        EndpointLabeller(endpoint.url, "m").judge("red", PICTURES[:1])
    assert str(told.value).count("x") in range(150, 201)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda asked: (status, {"Location": endpoint.url + "/elsewhere"}, b"")
    with pytest.raises(KitError, match=f"refused with status {status}"):
        EndpointLabeller(endpoint.url, "m", api_key="s3cret").judge("red", PICTURES[:1])
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x/y", "localhost:8000", "", "http://", "https:// x", "http://my host/v1", None,
     "http://x:notaport/v1", "http://x:99999/v1", "http://x:0", "http://:80", "http://[::1", "http://me:word@x/v1"],
)  # fmt: skip
def test_only_web_addresses_are_taken(unchecked_types: None, url: object) -> None:
    with pytest.raises(KitError, match="begins with http:// or https://"):
        EndpointLabeller(url, "m")


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://x.org", "http://[::1]:80/v1/", "http://x/a@b"])
def test_web_addresses_are_taken(url: str) -> None:
    assert EndpointLabeller(url, "m", timeout=1).where == f"to {url}"


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e12, True, "9", None])
def test_a_timeout_is_a_positive_number(unchecked_types: None, timeout: object) -> None:
    with pytest.raises(KitError, match="A timeout is a positive number of seconds"):
        EndpointLabeller("http://x", "m", timeout=timeout)


@pytest.mark.parametrize("model", ["", " ", None, 7])
def test_a_model_has_a_name(unchecked_types: None, model: object) -> None:
    with pytest.raises(KitError, match="needs the name of a model"):
        EndpointLabeller("http://x", model)


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "two words", "ключ", ""])
def test_a_key_that_no_header_holds_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(KitError, match="printable ASCII") as told:
        EndpointLabeller("http://localhost/v1", "m", api_key=key)
    assert not key or key not in str(told.value)


def test_nothing_is_loaded_or_asked_by_importing() -> None:
    import subprocess
    import sys

    code = "import sys, sdxl_sae_kit.labellers, sdxl_sae_kit.label_tests; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
