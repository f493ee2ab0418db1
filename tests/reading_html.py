"""What a reader's parser, which is not the kit's code, finds in a piece of HTML: every tag, attribute and text."""

from __future__ import annotations

from html.parser import HTMLParser

TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "body",
        "style",
        "div",
        "br",
        "span",
        "p",
        "h3",
        "h4",
        "b",
        "bdi",
        "article",
        "header",
    ),
    *("details", "summary", "pre", "svg", "path", "polyline", "circle", "rect"),
    *("figure", "figcaption", "img", "table", "caption", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "title", "src", "alt", "width", "height", "scope"),
    *("role", "aria-label", "tabindex", "data-latent", "data-density", "data-maximum"),
    *(
        "viewbox",
        "d",
        "points",
        "cx",
        "cy",
        "r",
        "x",
        "y",
        "fill",
        "stroke",
        "stroke-width",
        "stroke-dasharray",
        "opacity",
    ),
}


class Reader(HTMLParser):
    """Collects what it meets; `stack` is empty again when every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("br", "img", "meta"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"a processing instruction: {data!r}")

    @property
    def text(self) -> str:
        """All text outside tags."""
        return "".join(self.texts)

    def values(self, attribute: str) -> list[str]:
        """Every value of this attribute, in order."""
        return [value for _, name, value in self.attributes if name == attribute]


def read_safely(text: str) -> Reader:
    """Read HTML and assert that it can do nothing: known tags and attributes; pictures inside it, and described."""
    reader = Reader(text)
    assert not reader.stack
    assert set(reader.tags) <= TAGS, set(reader.tags) - TAGS
    assert {name for _, name, _ in reader.attributes} <= ATTRIBUTES
    sources = reader.values("src")
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert len(sources) == len([alt for alt in reader.values("alt") if alt.strip()])
    return reader
