"""What a command says: data on stdout, words on stderr, and every error as one line with its exit code."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from ..errors import EngineError, GenerationCancelled
from .interrupts import INTERRUPTED, leave

EXIT_CODES = {
    0: "done",
    1: "an error that should not have happened (please report it)",
    2: "a wrong option, setting or request",
    3: "a checkpoint, LoRA, upscaler, detector or other model file is not there, or cannot be used",
    4: "not enough memory",
    5: "cancelled by a program",
    6: "a download failed",
    7: "a result could not be written",
    8: "an optional package is missing",
    9: "replay: the picture differs; doctor: something must be repaired",
    INTERRUPTED: "stopped by Ctrl-C",
}
DIFFERENT = 9


class Console:
    """The two streams of one command, as a context that turns errors into words and an exit code.

    Args:
        json: the command prints one JSON object on stdout; a failed one prints ``{"error": …}``.
        debug: tracebacks and the library's log are shown.

    A warning is said once. ``typed`` holds the request fields that were given as options: errors name the option, as
    that is what was typed. ``options`` has all that might have been, for errors of how fields go together.
    """

    def __init__(self, *, json: bool = False, debug: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.debug = debug
        self.quiet = quiet
        self.typed: Collection[str] = ()
        self.options: Mapping[str, str] = {}
        self._warned: set[str] = set()
        self._failed = False

    def __enter__(self) -> Console:
        level = logging.DEBUG if self.debug else logging.ERROR
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, EngineError):
            self.fail(error, error.exit_code)
        elif isinstance(error, KeyboardInterrupt):
            self.fail(GenerationCancelled("stopped by Ctrl-C"), INTERRUPTED)
        elif isinstance(error, BrokenPipeError):  # whoever read stdout has gone; nothing is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0)
        elif isinstance(error, Exception) and not _is_control_flow(error):
            self.fail(error, 1)

    @property
    def terminal(self) -> bool:
        """Whether a person watches the words."""
        return sys.stderr.isatty()

    def data(self, text: str) -> None:
        """A line of the result."""
        print(text, flush=True)

    def result(self, value: Any) -> None:
        """The whole result as one JSON object."""
        print(json.dumps(value, ensure_ascii=True, indent=2, default=str), flush=True)

    def names(self, what: str, names: Sequence[str], problems: Mapping[str, str]) -> None:
        """A list of names as the whole result: a line each, or under ``what`` in JSON; with what is wrong with some."""
        if self.json:
            self.result({what: list(names), "problems": dict(problems)})
            return
        for line in table([(name, problems.get(name, "")) for name in names]):
            self.data(line)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        if text in self._warned:
            return
        self._warned.add(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def fail(self, error: BaseException, code: int) -> NoReturn:
        """End the command with the error as one line; the plan of a job that does not fit follows as a table.

        Pictures that were saved before it are data as ever.
        """
        if code == INTERRUPTED:
            signal.signal(signal.SIGINT, self._leave)
        known = isinstance(error, EngineError)
        text = self._in_options(error) if known else f"{type(error).__name__}: {error}"
        if self.debug:
            traceback.print_exception(error)
        elif not known:
            text += "; run again with --debug and report what it shows"
        plan, saved = getattr(error, "plan", ""), getattr(error, "saved", ())
        for path in () if self.json else saved:
            self.data(path)
        print(f"error: {text}", *filter(None, [plan]), sep="\n", file=sys.stderr, flush=True)
        self._failed = True
        if self.json:
            told = {"type": type(error).__name__, "message": text, "field": getattr(error, "field", None)}
            more = {name: value for name, value in (("plan", plan), ("saved", saved)) if value}
            self.result({"error": {**told, **more, "exit_code": code}})
        raise SystemExit(code) from None

    def _leave(self, number: int, frame: Any) -> None:
        """A further Ctrl-C while the command ends: at once, with its word said once."""
        if self._failed:
            os._exit(INTERRUPTED)
        leave()

    def _in_options(self, error: EngineError) -> str:
        """The error in one line. Fields that were typed are named by their options, the one at fault in any case."""
        text = " ".join(str(error).removesuffix(getattr(error, "plan", "")).split())
        field = (getattr(error, "field", None) or "").partition("[")[0]
        if field not in self.typed:
            return text
        for name in self.typed:
            text = re.sub(rf"(^|; ){name}(?:\[0\])?(\[\d+\])?: ", rf"\1{self._option(name)}\2: ", text)
        text = _together(text, self.options) if self.options else text
        own = self._option(field)
        return text if own in text else f"{own}: {text}"

    def _option(self, field: str) -> str:
        return self.options.get(field) or option(field)


def _together(text: str, options: Mapping[str, str]) -> str:
    """A sentence on several fields with their options.

    A field whose name is a word of the language too is meant only where it, or a list of such, begins a part of the
    sentence or follows "give"; one with an underscore is meant anywhere but in what was given, and of a setting.
    """
    before, after = r"(?<!setting )(?<![\w.'\"/-])", r"(?![\w'\"\[=:/-]|\.\w)"
    one = rf"{before}(?:{'|'.join(options)}){after}"
    listed = rf"(?:^|; |\bgive ){one}(?:,? and {one}|,? or {one}|, {one})*"

    def named(found: re.Match[str]) -> str:
        return re.sub(one, lambda name: options[name[0]], found[0])

    text = re.sub(listed, named, text)
    return re.sub(rf"{before}[a-z]+_\w+{after}", lambda name: options.get(name[0], name[0]), text)


# Fields that take one value each time they are given.
ONE_EACH = {"loras": "--lora"}


def option(name: str) -> str:
    """The option of a field or setting, as it is typed."""
    return ONE_EACH.get(name) or f"--{name.replace('_', '-')}"


def _is_control_flow(error: Exception) -> bool:
    """The command-line library ends commands and reports wrong options by exceptions of its own."""
    return type(error).__module__.split(".")[0] in ("typer", "click")


def human_bytes(count: float) -> str:
    """A size as a person reads it: 4.3 MB, 22.7 GB (powers of 1000)."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def human_memory(count: float) -> str:
    """A size as plans and settings have it, in powers of 1024: 4.1 MiB, 21.2 GiB."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: int, units: Sequence[str]) -> str:
    """A number in the first of its units, each ``step`` times the one before, that leaves it below ``step``."""
    power = 0
    while count >= step and power < len(units) - 1:
        count, power = count / step, power + 1
    return f"{count:.1f} {units[power]}" if power else f"{count:.0f} {units[0]}"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines; the last column is as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
