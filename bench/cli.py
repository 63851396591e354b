"""The command line of `python -m bench`; a further command is one more module with `add_parser`."""

import argparse
from collections.abc import Sequence

from bench.decode import command as decode
from bench.distributed import command as distributed
from bench.learn import command as learn
from bench.learn import orders, suite
from bench.model import command as model
from bench.speed import command as speed


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and run; `sys.argv` where no arguments are given."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Experiments and benchmarks around flexnsa.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (learn, suite, orders, speed, model, decode, distributed):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        parser.error(str(error))
