"""The command line: the only module that imports Hydra, and the one that turns errors into exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sophon import __version__
from sophon.config import ComposedConfig
from sophon.errors import GuardError, UserError
from sophon.paths import unexpected
from sophon.streams import make_unfailing
from sophon.validation import from_omegaconf
from sophon.verbs import VERBS, action

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


ConfigStore.instance().store(name="schema", node=ComposedConfig)


@hydra.main(  # type: ignore[untyped-decorator]
    version_base="1.3", config_path=str(conf_dir()), config_name="config"
)
def _run(config: DictConfig) -> None:
    try:
        typed = from_omegaconf(config)
        run = action(typed.verb)
        if typed.threads:
            import torch

            torch.set_num_threads(typed.threads)
        run(typed)
    except (UserError, GuardError, OSError, KeyboardInterrupt) as error:
        # Hydra prints lines of its own about an exception that passes through it; in a sweep they say which job failed
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _failed.append(error)


_failed: list[BaseException] = []


def main() -> None:
    """Run ``sophon VERB overrides...`` and exit with the code that `USAGE` states."""
    make_unfailing()
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
        overrides, flags = _split([f"verb={verb}", *arguments[1:]])
        sys.argv = [sys.argv[0], *with_several_domains(overrides), *flags]
        _run()
        for error in _failed:
            raise error
    except (HydraException, OmegaConfBaseException, UserError) as error:
        return _fail(_one_line(error), 2)
    except GuardError as error:
        return _fail(str(error), 3)
    except OSError as error:
        return _fail(unexpected(error), 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command {'begins anew' if verb == 'pretrain' else 'goes on'}", 130)
    return 0


def _runs_as_override(arguments: list[str]) -> list[str]:
    """Turn the folders among ``arguments`` into the key that names them; Hydra takes overrides only."""
    folders = [each for each in arguments if "=" not in each and not each.startswith("-")]
    quoted = ",".join("'" + each.replace("\\", "\\\\").replace("'", "\\'") + "'" for each in folders)
    return [*(each for each in arguments if each not in folders), f"runs=[{quoted}]"]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part overrides from flags; Hydra's parser takes the former from one place only, and answers with its usage."""
    parser = get_args_parser()
    parser.error = _refuse
    parsed = parser.parse_intermixed_args(arguments)
    modes = [f"--{mode}" for mode in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(parsed, mode)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: not allowed together; give one of them")
    overrides: list[str] = parsed.overrides
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return overrides, flags


def with_several_domains(overrides: list[str]) -> list[str]:
    """Say ``domain.restricted=[...]`` in Hydra's terms, which cannot put a list in the place of a mapping.

    A name becomes a choice of the group ``domain``, a mapping the value, of an entry of ``domain.several``.

    Raises:
        UserError: the list is empty, holds something else or the same key twice, or other overrides say what the one
            restricted domain is.
    """
    lists = [each for each in overrides if _DOMAIN_LIST.match(each)]
    if not lists:
        return overrides
    others = [each for each in overrides if each not in lists]
    for other in (*lists[1:], *others):
        if _ONE_DOMAIN.match(other):
            raise UserError(f"{other}: not allowed beside {lists[0]}; give domain.several.NAME.KEY=VALUE for one of it")
    entries = _domain_entries(lists[0])
    names = [f"+domain@domain.several.{key}={_text(each)}" for key, each in entries.items() if isinstance(each, str)]
    mappings = {key: each for key, each in entries.items() if isinstance(each, dict)}
    return [
        *names,
        f"++domain.several={_text(mappings)}",
        f"domain.chosen={_text(list(entries))}",
        "~domain@domain.restricted",
        f"domain.restricted.name={_text('+'.join(entries))}",  # for what refers to ${domain.restricted.name}
        *others,
    ]


_DOMAIN_LIST = re.compile(r"\+{0,2}domain\.restricted=\s*\[")
_ONE_DOMAIN = re.compile(r"[+~]{0,2}(domain\.restricted\b|domain@domain\.restricted(=|$))")


def _domain_entries(override: str) -> dict[str, Any]:
    """Read the list of an override: names and mappings by the keys that they get in ``domain.several``."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override}: {str(error).splitlines()[0]}") from error
    if parsed.is_sweep_override():
        raise UserError(f"{override}: a sweep over lists is not allowed; give one list")
    entries = {}
    for entry in parsed.value():
        name = entry.get("name") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{override}: {entry} is not allowed; name files of conf/domain, or give mappings with a name"
            )
        entries[re.sub(r"\W", "_", name)] = entry
    if not entries or len(entries) < len(parsed.value()):
        raise UserError(f"{override}: give one domain or more, and each once")
    return entries


def _text(value: Any) -> str:
    """Write plain data as an override's value."""
    if isinstance(value, str):
        return str(QuotedString(value, Quote.single).with_quotes())
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_text(each)}' for key, each in value.items())}}}"
    return "null" if value is None else str(value)


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
