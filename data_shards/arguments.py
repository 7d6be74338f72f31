"""Parse `key=value` command lines: one table of options gives parser, help and error report.

(Not argparse: it stops at the first mistake, accepts a key given twice, and would still need
`key=value` split for it; nothing became shorter.) `--key=value` and `--key value` work as well. All
problems of a command line are reported together, on stderr, with exit code 2, before anything
starts.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_shards.redact import clean_output
from data_shards.schema import DataError, plain

WIDTH, INDENT = 100, 24  # of the help
# exit codes when the standard output is closed, as by SIGPIPE, and when it cannot be written
CLOSED, NO_STORAGE = 128 + 13, 74
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # NO_STORAGE too


@dataclass(frozen=True)
class Option:
    """Describe one option.

    convert: turns the text into a value and raises ValueError with the violated rule. default: its
    value if not given; a `required` option has none.
    """

    convert: Callable[[str], Any]
    help: str
    default: Any = None
    required: bool = False


class Ended(KeyboardInterrupt):
    """Report a signal that asks the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Ended` in the main thread, unless they are ignored (nohup)."""

    def end(number: int, _: object) -> None:
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)


def whole(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.lstrip("-").isdigit() or not minimum <= int(text) <= maximum:
            raise ValueError(f"a whole number from {minimum} to {maximum}")
        return int(text)

    return convert


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        rule = f"a number from {minimum:g} to {maximum:g}"
        try:
            value = float(text)
        except ValueError:
            raise ValueError(rule) from None
        if not math.isfinite(value) or not minimum <= value <= maximum:
            raise ValueError(rule)
        return value

    return convert


def picture_size(text: str) -> tuple[int, int]:
    """Convert 512x1024 to (height, width)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and 1 <= min(int(height), int(width)) <= 16384):
        raise ValueError("height x width in pixels, 1 to 16384 each: 512x1024")
    return int(height), int(width)


def choice(*names: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return convert


def text(value: str) -> str:
    if not value:
        raise ValueError("some text")
    return value


def path(value: str) -> str:
    """Convert a file, folder, URL or hub name; a leading `~` is expanded, which no shell does
    behind a `=`."""
    expanded = os.path.expanduser(text(value))
    if expanded.startswith("~"):
        raise ValueError("a path; ~ is a home folder, ~name that of a user here, and ./~ a name")
    return expanded


def paths(value: str) -> str:
    """Convert several paths with commas."""
    return ",".join(map(path, value.split(",")))


def usage(command: str, about: str, options: Mapping[str, Option]) -> str:
    lines = [f"usage: {command} key=value ... (or --key value)", "", about, ""]
    for name, option in options.items():
        tail = "required" if option.required else f"default {option.default}"
        line = f"  {name}=… ".ljust(INDENT) + f"{option.help} ({tail})"
        lines.append(textwrap.fill(line, WIDTH, subsequent_indent=" " * INDENT))
    return "\n".join(lines)


def split(arguments: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield (what was written, key, value) of each argument; the value is None where there is no
    `=`."""
    words = iter(arguments)
    for argument in words:
        if argument.startswith("--") and "=" not in argument:
            argument = f"{argument}={next(words, '')}"
        name, equals, value = argument.removeprefix("--").partition("=")
        yield argument, name.replace("-", "_"), value if equals else None


def parse(arguments: Sequence[str], options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the value of every option.

    Raises:
        DataError: unknown keys, wrong values, missing required ones; all of them in one message.
    """
    values: dict[str, Any] = {
        name: option.default for name, option in options.items() if not option.required
    }
    problems, given = [], set()
    for argument, name, value in split(arguments):
        if value is None:
            problems.append(f"argument: got {argument!r}, expected key=value")
        elif name not in options:
            problems.append(f"{name}: unknown key, expected one of {', '.join(options)}")
        elif name in given:
            problems.append(f"{name}: given twice")
        else:
            given.add(name)
            try:
                values[name] = options[name].convert(value)
            except ValueError as error:
                problems.append(f"{name}: got {value!r}, expected {error}")
    absent = [name for name, option in options.items() if option.required and name not in given]
    problems += [f"{name}: missing ({options[name].help}). Fix: {name}=…" for name in absent]
    if problems:
        raise DataError("\n".join(problems))
    return values


def output_failed(error: OSError) -> bool:
    """Return whether an error is one of the standard output, which another try shows, and drop what
    waits there: it would fail again when the interpreter ends."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except (AttributeError, io.UnsupportedOperation):  # there is none, or a notebook's
        return False
    except OSError as again:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return again.errno == error.errno
    return False


def describe(error: OSError) -> str:
    """Return one line about a file or folder that could not be read or written."""
    where = error.filename or "a file"
    said = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL:
        return (
            f"disk: got no room for {where} ({said}), expected some. Fix: make room, and run the"
            " same command again: it goes on where it stopped"
        )
    return (
        f"storage: cannot use {where} ({said}), expected a file or folder that can be read and"
        " written. Fix: see its access rights and its disk, and run the same command again"
    )


@clean_output(plain)
def run(
    command: str,
    about: str,
    options: Mapping[str, Option],
    main: Callable[..., int | None],
    arguments: Sequence[str],
    more: Callable[[Mapping[str, str]], Mapping[str, Option]] = lambda given: {},
) -> int:
    """Parse, call `main(**values)`, whose result is the exit code, and turn a DataError, or an
    error of a file, into one report and exit code 2, or 74 on a full disk. `more` tells the options
    that depend on what is given. What is printed holds no secrets and commands no terminal.

    SIGTERM and SIGHUP end it as Ctrl-C does, so that nothing is left behind: exit code 128 plus the
    signal's number.
    """
    helps = [argument for argument in arguments if argument in ("-h", "--help", "help")]
    arguments = [argument for argument in arguments if argument not in helps]
    try:
        given = {name: value for _, name, value in split(arguments) if value is not None}
        options = {**options, **more(given)}
        with ended_by_signals():
            code = 0
            if helps:
                print(usage(command, about, options))
            else:
                code = main(**parse(arguments, options)) or 0
            if sys.stdout is not None:  # it is without a standard output
                sys.stdout.flush()
            return code
    except OSError as error:
        if not output_failed(error):
            print(f"{command}: cannot go on\n  - {describe(error)}", file=sys.stderr)
            return NO_STORAGE if error.errno in FULL else 2
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            print(
                f"{command}: output: got {error}, expected to write it. Fix: make room",
                file=sys.stderr,
            )
        return CLOSED if isinstance(error, BrokenPipeError) else NO_STORAGE
    except DataError as error:
        print(
            f"{command}: cannot go on\n"
            + "\n".join(f"  - {line}" for line in str(error).splitlines()),
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:
        ended = error if isinstance(error, Ended) else Ended(signal.SIGINT)
        with contextlib.suppress(OSError):  # a terminal that was closed takes no words
            print(f"{command}: interrupted ({ended.signal.name})", file=sys.stderr)
        return 128 + ended.signal
