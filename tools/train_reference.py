"""Train the reference model: a small Llama whose weights come from full-precision training and nothing else.

    python tools/train_reference.py [--out FOLDER] [--force] [--seed 0] [--steps N] [--threads N] ...

Weights that were quantized once sit on a grid, and a quantizer measured on them looks better than it is.
These are float32 from the start. The text is that of ``core/corpus.py``: the model and its tokenizer see the
parts ``prompt`` and ``calibration``; ``evaluation`` is held out for measuring. The result is a folder in
Hugging Face format, with ``reference.json`` beside the weights: settings, digests of the text, versions,
perplexities.

One seed gives the same bits again on the same machine, versions and number of threads.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from servelab.core import corpus
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.user_cache import cache_root

NAME = "reference_5m"
RECORD = "reference.json"
REVISION = 1
"""Goes up when this script would make another model of the same settings and text."""
TRAINING, HELD_OUT = ("prompt", "calibration"), "evaluation"
"""Parts of the corpus."""
END = "<|endoftext|>"
"""Stands between texts, and before the first."""
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"
"""It was taught no roles: a conversation is a text, and the answer its next paragraph."""
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


class Recipe(BaseModel):
    """What decides the weights, beside the text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, lt=2**63, description="of the first weights and the order of windows")
    steps: int = Field(default=800, ge=1, description="of the optimizer")
    batch: int = Field(default=4, ge=1, description="windows per step")
    window: int = Field(default=256, ge=2, description="tokens per row, in training and in measuring")
    learning_rate: float = Field(
        default=2e-3,
        gt=0,
        allow_inf_nan=False,
        description="its peak, after 1/20 of the steps; a cosine follows",
    )
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="of matrices only")
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest norm of the gradient")
    vocab: int = Field(default=2048, ge=257, description="tokens: bytes, the end of a text, merges")
    layers: int = Field(default=6, ge=1, description="decoder layers")
    hidden: int = Field(default=256, ge=2, description="width of the residual stream")
    heads: int = Field(default=4, ge=1, description="query heads per layer")
    kv_heads: int = Field(default=2, ge=1, description="key and value heads per layer")
    ffn: int = Field(default=768, ge=1, description="inner width of the feed-forward network")
    max_position: int = Field(default=2048, ge=2, description="longest context that the folder states")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden} is no even number of times heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")
        if self.window > self.max_position:
            raise ValueError(f"window={self.window} is longer than max_position={self.max_position}")
        return self

    def facts(self) -> dict[str, Any]:
        """Two folders with equal facts hold the same model."""
        text = {part: corpus.digest(part) for part in (*TRAINING, HELD_OUT)}
        return {"revision": REVISION, "settings": self.model_dump(), "corpus": text}

    def digest(self) -> str:
        return sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------ text


def texts(*parts: str) -> list[str]:
    return [topic.text for part in parts for topic in corpus.part(part)]


def make_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    """Byte-level BPE, which leaves no text out; digits stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Any:
    """All texts in one row, ``END`` before, between and after."""
    import torch

    end = tokenizer.token_to_id(END)
    ids = [end]
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, end]
    return torch.tensor(ids)


# ------------------------------------------------------------------ model


def make_model(recipe: Recipe, vocab: int, end: int) -> Any:
    """Random weights of the seed, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            num_hidden_layers=recipe.layers,
            hidden_size=recipe.hidden,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            intermediate_size=recipe.ffn,
            max_position_embeddings=recipe.max_position,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            dtype="float32",
        )
    )


def train(model: Any, ids: Any, recipe: Recipe) -> None:
    """Next-token training on windows that start anywhere; progress is shown on a terminal.

    Raises:
        ServeLabError: the loss is no number any more.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import get_cosine_schedule_with_warmup

    if len(ids) <= recipe.window:
        raise _wrong(f"window={recipe.window}: the training text has only {len(ids)} tokens")
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(_decayed(model, recipe), lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, -(-recipe.steps // 20), recipe.steps)
    offsets = torch.arange(recipe.window + 1)
    model.train()
    with tqdm(total=recipe.steps, desc="training", unit="step", disable=None) as bar:
        for _ in range(recipe.steps):
            starts = torch.randint(len(ids) - recipe.window, (recipe.batch, 1), generator=generator)
            rows = ids[starts + offsets].to(model.device)
            loss: Any = cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {_finite(loss.item()):.3f}", refresh=False)
            bar.update()


def _decayed(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _finite(loss: float) -> float:
    if math.isfinite(loss):
        return loss
    raise ServeLabError(
        "the training diverged; nothing was written",
        where="train_reference.py",
        why=f"the loss became {loss}",
        do="lower --learning-rate",
    )


# ------------------------------------------------------------------ measures


def nats(model: Any, ids: Any, window: int) -> float:
    """Negative log-likelihood of all tokens but the first, in windows that share no prediction."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    model.eval()
    short = -(len(ids) - 1) % window
    inputs: Any = pad(ids[:-1], (0, short)).view(-1, window)
    targets: Any = pad(ids[1:], (0, short), value=-100).view(-1, window)  # -100: not counted
    total = 0.0
    with torch.inference_mode():
        for rows, wanted in zip(inputs.split(8), targets.split(8), strict=True):
            logits = model(rows.to(model.device)).logits.flatten(0, 1)
            total += cross_entropy(logits, wanted.flatten().to(model.device), reduction="sum").item()
    return _finite(total)


def unigram_nats(training: Any, ids: Any, vocab: int) -> float:
    """The same of a model that knows only how often each token is, every count one higher."""
    import torch

    counts = torch.bincount(training, minlength=vocab).double() + 1
    return -float((counts / counts.sum()).log()[ids[1:]].sum())


def perplexities(nats: float, ids: Any, texts: Sequence[str]) -> dict[str, float]:
    """Ends of texts are predicted and counted as tokens; they have no bytes."""
    size = sum(len(text.encode()) for text in texts)
    return {
        "per_token": round(math.exp(nats / (len(ids) - 1)), 4),
        "per_byte": round(math.exp(nats / size), 4),
        "bits_per_byte": round(nats / size / math.log(2), 4),
    }


# ------------------------------------------------------------------ folder


def build(folder: Path, recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Train, measure, and write the model into an empty folder.

    Returns:
        What ``reference.json`` holds.
    """
    began = perf_counter()
    training, held_out = texts(*TRAINING), texts(HELD_OUT)
    tokenizer = make_tokenizer(training, recipe.vocab)
    ids, unseen = token_ids(tokenizer, training), token_ids(tokenizer, held_out)
    vocab = tokenizer.get_vocab_size()
    with deterministic():
        model = make_model(recipe, vocab, tokenizer.token_to_id(END)).to(device)
        before = nats(model, unseen, recipe.window)
        train(model, ids, recipe)
        after, fitted = nats(model, unseen, recipe.window), nats(model, ids, recipe.window)
    record = {
        "recipe": recipe.digest(),
        **recipe.facts(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {"training": len(ids), "held_out": len(unseen)},
        "perplexity": {
            "training": perplexities(fitted, ids, training),
            "held_out": perplexities(after, unseen, held_out),
            "held_out_before": perplexities(before, unseen, held_out),
            "held_out_unigram": perplexities(unigram_nats(ids, unseen, vocab), unseen, held_out),
        },
        "made_with": {**_machine(device), "seconds": round(perf_counter() - began, 1)},
    }
    _save(folder, model, tokenizer, record)
    return record


@contextmanager
def deterministic() -> Iterator[None]:
    """Operations that would not give the same bits twice raise."""
    import torch

    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def _machine(device: str) -> dict[str, Any]:
    import torch

    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: import_module(name).__version__ for name in LIBRARIES},
    }


def _save(folder: Path, model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    fast: Any = import_module("transformers").PreTrainedTokenizerFast
    model.cpu().save_pretrained(folder)
    fast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        chat_template=TEMPLATE,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # which the library lets nobody else read
        shutil.copymode(folder / "config.json", path)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def present(out: Path, recipe: Recipe, force: bool = False) -> dict[str, Any] | None:
    """The record of the model in ``out``; None: it is to be made.

    Raises:
        ConfigError: what is there is another model, or none of ours.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
        made = record["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            "the folder holds something else, which is never overwritten",
            where=str(out),
            why=f"it has no {RECORD} of this script ({exc})",
            do="name another folder in --out, or an empty one",
        ) from exc
    if force:
        return None
    if made != recipe.digest():
        raise ConfigError(
            "the folder holds a model of another recipe",
            where=str(out / RECORD),
            why=f"its digest is {made:.12}, this one's {recipe.digest():.12}: settings, script or corpus "
            "differ; the corpus comes with Python",
            do="replace it with --force, or name another folder in --out",
        )
    return record


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out``, replacing it, when all went well, and else disappears.

    Raises:
        ServeLabError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        try:
            folder = scratch / "model"  # mkdtemp's own may be read by nobody else
            folder.mkdir()
            yield folder
            _replace(out, folder, scratch / "old")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ServeLabError(
            "the model cannot be written; nothing was left behind",
            where=str(out),
            why=str(exc),
            do="make room, or name a folder on another disk in --out"
            if full
            else "make the folder writable, or name another in --out",
        ) from exc


def _replace(out: Path, new: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


# ------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        recipe = _recipe(args)
        out = args.out.expanduser().absolute() if args.out else cache_root() / "models" / NAME
        if record := present(out, recipe, args.force):
            print(f"already there, with this recipe (--force makes it again): {out}")
        else:
            _prepare(args)
            with appearing(out) as folder:
                record = build(folder, recipe, args.device)
            print(f"made in {record['made_with']['seconds']:.0f} s: {out}")
        print(summary(record))
    except ServeLabError as exc:
        print(exc, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def summary(record: dict[str, Any]) -> str:
    lines = [f"{record['parameters']:,} parameters, trained on {record['tokens']['training']:,} tokens"]
    lines += [f"{'perplexity':<18}{'per token':>10}{'per byte':>10}{'bits/byte':>11}"]
    for name, row in record["perplexity"].items():
        values = (row["per_token"], row["per_byte"], row["bits_per_byte"])
        lines.append("{:<18}{:>10.2f}{:>10.3f}{:>11.3f}".format(name.replace("_", " "), *values))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about,
        epilog=more.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"default: models/{NAME} in ServeLab's cache"
    )
    parser.add_argument("--force", action="store_true", help="make it again, and replace what is there")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: its own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group = parser.add_argument_group("recipe")
    for name, field in Recipe.model_fields.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            metavar="N" if isinstance(field.default, int) else "X",
            help=f"{field.description}; default: {field.default}",
        )
    return parser


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.threads is not None and args.threads < 1:
        raise _wrong(f"threads={args.threads} is less than 1")
    try:
        return Recipe(**{name: getattr(args, name) for name in Recipe.model_fields})
    except ValidationError as exc:
        raise _wrong("; ".join(map(_problem, exc.errors()))) from exc


def _problem(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"{error['loc'][0]}={error['input']}: {message}" if error["loc"] else message


def _wrong(why: str) -> ConfigError:
    return ConfigError("the settings make no model", where="train_reference.py", why=why, do="see --help")


def _prepare(args: argparse.Namespace) -> None:
    """Settings of the process, once it is certain that something is to be made."""
    for name in LIBRARIES:
        try:
            import_module(name)
        except ModuleNotFoundError as exc:
            raise ServeLabError(
                f"the Python package {exc.name} is not installed",
                where="train_reference.py",
                why="the model is trained with torch and transformers",
                do='pip install -c constraints.txt -e ".[test]"   (in the checkout)',
            ) from exc
    import torch

    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ServeLabError(
                "there is no GPU to train on",
                where="--device cuda",
                why="torch.cuda.is_available() is false",
                do="leave --device out: the CPU takes minutes",
            )
        # read by cuBLAS when it starts; without it its results may change from run to run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging: Any = import_module("transformers.utils.logging")
    logging.disable_progress_bar()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every ``finally``
    sys.exit(main())
