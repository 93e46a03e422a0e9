"""Train a small Mamba-2 or hybrid: the built-in one, on the sources of Python's standard library, or one on other text.

    python tools/train_reference.py --output runs/reference
    python tools/train_reference.py --output runs/headers --text FOLDER --groups 2 --head-dim 32 --hidden-size 192
    python tools/train_reference.py --output runs/granite --family granitemoehybrid --hidden-size 192 --layers 6

Modules are held out by a hash of their name (``ghostssm.text.stdlib``), files of another text by a hash of what they
say. The folder gets the weights in bfloat16, the tokenizer, ``training.json`` with every choice and the losses,
``checkpoint.pt`` to go on from with ``--resume``, and, with ``--text``, ``calibration.txt`` (a part of the text that it
was trained on) and ``held_out.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import ghostssm
from ghostssm.models.families import mixers_of
from ghostssm.text.sources import read_text
from ghostssm.text.stdlib import stdlib_texts

END = "<|endoftext|>"
FAMILIES = ("mamba2", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2")
SAMPLE_BYTES = 4_000_000
"""Size of the texts that are written beside a model trained with ``--text``."""


def corpus(text: str | None) -> tuple[list[str], list[str]]:
    """The texts to train on and the held-out ones."""
    if text is None:
        return stdlib_texts(held_out=False, tests=True), stdlib_texts(held_out=True)
    sides: tuple[list[str], list[str]] = ([], [])
    for part in read_text(text, "calibration").parts:
        sides[hashlib.sha256(part.encode()).digest()[0] % 16 == 0].append(part)
    return sides


def write_sample(file: Path, texts: list[str]) -> None:
    """The first texts, as many as SAMPLE_BYTES hold."""
    file.write_text("\n\n".join(texts)[:SAMPLE_BYTES], encoding="utf-8")


def train_tokenizer(texts: list[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE; the end-of-text token has id 0."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, each closed by the end-of-text token."""
    batches = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*batch.ids, end], dtype=np.uint16) for batch in batches])


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """A model of a family, with random weights; one of four to six layers of a hybrid has attention."""
    heads, layers = 2 * args.hidden_size // args.head_dim, args.layers
    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    attention = {"num_attention_heads": args.hidden_size // 32, "num_key_value_heads": args.hidden_size // 64}
    mixer = {
        "mamba_n_heads": heads,
        "mamba_d_head": args.head_dim,
        "mamba_d_state": args.state_size,
        "mamba_n_groups": args.groups,
        "mamba_expand": 2,
        "mamba_chunk_size": 64,
    }
    third = [layer % 5 == 2 for layer in range(layers)]
    of_family: dict[str, tuple[str, dict[str, Any]]] = {
        "mamba2": (
            "Mamba2",
            {
                "state_size": args.state_size,
                "head_dim": args.head_dim,
                "num_heads": heads,
                "expand": 2,
                "n_groups": args.groups,
                "chunk_size": 64,
                "residual_in_fp32": False,
            },
        ),
        "granitemoehybrid": (
            "GraniteMoeHybrid",
            {
                **attention,
                **mixer,
                "layer_types": ["full_attention" if here else "linear_attention" for here in third],
                "num_local_experts": 0,
                "shared_intermediate_size": 2 * args.hidden_size,
                "attention_multiplier": 32**-0.5,
                "embedding_multiplier": 12.0,
                "logits_scaling": 3.0,
                "residual_multiplier": 0.5,
                "position_embedding_type": "nope",
            },
        ),
        "nemotron_h": (
            "NemotronH",
            {
                **attention,
                "head_dim": 32,
                "ssm_state_size": args.state_size,
                "mamba_num_heads": heads,
                "mamba_head_dim": args.head_dim,
                "n_groups": args.groups,
                "chunk_size": 64,
                "intermediate_size": 3 * args.hidden_size,
                "layers_block_type": [
                    ("mamba", "mlp", "mamba", "attention", "mamba", "moe")[layer % 6] for layer in range(layers)
                ],
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": args.hidden_size,
                "moe_shared_expert_intermediate_size": args.hidden_size,
            },
        ),
        "falcon_h1": (
            "FalconH1",
            {
                **attention,
                **mixer,
                "mamba_d_ssm": 2 * args.hidden_size,
                "mamba_rms_norm": False,
                "intermediate_size": 2 * args.hidden_size,
                "ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.8],
                "ssm_in_multiplier": 1.25,
                "attention_in_multiplier": 0.9,
                "key_multiplier": 0.5,
                "embedding_multiplier": 2.5,
                "lm_head_multiplier": 0.5,
            },
        ),
        "zamba2": (
            "Zamba2",
            {
                "layers_block_type": ["hybrid" if here else "mamba" for here in third],
                "mamba_d_state": args.state_size,
                "mamba_ngroups": args.groups,
                "n_mamba_heads": heads,
                "mamba_expand": 2,
                "chunk_size": 64,
                "num_attention_heads": args.hidden_size // 32,
                "intermediate_size": 2 * args.hidden_size,
                "num_mem_blocks": 1,
                "adapter_rank": 8,
                "use_mem_rope": True,
                "time_step_min": 1e-3,
            },
        ),
    }
    prefix, sizes = of_family[args.family]
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(
        getattr(transformers, f"{prefix}Config")(**common | sizes)
    )
    begin_as_mamba2(model, layers)
    ghostssm.accelerate(model)
    return model


@torch.no_grad()
def begin_as_mamba2(model: PreTrainedModel, layers: int) -> None:
    """Give every mixer Mamba-2's first decays, and dt from 0.001 to 0.1, since some families forget at first."""
    model.get_input_embeddings().weight.normal_(std=0.02)
    for mixer in mixers_of(model):
        dt = torch.exp(torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        mixer.A_log.copy_(torch.empty_like(mixer.A_log).uniform_(1, 16).log())
        mixer.out_proj.weight /= math.sqrt(layers)


def loss_of(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over the positions whose target is not -100; both (b, l)."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def next_token_loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean loss of windows (b, l + 1)."""
    return loss_of(model, windows[:, :-1], windows[:, 1:])


def optimizer_for(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a straight line to zero."""
    return min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))


def descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, args: argparse.Namespace
) -> None:
    """One step down the gradient of a loss, at the step's learning rate and with the gradient's norm cut at 1."""
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * learning_rate_factor(step, args.steps, args.warmup)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: np.ndarray, args: argparse.Namespace, windows: int) -> float:
    """Mean loss over evenly spread held-out windows."""
    starts = np.linspace(0, len(stream) - args.window - 2, windows).astype(int)
    batches = (starts[first : first + args.batch] for first in range(0, windows, args.batch))
    return float(np.mean([next_token_loss(model, gather(stream, batch, args)).item() for batch in batches]))


def gather(stream: np.ndarray, starts: np.ndarray, args: argparse.Namespace) -> Tensor:
    rows = np.stack([stream[s : s + args.window + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--family", default="mamba2", choices=FAMILIES, help="mamba2, or a hybrid with attention")
    parser.add_argument("--text", help="a file or folder to train on instead of the standard library")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/checkpoint.pt")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, held_out_texts = corpus(args.text)
    random.Random(args.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    train, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    if args.text is not None:
        write_sample(args.output / "calibration.txt", texts)
        write_sample(args.output / "held_out.txt", held_out_texts)
    model = build_model(args)
    optimizer = optimizer_for(model, args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train):,} training tokens, {len(held_out):,} held out", flush=True)

    first, history, checkpoint = 0, [], args.output / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, history = saved["step"], saved["history"]

    begun = time.perf_counter()
    for step in range(first, args.steps):
        draw = np.random.default_rng((args.seed, step))
        batch = gather(train, draw.integers(0, len(train) - args.window - 1, args.batch), args)
        loss = next_token_loss(model, batch)
        descend(loss, model, optimizer, step, args)
        done = step + 1
        if done % 20 == 0:
            pace = (done - first) / (time.perf_counter() - begun)
            print(
                f"step {done}/{args.steps}  loss {loss.item():.3f}  {pace * args.batch * args.window:,.0f} tokens/s  "
                f"{(args.steps - done) / pace / 60:.0f} min left",
                flush=True,
            )
        if done % 200 == 0 or done == args.steps:
            history.append((done, held_out_loss(model, held_out, args, 64)))
            print(f"held-out loss {history[-1][1]:.4f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "history": history}
            torch.save(state, checkpoint)

    save(model.to(torch.bfloat16), tokenizer, args, history, parameters, len(train))


def save(
    model: PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    args: argparse.Namespace,
    history: list[tuple[int, float]],
    parameters: int,
    tokens: int,
) -> None:
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    record = {
        "options": {key: value for key, value in vars(args).items() if key not in ("output", "text", "resume")},
        "parameters": parameters,
        "training_tokens": tokens,
        "held_out_loss": history,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
