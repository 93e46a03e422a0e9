"""How much state the published models keep: their configs, rebuilt from published values, and a table of them.

    python tools/published_models.py table [--context TOKENS]
    python tools/published_models.py write FOLDER

``table`` prints the table of docs/published-models.md; it takes what ``ghostssm inspect --json`` says of every config,
without weights. ``write`` writes FOLDER/NAME/config.json of every model, for ``ghostssm inspect FOLDER/NAME``.

The values and where each comes from are in tests/data/configs/published.json. What does not bear on sizes
(multipliers, initialisation, token ids) is left out there, so that these configs are for sizes only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parents[1] / "tests" / "data" / "configs" / "published.json"
_LAYERS = {"m": "mamba", "a": "attention", "h": "hybrid"}
DTYPES = ("float32", "bfloat16", "int8")


def published_configs() -> dict[str, dict[str, Any]]:
    """config.json by name; the file has a letter for each layer of a list."""
    return {name: _spelt_out(entry["config"]) for name, entry in json.loads(PUBLISHED.read_text()).items()}


def _spelt_out(config: dict[str, Any]) -> dict[str, Any]:
    lists = {"layer_types", "layers_block_type"} & config.keys()
    return config | {key: [_LAYERS[letter] for letter in config[key]] for key in lists}


def write_configs(folder: Path) -> list[Path]:
    """Write FOLDER/NAME/config.json for every model."""
    written = []
    for name, config in published_configs().items():
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=1))
        written.append(path)
    return written


def inspected(folder: Path, context: int) -> dict[str, Any]:
    """What ``ghostssm inspect --json`` says of a config, at N, N/2 and N/4."""
    from ghostssm.checkpoint.description import describe
    from ghostssm.cli.main import app

    size = describe(str(folder)).layout.state_size
    halves = map(str, (size // 2, size // 4))
    options = [
        "--state-size",
        *halves,
        "--state-dtype",
        *DTYPES,
        "--context",
        str(context),
        "--memory",
        "80GiB",
        "--json",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(["inspect", str(folder), *options], standalone_mode=False)
    found: dict[str, Any] = json.loads(printed.getvalue())
    return found


def table(context: int) -> list[str]:
    """Lines of Markdown."""
    from ghostssm.units import bytes_text

    headers = [
        *("model", "parameters", "mixers, attention layers", "N", "state, float32", "bfloat16", "int8", "N/4, int8"),
        *(
            "keys, values",
            "state's share, float32",
            "N/4, int8",
            "sequences in vLLM, float32",
            "N/4, bfloat16",
            "times",
        ),
    ]
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        for path in write_configs(Path(scratch)):
            found = inspected(path, context)
            dense, _, quarter = ({entry["state_dtype"]: entry for entry in cut["kept"]} for cut in found["cuts"])
            kept = dense["float32"]
            before, after = (_in_vllm(found["cuts"][cut], form) for cut, form in ((0, "float32"), (2, "bfloat16")))
            size, active = (f"{found[key] / 1e9:.2f}B" for key in ("parameters", "active_parameters"))
            cells = [
                path.name,
                size if active == size else f"{size}, {active} active",
                f"{found['layers']}, {kept['attention_layers']}",
            ]
            cells += [str(found["layout"]["state_size"])]
            cells += [bytes_text(dense[dtype]["state"]) for dtype in DTYPES] + [bytes_text(quarter["int8"]["state"])]
            cells += [bytes_text(kept["cache"]) if kept["cache"] else ""]
            cells += [f"{entry['state_share']:.0%}" for entry in (kept, quarter["int8"])]
            cells += [f"{before:,}", f"{after:,}", f"{after / before:.1f}"] if before else [""] * 3
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _in_vllm(cut: dict[str, Any], dtype: str) -> int:
    """Sequences; 0 where vLLM has no class for the family, or the weights alone are more than the memory."""
    entries = [entry for entry in cut["admitted"] if (entry["engine"], entry["state_dtype"]) == ("vllm", dtype)]
    return int(entries[0]["sequences"]) if entries else 0


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("table").add_argument("--context", type=int, default=8192)
    steps.add_parser("write").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "table":
        print("\n".join(table(arguments.context)))
    else:
        print(f"{len(write_configs(arguments.folder))} configs in {arguments.folder}")


if __name__ == "__main__":
    sys.exit(run())
