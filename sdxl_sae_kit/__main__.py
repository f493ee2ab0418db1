"""The command line: `sdxl-sae-kit report`, `riebench`, `artifacts list|verify` and `tiny train|measure`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_sae_kit.artifacts import Store

from sdxl_sae_kit.errors import ArtifactError, KitError

# Every command imports what it needs when it runs, so that --help does not wait for torch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 1 after a mistake and 130 after Ctrl-C, which one line explains."""
    options = _parser().parse_args(arguments)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        options.command(options)
    except KitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what was made is kept, run it again to go on.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdxl-sae-kit", description="Sparse autoencoders on the block updates of SDXL's U-Net."
    )
    parser.add_argument("--version", action="version", version=version("sdxl-sae-kit"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report", help="run the notebooks and merge them into one offline HTML file; prints its path"
    )
    report.add_argument(
        "notebooks", nargs="*", type=Path, help="a folder, or files in order (default: notebooks/ of the checkout)"
    )
    report.add_argument(
        "--scale", default="demo", help="what the notebooks call SCALE: smoke or demo (default: %(default)s)"
    )
    report.add_argument("--model", default="tiny-turbo", help="what the notebooks call MODEL (default: %(default)s)")
    report.add_argument("--out", type=Path, help="the HTML file to write (default: a new artifact in the store)")
    _add_store(report)
    report.set_defaults(command=_report)

    _add_riebench(commands)

    artifacts = commands.add_parser("artifacts", help="what the store holds").add_subparsers(
        required=True, metavar="COMMAND"
    )
    for name, run, text in (
        ("list", _list, "every artifact, finished or not"),
        ("verify", _verify, "hash every finished artifact again"),
    ):
        command = artifacts.add_parser(name, help=text)
        _add_store(command)
        command.set_defaults(command=run)

    tiny = commands.add_parser("tiny", help="the embedded model").add_subparsers(required=True, metavar="COMMAND")
    train = tiny.add_parser(
        "train", help="train it again, going on from what the folder holds", argument_default=argparse.SUPPRESS
    )
    train.add_argument("folder", type=Path, help="where checkpoints, log and sample grids go")
    train.add_argument("--samples", type=int, help="pictures that the base sees in all")
    train.add_argument("--turbo-samples", type=int, help="pictures that the turbo sees in all")
    train.add_argument("--vae-samples", type=int, help="pictures that the VAE sees in all")
    train.add_argument("--judge-samples", type=int, help="pictures that the judge sees in all")
    train.add_argument("--processes", type=int, help="how many train side by side")
    train.add_argument("--device", help="cpu, cuda, cuda:1 or mps")
    train.add_argument("--seed", type=int, help="of weights, scenes, captions and noise")
    train.add_argument("--stage", choices=("all", "vae", "judge", "base", "turbo"))
    train.set_defaults(command=_train)
    measure = tiny.add_parser(
        "measure", help="how often it draws what it is told, how good the judge is, how rich updates are"
    )
    measure.add_argument(
        "--captions", type=int, default=1000, help="how many captions and seeds (default: %(default)s)"
    )
    measure.add_argument("--run", type=Path, help="a folder that `tiny train` made (default: what is in the package)")
    measure.set_defaults(command=_measure)
    return parser


def _add_riebench(commands: Any) -> None:
    text = "edit pictures while they are drawn, by every method on the same items, and measure what comes out"
    about = (
        f"{text[0].upper()}{text[1:]}. Updates are collected and SAEs trained as in notebook 07, unless the store "
        "has them; what cannot be done is refused before. Interrupted, it goes on when run again with the same "
        "settings."
    )
    bench = commands.add_parser("riebench", help=text, description=about)
    bench.add_argument("--model", default="tiny-turbo", help="as load_pipeline takes it (default: %(default)s)")
    bench.add_argument(
        "--scale", default="demo", help="how much SAEs are trained: smoke or demo (default: %(default)s)"
    )
    bench.add_argument(
        "--items", help="world, natural, or the published JSON file (default: world for tiny models, else natural)"
    )
    bench.add_argument(
        "-n", type=int, metavar="PER_KIND", help="items of each kind (default: 20 of world, else all there are)"
    )
    bench.add_argument("--saes", metavar="NAME", help="which of the scale's SAEs, such as k10 (default: the second)")
    bench.add_argument(
        "--methods",
        type=_words,
        help="of sae, sae_adaptive, steering, neurons, random, by commas (default: all); prompt and none always are",
    )
    bench.add_argument(
        "--hookpoints", type=_words, metavar="BLOCKS",
        help="blocks whose features are moved, by commas (default: down.2.1,up.0.2,up.1.0,up.1.1, which decide most, "
        "for tiny models, else the four of the paper)",
    )  # fmt: skip
    bench.add_argument(
        "--num-inference-steps", type=int, metavar="STEPS",
        help="of every picture (default: 4, or as a model that is meant to be guided draws)",
    )  # fmt: skip
    bench.add_argument(
        "--guidance-scale", type=float, metavar="SCALE", help="of every picture (default: 0, or as such a model draws)"
    )
    bench.add_argument("--seed", type=int, default=0, help="of items and random features (default: %(default)s)")
    bench.add_argument("--batch-size", type=int, default=20, help="items drawn at once (default: %(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    bench.add_argument("--plan", action="store_true", help="only say what it costs; draws a few pictures to time them")
    _add_store(bench)
    bench.set_defaults(command=_riebench)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("name at least one, several by commas")
    return words


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", type=Path, help="folder of artifacts (default: $SDXL_SAE_KIT_STORE, else artifacts/ of the checkout)"
    )


def _report(options: argparse.Namespace) -> None:
    from sdxl_sae_kit.reports import report

    given = options.notebooks
    notebooks = given[0] if len(given) == 1 else given or None
    print(report(notebooks, scale=options.scale, model=options.model, out=options.out, store=options.store))


def _riebench(options: argparse.Namespace) -> None:
    from sdxl_sae_kit.artifacts import counted, whole_number
    from sdxl_sae_kit.attended import few_steps
    from sdxl_sae_kit.files import writable
    from sdxl_sae_kit.hookpoints import resolve
    from sdxl_sae_kit.items import load_items
    from sdxl_sae_kit.pipelines import load_pipeline
    from sdxl_sae_kit.studies.grids import forecast_riebench
    from sdxl_sae_kit.studies.riebench import riebench
    from sdxl_sae_kit.studies.transport import METHODS
    from sdxl_sae_kit.tiny import NAMES
    from sdxl_sae_kit.usual_saes import UsualSAEs

    # All that may be refused comes first: collecting and training can take hours.
    source = options.items or ("world" if options.model in NAMES else "natural")
    items = load_items(source, 20 if options.n is None and source == "world" else options.n, seed=options.seed)
    size = whole_number("--batch-size", options.batch_size)
    saes = UsualSAEs(options.model, options.scale, options.saes, options.store)
    if options.json:
        writable("benchmark", options.json)
    pipe = load_pipeline(options.model)
    named = (resolve(pipe.unet, name).name for name in options.hookpoints or saes.hookpoints)
    hookpoints, methods = list(dict.fromkeys(named)), options.methods or METHODS
    draws = few_steps(pipe, options.num_inference_steps, options.guidance_scale)
    forecast = forecast_riebench(
        len(items), methods, hookpoints=hookpoints, num_inference_steps=draws["num_inference_steps"]
    )
    finders = _finders(options.model)
    if options.plan:
        _tell_plan(pipe, items[:size], draws, forecast)
        print(saes.forecast(pipe, hookpoints))
        return
    result = riebench(
        pipe, saes.make(pipe, hookpoints), items, methods=methods, **finders, **draws, seed=options.seed,
        batch_size=size, store=options.store,
    )  # fmt: skip
    _tell_bench(result)
    if options.json:
        result.write_json(options.json)
    print(f"\n{result.artifact.folder}")
    if not result.n:
        raise KitError(
            f"Nothing could be scored: {counted(len(result.failed), 'items')} failed; the reasons are above."
        )


def _tell_plan(pipe: Any, some: Any, draws: dict[str, Any], forecast: Any) -> None:
    from dataclasses import replace

    from sdxl_sae_kit.studies.riebench import time_drawing

    seconds = time_drawing(pipe, some, **draws)
    print(replace(forecast, seconds=forecast.n_pictures * seconds))
    print("The time is that of drawing on this machine; edits and the judge come on top.")


def _tell_bench(result: Any) -> None:
    from sdxl_sae_kit.artifacts import counted
    from sdxl_sae_kit.studies.distances import written

    if result.n:
        rows = [
            {name: "–" if row[name] is None else row[name] for name in ("method", "k", "strength")}
            | {measure: written(row, measure) for measure in result.scores.measures}
            for row in result.rows()
        ]
        print(f"Means over {counted(result.n, 'items')}, with 95 % intervals\n{_table(rows)}\n\n{result.sentence()}")
    if result.failed:
        print(f"\nFailed items\n{_table(result.failed)}")


def _finders(model: str) -> dict[str, Any]:
    """What finds masks and judges pictures of a real model; the tiny ones have their own."""
    from sdxl_sae_kit.grounding import GroundedSegmenter
    from sdxl_sae_kit.judges import EmbeddingJudge
    from sdxl_sae_kit.perceptual import Lpips
    from sdxl_sae_kit.similarity import ClipEmbed
    from sdxl_sae_kit.tiny import NAMES

    if model in NAMES:
        return {}
    return {
        "segmenter": GroundedSegmenter(),
        "judge": EmbeddingJudge(ClipEmbed("openai/clip-vit-large-patch14"), Lpips()),
    }


def _list(options: argparse.Namespace) -> None:
    print(_existing(options.store))


def _existing(folder: Path | None) -> Store:
    from sdxl_sae_kit.artifacts import Store

    store = Store.at(folder)
    if folder is not None and not store.root.is_dir():
        raise ArtifactError(f"There is no folder {store.root}. Give the path of a store, or leave --store out.")
    return store


def _verify(options: argparse.Namespace) -> None:
    from sdxl_sae_kit.artifacts import Artifact
    from sdxl_sae_kit.cache import verify as verify_cache

    store, faulty = _existing(options.store), 0
    finished = [artifact for artifact in store.artifacts() if artifact.finished]
    for artifact in finished:
        try:
            (verify_cache if artifact.kind == "activations" else Artifact.verify)(artifact)
            print(f"intact  {artifact.kind}/{artifact.name}")
        except ArtifactError as error:
            faulty += 1
            print(f"FAULTY  {artifact.kind}/{artifact.name}: {error}")
    if not faulty:
        print(f"{len(finished)} of {len(finished)} finished artifacts in {store.root} are intact.")
    else:
        raise ArtifactError(f"{faulty} of {len(finished)} finished artifacts in {store.root} are not what they were.")


def _train(options: argparse.Namespace) -> None:
    from sdxl_sae_kit.tiny.train import train

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "folder")}
    print(train(options.folder, **settings))


def _measure(options: argparse.Namespace) -> None:
    from sdxl_sae_kit.artifacts import whole_number
    from sdxl_sae_kit.pipelines import load_pipeline
    from sdxl_sae_kit.tiny import WEIGHTS
    from sdxl_sae_kit.tiny.judge import load_judge
    from sdxl_sae_kit.yardstick import measure_adherence, measure_judge, measure_richness, measure_vae

    folder = options.run or WEIGHTS
    turbo, base = (load_pipeline(folder / name) for name in ("tiny-turbo", "tiny-base"))
    judge = load_judge(folder / "judge")
    settings = {
        "turbo, 1 step": (turbo, 1, 0.0),
        "turbo, 4 steps": (turbo, 4, 0.0),
        "base, 20 steps, guidance 3": (base, 20, 3.0),
    }
    whole_number("--captions", options.captions, least=8)
    print(f"Drawing {5 * options.captions:,} pictures, {options.captions:,} of them in 20 steps.", file=sys.stderr)
    print(f"Share of {options.captions:,} pictures that show what their caption says, as the judge sees it.")
    print("Control: commonest, the share of the commonest value, which a model that reads no captions could reach.")
    for name, (pipe, steps, guidance) in settings.items():
        rows = measure_adherence(
            pipe, options.captions, num_inference_steps=steps, guidance_scale=guidance, judge=judge
        )
        print(f"\n{name}\n{_table(rows)}")
    print(f"\nThe judge on renders\n{_table(measure_judge(turbo.vae, options.captions, judge))}")
    print(f"\nThe VAE on renders\n{_table([measure_vae(turbo.vae, options.captions)])}")
    print(f"\nUpdates of turbo at one step\n{_table(measure_richness(turbo, options.captions))}")


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    texts = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in texts)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "[{}]".format(", ".join(map(_text, value)))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
