"""Claims: what is planted is supported, what is contradicted or shown by controls is not, and noise is undecided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_descriptors import plant

from sdxl_sae_kit.questions import ROLES
from sdxl_sae_kit.studies.claims import (
    BREADTH,
    CLAIMS,
    RANDOM,
    SAME_PROMPT,
    TRAINED,
    claim_sentence,
    part_rows,
    weigh_claims,
)
from sdxl_sae_kit.studies.contrasts import Pool

STYLE = {f"{verb} {factor}": 2.0 for verb in ("responds to", "changes") for factor in ROLES["style"]}


def pools(more, control=None, blocks=("up.0.0", "up.0.1"), kinds=(), seed=0) -> dict[str, Pool]:
    """Features of which those of up.0.1 are special, beside controls."""

    def pool(shift, of, chosen):
        shifts = {"up.0.1": shift}
        return Pool.of([plant(b, shifts.get(b, {}), seed=10 * seed + of, kinds=chosen) for b in blocks])

    made = {TRAINED: pool(more, 0, kinds), "untrained": pool(control, 1, ("response", "space"))}
    return made | {SAME_PROMPT: pool(more, 2, ("cause",)), RANDOM: pool(control, 3, ("cause",))}


def outcome(found, block="up.0.1") -> str:
    return next(claim["outcome"] for claim in found if claim["block"] == block)


def test_a_planted_claim_is_supported_with_its_lead() -> None:
    found = weigh_claims(pools(STYLE))
    assert outcome(found) == "supported"
    claim = next(claim for claim in found if claim["block"] == "up.0.1")
    trained = pools(STYLE)[TRAINED]
    columns = [trained.names.index(f"responds to {factor}") for factor in ROLES["style"]]
    score = trained.points[:, columns].mean(axis=1)
    lead = score[trained.block == 1].mean() - score[trained.block == 0].mean()
    part = claim["parts"][0]
    assert part["lead"] == pytest.approx(lead)
    assert part["lead interval"][0] < lead < part["lead interval"][1]
    assert [control["control"] for control in part["controls"]] == ["untrained"]
    assert [control["control"] for control in claim["parts"][1]["controls"]] == [RANDOM]
    assert "supported (respond to style: holds (+" in claim_sentence(claim)
    assert f"; gap to {RANDOM} +" in claim_sentence(claim)
    rows = [row for row in part_rows(found) if row["block"] == "up.0.1"]
    assert "responds to colour 1.19 against 0.982" in rows[0]["means"]


def test_the_opposite_is_not_supported() -> None:
    assert outcome(weigh_claims(pools(dict.fromkeys(STYLE, -2.0)))) == "not supported"


def test_what_a_control_shows_more_is_not_supported() -> None:
    found = weigh_claims(pools(STYLE, control=dict.fromkeys(STYLE, 3.0)))
    assert outcome(found) == "not supported"
    (claim,) = (claim for claim in found if claim["block"] == "up.0.1")
    assert claim["parts"][0]["lead interval"][0] > 0 > claim["parts"][0]["controls"][0]["gap interval"][1]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_control_shows_as_much_is_undecided(seed: int) -> None:
    found = weigh_claims(pools(STYLE, control=STYLE, seed=seed))
    assert outcome(found) == "undecided"


def test_random_directions_that_change_less_by_nature_are_compared_by_their_own_spread() -> None:
    made = pools(STYLE, control=STYLE)
    made[RANDOM] = replace(made[RANDOM], values=made[RANDOM].values / 100)
    (claim,) = (claim for claim in weigh_claims(made) if claim["block"] == "up.0.1")
    assert claim["parts"][1]["outcome"] == "open"
    same = next(c for c in weigh_claims(pools(STYLE, control=STYLE)) if c["block"] == "up.0.1")
    assert claim["parts"][1]["controls"][0]["gap"] == pytest.approx(same["parts"][1]["controls"][0]["gap"])


def test_of_noise_nothing_is_supported() -> None:
    found = [outcome(weigh_claims(pools({}, seed=seed))) for seed in range(10)]
    assert "supported" not in found and found.count("undecided") >= 6


def test_one_part_that_holds_does_not_carry_the_other() -> None:
    responds = {name: shift for name, shift in STYLE.items() if name.startswith("responds")}
    found = weigh_claims(pools(responds | {"changes colour": 0.0}))
    (claim,) = (claim for claim in found if claim["block"] == "up.0.1")
    assert [part["outcome"] for part in claim["parts"]] == ["holds", "open"]
    assert claim["outcome"] == "undecided"


def test_without_causes_a_claim_stays_undecided() -> None:
    given = pools(STYLE, kinds=("response", "space"))
    found = weigh_claims({name: given[name] for name in (TRAINED, "untrained")})
    assert outcome(found) == "undecided"
    (claim,) = (claim for claim in found if claim["block"] == "up.0.1")
    assert "change style: not measured (–)" in claim_sentence(claim)


def test_without_factors_pictures_are_asked_and_named() -> None:
    found = weigh_claims({TRAINED: pools({}, kinds=("space", "cause"))[TRAINED].named(["active area", "colour share"])})
    claim = next(claim for claim in found if claim["block"] == "up.0.1")
    assert claim["parts"][1]["descriptors"] == ["more colour share"]
    assert claim["parts"][0]["outcome"] == "not measured"


def test_blocks_that_are_not_there_are_not_asked() -> None:
    found = weigh_claims(pools(STYLE))
    assert {claim["block"]: claim["outcome"] for claim in found if claim["outcome"] == "not asked"} == {
        "down.2.1": "not asked", "mid.0": "not asked",
    }  # fmt: skip
    assert set(CLAIMS) == {claim["block"] for claim in found}
    assert {row["block"] for row in part_rows(found)} == {"up.0.0", "up.0.1"}


def test_breadth_is_full_for_all_factors_alike_and_none_for_one() -> None:
    blocks = ("mid.0", "up.0.1")
    found = {}
    for name, spread in (("broad", 1.0), ("narrow", 0.0)):
        described = [plant(block, {}) for block in blocks]
        responds = np.array([n.startswith("responds to") for n in described[0].names])
        described[0].values[:, responds] = spread
        described[0].values[:, 0] = 1.0
        (claim,) = (c for c in weigh_claims({TRAINED: Pool.of(described)}) if c["block"] == "mid.0")
        assert claim["parts"][0]["descriptors"] == [f"more {BREADTH}"]
        found[name] = claim["parts"][0]["lead"]
    assert found["broad"] > 0 > found["narrow"]


def test_features_that_respond_to_nothing_are_not_the_broadest() -> None:
    described = [plant(block, {}) for block in ("mid.0", "up.0.1")]
    described[0].values[:30, [n.startswith("responds to") for n in described[0].names]] = 0.0
    (claim,) = (c for c in weigh_claims({TRAINED: Pool.of(described)}) if c["block"] == "mid.0")
    assert claim["parts"][0]["features"] == 10
    assert claim["parts"][0]["outcome"] == "open"
