"""What an ablation costs, beside drawing its conditions one after the other with `steer`, a dozen images at once.

Seconds of this process's CPU time, so that what else runs on the machine counts little.
"""

import tempfile
import time
from collections.abc import Callable

import torch

from sdxl_sae_kit.collection import collect
from sdxl_sae_kit.configs import SAEConfig
from sdxl_sae_kit.features import FeatureStats
from sdxl_sae_kit.interventions import steer
from sdxl_sae_kit.pipelines import generate, load_pipeline
from sdxl_sae_kit.prompts import load_prompts
from sdxl_sae_kit.search import most_energetic
from sdxl_sae_kit.studies.ablation import ablate
from sdxl_sae_kit.training import train

N_FEATURES, N_IMAGES, CONDITIONS = 3, 12, 11


def spent(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as store:
        pipe = load_pipeline("tiny-turbo", device="cpu")
        cache = collect(pipe, load_prompts("world", 480), ["up.0.1"], store=store)
        sae = train(cache, SAEConfig(k=5, lr=3e-3), batch_size=512, store=store)["up.0.1", "k5"]
        stats = FeatureStats.measure(sae, cache, store=store)
        features = most_energetic(stats, N_FEATURES)
        prompts = stats.prompts[:N_IMAGES]

        def one_by_one() -> None:
            for feature in features:
                generate(pipe, prompts.texts, prompts.seeds, output_type="np")
                for dose in range(CONDITIONS):
                    with steer(pipe, sae, scale={feature: float(dose)}):
                        generate(pipe, prompts.texts, prompts.seeds, output_type="np")

        pictures = N_FEATURES * N_IMAGES * CONDITIONS
        print(f"{N_FEATURES} features, {N_IMAGES} images each, {CONDITIONS} conditions: {pictures} edited pictures")
        print(f"one by one, unmeasured: {1000 * spent(one_by_one) / pictures:.1f} ms each")
        for judge in ({"judge": None}, {}):
            name = "pixels only" if judge else "with the model's judge"
            for size in (32, 64):
                cost = spent(lambda j=judge, s=size: ablate(pipe, sae, stats, features, **j, batch_size=s, store=store))
                print(f"ablate, {name}, batches of {size}: {1000 * cost / pictures:.1f} ms each")


if __name__ == "__main__":
    main()
