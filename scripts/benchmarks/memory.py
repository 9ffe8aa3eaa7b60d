"""Peak memory and time of quantizing a model that is larger than its budget.

    scripts/bench memory [--rounds 3] [--work DIR] [--json FILE]

Makes a random Llama of about 1.2 GB in float32 (sharded; the tokenizer and calibration text are the
demo model's), then, in processes of their own and in turn: reads and rewrites the same files,
quantizes them data-free, and quantizes them calibrated on 32 windows of 512 tokens. Memory is the
peak of the process's own pages (RssAnon): mapped files are not counted, the system can drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22,
         "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192,
         "max_position_embeddings": 2048, "tie_word_embeddings": False}
TOKENS = 32 * 512

REWRITE = """
import sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, Path(sys.argv[2]) / path.name)
"""
QUANTIZE = """
import json, sys
from bitlm import quantize
text = sys.argv[3:]
calibration = {"calibrate": text[0], "calibration_tokens": int(text[1])} if text else {}
report = quantize(sys.argv[1], "binary", out=sys.argv[2], overwrite=True, **calibration)
print(json.dumps(report.seconds))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep the model here for the next time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bitlm-memory-") as scratch:
        folder = (options.work or Path(scratch)) / "llama"
        make_model(folder)
        (Path(scratch) / "out").mkdir()
        text = long_text(Path(scratch) / "calibration.txt")
        out = str(Path(scratch) / "out")
        python = [sys.executable, "-c"]
        jobs = {
            "read and rewrite": [*python, REWRITE, str(folder), out],
            "data-free": [*python, QUANTIZE, str(folder), out + "-free"],
            "calibrated": [*python, QUANTIZE, str(folder), out + "-calibrated", str(text),
                           str(TOKENS)],
        }
        rows: dict[str, list[dict]] = {name: [] for name in jobs}
        for turn in range(options.rounds):
            for name, command in jobs.items():
                rows[name].append(watch(command))
                print(f"round {turn + 1} {name}: {rows[name][-1]}", file=sys.stderr)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    show(rows, size, options.json)


def make_model(folder: Path) -> None:
    """Write the random model, unless it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    print("making a random Llama of 1.2 GB", file=sys.stderr)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder, max_shard_size="300MB")
    for path in (ROOT / "bitlm" / "demo").glob("tokenizer*"):
        shutil.copy(path, folder)


def long_text(path: Path) -> Path:
    """Write calibration text of more than TOKENS tokens."""
    text = (ROOT / "bitlm" / "demo" / "calibration.txt").read_text("utf-8")
    path.write_text(text * 4, "utf-8")
    return path


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; return seconds, the peak of its own memory in MB, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            line = next(li for li in status.read_text().splitlines() if li.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]))
        except (OSError, StopIteration):
            pass
        time.sleep(0.002)
    if process.returncode:
        sys.exit(f"{command} failed with {process.returncode}")
    printed = process.stdout.read().strip()
    phases = json.loads(printed.splitlines()[-1]) if printed else {}
    return {"seconds": time.perf_counter() - start, "peak_mb": peak * 1024 / 1e6, **phases}


def show(rows: dict[str, list[dict]], size: int, file: Path | None) -> None:
    """Print the medians as a table; write them as JSON."""
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for name, runs in rows.items()}
    plain = medians["read and rewrite"]["seconds"]
    model = next((li.partition(":")[2].strip() for li in Path("/proc/cpuinfo").read_text()
                  .splitlines() if li.startswith("model name")), platform.processor())
    print(f"random Llama, {size / 1e9:.2f} GB in float32; {os.cpu_count()} cores of {model}")
    print(f"{'':20}{'seconds':>9}{'ratio':>7}{'peak MB':>9}  phases (s)")
    for name, row in medians.items():
        phases = {k: round(v, 1) for k, v in row.items() if k not in ("seconds", "peak_mb")}
        print(f"{name:20}{row['seconds']:9.1f}{row['seconds'] / plain:7.2f}{row['peak_mb']:9.0f}  "
              f"{phases or ''}")
    if file:
        file.write_text(json.dumps({"machine": model, "cores": os.cpu_count(), "bytes": size,
                                    "command": f"scripts/bench memory --rounds {len(rows[name])}",
                                    "medians": medians, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
