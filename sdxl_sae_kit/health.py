"""What a check of this machine found, and what to do about it."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "fails"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    """ok; warning: something would not work here, or slowly; fails: the kit does not work."""
    found: str
    remedy: str = ""
    """Sentences that say what to do; of a check that is ok, what could be had besides."""


@dataclass(frozen=True)
class Diagnosis:
    """All checks of a machine, as `diagnose` made them."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing fails; warnings may be left."""
        return not self.count("fails")

    def count(self, state: State) -> int:
        """How many checks ended so."""
        return sum(check.state == state for check in self.checks)

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"{len(self.checks)} checks: {self.count('ok')} ok, {self.count('warning')} with a warning, "
            f"{self.count('fails')} failed."
        )

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            lines.append(f"{check.state:7}  {check.name:{width}}  {check.found}")
            lines += [f"{'':7}  {'':{width}}  → {check.remedy}"] if check.remedy else []
        return "\n".join([*lines, "", self.summary])

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(text, quote=True)}</td>" for text in asdict(check).values()) + "</tr>"
            for check in self.checks
        )
        heads = "".join(f'<th scope="col">{name}</th>' for name in ("checked", "state", "found", "what to do"))
        caption = f"<caption>{html.escape(self.summary)}</caption>"
        return f"<table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"

    def to_json(self) -> dict[str, Any]:
        """JSON values: `healthy`, and of each check name, state, found and remedy."""
        return {"healthy": self.healthy, "checks": [asdict(check) for check in self.checks]}


def look(name: str, check: Callable[[], Check | Sequence[Check]]) -> Sequence[Check]:
    """What a check finds; one that breaks is itself a finding, since whatever is looked at may be broken."""
    try:
        found = check()
    except Exception as cause:
        said = f"{type(cause).__name__}: {cause}".splitlines()[0]
        remedy = "Install the kit again into a fresh environment; if that does not mend it, report this line."
        return [Check(name, "fails", f"broke while it was looked at ({said})", remedy)]
    return [found] if isinstance(found, Check) else found
