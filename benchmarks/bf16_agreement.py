"""How far greedy text in bfloat16 agrees with transformers' on the same weights, and how near the ties were.

    python benchmarks/bf16_agreement.py [--model smollm2_135m] [--prompts 16] [--outputs 64]

Set-up: chat prompts from the language help that comes with Python, greedy, both in bfloat16. Printed: the
share of prompts with equal text, the share of tokens before the first divergence, and at each first
divergence how far the float32 logits of the two choices lie apart: what rounding had to overcome. bfloat16
keeps 8 bits, so logits near 16 come in steps of 0.06 to 0.125; a gap of many steps would be an error, no tie.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from transformers import AutoModelForCausalLM

from servelab import LLM, SamplingParams
from servelab.core.corpus import part


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--prompts", default=16, type=int)
    parser.add_argument("--outputs", default=64, type=int)
    args = parser.parse_args()

    with LLM(args.model, max_model_len=1024) as llm:
        folder = Path(llm.info["weights"]["folder"])
        topics = (part("prompt") * 99)[: args.prompts]
        talks = [
            [{"role": "user", "content": f"Explain this to a beginner:\n\n{topic.text[:400]}"}]
            for topic in topics
        ]
        ours = llm.chat(talks, SamplingParams(temperature=0, max_tokens=args.outputs, ignore_eos=True))
    half: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal, agreed, margins = 0, 0, []
    for one in ours:
        ids = torch.tensor([one.prompt_token_ids])
        with torch.inference_mode():
            out = half.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.outputs,
                min_new_tokens=args.outputs,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            theirs = out[0, ids.shape[1] :].tolist()
            pairs = zip(one.token_ids, theirs, strict=True)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs))
            agreed += first
            if first == len(theirs):
                equal += 1
                continue
            before = torch.tensor([[*one.prompt_token_ids, *theirs[:first]]])
            logits = full(before).logits[0, -1]
            margins.append(abs(logits[one.token_ids[first]] - logits[theirs[first]]).item())
    total = len(ours) * args.outputs
    print(f"{args.prompts} prompts, {args.outputs} outputs each, bfloat16, torch {torch.__version__}")
    print(
        f"equal to the end: {equal} of {len(ours)}; tokens before the first divergence: {agreed / total:.1%}"
    )
    if margins:
        shown = ", ".join(f"{gap:.3f}" for gap in sorted(margins))
        print(f"float32 logits of the two choices at each first divergence lie apart by: {shown}")


if __name__ == "__main__":
    main()
