"""Items: the published format and what is refused, our natural set, and edits of the tiny world."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_sae_kit import item_files
from sdxl_sae_kit.errors import KitError, PromptError
from sdxl_sae_kit.item_files import FIELDS, Record, read_records
from sdxl_sae_kit.items import EDIT_TYPES, Item, Items, load_items
from sdxl_sae_kit.prompts import is_held_out
from sdxl_sae_kit.studies.benchmarked import FORMAT
from sdxl_sae_kit.tiny.judge import load_judge
from sdxl_sae_kit.tiny.world import ONE_OBJECT_FACTORS, TWO_OBJECT_FACTORS, factors, object_mask, render

PUBLISHED = {
    "change object": 36, "add object": 27, "delete object": 43, "change content": 21, "change pose": 20,
    "change colour": 30, "change material": 26, "change background": 46, "change style": 47,
}  # fmt: skip
FACTOR_OF = {
    "change object": "shape", "add object": "count", "delete object": "count", "change content": "pattern",
    "change pose": "pose", "change colour": "colour", "change material": "material",
    "change background": "background", "change style": "style",
}  # fmt: skip
EACH = 9
WRONG_TYPES = ("0", "10", 0, 10, 1.0, True, None, "six", [], {}, " 1")


def record(name="7", type_id="6", **changes):
    return {
        "id": name,
        "editing_type_id": type_id,
        "original_prompt": "a [dull]  bell on a hill",
        "editing_prompt": "a [shiny golden] bell on a hill ",
        "editing_instruction": "",
        "original_gsam_prompt": "bell",
        "editing_gsam_prompt": "~ bell",
    } | changes


def without(field):
    return {key: value for key, value in record().items() if key != field}


def written(folder, content):
    path = folder / "theirs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world():
    return load_items("world", EACH)


# The published format -----------------------------------------------------------------------------------------------


def test_types_are_numbered_as_published():
    assert dict(EDIT_TYPES) == dict(enumerate(PUBLISHED, 1))


@pytest.mark.parametrize("numbers", [str, int])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_file_of_the_published_counts_loads(tmp_path, keyed, numbers):
    kinds = [number for number, n in enumerate(PUBLISHED.values(), 1) for _ in range(n)]
    kinds = np.random.RandomState(0).permutation(kinds).tolist()
    records = [record(str(1000 + place), numbers(kind), mask=[1, 2]) for place, kind in enumerate(kinds)]
    content = {each["id"]: each for each in records} if keyed else records
    items = load_items(written(tmp_path, content), seed=40)
    assert len(items) == 296 and items.counts() == PUBLISHED
    assert [item.name for item in items] == [each["id"] for each in records]
    assert [item.kind for item in items] == [EDIT_TYPES[kind] for kind in kinds]
    assert [item.seed for item in items] == list(range(40, 336))
    some = load_items(tmp_path / "theirs.json", 3)
    assert some.counts() == dict.fromkeys(PUBLISHED, 3)
    firsts = [name for kind in PUBLISHED for name in [item.name for item in items if item.kind == kind][:3]]
    assert [item.name for item in some] == sorted(firsts)


def test_brackets_are_stripped_and_blanks_squeezed(tmp_path):
    (item,) = load_items(written(tmp_path, [record()]))
    assert item == Item(
        "7", "change colour", "a dull bell on a hill", "a shiny golden bell on a hill", "bell", "~ bell"
    )
    assert item.target is None and item.others == () and item.wanted == {}


def test_an_id_is_taken_from_the_key_or_a_number_and_a_byte_order_mark_is_no_fault(tmp_path):
    assert [each.name for each in read_records(written(tmp_path, {"k": without("id")}))] == ["k"]
    assert [each.name for each in read_records(written(tmp_path, {"5": record(5)}))] == ["5"]
    (tmp_path / "bom.json").write_text(json.dumps([record("é")], ensure_ascii=False), encoding="utf-8-sig")
    assert read_records(tmp_path / "bom.json")[0].name == "é"


def test_what_no_mask_is_looked_for_may_stay_empty(tmp_path):
    content = [record("a", "2", original_gsam_prompt=""), record("b", "3", editing_gsam_prompt=" ")]
    assert [(each.original_mask, each.edited_mask) for each in read_records(written(tmp_path, content))] == [
        ("", "~ bell"),
        ("bell", ""),
    ]


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        *[(without(field), rf"it has no {field}\. Write (\"1\" to \"9\"|a text)") for field in FIELDS],
        (
            without("editing_prompt") | {"edting_prompt": "x"},
            r"it has no editing_prompt.* Did you mean 'edting_prompt'\?",
        ),
        ("a fox", "it is 'a fox', not an object. Write one with id, editing_type_id"),
        (None, "it is None, not an object"),
        (record(["x"]), r"its id is \['x'\]. Write a text"),
        (record(True), "its id is True"),
        (record("  "), "its id is '  '"),
        (record("1"), "item 1 has the same id. Give each its own"),
        (record(1), "item 1 has the same id"),
        *[(record(type_id=wrong), 'its editing_type_id is .*Write "1" to "9"') for wrong in WRONG_TYPES],
        (record(original_prompt=5), "its original_prompt is 5, not a text"),
        (record(editing_prompt=None), "its editing_prompt is None, not a text"),
        (record(editing_instruction=["x"]), r"its editing_instruction is \['x'\], not a text"),
        (record(original_prompt=" "), "its original_prompt is ' ', which says nothing"),
        (record(editing_gsam_prompt=""), "its editing_gsam_prompt is '', which says nothing"),
        (record(original_gsam_prompt="~ "), "its original_gsam_prompt is '~ ', which says nothing"),
        (record(type_id="2", editing_gsam_prompt=""), "its editing_gsam_prompt is '', which says nothing"),
        (record(type_id="3", original_gsam_prompt=""), "its original_gsam_prompt is '', which says nothing"),
        (record(editing_prompt="a [bell"), "its editing_prompt is 'a .bell', where a bracket lacks its partner"),
        (record(editing_prompt="a bell]"), "its .*where a bracket lacks its partner"),
        (record(original_prompt="a ]bell["), "its .*where a bracket lacks its partner"),
        (record(original_prompt="a ][ bell [x]"), "its .*where a bracket lacks its partner"),
        (record(editing_prompt="[]"), r"its editing_prompt is '\[\]', which says nothing"),
        (record(editing_prompt="half a pair \ud800"), "its 'editing_prompt' is .*, no valid Unicode"),
        (record(note="\udfff"), "its 'note' is .*, no valid Unicode"),
        (record(editing_prompt=float("nan")), "its editing_prompt is nan, which is no JSON"),
        (record(note=float("-inf")), "its note is -inf, which is no JSON"),
        (record(note=[float("nan")]), "its note is .*holds NaN"),
    ],
)
def test_a_malformed_item_is_refused_by_number_id_and_field(tmp_path, second, complaint):
    path = written(tmp_path, [record("1"), second, record("3")])
    name = rf" \(id {re.escape(repr(second['id']))}\)" if isinstance(second, dict) and "id" in second else ""
    with pytest.raises(PromptError, match=rf"^Item 2{name} of .*theirs.json: {complaint}") as caught:
        load_items(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('[{"id": "1", "note": ' + "[" * 100_000, "is not JSON"),
        ("[9" + "9" * 5000 + "]", "is not JSON"),
        ("5", "holds 5. Write a list of records"),
        ('"a fox"', "holds 'a fox'"),
        ("[]", "holds no items"),
        ("{}", "holds no items"),
        (json.dumps(record()), "holds a single record"),
        ('{"x": {}, "y": {}, "x": {}}', "two items have the id 'x'; the second is number 3. Keep one"),
        ('[{"id": "1", "id": "2"}]', r"Item 1 \(id '2'\) of .*it has a field twice, namely 'id'; .* number 2"),
        (json.dumps({"a": record("b")}), r"Item 1 \(id 'a'\) of .*its id is 'b', but its key 'a'. Write the same"),
        (json.dumps({" ": without("id")}), "its id is ' '"),
    ],
)
def test_what_is_no_file_of_items_is_refused(tmp_path, content, complaint):
    with pytest.raises(PromptError, match=complaint) as caught:
        load_items(written(tmp_path, content))
    assert "theirs.json" in str(caught.value) and len(str(caught.value)) < 600


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    (tmp_path / "latin.json").write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin.json is not UTF-8 \(byte 9: .*\). Save it as UTF-8"):
        load_items(tmp_path / "latin.json")
    with pytest.raises(PromptError, match="There is no file .*none.json"):
        load_items(tmp_path / "none.json")
    with pytest.raises(PromptError, match="There is no file"):
        load_items(tmp_path)
    with pytest.raises(PromptError, match="cannot be read|There is no file"):
        load_items("x" * 5000 + ".json")
    monkeypatch.setattr(item_files, "LARGEST_FILE", 100)
    with pytest.raises(PromptError, match="has .* bytes; files of up to 100 are read"):
        load_items(written(tmp_path, [record()]))


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]"), min_size=1).filter(
    lambda text: text.strip("~ \t\r\n") and text.strip()
)


rows_of_texts = st.tuples(*[plain] * 5).filter(lambda texts: texts[0].split() != texts[1].split())


@given(st.lists(rows_of_texts, min_size=1, max_size=4), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_texts_come_back_with_their_blanks_squeezed(tmp_path_factory, rows, type_id):
    names = ("original_prompt", "editing_prompt", "original_gsam_prompt", "editing_gsam_prompt", "editing_instruction")
    records = [record(f"{i}", type_id, **dict(zip(names, row, strict=True))) for i, row in enumerate(rows)]
    path = written(tmp_path_factory.mktemp("items"), records)
    expected = [Record(f"{i}", type_id, *(" ".join(text.split()) for text in row)) for i, row in enumerate(rows)]
    assert read_records(path) == expected


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.sampled_from(["[a] b", "6", "]["]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(FIELDS), values), st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_a_record_holds_it_is_read_or_refused_by_the_items_number(tmp_path_factory, changes, keyed):
    content = {"7": record() | changes} if keyed else [record() | changes]
    path = written(tmp_path_factory.mktemp("items"), content)
    try:
        (read,) = load_items(path)
    except PromptError as refusal:
        assert str(refusal).startswith("Item 1")
    else:
        assert read.original and read.edited and read.name


# Our own set for real SDXL ------------------------------------------------------------------------------------------

NATURAL = json.loads(Path(item_files.__file__).with_name("natural_items.json").read_text(encoding="utf-8"))
BRACKETS = r"\[[^][]+\]"


def words(text):
    return re.sub(r"[^\w' -]", " ", text).split()


def test_the_natural_set_has_many_of_each_kind_and_no_item_twice():
    items = load_items("natural")
    assert items.counts().keys() == set(PUBLISHED) and min(items.counts().values()) >= 8
    assert len({item.original for item in items}) == len({item.edited for item in items}) == len(items)
    assert len({item.instruction for item in items}) > len(items) * 0.95
    assert load_items("natural", 2).counts() == dict.fromkeys(PUBLISHED, 2)


@pytest.mark.parametrize("each", NATURAL, ids=lambda each: each["id"])
def test_a_natural_item_is_sound(each):
    """Outside the brackets both prompts are the same; inside they differ; masks are what the rules expect."""
    original, edited = each["original_prompt"], each["editing_prompt"]
    assert words(re.sub(BRACKETS, "", original)) == words(re.sub(BRACKETS, "", edited))
    assert re.findall(BRACKETS, original) != re.findall(BRACKETS, edited)
    assert max(len(original.split()), len(edited.split())) <= 50
    assert each["editing_instruction"].endswith(".")
    masks = {each["original_gsam_prompt"], each["editing_gsam_prompt"]}
    assert all(mask.strip() for mask in masks)
    kind = int(each["editing_type_id"])
    assert (masks == {"#everything"}) == (kind == 9)
    assert [mask.startswith("~") for mask in masks] == [kind == 8] * len(masks)
    assert ("[" in original, "[" in edited) == (kind != 2, kind != 3)
    for mask, prompt in ((each["original_gsam_prompt"], original), (each["editing_gsam_prompt"], edited)):
        assert kind == 9 or mask.removeprefix("~ ") in prompt


# Edits of the tiny world --------------------------------------------------------------------------------------------


def test_world_items_change_one_factor_that_the_prompts_tell(world):
    assert world.counts() == dict.fromkeys(PUBLISHED, EACH)
    for item in world:
        before, after = factors(item.before), factors(item.after)
        shared = before.keys() & after.keys()
        assert {name for name in shared if before[name] != after[name]} == {FACTOR_OF[item.kind]}
        lone = set(before) ^ set(after)
        assert lone == ({*ONE_OBJECT_FACTORS, *TWO_OBJECT_FACTORS} if FACTOR_OF[item.kind] == "count" else set())
        assert item.original != item.edited and item.original_mask == item.edited_mask
        assert is_held_out(item.original) and is_held_out(item.edited)


def test_no_original_comes_twice_and_one_object_is_commonest(world):
    assert len({item.original for item in world}) == len(world)
    free = world.of(*[kind for kind in PUBLISHED if FACTOR_OF[kind] != "count"])
    pairs = sum(item.before.count == "two" for item in free)
    assert 0.1 < pairs / len(free) < 0.5


def test_world_items_depend_on_the_seed_alone_and_fewer_are_the_first_of_more(world):
    assert load_items("world", 2) == world[:18]
    assert load_items("world", 2).digest == world[:18].digest != world.digest
    other = load_items("world", 1, seed=1)
    assert [item.seed for item in other] == list(range(1, 10))
    assert not {item.before for item in other} & {item.before for item in world}
    assert load_items("world", 1, seed=2**40)[0].before != world[0].before


def test_the_judge_sees_the_target_in_drawings_of_the_edit_and_not_before(world):
    judge = load_judge()
    was = judge.read(np.stack([render(item.before) for item in world])).likeliest
    becomes = judge.read(np.stack([render(item.after) for item in world])).likeliest
    for read, least, most in ((becomes, 0.9, 1.0), (was, 0.0, 0.1)):
        named = [read[item.target[0]][place] == item.target[1] for place, item in enumerate(world)]
        assert least <= np.mean(named) <= most
    wanted = [becomes[f][place] == v for place, item in enumerate(world) for f, v in item.wanted.items()]
    kept = [was[one][place] == becomes[other][place] for place, item in enumerate(world) for one, other in item.others]
    assert np.mean(wanted) > 0.95 and np.mean(kept) > 0.97
    for item in world:
        assert not item.wanted.keys() & {other for _, other in item.others} and len(item.others) >= 5
        if item.before.count == item.after.count:
            assert all(one == other for one, other in item.others) and dict([item.target]) == item.wanted


def test_of_an_added_object_shape_and_colour_are_wanted_and_of_the_one_that_stays_they_are_kept():
    """The judge's first is the left or upper one, as a look at where they stand tells."""
    found = set()
    for item in load_items("world", 40).of("add object", "delete object"):
        pair = item.after if item.kind == "add object" else item.before
        stays, other = (np.argwhere(object_mask(pair, which)).mean(axis=0).sum() for which in ("first", "second"))
        later, sooner = ("2", "") if other > stays else ("", "2")
        found.add((item.kind, later))
        names = [(f, f + sooner) if item.kind == "add object" else (f + sooner, f) for f in ("shape", "colour")]
        assert set(names) == {pair for pair in item.others if pair[0][:5] in ("shape", "colou")}
        assert {"background", "style"} <= {one for one, _ in item.others}
        added = {f"shape{later}": item.after.shape2, f"colour{later}": item.after.colour2}
        added = added if item.kind == "add object" else {}
        assert item.wanted == {"count": item.after.count, **added} and item.target == ("count", item.after.count)
    assert len(found) == 4, "both kinds, and the one that stays on either side"


def test_of_two_objects_the_target_is_the_judges_first_or_second(world):
    turned = {"right of": "2", "below": "2", "left of": "", "above": ""}
    for item in world.of("change object", "change colour"):
        ending = turned[item.before.relation] if item.before.relation else ""
        assert item.target == (FACTOR_OF[item.kind] + ending, getattr(item.after, FACTOR_OF[item.kind]))


HALVES = {
    "on the left": np.s_[:, :32], "on the right": np.s_[:, 32:], "at the top": np.s_[:32], "at the bottom": np.s_[32:],
}  # fmt: skip


def test_mask_prompts_name_the_place_of_what_changes(world):
    for item in world:
        mask, factor = item.original_mask, FACTOR_OF[item.kind]
        if factor == "style":
            assert mask == "#everything"
        elif factor in ("background", "pattern"):
            assert mask == "background"
        elif factor != "count" and item.before.count == "one":
            assert mask == "object"
        else:
            pair = item.after if item.kind == "add object" else item.before
            changing = object_mask(pair, "second" if factor == "count" else "first")
            inside = changing[HALVES[mask.removeprefix("object ")]].sum() / changing.sum()
            assert inside > 0.85, (item, inside)


def test_instructions_are_sentences_of_the_worlds_words(world):
    by_kind = {item.kind: item.instruction for item in world[:9]}
    assert by_kind["change colour"].startswith("make the ") and by_kind["add object"].startswith("add a")
    for item in world:
        factor, thing = FACTOR_OF[item.kind], f"{item.before.colour} {item.before.shape}"
        if factor in ("shape", "colour", "material", "pose"):
            assert thing in item.instruction
        if factor in ("shape", "colour", "material", "background", "style"):
            assert item.instruction.endswith(getattr(item.after, factor))
        if item.kind == "add object":
            assert f"{item.after.colour2} {item.after.shape2} " in item.instruction


# The set ------------------------------------------------------------------------------------------------------------


def test_slices_and_kinds_are_items_that_keep_their_seeds(world):
    assert isinstance(world[3:7], Items) and [item.seed for item in world[3:7]] == [3, 4, 5, 6]
    chosen = world.of("change pose", "add object")
    assert chosen.counts() == {"add object": EACH, "change pose": EACH}
    assert all(world[item.seed] == item for item in chosen)
    assert [item.seed for item in chosen.reseeded(100)] == list(range(100, 100 + 2 * EACH))
    assert [replace(item, seed=0) for item in chosen.reseeded(100)] == [replace(item, seed=0) for item in chosen]
    assert len(world.of()) == 0 and world[:0].counts() == {}


def test_the_digest_tells_everything(world):
    item = world[0]
    changes = [
        {"name": "x"}, {"kind": "change style"}, {"original": "x"}, {"edited": "x"}, {"original_mask": "x"},
        {"edited_mask": "x"}, {"instruction": "x"}, {"seed": 9}, {"before": None},
        {"after": replace(item.after, jitter=(0.0, 0.0, 0.0, 0.5))},
    ]  # fmt: skip
    digests = {Items((item,)).digest, *(Items((replace(item, **change),)).digest for change in changes)}
    assert len(digests) == len(changes) + 1
    assert world.reseeded(0).digest == world.digest != world.reseeded(1).digest


def test_mistakes_say_what_to_do(tmp_path, world):
    with pytest.raises(PromptError, match="Unknown items 'wordl'.* Did you mean 'world'"):
        load_items("wordl")
    with pytest.raises(PromptError, match="say n=, at most 10,000"):
        load_items("world")
    with pytest.raises(PromptError, match="say n=, at most 10,000"):
        load_items("world", 10_001)
    for wrong in (0, -1, True):
        with pytest.raises(KitError, match="load_items: n must be an integer of at least 1"):
            load_items("natural", wrong)
    with pytest.raises(KitError, match="load_items: seed must be an integer of at least 0, not -1"):
        load_items("natural", seed=-1)
    with pytest.raises(PromptError, match=r"seed 9223372036854775807 is too large: 81 items"):
        load_items("natural", seed=2**63 - 1)
    with pytest.raises(PromptError, match="is too large: 9 items"):
        load_items("world", 1, seed=2**70)
    with pytest.raises(PromptError, match="No kind of edit 'change color'.*Did you mean 'change colour'"):
        world.of("change color")
    with pytest.raises(PromptError, match="No kind of edit 'colour'"):
        replace(world[0], kind="colour")
    for strange in ("x" * 5000, "a\0b"):
        with pytest.raises(PromptError, match="Unknown items '.*'world'") as caught:
            load_items(strange)
        assert len(str(caught.value)) < 600
    with pytest.raises(PromptError, match="more than one 'change object 1'"):
        Items((world[0], world[0]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": -1}, "Item: seed must be an integer of at least 0, not -1"),
        ({"seed": 1.5}, "Item: seed must be an integer of at least 0, not 1.5"),
        ({"seed": True}, "Item: seed must be an integer"),
        ({"seed": 2**63}, "Item: the seed 9223372036854775808 is too large"),
        ({"name": 5}, "Item: name is a text, not 5"),
        ({"name": ""}, "Item: name is '', which says nothing. Write a text"),
        ({"original": " "}, "Item: original is ' ', which says nothing"),
        ({"edited": ""}, "Item: edited is '', which says nothing"),
        ({"original_mask": None}, "Item: original_mask is a text, not None"),
        ({"edited_mask": ["x" * 5000]}, "Item: edited_mask is a text"),
        ({"instruction": 1}, "Item: instruction is a text, not 1"),
        ({"edited": "a \ud83d bell"}, "Item: edited is .*, no valid Unicode"),
        ({"before": {"shape": "star"}}, "Item: before is a Scene of the tiny world or None, not {'shape'"),
    ],
)
def test_an_item_checks_itself(unchecked_types, change, complaint):
    sound = Item("7", "change style", "a bell", "a sketch", "", "", seed=np.int64(2**63 - 1))
    assert type(sound.seed) is int and Items((sound,)).digest
    with pytest.raises(KitError, match=complaint) as caught:
        replace(sound, **change)
    assert len(str(caught.value)) < 600


def test_wrong_kinds_of_arguments_are_refused_in_words(unchecked_types):
    with pytest.raises(KitError, match="load_items takes a text or a path as source, not a list"):
        load_items([record()])
    with pytest.raises(KitError, match="n must be an integer"):
        load_items("natural", 2.5)
    with pytest.raises(KitError, match="n must be an integer of at least 0, not -1"):
        load_items("natural", 1).rows(-1)
    for strange in ("x", 5, None, ""):
        with pytest.raises(PromptError, match="Items are made of Items such as load_items"):
            Items((strange,))


def test_without_mask_prompts_the_whole_picture_is_edited():
    assert Item("7", "change style", "a bell", "a sketch").original_mask == "#everything"


def test_a_result_of_the_benchmark_is_not_taken_for_items(tmp_path):
    with pytest.raises(PromptError, match="is a result of riebench, not items"):
        load_items(written(tmp_path, {"format": FORMAT, "items": []}))


def test_brackets_around_nothing_and_records_that_change_nothing_are_read(tmp_path):
    same = record(original_prompt="a [ ] bell", editing_prompt="a bell")
    assert [(item.original, item.edited) for item in load_items(written(tmp_path, [same]))] == [("a bell", "a bell")]


def test_a_set_shows_its_counts_and_first_items_and_runs_nothing(world):
    bad = "<script>alert(1)</script>"
    page = BeautifulSoup(Items((Item(bad, "change style", bad, bad + "!", bad, bad),))._repr_html_(), "html.parser")
    assert not page.find_all("script")
    cells = [cell.get_text() for cell in page.find_all("td")]
    assert cells == [bad, "change style", bad, bad + "!", bad, "not known", "0", "change style", "1"]
    page = BeautifulSoup(world._repr_html_(), "html.parser")
    first, counts = page.find_all("table")
    assert len(first.tbody.find_all("tr")) == 10 and world[9].original in first.get_text()
    assert [row.get_text() for row in counts.tbody.find_all("tr")] == [f"{kind}{EACH}" for kind in PUBLISHED]
    assert repr(world[:10]) == (
        "Items: 10, change object 2, add object 1, delete object 1, change content 1, change pose 1, change colour 1, "
        "change material 1, change background 1, change style 1"
    )
    assert world.rows(1)[0]["target"] == " ".join(world[0].target)
    added = world.rows(2)[1]["target"].split(", ")
    assert added[0] == "count two" and {world[1].after.shape2, world[1].after.colour2} == {
        each.split()[1] for each in added[1:]
    }
