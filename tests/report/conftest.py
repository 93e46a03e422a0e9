"""Pages of a tiny model, written once by the commands that write them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ghostssm.cli.main import app
from tests.conftest import save_model, write_text

_LIBRARIES = ("altair", "vl_convert")
collect_ignore = [] if all(map(find_spec, _LIBRARIES)) else ["test_browser.py", "test_report.py"]


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A pruned folder ("folder"), its page ("prune"), those of a comparison ("compare") and of a distilled model."""
    for library in _LIBRARIES:
        pytest.importorskip(library, reason="figures need altair and vl-convert-python")
    place = tmp_path_factory.mktemp("report")
    save_model(place / "model", tokenizer, n_groups=2)
    text = write_text(place / "text.txt")
    common = ["--calibration", text, "--windows", 3, "--window-length", 64, "--text-windows", 4, "--batch", 1, 2]
    folder, compared = place / "out", place / "compared.html"
    calls = [
        ["prune", place / "model", "--state-size", 4, "--method", "ghost", "--evaluate", text, "--report"],
        ["compare", place / "model", "--state-size", 8, 4, "--methods", "ghost", "balanced", "--text", text],
    ]
    calls[0] += ["--baselines", "magnitude", "--output", folder]
    calls[1] += ["--report", compared]
    healed = place / "healed"
    distilled = ["distill", folder, "--teacher", place / "model", "--text", text, "--output", healed]
    distilled += ["--steps", 6, "--batch", 4, "--window-length", 40, "--learning-rate", 0.01]
    for call in (*([*call, *common] for call in calls), distilled, ["report", healed]):
        app(list(map(str, call)), standalone_mode=False)
    written = {"prune": folder / "report.html", "compare": compared, "distill": healed / "report.html"}
    return {"folder": folder, "healed": healed, **written}


@pytest.fixture(params=_LIBRARIES)
def without_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one of the libraries that draw is not installed."""
    monkeypatch.setitem(sys.modules, request.param, None)
    for name in [name for name in sys.modules if name.startswith("ghostssm.report.figures")]:
        monkeypatch.delitem(sys.modules, name)
