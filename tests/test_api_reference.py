"""The API reference has every public name, and its pages ask nobody for anything."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from bs4 import BeautifulSoup

import sdxl_sae_kit as kit

BUILD = Path(__file__).parent.parent / "docs" / "api" / "build.py"
pytest.importorskip("pdoc")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_api", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_modules_it_shows_are_there_once_each(builder):
    assert len(builder.MODULES) == len(builder.RESULTS) + len(builder.INTERFACES)
    assert all(importlib.util.find_spec(name) for name in builder.MODULES)


@pytest.mark.slow
def test_every_public_name_has_its_place_and_the_pages_load_nothing_from_elsewhere(builder, tmp_path):
    builder.build(tmp_path)
    pages = {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in tmp_path.rglob("*.html")}
    assert len(pages) == 2 + len(builder.MODULES)  # the package's, and one that leads there
    first = pages[tmp_path / "sdxl_sae_kit.html"]
    assert set(kit.__all__) <= {tag["id"] for tag in first.find_all(id=True)}
    assert "judge: PictureJudge | EllipsisType | None" in first.find(id="rank_blocks").get_text()  # as it is written
    for path, page in pages.items():
        loaded = [tag.get("src") or "" for tag in page.find_all(["script", "img", "iframe"])]
        loaded += [tag["href"] for tag in page.find_all("link", href=True)]
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], path
        assert not re.search(r"@import|url\(\s*['\"]?https?:", path.read_text("utf-8"))
