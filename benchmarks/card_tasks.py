"""Scores of real models on tasks that their cards publish, by `tercet eval --lm-eval`, in several forms of the weights.

    python benchmarks/card_tasks.py REF ... --data DIRECTORY [--quantize none,int8,int4,file] [--limit 400] [--shots 0]

DIRECTORY holds piqa.jsonl, arc_easy.jsonl and arc_challenge.jsonl with rows of `query`, `choices` and `gold`. "file"
is a GGUF file's own bits. The score is acc_norm: the answer with the highest log-probability per byte, after
"Answer:". The interval is 95%, from the harness's standard error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = ("piqa", "arc_easy", "arc_challenge")
TEMPLATE = """task: card_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def scores(reference: str, quantize: str, folder: Path, limit: int, shots: int) -> dict[str, str]:
    names = ",".join(f"card_{name}" for name in TASKS)
    command = [
        sys.executable,
        "-m",
        "tercet",
        "eval",
        reference,
        "--lm-eval",
        names,
        "--include-path",
        str(folder),
    ]
    command += ["--json", "--shots", str(shots)]
    if limit:
        command += ["--limit", str(limit)]
    if quantize != "file":
        command += ["--quantize", quantize]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    results = json.loads(done.stdout)["results"]
    cells = {}
    for name in TASKS:
        entry = results[f"card_{name}"]
        score, error = (100 * float(entry[key]) for key in ("acc_norm,none", "acc_norm_stderr,none"))
        cells[name] = f"{score:.1f} ± {1.96 * error:.1f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("references", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quantize", default="none,int8,int4,file")
    parser.add_argument("--limit", type=int, default=400, help="documents of each task; 0: all")
    parser.add_argument("--shots", type=int, default=0)
    options = parser.parse_args()
    print(f"| model | weights | {' | '.join(TASKS)} |\n|---|---|{'---|' * len(TASKS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in TASKS:
            file = (options.data / f"{name}.jsonl").resolve()
            (Path(folder) / f"card_{name}.yaml").write_text(TEMPLATE.format(name=name, file=file))
        for reference in options.references:
            for quantize in options.quantize.split(","):
                cells = scores(reference, quantize, Path(folder), options.limit, options.shots)
                row = " | ".join(cells[name] for name in TASKS)
                print(f"| {Path(reference).name} | {quantize} | {row} |", flush=True)


if __name__ == "__main__":
    main()
