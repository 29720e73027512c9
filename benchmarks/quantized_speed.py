"""Output tokens per second of quantized models, beside the unquantized one in the same run.

    python benchmarks/quantized_speed.py [--model smollm2_135m] [--quant w8a16,w8a8,w4a16,w4a8]
        [--requests 1,8,32] [--outputs 64] [--dtype bfloat16] [--repeats 3] [--json FILE]

Set-up: one engine per quantizer, all in one process with the same threads, in turns, after one unmeasured
round each. Prompts are random tokens, 128 each, all at once; greedy, ends ignored. Timed: from the call to
the last token, prompts included. Printed: the median of the repeats with the fastest and slowest, and its
ratio to the unquantized one's.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch

from servelab import LLM, SamplingParams

PROMPT = 128
"""Tokens per prompt."""


def engine(args: argparse.Namespace, quant: str | None) -> LLM:
    longest = PROMPT + args.outputs
    pages = max(args.requests) * (-(-longest // 16) + 1)
    overrides = [f"executor.num_kv_pages={pages}"]
    return LLM(args.model, dtype=args.dtype, quant=quant, max_model_len=longest, overrides=overrides)


def rate(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    began = perf_counter()
    out = llm.generate(prompts, params, progress=False)
    return sum(len(one.token_ids) for one in out) / (perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="as LLM(model=...)")
    parser.add_argument("--quant", default="w8a16,w8a8,w4a16,w4a8", type=lambda text: text.split(","))
    parser.add_argument("--requests", default="1,8,32", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--outputs", default=64, type=int, help="output tokens per request")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    engines = {name: engine(args, None if name == "none" else name) for name in ("none", *args.quant)}
    params = SamplingParams(temperature=0, max_tokens=args.outputs, ignore_eos=True)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {args.dtype}, prompts of {PROMPT}, {args.outputs} outputs, "
        f"median of {args.repeats}"
    )
    print(f"{'requests':>8}  {'quant':<8}{'tok/s':>24}  {'ratio':>5}")
    rows = []
    for n in args.requests:
        rng = random.Random(n)
        vocab = engines["none"].tokenizer.vocab_size
        prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(n)]
        found: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(args.repeats + 1):
            for name, llm in engines.items():
                figure = rate(llm, prompts, params)
                if repeat:
                    found[name].append(figure)
        plain = statistics.median(found["none"])
        for name, figures in found.items():
            mid = statistics.median(figures)
            text = f"{mid:.1f} ({min(figures):.1f}..{max(figures):.1f})"
            print(f"{n:>8}  {name:<8}{text:>24}  {mid / plain:>5.2f}", flush=True)
            rows.append({"requests": n, "quant": name, "tok_s": figures, "ratio": mid / plain})
    for llm in engines.values():
        llm.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
