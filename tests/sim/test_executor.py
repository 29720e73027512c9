"""The simulated device: its KV pages by hand, its refusals, its ends; nothing of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.errors import CapabilityError, ConfigError, ServeLabError
from servelab.core.registry import Registry

GIB = 2**30
LLAMA2_7B = {
    "name": "llama2_7b",
    "dtype": "float16",
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "ffn": 11008,
    "vocab": 32000,
    "max_position": 4096,
}
DEVICE = {"name": "80 GiB", "memory_bytes": 80 * GIB}


def run(**changes: Any) -> Run:
    raw: dict[str, Any] = {
        "scheduler": "vllm_v1",
        "kvcache": "paged",
        "cost": "scripted",
        "workload": "synthetic",
        "executor": "sim",
        "task": "bench",
        "model": LLAMA2_7B,
        "hardware": DEVICE,
        "engine": {"max_batch_tokens": 2048},
        **changes,
    }
    registry = Registry.load()
    return compose(validate(raw, registry), registry)


def pages(made: Run) -> list[int]:
    return [pool["pages"] for pool in made.info["kv"]["pools"]]


def test_pages_by_hand() -> None:
    """Llama-2-7B: 6,738,415,616 weights in 16 bits; KV of a token 512 KiB, of a page 8 MiB."""
    made = run()
    activations = 2048 * (3 * 4096 + 3 * 11008) * 2
    left = int(0.9 * 80 * GIB) - 2 * 6_738_415_616 - activations - GIB // 2
    assert pages(made) == [left // (8 * 2**20)]
    weights = made.info["weights"]
    assert weights["bytes"] == 2 * 6_738_415_616
    assert weights["activation_bytes"] == activations
    assert weights["runtime_bytes"] == GIB // 2
    assert weights["kv_memory_bytes"] == left


def test_the_shape_of_a_config_json_is_read(tmp_path: Path) -> None:
    """Your own model: its config.json is enough, no weights are there."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = run(model={"name": "mine", "source": "path", "path": str(tmp_path), "dtype": "float16"})
    assert pages(made) == pages(run())
    assert made.info["weights"]["bytes"] == 2 * 6_738_415_616
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ServeLabError, match="MambaForCausalLM is not supported"):
        run(model={"name": "mine", "source": "path", "path": str(tmp_path)})


def test_stated_pages_stand_and_need_no_device() -> None:
    made = run(executor={"name": "sim", "num_kv_pages": 7500, "num_host_pages": 10}, hardware=None)
    assert pages(made) == [7500]
    assert made.info["kv"]["pools"][0]["host_pages"] == 10


def test_devices_add_up_and_scarce_heads_are_copied() -> None:
    """Two devices: twice the memory, the feed-forward network's activations halved. Eight devices and four
    KV heads: each head is kept twice."""
    bare = {"name": "sim", "activation_bytes": 0, "runtime_bytes": 0}
    two = pages(run(hardware={**DEVICE, "tp": 2}, executor=bare))[0]
    assert two == (int(0.9 * 160 * GIB) - 2 * 6_738_415_616) // (8 * 2**20)
    grouped = {**LLAMA2_7B, "kv_heads": 4}
    eight = run(model=grouped, hardware={**DEVICE, "tp": 8}, executor=bare)
    weights = eight.info["weights"]["bytes"]
    assert weights == 2 * (6_738_415_616 - 32 * 2 * 4096 * 28 * 128)
    assert pages(eight) == [(int(0.9 * 640 * GIB) - weights) // 2 // 2**20]


def test_heads_that_devices_cannot_share_evenly_take_more_room() -> None:
    """Eight KV heads on five devices: two on each, ten in all; seven devices of four heads: one on each."""
    bare = {"name": "sim", "activation_bytes": 0, "runtime_bytes": 0}
    for heads, kv_heads, tp, copies in ((40, 8, 5, 1.25), (28, 4, 7, 1.75)):
        model = {**LLAMA2_7B, "heads": heads, "kv_heads": kv_heads, "head_dim": 128}
        made = run(model=model, hardware={**DEVICE, "tp": tp}, executor=bare)
        room = int(0.9 * tp * 80 * GIB) - made.info["weights"]["bytes"]
        assert pages(made) == [int(room / copies) // (16 * 32 * 2 * kv_heads * 128 * 2)]
        assert made.info["weights"]["kv_copies"] == copies


def test_tied_embeddings_and_quantized_weights_leave_more_room() -> None:
    plain = run()
    tied = run(model={**LLAMA2_7B, "tied_embeddings": True})
    table = 32000 * 4096 * 2
    assert tied.info["weights"]["bytes"] == plain.info["weights"]["bytes"] - table
    quantized = run(quant="w4a16")
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    stored = round(linears * (4 + 24 / 128) / 8)  # codes, a 16-bit scale and an 8-bit zero per 128 inputs
    assert quantized.info["weights"]["bytes"] == plain.info["weights"]["bytes"] - 2 * linears + stored
    assert pages(quantized)[0] > pages(plain)[0]


def test_a_model_larger_than_its_devices_is_refused_with_how_many_would_do() -> None:
    big = {**LLAMA2_7B, "name": "llama2_70b", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8}
    big["ffn"] = 28672
    with pytest.raises(ConfigError) as caught:
        run(model=big)
    told = str(caught.value)
    assert "'llama2_70b' does not fit on 1 x 80 GiB" in told
    assert "weights take 128.5 GiB" in told
    assert "hardware.tp=2" in told
    assert "memory_utilization" not in told
    assert pages(run(model=big, hardware={**DEVICE, "tp": 2}))[0] > 0
    with pytest.raises(ConfigError, match=r"more of the memory \(executor\.memory_utilization\), more dev"):
        run(executor={"name": "sim", "memory_utilization": 0.1})


def test_without_a_device_it_says_what_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"KV memory of the simulated device is unknown(.|\n)*a100_80g"):
        run(hardware=None)
    with pytest.raises(ConfigError, match=r"nameless states no memory_bytes"):
        run(hardware={"name": "nameless"})


def test_too_little_memory_for_one_long_request() -> None:
    with pytest.raises(CapabilityError, match=r"cannot hold one request of the greatest length"):
        run(hardware={**DEVICE, "memory_bytes": 16 * GIB})


def test_a_run_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from servelab.core.compose import compose\n"
        "from servelab.core.config import validate\n"
        "from servelab.core.registry import Registry\n"
        "import tests.sim.test_executor as t\n"
        "made = t.run(quant='w4a8', kernel='sdpa')\n"
        "made.task.run(made)\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'src')!r}]\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")
