"""The command line: the only room that imports Hydra, and the one that turns errors into exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException

from sophon import __version__
from sophon.cli.completion import BASH, complete
from sophon.cli.early import refuse_early
from sophon.cli.follow import following
from sophon.cli.groups import conf_dir, groups
from sophon.cli.help import USAGE, explain
from sophon.cli.listing import listing
from sophon.cli.messages import one_line
from sophon.cli.next import next_steps
from sophon.cli.overrides import as_typed, mend_hydra, named, of_a_model, refuse_parted, text
from sophon.cli.project import init
from sophon.config import ComposedConfig, Config
from sophon.config.keys import keys
from sophon.errors import GateError, GuardError, UserError, likely
from sophon.paths import unexpected
from sophon.streams import make_unfailing
from sophon.validation import from_omegaconf
from sophon.verbs import VERBS, action

ConfigStore.instance().store(name="schema", node=ComposedConfig)
mend_hydra()


@hydra.main(  # type: ignore[untyped-decorator]
    version_base="1.3", config_path=str(conf_dir()), config_name="config"
)
def _run(config: DictConfig) -> None:
    try:
        closing = _perform(config)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _warn(closing)
    except (UserError, GuardError, GateError, OSError, KeyboardInterrupt) as error:
        # Hydra prints lines of its own about an exception that passes through it; in a sweep they say which job failed
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _failed.append(error)


def _perform(config: DictConfig) -> str | None:
    typed = from_omegaconf(config)
    refuse_early(typed)
    run = action(typed.verb)
    if typed.threads:
        import torch

        torch.set_num_threads(typed.threads)
    closing = run(typed)
    _finished.append((typed, closing))
    return closing


_finished: list[tuple[Config, str | None]] = []
_failed: list[BaseException] = []


def main() -> None:
    """Run ``sophon VERB overrides...`` and exit with the code that `USAGE` states."""
    make_unfailing()
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    match arguments:
        case [] | ["-h" | "--help"]:
            print(USAGE)
            return 0 if arguments else 2
        case ["--version"]:
            print(__version__)
            return 0
        case ["--completion", "bash"]:
            print(BASH)
            return 0
        case ["--complete", line]:
            print(*complete(line), sep="\n")
            return 0
        case ["list" | "init" as word, *rest] if not {"--help", "-h"} & set(rest):
            return _answered(listing if word == "list" else init, rest)
        case ["list" | "init", *_]:
            print(USAGE)
            return 0
        case ["report", "compare", *rest]:
            return _command("compare", _runs_as_override(rest))
        case [verb, *rest] if verb in VERBS:
            return _command(verb, rest)
    verb, allowed = arguments[0], (*VERBS, "list", "init")
    return _fail(f"'{verb}' is not a verb{likely(verb, allowed)}; allowed: {', '.join(allowed)}", 2)


def _answered(answer: Callable[[list[str]], str], arguments: list[str]) -> int:
    """Print an answer that takes no configuration."""
    try:
        print(answer(arguments))
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(unexpected(error), 2)
    return 0


def _command(verb: str, arguments: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a traceback of its own and exits with 1
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, _interrupt)
    _finished.clear()
    _failed.clear()
    searched: list[str] = []
    try:
        if arguments[:1] in (["--help"], ["-h"]) and len(arguments) == 2:
            print(explain(arguments[1]))
            return 0
        overrides, flags, options = _parted([f"verb={verb}", *arguments])
        searched += [options.config_dir] if options.config_dir else []
        known = groups(searched)
        if not options.multirun:
            refuse_parted(overrides)
        overrides = of_a_model([as_typed(override, known, options.multirun) for override in overrides])
        if options.multirun or options.help:
            _by_hydra(overrides, flags)
        else:
            overrides, config = following(overrides, searched)
            if _is_plain(options):
                _once(config)
            else:
                _by_hydra(overrides, flags)
        for error in _failed:
            raise error
        if _finished and not options.multirun and os.environ.get("RANK", "0") == "0":
            typed, closing = _finished[0]
            for line in next_steps(typed, options.overrides, flags):
                print(line)
            _warn(closing)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        return _fail(one_line(error, searched), 2)
    except GuardError as error:
        return _fail(str(error), 3)
    except GateError as error:
        return _fail(str(error), 4)
    except OSError as error:
        return _fail(unexpected(error), 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command {'begins anew' if verb == 'pretrain' else 'goes on'}", 130)
    return 0


def _is_plain(options: Namespace) -> bool:
    """Return whether a command asks nothing of Hydra but a configuration."""
    asked = {name for name, value in vars(options).items() if value} - {"overrides", "config_dir", "run"}
    return not asked and not any(re.match(r"[+~]*hydra\b", override) for override in options.overrides)


def _once(config: DictConfig) -> None:
    """Run what is composed already; Hydra would compose it twice more, for half a second each."""
    HydraConfig.instance().set_config(config)  # for ${hydra:...}
    with flag_override(config, ["struct", "readonly"], [False, False]):
        del config["hydra"]
    _perform(config)


def _by_hydra(overrides: list[str], flags: list[str]) -> None:
    sys.argv = [sys.argv[0], *overrides, *flags]
    _run()


def _warn(line: str | None) -> None:
    if line is not None:
        print(f"sophon: warning: {line}", file=sys.stderr)


def _runs_as_override(arguments: list[str]) -> list[str]:
    """Turn the folders among ``arguments`` into the key that names them; Hydra takes overrides only."""
    rest = [argument for argument in arguments if argument.startswith("-") or named([argument]) & set(keys())]
    folders = ",".join(text(argument) for argument in arguments if argument not in rest)
    return [*rest, f"runs=[{folders}]"]


def _parted(arguments: list[str]) -> tuple[list[str], list[str], Namespace]:
    """Part overrides from flags; Hydra's parser takes the former from one place only, and answers with its usage."""
    parser = get_args_parser()
    parser.error = _refuse
    options = parser.parse_intermixed_args(arguments)
    modes = [f"--{mode}" for mode in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(options, mode)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: not allowed together; give one of them")
    if any(re.match(r"[+~]*verb(=|$)", override) for override in options.overrides[1:]):
        raise UserError("verb: not allowed as a key; the verb is the first word, as in `sophon protect ...`")
    flags = list(arguments)
    for override in options.overrides:
        flags.remove(override)
    return options.overrides, flags, options


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `sophon VERB --help` shows what is allowed")


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # the ranks of one run fail alike; one speaks for all
        print(f"sophon: {message}", file=sys.stderr)
    return code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
