"""What mains that run a config share: the flags, and how what the user can mend ends in one line and an exit code."""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import loop

BAD_INPUT = 2
# New keys are let through: a component may take arguments that the config leaves out, and `build` knows them all.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file of configs/.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; runs/<name of the config> by default.")


def start(run: Callable[[Any, pathlib.Path], Any]) -> None:
    """Parses the flags and calls `run(config, workdir)`.

    SIGTERM ends in exit code 75, input that cannot be run in exit code 2 and one line that says what to write instead.
    """
    for name in ("config", "workdir"):  # for --help, where they are flags of the main module
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.run(lambda argv: _main(run, argv), flags_parser=_parse)


def _main(run: Callable[[Any, pathlib.Path], Any], argv: Sequence[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the checkpoint library narrates every file at the level of `app.run`
    if len(argv) > 1:
        _refuse(f"unexpected arguments {' '.join(argv[1:])}; flags look like --config.steps=100")
    try:
        run(*_config_and_workdir())
    except loop.Preempted as preempted:
        loop.log(str(preempted))
        sys.exit(loop.PREEMPTED)
    except (ValueError, OSError) as error:
        logging.debug("where it was raised (--verbosity=1 shows this)", exc_info=True)
        _refuse(" ".join(str(error).split()))


def _parse(argv: Sequence[str]) -> list[str]:
    """`absl`'s parser, whose complaints about flags and configs are one line and exit code 2."""
    for argument in argv:
        path = pathlib.Path(argument.partition("--config=")[2].partition(":")[0])
        if argument.startswith("--config=") and not path.is_file():
            _refuse(f"--config={path} is not a file; {_known_configs()}")
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _refuse(_one_line(error))


def _config_and_workdir() -> tuple[Any, pathlib.Path]:
    if _CONFIG.value is None:
        raise ValueError(f"--config is missing; {_known_configs()}")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return _CONFIG.value, pathlib.Path(_WORKDIR.value or f"runs/{name}")


def _known_configs() -> str:
    return "configs here: " + ", ".join(sorted(str(path) for path in pathlib.Path("configs").glob("[a-z]*.py")))


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error.args[0] if error.args else error)).strip().strip("'\"")
    return text.replace("\\n", " ").replace("\\'", "'")


def _refuse(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(BAD_INPUT)
