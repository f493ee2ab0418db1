"""Shapes and types are checked at run time, threads are few, and nothing reaches for the network."""

import os
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("sdxl_sae_kit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import checking  # noqa: E402
import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import tqdm  # noqa: E402

checking.check_first_calls()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# By default forked processes share one lock: tests kill some, and one killed while it holds the lock stops the rest.
tqdm.tqdm.set_lock(threading.RLock())
os.register_at_fork(after_in_child=lambda: tqdm.tqdm.set_lock(threading.RLock()))
# No deadline: how long an example takes depends on what else runs. `make test-all` asks for the thorough profile.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=25)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=200)
hypothesis.settings.register_profile(  # see CONTRIBUTING on `make mutate`
    "mutation", max_examples=10, derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("quick")


def pytest_runtest_setup():
    checking.calls.clear()


@pytest.fixture
def unchecked_types(monkeypatch):
    """What users have, who run without run-time type checks: the kit's own refusals must speak."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store that the whole test session shares, so that what one test makes the next finds."""
    from sdxl_sae_kit.artifacts import Store

    return Store.at(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def pipe():
    """The embedded turbo model, in float32."""
    from sdxl_sae_kit.pipelines import load_pipeline

    return load_pipeline("tiny-turbo", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def small_cache(pipe, store):
    """120 images of the world with their updates at two hookpoints."""
    from sdxl_sae_kit.collection import collect
    from sdxl_sae_kit.prompts import load_prompts

    return collect(pipe, load_prompts("world", 120), ["down.2.1", "up.0.1"], store=store)


@pytest.fixture(scope="session")
def small_saes(small_cache, store):
    """One SAE at each of the two hookpoints, trained for a moment."""
    from sdxl_sae_kit.configs import SAEConfig
    from sdxl_sae_kit.training import train

    config = SAEConfig(k=8, expansion=2, lr=3e-3, dead_after=20_000)
    return train(small_cache, {"k8": config}, batch_size=512, epochs=6, store=store)


@pytest.fixture(scope="session")
def small_stats(small_saes, small_cache, store):
    """Feature statistics of the SAE at up.0.1."""
    from sdxl_sae_kit.features import FeatureStats

    return FeatureStats.measure(small_saes["up.0.1", "k8"], small_cache, store=store)
