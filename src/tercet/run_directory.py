"""The output directory of a build, tune or climb: it holds a single run, which the same command resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tercet.errors import UserError
from tercet.files import locked, read_json, remove_leftovers, write_atomic, write_json


@contextlib.contextmanager
def open_run(out: Path, command: str, key: str, config: dict[str, Any]) -> Iterator[None]:
    """Lock ``out`` for a run and write its ``config.yaml``.

    Args:
        out: the run's directory.
        command: the command that runs, such as ``build``.
        key: a fingerprint of everything that determines the run's result.
        config: the settings for ``config.yaml``.

    Raises:
        UserError: another process uses the directory, it belongs to another run, or it holds other files.
    """
    import yaml

    from tercet import __version__

    with locked(out):
        marker = out / "run.json"
        if marker.is_file():
            if read_json(marker) != {"command": command, "key": key}:
                raise UserError(
                    f"{out} contains a run with other data or settings; choose another `out` or delete it"
                )
        elif any(path.name != ".lock" and path.suffix != ".tmp" for path in out.iterdir()):
            raise UserError(f"{out} is not empty and contains no Tercet run; choose another `out`")
        else:
            write_json(marker, {"command": command, "key": key})
        remove_leftovers(out)
        config = {"command": command, "version": __version__, **config}
        write_atomic(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        yield
