"""`optimize-model`: arguments, exit codes, error messages.  The work is in `command.py`, imported once it is needed.

Nothing here imports torch: `--help` and a wrong path answer at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import TamisError
from .options import MODES
from .usage import check_usage

DESCRIPTION = "Rewrite a transformer so that it computes on fewer tokens, check it, and write it down."
EPILOG = """\
INPUT is a .pt2 or .onnx file, timm:NAME, hf:DIRECTORY_OR_ID, or file.py:function.

examples:
  optimize-model timm:vit_small_patch16_224 --pass tome:r=13 -o vit-tome.onnx
  optimize-model hf:./minilm --pass tome:keep_ratio=0.9 --verify data.npz --max-drift 0.05 -o out/
  optimize-model model.onnx --pass tome:keep_ratio=0.9 -o smaller.onnx
  optimize-model hf:./smollm2 --calibrate prompts.npz --budget 0.25 -o prompt.onnx
  optimize-model model.pt2 --check
  optimize-model --config recipe.yaml

exit codes:
  0  done                   3  a pass changed nothing (nothing is written)
  1  failed                 4  the drift is over --max-drift (nothing is written)
  2  wrong usage or input,  5  --bench found it slower than the original (the result is kept)
     or a model that has no tokens to reduce
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}.\n  hint: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    p = _Parser(
        "optimize-model",
        None,
        DESCRIPTION,
        EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("input", nargs="?", metavar="INPUT", help="the model")
    p.add_argument("-m", "--model", metavar="INPUT", help="the model, too")
    p.add_argument(
        "-o", "--output", metavar="PATH", help=".onnx, .pt2, or a directory (out/); default {stem}-tamis.onnx"
    )
    p.add_argument(
        "--pass", dest="passes", action="append", metavar="NAME:ARGS", help="a pass; repeat it to chain passes"
    )
    p.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="replay a recipe: recipe.yaml, or an .onnx or .pt2 file that tamis made; options given here win",
    )
    p.add_argument("--allow-other-model", action="store_true", help="replay a recipe on a model it was not made for")
    p.add_argument(
        "--plugin", action="append", metavar="FILE.py", help="run a Python file that registers passes; may be repeated"
    )
    p.add_argument("--overwrite", action="store_true", help="replace existing files")
    p.add_argument("--version", action="version", version=f"optimize-model {__version__}")
    _add_search(p.add_argument_group("a pattern for every head of a decoder"))
    _add_questions(p.add_argument_group("questions, which write nothing"))
    _add_result(p.add_argument_group("the result"))
    _add_proof(p.add_argument_group("proof"))
    _add_talk(p.add_argument_group("talk"))
    return p


def _add_questions(group: Any) -> None:
    group.add_argument("--check", action="store_true", help="what is in the model, and where each pass would apply")
    group.add_argument(
        "--list-passes", action="store_true", help="all passes, their parameters and where they come from"
    )
    group.add_argument("--show-recipe", metavar="FILE", help="the recipe in an .onnx or .pt2 file, as YAML")


def _add_search(group: Any) -> None:
    group.add_argument(
        "--calibrate", metavar="DATA", help="find sparse patterns on the prompts in a .npz; passes given are the choice"
    )
    group.add_argument("--budget", type=_fraction, metavar="X", help="cost of a head, of dense (default 0.25)")
    group.add_argument("--min-recall", type=_fraction, metavar="X", help="heads below stay dense (default 0.9)")


def _add_result(group: Any) -> None:
    # None tells an option that was not given from one that was: those given win over the recipe's.
    group.add_argument("--target", help="auto, cpu, cuda, cuda:sm_90, rocm:gfx942 (default auto)")
    group.add_argument("--mode", choices=MODES, help="run through Inductor; the default is eager")
    group.add_argument("--inline", action="store_true", default=None, help="ONNX without functions")
    group.add_argument(
        "--ort-contrib",
        action="store_true",
        default=None,
        help="ONNX with ONNX Runtime's own operators for causal and sparse attention: faster, runs nowhere else",
    )
    group.add_argument(
        "--native", action="store_true", help="a .pt2 of native code (AOTInductor), which runs without tamis"
    )
    group.add_argument(
        "--no-restore",
        dest="restore",
        action="store_false",
        default=None,
        help="leave token outputs at the reduced length",
    )
    group.add_argument("--token-map", action="store_true", default=None, help="also output where every token went")
    group.add_argument(
        "--dense-below",
        type=_below,
        metavar="N",
        help="fewer tokens run the original, in Python; auto: measured",
    )
    group.add_argument("--allow-noop", action="store_true", default=None, help="accept passes that change nothing")


def _add_proof(group: Any) -> None:
    group.add_argument(
        "--verify", metavar="DATA", help="compare with the original on a .npz (an array per input) or .npy"
    )
    group.add_argument(
        "--max-drift", type=_budget, metavar="X", help="largest relative L2 difference of any output row (exit 4 above)"
    )
    group.add_argument("--bench", action="store_true", help="time it against the original (exit 5 when slower)")
    group.add_argument("--report", metavar="FILE.json", help="write the report")
    group.add_argument(
        "--draw",
        metavar="FILE.png",
        help="draw where the tokens of an image went: the first of --verify, or the example",
    )


def _add_talk(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log what happens (-vv: more)")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no closing line")
    group.add_argument("--debug", action="store_true", help="tracebacks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    start = time.monotonic()
    try:
        options = parser().parse_args(_dashed(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    error: BaseException | None = None
    try:
        check_usage(options)
        code = _run(options)
    except TamisError as caught:
        error, code = caught, caught.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 1
    except Exception as caught:
        error, code = caught, 1
    if error is not None:
        _complain(error, options.debug)
    if not options.quiet:
        word = "PASSED" if code == 0 else "FAILED"
        print(
            f"{word} | runtime {time.monotonic() - start:.1f} s | {shlex.join(['optimize-model', *argv])}",
            file=sys.stderr,
        )
    return code


def _run(options: argparse.Namespace) -> int:
    """Everything that can be refused without torch is refused here."""
    from .request import Request, check_plugins

    if options.show_recipe:
        return _show_recipe(options)
    if options.list_passes:
        plugins = [Path(one) for one in options.plugin or ()]
        check_plugins(plugins)
        from .command import show_passes

        return show_passes(plugins, options.json)
    request = Request.of(options)
    request.check_paths()
    from .command import run

    return run(request)


def _show_recipe(options: argparse.Namespace) -> int:
    from .recipe import Recipe

    recipe = Recipe.read(options.show_recipe)
    print(recipe.to_json() if options.json else recipe.to_yaml().rstrip())
    return 0


def _complain(error: BaseException, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    text = str(error) if isinstance(error, TamisError) else f"{type(error).__name__}: {error}"
    notes = [f"  {note}" for note in getattr(error, "__notes__", [])]
    if not isinstance(error, TamisError):
        notes.append("  hint: this is a bug in tamis or its environment; --debug shows the traceback.")
    print("\n".join([f"error: {text}", *notes]), file=sys.stderr)


def _dashed(argv: list[str]) -> list[str]:
    """`--max_drift=0.1` -> `--max-drift=0.1`: underscores in option names are as good as dashes."""

    def dash(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    end = argv.index("--") if "--" in argv else len(argv)
    return [*map(dash, argv[:end]), *argv[end:]]


def _below(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of tokens or auto, got {text}")
    return text if text == "auto" else int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def _budget(text: str) -> float:
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
