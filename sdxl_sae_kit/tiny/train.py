"""The recipe of tiny-sdxl: one deterministic, resumable run from nothing to two pipeline folders and a judge.

First the VAE, then the judge, then the base (U-Net and both text encoders together), then the turbo from the base.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sdxl_sae_kit.amounts import whole_number
from sdxl_sae_kit.errors import ModelError, did_you_mean
from sdxl_sae_kit.tiny import checkpoints
from sdxl_sae_kit.tiny.judge_training import train_judge
from sdxl_sae_kit.tiny.runs import Recipe, Run
from sdxl_sae_kit.tiny.unet_training import train_base, train_turbo
from sdxl_sae_kit.tiny.vae_training import train_vae

STAGES = ("vae", "judge", "base", "turbo")


def train(
    folder: str | Path,
    *,
    samples: int = 600_000,
    turbo_samples: int = 100_000,
    vae_samples: int = 100_000,
    judge_samples: int = 200_000,
    processes: int = 2,
    seed: int = 0,
    stage: str = "all",
    device: str = "cpu",
    recipe: Recipe | None = None,
) -> Path:
    """Train in `folder`, going on from whatever it holds, and return it.

    It comes to hold checkpoints (`vae.pt`, `judge.pt`, `ck.pt`, `turbo.pt`), `log.jsonl` and sample grids; the finished
    VAE in `vae/` and judge in `judge/`; and after the last stage the pipeline folders `tiny-base/` and `tiny-turbo/`.

    Args:
        folder: where to work. A `ck.pt` and `vae/` made elsewhere can be put there to go on from.
        samples: pictures that the base sees in all, those before a stop included.
        turbo_samples, vae_samples, judge_samples: the same for the other networks.
        processes: how many train side by side on the CPU, each on its own batch; they are part of what makes a run.
            On a GPU there is one, with a batch as large as theirs together.
        seed: of weights, scenes, captions and noise.
        stage: "vae", "judge", "base" or "turbo", which all need those before them but for the judge, or "all".
        device: "cpu", "cuda", "cuda:1" or "mps".
        recipe: everything else.

    Raises:
        ModelError: the stage is unknown or lacks what it needs, the device cannot be used, or the folder holds another
            run (seed, processes or batch size).
    """
    if stage not in (*STAGES, "all"):
        known = ", ".join(map(repr, STAGES))
        hint = did_you_mean(stage, [*STAGES, "all"])
        raise ModelError(f"No training stage {stage!r}; there are {known} and 'all'.{hint}")
    recipe, processes = recipe or Recipe(), whole_number("processes", processes)
    if device != "cpu":
        recipe, processes = replace(recipe, batch_size=recipe.batch_size * processes), 1
    run = Run(Path(folder), recipe, seed, processes, device)
    run.folder.mkdir(parents=True, exist_ok=True)
    wanted = {"vae": vae_samples, "judge": judge_samples, "base": samples, "turbo": turbo_samples}
    wanted = wanted if stage == "all" else {stage: wanted[stage]}
    _check(run, wanted)
    if processes == 1:
        _train(0, run, wanted, "")
    else:
        _train_together(run, wanted)
    if "turbo" in wanted:
        for name in ("tiny-base", "tiny-turbo"):
            checkpoints.export(run.folder, name, run.folder / name)
    return run.folder


def _check(run: Run, wanted: dict[str, int]) -> None:
    """Refuse, before any process starts, what could not begin or would not go on with what the folder holds."""
    try:
        torch.empty(0, device=run.device)
    except (RuntimeError, AssertionError) as cause:
        raise ModelError(f"Device {run.device!r} cannot be used ({cause}). Leave device out for the CPU.") from None
    if "vae" not in wanted:
        checkpoints.load_vae(run.folder / "vae")
    if list(wanted) == ["turbo"] and not (run.folder / checkpoints.FILES["base"]).exists():
        raise ModelError(f"There is no base in {run.folder} to start the turbo from. Train it first: stage='base'.")
    for stage in wanted:
        path = run.folder / checkpoints.FILES[stage]
        made = checkpoints.load(path).get("run", run.identity) if path.exists() else run.identity
        if made != run.identity:
            raise ModelError(f"{path} is of a run with {made}, not {run.identity}. Give the same, or another folder.")


def _train_together(run: Run, wanted: dict[str, int]) -> None:
    with tempfile.TemporaryDirectory() as meeting:
        context = spawn(_train, (run, wanted, f"file://{meeting}/processes"), run.processes, join=False)
        try:
            while not context.join():
                pass
        except BaseException:  # they would train on to the end, and this process would wait for them
            for process in context.processes:
                process.kill()
                process.join()
            raise


def _train(rank: int, run: Run, wanted: dict[str, int], meeting: str) -> None:
    if run.processes > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)
    train = {"vae": train_vae, "judge": train_judge, "base": train_base, "turbo": train_turbo}
    try:
        for stage, samples in wanted.items():
            if not (run.folder / stage).exists():  # the finished VAE or judge
                train[stage](replace(run, rank=rank, stage=STAGES.index(stage)), samples)
            if run.processes > 1:
                dist.barrier()  # the next stage starts from what the first process has just written
    finally:
        if run.processes > 1:
            dist.destroy_process_group()
