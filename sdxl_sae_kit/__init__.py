"""Sparse autoencoders on the block updates of SDXL's U-Net: collect, train, look, steer, judge."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_sae_kit.artifacts import Store as Store
    from sdxl_sae_kit.attended import AttentionSegmenter as AttentionSegmenter
    from sdxl_sae_kit.cache import ActivationCache as ActivationCache
    from sdxl_sae_kit.collection import collect as collect
    from sdxl_sae_kit.collection import repair as repair
    from sdxl_sae_kit.comparisons import compare as compare
    from sdxl_sae_kit.configs import SAEConfig as SAEConfig
    from sdxl_sae_kit.configs import Site as Site
    from sdxl_sae_kit.doctor import diagnose as diagnose
    from sdxl_sae_kit.edits import Edit as Edit
    from sdxl_sae_kit.edits import read_edits as read_edits
    from sdxl_sae_kit.edits import write_edits as write_edits
    from sdxl_sae_kit.errors import KitError as KitError
    from sdxl_sae_kit.evaluation import evaluate as evaluate
    from sdxl_sae_kit.evaluation import stability as stability
    from sdxl_sae_kit.explorer import explore as explore
    from sdxl_sae_kit.features import FeatureStats as FeatureStats
    from sdxl_sae_kit.galleries import gallery as gallery
    from sdxl_sae_kit.grounding import GroundedSegmenter as GroundedSegmenter
    from sdxl_sae_kit.hookpoints import DEFAULT_HOOKPOINTS as DEFAULT_HOOKPOINTS
    from sdxl_sae_kit.hookpoints import list_hookpoints as list_hookpoints
    from sdxl_sae_kit.hooks import record as record
    from sdxl_sae_kit.hooks import rewrite as rewrite
    from sdxl_sae_kit.html import show_images as show_images
    from sdxl_sae_kit.html import show_table as show_table
    from sdxl_sae_kit.icons import draw_icons as draw_icons
    from sdxl_sae_kit.interventions import replay as replay
    from sdxl_sae_kit.interventions import steer as steer
    from sdxl_sae_kit.items import Item as Item
    from sdxl_sae_kit.items import Items as Items
    from sdxl_sae_kit.items import load_items as load_items
    from sdxl_sae_kit.judges import EmbeddingJudge as EmbeddingJudge
    from sdxl_sae_kit.kinds import SAEKind as SAEKind
    from sdxl_sae_kit.label_tests import auto_label as auto_label
    from sdxl_sae_kit.label_tests import score_label as score_label
    from sdxl_sae_kit.label_tests import test_label as test_label
    from sdxl_sae_kit.labellers import EndpointLabeller as EndpointLabeller
    from sdxl_sae_kit.labellers import TransformersLabeller as TransformersLabeller
    from sdxl_sae_kit.labellers import WorldLabeller as WorldLabeller
    from sdxl_sae_kit.labels import LabelStore as LabelStore
    from sdxl_sae_kit.masks import Polygon as Polygon
    from sdxl_sae_kit.matching import match as match
    from sdxl_sae_kit.opened import open_artifact as open_artifact
    from sdxl_sae_kit.perceptual import Lpips as Lpips
    from sdxl_sae_kit.pipelines import generate as generate
    from sdxl_sae_kit.pipelines import load_pipeline as load_pipeline
    from sdxl_sae_kit.plans import plan as plan
    from sdxl_sae_kit.probes import probe as probe
    from sdxl_sae_kit.prompts import load_prompts as load_prompts
    from sdxl_sae_kit.reports import report as report
    from sdxl_sae_kit.sae import SAE as SAE
    from sdxl_sae_kit.scales import load_scale as load_scale
    from sdxl_sae_kit.search import by_contrast as by_contrast
    from sdxl_sae_kit.search import by_image as by_image
    from sdxl_sae_kit.search import by_label as by_label
    from sdxl_sae_kit.search import by_region as by_region
    from sdxl_sae_kit.search import by_similarity as by_similarity
    from sdxl_sae_kit.search import by_text as by_text
    from sdxl_sae_kit.search import most_energetic as most_energetic
    from sdxl_sae_kit.segmenters import GivenMasks as GivenMasks
    from sdxl_sae_kit.sheets import draw_sheet as draw_sheet
    from sdxl_sae_kit.similarity import ClipEmbed as ClipEmbed
    from sdxl_sae_kit.similarity import WorldEmbed as WorldEmbed
    from sdxl_sae_kit.similarity import specificity as specificity
    from sdxl_sae_kit.steering_panels import steering_panel as steering_panel
    from sdxl_sae_kit.streaming import stream as stream
    from sdxl_sae_kit.studies.ablation import ablate as ablate
    from sdxl_sae_kit.studies.attribution import attribute as attribute
    from sdxl_sae_kit.studies.benchmarked import RIEBench as RIEBench
    from sdxl_sae_kit.studies.block_ranking import rank_blocks as rank_blocks
    from sdxl_sae_kit.studies.causes import measure_causes as measure_causes
    from sdxl_sae_kit.studies.generalization import generalize as generalize
    from sdxl_sae_kit.studies.grids import forecast_riebench as forecast_riebench
    from sdxl_sae_kit.studies.riebench import riebench as riebench
    from sdxl_sae_kit.studies.selectivity import screen as screen
    from sdxl_sae_kit.studies.specialization import specialize as specialize
    from sdxl_sae_kit.studies.splicing import splice as splice
    from sdxl_sae_kit.studies.transfer import transfer_edits as transfer_edits
    from sdxl_sae_kit.targets import FactorScore as FactorScore
    from sdxl_sae_kit.targets import RegionColour as RegionColour
    from sdxl_sae_kit.tokens import Tokens as Tokens
    from sdxl_sae_kit.training import train as train

_NAMES = {
    "artifacts": ["Store"],
    "attended": ["AttentionSegmenter"],
    "cache": ["ActivationCache"],
    "collection": ["collect", "repair"],
    "comparisons": ["compare"],
    "configs": ["SAEConfig", "Site"],
    "doctor": ["diagnose"],
    "edits": ["Edit", "read_edits", "write_edits"],
    "errors": ["KitError"],
    "evaluation": ["evaluate", "stability"],
    "explorer": ["explore"],
    "features": ["FeatureStats"],
    "galleries": ["gallery"],
    "grounding": ["GroundedSegmenter"],
    "hookpoints": ["DEFAULT_HOOKPOINTS", "list_hookpoints"],
    "hooks": ["record", "rewrite"],
    "html": ["show_images", "show_table"],
    "icons": ["draw_icons"],
    "interventions": ["replay", "steer"],
    "items": ["Item", "Items", "load_items"],
    "judges": ["EmbeddingJudge"],
    "kinds": ["SAEKind"],
    "label_tests": ["auto_label", "score_label", "test_label"],
    "labellers": ["EndpointLabeller", "TransformersLabeller", "WorldLabeller"],
    "labels": ["LabelStore"],
    "masks": ["Polygon"],
    "matching": ["match"],
    "opened": ["open_artifact"],
    "perceptual": ["Lpips"],
    "pipelines": ["generate", "load_pipeline"],
    "plans": ["plan"],
    "probes": ["probe"],
    "prompts": ["load_prompts"],
    "reports": ["report"],
    "sae": ["SAE"],
    "scales": ["load_scale"],
    "search": ["by_contrast", "by_image", "by_label", "by_region", "by_similarity", "by_text", "most_energetic"],
    "segmenters": ["GivenMasks"],
    "sheets": ["draw_sheet"],
    "similarity": ["ClipEmbed", "WorldEmbed", "specificity"],
    "steering_panels": ["steering_panel"],
    "streaming": ["stream"],
    "studies.ablation": ["ablate"],
    "studies.attribution": ["attribute"],
    "studies.benchmarked": ["RIEBench"],
    "studies.block_ranking": ["rank_blocks"],
    "studies.causes": ["measure_causes"],
    "studies.generalization": ["generalize"],
    "studies.grids": ["forecast_riebench"],
    "studies.riebench": ["riebench"],
    "studies.selectivity": ["screen"],
    "studies.specialization": ["specialize"],
    "studies.splicing": ["splice"],
    "studies.transfer": ["transfer_edits"],
    "targets": ["FactorScore", "RegionColour"],
    "tokens": ["Tokens"],
    "training": ["train"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the kit is quick and silent."""
    if name == "__version__":
        return importlib.import_module("sdxl_sae_kit.artifacts").kit_version()
    if name not in _HOMES:
        hint = importlib.import_module("sdxl_sae_kit.errors").did_you_mean(name, _HOMES)
        raise AttributeError(f"module 'sdxl_sae_kit' has no attribute {name!r}.{hint}")
    return getattr(importlib.import_module(f"sdxl_sae_kit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
