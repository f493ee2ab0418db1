"""One test for each fault that tools of this kind have had: this kit must not have it."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionXLPipeline

from sdxl_sae_kit import observation
from sdxl_sae_kit.artifacts import Store
from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.errors import ArtifactError, EditError, KitError
from sdxl_sae_kit.hooks import record, rewrite
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import draw, generate
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.sae import FIRES, SAE

PACKAGE = Path(inspect.getfile(SAE)).parent
PROMPTS, SEEDS = ["a large red circle on a black background", "a small blue star on a gray background"], [3, 8]
HOOKPOINT = "up.0.1"


@pytest.fixture(scope="module")
def sae(small_saes):
    return small_saes[HOOKPOINT, "k8"]


@pytest.fixture(scope="module")
def latent(sae):
    return int(sae.mean_activation.argmax())


def images(pipe, **settings):
    return np.asarray(generate(pipe, PROMPTS, SEEDS, output_type="np", **settings))


def n_hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


def test_1_hooks_left_behind_and_attributes_swallowed(pipe, sae, latent):
    before, clean, steps = n_hooks(pipe), images(pipe), []
    with pytest.raises(ZeroDivisionError), steer(pipe, sae, scale={latent: 0.0}), record(pipe, ["mid.0"]):
        images(pipe)
        _ = 1 / 0
    assert n_hooks(pipe) == before and np.array_equal(images(pipe), clean)
    assert type(pipe) is StableDiffusionXLPipeline  # no wrapper: what is set on it while it is edited takes effect
    scheduler = pipe.scheduler
    try:
        with steer(pipe, sae, add={latent: 1.0}), rewrite(pipe, {"mid.0": lambda _u, call: steps.append(call.n_steps)}):
            pipe.scheduler = HeunDiscreteScheduler.from_config(scheduler.config)
            images(pipe, num_inference_steps=3)
    finally:
        pipe.scheduler = scheduler
    assert steps == [5] * 5  # Heun's


def test_2_a_step_counter_that_drifts_or_a_filter_that_means_never(pipe, sae, latent):
    seen = []

    def edited(**edit):
        """At which steps of three images, one of them broken off, the update is another one."""
        seen.clear()
        watching = rewrite(pipe, {HOOKPOINT: lambda update, call: seen.append((call.step, update.clone()))})
        with steer(pipe, sae, **edit), watching:
            generate(pipe, PROMPTS, SEEDS, num_inference_steps=3)
            generate(pipe, PROMPTS, SEEDS, num_inference_steps=3)
        return [step for step, _ in seen], [update for _, update in seen]

    numbers, plain = edited()
    assert numbers == [0, 1, 2] * 2
    _, always = edited(add={latent: 1.0})  # by default all steps
    _, last = edited(add={latent: 1.0}, steps=[2])
    assert [not torch.equal(a, b) for a, b in zip(plain, always, strict=True)] == [True] * 6
    assert [not torch.equal(a, b) for a, b in zip(plain, last, strict=True)] == [False, False, True] * 2
    with record(pipe, [HOOKPOINT], stop_early=True):
        generate(pipe, PROMPTS, SEEDS, num_inference_steps=3)
    assert edited()[0] == [0, 1, 2] * 2
    for never in ([], [3], (0.9, 0.95)):
        with pytest.raises(EditError, match="steps"):
            edited(add={latent: 1.0}, steps=never)


def test_3_edits_in_place_that_corrupt_what_was_recorded(pipe):
    with record(pipe, [HOOKPOINT]) as clean:
        generate(pipe, PROMPTS, SEEDS)

    def in_place(update, _call):
        return update.mul_(0)

    with rewrite(pipe, {HOOKPOINT: in_place}), record(pipe, [HOOKPOINT]) as recording:
        generate(pipe, PROMPTS, SEEDS)
    assert torch.equal(recording.update(HOOKPOINT), clean.update(HOOKPOINT))
    assert clean.update(HOOKPOINT).abs().max() > 0


def test_4_the_first_two_rows_taken_for_the_halves_of_one_image(pipe, sae, latent):
    updates = []
    with rewrite(pipe, {HOOKPOINT: lambda update, _: updates.append(update.clone())}):
        images(pipe, guidance_scale=3.0)
    with (
        steer(pipe, sae, add={latent: [0.0, 2.0]}, cfg="cond"),
        rewrite(pipe, {HOOKPOINT: lambda update, _: updates.append(update.clone())}),
    ):
        images(pipe, guidance_scale=3.0)
    changed = [not torch.equal(a, b) for a, b in zip(*updates, strict=True)]
    assert changed == [False, False, False, True]  # uncond of both images, then cond of both
    with record(pipe, [HOOKPOINT]) as recording, steer(pipe, sae, add={latent: 2.0}, cfg="cond"):
        images(pipe)  # no guidance: both rows are cond
    assert recording.halves == ["cond"] and len(recording.update(HOOKPOINT)) == 2


@pytest.mark.parametrize("memory", [1, 10**5, 10**9])
def test_5_a_loader_that_drops_its_buffer_at_the_end(small_cache, memory):
    updates = small_cache.read(HOOKPOINT, range(small_cache.n_images))
    expected = np.sort(updates.flatten(0, -2)[:, 0].float().numpy())
    batches = small_cache.batches([HOOKPOINT], 1000, split="all", memory=memory)
    got = np.sort(torch.cat([batch[HOOKPOINT] for batch in batches])[:, 0].numpy())
    np.testing.assert_array_equal(got, expected)  # also where the buffer holds more than there are


def test_6_feature_means_and_densities_that_are_not_what_they_say(small_stats, small_cache, sae):
    updates = small_cache.read(HOOKPOINT, range(small_cache.n_images))
    z = sae.encode(updates.reshape(-1, sae.d_in).float()).double().numpy()
    fires = z > FIRES
    np.testing.assert_allclose(small_stats.density, fires.mean(0), rtol=1e-6)  # of all tokens, not of tokens · k
    alive = fires.any(0)
    mean = (z * fires).sum(0)[alive] / fires.sum(0)[alive]
    np.testing.assert_allclose(small_stats.mean[alive], mean, rtol=2e-3)
    assert (small_stats.mean[~alive] == 0).all()


def test_7_the_sae_error_added_with_the_wrong_sign(pipe, sae, latent):
    updates = []
    with rewrite(pipe, {HOOKPOINT: lambda update, _: updates.append(update.clone())}):
        generate(pipe, PROMPTS, SEEDS)
    x = updates[0]
    z = sae.encode(x)
    error, z[..., latent] = x - sae.decode(z), 0
    with steer(pipe, sae, scale={latent: 0.0}), record(pipe, [HOOKPOINT], edited=True) as edited:
        generate(pipe, PROMPTS, SEEDS)
    assert torch.allclose(edited.update(HOOKPOINT), sae.decode(z) + error, atol=1e-4)
    assert not torch.allclose(edited.update(HOOKPOINT), sae.decode(z) - error, atol=1e-1)


def test_8_an_sae_used_where_it_was_not_trained(pipe, sae, latent, tmp_path):
    of_outputs = SAE(sae.config, sae.d_in, replace(sae.site, kind="output"), sae.name)
    refused = pytest.raises(ArtifactError, match="trained on outputs of up.0.1, not updates of up.0.1")
    with refused, steer(pipe, of_outputs, scale={latent: 0.0}):
        pass
    with pytest.raises(ArtifactError, match="trained on updates of up.0.1, not updates of mid.0"):
        sae.check_site("mid.0")
    sae.save(tmp_path / "sae.safetensors")
    assert SAE.load(tmp_path / "sae.safetensors").site == sae.site  # the file says where


def test_9_keyword_arguments_swallowed(pipe):
    with pytest.raises(TypeError, match="seed"):
        generate(pipe, PROMPTS, SEEDS, seed=3)
    with pytest.raises(KitError, match="StableDiffusionXLPipeline takes no 'seed', and would ignore it"):
        draw(pipe, PROMPTS, SEEDS, seed=3)
    pipe(PROMPTS, num_inference_steps=1, guidance_scale=0.0, seed=3, output_type="latent")  # it would indeed
    for path in sorted(PACKAGE.rglob("*.py")):  # and nothing of the kit calls a pipeline but through `draw`
        calls = [
            node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pipe", "self.pipe", "self._pipe")
        ]  # fmt: skip
        assert len(calls) == (path.stem in ("pipelines", "checkpoints")), path


def test_10_items_that_fail_left_out_in_silence(pipe, tmp_path, monkeypatch):
    prompts = load_prompts("world", 6)

    def failing(pipe, texts, seeds, **settings):
        if prompts.seeds[3] in seeds:
            raise RuntimeError("image 3")
        return draw(pipe, texts, seeds, **settings)

    monkeypatch.setattr(observation, "draw", failing)
    with pytest.raises(RuntimeError, match="image 3"):
        collect(pipe, prompts, ["mid.0"], batch_size=1, images=None, store=tmp_path)
    assert not any(artifact.finished for artifact in Store.at(tmp_path).artifacts())
    broad = {"Exception", "BaseException", "None"}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and broad & set(
                ast.unparse(node.type or ast.Constant(None)).split()
            ):
                silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
                assert not silent, f"{path}:{node.lineno} swallows whatever it catches"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
                assert not broad & {ast.unparse(argument) for argument in node.args}, f"{path}:{node.lineno}"


class _Runs:
    """What a pickle from a stranger may do when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_11_pickles_that_run_code_or_want_a_gpu(tmp_path):
    folder = tmp_path / "unet.mid_block.attentions.0_k6"
    folder.mkdir()
    (folder / "config.json").write_text('{"n_dirs_local": 96, "d_model": 24, "k": 6}')
    torch.save({"state_dict": _Runs(tmp_path / "ran")}, folder / "state_dict.pth")
    with pytest.raises(ArtifactError):
        SAE.load(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "state_dict.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so the file does what it is here for
    loads = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
                loads.append({keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
    assert loads and all(
        load.get("weights_only") == "True" and load.get("map_location") == "'cpu'" for load in loads
    ), loads
