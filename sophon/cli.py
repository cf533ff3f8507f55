"""The command line: the only module that imports Hydra, and the one that turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sophon import __version__
from sophon.config import Config
from sophon.errors import GuardError, UserError
from sophon.validation import from_omegaconf
from sophon.verbs import ACTIONS, VERBS

USAGE = """sophon: make pre-trained models non-fine-tunable in a restricted domain, and audit how well that holds

  sophon pretrain experiment=NAME ...                 make the unprotected reference
  sophon protect  experiment=NAME [run_dir=DIR] ...   protect it; the same command goes on where it stopped
  sophon export   checkpoint=DIR out=DIR ...          copy a verified checkpoint, or an unfinished run's last good state
  sophon audit    experiment=NAME [checkpoint=DIR] [reference=DIR] [attack=NAME] [run_dir=DIR] ...
                                                      attack it, its reference and a fresh model
  sophon sample   checkpoint=DIR [n=64] [run_dir=DIR]
                                                      draw images from a denoiser, as one grid
  sophon report   run_dir=DIR                         write an audit's reports again
  sophon report compare DIR DIR ... [out=DIR]         set audits side by side

Folders default to runs/<name>/seed<seed>/<verb>. Every key of the configuration can be overridden, as in
`sophon protect experiment=quickstart method.rounds=50 seed=1`; `sophon VERB --help` lists the groups and the whole
configuration, `--cfg job` prints what a command would run, `--multirun` sweeps.

Exit codes: 0 done; 2 the input is wrong; 3 no checkpoint satisfies the guard; 130 interrupted (a protect or an audit
goes on with the same command).
"""


def conf_dir() -> Path:
    """Return the folder of the shipped configuration: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(  # type: ignore[untyped-decorator]
    version_base="1.3", config_path=str(conf_dir()), config_name="config"
)
def _run(config: DictConfig) -> None:
    try:
        typed = from_omegaconf(config)
        if typed.threads:
            torch.set_num_threads(typed.threads)
        ACTIONS[typed.verb](typed)
    except (UserError, GuardError, KeyboardInterrupt) as error:
        # Hydra prints lines of its own about an exception that passes through it; in a sweep they say which job failed
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _failed.append(error)


_failed: list[BaseException] = []


def main() -> None:
    """Run ``sophon VERB overrides...`` and exit with the code that `USAGE` states."""
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb = arguments[0]
    if arguments[:2] == ["report", "compare"]:
        verb, arguments = "compare", ["compare", *_runs_as_override(arguments[2:])]
    elif verb not in VERBS:
        return _fail(f"'{verb}' is not a verb; allowed: {', '.join(VERBS)}", 2)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a traceback of its own and exits with 1
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what runs in its background with SIGINT ignored
        signal.signal(number, _interrupt)
    _failed.clear()
    try:
        sys.argv = [sys.argv[0], *_overrides_first([f"verb={verb}", *arguments[1:]])]
        _run()
        for error in _failed:
            raise error
    except (HydraException, OmegaConfBaseException, UserError) as error:
        return _fail(_one_line(error), 2)
    except GuardError as error:
        return _fail(str(error), 3)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command {'begins anew' if verb == 'pretrain' else 'goes on'}", 130)
    return 0


def _runs_as_override(arguments: list[str]) -> list[str]:
    """Turn the folders among ``arguments`` into the key that names them; Hydra takes overrides only."""
    folders = [each for each in arguments if "=" not in each and not each.startswith("-")]
    quoted = ",".join("'" + each.replace("\\", "\\\\").replace("'", "\\'") + "'" for each in folders)
    return [*(each for each in arguments if each not in folders), f"runs=[{quoted}]"]


def _overrides_first(arguments: list[str]) -> list[str]:
    """Gather the overrides: Hydra's parser takes them from one place only, and answers others with its usage."""
    parser = get_args_parser()
    parser.error = _refuse
    overrides: list[str] = parser.parse_intermixed_args(arguments).overrides
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `sophon VERB --help` shows what is allowed")


def _fail(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # the ranks of one run fail alike; one speaks for all
        print(f"sophon: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    """Join what Hydra and OmegaConf spread over several lines, leaving out their internals."""
    text = str(error)
    if isinstance(error, HydraException) and error.__cause__ is not None:
        text += "\n" + str(error.__cause__)
    text = text.split("Config search path:")[0]
    lines = [line.strip().rstrip(":.") for line in text.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_INTERNAL)]
    return "; ".join(dict.fromkeys(kept))


_INTERNAL = ("object_type=", "reference_type=", "full_key:", "Set the environment variable", "To append to your config")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
