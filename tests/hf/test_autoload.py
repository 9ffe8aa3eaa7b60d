"""The watcher and the hook of `torch.backends`: they register bitlm, and break nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import bitlm_autoload
from tests import zoo

ROOT = Path(__file__).parents[2]
PACKAGES = sysconfig.get_path("purelib")
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "bitlm" in AUTO_QUANTIZER_MAPPING, "not registered"
import sys
assert not any(type(finder).__name__ == "Watcher" for finder in sys.meta_path), "still watching"
"""


def run(code, *paths, **environment):
    """Run code in a fresh interpreter that finds modules in `paths`; return its stderr.

    Without `site`, so that an editable installation of bitlm does not come before them.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment
    done = subprocess.run([sys.executable, "-S", "-c", textwrap.dedent(code)], env=environment,
                          cwd=paths[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture
def installed(tmp_path):
    """A folder with the metadata of an installed bitlm, which names the hook."""
    metadata = tmp_path / "bitlm-0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bitlm\nVersion: 0.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nbitlm = bitlm_autoload:hook\n")
    return tmp_path


@pytest.fixture
def sandbox(tmp_path):
    """Empty stand-ins for torch, transformers and bitlm, so that import orders cost nothing."""
    def module(name, text=""):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in path.relative_to(tmp_path).parents:
            if package.name:
                (tmp_path / package / "__init__.py").touch()
        path.write_text(text)

    module("torch", "import bitlm_autoload\nbitlm_autoload.hook()\n")
    module("transformers.quantizers.auto", "import torch\nMAPPING = {}\n")
    module("transformers.modeling_utils",
           "import torch\nfrom .quantizers.auto import MAPPING\nclass PreTrainedModel: pass\n")
    module("transformers.models.auto.auto_factory", "from ... import modeling_utils\n")
    module("transformers.models.llama", "from ..modeling_utils import PreTrainedModel\n")
    module("transformers.cache", "")
    module("bitlm.hf", "def register():\n"
           "    from transformers.quantizers.auto import MAPPING\n"
           "    MAPPING['bitlm'] = MAPPING.get('bitlm', 0) + 1\n")
    shutil.copy(ROOT / "bitlm_autoload.py", tmp_path)
    return tmp_path


ORDERS = [
    "import torch, transformers.models.llama",
    "import transformers.models.llama",
    "import transformers.models.auto.auto_factory",
    "import torch, transformers.modeling_utils, transformers.cache",
    "import transformers.modeling_utils, transformers.cache",
    "import transformers.quantizers.auto, transformers.models.llama",
    "import torch, transformers.quantizers.auto, transformers.models.llama",
    "import bitlm_autoload; bitlm_autoload.install(); import transformers.models.llama",
    "import torch, bitlm_autoload; bitlm_autoload.install(); import transformers.models.llama",
]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports(order, sandbox):
    run(f"""
        {order}
        from transformers.quantizers.auto import MAPPING
        assert MAPPING == {{"bitlm": 1}}, MAPPING
        import sys
        assert not any(type(finder).__name__ == "Watcher" for finder in sys.meta_path)
        for name, module in sys.modules.items():
            assert "exec_module" not in vars(getattr(module, "__loader__", 0) or object) or \\
                "." not in name or not name.startswith("transformers"), name
        """, sandbox)


def test_twice(sandbox):
    run("""
        import transformers.models.llama, bitlm_autoload
        bitlm_autoload.install()
        import sys
        assert not any(type(finder).__name__ == "Watcher" for finder in sys.meta_path)
        """, sandbox)


def test_the_package_is_gone(sandbox):
    shutil.rmtree(sandbox / "bitlm")
    assert run("import torch, transformers.models.auto.auto_factory", sandbox) == ""


def test_the_package_is_broken(sandbox):
    (sandbox / "bitlm/hf.py").write_text("raise RuntimeError('broken')\n")
    errors = run("import torch, transformers.models.llama, transformers.cache", sandbox)
    assert errors.count("bitlm is not registered with transformers") == 1 and "broken" in errors


def test_modules_that_share_a_loader(sandbox):
    archive = shutil.make_archive(str(sandbox / "all"), "zip", sandbox)
    (sandbox / "empty").mkdir()
    run("""
        import torch, transformers.models.llama
        from transformers.quantizers.auto import MAPPING
        assert MAPPING == {"bitlm": 1}, MAPPING
        """, sandbox / "empty", archive)


def test_importing_bitlm_loads_nothing_heavy():
    run("""
        import sys, bitlm
        assert bitlm.__version__ and "quantize" in dir(bitlm)
        heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
        assert not heavy, heavy
        assert bitlm.Scheme().method == "binary" and "chat" in bitlm.PRESETS
        assert "torch" not in sys.modules
        """, ROOT)


def test_the_function_quantize_is_not_hidden_by_its_module(sandbox):
    shutil.rmtree(sandbox / "bitlm")
    (sandbox / "bitlm").mkdir()
    shutil.copy(ROOT / "bitlm/__init__.py", sandbox / "bitlm")
    (sandbox / "bitlm/quantize.py").write_text("def quantize(): return 1\ndef pack(): return 2\n")
    for first in ("", "import bitlm.quantize", "from bitlm.quantize import pack"):
        run(f"{first}\nimport bitlm\nassert bitlm.quantize() == 1 and bitlm.pack() == 2\n"
            "import bitlm.quantize\nassert bitlm.quantize() == 1", sandbox)


def test_the_hook_is_fast_and_quiet():
    run("""
        import sys, time
        import logging
        before = set(sys.modules)
        import bitlm_autoload
        loaded = time.perf_counter()
        for _ in range(10):
            bitlm_autoload.hook()
        assert (time.perf_counter() - loaded) / 10 < 1e-3
        assert set(sys.modules) - before <= {"bitlm_autoload", "__future__"}
        assert sum(type(finder).__name__ == "Watcher" for finder in sys.meta_path) == 1
        """, ROOT)


@pytest.mark.parametrize("order", [
    "from transformers import AutoModelForCausalLM",
    "import transformers.quantizers.auto; from transformers import LlamaForCausalLM",
    "import transformers.modeling_utils; import transformers.cache_utils, transformers.pipelines",
    "import transformers.modeling_utils, bitlm",
    "import bitlm; bitlm.BitlmConfig()",
])
def test_real_imports(order, installed):
    code = f"{order}\nfrom transformers import AutoModelForCausalLM, BertModel\n{REGISTERED}"
    errors = run(code, installed, ROOT, PACKAGES)
    assert "not registered" not in errors


def test_opens_a_packed_checkpoint_without_import_bitlm(installed):
    zoo.packed("llama").save_pretrained(installed / "packed")
    run(f"""
        from transformers import pipeline, AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({str(installed / "packed")!r})
        """, installed, ROOT, PACKAGES)


def test_switched_off(installed):
    run("""
        import torch, sys
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        assert "bitlm" not in AUTO_QUANTIZER_MAPPING and "bitlm_autoload" not in sys.modules
        """, installed, ROOT, PACKAGES, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_a_stale_installation(installed):
    shutil.copy(ROOT / "bitlm_autoload.py", installed)
    errors = run("import torch, transformers.modeling_utils\nassert torch.ones(1).sum() == 1",
                 installed, PACKAGES)
    assert "bitlm" not in errors


def test_spawned_processes_and_compile_workers(installed):
    script = installed / "main.py"
    script.write_text(textwrap.dedent("""
        import multiprocessing

        def child(queue):
            import torch
            from transformers import AutoModelForCausalLM
            from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
            queue.put("bitlm" in AUTO_QUANTIZER_MAPPING)

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            assert queue.get(timeout=100)
            process.join()
            import torch
            assert torch.compile(lambda x: x.sin() + 1)(torch.ones(3)).shape == (3,)
        """))
    run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')",
        installed, ROOT, PACKAGES)


def test_under_pytest_and_twice():
    import bitlm.hf

    start = time.perf_counter()
    bitlm.hf.register()
    bitlm_autoload.install()
    assert time.perf_counter() - start < 0.1
    assert AUTO_QUANTIZER_MAPPING["bitlm"] is bitlm.hf.BitlmQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitlm"] is bitlm.hf.BitlmConfig
