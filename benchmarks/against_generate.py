"""Output tokens per second of the torch executor, beside transformers' ``generate`` in the same run.

    python benchmarks/against_generate.py [--model smollm2_135m] [--requests 1,8,32] [--outputs 128]
        [--dtype bfloat16] [--repeats 3] [--json FILE]

Set-up: the same checkpoint folder, dtype, prompts (random tokens, all of one length, so that ``generate``
pads nothing) and number of output tokens, greedy, ends ignored; both in one process with the same threads,
in turns, after one unmeasured round each. All requests arrive at once. ``generate`` runs with its default
cache and attention. Timed: from the call to the last token, prompts included; ours with scheduler, ledger,
hand-over between threads and text. Printed: the median of the repeats, with the fastest and slowest.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from transformers import AutoModelForCausalLM

from servelab import LLM, SamplingParams

PROMPTS = {1: 128, 8: 128, 32: 256}
"""Tokens per prompt by number of requests; 128 for others."""


class Ours:
    def __init__(self, args: argparse.Namespace) -> None:
        longest = max(PROMPTS.get(n, 128) for n in args.requests) + args.outputs
        need = max(args.requests) * (-(-longest // 16) + 1)
        self.llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=longest,
            overrides=[f"executor.num_kv_pages={need}"],
        )
        self.params = SamplingParams(temperature=0, max_tokens=args.outputs, ignore_eos=True)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        return [list(one.token_ids) for one in self.llm.generate(prompts, self.params, progress=False)]


class Theirs:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
        self.model: Any = model.eval()
        self.outputs = args.outputs

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.outputs,
            min_new_tokens=self.outputs,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found


def timed(run: Callable[[list[list[int]]], list[list[int]]], prompts: list[list[int]]) -> tuple[float, Any]:
    began = perf_counter()
    out = run(prompts)
    return sum(map(len, out)) / (perf_counter() - began), out


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of requests whose outputs are equal to the end."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m", help="as LLM(model=...); a folder or the default")
    parser.add_argument("--requests", default="1,8,32", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--outputs", default=128, type=int, help="output tokens per request")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()

    ours = Ours(args)
    folder = Path(ours.llm.info["weights"]["folder"])
    theirs = Theirs(args, folder)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {args.dtype}, {args.outputs} outputs per request, median of {args.repeats}"
    )
    print(
        f"{'requests':>8}  {'prompt':>6}  {'ours tok/s':>22}  {'generate tok/s':>22}  {'ratio':>5}  same text"
    )
    rows = []
    for n in args.requests:
        length = PROMPTS.get(n, 128)
        rng = random.Random(n)
        vocab = ours.llm.tokenizer.vocab_size
        prompts = [[rng.randrange(vocab) for _ in range(length)] for _ in range(n)]
        figures: dict[str, list[float]] = {"ours": [], "theirs": []}
        same = 0.0
        for repeat in range(args.repeats + 1):
            a, out_a = timed(ours, prompts)
            b, out_b = timed(theirs, prompts)
            same = agreement(out_a, out_b)
            if repeat:
                figures["ours"].append(a)
                figures["theirs"].append(b)
        mid = {who: statistics.median(values) for who, values in figures.items()}
        shown = [f"{mid[w]:.1f} ({min(v):.1f}..{max(v):.1f})" for w, v in figures.items()]
        ratio = mid["ours"] / mid["theirs"]
        print(
            f"{n:>8}  {length:>6}  {shown[0]:>22}  {shown[1]:>22}  {ratio:>5.2f}  {100 * same:.0f} %",
            flush=True,
        )
        rows.append({"requests": n, "prompt": length, **figures, "ratio": ratio, "same_text": same})
    ours.llm.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
