"""A chat in the terminal: the tokenizer's chat template, and answers that appear as they are generated."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

EXIT = "/exit"


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that turns can be told apart in what the model reads.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot chat; use a model that was "
            "trained on chats, or --prompt"
        )


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 256,
    system: str | None = None,
    read: Callable[[str], str] = input,
) -> list[dict[str, str]]:
    """Ask and answer in turns, until an empty line, ``/exit`` or the end of the input (Ctrl-D).

    Ctrl-C ends an answer early; what there is of it stays in the conversation.

    Args:
        max_new_tokens: of an answer, which is greedy. system: what the chat begins with, if anything.
        read: gives the next line, as ``input`` does.

    Returns:
        The conversation: messages with ``role`` and ``content``.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    require_template(tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print()
            break
        if line in ("", EXIT):
            break
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(model, tokenizer, messages, max_new_tokens)})
    return messages


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], max_new_tokens: int
) -> str:
    """The next message of the assistant, which is printed token by token."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = {name: prompt[name].to(model.device) for name in ("input_ids", "attention_mask")}
    streamer = _Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    try:
        with torch.inference_mode():
            model.generate(**prompt, **settings, streamer=streamer)
    except KeyboardInterrupt:
        streamer.end()
    return "".join(streamer.parts).strip()


class _Kept(TextStreamer):
    """A streamer that remembers what it has printed."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        super().on_finalized_text(text, stream_end=stream_end)
        sys.stdout.flush()
