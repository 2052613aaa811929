"""The recipe: all that is needed to make an artifact again, as JSON inside it and as YAML beside it.

model: timm:vit_small_patch16_224
passes: [tome:r=13]
options: {restore: true}
versions: {tamis: 0.1.0, torch: 2.11.0}
source_hash: 3f6c...
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelNotFound, RecipeInvalid, WrongSourceModel

OPTIONS = ("target", "mode", "restore", "token_map", "allow_noop", "inline")


@dataclass(frozen=True)
class Recipe:
    """Passes and options as they were asked for, and what they were applied to.

    model        how the model was named (`timm:...`, a path); None for one handed over in Python
    passes       texts `name:key=value`
    options      those of OPTIONS that differ from the default
    versions     of tamis and torch at the time; information, not a condition
    source_hash  TokenGraph.source_hash of the model; "" accepts any model
    """

    passes: tuple[str, ...]
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source_hash: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "passes": list(self.passes)}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def to_yaml(self) -> str:
        """YAML for people."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None))

    def check_source(self, source_hash: str, path: str) -> None:
        """Raise WrongSourceModel when this recipe was made for another model."""
        if self.source_hash and self.source_hash != source_hash:
            raise WrongSourceModel(path=path, expected=_short(self.source_hash), got=_short(source_hash))

    @staticmethod
    def from_dict(data: Any, path: str) -> Recipe:
        """Read plain data; raises RecipeInvalid naming `path`."""
        if not isinstance(data, dict):
            raise RecipeInvalid(path=path, reason=f"it holds {_kind(data)}, not a mapping")
        known = ("passes", "model", "options", "versions", "source_hash")
        _refuse_unknown(data, known, path, "key")
        options = data.get("options") or {}
        if not isinstance(options, dict):
            raise RecipeInvalid(path=path, reason=f"'options' is {_kind(options)}, not a mapping")
        _refuse_unknown(options, OPTIONS, path, "option")
        return Recipe(
            passes=_pass_texts(data.get("passes"), path),
            model=data.get("model"),
            options=dict(options),
            versions={str(k): str(v) for k, v in (data.get("versions") or {}).items()},
            source_hash=str(data.get("source_hash") or ""),
        )

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """Read a YAML or JSON file; raises ModelNotFound or RecipeInvalid."""
        import yaml

        path = Path(path)
        if not path.is_file():
            raise ModelNotFound(path=path, hint="give the path of a recipe.yaml.")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeInvalid(path=path, reason=" ".join(str(error).split())) from error
        return Recipe.from_dict(data, str(path))


def versions() -> dict[str, str]:
    """Versions of tamis and torch."""
    import torch

    from .. import __version__

    return {"tamis": __version__, "torch": str(torch.__version__)}


def _pass_texts(passes: Any, path: str) -> tuple[str, ...]:
    passes = [passes] if isinstance(passes, str) else passes
    if not isinstance(passes, list) or not passes:
        raise RecipeInvalid(path=path, reason="'passes' is missing or not a list")
    return tuple(_pass_text(one, path) for one in passes)


def _pass_text(one: Any, path: str) -> str:
    """`tome:r=13`, or `{tome: {r: 13}}` as YAML likes to have it."""
    if isinstance(one, str):
        return one
    if isinstance(one, dict) and len(one) == 1:
        name, parameters = next(iter(one.items()))
        if isinstance(parameters, dict | None):
            text = ",".join(f"{key}={value}" for key, value in (parameters or {}).items())
            return f"{name}:{text}" if text else str(name)
    raise RecipeInvalid(path=path, reason=f"a pass is {one!r}, not text such as tome:r=13")


def _refuse_unknown(data: dict[str, Any], known: tuple[str, ...], path: str, what: str) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise RecipeInvalid(path=path, reason=f"unknown {what} {key!r} ({advice})")


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


def _short(digest: str) -> str:
    return digest[:12] or "none"
