"""The studies in eval/: their runs, their tables, and the report's arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "eval"))

import distill  # noqa: E402
import report  # noqa: E402


def result(run: str, task: str, score: float, minutes: float = 10.0, after: str = "") -> dict:
    study, _, name = run.partition("-")
    return {"run": run, "study": study, "name": name, "after": after, "packed": None,
            "stages": {"one": {"seconds": minutes * 60}},
            "evaluated": {"headline": "accuracy", "task": f"glue/{task}",
                          "metrics": {"accuracy": {"value": score}}}}


def measured(size: float, operations: float, alone: float, together: float) -> dict:
    return {"file_bytes": size, "bits": 1.0, "memory_bytes": size, "peak_bytes": 2**20,
            "cost": {"ops": operations, "flops": int(operations), "bops": 0},
            "seconds_alone": alone, "texts_a_second": together}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = [result("sst2-teacher", "sst2", 0.8), result("sst2-w1a8-0", "sst2", 0.72),
            result("sst2-w1a8-1", "sst2", 0.72),
            result("sst2-w1a1-0", "sst2", 0.6, 30, "sst2-w1a8-0"),
            result("cola-teacher", "cola", 0.5), result("cola-w1a1-0", "cola", -0.1),
            *(result(f"rates-teacher-{rate}", "sst2", score) for rate, score in
              (("0.4", 0.7), ("1", 0.8), ("2.5", 0.9))),
            *(result(f"rates-w1a1-{rate}", "sst2", score) for rate, score in
              (("0.4", 0.5), ("1", 0.7), ("2.5", 0.9)))]
    for each in runs:
        (tmp_path / f"{each['run']}.json").write_text(json.dumps(each))
    return tmp_path


def test_the_quadratic_mean_of_the_worked_example():
    assert report._quadratic([0.9, 0.6, 0.3]) == pytest.approx(0.648074, abs=1e-6)
    ratios = [(70.2 + 60) / 2 / 76.1, (50 + 40) / 2 / 84, (20 + 10) / 2 / 40]
    assert report._quadratic(ratios) == pytest.approx(0.621669, abs=2e-6)


def test_the_report(folder):
    rows = report.report(folder, {"teacher": measured(2800.0, 2000.0, 0.4, 10.0),
                                  "w1a8": measured(100.0, 100.0, 0.1, 20.0),
                                  "w1a1": measured(100.0, 100.0, 0.1, 20.0)})
    teacher, w1a8, w1a1 = rows
    assert (teacher["task"], teacher["complexity"], teacher["inference"]) == (1, 1, 1)
    assert w1a8["scores"]["sst2"] == [0.72, 0.72] and w1a8["task"] == pytest.approx(0.9)
    assert w1a8["complexity"] == pytest.approx(24.331050, abs=1e-6)
    assert w1a8["inference"] == pytest.approx(((3**2 + 28**2) / 2) ** 0.5)
    # A score below 0 counts as 0; the training of the student before counts too.
    assert w1a1["task"] == pytest.approx((0.75**2 / 2) ** 0.5)
    assert w1a1["minutes"] == pytest.approx(40) and "training" not in w1a8
    assert w1a1["training"] == pytest.approx((((1 / 4) ** 2 + 0.5**2) / 2) ** 0.5)
    text = report.table(rows)
    assert "| SST-2 accuracy | 80.0 | 72.0 / 72.0 | 60.0 |" in text
    assert "| CoLA Matthews | 50.0 |  | -10.0 |" in text
    report.plot(rows, folder / "plot.png")
    assert (folder / "plot.png").stat().st_size > 1000


def test_runs_come_after_those_that_they_need():
    seen: set[str] = set()
    for key, run in distill.RUNS.items():
        assert key == run.key and run.before <= seen
        seen.add(key)
    assert {"sst2-w1a1+estimators-1", "stsb-w1a1-0", "denoise-baseline-w1a1"} <= seen


def test_every_committed_result_is_of_a_run_and_in_a_table():
    found = {path.stem for path in distill.RESULTS.glob("*.json")} - {"report"}
    assert found <= set(distill.RUNS)
    text = distill.tables(distill.RESULTS)
    for key in found:
        data = json.loads((distill.RESULTS / f"{key}.json").read_text())
        assert data["run"] == key and f"| {distill.RUNS[key].name} |" in text
        assert "/work" not in json.dumps(data) and "/tmp" not in json.dumps(data)


def test_paths_in_results_are_nobodys(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"model": str(tmp_path / "work" / "sst2-teacher" / "model"), "data": "./data",
             "list": [str(tmp_path / "data")], "task": "glue/sst2", "rate": 0.1}
    assert distill._named(given, Path("work")) == {
        "model": "sst2-teacher/model", "data": "data", "list": ["data"], "task": "glue/sst2",
        "rate": 0.1}
