"""`bitlm demo`: pack the embedded model in several ways, reload each, measure, let it talk."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "Once upon a time"
CONTEXT, WINDOWS = 256, 12
CALIBRATION_TOKENS = 16384
NEW_TOKENS, TIMED_TOKENS = 40, 24
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*",
               "special_tokens_map.json")


@dataclass(frozen=True)
class Variant:
    """One way to pack the demo model: the folder's name, what the table calls it, the scheme."""

    name: str
    title: str
    preset: str | None = None
    scheme: dict[str, Any] | None = None
    calibrated: bool = True


VARIANTS = (
    Variant("binary", "binary, 1 plane, data-free", "binary", calibrated=False),
    Variant("binary-calibrated", "binary, 1 plane, calibrated", "binary"),
    Variant("ternary", "ternary, calibrated", "ternary"),
    Variant("salient", "salient 10 %, calibrated", "salient"),
    Variant("two-planes", "2 planes refitted, calibrated", scheme={"planes": 2, "refit": 10}),
    Variant("chat", "preset chat (3 planes), calibrated", "chat"),
)


@dataclass(frozen=True)
class Result:
    """One row of the table, and what the model wrote."""

    title: str
    packed_bits: float
    file_bits: float
    size: int
    perplexity: float
    kl: float | None
    top1: float | None
    rate: float
    text: str


def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the packed models in this folder.")] = None,
) -> None:
    """Pack a small trained Llama in several ways and compare."""
    from .output import console, progress_bar, table

    start = time.perf_counter()
    with _folder(out) as folder, progress_bar("demo") as progress, _one_thread():
        results = run(folder, progress, VARIANTS)
    screen = console()
    screen.print(table(("a small Llama", "bits/weight packed", "whole file", "file KiB",
                        "perplexity", "KL to dense", "top-1", "tokens/s, 1 thread"),
                       [_row(result) for result in results]))
    screen.print(f'\nWhat each of them makes of "{PROMPT}":')
    for result in results:
        screen.print(f"\n[bold]{result.title}[/]")
        screen.print(result.text, markup=False, soft_wrap=True)
    seconds = time.perf_counter() - start
    screen.print(f"\n{len(results) - 1} models packed, written, reloaded with "
                     f"AutoModelForCausalLM.from_pretrained and measured in {seconds:.0f} s.")
    if out:
        screen.print(f"They are in {out}: try `bitlm chat {out / 'chat'}`.")


def run(folder: Path, progress: Any, variants: tuple[Variant, ...]) -> list[Result]:
    """Write the dense model and the variants into `folder` and return a row for each.

    progress: called with (models done, models).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bitlm  # noqa: F401 - registers the quantizer

    from ..calibration.text import read_texts, token_windows
    from ..quantize import quantize
    from ..scheme import Scheme
    from ..source import quiet

    dense_folder = _copy_model(folder / "dense")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(dense_folder)
        dense = AutoModelForCausalLM.from_pretrained(dense_folder).eval()
    heldout = read_texts(_data("heldout.txt"))
    windows = token_windows(tokenizer, heldout, CONTEXT, WINDOWS, seed=None)
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    bits = 8.0 * next(dense.parameters()).element_size()
    measured = _measure(dense, None, tokenizer, windows, prompt)
    results = [Result("dense", bits, bits, _weight_bytes(dense_folder), *measured)]
    for index, variant in enumerate(variants):
        progress(index, len(variants))
        torch.manual_seed(0)
        report = quantize(
            dense_folder, variant.preset, out=folder / variant.name,
            scheme=Scheme(**variant.scheme) if variant.scheme else None,
            calibrate=_data("calibration.txt") if variant.calibrated else None,
            calibration_tokens=CALIBRATION_TOKENS if variant.calibrated else None,
            measure_verdict=False)
        with quiet():
            packed = AutoModelForCausalLM.from_pretrained(folder / variant.name).eval()
        measured = _measure(packed, dense, tokenizer, windows, prompt)
        results.append(Result(variant.title, report.bits_packed, report.bits_file,
                              _weight_bytes(folder / variant.name), *measured))
    return results


def _measure(model: Any, dense: Any, tokenizer: Any, windows: Any, prompt: Any
             ) -> tuple[float, float | None, float | None, float, str]:
    """Return perplexity, KL, top-1 agreement, tokens/s and a greedy continuation."""
    from ..evaluate.language import compare, perplexity, throughput

    if dense is None:
        figures = perplexity(model, windows).perplexity, None, None
    else:
        found = compare(model, dense, windows)
        figures = found.packed.perplexity, found.kl, found.top1
    rate = throughput(model, prompt, TIMED_TOKENS)
    ids = model.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    return *figures, rate, tokenizer.decode(ids[0], skip_special_tokens=True)


def _row(result: Result) -> tuple[str, ...]:
    return (result.title, f"{result.packed_bits:.2f}", f"{result.file_bits:.2f}",
            f"{result.size / 1024:.0f}", f"{result.perplexity:.2f}",
            "" if result.kl is None else f"{result.kl:.3f}",
            "" if result.top1 is None else f"{result.top1:.0%}", f"{result.rate:.0f}")


@contextmanager
def _folder(out: Path | None):
    """Give the folder of the packed models: `out`, which must not exist yet, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="bitlm-demo-") as folder:
            yield Path(folder)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: choose another folder for --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    yield out


@contextmanager
def _one_thread():
    """Compute on one thread: layers this small lose by more, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _data(name: str) -> Path:
    path = Path(__file__).parents[1] / "demo" / name
    if not path.is_file():
        raise FileNotFoundError(2, "the demo's data is missing: reinstall bitlm", str(path))
    return path


def _copy_model(target: Path) -> Path:
    target.mkdir()
    source = _data("config.json").parent
    for pattern in MODEL_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    return target


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
