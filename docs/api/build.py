"""Write the API reference, made from docstrings, as pages that load nothing from anywhere.

    python docs/api/build.py build/api

The first page has the public names, those of `sdxl_sae_kit` itself; behind it are the modules of what they return and
of what `docs/extending/` builds on. The other modules are the kit's own business.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc
import pdoc.doc
import pdoc.doc_types
import pdoc.render

import sdxl_sae_kit as kit

RESULTS = ("activations", "cards", "hooks", "plans", "prompts", "trained", "studies.attributed",
           "studies.block_ranking", "studies.carryover", "studies.causes", "studies.generalized", "studies.grids",
           "studies.results", "studies.selected", "studies.specialized", "studies.splicing", "studies.transferred",
           )  # fmt: skip
INTERFACES = ("artifacts", "configs", "errors", "evaluation", "formats", "html", "judges", "kinds", "labellers",
              "metrics", "plots", "scales", "segmenters", "similarity", "sparse", "studies.distances",
              "studies.lines", "studies.statistics")  # fmt: skip
MODULES = [f"{kit.__name__}.{name}" for name in sorted({*RESULTS, *INTERFACES})]


class Written(str):
    """An annotation as the source has it: aliases of numpy's and jaxtyping's unfold into lines nobody reads."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def as_written(annotation: Any, *_: Any) -> Any:
    """What pdoc is to show of an annotation, instead of what it evaluates to."""
    return Written(annotation) if isinstance(annotation, str) else annotation


def build(folder: Path) -> None:
    """Write the pages.

    Raises:
        Warning: something that pdoc could not resolve or read.
    """
    pdoc.doc.safe_eval_type = pdoc.doc_types.safe_eval_type = as_written  # it has no setting for this
    vars(kit).update({name: getattr(kit, name) for name in kit.__all__})  # pdoc asks no module-level __getattr__
    pdoc.render.configure(
        docformat="google",
        template_directory=Path(__file__).parent,
        footer_text=f"sdxl_sae_kit {kit.__version__}",
        show_source=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        pdoc.pdoc(kit.__name__, rf"!{kit.__name__}\..+", *MODULES, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    sys.stdout.write(f"{Path(sys.argv[1]) / 'index.html'}\n")
