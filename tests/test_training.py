"""Training: several SAEs in one pass, resumed bit for bit after a kill, measured on what it never saw."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from launching import LAUNCHERS, Forked

from sdxl_sae_kit import runs
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig, Site
from sdxl_sae_kit.errors import ArtifactError, HookpointError, KitError
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import SAE
from sdxl_sae_kit.training import train

CONFIG = SAEConfig(k=4, expansion=2, lr=3e-3, dead_after=3000, auxk=16)


def test_an_sae_trained_with_others_is_the_one_trained_alone(small_cache, tmp_path):
    configs = {"k4": CONFIG, "k9": SAEConfig(k=9, expansion=1, lr=1e-3)}
    together = train(small_cache, configs, batch_size=512, store=tmp_path / "together")
    alone = train(small_cache, {"k4": CONFIG}, hookpoints=["up.0.1"], batch_size=512, store=tmp_path / "alone")
    assert set(together) == {(h, c) for h in ("down.2.1", "up.0.1") for c in ("k4", "k9")}
    one, other = together["up.0.1", "k4"], alone["up.0.1", "k4"]
    assert one.name == other.name
    assert one.digest == other.digest


def test_training_explains_held_out_tokens_far_better_than_an_untrained_sae(small_saes, small_cache):
    from sdxl_sae_kit.evaluation import evaluate

    for sae in small_saes.values():
        untrained = evaluate(SAE(sae.config, 96, sae.site), small_cache)["explained_variance"]
        assert sae.metrics["explained_variance"] > 0.8 > 0.5 > untrained
        low, high = sae.metrics["explained_variance_interval"]
        assert low <= sae.metrics["explained_variance"] <= high


def test_metrics_are_those_of_the_held_out_images_only(small_saes, small_cache):
    sae = small_saes["up.0.1", "k8"]
    images = [i for i, text in enumerate(small_cache.prompts.texts) if small_cache.prompts.held_out[i]]
    x = small_cache.read("up.0.1", images).flatten(0, 2).double()
    x_hat, z = sae(x.float()).double(), sae.encode(x.float())
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert sae.metrics["explained_variance"] == pytest.approx(expected.item(), abs=1e-6)
    assert sae.metrics["n_tokens"] == len(x)
    assert sae.metrics["l0"] == pytest.approx((z > 1e-3).double().sum(1).mean().item())
    assert sae.metrics["dead_share"] == pytest.approx(1 - (z > 1e-3).any(0).double().mean().item())


def test_the_unit_of_strength_is_the_mean_over_firing_training_tokens(small_saes, small_cache):
    sae = small_saes["down.2.1", "k8"]
    z = sae.encode(small_cache.read("down.2.1", small_cache.images("train")).flatten(0, 2).float()).double().numpy()
    for latent in range(0, sae.d_sae, 17):
        firing = z[:, latent][z[:, latent] > 1e-3]
        assert sae.mean_activation[latent].item() == pytest.approx(firing.mean() if len(firing) else 0, rel=1e-4)


def test_rows_in_the_saved_file_are_unit_and_the_header_says_where_it_belongs(small_saes, small_cache):
    for (hookpoint, _), sae in small_saes.items():
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-6)
        expected = {
            "model": "tiny-turbo",
            "hookpoint": hookpoint,
            "num_inference_steps": 1,
            "guidance_scale": 0.0,
            "kind": "update",
        }
        assert expected.items() <= asdict(sae.site).items()
        assert sae.site.revision == small_cache.recipe["revision"]


def test_the_log_tells_a_falling_loss(small_saes):
    for log in small_saes.logs.values():
        assert [line["step"] for line in log] == sorted({line["step"] for line in log})
        assert log[-1]["unexplained"] < 0.5 * log[0]["unexplained"]
    assert "2 lines of unexplained share over step" in small_saes.plot().layout.meta["alt"]
    assert len(small_saes.rows()) == 2


def test_a_second_call_loads_instead_of_training(small_saes, small_cache, store, monkeypatch):
    monkeypatch.setattr(runs, "Learner", None)
    config = next(iter(small_saes.values())).config
    again = train(small_cache, {"k8": config}, batch_size=512, epochs=6, store=store)
    assert {key: sae.digest for key, sae in again.items()} == {key: sae.digest for key, sae in small_saes.items()}


def trainer(cache, store, checkpoint_steps):
    """A process that trains every kind with every schedule."""
    common = {"lr": 3e-3, "dead_after": 3000, "auxk": 16}
    configs = {
        "a": SAEConfig(k=4, expansion=2, resample_every=20_000, warmup_steps=30, decay_steps=60, **common),
        "b": SAEConfig(k=8, kind="batchtopk", k_start=16, anneal_steps=120, prefixes=(0.5,), **common),
        "c": SAEConfig(k=4, kind="jumprelu", normalize="channels", **common),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "_CHECKPOINT_STEPS", checkpoint_steps)
        return Forked(lambda: train(cache, configs, hookpoints=["up.0.1"], batch_size=512, epochs=16, store=store))


def checkpoints(store):
    return list(store.rglob("checkpoint.safetensors"))


def test_two_hundred_steps_are_a_hundred_a_kill_and_a_hundred_bit_for_bit(small_cache, tmp_path):
    """Every kind, with every schedule: weights, thresholds, Adam, random draws and the place in the data go on."""
    assert small_cache.steps("up.0.1", 512) * 16 == 224
    whole = trainer(small_cache, tmp_path / "whole", 1000)
    killed = trainer(small_cache, tmp_path / "killed", 100)
    deadline = time.monotonic() + 100
    while len(checkpoints(tmp_path / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed") and not list((tmp_path / "killed").rglob("stamp.json"))
    for path in checkpoints(tmp_path / "killed"):
        assert SAE.load(path).hookpoint == "up.0.1"  # a checkpoint is an SAE too
    assert trainer(small_cache, tmp_path / "killed", 1000).wait() == 0
    assert whole.wait() == 0
    made = [p for p in (tmp_path / "whole").rglob("*") if p.name in ("sae.safetensors", "training.jsonl")]
    assert len(made) == 6 and not checkpoints(tmp_path / "killed")
    for path in made:
        assert path.read_bytes() == (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_schedules_are_series_of_the_log(small_cache, tmp_path):
    config = SAEConfig(k=4, k_start=24, anneal_steps=60, lr=1e-3, warmup_steps=20, decay_steps=40, expansion=2)
    saes = train(small_cache, {"a": config}, hookpoints=["up.0.1"], batch_size=512, epochs=8, store=tmp_path)
    log = {line["step"]: line for line in saes.logs["up.0.1", "a"]}
    assert list(log) == [1, 20, 40, 60, 80, 100]
    assert [line["k"] for line in log.values()] == [24, round(24 - 20 * 19 / 60), round(24 - 20 * 39 / 60), 4, 4, 4]
    assert [line["lr"] for line in log.values()] == pytest.approx(
        [5e-5, 1e-3, 1e-3, 1e-3, 33 / 40 * 1e-3, 13 / 40 * 1e-3]
    )
    assert [line["tokens"] for line in log.values()][:3] == [512, 6784 + 6 * 512, 2 * 6784 + 12 * 512]
    assert log[60]["l0"] <= 4 < log[1]["l0"]


# Batches of any iterator ---------------------------------------------------------------------------------------------


def made_up_batches(n=30, size=512, d_in=12, seed=0):
    """Tokens that are sparse sums of 24 directions."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((24, d_in))
    codes = rng.random((n, size, 24)) * (rng.random((n, size, 24)) < 0.1)
    return [torch.from_numpy(code @ directions + 0.5).float() for code in codes]


SITE = Site("someone's model", "v1", "mid.0", 1, 0.0)


def test_any_iterator_of_batches_is_trained_on_and_measured_on_what_is_put_aside(tmp_path):
    batches = made_up_batches()
    config = SAEConfig(k=4, expansion=2, lr=3e-3)
    saes = train(iter(batches), {"a": config}, site=SITE, store=tmp_path)
    sae = saes["mid.0", "a"]
    held_out = torch.cat(batches[:8]).double()  # 4,096 tokens
    x_hat = sae(held_out.float()).double()
    expected = 1 - ((held_out - x_hat) ** 2).sum() / ((held_out - held_out.mean(0)) ** 2).sum()
    assert sae.metrics["explained_variance"] == pytest.approx(expected.item(), abs=1e-5)
    assert sae.metrics["n_tokens"] == 4096
    assert sae.site == SITE and saes.logs["mid.0", "a"][-1]["step"] == 20
    again = train((batch.numpy() for batch in batches), {"a": config}, site=SITE, store=tmp_path)  # found, not trained
    assert again["mid.0", "a"].digest == sae.digest


def test_an_iterator_is_passed_once_for_all_saes_and_hookpoints(tmp_path):
    given = []

    def both():
        for mine, other in zip(made_up_batches(), made_up_batches(d_in=16, seed=1), strict=True):
            given.append(len(mine))
            yield {"mid.0": mine, "up.0.1": other}

    configs = {f"k{k}": SAEConfig(k=k, expansion=2, lr=3e-3) for k in (2, 4)}
    saes = train(both(), configs, store=tmp_path)
    assert len(given) == 30 and len(saes) == 4
    assert saes["up.0.1", "k2"].d_in == 16
    alone = train(iter(made_up_batches()), {"k2": configs["k2"]}, store=tmp_path / "alone")["tokens", "k2"]
    assert torch.equal(alone.W_dec, saes["mid.0", "k2"].W_dec)
    with pytest.raises(ArtifactError, match="has no hookpoint"):
        _ = alone.hookpoint


@pytest.mark.parametrize(
    ("batches", "complaint"),
    [
        ([], "There are 0 tokens"),
        ([torch.zeros(9, 3)], "There are 9 tokens: .* none is left to train on"),
        ([torch.zeros(9)] * 9, r"Batch 0 is torch.float32 of shape \(9,\)"),
        ([torch.zeros(9, 3, dtype=torch.int64)] * 9, "Batch 0 is torch.int64"),
        ([torch.zeros(5000, 3), torch.zeros(9, 4)], "Batch 1 has tokens .9, 4., but the first had widths"),
        ("prompts", "train takes what collect or stream gives, or an iterable"),
        (torch.zeros(9, 3), "such as x.split.4096., not Tensor"),
    ],
)
def test_what_is_no_batches_is_refused(tmp_path, batches, complaint, unchecked_types):
    with pytest.raises(KitError, match=complaint):
        train(batches, SAEConfig(k=2), store=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_iterator_that_cannot_begin_again_has_one_epoch_and_an_unknown_end(tmp_path):
    with pytest.raises(KitError, match="An iterator gives its batches once"):
        train(iter(made_up_batches()), SAEConfig(k=2), epochs=2, store=tmp_path)
    with pytest.raises(KitError, match="decay_steps=9 needs to know how many batches there are"):
        train(iter(made_up_batches()), SAEConfig(k=2, decay_steps=9), store=tmp_path)
    twice = train(made_up_batches(), SAEConfig(k=2, decay_steps=9, lr=3e-3), epochs=2, store=tmp_path)
    assert twice.logs["tokens", "k2"][-1]["step"] == 40


# Failures ------------------------------------------------------------------------------------------------------------


def test_one_failing_sae_does_not_stop_the_others_and_keeps_its_last_good_step(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_CHECKPOINT_STEPS", 5)
    configs = {"good": SAEConfig(k=4, expansion=2, lr=3e-3), "bad": SAEConfig(k=4, expansion=2, lr=1e4)}
    saes = train(made_up_batches(), configs, store=tmp_path)
    assert list(saes) == [("tokens", "good")] and saes["tokens", "good"].metrics["explained_variance"] > 0.3
    assert "at step 1 the loss has grown" in saes.failures["tokens", "bad"]
    assert "tokens bad: stopped. " in repr(saes)
    with pytest.raises(KitError, match=r"The training of \('tokens', 'bad'\) stopped: .* Lower lr"):
        saes["tokens", "bad"]
    alone = train(made_up_batches(), {"good": configs["good"]}, store=tmp_path / "alone")
    assert alone["tokens", "good"].digest == saes["tokens", "good"].digest


def test_a_batch_that_is_not_finite_stops_training_with_a_checkpoint_to_go_on_from(tmp_path):
    batches, config = made_up_batches(60, 1024), SAEConfig(k=4, expansion=2, lr=3e-3)
    broken = [*batches[:50], torch.full((1024, 12), float("nan")), *batches[51:]]
    with pytest.raises(
        KitError, match=r"None of the SAEs could be trained.*at step 46 the loss is nan.* checkpoint is .*safetensors"
    ):
        train(broken, config, store=tmp_path)
    (kept,) = checkpoints(tmp_path)
    assert all(tensor.isfinite().all() for tensor in SAE.load(kept).state_dict().values())
    mended = train(batches, config, store=tmp_path)["tokens", "k4"]
    assert torch.equal(mended.W_dec, train(batches, config, store=tmp_path / "whole")["tokens", "k4"].W_dec)


def test_tokens_that_are_not_finite_from_the_start_are_refused(tmp_path):
    with pytest.raises(KitError, match="The first tokens that .* is to start from are not finite. Look for"):
        train([*made_up_batches(), torch.full((512, 12), float("inf"))], SAEConfig(k=2), store=tmp_path)


def test_other_batches_than_before_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_CHECKPOINT_STEPS", 90)
    batches = made_up_batches(120, 1024)
    broken = [*batches[:110], torch.full((1024, 12), float("nan")), *batches[111:]]
    config = SAEConfig(k=4, expansion=2, lr=3e-3)
    with pytest.raises(KitError, match="at step 106 the loss is nan"):
        train(broken, config, store=tmp_path)
    swapped = [*batches[:93], batches[94], batches[93], *batches[95:]]
    with pytest.raises(KitError, match="on other batches so far: training batch 89 .from 0. has changed"):
        train(swapped, config, store=tmp_path)


def test_what_an_sae_learns_does_not_depend_on_who_else_is_still_in_training(small_cache, tmp_path, monkeypatch):
    """Also where the buffer that mixes tokens is smaller than the cache: a second call goes on with the rest."""
    small = partial(small_cache.batches, memory=200_000)
    monkeypatch.setattr(small_cache, "batches", small)
    config = SAEConfig(k=4, expansion=2, lr=3e-3)
    both = train(small_cache, {"a": config}, batch_size=512, epochs=2, store=tmp_path / "both")
    one = train(small_cache, {"a": config}, hookpoints=["up.0.1"], batch_size=512, epochs=2, store=tmp_path / "one")
    assert both["up.0.1", "a"].digest == one["up.0.1", "a"].digest


def test_few_images_and_channels_that_never_vary_have_undefined_numbers_and_still_an_sae(pipe, tmp_path):
    cache = collect(pipe, load_prompts("world", 20), ["mid.0"], images=None, store=tmp_path)
    assert len(cache.images("held_out")) == 1
    saes = train(cache, SAEConfig(k=4, expansion=1, lr=3e-3), batch_size=256, store=tmp_path)
    assert saes["mid.0", "k4"].metrics["explained_variance_interval"] is None
    assert "mid.0" in saes._repr_html_() and "mid.0 k4: explained variance" in repr(saes)
    batches = [torch.cat([batch, torch.ones(len(batch), 1)], dim=1) for batch in made_up_batches()]
    metrics = train(batches, SAEConfig(k=4, expansion=2, lr=3e-3), store=tmp_path)["tokens", "k4"].metrics
    assert 0 < metrics["explained_variance_per_channel"] <= 1


def test_running_out_of_memory_stops_one_sae_and_lets_go_of_it(tmp_path, monkeypatch):
    step = runs.Learner.step

    def scarce(self, *args):
        if self.sae.config.k == 3 and self.step_number == 7:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(runs.Learner, "step", scarce)
    monkeypatch.setattr(runs, "_CHECKPOINT_STEPS", 5)
    configs = {f"k{k}": SAEConfig(k=k, expansion=2, lr=3e-3) for k in (2, 3)}
    saes = train(made_up_batches(), configs, store=tmp_path)
    assert list(saes) == [("tokens", "k2")]
    assert "out of memory Its last good checkpoint is" in saes.failures["tokens", "k3"]
    assert "SAEs whose training stopped" in saes._repr_html_()
    monkeypatch.undo()
    assert train(made_up_batches(), configs, store=tmp_path)["tokens", "k3"].metrics["explained_variance"] > 0


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path, monkeypatch):
    step = runs.Learner.step

    def spoil(self, *args):
        seen = step(self, *args)
        if self.step_number == 10:
            self.sae.W_enc.data[0, 0] = torch.nan
        return seen

    monkeypatch.setattr(runs.Learner, "step", spoil)
    monkeypatch.setattr(runs, "_CHECKPOINT_STEPS", 5)
    with pytest.raises(KitError, match="weights are not finite after step 9. Lower lr.* Its last good checkpoint is"):
        train(made_up_batches(), SAEConfig(k=4, expansion=2, lr=3e-3), store=tmp_path)
    (kept,) = checkpoints(tmp_path)
    assert SAE.load(kept).W_enc.isfinite().all()


def test_a_checkpoint_of_a_batchtopk_has_its_threshold(tmp_path):
    batches = made_up_batches(60, 1024)
    broken = [*batches[:50], torch.full((1024, 12), float("nan")), *batches[51:]]
    with pytest.raises(KitError, match="at step 46"):
        train(broken, SAEConfig(k=4, kind="batchtopk", expansion=2, lr=3e-3), store=tmp_path)
    (kept,) = checkpoints(tmp_path)
    assert (SAE.load(kept).encode(batches[0]) > 0).sum(1).double().mean().item() == pytest.approx(4, rel=0.1)


def test_a_damaged_checkpoint_says_what_to_delete(tmp_path):
    batches = made_up_batches(60, 1024)
    broken = [*batches[:50], torch.full((1024, 12), float("nan")), *batches[51:]]
    config = SAEConfig(k=4, expansion=2, lr=3e-3)
    with pytest.raises(KitError):
        train(broken, config, store=tmp_path)
    (kept,) = checkpoints(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(KitError, match="checkpoint.safetensors is damaged .*Delete it"):
        train(batches, config, store=tmp_path)
    kept.unlink()
    assert train(batches, config, store=tmp_path)


def test_more_batches_that_begin_alike_and_another_place_are_another_training(tmp_path):
    batches, config = made_up_batches(60, 1024), SAEConfig(k=4, expansion=2, lr=3e-3)
    few, all_of_them = (train(some, config, store=tmp_path)["tokens", "k4"] for some in (batches[:50], batches))
    assert few.name != all_of_them.name
    here, there = (
        train(batches, config, site=replace(SITE, revision=revision), store=tmp_path)["mid.0", "k4"]
        for revision in ("v1", "v2")
    )
    assert (here.site.revision, there.site.revision) == ("v1", "v2")


def test_an_iterator_may_fill_the_same_memory_again_and_give_empty_batches(tmp_path):
    def refilling():
        memory = torch.empty(512, 12)
        for batch in made_up_batches():
            memory.copy_(batch)
            yield memory
            yield memory[:0]

    config = SAEConfig(k=4, expansion=2, lr=3e-3)
    refilled = train(refilling(), config, store=tmp_path / "a")["tokens", "k4"]
    assert torch.equal(
        refilled.W_dec, train(iter(made_up_batches()), config, store=tmp_path / "b")["tokens", "k4"].W_dec
    )


def test_a_place_that_is_no_update_or_is_known_already_is_refused(small_cache, tmp_path):
    with pytest.raises(KitError, match="site says 'output', but this kit works on updates only"):
        train(made_up_batches(), SAEConfig(k=2), site=replace(SITE, kind="output"), store=tmp_path)
    with pytest.raises(KitError, match="says itself where its updates come from. Leave site= out"):
        train(small_cache, SAEConfig(k=2), site=SITE, store=tmp_path)


# Several processes ---------------------------------------------------------------------------------------------------

TOGETHER = """
    import os, sys, torch
    torch.set_num_threads(1)
    from sdxl_sae_kit import runs, training, SAEConfig, ActivationCache
    common = dict(lr=3e-3, dead_after=2000, auxk=16, expansion=2, resample_every=30_000)
    configs = {kind: SAEConfig(k=4, kind=kind, **common) for kind in ("topk", "batchtopk", "jumprelu")}
    configs["nested"] = SAEConfig(k=4, prefixes=(0.25, 0.5), **common)
    runs._LOG_STEPS = 1
    saes = training.train(ActivationCache.open(sys.argv[1]), configs, hookpoints=["up.0.1"], batch_size=512, epochs=8,
                          store=sys.argv[2])
    assert len(saes) == 4 and not saes.failures
"""


@pytest.mark.slow
def test_two_processes_at_half_a_batch_learn_as_one_at_the_whole(small_cache, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(textwrap.dedent(TOGETHER))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for store, start in (("one", []), ("two", ["-m", *LAUNCHERS["accelerate"]])):
        command = [sys.executable, *start, script, small_cache.artifact.folder, tmp_path / store]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    logs = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("training.jsonl")}
    assert len(logs) == 4
    for name, path in logs.items():
        one, two = (
            [json.loads(line) for line in each.read_text().splitlines()] for each in (path, tmp_path / "two" / name)
        )
        assert len(one) == len(two) == 112
        for key in ("unexplained", "auxk", "l0", "dead_share"):
            curves = np.array([[line[key] for line in log] for log in (one, two)])
            # rounding may tip which of two nearly equal latents is chosen; it must not tip the curve
            assert np.allclose(curves[0, :30], curves[1, :30], rtol=1e-3, atol=1e-3), (name, key)
            assert np.allclose(curves[0], curves[1], rtol=0.1, atol=0.02), (name, key)


@pytest.mark.slow
def test_auxk_brings_dead_latents_back(small_cache, tmp_path):
    common = SAEConfig(k=8, expansion=2, lr=3e-3, dead_after=10_000, auxk=64)
    configs = {
        f"{name}-{seed}": replace(common, auxk_coef=coefficient, seed=seed)
        for name, coefficient in {"with": 1 / 32, "without": 1e-30}.items()
        for seed in range(3)
    }
    saes = train(small_cache, configs, hookpoints=["up.0.1"], batch_size=512, epochs=24, store=tmp_path)
    dead = {key: sae.metrics["dead_share"] for (_, key), sae in saes.items()}
    with_auxk, without = (np.mean([dead[f"{name}-{seed}"] for seed in range(3)]) for name in ("with", "without"))
    assert with_auxk < 0.9 * without, dead


def test_mistakes_are_refused(pipe, small_cache, tmp_path):
    with pytest.raises(HookpointError, match="Did you mean 'up.0.1'"):
        train(small_cache, CONFIG, hookpoints=["up.O.1"], store=tmp_path)
    few = collect(pipe, ["one prompt"], ["mid.0"], images=None, store=tmp_path)
    with pytest.raises(KitError, match="too few to keep some for testing. Collect more prompts"):
        train(few, CONFIG, store=tmp_path)


def test_what_is_not_there_is_named_with_what_is(small_saes, unchecked_types):
    with pytest.raises(KitError, match=r"No SAE \('up.0.1', 'k9'\) here; there are .*\('up.0.1', 'k8'\)"):
        small_saes["up.0.1", "k9"]
    assert "up.0.1 k8: explained variance 0." in repr(small_saes)


@pytest.mark.parametrize("configs", [{"a": 5}, {"": SAEConfig(k=2)}, {"a/b": SAEConfig(k=2)}, {"<b>": SAEConfig(k=2)}])
def test_configurations_that_make_no_sense_are_refused(small_cache, tmp_path, configs, unchecked_types):
    with pytest.raises(KitError, match="must be an SAEConfig|cannot name an SAE"):
        train(small_cache, configs, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_sae_is_not_loaded(small_cache, tmp_path):
    config = SAEConfig(k=2, expansion=1)
    saes = train(small_cache, config, hookpoints="up.0.1", store=tmp_path)
    (path,) = tmp_path.glob("saes/*/sae.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="sae.safetensors is missing or has changed. Delete its folder"):
        train(small_cache, config, hookpoints="up.0.1", store=tmp_path)
    assert saes
