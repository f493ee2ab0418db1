"""LPIPS is asked as torchmetrics is, keeps nothing, and says which extra it needs."""

import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from sdxl_sae_kit.errors import ModelError
from sdxl_sae_kit.judges import EmbeddingJudge, Perceptual
from sdxl_sae_kit.perceptual import Lpips
from sdxl_sae_kit.similarity import WorldEmbed


class Metric(torch.nn.Module):
    """What torchmetrics' class does with pictures: squeezes the maps of its net, and keeps them until it is reset."""

    def __init__(self, net_type, reduction, normalize):
        super().__init__()
        assert (reduction, normalize) == ("none", True)
        self.net, self.kept, self.largest, self.net_type = torch.nn.Conv2d(3, 3, 1), [], 0, net_type
        self.net.spatial = False

    def forward(self, one, other):
        assert one.shape == other.shape and one.shape[1] == 3
        assert min(one.min(), other.min()) >= 0 and max(one.max(), other.max()) <= 1
        maps = (one - other).square().mean(1, keepdim=True)
        self.kept.append(maps)
        self.largest = max(self.largest, len(torch.cat(self.kept)))
        return (maps if self.net.spatial else maps.mean((2, 3), keepdim=True)).squeeze()

    def reset(self):
        self.kept.clear()


@pytest.fixture
def torchmetrics(monkeypatch):
    def stand_in(metric):
        module = ModuleType("torchmetrics.image.lpip")
        module.LearnedPerceptualImagePatchSimilarity = metric
        for name in ("torchmetrics", "torchmetrics.image"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)

    return stand_in


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_weights_run_no_code(torchmetrics, tmp_path, capsys, monkeypatch):
    torch.save({"weight": Harmful()}, tmp_path / "alexnet.pth")

    def downloading(**_):
        torch.load(tmp_path / "alexnet.pth", weights_only=False)  # as torchvision does

    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torchmetrics(downloading)
    with pytest.raises(ModelError, match="LPIPS cannot be loaded"):
        Lpips(device="cpu")
    assert "must not run" not in capsys.readouterr().out and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def pictures(n, height=6, width=5):
    return np.random.default_rng(n).random((n, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("one_for_all", [True, False])
def test_a_map_is_what_the_metric_tells_of_each_place(torchmetrics, n, one_for_all):
    torchmetrics(Metric)
    lpips = Lpips(device="cpu")
    before, after = pictures(1 if one_for_all else n + 100)[: 1 if one_for_all else n], pictures(n)
    told = lpips(before, after)
    assert told.shape == (n, 6, 5)
    assert told == pytest.approx(np.square(before - after).mean(axis=3), abs=1e-6)
    assert lpips._lpips.kept == [] and lpips._lpips.largest <= 8


@pytest.mark.parametrize("one_for_all", [True, False])
def test_of_no_pictures_there_are_no_maps(torchmetrics, one_for_all):
    torchmetrics(Metric)
    lpips = Lpips(device="cpu")
    assert lpips(pictures(1)[: 1 if one_for_all else 0], pictures(3)[:0]).shape == (0, 6, 5)


def test_the_real_measure_is_read_rightly(monkeypatch):
    """With a random network in place of the downloaded one: where torchmetrics and torchvision are installed."""
    lpip = pytest.importorskip("torchmetrics.image.lpip", exc_type=Exception)
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    trained = models.alexnet
    monkeypatch.setattr(models, "alexnet", lambda **_: trained(weights=None))
    torch.manual_seed(0)
    lpips = Lpips(device="cpu")
    one, other = pictures(1, 96, 64), pictures(10, 96, 64)
    maps = lpips(one, other)
    assert maps.shape == (10, 96, 64) and (maps >= 0).all() and lpips(other, other).max() < 1e-6
    told = lpip.LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    told.net.load_state_dict(lpips._lpips.net.state_dict())
    expected = [
        float(told(*(torch.tensor(each).movedim(3, 1) for each in (one, other[at : at + 1])))) for at in range(10)
    ]
    assert maps.mean(axis=(1, 2)) == pytest.approx(expected, rel=0.05) and np.ptp(expected) > 0
    half = np.concatenate([one[:, :48], other[:1, 48:]], axis=1)
    (change,) = lpips(one, half)
    assert change[64:].mean() > 5 * change[:32].mean()  # it knows where


def test_colours_a_hair_beyond_the_range_are_taken(torchmetrics):
    torchmetrics(Metric)
    assert Lpips(device="cpu")(pictures(2) - 1e-6, pictures(2) + 1e-6).max() < 1e-6


def test_the_name_tells_the_net_and_its_weights(torchmetrics):
    torchmetrics(Metric)
    torch.manual_seed(0)
    one, other, vgg = Lpips(device="cpu"), Lpips(device="cpu"), Lpips("vgg", device="cpu")
    assert isinstance(one, Perceptual) and one.name.startswith("LPIPS alex ") and one.name != other.name
    assert vgg.name.startswith("LPIPS vgg ") and vgg._lpips.net_type == "vgg"


def test_a_judge_tells_what_it_is_given(torchmetrics):
    torchmetrics(Metric)
    lpips = Lpips(device="cpu")
    judge = EmbeddingJudge(WorldEmbed(), lpips)
    assert judge.name == f"{WorldEmbed().name} + {lpips.name}"
    assert (judge.perceptual(pictures(1), pictures(3)) == lpips(pictures(1), pictures(3))).all()


def failing(error):
    def metric(**_):
        raise error

    return metric


def test_what_cannot_be_had_says_what_to_do(torchmetrics, monkeypatch):
    torchmetrics(failing(ModuleNotFoundError("LPIPS metric requires that torchvision is installed.")))
    with pytest.raises(ModelError, match=r"torchvision is installed.*pip install 'sdxl-sae-kit\[riebench\]'"):
        Lpips(device="cpu")
    torchmetrics(failing(RuntimeError("operator torchvision::nms does not exist")))
    with pytest.raises(ModelError, match="nms does not exist.*must fit torch's version and build"):
        Lpips(device="cpu")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ModelError, match=r"pip install 'sdxl-sae-kit\[riebench\]'"):
        Lpips(device="cpu")
    with pytest.raises(ModelError, match="not 'alexnet'. Did you mean 'alex'"):
        Lpips("alexnet", device="cpu")
