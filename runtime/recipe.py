"""The recipe: all that is needed to make an artifact again, as JSON inside it and as YAML beside it.

model: timm:vit_small_patch16_224
passes: [tome:r=13]
options: {restore: true}
plugins: {largest: largest-methods 0.3}
weights: {scorer.safetensors: 7d4e...}
versions: {tamis: 0.1.0, torch: 2.11.0}
source_hash: 3f6c...
weights_hash: 91d0...
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..error_text import brief
from ..errors import BadParameter, CorruptModel, ModelNotFound
from ..graph import TokenGraph
from ..parameters import path_text
from ..recipe_errors import PlainProgram, RecipeInvalid, WrongSourceModel
from ..weight_errors import WeightsChanged
from .embedded import read_extra, recipe_in_onnx
from .files import write_text

OPTIONS = ("target", "mode", "restore", "token_map", "allow_noop", "inline", "ort_contrib", "dense_below")
MAPPINGS = ("options", "plugins", "weights", "versions")
KEYS = ("passes", "model", *MAPPINGS, "source_hash", "weights_hash")


@dataclass(frozen=True)
class Recipe:
    """Passes and options as they were asked for, and what they were applied to.

    model         how the model was named (`timm:...`, a path); None for one handed over in Python
    passes        texts `name:key=value`
    options       those of OPTIONS that differ from the default
    plugins       where passes that are not tamis's own came from, by name; never loaded because a recipe says so
    weights       `core.weights.Weights.digest` of every file of trained tensors, by path
    versions      of tamis and torch at the time; information, not a condition
    source_hash   TokenGraph.source_hash of the model; "" accepts any graph
    weights_hash  `capture.identity.weights_hash` of the model; "" accepts any weights
    """

    passes: tuple[str, ...]
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source_hash: str = ""
    weights_hash: str = ""

    @staticmethod
    def given(recipe: Any) -> tuple[Recipe | None, str]:
        """A recipe as `tamis.compile` takes it (none, one, or the path of one), and what errors call it."""
        if isinstance(recipe, Recipe | None):
            return recipe, "recipe"
        if not isinstance(recipe, str | os.PathLike):
            rule, hint = "a Recipe or the path of one", "Recipe.from_dict makes one of plain data."
            raise BadParameter(where="compile", name="recipe", rule=rule, got=brief(recipe), hint=hint)
        return Recipe.read(recipe), os.fspath(recipe)

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

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a YAML file; raises OutputExists, OutputNotWritable."""
        write_text(Path(path), self.to_yaml(), overwrite)

    def for_any_model(self) -> Recipe:
        """This recipe without the hashes that tie it to one model."""
        return replace(self, source_hash="", weights_hash="")

    def check_source(self, graph: TokenGraph, path: str) -> None:
        """Raise WrongSourceModel when this recipe was made for another model."""
        from ..capture.identity import weights_hash

        if self.source_hash and self.source_hash != graph.source_hash:
            self._refuse("graph", self.source_hash, graph.source_hash, graph.name, path)
        if self.weights_hash and self.weights_hash != (got := weights_hash(graph.program)):
            self._refuse("weights", self.weights_hash, got, graph.name, path)

    def check_weights(self, found: Mapping[str, str], path: str) -> None:
        """Raise WeightsChanged when a file of trained tensors holds others than it did; `found`: digests by path."""
        for file, got in found.items():
            expected = self.weights.get(file, got)
            if expected != got:
                raise WeightsChanged(path=path, file=file, expected=_short(expected), got=_short(got))

    def _refuse(self, part: str, expected: str, got: str, name: str, path: str) -> None:
        model = f" ({self.model})" if self.model else ""
        then = ", ".join(f"{k} {v}" for k, v in self.versions.items() if versions().get(k) != v)
        made = f"; it was made with {then}, which may be why" if then else ""
        fields = {"expected": _short(expected), "got": _short(got), "name": name, "made": made}
        raise WrongSourceModel(path=path, model=model, part=part, **fields)

    @staticmethod
    def from_dict(data: Any, path: str) -> Recipe:
        """Read plain data; raises RecipeInvalid naming `path`."""
        if not isinstance(data, dict):
            raise RecipeInvalid(path=path, reason=f"it holds {_kind(data)}, not a mapping")
        _refuse_unknown(data, KEYS, path, "key")
        values = {key: data.get(key) or {} for key in MAPPINGS}
        for key, value in values.items():
            if not isinstance(value, dict):
                raise RecipeInvalid(path=path, reason=f"'{key}' is {_kind(value)}, not a mapping")
        _refuse_unknown(values["options"], OPTIONS, path, "option")
        return Recipe(
            passes=_pass_texts(data.get("passes"), path, may_be_none=bool(values["options"].get("allow_noop"))),
            model=data.get("model"),
            options=dict(values["options"]),
            plugins=_texts(values["plugins"]),
            weights=_texts(values["weights"]),
            versions=_texts(values["versions"]),
            source_hash=str(data.get("source_hash") or ""),
            weights_hash=str(data.get("weights_hash") or ""),
        )

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Recipe:
        """Read a YAML or JSON file, or the recipe inside an artifact: `.onnx`, `.pt2`, or a directory written by tamis.

        Raises:
            ModelNotFound: there is no such file.
            RecipeInvalid: it holds no recipe.
        """
        path = Path(path_text("Recipe.read", path))
        path = path / "recipe.yaml" if path.is_dir() else path
        if not path.is_file():
            hint = "give the path of a recipe.yaml, or of an .onnx or .pt2 file that tamis made."
            raise ModelNotFound(path=path, hint=hint)
        return Recipe.from_dict(_data_in(path), str(path))


def versions() -> dict[str, str]:
    """Versions of tamis and torch."""
    import torch

    from .. import __version__

    return {"tamis": __version__, "torch": str(torch.__version__)}


def _data_in(path: Path) -> Any:
    import yaml

    if path.suffix == ".onnx":
        return recipe_in_onnx(path)
    if path.suffix == ".pt2":
        try:
            return read_extra(path)["recipe"]
        except (CorruptModel, PlainProgram) as error:
            raise RecipeInvalid(path=path, reason="this .pt2 file was not made by tamis") from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeInvalid(path=path, reason=" ".join(str(error).split())) from error


def _pass_texts(passes: Any, path: str, *, may_be_none: bool) -> tuple[str, ...]:
    passes = [passes] if isinstance(passes, str) else passes
    if not isinstance(passes, list) or not (passes or may_be_none):
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


def _texts(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"


def _short(digest: str) -> str:
    return digest[:12] or "none"
