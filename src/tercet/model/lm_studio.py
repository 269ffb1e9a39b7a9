"""The models that LM Studio has downloaded, read in place: ``lmstudio:PUBLISHER/MODEL[/FILE]``.

LM Studio keeps them as ``models/PUBLISHER/MODEL/FILE.gguf`` in its home, or in the folder that its settings name.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from tercet.errors import UserError, nearest
from tercet.model.quantization_names import is_model_file

_LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf", re.DOTALL)


def lm_studio_directories() -> list[Path]:
    """Return the directories of models that exist."""
    homes = [Path.home() / ".lmstudio", Path.home() / ".cache/lm-studio"]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        pointer = (Path.home() / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
        homes = [Path(pointer), *homes] if pointer else homes
    places = []
    for home in homes:
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((home / "settings.json").read_text(encoding="utf-8"))
            if isinstance(settings, dict) and isinstance(settings.get("downloadsFolder"), str):
                places.append(Path(settings["downloadsFolder"]).expanduser())
        places.append(home / "models")
    return list(dict.fromkeys(place.resolve() for place in places if place.is_dir()))


def lm_studio_file(name: str) -> Path:
    """Return the GGUF file of ``PUBLISHER/MODEL`` or ``PUBLISHER/MODEL/FILE``.

    Raises:
        UserError: there is no such model, or it has several files.
    """
    models = lm_studio_models()
    files = [path for reference, path in models if reference.startswith(f"lmstudio:{name}/")]
    files += [path for reference, path in models if reference == f"lmstudio:{name}"]
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(reference for reference, path in models if path in files)
        raise UserError(f"LM Studio has {len(files)} files of {name}; name one: {names}")
    if not models:
        places = " or ".join(map(str, lm_studio_directories())) or "~/.lmstudio/models"
        raise UserError(f"LM Studio has no GGUF files in {places}")
    names_here = [reference for reference, _ in models]
    similar = nearest(f"lmstudio:{name}", names_here, limit=3) or names_here[:3]
    raise UserError(f"LM Studio has no model {name} here, but {', '.join(similar)}")


def lm_studio_models() -> list[tuple[str, Path]]:
    """Return the reference and the file of every model; of a split file the first part."""
    models: dict[str, Path] = {}
    for directory in lm_studio_directories():
        folders: dict[Path, list[Path]] = {}
        for path in sorted(directory.glob("*/*/*.gguf")):
            if is_model_file(path.name) and not _LATER_PART.fullmatch(path.name):
                folders.setdefault(path.parent, []).append(path)
        for folder, files in folders.items():
            name = f"lmstudio:{folder.parent.name}/{folder.name}"
            for path in files:
                models.setdefault(name if len(files) == 1 else f"{name}/{path.name}", path)
    return sorted(models.items())
