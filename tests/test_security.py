"""What SECURITY.md promises of files from strangers; each of its rows names the test that keeps it."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from payloads import FORMULAS, NO_JSON, SCRIPTS
from PIL import Image
from reading_html import read_safely
from safetensors.torch import save

from sdxl_sae_kit import html
from sdxl_sae_kit.artifacts import Artifact, Store
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.edits import read_edits
from sdxl_sae_kit.errors import ArtifactError, KitError, ModelError
from sdxl_sae_kit.hdf5 import open_checked
from sdxl_sae_kit.item_files import read_records
from sdxl_sae_kit.labels import LabelStore
from sdxl_sae_kit.pictures import decode_picture, encode_picture
from sdxl_sae_kit.pipelines import BLOCKS, COMPONENTS, load_pipeline
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.studies.lines import Lines
from sdxl_sae_kit.untrusted import load_plain

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdxl_sae_kit"


def test_every_promise_names_a_test_that_there_is():
    promises = (ROOT / "SECURITY.md").read_text().split("\n| guarantee")[1].splitlines()[2:]
    named = [re.findall(r"`(test_\w+)\.py::(test_\w+)`", row) for row in promises if row.startswith("|")]
    assert len(named) > 10 and all(named)
    for file, test in {pair for row in named for pair in row}:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


# HDF5 ----------------------------------------------------------------------------------------------------------------


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((9,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "secret", (9,))
    file.create_virtual_dataset("x", layout)


def itself(file: h5py.File) -> None:
    group = file.create_group("a/b")
    group["c"] = file["a"]


def deep(file: h5py.File) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("a")


TRICKS = {
    "external link": lambda file: file.__setitem__("x", h5py.ExternalLink("secret.h5", "/secret")),
    "soft link": lambda file: file.__setitem__("x", h5py.SoftLink("/good")),
    "virtual source": virtual,
    "external storage": lambda file: file.create_dataset("x", (9,), "u1", external=[("secret.h5", 0, 9)]),
    "two tebibytes": lambda file: file.create_dataset("x", (2**39,), "f4", chunks=(2**20,)),
    "two tebibytes without chunks": lambda file: file.create_dataset("x", (2**39,), "f4"),
    "objects": lambda file: file.create_dataset("x", (9,), h5py.string_dtype()),
    "references": lambda file: file.create_dataset("x", (9,), h5py.ref_dtype),
    "a type": lambda file: file.__setitem__("x", np.dtype("f4")),
    "a filter of others": lambda file: file.create_dataset("x", data=np.ones(99, "i4"), scaleoffset=4),
    "a group that holds itself": itself,
    "two names for one": lambda file: file.__setitem__("x", file["good"]),
    "groups without end": deep,
}


@pytest.mark.parametrize("trick", TRICKS)
def test_hdf5_that_leads_elsewhere_or_claims_too_much_is_refused(tmp_path, monkeypatch, trick):
    monkeypatch.chdir(tmp_path)  # where relative names would lead
    with h5py.File("secret.h5", "w") as secret:
        secret["secret"] = np.arange(9, dtype="f4")
    path = tmp_path / "stranger.h5"
    with h5py.File(path, "w") as file:
        file["good"] = np.arange(5)
        file.create_dataset("packed", data=np.zeros(50_000), compression="gzip", shuffle=True, fletcher32=True)
    with open_checked(path) as file:
        assert file["good"][()].tolist() == [0, 1, 2, 3, 4]  # the file itself is fine
    with h5py.File(path, "r+") as file:
        TRICKS[trick](file)
    with pytest.raises(ArtifactError, match="stranger.h5 cannot be read .* No number was read from it"):
        open_checked(path)


def test_a_number_that_was_changed_is_noticed_by_its_checksum(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.arange(1000.0), chunks=(1000,), fletcher32=True)
        offset = file["x"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 80] ^= 1
    path.write_bytes(content)
    with open_checked(path) as file, pytest.raises(OSError, match="filter returned failure"):
        file["x"][()]


def test_only_what_checks_hdf5_opens_it_for_reading():
    opening = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "h5py.File":
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
                opening.setdefault(mode, set()).add(path.name)
    assert opening.pop("'r'") == {"hdf5.py", "layout.py", "machine.py"}  # the last reads what it has just written
    assert opening.pop("mode") == {"summary.py"}  # hands reading to open_checked
    assert opening.keys() == {"'w'"}


# Folders -------------------------------------------------------------------------------------------------------------


def made(tmp_path: Path) -> Artifact:
    artifact = Store.at(tmp_path / "store").artifact("studies", "x", {"study": "x"})
    with artifact.lock():
        artifact.file("plan.json").write_text("{}")
        return artifact.seal()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "../../x.h5"])
def test_no_name_leads_out_of_an_artifact(tmp_path, name):
    artifact = made(tmp_path)
    with pytest.raises(ArtifactError, match="no file of x-.* itself"):
        artifact.file(name)
    assert not artifact.holds(name)


@pytest.mark.parametrize("name", ["plan.json", "stamp.json"])
def test_no_link_in_an_artifact_is_followed(tmp_path, name):
    artifact = made(tmp_path)
    outside = tmp_path / "outside"
    (artifact.folder / name).rename(outside)
    (artifact.folder / name).symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"No finished artifact|is missing or has changed, or is a link"):
        Artifact.open(artifact.folder, "studies")
    with pytest.raises(ArtifactError, match="links are not followed"):
        artifact.read_text(name)


def test_labels_are_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("")
    labels = LabelStore(tmp_path / "labels" / "x.jsonl")
    labels.file.parent.mkdir()
    labels.file.symlink_to(victim)
    with pytest.raises(ArtifactError, match="cannot be written"):
        labels.set(3, "mine")
    assert victim.read_text() == ""


@pytest.mark.parametrize("store", ["a\0b", "~nobody-of-this-name/x", "loop/x"])
def test_a_store_with_an_impossible_name_is_refused(tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ArtifactError, match="No store can be at"):
        Store.at(store)


@pytest.mark.parametrize("content", NO_JSON)
def test_a_study_of_broken_json_is_refused(tmp_path, content):
    artifact = made(tmp_path)
    artifact.file("lines.jsonl").write_bytes(content + b"\n")
    artifact.file("plan.json").write_bytes(content)
    try:
        Lines(artifact, "lines.jsonl")
        artifact.read_json("plan.json")
    except ArtifactError as refusal:
        assert artifact.name in str(refusal)


# Tensors -------------------------------------------------------------------------------------------------------------


def repacked(path: Path, compression: int, more: int = 0, pickled: bytes = b"") -> bytes:
    """The archive that torch wrote, packed otherwise."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, pickled if pickled and name.endswith("data.pkl") else old.read(name))
    content = out.getvalue()
    if more:  # the directory tells of every file again and again, as if there were many
        start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
        directory, tail = content[start:end] * (1 + more), bytearray(content[end:])
        entries = struct.unpack_from("<H", tail, 10)[0] * (1 + more)
        struct.pack_into("<HHI", tail, 8, entries, entries, len(directory))
        content = content[:start] + directory + bytes(tail)
    return content


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path, number = tmp_path / "ae.pt", struct.pack("<i", 2**30)
    torch.save({"x": torch.zeros(100_000)}, path)
    honest = repacked(path, zipfile.ZIP_STORED)
    bombs = [
        repacked(path, zipfile.ZIP_DEFLATED),
        repacked(path, zipfile.ZIP_STORED, more=3),
        repacked(path, zipfile.ZIP_STORED, pickled=b"\x80\x02cbuiltins\nbytearray\nJ" + number + b"\x85R."),
    ]
    path.write_bytes(honest)
    assert load_plain(path)["x"].shape == (100_000,)
    for bomb in bombs:
        path.write_bytes(bomb)
        with pytest.raises(ArtifactError, match="cannot be read as plain settings or tensors"):
            load_plain(path)


def raw(header: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


FLOAT = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "content",
    [
        raw('{"a":' + FLOAT + ',"b":' + FLOAT + "}", bytes(8)),  # two on one place
        raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', bytes(8)),
        raw('{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,8]}}', bytes(8)),
        raw('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', bytes(8)),
        struct.pack("<Q", 2**60) + b"{}",  # a header of an exabyte
        raw("[" * 100_000, b""),
        raw('{"a":{"dtype":"PY","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    ],
)
def test_safetensors_that_lie_about_themselves_are_refused(tmp_path, content):
    path = tmp_path / "sae.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        SAE.load(path)
    with pytest.raises(ArtifactError):
        load_plain(path)


@pytest.mark.parametrize(
    "change",
    [
        {"../../x": torch.zeros(1)},
        {"b_dec": torch.full((4,), torch.nan)},
        {"b_dec": torch.zeros(4, dtype=torch.float64)},
        {"b_dec": torch.zeros(5)},
        {"input_scale": torch.ones(4)},  # a column in place of the square matrix that whitens
    ],
)
def test_an_sae_with_other_tensors_than_its_own_is_refused(tmp_path, change):
    sae, path = SAE(SAEConfig(k=2, expansion=2, normalize="whiten"), 4), tmp_path / "sae.safetensors"
    sae.save(path)
    SAE.load(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    about = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    path.write_bytes(save({name: each.contiguous() for name, each in (sae.state_dict() | change).items()}, about))
    with pytest.raises(ArtifactError, match="damaged"):
        SAE.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_thin_sae_that_would_whiten_is_refused_before_its_square_is_made(tmp_path):
    path, d_in = tmp_path / "sae.safetensors", 2**20
    SAE(SAEConfig(k=2, expansion=2, normalize="whiten"), 4).save(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    about = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["sdxl_sae_kit.sae"])
    about["config"] |= {"expansion": 2 / d_in}
    path.write_bytes(save({"W_enc": torch.zeros(d_in, 2)}, {"sdxl_sae_kit.sae": json.dumps(about)}))
    with pytest.raises(ArtifactError, match="input_scale has shape .*, not .1048576, 1048576"):
        SAE.load(path)  # or four terabytes were asked for


# Pictures ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A few bytes that claim a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", [png(6000, 6000), png(12_000, 9000), png(65_000, 65_000), b"", b"GIF89a" + bytes(99)])
def test_a_picture_larger_than_any_here_is_refused_undecoded(data):
    with pytest.raises(ArtifactError, match="A picture cannot be read"):
        decode_picture(data)


@pytest.mark.parametrize("kind", ["thumbnails", "webp", "png"])
def test_an_honest_picture_is_read(kind):
    picture = decode_picture(encode_picture(Image.new("RGB", (40, 30), (200, 10, 10)), kind))
    assert picture.size == (40, 30) and picture.getpixel((20, 15))[0] > 180


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_stays_text_wherever_it_is_shown(text):
    picture = html.picture(encode_picture(Image.new("RGB", (8, 8)), "thumbnails"), text)
    pieces = [html.card(text, text, text, picture), html.table([{text: text}], caption=text)]
    harmless = [html.card("x", "x", "x", picture), html.table([{"x": "x"}], caption="x")]
    assert read_safely(html.page(text, *pieces)).tags == read_safely(html.page("x", *harmless)).tags
    shown = load_prompts([text, "y"])._repr_html_()
    assert read_safely(shown).tags == read_safely(load_prompts(["x", "y"])._repr_html_()).tags


def test_prompts_with_zeros_or_a_megabyte_a_line_are_read_as_they_are(tmp_path):
    path, texts = tmp_path / "prompts.txt", ["a\0b", "long " * 200_000 + "x", "\x1b[31mred"]
    path.write_text("\n".join(texts))
    assert list(load_prompts(path).texts) == texts
    assert len(load_prompts(path)._repr_html_()) < 10 * path.stat().st_size


@pytest.mark.parametrize("content", NO_JSON)
@pytest.mark.parametrize("read", [read_edits, read_records, load_prompts], ids=["edits", "items", "prompts"])
def test_broken_json_is_refused_by_file(tmp_path, read, content):
    path = tmp_path / "stranger.jsonl"
    path.write_bytes(content)
    with pytest.raises(KitError, match="stranger.jsonl|no prompts|empty"):
        read(path)


def label_line(**change: object) -> bytes:
    told = {
        "version": 2,
        "kind": "label",
        "feature": 3,
        "text": "x",
        "author": "a",
        "time": "2025-01-01T00:00:00+00:00",
    }
    return json.dumps(told | change).encode()


@pytest.mark.parametrize(
    "line",
    [
        *(content for content in NO_JSON if content),
        label_line(text="x" * 10**6),
        label_line(text="\ud800"),
        label_line(feature=-1),
        label_line(feature=1e300),
        label_line(confidence=float("nan")),
        label_line(confidence=float("inf")),
        label_line(evidence={"x": "y" * 10**6}),
        label_line(time="9999-12-31T23:59:59+00:00"),
        label_line(tags=["a;b"]),
    ],
)
def test_a_hostile_label_is_refused_by_file_and_line(tmp_path, line):
    labels = LabelStore(tmp_path / "x.jsonl")
    labels.file.write_bytes(label_line() + b"\n" + line + b"\n" + label_line() + b"\n")
    with pytest.raises(ArtifactError, match=r"Line 2 of .*x\.jsonl is not a label"):
        labels.history(3)


@pytest.mark.parametrize("text", FORMULAS)
def test_no_exported_cell_is_a_formula(tmp_path, text):
    labels = LabelStore(tmp_path / "x.jsonl")
    labels.set(3, text, author=text, tags=[text.strip()])
    labels.to_csv(tmp_path / "x.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "x.csv").read_bytes().decode("utf-8-sig"), newline="")))
    assert len(rows) == 2 and not [cell for cell in rows[1] if re.match(r"[=+@\t\r-]", cell)]


# Models and the network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "feature_extractor"])
def test_a_model_that_names_other_modules_is_refused_unimported(tmp_path, monkeypatch, part):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    index = dict.fromkeys(COMPONENTS, ["diffusers", "X"]) | {"image_encoder": [None, None], part: ["evil", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps(BLOCKS))
    with pytest.raises(ModelError, match=f"wants {part} from 'evil': code"):
        load_pipeline(folder)
    assert "evil" not in sys.modules


def test_nothing_trusts_code_that_comes_with_a_model():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "custom_pipeline"):
                assert ast.unparse(node.value) == "False", f"{path}: {node.arg}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


JOB = """
import sys, tempfile
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        print("NETWORK", event, args); raise OSError("no network here")
sys.addaudithook(refuse)
import sdxl_sae_kit as kit
opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
import sdxl_sae_kit.features, sdxl_sae_kit.galleries, sdxl_sae_kit.studies.ablation, sdxl_sae_kit.reports
assert not opened, opened
store = tempfile.mkdtemp()
pipe = kit.load_pipeline("tiny-turbo", device="cpu")
cache = kit.collect(pipe, kit.load_prompts("world", 16), ["up.0.1"], store=store)
saes = kit.train(cache, kit.SAEConfig(k=4, expansion=1), batch_size=256, epochs=1, store=store)
sae = saes["up.0.1", next(iter(saes))[1]]
stats = kit.FeatureStats.measure(sae, cache, store=store)
assert "<article" in kit.gallery(stats).static_html()
with kit.steer(pipe, sae, scale={0: 0.0}):
    kit.generate(pipe, ["a red star"], [0])
print("DONE")
"""


def test_the_main_job_asks_nobody(tmp_path):
    """Every address is refused by the interpreter itself, in a process that may look into no cache of the hub."""
    place = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", JOB], env=place | path, capture_output=True, text=True, cwd=tmp_path)
    assert "DONE" in done.stdout and "NETWORK" not in done.stdout, done.stdout + done.stderr
