"""What examples look like, and how each becomes token ids and labels.

| format            | columns                                    | the loss is on                              |
|-------------------|--------------------------------------------|---------------------------------------------|
| prompt_completion | prompt, completion (of a list, the first)  | the completion                              |
| alpaca            | instruction, input (may be empty), output  | the output                                  |
| messages          | messages, or conversations (ShareGPT)      | what the assistant says                     |
| text              | text                                       | everything; texts are packed into blocks    |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from collator import IGNORED
from data import DataError, columns_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMATS = ("prompt_completion", "alpaca", "messages", "text")
Ids = dict[str, list[int]]

# The words of Stanford Alpaca, with which such data are usually trained.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "tool": "tool", "function": "tool"}


@dataclass(frozen=True)
class Columns:
    """The names of columns, where they are not the usual ones."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str | None = None
    text: str = "text"


@dataclass(frozen=True)
class Encoder:
    """Turns the examples of one source into token ids.

    Args:
        kind: one of :data:`FORMATS`. name: of the source, for messages. max_length: of an example, in tokens.
        packing: fill blocks with several texts, in the format ``text``.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: str
    name: str
    max_length: int
    columns: Columns = field(default_factory=Columns)
    packing: bool = True

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so that an answer could not end; set its eos_token"
            )
        if self.kind == "messages" and self.tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which messages need; name a file with one in --chat_template, or "
                "train on prompts and completions"
            )

    def encode(self, examples: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """``input_ids`` and ``labels`` of every example that fits into ``max_length`` tokens.

        A longer example is dropped, not cut: its answer would lose its end, or its question its beginning, and the
        model would learn something that nobody wrote. How many were dropped is logged. Plain text has neither, and is
        cut into pieces.

        Raises:
            DataError: for a column that is missing, an example that is wrong, or when no example fits.
        """
        columns = columns_of(examples)
        self._require(columns)
        if self.kind == "text":
            blocks = examples.map(self._blocks, batched=True, remove_columns=columns, **self._progress(examples))
            if hasattr(blocks, "__len__") and not len(blocks):
                raise DataError(f"{self.name} holds no text in {self.columns.text!r}; give data with some")
            return blocks
        encoders: dict[str, Callable[[Mapping[str, Any], int], Ids]] = {
            "prompt_completion": self._pair,
            "alpaca": self._alpaca,
            "messages": self._conversation,
        }
        numbered = partial(examples.map, with_indices=True, remove_columns=columns)
        encoded = numbered(encoders[self.kind], **self._progress(examples))
        fitting = encoded.filter(lambda example: len(example["input_ids"]) <= self.max_length)
        if not hasattr(encoded, "__len__"):
            return fitting  # a stream, which nobody has counted
        longest, dropped = max(map(len, encoded["input_ids"])), len(encoded) - len(fitting)
        if not len(fitting):
            raise DataError(
                f"max_length = {self.max_length} is shorter than every example of {self.name} (the longest has "
                f"{longest} tokens); use --max_length {longest} to keep all"
            )
        if dropped:
            logger.warning(
                "%d of %d examples of %s are longer than max_length = %d tokens and were dropped (the longest has %d)",
                dropped, len(encoded), self.name, self.max_length, longest,
            )  # fmt: skip
        return fitting

    def _progress(self, examples: Any) -> dict[str, str]:
        return {"desc": f"Tokenizing {self.name}"} if hasattr(examples, "__len__") else {}

    def _require(self, columns: list[str]) -> None:
        needed = {
            "prompt_completion": _pair_flags(self.columns),
            "alpaca": {"instruction": None, "output": None},
            "messages": {_messages_column(columns, self.columns): "--messages_column"},
            "text": {self.columns.text: "--text_column"},
        }
        _require_columns(columns, needed[self.kind], self.name)

    def _pair(self, example: Mapping[str, Any], index: int) -> Ids:
        answers = example[self.columns.completion]
        if isinstance(answers, list) and answers:  # all of them right, as in Natural Questions: the first is learned
            example = {**example, self.columns.completion: answers[0]}
        prompt, completion = (
            self._text(example, column, index) for column in (self.columns.prompt, self.columns.completion)
        )
        return encode_pair(prompt, completion, self.tokenizer)

    def _alpaca(self, example: Mapping[str, Any], index: int) -> Ids:
        given = example.get("input")  # the one column that may be empty, or not be there at all
        empty = given is None or (isinstance(given, str) and not given.strip())
        context = "" if empty else self._text(example, "input", index).strip()
        prompt = _ALPACA.format(
            instruction=self._text(example, "instruction", index),
            more=", paired with an input that provides further context" if context else "",
            input=f"### Input:\n{context}\n\n" if context else "",
        )
        return encode_pair(prompt, self._text(example, "output", index), self.tokenizer)

    def _conversation(self, example: Mapping[str, Any], index: int) -> Ids:
        where = f"example {index + 1} of {self.name}"
        turns = list(_turns(example[_messages_column(list(example), self.columns)], where))
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f"{where} has no turn of the assistant, so there is nothing to learn; remove it")
        ids = self._apply_template(turns, where)
        labels = [IGNORED] * len(ids)
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._apply_template(turns[:number], where, add_generation_prompt=True)
            through = self._apply_template(turns[: number + 1], where)
            if ids[: len(through)] != through or through[: len(before)] != before:
                raise DataError(
                    f"the tokenizer's chat template writes earlier turns of {where} otherwise once later ones follow, "
                    "so that answers cannot be told from questions; give another --chat_template, or prompts and "
                    "completions"
                )
            labels[len(before) : len(through)] = through[len(before) :]
        return {"input_ids": ids, "labels": labels}

    def _apply_template(self, turns: list[dict[str, str]], where: str, **options: bool) -> list[int]:
        import jinja2

        if not turns:
            return []
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)
        except jinja2.TemplateError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"the chat template cannot write {where} ({reason}); repair the template or the example"
            ) from error

    def _blocks(self, examples: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        texts = [text for text in examples[self.columns.text] if text]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"column {self.columns.text!r} of {self.name} holds something other than text")
        pieces = [self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
        if self.packing:
            pieces = [[token for piece in pieces for token in piece]]
        size = self.max_length
        cut = [piece[i : i + size] for piece in pieces for i in range(0, len(piece), size)]
        blocks = [block for block in cut if len(block) > 1]  # one token predicts nothing
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    def _text(self, example: Mapping[str, Any], column: str, index: int) -> str:
        return _text(example, column, f"example {index + 1} of {self.name}")


def questions(examples: Dataset, name: str, columns: Columns) -> list[tuple[str, list[str]]]:
    """Each prompt as it is, and its right answers: the completion, or all of a list.

    Raises:
        DataError: for a column that is missing or an example without one of them.
    """
    _require_columns(examples.column_names, _pair_flags(columns), name)
    found = []
    for index, example in enumerate(examples):
        where, answers = f"example {index + 1} of {name}", example[columns.completion]
        right = answers if isinstance(answers, list) and answers else [answers]
        texts = [_text({columns.completion: answer}, columns.completion, where) for answer in right]
        found.append((_text(example, columns.prompt, where), texts))
    return found


def detect(columns: list[str], names: Columns, source: str) -> str:
    """The format of data with these columns.

    Raises:
        DataError: if none fits.
    """
    if names.prompt in columns and names.completion in columns:
        return "prompt_completion"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if _messages_column(columns, names) in columns:
        return "messages"
    if names.text in columns:
        return "text"
    raise DataError(
        f"{source} has the columns {', '.join(map(repr, columns))}, which are of no format that is known; rename them "
        "to prompt and completion, instruction and output, messages, or text, or name them with the --..._column "
        "options"
    )


def encode_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """``input_ids`` and ``labels`` of one example, closed by the end-of-sequence token.

    The two texts are tokenised apart, so that a prompt has the same tokens here and at inference.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORED] * len(prompt_ids) + completion_ids}


def _pair_flags(columns: Columns) -> dict[str, str]:
    return {columns.prompt: "--prompt_column", columns.completion: "--completion_column"}


def _require_columns(columns: list[str], needed: Mapping[str, str | None], name: str) -> None:
    for column, flag in needed.items():
        if column not in columns:
            remedy = f" or name it with {flag}" if flag else ""
            raise DataError(
                f"{name} has no column {column!r} (it has {', '.join(map(repr, columns))}); rename one{remedy}"
            )


def _text(example: Mapping[str, Any], column: str, where: str) -> str:
    text = example[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where} has {type(text).__name__} in {column!r}, where text is needed; write it as a string")
    if not (text and text.strip()):
        raise DataError(f"{where} has no {column!r}; fill it in or remove it")
    return text


def _messages_column(columns: list[str], names: Columns) -> str:
    if names.messages is not None:
        return names.messages
    return "conversations" if "conversations" in columns and "messages" not in columns else "messages"


def _turns(conversation: Any, where: str) -> Iterator[dict[str, str]]:
    """Turns as chat templates want them, from ``role`` and ``content`` or from ShareGPT's ``from`` and ``value``."""
    if not isinstance(conversation, list) or not conversation:
        raise DataError(f"{where} holds no list of messages; write each as an object with a role and its content")
    for turn in conversation:
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where} has a message with role {role!r} and content of type {type(content).__name__}; roles are "
                f"{', '.join(_ROLES)}, and content is text"
            )
        yield {"role": _ROLES[role], "content": content}
