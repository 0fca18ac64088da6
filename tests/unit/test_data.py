"""Data of every form and place for fine-tuning: what becomes of them, and one sentence for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import finetune
import lengths
import pytest
import torch
from collator import IGNORED, Collator
from data import DataError, Source, columns_of, hold_out, read
from finetune_arguments import Parser
from formats import Columns, Encoder, detect, encode_pair, questions
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.process_groups import without_ranks

FINETUNE = Path(finetune.__file__)
WORDS = ["<eos>", "<unk>", "where", "is", "zrh", "gva", "the", "airport", "zurich", "geneva", "and", "bern"]
ROLES = ["system:", "user:", "assistant:", "tool:"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that pads, as many do, with the end-of-sequence token."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*WORDS, *ROLES])}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def private_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` caches what it reads; a test neither finds the cache of another nor leaves one behind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return " ".join("_" if i == IGNORED else tokenizer.convert_ids_to_tokens(i) for i in ids)


def encode(rows: list[dict], kind: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> datasets.Dataset:
    encoder = Encoder(tokenizer, kind, "data 'x'", **{"max_length": 64, **settings})
    return encoder.encode(datasets.Dataset.from_list(rows))


ROWS = [{"prompt": "where is zrh", "completion": "zurich"}, {"prompt": "where is gva", "completion": "geneva"}]


# --- where data come from


def as_json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(ROWS))
    return folder / "a.json"


def as_jsonl(folder: Path) -> Path:
    return Path(write_lines(folder / "a.jsonl", *ROWS))


def as_csv(folder: Path) -> Path:
    (folder / "a.csv").write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS))
    return folder / "a.csv"


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def as_arrow_folder(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "arrow")
    return folder / "arrow"


def as_parts(folder: Path) -> Path:
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(folder / "parts")
    return folder / "parts"


def as_folder_of_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    return as_jsonl(folder / "files").parent


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "make", [as_json_list, as_jsonl, as_csv, as_parquet, as_arrow_folder, as_parts, as_folder_of_files]
)
def test_data_are_read_from_files_and_folders(
    make: Callable[[Path], Path], streaming: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = read(Source(str(make(tmp_path))), streaming=streaming)
    assert isinstance(examples, datasets.IterableDataset) == streaming
    assert columns_of(examples) == ["prompt", "completion"] and list(examples) == ROWS
    encoded = list(Encoder(tokenizer, "prompt_completion", "data", 64).encode(examples))
    assert [words(e["input_ids"], tokenizer) for e in encoded] == [
        "where is zrh zurich <eos>",
        "where is gva geneva <eos>",
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "", r"a\.jsonl' is empty; it needs at least one example"),
        ("a.jsonl", "\n \n", r"a\.jsonl' (is empty|cannot be read)"),
        ("a.jsonl", "prompt,completion\nx,y\n", r"a\.jsonl' cannot be read \(.+\); give a readable"),
        ("a.csv", "prompt,completion\n", r"a\.csv' (is empty|cannot be read)"),
        ("a.parquet", "no parquet", r"a\.parquet' cannot be read"),
        ("a.txt", "hello", r"a\.txt' is none of the files that can be read \(\.json, \.jsonl, \.csv"),
    ],
)
def test_a_bad_file_gets_one_sentence(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read(Source(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["nowhere.jsonl", "./nowhere", "some/deep/nowhere"])
def test_a_missing_file_is_named(place: str) -> None:
    with pytest.raises(DataError, match=rf"{place}' does not exist"):
        read(Source(place))


def test_a_dataset_that_the_hub_does_not_have_gets_one_sentence() -> None:
    with pytest.raises(DataError, match=r"data 'nobody/nothing' cannot be read \(") as caught:
        read(Source("nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_a_missing_part_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no split 'test'; it has 'train'"):
        read(Source(str(as_parts(tmp_path)), split="test"))


def test_a_share_is_held_out_at_random_and_for_good() -> None:
    examples = datasets.Dataset.from_list([{"text": str(i)} for i in range(20)])
    train, held_out = hold_out(examples, 0.25, seed=3)
    assert len(train) == 15 and len(held_out) == 5
    assert {*train["text"]} | {*held_out["text"]} == {str(i) for i in range(20)}
    assert list(held_out["text"]) == list(hold_out(examples, 0.25, seed=3)[1]["text"])
    assert list(held_out["text"]) != list(hold_out(examples, 0.25, seed=4)[1]["text"])
    with pytest.raises(DataError, match="leaves 0 to validate with and 20 to train on"):
        hold_out(examples, 0.01, seed=3)


# --- formats


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["id", "prompt", "completion"], "prompt_completion"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["messages"], "messages"),
        (["id", "conversations"], "messages"),
        (["text", "url"], "text"),
    ],
)
def test_the_columns_tell_the_format(columns: list[str], kind: str) -> None:
    assert detect(columns, Columns(), "data") == kind


def test_columns_of_no_format_are_listed() -> None:
    with pytest.raises(DataError, match=r"has the columns 'a', 'b', which are of no format .* --\.\.\._column"):
        detect(["a", "b"], Columns(), "data 'x'")
    assert detect(["a", "b"], Columns(prompt="a", completion="b"), "data") == "prompt_completion"
    assert detect(["a", "b"], Columns(messages="b"), "data") == "messages"
    assert detect(["a", "b"], Columns(text="a"), "data") == "text"


def test_loss_is_on_the_completion_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode_pair("where is zrh", "zurich", tokenizer)
    assert words(example["input_ids"], tokenizer) == "where is zrh zurich <eos>"
    assert words(example["labels"], tokenizer) == "_ _ _ zurich <eos>"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_published_questions_are_read_by_the_names_of_their_columns(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """NQ-open has lists of right answers, GSM8K one text with the way to it; both call their columns the same."""
    nq = {"question": "where is zrh", "answer": ["zurich", "geneva"]}
    gsm8k = {"question": "where is gva", "answer": "the airport is geneva"}
    names = ["--prompt_column", "question", "--completion_column", "answer", "--max_length", "16"]
    for row, answer in ((nq, "zurich <eos>"), (gsm8k, "the airport is geneva <eos>")):
        file = tmp_path / f"train{suffix}"
        rows = datasets.Dataset.from_list([row])
        rows.to_parquet(file) if suffix == ".parquet" else rows.to_json(file)
        line = ["--model_name_or_path", "m", "--train_file", str(file), "--output_dir", "o", "--use_cpu", *names]
        (example,) = finetune.load_examples(Parser().parse(line)[1], tokenizer, seed=0)["train"]
        assert tokenizer.decode(example["input_ids"]) == f"{row['question']} {answer}"
        learned = [token for token in example["labels"] if token != IGNORED]
        assert tokenizer.decode(learned) == answer


def test_alpaca_has_its_words_and_loss_on_the_output(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"instruction": "where is zrh", "input": "the airport", "output": "zurich"},
        {"instruction": "where is gva", "input": "", "output": "geneva"},
    ]
    told: list[str] = []
    spy = make_tokenizer()
    encoder = Encoder(spy, "alpaca", "data", 256)
    original = type(spy).__call__
    try:
        type(spy).__call__ = lambda self, text, **kw: (told.append(text), original(self, text, **kw))[1]
        encoded = encoder.encode(datasets.Dataset.from_list(rows))
    finally:
        type(spy).__call__ = original
    assert told[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nwhere is zrh\n\n### Input:\nthe "
        "airport\n\n### Response:\n"
    )
    assert told[2] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nwhere is gva\n\n### Response:\n"
    )
    learned = [words([i for i in labels if i != IGNORED], tokenizer) for labels in encoded["labels"]]
    assert learned == ["zurich <eos>", "geneva <eos>"]


CHAT = [
    {"role": "system", "content": "the airport"},
    {"role": "user", "content": "where is zrh"},
    {"role": "assistant", "content": "zurich"},
    {"role": "user", "content": "and gva"},
    {"role": "assistant", "content": "geneva"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], "system"), "value": turn["content"]}
    for turn in CHAT
]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT}], ids=["messages", "sharegpt"])
def test_loss_is_on_every_turn_of_the_assistant(row: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode([row], "messages", tokenizer)
    assert words(encoded[0]["input_ids"], tokenizer) == (
        "system: the airport user: where is zrh assistant: zurich <eos> user: and gva assistant: geneva <eos>"
    )
    assert words(encoded[0]["labels"], tokenizer) == "_ _ _ _ _ _ _ _ zurich <eos> _ _ _ _ geneva <eos>"


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        ([], "example 1 of data 'x' holds no list of messages"),
        ([{"role": "user", "content": "where"}], "example 1 of data 'x' has no turn of the assistant"),
        ([{"role": "judge", "content": "where"}], "has a message with role 'judge' .* roles are human, gpt, user"),
        ([{"role": "user", "content": None}], "with role 'user' and content of type NoneType"),
    ],
)
def test_a_wrong_conversation_gets_one_sentence(turns: list, sentence: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        encode([{"messages": turns}], "messages", tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "the tokenizer has no chat template, .* --chat_template, or train on prompts and completions"),
        ("{% for m in messages %}", "the chat template cannot write example 1 of data 'x'"),
        ("{{ raise_exception('system first') }}", r"the chat template cannot write example 1 .*\(system first\)"),
        # As templates do that drop the thinking of all but the last answer.
        ("{{ messages[-1]['role'] }}: {{ messages[-1]['content'] }}", "writes earlier turns of example 1 .* otherwise"),
    ],
)
def test_a_template_that_does_not_serve_gets_one_sentence(template: str | None, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        encode([{"messages": CHAT}], "messages", make_tokenizer(template))
    assert "\n" not in str(caught.value)


TEXTS = [{"text": "where is zrh"}, {"text": ""}, {"text": "the airport is zurich and bern"}, {"text": "gva"}]


def test_texts_are_packed_into_whole_blocks_and_nothing_is_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(TEXTS, "text", tokenizer, max_length=5)
    assert [words(ids, tokenizer) for ids in encoded["input_ids"]] == [
        "where is zrh <eos> the",
        "airport is zurich and bern",
        "<eos> gva <eos>",
    ]
    assert encoded["labels"] == encoded["input_ids"]


def test_a_last_block_of_one_token_predicts_nothing_and_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode([{"text": "where is zrh and bern"}], "text", tokenizer, max_length=5)
    assert [words(ids, tokenizer) for ids in encoded["input_ids"]] == ["where is zrh and bern"]


def test_without_packing_texts_stay_apart_and_long_ones_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(TEXTS, "text", tokenizer, max_length=5, packing=False)
    assert [words(ids, tokenizer) for ids in encoded["input_ids"]] == [
        "where is zrh <eos>",
        "the airport is zurich and",
        "bern <eos>",
        "gva <eos>",
    ]


@pytest.mark.parametrize(
    ("row", "kind", "sentence"),
    [
        ({"prompt": "x"}, "prompt_completion", r"has no column 'completion' \(it has 'prompt'\).*--completion_column"),
        ({"question": "x", "completion": "y"}, "prompt_completion", "has no column 'prompt' .*--prompt_column"),
        ({"prompt": "x", "completion": 3}, "prompt_completion", "example 1 .* has int in 'completion', where text"),
        ({"prompt": "x", "completion": []}, "prompt_completion", "has list in 'completion', where text is needed"),
        ({"prompt": "x", "completion": [3]}, "prompt_completion", "has int in 'completion', where text is needed"),
        ({"prompt": "x", "completion": None}, "prompt_completion", "example 1 of data 'x' has no 'completion'"),
        ({"prompt": "  ", "completion": "y"}, "prompt_completion", "example 1 of data 'x' has no 'prompt'"),
        ({"instruction": "x", "output": ""}, "alpaca", "example 1 of data 'x' has no 'output'"),
        ({"instruction": "x", "input": 3, "output": "y"}, "alpaca", "example 1 of data 'x' has int in 'input', where"),
        ({"text": "x"}, "alpaca", "has no column 'instruction'"),
        ({"text": ""}, "text", "data 'x' holds no text in 'text'; give data with some"),
        ({"text": "x"}, "messages", r"has no column 'messages' .* --messages_column"),
        ({"prompt": "x"}, "text", r"has no column 'text' .* --text_column"),
        ({"text": 3}, "text", "column 'text' of data 'x' holds something other than text"),
    ],
)
def test_a_wrong_example_gets_one_sentence(
    row: dict, kind: str, sentence: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        encode([row], kind, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Encoder(bare, "text", "data", 8)


def test_questions_are_read_as_they_are(tmp_path: Path) -> None:
    asked = questions(read(Source(str(as_jsonl(tmp_path)))), "data", Columns())
    assert asked == [(row["prompt"], [row["completion"]]) for row in ROWS]
    several = datasets.Dataset.from_list([{"q": " x", "a": ["1 ", "2"]}, {"q": "y", "a": ["3"]}])
    assert questions(several, "data", Columns("q", "a")) == [(" x", ["1 ", "2"]), ("y", ["3"])]
    with pytest.raises(DataError, match="has no column 'completion'"):
        questions(datasets.Dataset.from_list([{"prompt": "x"}]), "data", Columns())
    for wrong in ([], ["1", ""], ["1", None]):
        with pytest.raises(DataError, match="example 2 of data has "):
            examples = [{"prompt": "x", "completion": ["1"]}, {"prompt": "x", "completion": wrong}]
            questions(datasets.Dataset.from_list(examples), "data", Columns())


# --- lengths, batches


def test_long_examples_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "where is " * n, "completion": "bern"} for n in (1, 2, 9)]
    kept = encode(rows, "prompt_completion", tokenizer, max_length=6)
    assert [len(ids) for ids in kept["input_ids"]] == [4, 6]
    assert kept.column_names == ["input_ids", "labels"]
    assert "1 of 3 examples of data 'x' are longer than max_length = 6 tokens and were dropped" in caplog.text
    with pytest.raises(DataError, match=r"max_length = 3 is shorter than every example .* use --max_length 20"):
        encode(rows, "prompt_completion", tokenizer, max_length=3)


@pytest.mark.parametrize("streaming", [False, True])
def test_lengths_are_counted(streaming: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "where is " * n, "completion": "bern"} for n in range(1, 6)]
    examples = datasets.Dataset.from_list(rows)
    examples = examples.to_iterable_dataset() if streaming else examples
    found = lengths.measure("train", Encoder(tokenizer, "prompt_completion", "data", 64).encode(examples))
    assert found.counts.tolist() == [4, 6, 8, 10, 12] and found.total == 40 and found.learned == 10
    assert found.sampled == streaming
    console = Console(width=120, record=True)
    console.print(lengths.table([found], 64))
    shown = console.export_text()
    row = next(line for line in shown.splitlines() if "train" in line)
    assert ("first 5" in row) == streaming
    for value in ("40", "25%", " 4 ", " 8 ", "12"):
        assert value in row


def test_padding_is_right_ignored_and_not_mistaken_for_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    short = encode_pair("zrh", "zurich", tokenizer)
    long = encode_pair("where is the airport", "geneva", tokenizer)
    batch = Collator(tokenizer.pad_token_id)([short, long])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (2, 6))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    # <eos> is also the padding token: it counts where the answer ends, and nowhere after.
    assert batch["labels"][0].tolist() == [-100, WORDS.index("zurich"), tokenizer.eos_token_id, -100, -100, -100]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# --- the script


def test_a_script_ends_with_the_sentence_and_without_a_traceback(tmp_path: Path) -> None:
    make_tokenizer(None).save_pretrained(tmp_path / "model")
    write_lines(tmp_path / "chat.jsonl", {"messages": CHAT})
    command = [sys.executable, str(FINETUNE), "--model_name_or_path", str(tmp_path / "model"), "--use_cpu"]
    command += ["--train_file", str(tmp_path / "chat.jsonl"), "--output_dir", str(tmp_path / "out")]
    # Not as a rank of the group that other tests have set up in this process.
    environment = {
        **without_ranks(os.environ),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("finetune.py: the tokenizer has no chat template")
