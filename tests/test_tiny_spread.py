"""The spread of updates is measured without their noise, and its penalty makes quiet directions louder."""

import pytest
import torch

from sdxl_sae_kit.metrics import constant_share, participation_ratio
from sdxl_sae_kit.tiny import networks
from sdxl_sae_kit.tiny.spread import ENOUGH_DIRECTIONS, ENOUGH_WITHIN, Spread

D_IN, TOKENS = 96, 64


@pytest.fixture
def spread():
    return Spread(networks.unet())


def show(spread, updates):
    """Let all hookpoints have made these updates, (2 · pair, token, d_in); returns the penalty."""
    for name in ("down.2.1", "mid.0", "up.0.0", "up.0.1"):
        spread._updates[name] = updates
    return spread.penalty(len(updates) // 2)


def signals(n, directions, *, flat=False):
    """Updates that vary in so many directions with equal strength, the same at every token of an image or not."""
    z = torch.randn(n, 1 if flat else TOKENS, directions)
    return torch.cat([z, torch.zeros(*z.shape[:2], D_IN - directions)], 2).expand(n, TOKENS, D_IN)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_noise_does_not_count_however_rich_it_is(spread, noise):
    torch.manual_seed(0)
    for _ in range(60):
        signal = signals(16, 5).repeat_interleave(2, 0)
        show(spread, 3 + signal + noise * torch.randn(signal.shape))
    assert spread.directions.tolist() == pytest.approx([5] * 4, rel=0.15)
    assert spread.within.tolist() == pytest.approx([1 - 1 / TOKENS] * 4, abs=0.05)


def test_without_noise_they_are_the_metrics(spread):
    torch.manual_seed(0)
    mixing = torch.randn(8, D_IN) * torch.logspace(0, -1, 8)[:, None]
    fixed = (torch.randn(16, TOKENS, 8) + 2 * torch.randn(16, 1, 8)) @ mixing
    for _ in range(100):  # twice as many as are remembered
        show(spread, fixed.repeat_interleave(2, 0))
    assert spread.directions[0].item() == pytest.approx(participation_ratio(fixed.flatten(0, 1)), rel=0.01)
    assert spread.within[0].item() == pytest.approx(1 - constant_share(fixed), rel=0.01)


def test_its_gradient_raises_both(spread):
    torch.manual_seed(0)
    loudness = torch.nn.Parameter(torch.tensor([5.0] * 2 + [0.2] * 30))
    varying = torch.nn.Parameter(torch.tensor(0.1))
    optimizer = torch.optim.Adam([loudness, varying], 0.03)
    for number in range(600):
        signal = signals(8, 32, flat=True)[..., :32] + varying * signals(8, 32)[..., :32]
        updates = torch.cat([signal * loudness, torch.zeros(8, TOKENS, D_IN - 32)], 2).repeat_interleave(2, 0)
        penalty = show(spread, updates + 0.1 * torch.randn(updates.shape))
        if penalty.requires_grad:
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
        if number == 60:
            poor = spread.directions[0].item(), spread.within[0].item()
    assert poor[0] < 4 and poor[1] < 0.1
    assert spread.directions[0] > 0.9 * ENOUGH_DIRECTIONS and spread.within[0] > 0.9 * ENOUGH_WITHIN


def test_what_is_rich_enough_owes_nothing(spread):
    torch.manual_seed(0)
    for _ in range(60):
        updates = signals(32, 40).repeat_interleave(2, 0).requires_grad_(True)
        penalty = show(spread, updates)
    penalty.backward()
    assert updates.grad.abs().max() == 0


def test_it_reads_what_the_blocks_write():
    unet = networks.unet()
    spread = Spread(unet)
    written = []
    unet.mid_block.attentions[0].proj_out.register_forward_hook(lambda _m, _i, output: written.append(output))
    conditioning = {"text_embeds": torch.randn(2, 96), "time_ids": torch.full((2, 6), 64.0)}
    unet(torch.randn(2, 4, 32, 32), torch.tensor([999, 999]), torch.randn(2, 24, 160), added_cond_kwargs=conditioning)
    assert spread._updates["mid.0"] is written[0] and len(spread._updates) == 4
