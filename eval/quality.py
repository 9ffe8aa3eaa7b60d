#!/usr/bin/env python3
"""What rounding costs: one model packed in many ways, plain and compensated, against the dense one.

    eval/quality.py MODEL --calibrate TEXT --text TEXT [--context N] [--json FILE]     a causal LM
    eval/quality.py MODEL --calibrate TEXT --pairs PAIRS.jsonl [--json FILE]     a sentence encoder

A causal LM is judged by perplexity on TEXT (non-overlapping windows, the first token of each not
predicted) and by KL divergence and top-1 agreement with the dense model. An encoder is judged by
the cosine of its mean-pooled sentence embeddings to the dense ones, and by the Spearman correlation
of their similarities with the labels of PAIRS (`sentence1`, `sentence2`, `label`; STS-B's format).
With --json, finished rows are kept there, and a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from bitlm import Scheme, quantize, source
from bitlm.calibration.text import read_texts, token_windows
from bitlm.cli.doctor import cpu_model
from bitlm.evaluate.language import compare, perplexity
from bitlm.evaluate.load import load_model
from bitlm.scheme import grid

SCHEMES: dict[str, Scheme] = {
    "binary": Scheme(),
    "binary, 2 planes": Scheme(planes=2, refit=10),
    "binary, 3 planes": Scheme(planes=3, refit=10),
    "binary, 4 planes": Scheme(planes=4, refit=10),
    "ternary": Scheme(method="ternary", refit=10),
    "salient 5 %": Scheme(method="salient", salient=0.05),
    "salient 10 %": Scheme(method="salient", salient=0.1),
    "salient 30 %": Scheme(method="salient", salient=0.3),
    "grid, 2 bits": grid(2),
    "grid, 3 bits": grid(3),
    "grid, 4 bits": grid(4),
}
BATCH = 64  # sentences

Judge = Callable[[nn.Module], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text of the perplexity")
    what.add_argument("--pairs", help="jsonl of labelled sentence pairs")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = source.resolve(options.model)
    dense = source.load(folder, source.read_config(folder))
    tokenizer = source.tokenizer(folder)
    if options.text:
        windows = token_windows(tokenizer, read_texts(options.text), options.context)
        judge: Judge = lambda model: judge_text(model, dense, windows)  # noqa: E731
    else:
        judge = judge_pairs(tokenizer, dense, Path(options.pairs))
    rows = study(folder, options, judge, dense)
    print(table(rows))


def study(folder: Path, options: argparse.Namespace, judge: Judge, dense: nn.Module
          ) -> list[dict[str, Any]]:
    """Return a row for the dense model and for each scheme, plain and compensated."""
    size = sum(path.stat().st_size for path in source.weight_files(folder))
    bits = 8.0 * next(dense.parameters()).element_size()
    kept = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() \
        else []
    rows = {(row["scheme"], row["compensated"]): row for row in kept}
    todo = [("dense", False), *((name, c) for name in SCHEMES for c in (False, True))]
    for name, compensated in todo:
        if (name, compensated) in rows:
            continue
        print(f"{name}{', compensated' if compensated else ''} ...", file=sys.stderr)
        if name == "dense":
            sizes = {"bits_packed": bits, "bits_file": bits, "bytes": size}
            model = dense
        else:
            model, sizes = packed(folder, SCHEMES[name], options.calibrate if compensated else None)
        rows[name, compensated] = {"scheme": name, "compensated": compensated, **sizes,
                                   **judge(model)}
        if options.json:
            save(options.json, options.model, [rows[key] for key in todo if key in rows])
    return [rows[key] for key in todo]


def packed(folder: Path, scheme: Scheme, calibrate: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize to a temporary folder, load from there; return the model and its sizes."""
    with tempfile.TemporaryDirectory(prefix="bitlm-quality-") as scratch:
        out = Path(scratch) / "packed"
        report = quantize(folder, scheme=scheme, out=out, calibrate=calibrate,
                          measure_verdict=False)
        model, _ = load_model(out)
        return model, {"bits_packed": report.bits_packed, "bits_file": report.bits_file,
                       "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
                       "seconds": report.seconds["encode"]}


def judge_text(model: nn.Module, dense: nn.Module, windows: Tensor) -> dict[str, float]:
    """Return perplexity, and KL and top-1 agreement against the dense model."""
    if model is dense:
        return {"perplexity": perplexity(model, windows).perplexity, "kl": 0.0, "top1": 1.0}
    found = compare(model, dense, windows)
    return {"perplexity": found.packed.perplexity, "kl": found.kl, "top1": found.top1}


def judge_pairs(tokenizer: Any, dense: nn.Module, path: Path) -> Judge:
    """Return a judge of sentence encoders by labelled pairs."""
    from scipy.stats import spearmanr
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    labels = [pair["label"] for pair in pairs]
    sides = [[pair[side] for pair in pairs] for side in ("sentence1", "sentence2")]
    wanted = [embed(dense, tokenizer, side) for side in sides]

    def judge(model: nn.Module) -> dict[str, float]:
        found = [embed(model, tokenizer, side) for side in sides]
        cosine = torch.cat([cosine_similarity(a, b) for a, b in zip(found, wanted, strict=True)])
        return {"cosine": cosine.mean().item(),
                "spearman": float(spearmanr(cosine_similarity(*found).numpy(), labels)[0])}
    return judge


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Return mean-pooled embeddings [n, hidden]."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), BATCH):
        chosen = order[start:start + BATCH]
        batch = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True,
                          max_length=128, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        for i, row in zip(chosen, pooled, strict=True):
            rows[i] = row
    return torch.stack(rows)


def save(path: Path, model: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far, with the machine and the command."""
    command = shlex.join(["eval/quality.py", Path(model).name, *map(_name_only, sys.argv[2:])])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": cpu_model(), "torch": torch.__version__,
                                "command": command, "rows": rows}, indent=1) + "\n")


def _name_only(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    judged = [key for key in ("perplexity", "kl", "top1", "cosine", "spearman") if key in rows[0]]
    titles = {"kl": "KL", "top1": "top-1"}
    lines = ["| scheme | | bits, packed layers | bits, file | KiB | "
             + " | ".join(titles.get(key, key) for key in judged) + " |",
             "|---|---|---|---|---|" + "---|" * len(judged)]
    for row in rows:
        how = "" if row["scheme"] == "dense" else "compensated" if row["compensated"] else "plain"
        values = " | ".join(f"{row[key]:.0%}" if key == "top1" else f"{row[key]:.4g}"
                            for key in judged)
        lines.append(f"| {row['scheme']} | {how} | {row['bits_packed']:.2f} | "
                     f"{row['bits_file']:.2f} | {row['bytes'] / 1024:.0f} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
