"""Every error the kit raises on purpose is a whole sentence; a short one at least names what was found."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sdxl_sae_kit"
KINDS = {"KitError", "HookpointError", "ModelError", "ArtifactError", "PromptError", "EditError"}


def raised():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in KINDS:
                yield pytest.param(call.args[0], id=f"{path.relative_to(PACKAGE)}:{node.lineno}")


def spoken(message):
    """The message with … for what it names at run time."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


@pytest.mark.parametrize("message", list(raised()))
def test_a_message_is_a_sentence_that_says_enough(message):
    text = spoken(message)
    assert len(text) >= (40 if "…" not in text else 18), text
    assert text.rstrip().endswith((".", "?", "…")), text


def test_there_are_errors_to_look_at():
    assert len(list(raised())) > 40
