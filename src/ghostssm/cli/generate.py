"""``ghostssm generate``: text from a model, token by token."""

from __future__ import annotations

from typing import Annotated

import typer

from ghostssm.cli import arguments


def generate(
    model: arguments.Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.", metavar="TEXT")],
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", callback=arguments.at_least(1), help="Stop after so many tokens.", metavar="COUNT"
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            callback=arguments.at_least(0),
            help="0 always takes the likeliest token.",
            metavar="NUMBER",
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="NUMBER",
            callback=arguments.at_least(0, 2**63 - 1),
            help="With --temperature above 0, or stochastic rounding: the same number gives the same text.",
            rich_help_panel=arguments.OTHER_PANEL,
        ),
    ] = 42,
    state_dtype: arguments.StateDtype = "float32",
    state_rounding: arguments.StateRounding = "nearest",
    tokenizer: arguments.Tokenizer = None,
    device: arguments.Device = "cpu",
) -> None:
    """Write text that goes on from a prompt, token by token.

    ghostssm generate reference --prompt "def main(" --max-new-tokens 64
    ghostssm generate mamba2-130m-n64 --prompt "The state of" --temperature 0.7
    """
    import torch
    from transformers import LogitsProcessorList, TextStreamer

    import ghostssm
    from ghostssm.checkpoint.probing import FiniteLogits
    from ghostssm.errors import InputError
    from ghostssm.ops.state_format import StateStorage

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("The prompt is not UTF-8; expected text.") from None
    StateStorage.of(state_dtype, state_rounding)  # before anything is loaded
    checkpoint = ghostssm.load(model, device=device, tokenizer=tokenizer)
    vocabulary = checkpoint.require_tokenizer()
    # As the tokenizer does by default, with a beginning of text where it adds one.
    encoded = vocabulary(prompt, return_tensors="pt").to(device)
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("The prompt is empty; expected some text.")
    torch.manual_seed(seed)
    ghostssm.accelerate(checkpoint.model, state_dtype=state_dtype, state_rounding=state_rounding, seed=seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    checkpoint.model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(vocabulary, skip_special_tokens=True),
        logits_processor=LogitsProcessorList([FiniteLogits(checkpoint)]),
        pad_token_id=vocabulary.pad_token_id or vocabulary.eos_token_id or 0,
        **sampling,
    )
