"""The report of a curation: ``report.json``, and the same as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tercet.curation.filtering import rules_of
from tercet.curation.tally import EXAMPLES, Amount, Tally, total
from tercet.curation.work import Work
from tercet.curation.writing import shard_name
from tercet.files import read_json, write_atomic, write_json
from tercet.progress import duration, size

Account = dict[str, Any]

# The order of the reasons: by stage; within a stage, the reason with most documents first.
STAGES = ("reading", "rules", "duplicates", "decontamination", "mixture")


def account(
    work: Work,
    data_directory: Path,
    data: Sequence[str],
    tests: Mapping[str, Sequence[str]],
    *,
    seconds: float,
    stages: Mapping[str, float],
    resumed: bool,
) -> Account:
    """Return the content of the report as plain values (``docs/curate.md`` explains the fields).

    Args:
        work: The working directory, with all stages finished.
        data_directory: The directory of the shards.
        data: The sources.
        tests: The test texts by the name of their set.
        seconds: Of this process.
        stages: Seconds of this process by stage.
        resumed: Whether an earlier process did a part of the work, so that a rate would be wrong.
    """
    tally, skipped = Tally(), Counter[str]()
    for path in sorted(work.directory.glob("*.group.json")):
        skipped.update(read_json(path)["skipped"])
    parts = work.parts()
    for part in parts:
        tally.add(Tally.from_json(read_json(work.path(f"{part}.read.json"))))
    shown: dict[int, dict[str, str]] = {}
    cleaned: list[dict[str, Any]] = []
    for part in parts:
        scattered = read_json(work.path(f"{part}.scattered.json"))
        tally.add(Tally.from_json(scattered["tally"]))
        shown.update({int(place): document for place, document in scattered["shown"].items()})
        cleaned += [scattered["decontamination"]] if scattered["decontamination"] else []
    plan = read_json(work.path("plan.json"))
    _show_copies(tally, plan["copies"], shown)
    read, written = total(tally.read.values()), total(tally.written.values())
    settings, minhash = work.settings, work.settings.minhash
    return {
        "version": 1,
        "data": list(data),
        "read": asdict(read),
        "written": asdict(written),
        "dropped": _dropped(tally),
        "sources": _sources(tally, plan["factors"]),
        "skipped": dict(sorted(skipped.items())),
        "preset": settings.preset,
        "languages": None if settings.languages is None else list(settings.languages),
        "rules": rules_of(settings).describe(),
        "near_duplicates": None
        if minhash is None
        else {**asdict(minhash), "threshold": round(minhash.threshold, 3)},
        "clusters": [_cluster(cluster, shown) for cluster in plan["clusters"]],
        "personal_data": _personal(tally) if settings.mask_personal_data else None,
        "decontamination": _decontamination(tests, cleaned) if tests else None,
        "seed": settings.seed,
        "shards": [_shard(data_directory / shard_name(n, plan["shards"])) for n in range(plan["shards"])],
        "seconds": round(seconds, 3),
        "stages": dict(stages),
        "bytes_per_second": None if resumed else round(read.bytes / max(seconds, 1e-9), 1),
    }


def _show_copies(tally: Tally, copies: Sequence[Sequence[int]], shown: Mapping[int, dict[str, str]]) -> None:
    """Add the examples of duplicates, each with the document that stays in its place."""
    exact = tally.dropped.get("exact duplicate")
    near = tally.dropped.get("near-duplicate")
    exact_count = min(EXAMPLES, exact.amount.documents) if exact else 0
    for number, (place, first) in enumerate(copies):
        drops = exact if number < exact_count else near
        if drops is not None:
            drops.examples.append({**shown[place], "detail": f"of {shown[first]['id']}"})


def _dropped(tally: Tally) -> list[dict[str, Any]]:
    order = sorted(
        tally.dropped.items(),
        key=lambda item: (STAGES.index(item[1].stage), -item[1].amount.documents, item[0]),
    )
    return [
        {"stage": drops.stage, "reason": reason, **asdict(drops.amount), "examples": drops.examples}
        for reason, drops in order
    ]


def _sources(tally: Tally, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "source": source,
            "read": asdict(amount),
            "dropped": asdict(tally.lost.get(source, Amount())),
            "factor": round(factors.get(source, 1.0), 6),
            "written": asdict(tally.written.get(source, Amount())),
        }
        for source, amount in tally.read.items()
    ]


def _cluster(cluster: Mapping[str, Any], shown: Mapping[int, dict[str, str]]) -> dict[str, Any]:
    first, *rest = [shown[place] for place in cluster["members"]]
    return {
        "documents": cluster["documents"],
        "exact": cluster["exact"],
        "first": first["id"],
        "text": first["text"],
        "others": [document["id"] for document in rest],
    }


def _personal(tally: Tally) -> dict[str, Any]:
    return {"documents": tally.masked_documents, "values": dict(sorted(tally.personal.items()))}


def _decontamination(
    tests: Mapping[str, Sequence[str]], parts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    matched = {number for part in parts for number in part["tests_matched"]}
    sets, start = [], 0
    for name, texts in tests.items():
        matches = sum(number in matched for number in range(start, start + len(texts)))
        sets.append({"name": name, "texts": len(texts), "found": matches})
        start += len(texts)
    names = ("documents_touched", "documents_dropped", "passages_removed", "characters_removed")
    return {
        "sets": sets,
        **{name: sum(part[name] for part in parts) for name in names},
        "examples": [example for part in parts for example in part["examples"]][:EXAMPLES],
    }


def _shard(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return {"file": path.name, "documents": pq.read_metadata(path).num_rows, "size": path.stat().st_size}


def write_report(result: Account, directory: Path) -> None:
    """Write ``report.html`` and then ``report.json``, which marks the run as finished."""
    write_atomic(directory / "report.html", page(result))
    write_json(directory / "report.json", result)


def page(result: Account) -> str:
    """Return the page, which needs no other file, no network and no script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tercet.curation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, duration=duration)
    environment.globals["share"] = share
    return environment.get_template("report.html.jinja").render(report=result)


def share(part: float, whole: float) -> str:
    """Return a share as ``12.3%``; of an empty whole ``0.0%``."""
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"
