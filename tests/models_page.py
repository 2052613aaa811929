"""The generated parts of docs/models.md: `python tests/models_page.py` writes them, a test holds them current."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from decoders import DECODERS, Decoder
from family import Family
from zoo import FAMILIES
from zoo_speech import ALIKE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def render(page: str) -> str:
    """The page with the text between its markers made anew."""
    parts = {
        "encoders": table(
            ("model", "library", "dynamic", "protected", "not for"), map(encoder, (*FAMILIES.values(), *ALIKE))
        ),
        "decoders": table(("model", "key-value heads", "local layers", "soft cap"), map(decoder, DECODERS.values())),
    }
    for name, text in parts.items():
        block = f"<!-- {name}: generated -->\n\n{text}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name}: generated -->.*?<!-- end -->", lambda _, b=block: b, page, flags=re.DOTALL)
    return page


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; rows that say the same stand once."""
    lines = ["| " + " | ".join(cells) + " |" for cells in dict.fromkeys(rows)]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def encoder(family: Family) -> tuple[str, ...]:
    """model, library, dynamic, protected, not for."""
    model = family.shared()
    known = getattr(model, "pretrained_cfg", None)  # timm's
    shown = next(model.children()) if type(model).__module__.startswith("zoo") else model  # a test's wrapper
    name, library = (known["architecture"], "timm") if known else (type(shown).__name__, "transformers")
    dynamic = ", ".join(family.dynamic) + (", padding" if family.padded else "")
    methods = sorted({text.partition(":")[0] for text in family.without})
    return f"`{name}`", library, dynamic, str(family.prefix), ", ".join(f"`{method}`" for method in methods)


def decoder(one: Decoder) -> tuple[str, ...]:
    """model, key-value heads (of 4), local layers, soft cap."""
    local = sum(window is not None for window in one.windows)
    heads, cap = f"{one.kv_heads} of 4", "yes" if one.softcap else ""
    return one.name, heads, f"{local} of {len(one.windows)}" if local else "", cap


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
