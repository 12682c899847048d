"""The argument parser of all verbs. Every refusal is a SetupError of one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from planner.cli import (
    catalogs,
    compare,
    estimate,
    export,
    fit,
    measure,
    methods,
    params,
    records,
    simulate,
    sweep,
)
from planner.cli.reply import Reply
from planner.errors import SetupError, nearest
from planner.losses import NOT_COVERED
from planner.version import __version__

__all__ = ["VERBS", "Parser", "Verb", "program"]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command: its help, the flags it adds, and the function from arguments to a reply."""

    help: str
    flags: Callable[[argparse.ArgumentParser], None]
    answer: Callable[[argparse.Namespace], Reply]


VERBS: dict[str, Verb] = {
    "estimate": Verb(help=estimate.HELP, flags=estimate.flags, answer=estimate.answer),
    "simulate": Verb(help=simulate.HELP, flags=simulate.flags, answer=simulate.answer),
    "measure": Verb(help=measure.HELP, flags=measure.flags, answer=measure.answer),
    "sweep": Verb(help=sweep.HELP, flags=sweep.flags, answer=sweep.answer),
    "records": Verb(help=records.HELP, flags=records.flags, answer=records.answer),
    "params": Verb(help=params.HELP, flags=params.flags, answer=params.answer),
    "compare": Verb(help=compare.HELP, flags=compare.flags, answer=compare.answer),
    "methods": Verb(help=methods.HELP, flags=methods.flags, answer=methods.answer),
    "fit": Verb(help=fit.HELP, flags=fit.flags, answer=fit.answer),
    "export": Verb(help=export.HELP, flags=export.flags, answer=export.answer),
    "models": Verb(help=catalogs.MODELS_HELP, flags=catalogs.models_flags, answer=catalogs.models),
    "gpus": Verb(help=catalogs.GPUS_HELP, flags=catalogs.gpus_flags, answer=catalogs.gpus),
}

_NEEDS_VALUE = re.compile(r"argument (\S+): expected one argument")
_NEGATIVE = re.compile(r"-[0-9.]")
_TAKES_NONE = re.compile(r"argument (\S+): ignored explicit argument (.+)")


class Parser(argparse.ArgumentParser):
    """argparse with flags spelled in full, and SetupError instead of a usage text and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found as one sentence."""
        if found := _NEEDS_VALUE.match(message):
            raise SetupError(f"{found[1]} needs a value; see {self.prog} --help.")
        if found := _TAKES_NONE.match(message):
            raise SetupError(f"{found[1]} takes no value, got {found[2]}; leave the value out.")
        raise SetupError(f"{message}; see {self.prog} --help.")

    def flag_names(self) -> tuple[str, ...]:
        """Every flag of this parser, as typed: `--seq-len`."""
        names = (name for action in self._actions for name in action.option_strings)
        return tuple(name for name in names if name.startswith("--"))


class _Program(Parser):
    """The parser of all verbs; names the nearest verb or flag for what it does not know."""

    verbs: dict[str, Parser]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parsed arguments, or SetupError."""
        given = _joined(args or ())
        name = next((word for word in given if word not in self._option_string_actions), None)
        if name is not None and name.startswith("-") and self._is_of_a_verb(name):
            raise SetupError(f"no verb is given before {name}; write one of {', '.join(self.verbs)} first.")
        if name is not None and not name.startswith("-") and name not in self.verbs:
            raise SetupError(f"unknown verb {name!r}; {nearest(name, self.verbs)}")
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            asked = unknown[0].partition("=")[0].removeprefix("--").replace("-", "_")
            raise SetupError(NOT_COVERED.get(asked) or self._unknown(unknown[0], name))
        if name is None:
            raise SetupError(f"no verb is given; write one of {', '.join(self.verbs)}, or --help.")
        parsed.json = getattr(parsed, "json", False)
        return parsed

    def _is_of_a_verb(self, word: str) -> bool:
        return any(word.partition("=")[0] in verb.flag_names() for verb in self.verbs.values())

    def _unknown(self, word: str, verb: str | None) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"unexpected word {word!r}; a value follows its flag, and a list has no spaces."
        known = self.verbs[verb].flag_names() if verb in self.verbs else self.flag_names()
        longer = [name for name in known if name.startswith(flag)] if flag.strip("-") else []
        near = f"did you mean {', '.join(longer)}?" if longer else nearest(flag, known)
        return f"unknown flag {flag!r}; {near}"


def _joined(words: Sequence[str]) -> list[str]:
    """`--seq-len -5` as `--seq-len=-5`: no flag starts with a digit, so a negative number is a value."""
    joined: list[str] = []
    for word in words:
        if _NEGATIVE.match(word) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def program() -> Parser:
    """The whole command line: every verb with its flags."""
    parser = _Program(
        prog="planner",
        description="Whether a fine-tuning run fits a GPU, and where its memory goes, before it is started.",
        epilog="planner VERB --help lists the flags of a verb.",
    )
    version = f"planner {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    _add_debug(parser)
    choices = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser)
    parser.verbs = {}
    for name, verb in VERBS.items():
        own = choices.add_parser(name, help=verb.help, description=verb.help)
        verb.flags(own)
        own.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        _add_debug(own)
        own.set_defaults(answer=verb.answer)
        parser.verbs[name] = own
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="print a traceback where something fails")
