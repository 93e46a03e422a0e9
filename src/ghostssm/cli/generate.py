"""``ghostssm generate``: text from a model, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from ghostssm.checkpoint.place import folder_of
from ghostssm.choices import DEFAULT_SEED, Rounding
from ghostssm.cli.parsing import verb
from ghostssm.errors import InputError
from ghostssm.workflows.options import Option
from ghostssm.workflows.request_checks import check_rounding
from ghostssm.workflows.requests import DEVICE, MODEL, ROUNDING, SEED, STATE_DTYPE, TOKENIZER


@verb
def generate(
    model: Annotated[str, MODEL],
    prompt: Annotated[str, Option("PROMPT")],
    max_new_tokens: Annotated[int, Option("COUNT", least=1)] = 128,
    temperature: Annotated[float, Option("NUMBER", least=0)] = 0.0,
    seed: Annotated[int, SEED] = DEFAULT_SEED,
    state_dtype: Annotated[str | None, STATE_DTYPE] = None,
    state_rounding: Annotated[Rounding, ROUNDING] = "nearest",
    tokenizer: Annotated[str | None, TOKENIZER] = None,
    device: Annotated[str, DEVICE] = "cpu",
) -> Callable[[], None]:
    """Write text that goes on from a prompt, token by token.

    ghostssm generate reference --prompt "def main(" --max-new-tokens 64
    ghostssm generate mamba2-130m-n64 --prompt "The state of" --temperature 0.7

    Args:
        model: hub id, local folder, or 'reference'.
        prompt: text to go on from.
        max_new_tokens: stop after so many tokens.
        temperature: 0 always takes the likeliest token.
        seed: with --temperature above 0, or stochastic rounding: the same number gives the same text.
        state_dtype: of the recurrent state, rounded after every token: float32, bfloat16, float16, int8, fp8 or int4;
            tiers for a model that was pruned to them. If not given, that which it was pruned for, else float32.
        state_rounding: of a state narrower than float32: nearest or stochastic.
        tokenizer: folder or hub id of the tokenizer, if the model has none.
        device: where to compute: cpu, cuda, cuda:1 ...
    """
    folder_of(model)
    if state_dtype is not None:  # else the checkpoint may say one
        check_rounding(state_rounding, (state_dtype,))
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("The prompt is not UTF-8; expected text.") from None

    def work() -> None:
        import torch
        from transformers import LogitsProcessorList, TextStreamer

        import ghostssm
        from ghostssm.checkpoint.description import chosen_state_dtype
        from ghostssm.checkpoint.generation import FiniteLogits

        checkpoint = ghostssm.load(model, device=device, tokenizer=tokenizer)
        vocabulary = checkpoint.require_tokenizer()
        # As the tokenizer does by default, with a beginning of text where it adds one.
        encoded = vocabulary(prompt, return_tensors="pt").to(device)
        if encoded["input_ids"].shape[1] == 0:
            raise InputError("The prompt is empty; expected some text.")
        torch.manual_seed(seed)
        kept = state_dtype or chosen_state_dtype(checkpoint.source)
        ghostssm.accelerate(checkpoint.model, state_dtype=kept, state_rounding=state_rounding, seed=seed)
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

    return work
