"""The command line: `absgd-fast COMMAND`, or `python -m absgd_fast COMMAND`. commands/ has one file for each command.

Exit codes: 0 = done, 1 = it failed while running or was interrupted, 2 = bad arguments, or something must be installed
first. A bad argument is reported in one line on stderr before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from absgd_fast import __version__
from absgd_fast.commands import audit, bench, doctor, report, train, tune
from absgd_fast.commands.common import PROGRAM, Parser, Refused, fail

if TYPE_CHECKING:
    from absgd_fast.commands.common import Subparsers

# name: the function that adds its parser, in the order of --help
COMMANDS: dict[str, Callable[[Subparsers], None]] = {
    "doctor": doctor.add_parser,
    "train": train.add_parser,
    "tune": tune.add_parser,
    "audit": audit.add_parser,
    "report": report.add_parser,
    "bench": bench.add_parser,
}


def main(argv: Iterable[object] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name. None takes them from sys.argv.

    Returns:
        The exit code: 0 = done, 1 = failed while running, 2 = bad arguments.

    Example:
        >>> from absgd_fast.__main__ import main
        >>> main(["train", "--lam", "0", "--methods", "sgd,absgd"])
        2
    """
    given = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        # the benchmarks parse everything after `bench` themselves
        if given[:1] == ["bench"]:
            return bench.run(given[1:])
        arguments = _parser().parse_args(_join_numbers(given))
        return arguments.run(arguments, given)
    except Refused as refusal:
        return fail(2, refusal)
    except KeyboardInterrupt:
        return fail(1, "interrupted")
    except OSError as error:
        return fail(1, error)
    except SystemExit as leaving:  # --help, or the benchmarks' own options
        return fail(1, leaving) if isinstance(leaving.code, str) else leaving.code or 0


def _parser() -> Parser:
    parser = Parser(PROGRAM, description="Checks, tries and measures Attentional-Biased SGD for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"absgd_fast {__version__}")
    commands = parser.add_subparsers(metavar=" | ".join(COMMANDS), required=True, parser_class=Parser)
    for add_parser in COMMANDS.values():
        add_parser(commands)
    return parser


def _join_numbers(argv: Sequence[str]) -> list[str]:
    """["--lam", "-1e-1"] → ["--lam=-1e-1"], because argparse takes numbers such as -1e-1 and -inf for options."""
    joined: list[str] = []
    for argument in argv:
        try:
            negative = argument.startswith("-") and float(argument) is not None
        except ValueError:
            negative = False
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


if __name__ == "__main__":
    sys.exit(main())
